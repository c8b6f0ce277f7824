"""The calls between an application's library and the network server (SOSP 1993 table 1), with checked fields.

A Mach subsystem: a request has id ``base + n``, its reply that id + 100. Every reply starts with an errno (0: done).
All inline parts have a fixed layout, so that a peer's message is either exactly one of these or refused; what varies
in size (a session's state, frames, tables) travels out of line.

Session ids: ``serial << 32 | number``. The server gives each attachment its serial; the library numbers its own
sessions below ``SERVER_NUMBER``, the server those it delivers from there up. So naming one costs nobody a message.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Final, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

SERVICE: Final = "ulnet.netserver"  # the bootstrap name the server checks in
VERSION: Final = 4
DEFAULT_PATH: Final = "/run/ulnet/netserver.sock"
PATH_VARIABLE: Final = "ULNET_SERVER"
REPLY_OFFSET: Final = 100  # MIG: a reply's id is the request's plus 100

SERVER_NUMBER: Final = 1 << 31
MAX_BACKLOG: Final = 1024
MAX_STATE_BYTES: Final = 64 << 20  # of one session, its buffers included
MAX_FRAME_BYTES: Final = 65_549 + 100  # a super-segment with its header (limits of TPACKET slots)
FRAMES_A_MESSAGE: Final = 32  # strays, each an out-of-line part
PACKET_INTERFACES: Final = ("ipf", "shm", "ipc")  # SOSP 1993 section 4.1

_base = 9300


class Call(IntEnum):
    """Library to server. ``(+)`` gets a reply."""

    ATTACH = _base  # (+)
    DETACH = _base + 1  # (+) everything given back; also a barrier for what was sent before
    BIND = _base + 2  # (+)
    CONNECT = _base + 3  # (+) when established, or failed
    LISTEN = _base + 4  # (+)
    RETURN = _base + 5  # a session comes back with its state: close; with a reply right answered when it is here
    FORGET = _base + 6  # a session ended in the application; with a reply right answered when its name is free
    ACCEPTED = _base + 7  # credits of a listener
    RESOLVE = _base + 8  # (+) when the neighbour answered, or not
    SESSIONS = _base + 9  # (+)
    COUNTERS = _base + 10  # (+)
    STRAY = _base + 11  # frames of a flow that was returned a moment ago
    # Sessions placed in the server, to be reached by several processes (fork, exec, passing):
    SHARE = _base + 12  # a session comes to be shared, with its state and its descriptor pair
    REQUEUE = _base + 13  # a connection that was delivered goes back into the queue of its shared listener
    FORK = _base + 14  # (+) a child is about to be made: it will hold what this task shares
    HOLD = _base + 15  # (+) whose descriptor is this? The task holds that session from now on
    RELEASE = _base + 16  # this task holds the session no more
    PROMOTE = _base + 17  # (+) the only holder wants it back: its state and the manager's end of the pair
    CLAIM = _base + 18  # (+) a connection that a shared listener announced: its state
    PUBLISH = _base + 19  # (+) may the session be promoted? A descriptor is on its way to somebody
    STATUS = _base + 20  # (+) names, state and pending error of a shared session
    OPTION = _base + 21  # (+) an option of a shared session
    # Connections that a library sets up by itself:
    LEASE = _base + 22  # (+) local TCP ports to connect from
    DECLARE = _base + 23  # such connections: the server is about to be asked something of them, or to lose their port
    EMBRYO = _base + 24  # a connection in SYN-RECEIVED of a listener that was shared a moment ago


class Upcall(IntEnum):
    """Server to library, one way."""

    DELIVER = _base + 50  # an accepted session for a listener
    STRAY = _base + 51  # frames of a flow that was handed over a moment ago
    REFUSED = _base + 52  # a one-way call was not obeyed; for the log


class ProtocolError(ValueError):
    """A message that breaks the protocol: wrong length, or a field out of its range."""


# -- fields ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kind:
    code: str
    pack: Callable[[Any], Any] = lambda v: v
    unpack: Callable[[Any], Any] = lambda v: v


def pack_address(text: str) -> bytes:
    """16 bytes: IPv4 as ::ffff:a.b.c.d (RFC 4291 2.5.5.2)."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def unpack_address(raw: bytes) -> str:
    """The text of a 128-bit address."""
    if raw[:12] == b"\0" * 10 + b"\xff\xff":
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))


