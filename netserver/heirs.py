"""Children between their fork and their own attachment, each watched by a socket that its end closes.

Call order: ``make`` before the fork; ``news`` when the descriptor is readable; ``end`` when the child has attached or
its lifeline has hung up.
"""

from __future__ import annotations

import errno
import secrets
import select
import socket
from collections.abc import Iterator
from typing import Final

from ulnet.netserver.records import Application, Heir, Refusal

HEIRS_PER_APPLICATION: Final = 1024
HEIRS_PER_USER: Final = 4096
HOLDS_PER_APPLICATION: Final = 1 << 18  # of its heirs together: memory
PACKETS_A_TURN: Final = 256  # of one child


class Heirs:
    """Every heir, by its token, which nobody can guess."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._heirs: dict[int, Heir] = {}
        self._by_lifeline: dict[int, Heir] = {}

    def __len__(self) -> int:
        return len(self._heirs)

    def fileno(self) -> int:
        """Readable when some child has news."""
        return self._epoll.fileno()

    def get(self, token: int) -> Heir | None:
        return self._heirs.get(token)

    def make(self, app: Application, holds: int) -> tuple[Heir, socket.socket]:
        """An heir that will hold so many sessions, and the child's end of its lifeline."""
        uid = app.sender.uid
        own = [heir for heir in self._heirs.values() if heir.pid == app.pid]
        if len(own) >= HEIRS_PER_APPLICATION:
            raise Refusal(errno.EAGAIN, f"{len(own)} children have not attached yet: too many")
        if uid and sum(heir.uid == uid for heir in self._heirs.values()) >= HEIRS_PER_USER:
            raise Refusal(errno.EAGAIN, f"{HEIRS_PER_USER} children of user {uid} have not attached yet: too many")
        if sum(len(heir.sessions) for heir in own) + holds > HOLDS_PER_APPLICATION:
            raise Refusal(errno.EAGAIN, "too many children that have not attached yet hold too many sessions")
        lifeline, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline.setblocking(False)
        heir = Heir(secrets.randbits(63) | 1 << 63, app.pid, uid, lifeline)
        self._heirs[heir.token] = heir
        self._by_lifeline[lifeline.fileno()] = heir
        self._epoll.register(lifeline.fileno(), select.EPOLLIN)
        return heir, theirs

    def news(self) -> Iterator[tuple[Heir, int | None]]:
        """(heir, a session that it has closed), or (heir, None): it has ended."""
        for fd, _ in self._epoll.poll(0):
            heir = self._by_lifeline.get(fd)
            for _ in range(PACKETS_A_TURN):
                if heir is None or heir.token not in self._heirs:
                    break
                try:
                    packet = heir.lifeline.recv(64)
                except BlockingIOError:
                    break
                except OSError:
                    packet = b""
                if not packet:
                    yield heir, None
                elif len(packet) == 8:
                    yield heir, int.from_bytes(packet, "little")

    def end(self, heir: Heir) -> None:
        """It holds nothing any more, or something else does for it."""
        if self._heirs.pop(heir.token, None) is not None:
            fd = heir.lifeline.fileno()
            self._epoll.unregister(fd)
            del self._by_lifeline[fd]
            heir.lifeline.close()

    def close(self) -> None:
        """End them all."""
        for heir in list(self._heirs.values()):
            self.end(heir)
        self._epoll.close()
