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

_TIMEVAL: Final = struct.Struct("@ll")

# Options that not every version of the standard module names (ip(7), tcp(7), socket(7)).
_IP_PKTINFO: Final = 8
_IP_RECVTTL: Final = 12
_IP_RECVTOS: Final = 13
_IP_TRANSPARENT: Final = 19
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_SO_NO_CHECK: Final = 11
_SO_PASSCRED: Final = 16
_SO_RCVTIMEO: Final = 20
_SO_SNDTIMEO: Final = 21
_SO_BINDTODEVICE: Final = 25
_SO_TIMESTAMP: Final = 29
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_SO_MARK: Final = 36
_TCP_CONGESTION: Final = 13
_TCP_REPAIR: Final = 19
_TCP_ULP: Final = 31

_SOL: Final = int(_std.SOL_SOCKET)
_IP: Final = int(_std.IPPROTO_IP)
_TCP: Final = int(_std.IPPROTO_TCP)

# Kept by the socket: they matter to bind() and close(), not to the protocols.
_KEPT: Final = frozenset((_std.SO_REUSEADDR, _std.SO_REUSEPORT, _std.SO_BROADCAST))

# What comes beside received datagrams, as Socket's `beside` has it.
BESIDE: Final = {
    (_SOL, _SO_TIMESTAMP): 1,
    (_SOL, _SO_TIMESTAMPNS): 2,
    (_IP, _IP_PKTINFO): 4,
    (_IP, _IP_RECVTTL): 8,
    (_IP, _IP_RECVTOS): 16,
}

# Taken and shown again, without effect here: (default, least, most, errno beyond these).
_HARMLESS: Final = {
    (_SOL, int(_std.SO_DEBUG)): (0, 0, 0, errno.EACCES),  # as for who is not privileged
    (_SOL, int(_std.SO_DONTROUTE)): (0, None, None, 0),  # there is one network behind a served address
    (_SOL, int(_std.SO_OOBINLINE)): (0, None, None, 0),
    (_SOL, int(_std.SO_PRIORITY)): (0, 0, 6, errno.EPERM),
    (_SOL, _SO_NO_CHECK): (0, None, None, 0),
    (_SOL, _SO_PASSCRED): (0, None, None, 0),
    (_IP, _IP_BIND_ADDRESS_NO_PORT): (0, None, None, 0),
    (_TCP, int(_std.TCP_SYNCNT)): (6, 1, 127, errno.EINVAL),
    (_TCP, int(_std.TCP_LINGER2)): (60, -1, 120, errno.EINVAL),
    (_TCP, int(_std.TCP_DEFER_ACCEPT)): (0, 0, 255, errno.EINVAL),
    (_TCP, int(_std.TCP_FASTOPEN)): (0, 0, 65535, errno.EINVAL),  # an offer that no peer has to be made
    (_TCP, int(_std.TCP_NOTSENT_LOWAT)): (0, None, None, 0),
}

# What the kernel lets only the privileged do, and what it does not know by this name: their errno.
_REFUSED: Final = {
    (_SOL, _SO_MARK): errno.EPERM,
    (_SOL, _SO_SNDBUFFORCE): errno.EPERM,
    (_SOL, _SO_RCVBUFFORCE): errno.EPERM,
    (_IP, _IP_TRANSPARENT): errno.EPERM,
    (_TCP, _TCP_REPAIR): errno.EPERM,
    (_TCP, _TCP_ULP): errno.ENOENT,
}
_FIXED: Final = frozenset((_std.SO_ERROR, _std.SO_TYPE, _std.SO_PROTOCOL, _std.SO_DOMAIN, _std.SO_ACCEPTCONN))

# Known to a connection only: remembered until there is one.
_LATER: Final = frozenset(((_std.IPPROTO_TCP, _std.TCP_CORK), (_std.IPPROTO_TCP, _std.TCP_QUICKACK)))

# RFC 9293's order of states (tcp_stat.state) to that of struct tcp_info (TCP_ESTABLISHED is 1, ... TCP_CLOSING 11).
_LINUX_STATE: Final = (7, 10, 2, 3, 1, 4, 5, 8, 11, 9, 6)


