"""Two embedded hosts on a wire in memory, joined sockets, and helpers: for the tests of sockets."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded

A, B = "10.0.0.1", "10.0.0.2"


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


def listening(host: Embedded, port: int = 0, backlog: int = 16) -> socket.socket:
    listener = socket.create_server(("", port), backlog=backlog, host=host)
    listener.settimeout(5)
    return listener


@contextmanager
def running(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """target in a thread; what it raises fails the test."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            target()
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive(), "the thread hangs"
    if errors:
        raise errors[0]


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(65536):
        parts.append(data)
    return b"".join(parts)


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