def _bool(value: int) -> bool:
    if value > 1:
        raise ProtocolError(f"a truth value of {value}")
    return bool(value)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


U8 = Annotated[int, _Kind("B")]
U16 = Annotated[int, _Kind("H")]
U32 = Annotated[int, _Kind("I")]
U64 = Annotated[int, _Kind("Q")]
I32 = Annotated[int, _Kind("i")]
Flag = Annotated[bool, _Kind("B", int, _bool)]
Address = Annotated[str, _Kind("16s", pack_address, unpack_address)]
Mac = Annotated[bytes, _Kind("6s")]
Text = Annotated[str, _Kind("192s", lambda s: s.encode()[:191], _text)]

_T = TypeVar("_T", bound="Record")


class Record:
    """Base of all inline parts: a frozen dataclass with a fixed little-endian layout, made from its annotations."""

    _struct: ClassVar[struct.Struct]
    _kinds: ClassVar[tuple[tuple[str, _Kind], ...]]

    def __init_subclass__(cls) -> None:
        # Resolved late, because annotations are strings here and the class is not complete yet.
        cls._kinds = ()

    @classmethod
    def _layout(cls) -> struct.Struct:
        if not cls._kinds:
            kinds = []
            for name, hint in get_type_hints(cls, include_extras=True).items():
                if get_origin(hint) is Annotated:
                    kinds.append((name, next(k for k in get_args(hint) if isinstance(k, _Kind))))
            cls._struct = struct.Struct("<" + "".join(k.code for _, k in kinds))
            cls._kinds = tuple(kinds)
        return cls._struct

    def pack(self) -> bytes:
        """The inline part of a message."""
        layout = self._layout()
        return layout.pack(*(kind.pack(getattr(self, name)) for name, kind in self._kinds))

    @classmethod
    def size(cls) -> int:
        """Bytes of the packed record."""
        return cls._layout().size

    @classmethod
    def unpack(cls: type[_T], data: bytes) -> _T:
        """Raises ProtocolError when the length or a field is wrong."""
        layout = cls._layout()
        if len(data) != layout.size:
            raise ProtocolError(f"{cls.__name__} of {len(data)} bytes, {layout.size} expected")
        values = layout.unpack(data)
        return cls(**{name: kind.unpack(value) for (name, kind), value in zip(cls._kinds, values, strict=True)})


# -- requests --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attach(Record):
    """Rights: a send right to the port for upcalls. ``interface``: index into PACKET_INTERFACES."""

    version: U32
    interface: U8
    heir: U64 = 0  # a forked child's: as the parent was told by FORK


@dataclasses.dataclass(frozen=True)
class Bind(Record):
    session: U64
    protocol: U8
    address: Address
    port: U16
    reuse_address: Flag = False
    reuse_port: Flag = False


@dataclasses.dataclass(frozen=True)
class Connect(Record):
    session: U64
    protocol: U8
    address: Address
    port: U16


@dataclasses.dataclass(frozen=True)
class Listen(Record):
    """``local``: the library answers connection requests by itself; else the server does, and pushes the sessions."""

    session: U64
    backlog: U32
    local: Flag = False


@dataclasses.dataclass(frozen=True)
class Return(Record):
    """Out of line: the state."""

    session: U64


@dataclasses.dataclass(frozen=True)
class Forget(Record):
    """``reset``: the library gave up on a session that it may never have received; the server resets the peer."""

    session: U64
    reset: Flag = False


@dataclasses.dataclass(frozen=True)
class Accepted(Record):
    session: U64
    count: U32


@dataclasses.dataclass(frozen=True)
class Resolve(Record):
    address: Address


