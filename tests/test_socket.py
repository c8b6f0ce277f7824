"""TCP sockets over two embedded hosts: what a program sends and receives, as in socket(7) and tcp(7)."""

import hashlib
import io
import random
import select
import time

import pytest
from sockethosts import A, B, listening, read_all, running

from ulnet.kernelshim.fault import FaultLink
from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]


# -- TCP: data ---------------------------------------------------------------------------------


def test_echo_and_names(hosts: tuple[Embedded, Embedded]) -> None:
    a, b = hosts
    with listening(b, 7000) as listener:
        assert listener.getsockname() == (B, 7000)
        with socket.socket(host=a) as client:
            client.settimeout(5)
            assert client.getsockname() == ("0.0.0.0", 0)
            client.connect((B, 7000))
            server, peer = listener.accept()
            with server:
                assert peer == client.getsockname() == server.getpeername()
                assert client.getpeername() == server.getsockname() == (B, 7000)
                assert client.send(b"hello") == 5
                assert server.recv(100) == b"hello"
                server.sendall(b"world")
                assert client.recv(3) == b"wor"
                assert client.recv(100) == b"ld"
                assert client.session is not None and client.session.state == "ESTABLISHED"


def test_to_oneself(hosts: tuple[Embedded, Embedded]) -> None:
    a, _ = hosts
    with listening(a) as listener, socket.create_connection(listener.getsockname(), 5, host=a) as client:
        server, peer = listener.accept()
        with server:
            assert peer[0] == A
            client.sendall(b"x" * 100_000)
            server.settimeout(5)
            assert len(server.recv(100_000, socket.MSG_WAITALL)) == 100_000


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "slice"])
def test_big_transfer_is_exact(joined: tuple[socket.socket, socket.socket], kind: str) -> None:
    client, server = joined
    data = random.Random(kind).randbytes(5_000_000)
    sent: bytes | bytearray | memoryview = data
    if kind == "bytearray":
        sent = bytearray(data)
    elif kind == "memoryview":
        sent = memoryview(data)
    elif kind == "slice":
        sent = memoryview(b"x" + data + b"y")[1:-1]

    def send() -> None:
        client.sendall(sent)
        if isinstance(sent, bytearray):
            sent[:] = bytes(len(sent))  # what was taken was copied
        client.shutdown(socket.SHUT_WR)

    with running(send):
        got = read_all(server)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def test_both_directions_at_once_on_one_socket(joined: tuple[socket.socket, socket.socket]) -> None:
    data = [random.Random(i).randbytes(2_000_000) for i in range(2)]
    got = [b"", b""]

    def send(i: int) -> None:
        joined[i].sendall(data[i])
        joined[i].shutdown(socket.SHUT_WR)

    def receive(i: int) -> None:
        got[i] = read_all(joined[i])

    with running(lambda: send(0)), running(lambda: send(1)), running(lambda: receive(0)):
        receive(1)
    assert got == data[::-1]


