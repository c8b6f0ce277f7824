"""UDP sockets over two embedded hosts, as in udp(7)."""

import errno
import random
import select

import pytest
from sockethosts import A, B

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]


def name_of(client: socket.socket) -> tuple[str, int]:
    """As others see it: an unconnected socket says 0.0.0.0 of itself."""
    return A, client.getsockname()[1]


# -- UDP ---------------------------------------------------------------------------------------


def test_udp_echo(udp: tuple[socket.socket, socket.socket]) -> None:
    client, server = udp
    assert client.sendto(b"ping", (B, 9000)) == 4
    data, peer = server.recvfrom(100)
    assert data == b"ping" and peer == name_of(client)
    assert server.sendto(b"pong", 0, peer) == 4
    assert client.recvfrom(100) == (b"pong", (B, 9000))
    client.sendto(b"", (B, 9000))
    assert server.recvfrom(10) == (b"", peer)


def test_udp_truncation_and_peek(udp: tuple[socket.socket, socket.socket]) -> None:
    client, server = udp
    for data in (b"0123456789", b"second"):
        client.sendto(data, (B, 9000))
    assert server.recv(4, socket.MSG_PEEK) == b"0123"
    data, anc, flags, peer = server.recvmsg(4)
    assert (data, anc, flags, peer) == (b"0123", [], socket.MSG_TRUNC, name_of(client))
    assert server.recvmsg(100)[::2] == (b"second", 0)
    client.sendto(b"0123456789", (B, 9000))
    buffer = bytearray(4)
    assert server.recvfrom_into(buffer) == (4, name_of(client))
    assert buffer == b"0123"
    with pytest.raises(BlockingIOError):
        server.recv(10, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9000, 65507])
def test_udp_sizes(udp: tuple[socket.socket, socket.socket], size: int) -> None:
    client, server = udp
    data = random.Random(size).randbytes(size)
    client.sendto(data, (B, 9000))
    assert server.recv(65535) == data


def test_udp_too_long(udp: tuple[socket.socket, socket.socket]) -> None:
    for call in (
        lambda: udp[0].sendto(bytes(65508), (B, 9000)),
        lambda: udp[0].sendmsg([bytes(65508)], [], 0, (B, 9000)),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EMSGSIZE


def test_udp_connected(udp: tuple[socket.socket, socket.socket], hosts: tuple[Embedded, Embedded]) -> None:
    client, server = udp
    with pytest.raises(OSError) as caught:
        client.send(b"to whom?")
    assert caught.value.errno in (errno.EDESTADDRREQ, errno.ENOTCONN)
    client.connect((B, 9000))
    assert client.getpeername() == (B, 9000)
    assert client.send(b"one") == 3
    assert server.recvfrom(10) == (b"one", name_of(client))
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) as other:
        other.sendto(b"stranger", name_of(client))
        server.sendto(b"friend", name_of(client))
        assert client.recv(100) == b"friend"
        with pytest.raises(TimeoutError):
            client.settimeout(0.05)
            client.recv(100)


def test_udp_refused_comes_back(udp: tuple[socket.socket, socket.socket]) -> None:
    client, _ = udp
    client.connect((B, 9))
    client.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):
        client.recv(10)
    with pytest.raises(TimeoutError):
        client.settimeout(0.05)
        client.recv(10)


def test_udp_buffers(udp: tuple[socket.socket, socket.socket]) -> None:
    client, server = udp
    for size in (5, 1400, 20_000):
        data = random.Random(size).randbytes(size)
        client.sendmsg([data[:2], data[2:]], [], 0, (B, 9000))
        with server.recv_buffer() as buffer:
            assert bytes(buffer) == data and buffer.address == name_of(client)  # type: ignore[call-overload]


def test_udp_select_and_listen(udp: tuple[socket.socket, socket.socket]) -> None:
    client, server = udp
    assert select.select([server], [server], [], 0) == ([], [server], [])
    client.sendto(b"x", (B, 9000))
    assert select.select([server], [], [], 5)[0] == [server]
    server.recv(1)
    assert select.select([server], [], [], 0)[0] == []
    with pytest.raises(OSError) as caught:
        server.listen()
    assert caught.value.errno == errno.EOPNOTSUPP
