"""What surrounds the data: descriptors for select, poll and epoll, options, and the end of sockets and hosts."""

import asyncio
import errno
import gc
import os
import random
import select
import selectors
import struct
import subprocess
import sys
import threading
import time
import warnings

import pytest
from sockethosts import B, listening, read_all, running

from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]


# -- descriptors -------------------------------------------------------------------------------


def test_descriptor_tells_the_truth(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    assert client.fileno() == client.fileno() > 2
    assert select.select([client], [client], [], 0) == ([], [client], [])
    server.sendall(b"x")
    assert select.select([client], [], [], 5) == ([client], [], [])
    client.recv(1)
    assert select.select([client], [client], [], 0) == ([], [client], [])
    server.shutdown(socket.SHUT_WR)
    poller = select.poll()
    poller.register(client, select.POLLIN | select.POLLRDHUP)
    assert dict(poller.poll(5000))[client.fileno()] == select.POLLIN | select.POLLRDHUP
    fd = client.fileno()
    client.close()
    assert client.fileno() == -1
    with pytest.raises(OSError):
        os.fstat(fd)


def test_registered_before_connecting(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener, socket.socket(host=hosts[0]) as sock, select.epoll() as epoll:
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLOUT | select.EPOLLET)
        epoll.poll(0)
        assert sock.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        assert epoll.poll(5) == [(sock.fileno(), select.EPOLLOUT)]
        listener.accept()[0].close()


def test_asyncio_streams(hosts: tuple[Embedded, Embedded]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line[::-1])
            await writer.drain()
        writer.close()

    async def talk(address: tuple[str, int], i: int) -> None:
        sock = socket.socket(host=hosts[0])
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection(sock=sock)  # type: ignore[arg-type]
        for n in (10, 1000, 60_000):
            writer.write(bytes([65 + i]) * n + b"\n")
            assert await reader.readexactly(n + 1) == b"\n" + bytes([65 + i]) * n
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        listener = listening(hosts[1])
        server = await asyncio.start_server(serve, sock=listener)  # type: ignore[arg-type]
        async with server, asyncio.timeout(20):
            await asyncio.gather(*(talk(listener.getsockname(), i) for i in range(10)))

    asyncio.run(main())


def test_selector_loop(hosts: tuple[Embedded, Embedded]) -> None:
    """An echo server as the selectors documentation has it, twenty clients."""
    total = 0
    with listening(hosts[1], backlog=32) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        address = listener.getsockname()

        def clients() -> None:
            socks = [socket.create_connection(address, 5, host=hosts[0]) for _ in range(20)]
            for i, sock in enumerate(socks):
                sock.sendall(bytes([i]) * 1000)
            for i, sock in enumerate(socks):
                assert sock.recv(1000, socket.MSG_WAITALL) == bytes([i]) * 1000
                sock.close()

        deadline = time.monotonic() + 15
        with running(clients):
            done = 0
            while done < 20:
                assert time.monotonic() < deadline
                for key, _ in selector.select(0.5):
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is listener:
                        conn, _ = sock.accept()
                        conn.setblocking(False)
                        selector.register(conn, selectors.EVENT_READ)
                        continue
                    data = sock.recv(65536)
                    if data:
                        total += len(data)
                        sock.sendall(data)
                    else:
                        selector.unregister(sock)
                        sock.close()
                        done += 1
    assert total == 20_000


def test_edge_triggered_reader_loses_nothing(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    server.setblocking(False)
    data = random.Random(9).randbytes(3_000_000)

    def send() -> None:
        for at in range(0, len(data), 100_000):
            client.sendall(data[at : at + 100_000])
            time.sleep(0.001)
        client.shutdown(socket.SHUT_WR)

    got = bytearray()
    with running(send), select.epoll() as epoll:
        epoll.register(server.fileno(), select.EPOLLIN | select.EPOLLET)
        at_end = False
        while not at_end:
            assert epoll.poll(5), f"no event after {len(got)} bytes"
            while True:
                try:
                    part = server.recv(100_000)
                except BlockingIOError:
                    break
                got += part
                if not part:
                    at_end = True
                    break
    assert got == data


def test_detach_and_take_over(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    fd = client.detach()
    assert fd > 2 and client.fileno() == -1
    with pytest.raises(OSError):
        client.send(b"x")
    again = socket.socket(fileno=fd)
    again.sendall(b"still here")
    assert server.recv(100) == b"still here"
    assert again.detach() == fd
    socket.close(fd)
    assert server.recv(1) == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        socket.socket(fileno=fd)


def test_options(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sol = socket.SOL_SOCKET
        assert sock.getsockopt(sol, socket.SO_TYPE) == socket.SOCK_STREAM
        assert sock.getsockopt(sol, socket.SO_PROTOCOL) == socket.IPPROTO_TCP
        assert sock.getsockopt(sol, socket.SO_DOMAIN) == socket.AF_INET
        assert sock.getsockopt(sol, socket.SO_ERROR) == 0
        assert sock.getsockopt(sol, socket.SO_ACCEPTCONN) == 0
        for name in (socket.SO_REUSEADDR, socket.SO_REUSEPORT, socket.SO_BROADCAST, socket.SO_KEEPALIVE):
            assert sock.getsockopt(sol, name) == 0
            sock.setsockopt(sol, name, True)
            assert sock.getsockopt(sol, name) != 0
            assert struct.unpack("i", sock.getsockopt(sol, name, 4))[0] != 0
        sock.setsockopt(sol, socket.SO_REUSEADDR, struct.pack("i", 0))
        assert sock.getsockopt(sol, socket.SO_REUSEADDR) == 0
        for level, name, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 11),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 12),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 13),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 14_000),
            (socket.IPPROTO_IP, socket.IP_TTL, 33),
            (socket.IPPROTO_IP, socket.IP_TOS, 16),
        ):
            sock.setsockopt(level, name, value)
            assert sock.getsockopt(level, name) == value
        with pytest.raises(OSError) as caught:
            sock.setsockopt(sol, 9999, 1)
        assert caught.value.errno == errno.ENOPROTOOPT
        with pytest.raises(OSError) as caught:
            sock.getsockopt(socket.IPPROTO_TCP, 9999)
        assert caught.value.errno == errno.ENOPROTOOPT
        with pytest.raises(OSError, match="pack"):
            sock.setsockopt(sol, socket.SO_LINGER, 1)


