"""Sockets on their way to another process: pickled by multiprocessing, or as a descriptor in a message.

multiprocessing carries them where it carries the standard class's (fork, spawn, forkserver; Connection.send): pickle
alone refuses, for it does not say where to. In a message of ``ulnet.ipc``, or of any AF_UNIX socket, a descriptor that
``departing(sock)`` gave may travel; ``socket(fileno=fd)`` at the other end takes it over.
"""

from __future__ import annotations

from multiprocessing import reduction
from typing import Any

from ulnet.stack.socket import socket


def departing(sock: socket) -> int:
    """The socket's descriptor, to be sent to one other process; it stays the socket's own.

    The session waits in the network server for that process. OSError: without a name it has nothing to pass, and a
    session of an embedded stack lives in one process.
    """
    sock.host.send_off(sock._need())
    return sock.fileno()


def _rebuild(copy: Any, family: int, kind: int, proto: int, timeout: float | None) -> socket:
    sock = socket(family, kind, proto, copy.detach())
    sock.settimeout(timeout)
    return sock


def _rebuild_unnamed(family: int, kind: int, proto: int, timeout: float | None) -> socket:
    sock = socket(family, kind, proto)
    sock.settimeout(timeout)
    return sock


def _reduce(sock: socket) -> tuple[Any, ...]:
    what = sock.family, sock.type, sock.proto, sock.gettimeout()
    if not sock._need().session_id:
        return _rebuild_unnamed, what
    return _rebuild, (reduction.DupFd(departing(sock)), *what)


reduction.register(socket, _reduce)
