"""Fixtures of the socket tests: two embedded hosts on a wire in memory, and sockets joined over it."""

import gc
from collections.abc import Iterator

import pytest
from sockethosts import listening

from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded


@pytest.fixture
def hosts() -> Iterator[tuple[Embedded, Embedded]]:
    a, b = embedded.pair()
    yield a, b
    gc.collect()
    a.shutdown(0.2)
    b.shutdown(0.2)


@pytest.fixture
def joined(hosts: tuple[Embedded, Embedded]) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair of TCP sockets: client on a, server's end on b."""
    with listening(hosts[1]) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=5, host=hosts[0])
        server, _ = listener.accept()
    client.settimeout(5)
    server.settimeout(5)
    yield client, server
    client.close()
    server.close()


@pytest.fixture
def udp(hosts: tuple[Embedded, Embedded]) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A UDP client on a, a server bound to 9000 on b."""
    client = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
    server = socket.socket(type=socket.SOCK_DGRAM, host=hosts[1])
    server.bind(("", 9000))
    client.settimeout(5)
    server.settimeout(5)
    yield client, server
    client.close()
    server.close()