class Options:
    """The options of one socket. Values set are remembered: a connection that arrives later gets them too."""

    __slots__ = ("beside", "harmless", "kept", "linger", "passed", "patience")

    def __init__(self, listener: Options | None = None) -> None:
        self.kept: dict[int, int] = dict(listener.kept) if listener else {}
        self.passed: dict[tuple[int, int], int] = dict(listener.passed) if listener else {}
        self.linger: tuple[int, int] = listener.linger if listener else (0, 0)
        self.harmless: dict[tuple[int, int], int] = dict(listener.harmless) if listener else {}
        self.beside: int = listener.beside if listener else 0  # of BESIDE
        # SO_RCVTIMEO and SO_SNDTIMEO in ns; 0: for ever
        self.patience: dict[int, int] = dict(listener.patience) if listener else {}

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

    @property
    def linger_s(self) -> int:
        """How long close() may wait."""
        return self.linger[1] if self.linger[0] else 0

    @property
    def receive_patience_ns(self) -> int:
        """SO_RCVTIMEO; 0: for ever."""
        return self.patience.get(_SO_RCVTIMEO, 0)

    @property
    def send_patience_ns(self) -> int:
        """SO_SNDTIMEO; 0: for ever."""
        return self.patience.get(_SO_SNDTIMEO, 0)

    def apply(self, session: Session) -> None:
        """Give a session that just became live what was set before."""
        for (level, name), value in self.passed.items():
            with contextlib.suppress(OSError):  # what only means something before connecting, or it is dead already
                session.setopt(level, name, value)

    def set(self, session: Session, level: int, name: int, value: Any, optlen: int | None = None) -> None:
        if value is None:
            if optlen is None:
                raise TypeError("setsockopt() requires 4 arguments when the third argument is None")
            value = bytes(min(optlen, 256))
        elif optlen is not None:
            raise TypeError("setsockopt() only takes 4 arguments when the third argument is None")
        if level == _TCP and session.kind != _TCP:
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        if self._set_special(level, name, value):
            return
        if level == _std.SOL_SOCKET and name == _std.SO_LINGER:
            if isinstance(value, int) or len(value) != _LINGER.size:
                raise OSError(errno.EINVAL, "SO_LINGER takes struct.pack('ii', on, seconds)")
            on, seconds = _LINGER.unpack(value)
            self.linger = (int(bool(on)), seconds)
            return
        number = _c_int(value) if isinstance(value, int) else _number(level, name, value)
        if self._set_known(session, level, name, number):
            return
        if level == _std.SOL_SOCKET and name in _KEPT:
            self.kept[name] = int(bool(number))
            return
        if session.live or (level, name) not in _LATER:
            session.setopt(level, name, int(number))
        self.passed[level, name] = int(number)

    def _set_special(self, level: int, name: int, value: Any) -> bool:
        """Options that are refused, or are no numbers."""
        if (level, name) in _REFUSED:
            number = _REFUSED[level, name]
            raise OSError(number, os.strerror(number))
        if level == _SOL and name in _FIXED:
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        if level == _SOL and name == _SO_BINDTODEVICE:
            if not isinstance(value, int) and not bytes(value).strip(b"\0"):
                return True  # any device, as it is
            raise OSError(errno.EPERM, "SO_BINDTODEVICE: the network server chooses the device")
        if level == _SOL and name in (_SO_RCVTIMEO, _SO_SNDTIMEO):
            if isinstance(value, int) or len(value) < _TIMEVAL.size:
                raise OSError(errno.EINVAL, "a time-out is struct.pack('ll', seconds, microseconds)")
            seconds, micros = _TIMEVAL.unpack_from(value)
            if not 0 <= micros < 1_000_000:
                raise OSError(errno.EDOM, os.strerror(errno.EDOM))
            self.patience[name] = min((seconds * 1_000_000 + micros) * 1000, 1 << 62) if seconds >= 0 else 1
            return True
        if level == _TCP and name == _TCP_CONGESTION:
            if isinstance(value, int) or bytes(value).rstrip(b"\0") != b"reno":
                raise OSError(errno.ENOENT, f"congestion control {value!r} is not here: this stack has reno")
            return True
        return False

    def _set_known(self, session: Session, level: int, name: int, number: int) -> bool:
        """Options that only the socket has."""
        bit = BESIDE.get((level, name))
        if bit is not None:
            self.beside = self.beside | bit if number else self.beside & ~bit
            if bit <= 2:
                if number:
                    self.beside &= ~(3 ^ bit)  # one kind of stamp at a time
                session.setopt(_SOL, _SO_TIMESTAMP, self.beside & 3)
                self.passed[_SOL, _SO_TIMESTAMP] = self.beside & 3
            return True
        rule = _HARMLESS.get((level, name))
        if rule is None:
            return False
        _, least, most, error = rule
        if least is None or most is None:
            number = int(bool(number)) if level != _TCP else number
        elif not least <= number <= most:
            raise OSError(error, os.strerror(error))
        self.harmless[level, name] = number
        return True

    def _get_special(self, session: Session, level: int, name: int, buflen: int) -> bytes | None:
        """Options that are no numbers, as bytes."""
        if level == _SOL and name in (_SO_RCVTIMEO, _SO_SNDTIMEO):
            seconds, ns = divmod(self.patience.get(name, 0), 1_000_000_000)
            return _TIMEVAL.pack(seconds, ns // 1000)
        if level == _TCP and name == _TCP_CONGESTION:
            return b"reno".ljust(16, b"\0")
        if level == _SOL and name == _SO_BINDTODEVICE:
            return b""
        return None

    def get(self, session: Session, level: int, name: int, *, listening: bool, buflen: int = 0) -> int | bytes:
        """An int, or bytes when ``buflen`` is given."""
        if not 0 <= buflen <= 1024:
            raise OSError("getsockopt buflen out of range")
        if level == _TCP and session.kind != _TCP:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if level == _std.SOL_SOCKET and name == _std.SO_LINGER:
            packed = _LINGER.pack(*self.linger)
            return packed[:buflen] if buflen else self.linger[0]
        if level == _std.IPPROTO_TCP and name == _std.TCP_INFO:
            if not buflen:
                raise OSError(
                    errno.EINVAL, f"TCP_INFO is a structure: say how much of it, at most {_TCP_INFO.size} bytes"
                )
            return _tcp_info(session)[:buflen]
        special = self._get_special(session, level, name, buflen)
        if special is not None:
            if not buflen and special:
                raise OSError(errno.EINVAL, "the option is a structure: say how much of it is wanted")
            return special[:buflen]
        number = self._number_of(session, level, name, listening)
        return _INT.pack(number)[:buflen] if buflen else number

    def _number_of(self, session: Session, level: int, name: int, listening: bool) -> int:
        bit = BESIDE.get((level, name))
        if bit is not None:
            return int(bool(self.beside & bit))
        rule = _HARMLESS.get((level, name))
        if rule is not None:
            return self.harmless.get((level, name), rule[0])
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


def _c_int(value: int) -> int:
    if not -0x80000000 <= value <= 0x7FFFFFFF:
        raise TypeError(f"option value {value} does not fit a C int")  # as the standard module, which then wants bytes
    return value


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
