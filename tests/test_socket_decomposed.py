"""The same sockets under a network server, against the kernel's own stack on another host."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import random
import select
import socket as kernel
import struct
import time
from collections.abc import Iterator

import pytest
from sockethosts import read_all, running

from tests.netserver_bed import ADDRESS, NOBODY, PEER, Bed, wait_for
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import socket
from ulnet.stack.proxy import Proxy

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("sockets"))
    yield bed
    bed.close()


def expect_settled(bed: Bed) -> None:
    """Nothing is left with us, in the filters or in the guard; TIME-WAIT runs in the server (SOSP 1993 table 1)."""

    def settled() -> bool:
        tables = bed.tables()
        return tables["flows"] == tables["guarded"] == 0 and all(
            row["state"] == "TIME-WAIT" and row["place"] == "server" for row in bed.sessions()
        )

    wait_for(settled, "the server's tables settle")


@pytest.fixture
def proxy(bed: Bed) -> Iterator[Proxy]:
    """This process as an application; nothing may be left of it."""
    proxy = bed.proxy()
    yield proxy
    gc.collect()
    proxy.shutdown()
    expect_settled(bed)


@pytest.fixture
def service(bed: Bed) -> Iterator[kernel.socket]:
    """A listening kernel socket on the peer."""
    sock = bed.b.socket()
    sock.settimeout(5)
    sock.bind((PEER, 0))
    sock.listen(64)
    yield sock
    sock.close()


@pytest.fixture(params=["connect", "accept"])
def joined(
    request: pytest.FixtureRequest, bed: Bed, proxy: Proxy, service: kernel.socket
) -> Iterator[tuple[socket.socket, kernel.socket]]:
    """Our end and the kernel's end of a connection that either of them opened."""
    if request.param == "connect":
        ours = socket.create_connection(service.getsockname(), 5, host=proxy)
        theirs, peer = service.accept()
        assert peer == ours.getsockname()
    else:
        with socket.create_server((ADDRESS, 0), host=proxy) as listener:
            listener.settimeout(5)
            theirs = bed.b.socket()
            theirs.settimeout(5)
            theirs.connect(listener.getsockname())
            ours, peer = listener.accept()
            assert peer == theirs.getsockname() == ours.getpeername()
    ours.settimeout(5)
    theirs.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_echo(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    assert ours.getsockname()[0] == ADDRESS and ours.getpeername()[0] == PEER
    for i in range(200):
        ours.sendall(b"%d" % i)
        assert theirs.recv(10) == b"%d" % i
        theirs.sendall(b"!" * (i + 1))
        assert ours.recv(i + 1, socket.MSG_WAITALL) == b"!" * (i + 1)


def test_big_both_ways(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    data = random.Random(1).randbytes(20_000_000)

    def kernel_side() -> None:
        assert hashlib.sha256(read_all(theirs)).digest() == hashlib.sha256(data).digest()  # type: ignore[arg-type]
        theirs.sendall(data)
        theirs.shutdown(kernel.SHUT_WR)

    with running(kernel_side):
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        got = read_all(ours)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert ours.session is not None and ours.session.stat()["retransmits"] == 0


def test_lent_buffers_of_the_ring(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    data = random.Random(2).randbytes(6_000_000)
    held = []
    got = hashlib.sha256()
    with running(lambda: theirs.sendall(data)):
        total = 0
        while total < len(data):
            buffer = ours.recv_buffer(1 << 20)
            assert len(buffer)
            total += len(buffer)
            held.append(buffer)
            if len(held) == 60:  # many at once, given back late: the stack must neither stall nor reuse them
                for buffer in held:
                    got.update(buffer)  # type: ignore[arg-type]
                    buffer.release()
                held.clear()
    for buffer in held:
        got.update(buffer)  # type: ignore[arg-type]
        buffer.release()
    assert got.digest() == hashlib.sha256(data).digest()


def test_ends(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    theirs.shutdown(kernel.SHUT_WR)
    assert ours.recv(1) == b""
    ours.sendall(b"last words")
    ours.close()
    assert read_all(theirs) == b"last words"  # type: ignore[arg-type]


def test_peer_resets(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    theirs.setsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, struct.pack("ii", 1, 0))
    poller = select.poll()
    poller.register(ours.fileno(), select.POLLIN | select.POLLRDHUP)
    theirs.close()
    assert poller.poll(5000)[0][1] & (select.POLLERR | select.POLLHUP) == select.POLLERR | select.POLLHUP
    with pytest.raises(ConnectionResetError):
        ours.recv(1)


def test_we_reset(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)


def test_select_and_nonblocking(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, theirs = joined
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    assert select.select([ours], [ours], [], 0) == ([], [ours], [])
    theirs.send(b"x")
    assert select.select([ours], [], [], 5)[0] == [ours]
    assert ours.recv(10) == b"x"


def test_options_reach_the_connection(bed: Bed, proxy: Proxy, service: kernel.socket) -> None:
    with socket.socket(host=proxy) as ours:
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        ours.settimeout(5)
        ours.connect(service.getsockname())
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        service.accept()[0].close()


def test_connect_errors(bed: Bed, proxy: Proxy) -> None:
    for address, expected in (
        ((PEER, 9), errno.ECONNREFUSED),
        ((NOBODY, 80), errno.EHOSTUNREACH),
        (("192.0.2.1", 80), errno.ENETUNREACH),
    ):
        with socket.socket(host=proxy) as ours:
            ours.settimeout(10)
            assert ours.connect_ex(address) == expected


def test_connect_again_after_refusal(bed: Bed, proxy: Proxy, service: kernel.socket) -> None:
    with socket.socket(host=proxy) as ours:
        ours.settimeout(5)
        assert ours.connect_ex((PEER, 9)) == errno.ECONNREFUSED
        ours.connect(service.getsockname())
        service.accept()[0].close()
        assert ours.recv(1) == b""


def test_nonblocking_connect(bed: Bed, proxy: Proxy, service: kernel.socket) -> None:
    for address, expected in ((service.getsockname(), 0), ((PEER, 9), errno.ECONNREFUSED)):
        with socket.socket(host=proxy) as ours, select.epoll() as epoll:
            ours.setblocking(False)
            epoll.register(ours.fileno(), select.EPOLLOUT)
            assert ours.connect_ex(address) == errno.EINPROGRESS
            deadline = time.monotonic() + 5
            while (result := ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == 0:
                events = epoll.poll(0.5)
                assert time.monotonic() < deadline
                if events and expected == 0:
                    break
            assert result == expected
            if expected == 0:
                assert ours.getpeername() == address and ours.getsockname()[0] == ADDRESS
                assert ours.send(b"hi") == 2
                theirs = service.accept()[0]
                assert theirs.recv(10) == b"hi"
                theirs.close()


def test_descriptor_seen_before_connect(proxy: Proxy) -> None:
    """asyncio asks for the descriptor first: it must not go on showing what it showed before connect()."""
    with socket.socket(host=proxy) as sock:
        sock.setblocking(False)
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT)
        assert poll.poll(0)  # unconnected: writable and hung up, as the kernel says it
        with pytest.raises(BlockingIOError):
            sock.connect((PEER, 9))
        assert poll.poll(5000)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_large_recv_without_a_connection(proxy: Proxy) -> None:
    with socket.socket(host=proxy) as sock, pytest.raises(OSError) as caught:
        sock.recv(1 << 20)
    assert caught.value.errno == errno.ENOTCONN


def test_asyncio(bed: Bed, proxy: Proxy) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()

    def kernel_clients(address: tuple[str, int]) -> None:
        for i in range(10):
            with bed.b.socket() as theirs:
                theirs.settimeout(5)
                theirs.connect(address)
                theirs.sendall(b"hello %d\n" % i)
                assert theirs.recv(100) == b"HELLO %d\n" % i

    async def main() -> None:
        listener = socket.create_server((ADDRESS, 0), host=proxy)
        listener.setblocking(False)
        server = await asyncio.start_server(serve, sock=listener)  # type: ignore[arg-type]
        async with server, asyncio.timeout(20):
            await asyncio.to_thread(kernel_clients, listener.getsockname())

    asyncio.run(main())


def test_udp(bed: Bed, proxy: Proxy) -> None:
    with bed.b.socket(type=kernel.SOCK_DGRAM) as theirs, socket.socket(type=socket.SOCK_DGRAM, host=proxy) as ours:
        theirs.bind((PEER, 0))
        theirs.settimeout(5)
        ours.settimeout(5)
        for size in (0, 1, 1472, 1473, 9000, 60_000):
            data = random.Random(size).randbytes(size)
            assert ours.sendto(data, theirs.getsockname()) == size
            got, peer = theirs.recvfrom(65535)
            assert got == data and peer[0] == ADDRESS
            theirs.sendto(data[::-1], peer)
            assert ours.recvfrom(65535) == (data[::-1], theirs.getsockname())
    with socket.socket(type=socket.SOCK_DGRAM, host=proxy) as ours:
        ours.settimeout(5)
        ours.connect((PEER, 9))
        ours.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(1)


def test_to_oneself(proxy: Proxy) -> None:
    with socket.create_server(("", 0), host=proxy) as listener:
        listener.settimeout(5)
        with socket.create_connection(listener.getsockname(), 5, host=proxy) as client:
            server, peer = listener.accept()
            with server:
                assert peer == client.getsockname()
                data = random.Random(3).randbytes(3_000_000)
                with running(lambda: client.sendall(data)):
                    server.settimeout(5)
                    assert server.recv(len(data), socket.MSG_WAITALL) == data


def test_a_hundred_at_once(bed: Bed, proxy: Proxy, service: kernel.socket) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    pairs = []
    for i in range(100):
        ours = socket.create_connection(service.getsockname(), 5, host=proxy)
        theirs, _ = service.accept()
        theirs.settimeout(5)
        ours.fileno()
        ours.sendall(b"%d" % i)
        pairs.append((ours, theirs))
    for i, (ours, theirs) in enumerate(pairs):
        assert theirs.recv(10) == b"%d" % i
        theirs.close()
        assert ours.recv(1) == b""
        ours.close()
    expect_settled(bed)
    assert len(os.listdir("/proc/self/fd")) <= fds + 2  # each thread that tells the server something has a connection


def test_close_wakes_receiver(joined: tuple[socket.socket, kernel.socket]) -> None:
    ours, _ = joined
    ours.settimeout(None)
    outcome: list[object] = []

    def receive() -> None:
        try:
            outcome.append(ours.recv(1))
        except OSError as e:
            outcome.append(e.errno)

    with running(receive):
        time.sleep(0.1)
        ours.close()
    assert outcome == [errno.EBADF]


def test_another_program_leaves(bed: Bed, service: kernel.socket) -> None:
    """The kernel moves the last channel of the group into the place of one that leaves: its packets must follow."""
    leaver, stayer = bed.proxy(), bed.proxy()
    with socket.create_connection(service.getsockname(), 5, host=stayer) as ours:
        theirs, _ = service.accept()
        leaver.shutdown()
        time.sleep(0.1)
        for _ in range(5):
            theirs.sendall(b"ping")
            assert ours.recv(100) == b"ping"
            time.sleep(0.02)
        theirs.close()
    stayer.shutdown()
    expect_settled(bed)
