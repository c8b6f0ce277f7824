"""Socket options: what a socket keeps, what its session takes, and how values look (socket(7), tcp(7), ip(7))."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as _std
import struct
from typing import Any, Final

from ulnet.stack.session import Session

_INT: Final = struct.Struct("@i")
_LINGER: Final = struct.Struct("@ii")
_TCP_INFO: Final = struct.Struct("@8B24I")  # the part of struct tcp_info that every Linux has

# Kept by the socket: they matter to bind() and close(), not to the protocols.
_KEPT: Final = frozenset((_std.SO_REUSEADDR, _std.SO_REUSEPORT, _std.SO_BROADCAST))

# Known to a connection only: remembered until there is one.
_LATER: Final = frozenset(((_std.IPPROTO_TCP, _std.TCP_CORK), (_std.IPPROTO_TCP, _std.TCP_QUICKACK)))

# RFC 9293's order of states (tcp_stat.state) to that of struct tcp_info (TCP_ESTABLISHED is 1, ... TCP_CLOSING 11).
_LINUX_STATE: Final = (7, 10, 2, 3, 1, 4, 5, 8, 11, 9, 6)


class Options:
    """The options of one socket. Values set are remembered: a connection that arrives later gets them too."""

    __slots__ = ("kept", "linger", "passed")

    def __init__(self, listener: Options | None = None) -> None:
        self.kept: dict[int, int] = dict(listener.kept) if listener else {}
        self.passed: dict[tuple[int, int], int] = dict(listener.passed) if listener else {}
        self.linger: tuple[int, int] = listener.linger if listener else (0, 0)

    @property
    def reuse_address(self) -> bool:
        return bool(self.kept.get(_std.SO_REUSEADDR))

    @property
    def reuse_port(self) -> bool:
        return bool(self.kept.get(_std.SO_REUSEPORT))

    @property
    def abort_on_close(self) -> bool:
        """SO_LINGER on with zero seconds: close() resets the connection."""
        return self.linger[0] != 0 and self.linger[1] <= 0

    def apply(self, session: Session) -> None:
        """Give a session that just became live what was set before."""
        for (level, name), value in self.passed.items():
            with contextlib.suppress(OSError):  # what only means something before connecting, or it is dead already
                session.setopt(level, name, value)

    def set(self, session: Session, level: int, name: int, value: Any, optlen: int | None = None) -> None:
        if value is None:
            raise TypeError(f"setsockopt({level}, {name}): an option of {optlen} zero bytes is not known to this stack")
        if level == _std.SOL_SOCKET and name == _std.SO_LINGER:
            if isinstance(value, int) or len(value) != _LINGER.size:
                raise OSError(errno.EINVAL, "SO_LINGER takes struct.pack('ii', on, seconds)")
            on, seconds = _LINGER.unpack(value)
            self.linger = (int(bool(on)), seconds)
            return
        number = value if isinstance(value, int) else _number(level, name, value)
        if level == _std.SOL_SOCKET and name in _KEPT:
            self.kept[name] = int(bool(number))
            return
        if session.live or (level, name) not in _LATER:
            session.setopt(level, name, int(number))
        self.passed[level, name] = int(number)

    def get(self, session: Session, level: int, name: int, *, listening: bool, buflen: int = 0) -> int | bytes:
        """An int, or bytes when ``buflen`` is given."""
        if not 0 <= buflen <= 1024:
            raise OSError(errno.EINVAL, "getsockopt buflen out of range")
        if level == _std.SOL_SOCKET and name == _std.SO_LINGER:
            packed = _LINGER.pack(*self.linger)
            return packed[:buflen] if buflen else self.linger[0]
        if level == _std.IPPROTO_TCP and name == _std.TCP_INFO:
            if not buflen:
                raise OSError(
                    errno.EINVAL, f"TCP_INFO is a structure: say how much of it, at most {_TCP_INFO.size} bytes"
                )
            return _tcp_info(session)[:buflen]
        number = self._number_of(session, level, name, listening)
        return _INT.pack(number)[:buflen] if buflen else number

    def _number_of(self, session: Session, level: int, name: int, listening: bool) -> int:
        if level == _std.SOL_SOCKET:
            if name in _KEPT:
                return self.kept.get(name, 0)
            if name == _std.SO_ERROR:
                return session.take_error()
            if name == _std.SO_TYPE:
                return int(_std.SOCK_STREAM if session.kind == _std.IPPROTO_TCP else _std.SOCK_DGRAM)
            if name == _std.SO_PROTOCOL:
                return session.kind
            if name == _std.SO_DOMAIN:
                return int(_std.AF_INET)
            if name == _std.SO_ACCEPTCONN:
                return int(listening)
        if (level, name) in _LATER and not session.live:
            return self.passed.get((level, name), 0)
        return session.getopt(level, name)


def _number(level: int, name: int, value: Any) -> int:
    raw = bytes(value)
    if len(raw) < _INT.size:
        raise OSError(errno.EINVAL, f"setsockopt({level}, {name}): {len(raw)} bytes are too short for an int")
    return int(_INT.unpack_from(raw)[0])


def _tcp_info(session: Session) -> bytes:
    if session.kind != _std.IPPROTO_TCP:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
    stat = session.stat()
    mss = session.getopt(_std.IPPROTO_TCP, _std.TCP_MAXSEG)
    words = [0] * 24
    words[0] = stat["rto_ns"] // 1000
    words[2] = words[3] = mss
    words[4] = ((stat["snd_nxt"] - stat["snd_una"]) & 0xFFFFFFFF) // max(mss, 1)
    words[15] = stat["srtt_ns"] // 1000
    words[16] = stat["rttvar_ns"] // 1000
    words[17] = stat["ssthresh_bytes"] // max(mss, 1)
    words[18] = stat["cwnd_bytes"] // max(mss, 1)
    words[19] = mss
    words[23] = stat["retransmits"]
    head = [0] * 8
    head[0] = _LINUX_STATE[stat["state"]]
    return _TCP_INFO.pack(*head, *(min(word, 0xFFFFFFFF) for word in words))
