"""Mach's calls on a task's name space, and the bootstrap names; the hub makes them for local and remote tasks."""

from collections.abc import Callable
from typing import NamedTuple

from .codes import (
    BootstrapReturn,
    KernReturn,
    MachError,
    MsgType,
    Notify,
    Right,
    RightSet,
)
from .message import Sender
from .objects import MACH_PORT_QLIMIT_MAX, MACH_PORT_UREFS_MAX, Entry, Port, Space
from .ports import T_RECEIVE, T_SEND, T_SEND_ONCE, Kernel

_BITS = {
    Right.SEND: int(RightSet.SEND),
    Right.RECEIVE: int(RightSet.RECEIVE),
    Right.SEND_ONCE: int(RightSet.SEND_ONCE),
    Right.PORT_SET: int(RightSet.PORT_SET),
    Right.DEAD_NAME: int(RightSet.DEAD_NAME),
}
_NAME_LENGTH_MAX = 128  # BOOTSTRAP_MAX_NAME_LEN


class PortStatus(NamedTuple):
    """What get_attributes tells of a receive right (mach_port_status)."""

    pset: int
    seqno: int
    mscount: int
    qlimit: int
    msgcount: int
    sorights: bool
    srights: bool
    pdrequest: bool
    nsrequest: bool


def default_policy(name: str, sender: Sender, hub: Sender) -> bool:
    """Who may serve a bootstrap name: the hub's own user and root any; another user only those below "user.<uid>."."""
    return sender.uid in (0, hub.uid) or name.startswith(f"user.{sender.uid}.")


Policy = Callable[[str, Sender, Sender], bool]