@dataclasses.dataclass(frozen=True)
class Share(Record):
    """Descriptors: the user's end of the pair, the manager's end. Out of line: the state; nothing for a listener or a
    session that only has a name."""

    session: U64


@dataclasses.dataclass(frozen=True)
class Requeue(Record):
    """Out of line: the state."""

    listener: U64
    session: U64


@dataclasses.dataclass(frozen=True)
class Release(Record):
    """``abort``: should this have been the last holder, reset the peer (SO_LINGER with zero seconds)."""

    session: U64
    abort: Flag = False


@dataclasses.dataclass(frozen=True)
class Shared(Record):
    """PROMOTE, CLAIM, STATUS: the session that is meant."""

    session: U64


@dataclasses.dataclass(frozen=True)
class Publish(Record):
    """``public``: never promoted, for nobody can tell who has its descriptor. ``transit``: so many descriptors are on
    their way to processes that will HOLD it; it is not promoted before."""

    session: U64
    public: Flag
    transit: U32 = 0


@dataclasses.dataclass(frozen=True)
class Option(Record):
    """``change``: set it to ``value``; else ask."""

    session: U64
    level: I32
    name: I32
    value: I32
    change: Flag


@dataclasses.dataclass(frozen=True)
class Lease(Record):
    """``count``: so many ports at the most."""

    count: U16


@dataclasses.dataclass(frozen=True)
class Embryo(Record):
    """Out of line: the state."""

    listener: U64


@dataclasses.dataclass(frozen=True)
class Nothing(Record):
    """A request or a one-way call without inline fields."""

    @classmethod
    def _layout(cls) -> struct.Struct:
        cls._struct = struct.Struct("<")
        return cls._struct


# -- replies and upcalls ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Status(Record):
    """A reply without results, and every reply to a refused request. ``reason`` may be empty."""

    error: U32
    reason: Text = ""


@dataclasses.dataclass(frozen=True)
class Attached(Record):
    """Descriptors: the channel's (two, or one for ``ipc``), metastate page, status page."""

    error: U32
    serial: U32
    channel: U32
    ifindex: U32
    loopback_ifindex: U32
    mtu: U32
    mac: Mac
    prefix: U8
    address: Address
    small_slots: U32
    small_slot_bytes: U32
    large_slots: U32
    large_slot_bytes: U32


@dataclasses.dataclass(frozen=True)
class Bound(Record):
    error: U32
    address: Address
    port: U16


@dataclasses.dataclass(frozen=True)
class Connected(Record):
    """Out of line, TCP: the state. ``session`` tells whose answer it is where it was not waited for; ``port`` is 0 when
    it failed and the session has no name any more."""

    error: U32
    session: U64
    address: Address
    port: U16
    reason: Text = ""


@dataclasses.dataclass(frozen=True)
class Deliver(Record):
    """Out of line: the state."""

    listener: U64
    session: U64


@dataclasses.dataclass(frozen=True)
class Refused(Record):
    call: U32
    session: U64
    error: U32
    reason: Text = ""


@dataclasses.dataclass(frozen=True)
class Forked(Record):
    """Descriptor: the lifeline, a SOCK_SEQPACKET socket. The child keeps it until it attaches, the parent closes it. A
    packet of eight bytes on it (a session number, little endian) is the child's RELEASE; its hang-up releases all.
    ``heir`` goes into the child's Attach. ``held``: so many sessions."""

    error: U32
    heir: U64
    held: U32


@dataclasses.dataclass(frozen=True)
class Info(Record):
    """Reply to HOLD and STATUS. ``state``: an index into session.STATES (TCP). ``so_error``: it was pending, and is
    cleared. ``eof``: nothing more will be relayed from the peer."""

    error: U32
    session: U64
    protocol: U8
    laddr: Address
    lport: U16
    raddr: Address  # unspecified: no peer
    rport: U16
    state: U8
    listening: Flag
    named: Flag  # by bind(), not by the system's choice
    wildcard: Flag  # bound to any address
    eof: Flag
    so_error: U32


