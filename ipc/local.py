"""The hub's own task: the calls of a Task without a socket between. Never blocks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .calls import KIND_OF
from .codes import PORT_NULL, KernReturn, MachError, MachMsgReturn, MsgOption, MsgType, RightSet
from .message import Buffer, Message, PortRight, close_fd
from .names import Names
from .objects import KMsg, Port, Space
from .ports import T_RECEIVE, T_SEND, T_SEND_ONCE

if TYPE_CHECKING:
    from .hub import Hub


class LocalTask(Names):
    """The task of the process that hosts the hub. Same thread as Hub.poll; a full queue refuses at once."""

    def __init__(self, hub: Hub, space: Space) -> None:
        self._hub = hub
        self._kernel = hub.kernel
        self.space = space

    # -- messages ---------------------------------------------------------------------------------------------------

    def send(
        self,
        dest: int,
        id: int,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Iterable[PortRight] = (),
        local: int = PORT_NULL,
        timeout: float | None = None,
        remote_disposition: int = MsgType.AUTO,
        local_disposition: int = MsgType.MAKE_SEND_ONCE,
    ) -> None:
        """Queue a message. MACH_SEND_TIMED_OUT when the queue is full, whatever the timeout: the hub cannot wait."""
        kernel, space = self._kernel, self.space
        if not -(1 << 31) <= id < 1 << 31:
            raise MachError(MachMsgReturn.MACH_SEND_INVALID_HEADER, f"message id {id} is no 32-bit number")
        port, disposition = kernel.peek(space, dest, remote_disposition)
        once = disposition in (T_SEND_ONCE, MsgType.MAKE_SEND_ONCE)
        if not once and port.full():
            raise MachError(MachMsgReturn.MACH_SEND_TIMED_OUT, f"queue of {dest} is full")
        body = [(right.name, int(right.disposition)) for right in rights]
        if local or body or remote_disposition:
            if local and KIND_OF.get(local_disposition, T_RECEIVE) == T_RECEIVE:
                raise MachError(MachMsgReturn.MACH_SEND_INVALID_REPLY, f"disposition {local_disposition}")
            kernel.check_rights(space, [(dest, disposition), (local, local_disposition), *body])
            for name, kind in body:
                if kind == T_RECEIVE and name and kernel.circular(port, space.entries[name].port):
                    raise MachError(MachMsgReturn.MACH_SEND_INVALID_RIGHT, f"receive right {name} sent to itself")
        buffers: list[Buffer] = [b if isinstance(b, bytes) else memoryview(b).cast("B") for b in ool]
        owned = _duplicates(fds)
        kernel.copyin(space, dest, disposition)
        reply = kernel.copyin(space, local, local_disposition) if local else None
        moved = [(KIND_OF[kind], kernel.copyin(space, name, kind)) for name, kind in body]
        kernel.enqueue(
            KMsg(
                port,
                T_SEND_ONCE if once else T_SEND,
                id,
                bytes(inline),
                space.sender,
                reply,
                KIND_OF[local_disposition] if local else 0,
                moved,
                buffers,
                owned,
                space,
            )  # fmt: skip
        )
        self._done()

    def post(
        self,
        dest: int,
        id: int,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Iterable[PortRight] = (),
        local: int = PORT_NULL,
    ) -> None:
        """As send; a refusal is counted, not raised."""
        try:
            self.send(dest, id, inline, ool=ool, fds=fds, rights=rights, local=local)
        except MachError:
            self._hub.counters["post refused"] += 1

    def reply(
        self,
        message: Message,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Iterable[PortRight] = (),
        id: int | None = None,
    ) -> None:
        """Answer a message, now or later. Nothing to do when it has no reply right or the caller is gone (counted)."""
        remote, message.remote = message.remote, PORT_NULL
        if not remote:
            return
        entry = self.space.entries.get(remote)
        if entry is None or entry.bits & RightSet.DEAD_NAME:
            if entry is not None:
                self.deallocate(remote)
            self._hub.counters["reply dropped: caller is gone"] += 1
            return
        self.send(remote, message.id + 100 if id is None else id, inline, ool=ool, fds=fds, rights=rights)

    def receive(self, name: int, timeout: float | None = 0.0) -> Message:
        """The first message of a port. MACH_RCV_TIMED_OUT when there is none, whatever the timeout."""
        entry = self.space.entries.get(name)
        if entry is None or not entry.bits & RightSet.RECEIVE:
            raise MachError(MachMsgReturn.MACH_RCV_INVALID_NAME, f"name {name} is not a receive right")
        if not entry.port.queue:
            raise MachError(MachMsgReturn.MACH_RCV_TIMED_OUT, f"no message in {name}")
        message = self.take(entry.port)
        self._done()
        return message

    def msg(
        self, message: Message, options: int, timeout: float | None = None, rcv_name: int = PORT_NULL
    ) -> Message | None:
        """mach_msg: send, receive, or both; both never wait."""
        if options & MsgOption.SEND:
            self.send(
                message.remote, message.id, message.inline, ool=message.ool, fds=message.fds, rights=message.rights,
                local=message.local, remote_disposition=message.remote_disposition,
                local_disposition=message.local_disposition,
            )  # fmt: skip
        if options & MsgOption.RCV:
            return self.receive(rcv_name)
        return None

    def take(self, port: Port) -> Message:
        """Dequeue a message of a port of this task; its descriptors become the Message's."""
        kernel = self._kernel
        queued = port.queue.popleft()
        kernel.copyout_message(self.space, queued)
        rights = [
            PortRight(name, MsgType(kind)) for name, (kind, _) in zip(queued.out_names, queued.rights, strict=True)
        ]
        message = Message(
            queued.out_reply, queued.id, queued.inline, port.name, queued.ool, rights, queued.fds,
            MsgType.AUTO, MsgType.MAKE_SEND_ONCE, queued.sender, queued.seqno, bool(queued.fds),
        )  # fmt: skip
        kernel.consume(queued)
        queued.fds = []
        return message

    def abandon(self, message: Message) -> None:
        """Destroy an unused reply right, so that the caller need not wait for its time-out."""
        remote, message.remote = message.remote, PORT_NULL
        if remote in self.space.entries:
            self.deallocate(remote)
        message.close()

    def receive_right(self, name: int) -> Port:
        """The port behind a receive right of this task."""
        entry = self.space.entries.get(name)
        if entry is None or not entry.bits & RightSet.RECEIVE:
            raise MachError(KernReturn.KERN_INVALID_RIGHT, f"name {name} is not a receive right")
        return entry.port

    def _done(self, port: Port | None = None) -> None:
        if port is not None:
            self._hub.forget_port(port)
        self._hub.settle()
        self._hub.stir()

    def _call(self, method: str, *arguments: Any, leaving: int = PORT_NULL) -> Any:
        entry = self.space.entries.get(leaving)
        port = entry.port if entry is not None else None
        result = getattr(self._hub.calls, method)(self.space, *arguments)
        self._done(port)
        return result


def _duplicates(fds: Sequence[int]) -> list[int]:
    """The message's own copies of the caller's descriptors."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        for fd in copies:
            close_fd(fd)
        raise
    return copies