class Calls:
    """The calls, each on a given space. Refusals raise MachError; nothing is changed then."""

    def __init__(self, kernel: Kernel, bootstrap_policy: Policy = default_policy) -> None:
        self.kernel = kernel
        self.policy = bootstrap_policy
        # Holds the receive rights nobody has checked in for and send rights to what is published.
        self.bootstrap_space = Space(kernel.sender, kernel.limits.bootstrap_names * 2)
        self.bootstrap: dict[str, Entry] = {}

    def _entry(self, space: Space, name: int) -> Entry:
        entry = space.entries.get(name)
        if entry is None:
            raise MachError(KernReturn.KERN_INVALID_NAME, f"no right named {name}")
        return entry

    def _receive_right(self, space: Space, name: int) -> Port:
        entry = self._entry(space, name)
        if not entry.bits & RightSet.RECEIVE:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {name} is not a receive right")
        return entry.port

    # -- rights -----------------------------------------------------------------------------------------------------

    def allocate(self, space: Space, right: int = Right.RECEIVE) -> int:
        """mach_port_allocate: a new port (RECEIVE) or an empty dead name (DEAD_NAME)."""
        if right == Right.RECEIVE:
            return self.kernel.allocate(space).name
        if right == Right.DEAD_NAME:
            return self.kernel.allocate_dead_name(space).name
        raise MachError(KernReturn.KERN_INVALID_VALUE, f"right {right} cannot be allocated")

    def destroy(self, space: Space, name: int) -> None:
        """mach_port_destroy: all rights under the name, whatever their references."""
        entry = self._entry(space, name)
        bits, port = entry.bits, entry.port
        if bits & RightSet.RECEIVE:
            self._destroy_receive(entry)
        if bits & RightSet.SEND_ONCE:
            self.kernel.drop_entry(entry)
            self.kernel.release(T_SEND_ONCE, port)
        elif bits & RightSet.SEND and entry.bits & RightSet.SEND:
            self.kernel.forget_send(entry)
            self.kernel.release(T_SEND, port)
        elif entry.bits & RightSet.DEAD_NAME:
            self.kernel.drop_entry(entry)

    def _destroy_receive(self, entry: Entry) -> None:
        """The receive right goes; a send right under its name becomes a dead name, or stays if the port lives on."""
        port = entry.port
        self.kernel.recall(port)
        entry.bits &= ~int(RightSet.RECEIVE)
        if not entry.bits:
            self.kernel.drop_entry(entry)
        self.kernel.destroy_port(port)

    def deallocate(self, space: Space, name: int) -> None:
        """mach_port_deallocate: one reference of a send right, send-once right or dead name."""
        entry = self._entry(space, name)
        for right in (Right.SEND, Right.SEND_ONCE, Right.DEAD_NAME):
            if entry.bits & _BITS[right]:
                self.mod_refs(space, name, right, -1)
                return
        raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {name} is a receive right only: destroy it")

    def mod_refs(self, space: Space, name: int, right: int, delta: int) -> None:
        """mach_port_mod_refs. A receive or send-once right has one reference, so that only -1 and 0 are possible."""
        entry = self._entry(space, name)
        if right not in _BITS:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"{right} is no right")
        if not entry.bits & _BITS[Right(right)]:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {name} holds no {Right(right).name} right")
        if delta == 0:
            return
        if right in (Right.RECEIVE, Right.SEND_ONCE):
            if delta != -1:
                what = f"{Right(right).name} has one reference, delta was {delta}"
                raise MachError(KernReturn.KERN_INVALID_VALUE, what)
            if right == Right.RECEIVE:
                self._destroy_receive(entry)
            else:
                self.kernel.drop_entry(entry)
                self.kernel.release(T_SEND_ONCE, entry.port)
            return
        urefs = entry.urefs + delta
        if urefs < 0:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"name {name} has {entry.urefs} references, delta {delta}")
        if urefs > MACH_PORT_UREFS_MAX:
            raise MachError(KernReturn.KERN_UREFS_OVERFLOW, f"at most {MACH_PORT_UREFS_MAX} references")
        if urefs:
            entry.urefs = urefs
        elif right == Right.SEND:
            port = entry.port
            self.kernel.forget_send(entry)
            self.kernel.release(T_SEND, port)
        else:
            self.kernel.drop_entry(entry)

    def get_refs(self, space: Space, name: int, right: int) -> int:
        """mach_port_get_refs: 0 when the name holds other rights than this one."""
        entry = self._entry(space, name)
        if right not in _BITS:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"{right} is no right")
        if not entry.bits & _BITS[Right(right)]:
            return 0
        return 1 if right in (Right.RECEIVE, Right.SEND_ONCE) else entry.urefs

    def names(self, space: Space) -> list[tuple[int, int]]:
        """mach_port_names: every name with what it denotes."""
        return [(name, entry.bits) for name, entry in space.entries.items()]

    def type(self, space: Space, name: int) -> RightSet:
        """mach_port_type."""
        return RightSet(self._entry(space, name).bits)

    def rename(self, space: Space, old: int, new: int) -> None:
        """mach_port_rename."""
        entry = self._entry(space, old)
        if not 0 < new < 0xFFFFFFFF:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"{new} cannot be a name")
        if new in space.entries:
            raise MachError(KernReturn.KERN_NAME_EXISTS, f"name {new} is in use")
        if entry.bits & RightSet.RECEIVE and entry.port.unacked:
            raise MachError(KernReturn.KERN_FAILURE, f"messages to {old} are on their way: receive them first")
        del space.entries[old]
        entry.name = new
        space.entries[new] = entry
        if entry.bits & RightSet.RECEIVE:
            entry.port.name = new

    def insert_right(self, space: Space, name: int, port: int, disposition: int) -> None:
        """mach_port_insert_right within one's own space: a right made from `port` appears under `name`."""
        kind = self._kind_made(disposition)
        if kind == T_SEND_ONCE:
            entry = space.entries.get(name)
            if entry is not None:
                raise MachError(KernReturn.KERN_NAME_EXISTS, f"name {name} is in use")
        elif name != port:
            held = space.by_port.get(self._entry(space, port).port)
            if held is not None and not (disposition == T_RECEIVE and name == port):
                raise MachError(KernReturn.KERN_RIGHT_EXISTS, f"the task holds this port as {held.name}")
        if not 0 < name < 0xFFFFFFFF:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"{name} cannot be a name")
        self._check(space, port, disposition)
        right = self.kernel.copyin(space, port, disposition)
        self.kernel.copyout(space, kind, right, name)

    def extract_right(self, space: Space, name: int, disposition: int) -> int:
        """mach_port_extract_right from one's own space: the name under which the right made from `name` is now held."""
        kind = self._kind_made(disposition)
        self._check(space, name, disposition)
        return self.kernel.copyout(space, kind, self.kernel.copyin(space, name, disposition))

    def _kind_made(self, disposition: int) -> int:
        kind = KIND_OF.get(disposition)
        if kind is None:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"{disposition} is no disposition")
        return kind

    def _check(self, space: Space, name: int, disposition: int) -> None:
        self._entry(space, name)
        try:
            self.kernel.check_rights(space, [(name, disposition)], 2)
        except MachError as error:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, error.what) from None

    # -- receive rights ---------------------------------------------------------------------------------------------

    def get_attributes(self, space: Space, name: int) -> PortStatus:
        """mach_port_get_attributes(MACH_PORT_RECEIVE_STATUS)."""
        port = self._receive_right(space, name)
        return PortStatus(
            0, port.seqno, port.mscount, port.qlimit, len(port.queue) + len(port.unacked), port.sorights > 0,
            port.srights > 0, port.pd_request is not None, port.ns_request is not None,
        )  # fmt: skip

    def set_attributes(self, space: Space, name: int, qlimit: int) -> None:
        """mach_port_set_attributes(MACH_PORT_LIMITS_INFO)."""
        port = self._receive_right(space, name)
        if not 0 <= qlimit <= MACH_PORT_QLIMIT_MAX:
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"qlimit {qlimit} is not in 0..{MACH_PORT_QLIMIT_MAX}")
        port.qlimit = qlimit
        if port.waiters:
            self.kernel.roomy.append(port)

    def request_notification(
        self, space: Space, name: int, variant: int, sync: int, notify: int, disposition: int = MsgType.MAKE_SEND_ONCE
    ) -> int:
        """mach_port_request_notification; returns the previous request's send-once right or PORT_NULL."""
        kernel = self.kernel
        if disposition not in (MsgType.MAKE_SEND_ONCE, MsgType.MOVE_SEND_ONCE):
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"disposition {disposition} makes no send-once right")
        entry = self._entry(space, name)
        if variant not in (Notify.DEAD_NAME, Notify.NO_SENDERS, Notify.PORT_DESTROYED):
            raise MachError(KernReturn.KERN_INVALID_VALUE, f"no notification {variant} can be requested")
        if variant == Notify.DEAD_NAME:
            if entry.bits & RightSet.DEAD_NAME and not sync:
                raise MachError(KernReturn.KERN_INVALID_ARGUMENT, f"name {name} is dead already and sync is 0")
        elif not entry.bits & RightSet.RECEIVE:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {name} is not a receive right")
        if notify:
            try:
                kernel.check_rights(space, [(notify, disposition)], 2)
            except MachError as error:
                raise MachError(KernReturn.KERN_INVALID_CAPABILITY, error.what) from None
        request = kernel.copyin(space, notify, disposition)
        previous: Port | None
        if variant == Notify.DEAD_NAME:
            if entry.bits & RightSet.DEAD_NAME:
                previous = None
                if request is not None:
                    kernel.notify_dead_name(entry, request)
            else:
                previous, entry.dn_request = entry.dn_request, request
        elif variant == Notify.NO_SENDERS:
            port = entry.port
            previous, port.ns_request = port.ns_request, request
            if request is not None and port.srights == 0 and sync <= port.mscount:
                kernel.no_senders(port)
        else:
            previous, entry.port.pd_request = entry.port.pd_request, request
        return kernel.copyout(space, T_SEND_ONCE, previous)

    # -- bootstrap --------------------------------------------------------------------------------------------------

    def _service(self, name: str) -> Entry | None:
        """The live entry for a bootstrap name; a dead one is forgotten here."""
        if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH_MAX:
            raise MachError(KernReturn.KERN_INVALID_ARGUMENT, f"a service name has 1 to {_NAME_LENGTH_MAX} characters")
        entry = self.bootstrap.get(name)
        if entry is not None and entry.bits & RightSet.DEAD_NAME:
            self.kernel.drop_entry(entry)
            del self.bootstrap[name]
            return None
        return entry

    def _room(self) -> None:
        if len(self.bootstrap) < self.kernel.limits.bootstrap_names:
            return
        for name, entry in list(self.bootstrap.items()):
            if entry.bits & RightSet.DEAD_NAME:
                self.kernel.drop_entry(entry)
                del self.bootstrap[name]
        if len(self.bootstrap) >= self.kernel.limits.bootstrap_names:
            raise MachError(BootstrapReturn.BOOTSTRAP_NO_MEMORY, f"{len(self.bootstrap)} service names in use")

    def _create(self, name: str) -> Entry:
        """A port for a name; the bootstrap space keeps a send right besides the receive right until check-in."""
        self._room()
        kernel, space = self.kernel, self.bootstrap_space
        entry = kernel.allocate(space)
        kernel.copyout(space, T_SEND, kernel.copyin(space, entry.name, MsgType.MAKE_SEND))
        self.bootstrap[name] = entry
        return entry

    def _allowed(self, space: Space, name: str) -> None:
        if not self.policy(name, space.sender, self.kernel.sender):
            raise MachError(
                BootstrapReturn.BOOTSTRAP_NOT_PRIVILEGED,
                f"uid {space.sender.uid} may not serve {name!r}; names below 'user.{space.sender.uid}.' are free to it",
            )

    def check_in(self, space: Space, name: str) -> int:
        """bootstrap_check_in: the receive right of a service name, with what was sent to it before."""
        entry = self._service(name)
        self._allowed(space, name)
        if entry is None:
            entry = self._create(name)
        elif not entry.bits & RightSet.RECEIVE:
            raise MachError(BootstrapReturn.BOOTSTRAP_SERVICE_ACTIVE, f"{name!r} is served already")
        port = self.kernel.copyin(self.bootstrap_space, entry.name, MsgType.MOVE_RECEIVE)
        return self.kernel.copyout(space, T_RECEIVE, port)

    def look_up(self, space: Space, name: str) -> int:
        """bootstrap_look_up: a send right, also before the server has checked in (requests queue)."""
        entry = self._service(name)
        if entry is None:
            entry = self._create(name)
        right = self.kernel.copyin(self.bootstrap_space, entry.name, MsgType.COPY_SEND)
        return self.kernel.copyout(space, T_SEND, right)

    def register(self, space: Space, name: str, port: int) -> None:
        """bootstrap_register: publish a send right (PORT_NULL withdraws the name)."""
        entry = self._service(name)
        self._allowed(space, name)
        if port == 0:
            if entry is None:
                raise MachError(BootstrapReturn.BOOTSTRAP_UNKNOWN_SERVICE, f"{name!r} is not registered")
            del self.bootstrap[name]
            self._forget(entry)
            return
        if entry is not None:
            raise MachError(BootstrapReturn.BOOTSTRAP_NAME_IN_USE, f"{name!r} is in use")
        self._room()
        bits = self._entry(space, port).bits
        disposition = MsgType.COPY_SEND if bits & RightSet.SEND else MsgType.MAKE_SEND
        self._check(space, port, disposition)
        right = self.kernel.copyin(space, port, disposition)
        if right is None or not right.alive:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {port} is dead")
        held = self.kernel.copyout(self.bootstrap_space, T_SEND, right)
        self.bootstrap[name] = self.bootstrap_space.entries[held]

    def _forget(self, entry: Entry) -> None:
        """One published name less; the same port may be published under others."""
        if entry.bits & RightSet.RECEIVE:
            self.destroy(self.bootstrap_space, entry.name)
        else:
            self.mod_refs(self.bootstrap_space, entry.name, Right.SEND, -1)


KIND_OF = {
    int(MsgType.MOVE_RECEIVE): T_RECEIVE,
    int(MsgType.MOVE_SEND): T_SEND,
    int(MsgType.MOVE_SEND_ONCE): T_SEND_ONCE,
    int(MsgType.COPY_SEND): T_SEND,
    int(MsgType.MAKE_SEND): T_SEND,
    int(MsgType.MAKE_SEND_ONCE): T_SEND_ONCE,
}
