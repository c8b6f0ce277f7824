"""What the server knows of an application and of a session: plain data, changed only by the modules beside this one."""

from __future__ import annotations

import dataclasses
import enum
import socket
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ulnet.stack.ports import Name

if TYPE_CHECKING:
    from ulnet.ipc import Sender
    from ulnet.kernelshim.channel import ChannelGrant
    from ulnet.stack.relay import Relay
    from ulnet.stack.session import Session
    from ulnet.stack.statpage import StatPage

TCP: Final = 6
UDP: Final = 17
PROTOCOL_NAMES: Final = {TCP: "tcp", UDP: "udp"}

#: (protocol, local address, local port, remote address, remote port); ("", 0) where there is no peer.
Flow = tuple[int, str, int, str, int]


class Place(enum.Enum):
    """Who manages a session (SOSP 1993 section 3: exactly one address space at a time)."""

    NAMED = "named"  # a local endpoint and nothing more
    CONNECTING = "connecting"  # the server's engine does the handshake
    LISTENING = "listening"  # the server's engine answers
    APPLICATION = "application"
    SERVER = "server"  # given back: FIN exchange, TIME-WAIT
    SHARED = "shared"  # the server's engine runs it for the holders of a descriptor (netserver/shared.py)


class Refusal(OSError):
    """A call that is not obeyed: errno and one line for the caller. ``violation``: no honest library asks this."""

    def __init__(self, code: int, reason: str, *, violation: bool = False) -> None:
        super().__init__(code, reason)
        self.violation = violation


@dataclasses.dataclass(eq=False)
class Application:
    """One attached task."""

    sender: Sender
    serial: int
    name: str  # as the kernel calls the process, for `ulnet sessions`
    port: int  # send right for upcalls
    channel: ChannelGrant
    stats: StatPage
    sessions: dict[int, SessionRecord] = dataclasses.field(default_factory=dict)
    guarded: Counter[tuple[int, str, int]] = dataclasses.field(default_factory=Counter)
    leases: dict[int, Name] = dataclasses.field(default_factory=dict)  # by port
    numbers: int = 0  # sessions delivered so far
    resolving: int = 0
    violations: int = 0

    @property
    def pid(self) -> int:
        return self.sender.pid

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclasses.dataclass(eq=False)
class Heir:
    """A child process between its fork and its own attachment: it holds what its parent shared then."""

    token: int
    pid: int  # its parent's
    uid: int
    lifeline: socket.socket  # the server's end; its hang-up is the child's end
    sessions: dict[int, SessionRecord] = dataclasses.field(default_factory=dict)


Holder = Application | Heir


@dataclasses.dataclass(eq=False)
class Share:
    """What the server knows of a shared session beyond its record."""

    what: Place  # it is: NAMED, CONNECTING, LISTENING, or open (APPLICATION)
    pair: tuple[int, int]  # device and inode of the users' end
    uid: int  # who shared it
    relay: Relay | None  # None: over
    holders: set[Holder] = dataclasses.field(default_factory=set)
    public: bool = False  # others may have the descriptor: never promoted
    transit: int = 0  # descriptors on their way to processes that will hold it
    # Listening: connections not announced yet; those announced by number, and since when nobody claims what was read.
    waiting: deque[SessionRecord] = dataclasses.field(default_factory=deque)
    announced: dict[int, tuple[SessionRecord, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class SessionRecord:
    """One session, wherever it is managed."""

    number: int
    protocol: int
    owner: Application | None
    place: Place
    name: Name
    laddr: str  # the address on the wire, also where the name is a wildcard
    peer: tuple[str, int] | None = None
    engine_session: Session | None = None
    flow: Flow | None = None  # turned to the owner's channel
    guarded: bool = False
    share: Share | None = None
    listener: SessionRecord | None = None  # announced by this shared listener, not claimed yet
    # Connecting: called once with an errno or with the state.
    done: Callable[[SessionRecord, int, bytes], None] | None = None
    # Listening: the application answers by itself; else sessions that may be pushed now, and at most.
    local: bool = False
    credit: int = 0
    backlog: int = 0
    # Handed over: where the stream stood then, for a reset before the library wrote its first status record.
    snd_nxt: int = 0
    rcv_nxt: int = 0
    # Who managed it lately, by serial, and until when frames from there are believed.
    former: dict[int, int] = dataclasses.field(default_factory=dict)
    # Frames the library sent after giving the session back, should they overtake the state.
    early: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def lport(self) -> int:
        return self.name.port

    @property
    def key(self) -> Flow:
        """The flow as the demultiplexer knows it."""
        raddr, rport = self.peer or ("", 0)
        return self.protocol, self.laddr, self.lport, raddr, rport

    def __str__(self) -> str:
        peer = f" to {self.peer[0]}:{self.peer[1]}" if self.peer else ""
        return f"{PROTOCOL_NAMES[self.protocol]} {self.laddr}:{self.lport}{peer}"