@dataclasses.dataclass(frozen=True)
class OptionValue(Record):
    error: U32
    value: I32


# Which record a request carries; the server refuses every other id.
REQUESTS: Final[dict[int, type[Record]]] = {
    Call.ATTACH: Attach,
    Call.DETACH: Nothing,
    Call.BIND: Bind,
    Call.CONNECT: Connect,
    Call.LISTEN: Listen,
    Call.RETURN: Return,
    Call.FORGET: Forget,
    Call.ACCEPTED: Accepted,
    Call.RESOLVE: Resolve,
    Call.SESSIONS: Nothing,
    Call.COUNTERS: Nothing,
    Call.STRAY: Nothing,
    Call.SHARE: Share,
    Call.REQUEUE: Requeue,
    Call.FORK: Nothing,
    Call.HOLD: Nothing,
    Call.RELEASE: Release,
    Call.PROMOTE: Shared,
    Call.CLAIM: Shared,
    Call.PUBLISH: Publish,
    Call.STATUS: Shared,
    Call.OPTION: Option,
    Call.LEASE: Lease,
    Call.DECLARE: Nothing,
    Call.EMBRYO: Embryo,
}
ONE_WAY: Final = frozenset(
    (
        Call.RETURN,
        Call.FORGET,
        Call.ACCEPTED,
        Call.STRAY,
        Call.SHARE,
        Call.REQUEUE,
        Call.RELEASE,
        Call.DECLARE,
        Call.EMBRYO,
    )
)

# Out of line parts of LEASE's reply and of DECLARE.
_PORT: Final = struct.Struct("<H")
_CONNECTION: Final = struct.Struct("<QHH16s")
CONNECTIONS_A_MESSAGE: Final = 4096


class Connection(NamedTuple):
    """What DECLARE says of a TCP connection on a port of its library's own."""

    session: int
    lport: int
    raddr: str
    rport: int


def pack_ports(ports: Iterable[int]) -> bytes:
    """The ports of a lease."""
    return b"".join(map(_PORT.pack, ports))


def unpack_ports(data: bytes | bytearray | memoryview) -> list[int]:
    """Raises ProtocolError when it is no list of ports."""
    if len(data) % _PORT.size:
        raise ProtocolError(f"a list of ports in {len(data)} bytes")
    return [port for (port,) in _PORT.iter_unpack(data)]


def pack_connections(connections: Iterable[Connection]) -> bytes:
    """At most CONNECTIONS_A_MESSAGE of them."""
    return b"".join(_CONNECTION.pack(c.session, c.lport, c.rport, pack_address(c.raddr)) for c in connections)


def unpack_connections(data: bytes | bytearray | memoryview) -> list[Connection]:
    """Raises ProtocolError when it is no such list."""
    if len(data) % _CONNECTION.size or len(data) > CONNECTIONS_A_MESSAGE * _CONNECTION.size:
        raise ProtocolError(f"a list of connections in {len(data)} bytes")
    return [
        Connection(session, lport, unpack_address(raddr), rport)
        for session, lport, rport, raddr in _CONNECTION.iter_unpack(data)
    ]


_STATE_HEAD = struct.Struct("=II16s16sHHB3x")  # the head of an exported session (engine.pyx): magic, size, flow_key
STRAY_HEAD: Final = 4  # before a stray's Ethernet header: what the ring said of the frame (flags, size of its pieces)


def flow_of_state(state: bytes | memoryview) -> tuple[int, str, int, str, int]:
    """(protocol, local address, port, remote address, port) that an exported state says it is of."""
    if len(state) < _STATE_HEAD.size:
        raise ProtocolError(f"a session state of {len(state)} bytes")
    _, _, laddr, raddr, lport, rport, protocol = _STATE_HEAD.unpack_from(state)
    return protocol, unpack_address(laddr), lport, unpack_address(raddr), rport


def server_path(path: str | None = None) -> str:
    """Where the server is: the argument, else ``ULNET_SERVER``, else the default."""
    return path or os.environ.get(PATH_VARIABLE) or DEFAULT_PATH
