"""The objects of the microkernel of ports: Port, Entry, Space, KMsg, and their limits. The rules are in ports.py."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from .codes import PORT_NULL
from .message import Buffer, Sender

MACH_PORT_QLIMIT_DEFAULT = 5  # mach/port.h
MACH_PORT_QLIMIT_MAX = 1024
MACH_PORT_UREFS_MAX = 65535
# Charged for the objects of a queued message besides its bytes, so that empty ones are bounded as well.
MESSAGE_OVERHEAD = 1024


@dataclass(frozen=True)
class Limits:
    """What a peer can make the hub hold. Beyond: the call is refused with a code, or the frame dropped and counted."""

    tasks: int = 4096
    tasks_per_user: int = 1024  # root and the hub's user excepted
    connections_per_task: int = 1024
    names_per_task: int = 65536
    bootstrap_names: int = 4096
    inline_bytes: int = 1 << 20
    message_bytes: int = 64 << 20
    held_bytes_per_task: int = 256 << 20  # what it has sent and nobody has received
    notifications_per_port: int = 16384  # queued in one port; a program can notify itself without end
    rights_per_message: int = 1024
    buffers_per_message: int = 256
    fds_per_message: int = 64  # the kernel's own limit is 253 (SCM_MAX_FD)
    held_fds_per_task: int = 256
    backlog_per_connection: int = 256


class Host(Protocol):
    """Who receives for a space by being pushed to (a remote task)."""

    def deliver(self, port: "Port") -> None: ...

    def revoke(self, name: int) -> None: ...


class Waiter(Protocol):
    """Who waits for room in a port."""

    def resume(self) -> None: ...


class ReplyTo(Protocol):
    """Where the message to an RPC's reply port goes."""

    def reply(self, seq: int, message: "KMsg") -> None: ...


class Port:
    """A protected queue with one receiver; `slot` is set for the one-message reply ports that the hub makes for RPC."""

    __slots__ = (
        "alive", "carrier", "holders", "mscount", "name", "ns_request", "pd_request", "qlimit", "queue", "receiver",
        "seqno", "slot", "sorights", "srights", "taken", "unacked", "waiters",
    )  # fmt: skip

    def __init__(self, receiver: "Space | None" = None, slot: "tuple[ReplyTo, int] | None" = None) -> None:
        self.alive = True
        self.receiver = receiver
        self.name = PORT_NULL  # the receiver's name for it
        self.carrier: KMsg | None = None  # the message that carries the receive right
        self.slot = slot
        self.queue: deque[KMsg] = deque()
        self.unacked: deque[KMsg] = deque()  # copied out, not known to be taken by the receiver's program
        self.taken = 0  # serial of the last message that the receiver's program has taken
        self.qlimit = MACH_PORT_QLIMIT_DEFAULT
        self.seqno = 0
        self.mscount = 0
        self.srights = 0  # entries and messages that hold a send right
        self.sorights = 0
        self.ns_request: Port | None = None  # send-once rights to where the notification goes
        self.pd_request: Port | None = None
        self.holders: set[Entry] = set()
        self.waiters: deque[Waiter] = deque()  # senders parked by the hub, in order

    def full(self) -> bool:
        return len(self.queue) + len(self.unacked) >= self.qlimit


DEAD_PORT = Port()
DEAD_PORT.alive = False


class Entry:
    """One name in a space: its right bits, references, port, and dead-name request."""

    __slots__ = ("bits", "dn_request", "name", "port", "space", "urefs")

    def __init__(self, space: "Space", name: int, bits: int, port: Port, urefs: int) -> None:
        self.space = space
        self.name = name
        self.bits = bits
        self.port = port
        self.urefs = urefs
        self.dn_request: Port | None = None


class Space:
    """A task's names, and what it makes the hub hold."""

    __slots__ = (
        "alive", "by_port", "entries", "held_bytes", "held_fds", "host", "name_limit", "next_name", "sender",
    )  # fmt: skip

    def __init__(self, sender: Sender, name_limit: int, host: "Host | None" = None) -> None:
        self.sender = sender
        self.host = host
        self.alive = True
        self.entries: dict[int, Entry] = {}
        self.by_port: dict[Port, Entry] = {}
        self.next_name = 0x101
        self.name_limit = name_limit
        self.held_bytes = 0
        self.held_fds = 0

    def new_name(self) -> int:
        """A name not in use. Names count up so that a stale name is not soon somebody else's."""
        name = self.next_name
        while name in self.entries:
            name = name + 1 if name < 0xFFFFFF00 else 0x101
        self.next_name = name + 1 if name < 0xFFFFFF00 else 0x101
        return name


Rights = list[tuple[int, Port | None]]


class KMsg:
    """A message inside the hub: names are already rights. Whoever holds it owns its rights and descriptors."""

    __slots__ = (
        "charge", "dest", "dest_type", "fds", "id", "inline", "nbytes", "ool", "out_names", "out_reply", "reply",
        "reply_type", "rights", "sender", "seqno", "serial",
    )  # fmt: skip

    def __init__(
        self,
        dest: Port,
        dest_type: int,
        id: int,
        inline: bytes,
        sender: Sender,
        reply: Port | None = None,
        reply_type: int = 0,
        rights: "Rights | None" = None,
        ool: "list[Buffer] | None" = None,
        fds: list[int] | None = None,
        charge: Space | None = None,
    ) -> None:
        self.dest = dest
        self.dest_type = dest_type
        self.reply = reply
        self.reply_type = reply_type
        self.id = id
        self.inline = inline
        self.rights = rights if rights is not None else []
        self.ool = ool if ool is not None else []
        self.fds = fds if fds is not None else []
        self.sender = sender
        self.charge = charge
        self.seqno = 0
        self.serial = 0
        self.out_reply = PORT_NULL
        self.out_names: list[int] = []
        self.nbytes = 0
        if charge is not None:
            nbytes = len(inline) + MESSAGE_OVERHEAD
            for buffer in self.ool:
                nbytes += memoryview(buffer).nbytes
            self.nbytes = nbytes
            charge.held_bytes += nbytes
            charge.held_fds += len(self.fds)
