"""Two embedded hosts on a wire in memory, joined sockets, and helpers: for the tests of sockets."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

A, B = "10.0.0.1", "10.0.0.2"


def listening(host: Embedded, port: int = 0, backlog: int = 16) -> socket.socket:
    listener = socket.create_server((host.address, port), backlog=backlog, host=host)
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
