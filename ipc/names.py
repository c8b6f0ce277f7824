"""Mach's calls on a task's own name space, the same for a remote and for the local task."""

from typing import Any

from .calls import PortStatus
from .codes import PORT_NULL, MsgType, Notify, Right, RightSet


class Names:
    """The calls; `_call` takes them to the hub. Refusals raise MachError and change nothing."""

    def _call(self, method: str, *arguments: Any, leaving: int = PORT_NULL) -> Any:
        """Have the hub make a call of calls.py. `leaving`: a name whose receive right may go by it."""
        raise NotImplementedError

    def allocate(self, right: Right = Right.RECEIVE) -> int:
        """A new port; its receive right."""
        return int(self._call("allocate", int(right)))

    def destroy(self, name: int) -> None:
        """Destroy all rights under a name."""
        self._call("destroy", name, leaving=name)

    def deallocate(self, name: int) -> None:
        """Give up one reference of a send right, send-once right or dead name."""
        self._call("deallocate", name)

    def mod_refs(self, name: int, right: Right, delta: int) -> None:
        """Change the references of one right of a name."""
        self._call("mod_refs", name, int(right), delta, leaving=name if right == Right.RECEIVE and delta else 0)

    def get_refs(self, name: int, right: Right) -> int:
        """References of one right of a name."""
        return int(self._call("get_refs", name, int(right)))

    def names(self) -> dict[int, RightSet]:
        """All names and what they denote."""
        return {name: RightSet(bits) for name, bits in self._call("names")}

    def type(self, name: int) -> RightSet:
        """What a name denotes."""
        return RightSet(self._call("type", name))

    def rename(self, old: int, new: int) -> None:
        """Give a right another name."""
        self._call("rename", old, new)

    def insert_right(self, name: int, port: int, disposition: MsgType) -> None:
        """Make a right from `port` and hold it as `name`."""
        self._call("insert_right", name, port, int(disposition))

    def extract_right(self, name: int, disposition: MsgType) -> int:
        """Make a right from `name`; returns the name it is held by."""
        return int(self._call("extract_right", name, int(disposition)))

    def get_attributes(self, name: int) -> PortStatus:
        """Status of a receive right."""
        return PortStatus(*self._call("get_attributes", name))

    def set_attributes(self, name: int, qlimit: int) -> None:
        """Queue limit of a receive right."""
        self._call("set_attributes", name, qlimit)

    def request_notification(
        self, name: int, variant: Notify, sync: int, notify: int, disposition: MsgType = MsgType.MAKE_SEND_ONCE
    ) -> int:
        """Ask for DEAD_NAME, NO_SENDERS or PORT_DESTROYED; returns the request this one replaces (or PORT_NULL)."""
        return int(self._call("request_notification", name, int(variant), sync, notify, int(disposition)))

    def check_in(self, name: str) -> int:
        """The receive right of a service."""
        return int(self._call("check_in", name))

    def look_up(self, name: str) -> int:
        """A send right to a service, also before it has checked in."""
        return int(self._call("look_up", name))

    def register(self, name: str, port: int) -> None:
        """Publish a send right (PORT_NULL withdraws)."""
        self._call("register", name, port)
