"""What several sockets of one process share when they are duplicates of each other: BSD's open file description.

A descriptor number leads back to its session by its inode, whichever duplicate of it is asked about.
"""

from __future__ import annotations

import os
from weakref import WeakValueDictionary

from ulnet.stack._socket import Socket
from ulnet.stack._sockopt import Options
from ulnet.stack.host import Host
from ulnet.stack.session import Session

_by_inode: WeakValueDictionary[tuple[int, int], Session] = WeakValueDictionary()


class File:
    """Where the session is set up, how the socket stands, and how many sockets use it (``Session.file``)."""

    __slots__ = ("bound", "connecting", "host", "inheritable", "key", "listening", "options", "users")

    def __init__(self, host: Host, options: Options) -> None:
        self.host = host
        self.options = options
        self.users = 0
        self.bound: tuple[str, int] | None = None  # as bind() named it
        self.listening = False
        self.connecting = False
        self.inheritable = False
        self.key: tuple[int, int] | None = None  # device and inode of the descriptor


def show(session: Session) -> int:
    """The session's descriptor; from now on ``find`` knows it."""
    fd = session.fileno()
    if fd >= 0 and session.file.key is None:
        found = os.fstat(fd)
        session.file.key = found.st_dev, found.st_ino
        _by_inode[session.file.key] = session
    return fd


def find(fd: int) -> Session | None:
    """The open session of this process that ``fd`` is a descriptor of. OSError EBADF."""
    found = os.fstat(fd)
    session = _by_inode.get((found.st_dev, found.st_ino))
    return session if session is not None and not session.closed else None


def session_behind(file: object) -> Session | None:
    """The session that a socket of ours stands for alone. None: anything else, with a descriptor of its own; so a
    duplicate, which may be watched beside its original."""
    if isinstance(file, Socket) and getattr(file, "_fd", -1) < 0:
        return file.session
    return None
