"""The tables of the microkernel of ports: tasks' name spaces, rights, ports, queues and notifications. No I/O.

Call order for a message: `peek` (where does it go, is there room) -> `copyin` (names become rights, all or none) ->
`enqueue` -> `copyout` (rights become the receiver's names) -> `consume`. A copied-out message that its receiver never
took is put back by `uncopy`, which is what lets a receive right move with its queue.

Whoever drives this (the hub) empties `pending` (ports with new messages), `roomy` (ports with room again) and calls
`collect` after every operation. Destruction goes through `garbage`, never by recursion: rights nest in messages as
deep as a peer likes. Semantics: Mach 3 Kernel Interfaces; XNU osfmk/ipc is the reference where the manual is silent.
"""

from collections import Counter, deque
from collections.abc import Callable
from struct import Struct

from .codes import (
    PORT_DEAD,
    PORT_NULL,
    KernReturn,
    MachError,
    MachMsgReturn,
    MsgType,
    Notify,
    RightSet,
)
from .message import Sender, close_fd
from .objects import DEAD_PORT, MACH_PORT_UREFS_MAX, Entry, KMsg, Limits, Port, Rights, Space

# Rights in transit may nest (a message to a port whose receive right is itself in a message, ...); XNU walks such a
# chain without a bound, we refuse beyond this depth.
TRANSIT_DEPTH_MAX = 64

U32 = Struct("<I")

_SEND = int(RightSet.SEND)
_RECEIVE = int(RightSet.RECEIVE)
_SEND_ONCE = int(RightSet.SEND_ONCE)
_DEAD = int(RightSet.DEAD_NAME)
T_RECEIVE, T_SEND, T_SEND_ONCE = int(MsgType.PORT_RECEIVE), int(MsgType.PORT_SEND), int(MsgType.PORT_SEND_ONCE)
_COPY_SEND, _MAKE_SEND, _MAKE_SEND_ONCE = int(MsgType.COPY_SEND), int(MsgType.MAKE_SEND), int(MsgType.MAKE_SEND_ONCE)