def test_half_close(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == b"question"
    assert server.recv(10) == b""  # end of file again and again
    server.sendall(b"answer")
    server.close()
    assert read_all(client) == b"answer"
    with pytest.raises(BrokenPipeError):
        client.send(b"more")


def test_recv_sizes(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    assert server.recv(0) == b""
    with pytest.raises(ValueError, match="negative"):
        server.recv(-1)
    data = random.Random(1).randbytes(300_000)
    for n in (1, 2047, 2048, 2049, 65535, 65536, 65537, 1 << 20):
        with running(lambda: client.sendall(data)):
            got = b""
            while len(got) < len(data):
                part = server.recv(n)
                assert 0 < len(part) <= n
                got += part
        assert got == data


def test_one_big_recv_takes_all_that_is_there(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.sendall(b"z" * 300_000)
    assert server.recv(1, socket.MSG_PEEK) == b"z"
    deadline = time.monotonic() + 5
    while len(server.recv(1 << 20, socket.MSG_PEEK)) < 300_000:
        assert time.monotonic() < deadline
    assert len(server.recv(1 << 20)) == 300_000


def test_peek_waitall_dontwait(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    with pytest.raises(BlockingIOError):
        server.recv(10, socket.MSG_DONTWAIT)
    client.sendall(b"abc")
    assert server.recv(10, socket.MSG_PEEK) == b"abc"
    with running(lambda: (time.sleep(0.05), client.sendall(b"defgh"))):
        assert server.recv(6, socket.MSG_WAITALL) == b"abcdef"
    assert server.recv(10) == b"gh"
    with pytest.raises(OSError, match="urgent"):
        client.send(b"!", socket.MSG_OOB)


def test_recv_into(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.sendall(b"0123456789")
    buffer = bytearray(8)
    assert server.recv_into(buffer, 4) == 4
    assert buffer == b"0123\0\0\0\0"
    assert server.recv_into(memoryview(buffer)[4:]) == 4
    assert buffer == b"01234567"
    with pytest.raises(ValueError, match="greater than the length"):
        server.recv_into(buffer, 9)
    with pytest.raises((TypeError, BufferError)):
        server.recv_into(b"read-only")  # type: ignore[arg-type]
    assert server.recvfrom_into(buffer) == (2, None)
    assert server.recv_into(bytearray()) == 0


def test_sendmsg_and_recvmsg(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    assert client.sendmsg([b"ab", bytearray(b"cd"), memoryview(b"ef"), b""]) == 6
    assert server.recvmsg(100) == (b"abcdef", [], 0, None)
    client.sendall(b"ABCDEF")
    first, second = bytearray(4), bytearray(10)
    assert server.recvmsg_into([first, second]) == (6, [], 0, None)
    assert first == b"ABCD" and second[:2] == b"EF"
    with pytest.raises(OSError, match="control message"):
        client.sendmsg([b"x"], [(socket.SOL_SOCKET, 99, b"fd")])
    pieces = [random.Random(i).randbytes(100_000) for i in range(8)]
    with running(lambda: client.sendmsg(pieces)):
        assert server.recv(800_000, socket.MSG_WAITALL) == b"".join(pieces)


def test_send_rejects_text(joined: tuple[socket.socket, socket.socket]) -> None:
    for call in (joined[0].send, joined[0].sendall):
        with pytest.raises(TypeError, match="bytes-like"):
            call("text")  # type: ignore[arg-type]


def test_nonblocking_send_takes_what_fits(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    client.setblocking(False)
    total = 0
    block = random.Random(5).randbytes(1 << 20)
    full = 0.0
    while not full or time.monotonic() < full + 0.2:  # until the peer's window and our buffer are full for good
        try:
            n = client.send(block[total % 1000 :])
        except BlockingIOError:
            full = full or time.monotonic()
            continue
        full = 0.0
        assert n > 0
        total += n
        assert total < 1 << 26
    assert select.select([], [client], [], 0) == ([], [], [])
    got = 0
    while got < total:
        got += len(server.recv(1 << 20))
    _, writable, _ = select.select([], [client], [], 5)
    assert writable and got == total


def test_over_a_bad_wire() -> None:
    """Loss, duplicates, disorder and corruption below: above, the bytes are what was sent."""
    link_a, link_b = memory_pair(features=0)
    bad = FaultLink(link_a, 1993, loss=0.02, duplicate=0.01, reorder=0.02, corrupt=0.01, delay_ns=200_000)
    with Embedded(bad, "10.0.0.1/24") as a, Embedded(link_b, "10.0.0.2/24") as b:
        with listening(b) as listener:
            client = socket.create_connection(listener.getsockname(), 20, host=a)
            server, _ = listener.accept()
        server.settimeout(20)
        data = random.Random(10).randbytes(400_000)

        def answer() -> None:
            server.sendall(read_all(server)[::-1])
            server.close()

        with running(answer), client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == data[::-1]
            assert client.session is not None and client.session.stat()["retransmits"] > 0


# -- recv_buffer -------------------------------------------------------------------------------


def test_recv_buffer(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    data = random.Random(2).randbytes(40_000)
    client.sendall(data)
    got = b""
    while len(got) < len(data):
        with server.recv_buffer(10_000) as buffer:
            assert 0 < len(buffer) <= 10_000 and buffer.nbytes == len(buffer)
            view = memoryview(buffer)
            assert view.readonly
            got += view
            view.release()
    assert got == data
    assert server.host.engine.counters()["buf_lent"] == 0
    with pytest.raises(ValueError, match="released"):
        len(buffer)
    with pytest.raises(ValueError, match="released"):
        memoryview(buffer)  # type: ignore[arg-type]
    client.close()
    assert len(server.recv_buffer()) == 0


def test_recv_buffer_counts_its_views(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.sendall(b"abc")
    buffer = server.recv_buffer()
    view = memoryview(buffer)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="view"):
        buffer.release()
    view.release()
    buffer.release()
    buffer.release()


def test_buffers_outlive_their_socket(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        server, _ = listener.accept()
    data = random.Random(3).randbytes(20_000)
    client.sendall(data)
    held = []
    while sum(map(len, held)) < len(data):
        held.append(server.recv_buffer())
    assert hosts[1].engine.counters()["buf_lent"] == len(held)
    client.close()
    server.close()
    assert b"".join(held) == data  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------


def test_makefile(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    with client.makefile("w", encoding="utf-8", newline="\r\n") as out:
        out.write("eins\nzwei\n")
    reader = server.makefile("rb")
    assert reader.readline() == b"eins\r\n"
    server.close()  # the file keeps it open
    assert reader.readline() == b"zwei\r\n"
    client.shutdown(socket.SHUT_WR)
    assert reader.read() == b""
    reader.close()
    assert server.session is None
    assert client.recv(1) == b""


def test_sendfile(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    data = random.Random(4).randbytes(600_000)
    file = io.BytesIO(data)
    with running(lambda: client.sendfile(file, 1000, 500_000)):
        assert server.recv(500_000, socket.MSG_WAITALL) == data[1000:501_000]
    assert file.tell() == 501_000
    with pytest.raises(ValueError, match="positive"):
        client.sendfile(file, 0, 0)