def test_options_of_a_connection_wait_for_it(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener, socket.socket(host=hosts[0]) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 500)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == 500
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 1
        sock.connect(listener.getsockname())
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 500
        server, _ = listener.accept()
        with server:
            server.settimeout(0.05)
            sock.send(b"corked")
            with pytest.raises(TimeoutError):
                server.recv(10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            assert server.recv(10) == b"corked"


def test_options_are_inherited_and_tcp_info(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with socket.create_connection(listener.getsockname(), 5, host=hosts[0]) as client:
            server, _ = listener.accept()
            with server:
                assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                assert info[0] == 1  # TCP_ESTABLISHED of <netinet/tcp.h>
                assert struct.unpack_from("I", info, 16)[0] == client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


# -- the end -----------------------------------------------------------------------------------


def test_closed_socket(hosts: tuple[Embedded, Embedded]) -> None:
    sock = socket.socket(host=hosts[0])
    sock.close()
    sock.close()
    assert "[closed]" in repr(sock) and sock.fileno() == -1
    for call in (
        lambda: sock.recv(1),
        lambda: sock.send(b""),
        sock.getsockname,
        lambda: sock.bind(("", 0)),
        sock.listen,
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_forgotten_socket_warns_and_closes(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        server, _ = listener.accept()
    server.settimeout(5)
    with pytest.warns(ResourceWarning, match="unclosed <ulnet.stack.socket.socket.*raddr="):
        del client
        gc.collect()
    with server:
        assert server.recv(1) == b""


def test_repr(joined: tuple[socket.socket, socket.socket]) -> None:
    text = repr(joined[0])
    assert text.startswith("<ulnet.stack.socket.socket") and "fd=" not in text
    assert f"laddr={joined[0].getsockname()}" in text and f"raddr=('{B}', " in text


def test_unsupported_sockets(hosts: tuple[Embedded, Embedded]) -> None:
    for arguments, number in (
        ((socket.AF_INET6,), errno.EAFNOSUPPORT),
        ((socket.AF_UNIX,), errno.EAFNOSUPPORT),
        ((socket.AF_INET, 3), errno.ESOCKTNOSUPPORT),
        ((socket.AF_INET, socket.SOCK_STREAM, 17), errno.EPROTONOSUPPORT),
    ):
        with pytest.raises(OSError) as caught:
            socket.socket(*arguments, host=hosts[0])
        assert caught.value.errno == number
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, host=hosts[0])
    assert sock.type == socket.SOCK_DGRAM and sock.gettimeout() == 0.0
    sock.close()


def test_two_hundred_at_once_and_nothing_left(hosts: tuple[Embedded, Embedded]) -> None:
    a, b = hosts
    fds = len(os.listdir("/proc/self/fd"))
    with listening(b, backlog=256) as listener:
        clients = []
        servers = []
        for _ in range(200):
            clients.append(socket.create_connection(listener.getsockname(), 5, host=a))
            servers.append(listener.accept()[0])
        for i, sock in enumerate(clients):
            sock.fileno()
            sock.sendall(b"%d" % i)
        for i, sock in enumerate(servers):
            sock.settimeout(5)
            assert sock.recv(10) == b"%d" % i
        for sock in clients + servers:
            sock.close()
    deadline = time.monotonic() + 5
    while [r for h in hosts for r in h.engine.sessions() if r["state"] != "TIME-WAIT"]:
        assert time.monotonic() < deadline, [r["state"] for h in hosts for r in h.engine.sessions()]
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_hundreds_in_a_row(hosts: tuple[Embedded, Embedded]) -> None:
    a, b = hosts
    with listening(b) as listener:
        for i in range(300):
            with socket.create_connection(listener.getsockname(), 5, host=a) as client:
                server, _ = listener.accept()
                client.sendall(b"%d" % i)
                assert server.recv(10) == b"%d" % i
                server.close()  # the passive side closes first: TIME-WAIT is its
                assert client.recv(1) == b""
    assert a.names_in_use <= 1


def test_host_shutdown_delivers(hosts: tuple[Embedded, Embedded]) -> None:
    a, b = hosts
    with listening(b) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=a)
        server, _ = listener.accept()
    server.settimeout(5)
    data = random.Random(6).randbytes(3_000_000)
    got: list[bytes] = []
    with running(lambda: got.append(read_all(server))):
        client.sendall(data)
        client.close()
        a.shutdown()
    server.close()
    assert got == [data]
    with pytest.raises(OSError, match="closed"):
        socket.socket(host=a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.shutdown()


def test_lent_buffer_outlives_its_host() -> None:
    a, b = embedded.pair()
    with listening(b) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=a)
        server, _ = listener.accept()
    client.sendall(b"kept" * 2000)
    buffer = server.recv_buffer(8000)
    client.close()
    server.close()
    a.shutdown(0.1)
    b.shutdown(0.1)
    del a, b, client, server
    gc.collect()
    view = memoryview(buffer)  # type: ignore[arg-type]
    assert bytes(view[:8]) == b"keptkept"
    view.release()
    buffer.release()


def test_forgotten_host_warns_and_ends_its_thread() -> None:
    before = threading.active_count()
    a, b = embedded.pair()
    assert threading.active_count() == before + 2
    with pytest.warns(ResourceWarning, match="unclosed <Embedded"):
        del a, b
        gc.collect()
    assert threading.active_count() == before


def test_program_end_delivers() -> None:
    # The reader gets its time to print: what is registered first runs last, after the hosts have delivered.
    code = """
import atexit, threading
atexit.register(lambda: reader.join(10))
from ulnet.stack import embedded, socket
a, b = embedded.pair()
listener = socket.create_server(("", 7), host=b)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # delivered is read, but for so much
client = socket.create_connection(("10.0.0.2", 7), host=a)
server, _ = listener.accept()
def read():
    n = 0
    while data := server.recv(65536):
        n += len(data)
    print(n, flush=True)
reader = threading.Thread(target=read, daemon=True)
reader.start()
client.sendall(bytes(3_000_000))
client.close()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert out.returncode == 0 and out.stdout == "3000000\n", out.stderr


def test_default_host(hosts: tuple[Embedded, Embedded]) -> None:
    socket.set_default_host(hosts[0])
    try:
        with socket.socket() as sock:
            assert sock.host is hosts[0]
    finally:
        socket.set_default_host(None)