class Kernel:
    """All spaces and ports, and the rules between them."""

    def __init__(self, limits: Limits, sender: Sender, counters: "Counter[str]") -> None:
        self.limits = limits
        self.counters = counters
        self.sender = sender  # who notifications come from: the hub itself
        self.pending: deque[Port] = deque()
        self.roomy: deque[Port] = deque()
        self.garbage: deque[KMsg] = deque()
        self.serial = 0
        # Called when a receive right leaves a space that had messages pushed to it: what is not taken is void there.
        self.on_recall: Callable[[Space, int], None] = lambda space, name: None

    # -- names ------------------------------------------------------------------------------------------------------

    def allocate(self, space: Space) -> Entry:
        """A new port; the space gets its receive right."""
        if len(space.entries) >= space.name_limit:
            raise MachError(KernReturn.KERN_NO_SPACE, f"{space.name_limit} names in use")
        port = Port(space)
        entry = self._new_entry(space, _RECEIVE, port, 0)
        port.name = entry.name
        return entry

    def allocate_dead_name(self, space: Space) -> Entry:
        """A name for nothing, with one reference."""
        if len(space.entries) >= space.name_limit:
            raise MachError(KernReturn.KERN_NO_SPACE, f"{space.name_limit} names in use")
        name = space.new_name()
        entry = space.entries[name] = Entry(space, name, _DEAD, DEAD_PORT, 1)
        return entry

    def _new_entry(self, space: Space, bits: int, port: Port, urefs: int, name: int = PORT_NULL) -> Entry:
        if name == PORT_NULL:
            name = space.new_name()
        entry = space.entries[name] = Entry(space, name, bits, port, urefs)
        if bits != _SEND_ONCE:
            space.by_port[port] = entry
        if bits != _RECEIVE:
            port.holders.add(entry)
        return entry

    def drop_entry(self, entry: Entry) -> None:
        """The name goes away; the rights in it were moved or released before."""
        space = entry.space
        space.entries.pop(entry.name, None)
        if space.by_port.get(entry.port) is entry:
            del space.by_port[entry.port]
        entry.port.holders.discard(entry)
        request, entry.dn_request = entry.dn_request, None
        if request is not None:
            self.notify(request, Notify.PORT_DELETED, U32.pack(entry.name))

    # -- rights -----------------------------------------------------------------------------------------------------

    def release(self, kind: int, port: Port | None) -> None:
        """Destroy a right that is in nobody's space."""
        if port is None or not port.alive:
            return
        if kind == T_SEND:
            port.srights -= 1
            if port.srights == 0:
                self.no_senders(port)
        elif kind == T_SEND_ONCE:
            # A send-once right yields exactly one message; the notification takes the right along.
            self.notify(port, Notify.SEND_ONCE, b"")
        else:
            self.destroy_port(port)

    def notify(self, request: Port, id: int, inline: bytes, rights: "Rights | None" = None) -> None:
        """Send a notification; uses up the send-once right `request`."""
        message = KMsg(request, T_SEND_ONCE, id, inline, self.sender, rights=rights)
        if request.alive and len(request.queue) < self.limits.notifications_per_port:
            self.enqueue(message)
        else:
            if request.alive:
                self.counters["notification dropped: receiver does not read"] += 1
            self.garbage.append(message)

    def no_senders(self, port: Port) -> None:
        """The last send right is gone."""
        request, port.ns_request = port.ns_request, None
        if request is not None:
            self.notify(request, Notify.NO_SENDERS, U32.pack(port.mscount))

    def notify_dead_name(self, entry: Entry, request: Port) -> None:
        """Tell that a name is dead; this gives it a reference, so that it is not reused before the news is read."""
        entry.urefs = min(entry.urefs + 1, MACH_PORT_UREFS_MAX)
        self.notify(request, Notify.DEAD_NAME, U32.pack(entry.name))

    def destroy_port(self, port: Port) -> None:
        """The receive right is destroyed (it is in no space any more, or about to be dropped from its own)."""
        request, port.pd_request = port.pd_request, None
        if request is not None and request.alive and not self.circular(request, port):
            self._clear_receiver(port)
            self.notify(request, Notify.PORT_DESTROYED, b"", [(T_RECEIVE, port)])
            return
        self.release(T_SEND_ONCE, request)
        self.recall(port)
        port.alive = False
        port.receiver = None
        port.carrier = None
        self.garbage.extend(port.queue)
        port.queue.clear()
        holders, port.holders = port.holders, set()
        for entry in holders:
            space = entry.space
            if space.by_port.get(port) is entry:
                del space.by_port[port]
            if entry.bits & _SEND_ONCE:
                entry.urefs = 1
            entry.bits = _DEAD
            entry.port = DEAD_PORT
            note, entry.dn_request = entry.dn_request, None
            if note is not None:
                self.notify_dead_name(entry, note)
        note, port.ns_request = port.ns_request, None
        self.release(T_SEND_ONCE, note)
        if port.waiters:
            self.roomy.append(port)

    def _clear_receiver(self, port: Port) -> None:
        self.recall(port)
        self._reset(port)

    def _reset(self, port: Port) -> None:
        """A port without receiver."""
        port.receiver = None
        port.name = PORT_NULL
        port.taken = 0
        port.mscount = 0  # XNU ipc_port_clear_receiver
        port.seqno = 0

    def destroy_space(self, space: Space) -> None:
        """The task died: all its rights are destroyed."""
        space.alive = False
        for entry in list(space.entries.values()):
            if entry.bits & _RECEIVE:
                self.recall(entry.port)  # may take other entries away
        entries = list(space.entries.values())
        space.entries = {}
        space.by_port = {}
        for entry in entries:
            port = entry.port
            port.holders.discard(entry)
            entry.dn_request, request = None, entry.dn_request
            self.release(T_SEND_ONCE, request)
            if entry.bits & _SEND:
                self.release(T_SEND, port)
            elif entry.bits & _SEND_ONCE:
                self.release(T_SEND_ONCE, port)
            if entry.bits & _RECEIVE:
                self.destroy_port(port)

    # -- names become rights ----------------------------------------------------------------------------------------

    def peek(self, space: Space, dest: int, disposition: int) -> tuple[Port, int]:
        """The destination port of a send and the disposition meant (AUTO resolved)."""
        entry = space.entries.get(dest)
        if entry is None or entry.bits & _DEAD:
            raise MachError(MachMsgReturn.MACH_SEND_INVALID_DEST, f"no send right named {dest}")
        if disposition == 0:
            if entry.bits & _SEND_ONCE:
                disposition = T_SEND_ONCE
            elif entry.bits & _SEND:
                disposition = _COPY_SEND
            else:
                disposition = _MAKE_SEND
        return entry.port, disposition

    def check_rights(self, space: Space, wanted: "list[tuple[int, int]]", first: int = 0) -> None:
        """Raise unless every (name, disposition) can be copied in, in this order. Changes nothing.

        They are the destination (index 0), the reply right (1) and the body's rights; the list begins at index `first`.
        """
        seen: dict[int, list[int]] = {}
        for index, (name, disposition) in enumerate(wanted, first):
            if index == 0:
                code = MachMsgReturn.MACH_SEND_INVALID_DEST
            else:
                code = MachMsgReturn.MACH_SEND_INVALID_REPLY if index == 1 else MachMsgReturn.MACH_SEND_INVALID_RIGHT
            if name in (PORT_NULL, PORT_DEAD):
                if index == 0:
                    raise MachError(code, f"{name} is no destination")
                continue
            state = seen.get(name)
            if state is None:
                entry = space.entries.get(name)
                state = seen[name] = [entry.bits, entry.urefs] if entry is not None else [0, 0]
            bits = state[0]
            ok = True
            if disposition == _COPY_SEND:
                ok = bool(bits & (_SEND | _DEAD))
            elif disposition in (T_SEND, T_SEND_ONCE):
                kind = _SEND if disposition == T_SEND else _SEND_ONCE
                ok = bool(bits & (kind | _DEAD))
                state[1] -= 1
                if state[1] <= 0:
                    state[0] &= _RECEIVE
            elif disposition in (_MAKE_SEND, _MAKE_SEND_ONCE):
                ok = bool(bits & _RECEIVE)
            elif disposition == T_RECEIVE:
                ok = bool(bits & _RECEIVE)
                state[0] &= ~_RECEIVE
            else:
                raise MachError(MachMsgReturn.MACH_SEND_INVALID_TYPE, f"{disposition} is no disposition")
            if not ok or (index == 0 and (bits & _DEAD or disposition == T_RECEIVE)):
                raise MachError(code, f"name {name} does not allow disposition {disposition}")

    def copyin(self, space: Space, name: int, disposition: int) -> Port | None:
        """One name becomes a right (already checked). None is the null right, DEAD_PORT a dead one."""
        if name == PORT_NULL:
            return None
        if name == PORT_DEAD:
            return DEAD_PORT
        entry = space.entries[name]
        port = entry.port
        if disposition == _MAKE_SEND_ONCE:
            port.sorights += 1
        elif disposition == T_SEND_ONCE:
            if entry.bits & _DEAD:
                self._drop_reference(entry)
            else:
                self.drop_entry(entry)
        elif disposition == _COPY_SEND:
            if not entry.bits & _DEAD:
                port.srights += 1
        elif disposition == _MAKE_SEND:
            port.mscount += 1
            port.srights += 1
        elif disposition == T_SEND:
            if entry.bits & _DEAD:
                self._drop_reference(entry)
            elif entry.urefs > 1:
                entry.urefs -= 1
                port.srights += 1
            else:
                self.forget_send(entry)  # the entry's own count moves along
        else:
            self._clear_receiver(port)
            entry.bits &= ~_RECEIVE
            if not entry.bits:
                self.drop_entry(entry)
        return port

    def _drop_reference(self, entry: Entry) -> None:
        entry.urefs -= 1
        if entry.urefs <= 0:
            self.drop_entry(entry)

    def forget_send(self, entry: Entry) -> None:
        """The entry loses its send right, without touching the port's count."""
        entry.urefs = 0
        entry.bits &= ~_SEND
        if entry.bits:
            entry.port.holders.discard(entry)
        else:
            self.drop_entry(entry)

    def circular(self, dest: Port, port: Port) -> bool:
        """Would putting port's receive right into a message to dest make a loop nobody can reach?"""
        at: Port | None = dest
        for _ in range(TRANSIT_DEPTH_MAX):
            if at is port:
                return True
            if at is None or at.receiver is not None or at.carrier is None:
                return False
            at = at.carrier.dest
        return True

    def enqueue(self, message: KMsg) -> None:
        """Put a message in its queue. The room was checked before; notifications and send-once rights need none."""
        port = message.dest
        if not port.alive:
            self.garbage.append(message)
            return
        for kind, right in message.rights:
            if kind == T_RECEIVE and right is not None:
                right.carrier = message
        port.queue.append(message)
        self.pending.append(port)

    # -- rights become names ----------------------------------------------------------------------------------------

    def copyout(self, space: Space, kind: int, port: Port | None, name: int = PORT_NULL) -> int:
        """A right in transit gets a name in the space; PORT_DEAD when its port died on the way."""
        if port is None:
            return PORT_NULL
        if not port.alive:
            return PORT_DEAD
        entry = space.by_port.get(port) if kind != T_SEND_ONCE else None
        if entry is None:
            if len(space.entries) >= space.name_limit:
                self.counters["right dropped: receiver has too many names"] += 1
                self.release(kind, port)
                return PORT_NULL
            bits = _SEND if kind == T_SEND else _SEND_ONCE if kind == T_SEND_ONCE else _RECEIVE
            entry = self._new_entry(space, bits, port, 0 if kind == T_RECEIVE else 1, name)
        elif kind == T_SEND:
            if entry.bits & _SEND:
                port.srights -= 1
                if entry.urefs < MACH_PORT_UREFS_MAX:
                    entry.urefs += 1
            else:
                entry.bits |= _SEND
                entry.urefs = 1
                port.holders.add(entry)
        else:
            entry.bits |= _RECEIVE
        if kind == T_RECEIVE:
            port.receiver = space
            port.name = entry.name
            port.carrier = None
            if port.queue:
                self.pending.append(port)
        return entry.name

    def copyout_message(self, space: Space, message: KMsg) -> None:
        """Give the message's rights names in the receiver's space; sets out_reply, out_names and the seqno."""
        message.out_reply = self.copyout(space, message.reply_type, message.reply)
        if message.rights:
            message.out_names = [self.copyout(space, kind, port) for kind, port in message.rights]
        port = message.dest
        message.seqno = port.seqno
        port.seqno += 1
        self.serial += 1
        message.serial = self.serial

    def recall(self, port: Port) -> None:
        """The receive right leaves its space: messages copied out but not taken go back into the queue, in order.

        Such messages may hold receive rights with such messages, and so on: a list of work, not recursion.
        """
        space = port.receiver
        if space is None:
            return
        work = [port]
        while work:
            port = work.pop()
            port.receiver = None
            while port.unacked and port.unacked[-1].serial > port.taken:
                message = port.unacked.pop()
                self._uncopy(space, message, work)
                port.queue.appendleft(message)
            while port.unacked:
                self.taken(port.unacked.popleft())
            self.on_recall(space, port.name)
            self._reset(port)

    def taken(self, message: KMsg) -> None:
        """The receiver's program has the message: the hub's own copies of its descriptors go."""
        self.consume(message)
        for fd in message.fds:
            close_fd(fd)
        message.fds = []

    def _uncopy(self, space: Space, message: KMsg, work: list[Port]) -> None:
        """Take a message's names back out of the space: its receiver never saw them."""
        message.reply = self._retake(space, message.reply_type, message.reply, message.out_reply, work)
        message.rights = [
            (kind, self._retake(space, kind, port, name, work))
            for (kind, port), name in zip(message.rights, message.out_names, strict=True)
        ]
        for kind, right in message.rights:
            if kind == T_RECEIVE and right is not None:
                right.carrier = message
        message.out_reply, message.out_names = PORT_NULL, []

    def _retake(self, space: Space, kind: int, port: Port | None, name: int, work: list[Port]) -> Port | None:
        if name == PORT_NULL:
            return None
        try:
            self.check_rights(space, [(name, kind)], 2)
        except MachError:
            return DEAD_PORT
        if name != PORT_DEAD and kind == T_RECEIVE:
            entry = space.entries[name]
            work.append(entry.port)
            entry.bits &= ~_RECEIVE
            if not entry.bits:
                self.drop_entry(entry)
            return entry.port
        return self.copyin(space, name, kind)

    def consume(self, message: KMsg) -> None:
        """The message was received: the right it was sent on is used up, and the sender's charge ends."""
        port = message.dest
        if port.alive:
            if message.dest_type == T_SEND:
                port.srights -= 1
                if port.srights == 0:
                    self.no_senders(port)
            else:
                port.sorights -= 1
            if port.waiters:
                self.roomy.append(port)
        self.uncharge(message)

    def uncharge(self, message: KMsg) -> None:
        space, message.charge = message.charge, None
        if space is not None:
            space.held_bytes -= message.nbytes
            space.held_fds -= len(message.fds)

    def collect(self) -> None:
        """Destroy the messages in garbage with all rights, descriptors and memory in them."""
        while self.garbage:
            message = self.garbage.popleft()
            self.uncharge(message)
            for fd in message.fds:
                close_fd(fd)
            message.fds = []
            reply, message.reply = message.reply, None
            self.release(message.reply_type, reply)
            rights, message.rights = message.rights, []
            for kind, port in rights:
                self.release(kind, port)
            if message.dest.alive:
                self.consume(message)
