"""The hub's side of a remote task: its connections, its requests, the messages pushed to it, its descriptors.

Order of a request: `Conn.receive` (parked behind an earlier one that waits for room?) -> `_act` -> kernel. Everything
a peer sends is checked here; what makes no sense is counted and dropped.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import sidechannel, wire
from .codes import KernReturn, MachError, MachMsgReturn, MsgType
from .message import Buffer, Sender
from .objects import MESSAGE_OVERHEAD, KMsg, Port, Space
from .ports import T_RECEIVE, T_SEND, T_SEND_ONCE
from .wire import Op

if TYPE_CHECKING:
    from .hub import Hub

_RPCS_PER_CONNECTION = 16
# Packets read from a side channel in one turn, and more than its buffer holds.
_SIDE_BATCH, _SIDE_PACKETS_MAX = 64, 1024
_HEADER_ROOM = wire.REQUEST.size
# Plain ints on the way of every message: looking an enum's member up costs more than comparing it.
_SEND, _POST, _RPC, _CANCEL, _TAKEN = (int(op) for op in (Op.SEND, Op.POST, Op.RPC, Op.CANCEL, Op.TAKEN))
_SENDS = (_SEND, _POST, _RPC)
_COPY_SEND, _MAKE_SEND, _MAKE_SEND_ONCE = int(MsgType.COPY_SEND), int(MsgType.MAKE_SEND), int(MsgType.MAKE_SEND_ONCE)
# Calls a task may make on its own space: method of Calls -> types of the arguments.
_CALLS: dict[str, tuple[type, ...]] = {
    "allocate": (int,),
    "destroy": (int,),
    "deallocate": (int,),
    "mod_refs": (int, int, int),
    "get_refs": (int, int),
    "names": (),
    "type": (int,),
    "rename": (int, int),
    "insert_right": (int, int, int),
    "extract_right": (int, int),
    "get_attributes": (int,),
    "set_attributes": (int, int),
    "request_notification": (int, int, int, int, int),
    "check_in": (str,),
    "look_up": (str,),
    "register": (str, int),
}

Request = tuple[bytes, list[Buffer]]


class Conn:
    """One ZeroMQ connection of a task. Its requests are handled strictly in order."""

    __slots__ = ("alive", "backlog", "blocked", "posts", "posts_refused", "posts_told", "rid", "rpcs", "task")

    def __init__(self, task: RemoteTask, rid: bytes) -> None:
        self.task = task
        self.rid = rid
        self.alive = True
        self.blocked: Port | None = None  # its first request in the backlog waits for room in this port
        self.backlog: deque[Request] = deque()
        self.rpcs: dict[int, Port] = {}
        self.posts = 0
        self.posts_refused = 0
        self.posts_told = 0

    def receive(self, data: bytes, ool: list[Buffer]) -> None:
        """A frame from the peer."""
        hub = self.task.hub
        if not data.startswith(self.task.key):
            hub.counters["frame dropped: not the connection's key"] += 1
            return
        data = data[wire.KEY_BYTES :]
        op = data[0] if data else 0
        if op == _CANCEL and len(data) == wire.SHORT.size:
            self._cancel(wire.SHORT.unpack(data)[1])
        elif op == _TAKEN and len(data) == wire.TAKEN.size:
            self.task.taken(*wire.TAKEN.unpack(data)[1:])
        elif self.blocked is None:
            self._act(data, ool)
        elif len(self.backlog) < hub.limits.backlog_per_connection and self.task.park(data, ool):
            self.backlog.append((data, ool))
        else:
            hub.counters["request dropped: too many outstanding"] += 1

    def resume(self) -> None:
        """There may be room where the first request waits."""
        self.blocked = None
        while self.backlog and self.blocked is None and self.alive:
            data, ool = self.backlog.popleft()
            self.task.unpark(data, ool)
            self._act(data, ool)

    def _act(self, data: bytes, ool: list[Buffer]) -> None:
        hub = self.task.hub
        op = data[0] if data else 0
        if op in _SENDS and len(data) >= _HEADER_ROOM:
            self._send(op, data, ool)
        elif op == Op.CALL and len(data) > wire.SHORT.size:
            self._call(wire.SHORT.unpack_from(data)[1], data[wire.SHORT.size :])
        elif op == Op.BYE and len(data) == wire.SHORT.size:
            self.status(wire.SHORT.unpack(data)[1], 0)
            self.task.close_conn(self)
        else:
            hub.counters["frame dropped: malformed"] += 1

    def status(self, seq: int, code: int, result: bytes = b"") -> None:
        """Answer a request that has no message as its answer."""
        self.task.transmit(self.rid, [wire.STATUS.pack(Op.STATUS, seq, code) + result])

    # -- sends ------------------------------------------------------------------------------------------------------

    def _send(self, op: int, data: bytes, ool: list[Buffer]) -> None:
        task = self.task
        _, rdisp, ldisp, _, seq, remote, local, id, tag, nool, nfds, nrights = wire.REQUEST.unpack_from(data)
        kernel = task.hub.kernel
        slot: Port | None = None
        fds: list[int] = []
        chosen = rdisp != 0
        try:
            port, rdisp = kernel.peek(task.space, remote, rdisp)
            if rdisp in (T_SEND, _COPY_SEND, _MAKE_SEND) and port.full():
                if not task.park(data, ool):
                    raise MachError(MachMsgReturn.MACH_SEND_NO_BUFFER)
                self.backlog.appendleft((data, ool))
                self.blocked = port
                port.waiters.append(self)
                return
            rights, inline = self._check_body(data, ool, nool, nfds, nrights)
            wanted = [(remote, rdisp)]
            if op == _RPC:
                if len(self.rpcs) >= _RPCS_PER_CONNECTION or seq in self.rpcs:
                    raise MachError(MachMsgReturn.MACH_SEND_NO_BUFFER)
                wanted.append((0, T_SEND_ONCE))
            else:
                if local and ldisp not in _REPLY_DISPOSITIONS:
                    raise MachError(MachMsgReturn.MACH_SEND_INVALID_REPLY)
                wanted.append((local, ldisp))
            for name, disposition, taken in rights:
                wanted.append((name, disposition))
                if disposition == T_RECEIVE:
                    self._check_moving(name, taken, port)
            if chosen or local or rights:
                kernel.check_rights(task.space, wanted)
            if nfds:
                fds = task.take_fds(tag, nfds)
            # Nothing below can fail: rights move all or none.
            kernel.copyin(task.space, remote, rdisp)
            if op == _RPC:
                slot = Port(slot=(self, seq))
                slot.sorights = 1
                self.rpcs[seq] = slot
                reply: Port | None = slot
                reply_type = T_SEND_ONCE
            else:
                reply = kernel.copyin(task.space, local, ldisp)
                reply_type = _REPLY_DISPOSITIONS.get(ldisp, 0)
            moved: list[tuple[int, Port | None]] = [
                (_KIND[disposition], kernel.copyin(task.space, name, disposition)) for name, disposition, _ in rights
            ]
            dest_type = T_SEND_ONCE if rdisp in (T_SEND_ONCE, _MAKE_SEND_ONCE) else T_SEND
            kernel.enqueue(
                KMsg(port, dest_type, id, inline, task.sender, reply, reply_type, moved, ool, fds, task.space)
            )
            if op == _SEND:
                self.status(seq, 0)
        except MachError as error:
            if nfds and not fds:
                task.discard_fds(tag)
            if op != _POST:
                self.status(seq, int(error.code))
            else:
                task.hub.counters["post refused"] += 1
                self.posts_refused += 1
        if op == _POST:
            self.posts += 1
            if self.posts - self.posts_told >= wire.POST_WINDOW // 2:
                self.posts_told = self.posts
                counts = self.posts & 0xFFFFFFFF, self.posts_refused & 0xFFFFFFFF
                task.transmit(self.rid, [wire.POSTED.pack(Op.POSTED, *counts)])

    def _check_body(
        self, data: bytes, ool: list[Buffer], nool: int, nfds: int, nrights: int
    ) -> tuple[list[tuple[int, int, int]], bytes]:
        """The body's rights and the inline bytes, when all sizes agree and are within the limits."""
        limits, space = self.task.hub.limits, self.task.space
        if nrights > limits.rights_per_message or nool > limits.buffers_per_message or nfds > limits.fds_per_message:
            raise MachError(MachMsgReturn.MACH_SEND_TOO_LARGE)
        start = _HEADER_ROOM + nrights * wire.RIGHT.size
        if nool != len(ool) or len(data) < start:
            raise MachError(MachMsgReturn.MACH_SEND_MSG_TOO_SMALL)
        size = len(data) - start
        if size > limits.inline_bytes:
            raise MachError(MachMsgReturn.MACH_SEND_TOO_LARGE)
        for buffer in ool:
            size += len(buffer)
        if size > limits.message_bytes:
            raise MachError(MachMsgReturn.MACH_SEND_TOO_LARGE)
        held = space.held_bytes + size + MESSAGE_OVERHEAD
        if held > limits.held_bytes_per_task or space.held_fds + nfds > limits.held_fds_per_task:
            raise MachError(MachMsgReturn.MACH_SEND_NO_BUFFER)
        if not nrights:
            return [], data[start:]
        rights = [(n, d, t) for n, d, t in wire.RIGHT.iter_unpack(data[_HEADER_ROOM:start])]
        if any(d not in _KIND for _, d, _ in rights):
            raise MachError(MachMsgReturn.MACH_SEND_INVALID_TYPE)
        return rights, data[start:]

    def _check_moving(self, name: int, taken: int, dest: Port) -> None:
        """A receive right is about to move: what its holder has taken so far, and does it end in a loop?"""
        entry = self.task.space.entries.get(name)
        if entry is not None and entry.port.receiver is self.task.space:
            entry.port.taken = max(entry.port.taken, taken)
            if self.task.hub.kernel.circular(dest, entry.port):
                raise MachError(MachMsgReturn.MACH_SEND_INVALID_RIGHT)

    def _cancel(self, seq: int) -> None:
        """The caller does not wait any longer. If an answer is on its way already there is nothing to say."""
        for index, (data, ool) in enumerate(self.backlog):
            if len(data) < _HEADER_ROOM or data[0] == Op.POST or wire.SHORT.unpack_from(data)[1] != seq:
                continue
            del self.backlog[index]
            self.task.unpark(data, ool)
            header = wire.REQUEST.unpack_from(data)
            if header[10]:
                self.task.discard_fds(header[8])
            self.status(seq, MachMsgReturn.MACH_SEND_TIMED_OUT)
            if index == 0:
                self._unwait()
                self.resume()
            return
        slot = self.rpcs.pop(seq, None)
        if slot is not None:
            self.task.hub.kernel.destroy_port(slot)
            self.status(seq, MachMsgReturn.MACH_RCV_TIMED_OUT)

    def _unwait(self) -> None:
        port, self.blocked = self.blocked, None
        if port is not None:
            with suppress(ValueError):
                port.waiters.remove(self)
            # The wake-up this one may have been given must not get lost.
            if port.waiters:
                self.task.hub.kernel.roomy.append(port)

    def close(self) -> None:
        """The connection is over: what it waits for is destroyed."""
        self.alive = False
        self._unwait()
        for data, ool in self.backlog:
            self.task.unpark(data, ool)
        self.backlog.clear()
        for slot in list(self.rpcs.values()):
            self.task.hub.kernel.destroy_port(slot)
        self.rpcs.clear()

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, seq: int, payload: bytes) -> None:
        task = self.task
        try:
            method, *arguments = json.loads(payload)
            types = _CALLS[method]
            if len(arguments) != len(types) + 1 or any(type(a) is not t for a, t in zip(arguments, types)):  # noqa: B905
                raise ValueError(method)
            taken = arguments.pop()
            if type(taken) is not int:
                raise ValueError(method)
        except (ValueError, KeyError, TypeError, RecursionError):
            task.hub.counters["frame dropped: malformed"] += 1
            self.status(seq, KernReturn.KERN_INVALID_ARGUMENT)
            return
        if taken and arguments:
            entry = task.space.entries.get(arguments[0])
            if entry is not None and entry.port.receiver is task.space:
                entry.port.taken = max(entry.port.taken, taken)
        call: Callable[..., Any] = getattr(task.hub.calls, method)
        try:
            result = call(task.space, *arguments)
        except MachError as error:
            self.status(seq, int(error.code), json.dumps(error.what).encode())
            return
        self.status(seq, 0, json.dumps(result).encode())

    # -- messages to the peer ---------------------------------------------------------------------------------------

    def reply(self, seq: int, message: KMsg) -> None:
        """The message an RPC of this connection waits for."""
        task = self.task
        self.rpcs.pop(seq, None)
        kernel = task.hub.kernel
        if not self.alive:
            kernel.garbage.append(message)
            return
        kernel.copyout_message(task.space, message)
        task.transmit_message(self.rid, Op.REPLY, seq, 0, message)
        kernel.taken(message)


class RemoteTask:
    """A process (or part of one) at the other end of a side channel."""

    def __init__(self, hub: Hub, sock: socket.socket, sender: Sender, token: bytes, pidfd: int) -> None:
        self.hub = hub
        self.sock = sock
        self.sender = sender
        self.token = token
        self.key = token[-wire.KEY_BYTES :]
        self.pidfd = pidfd
        self.space = Space(sender, hub.limits.names_per_task, self)
        self.conns: dict[bytes, Conn] = {}
        self.receiver: Conn | None = None
        self.side_fds: dict[int, list[int]] = {}
        self.side_count = 0
        self.parked_bytes = 0
        self.next_tag = 1
        # Frames that wait until the side channel takes their descriptors: (routing id, frames, tag, descriptors).
        self.blocked_out: deque[tuple[bytes, list[Buffer], int, list[int]]] = deque()

    # -- bounds -----------------------------------------------------------------------------------------------------

    def park(self, data: bytes, ool: list[Buffer]) -> bool:
        """Account for a request kept for later; False if the task makes us keep too much."""
        size = len(data) + sum(len(b) for b in ool)
        if self.space.held_bytes + self.parked_bytes + size > self.hub.limits.held_bytes_per_task:
            return False
        self.parked_bytes += size
        return True

    def unpark(self, data: bytes, ool: list[Buffer]) -> None:
        self.parked_bytes -= len(data) + sum(len(b) for b in ool)

    # -- descriptors ------------------------------------------------------------------------------------------------

    def read_side(self, packets: int = _SIDE_BATCH) -> bool:
        """Take packets from the side channel; False when the peer has hung up."""
        limits = self.hub.limits
        for _ in range(packets):
            try:
                data, fds = sidechannel.receive_packet(self.sock, wire.TAG.size + 1, limits.fds_per_message)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                sidechannel.close_all(fds)
                return False
            tag = wire.TAG.unpack(data)[0] if len(data) == wire.TAG.size else 0
            if not tag or not fds or tag in self.side_fds or self.side_count + len(fds) > limits.held_fds_per_task:
                self.hub.counters["descriptors dropped"] += len(fds)
                sidechannel.close_all(fds)
                continue
            self.side_fds[tag] = fds
            self.side_count += len(fds)
        return True

    def take_fds(self, tag: int, count: int) -> list[int]:
        """The descriptors of a message. They were sent before it, so that they are here or never."""
        if tag not in self.side_fds:
            self.read_side(_SIDE_PACKETS_MAX)
        fds = self.side_fds.get(tag)
        if fds is None or len(fds) != count:
            raise MachError(MachMsgReturn.MACH_SEND_INVALID_DATA)
        del self.side_fds[tag]
        self.side_count -= count
        return fds

    def discard_fds(self, tag: int) -> None:
        """The message of these descriptors was refused."""
        if tag not in self.side_fds:
            self.read_side(_SIDE_PACKETS_MAX)
        fds = self.side_fds.pop(tag, [])
        self.side_count -= len(fds)
        sidechannel.close_all(fds)

    # -- to the peer ------------------------------------------------------------------------------------------------

    def transmit(self, rid: bytes, frames: list[Buffer], tag: int = 0, fds: list[int] | None = None) -> None:
        """Send frames, descriptors first; never blocks, keeps the order."""
        if self.blocked_out:
            self.blocked_out.append((rid, frames, tag, self._dup(fds or [])))
            return
        if fds and not self._send_side(tag, fds):
            self.blocked_out.append((rid, frames, tag, self._dup(fds)))
            self.hub.watch_writable(self, True)
            return
        self.hub.send_frames(rid, frames)

    def _dup(self, fds: list[int]) -> list[int]:
        """Copies for a frame that waits; none when the process has no descriptors left."""
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            self.hub.counters["descriptors not sent"] += len(fds)
            sidechannel.close_all(copies)
        return copies

    def _send_side(self, tag: int, fds: list[int]) -> bool:
        try:
            sidechannel.send_packet(self.sock, wire.TAG.pack(tag), fds)
        except BlockingIOError:
            return False
        except OSError:  # hung up, or too many descriptors in flight: the peer finds them missing
            self.hub.counters["descriptors not sent"] += len(fds)
        return True

    def flush(self) -> None:
        """The side channel takes packets again."""
        while self.blocked_out:
            rid, frames, tag, fds = self.blocked_out[0]
            if fds and not self._send_side(tag, fds):
                return
            sidechannel.close_all(fds)
            self.blocked_out.popleft()
            self.hub.send_frames(rid, frames)
        self.hub.watch_writable(self, False)

    def transmit_message(self, rid: bytes, op: int, seq: int, local: int, message: KMsg) -> None:
        """A copied-out message in its frames."""
        tag = 0
        if message.fds:
            tag = self.next_tag
            self.next_tag += 1
        header = wire.MESSAGE.pack(
            op, message.reply_type, 0, 0, seq, message.out_reply, local, message.id, tag, len(message.ool),
            len(message.fds), len(message.rights), *message.sender, message.seqno & 0xFFFFFFFF, message.serial,
        )  # fmt: skip
        if message.rights:
            pairs = zip(message.out_names, message.rights, strict=True)
            header += b"".join(wire.GIVEN.pack(name, kind) for name, (kind, _) in pairs)
        self.transmit(rid, [header + message.inline, *message.ool], tag, message.fds)

    def deliver(self, port: Port) -> None:
        """Push what is queued in a port of this task."""
        receiver = self.receiver
        if receiver is None:
            return
        while port.queue:
            message = port.queue.popleft()
            self.hub.kernel.copyout_message(self.space, message)
            port.unacked.append(message)
            self.transmit_message(receiver.rid, Op.DELIVER, 0, port.name, message)

    def taken(self, name: int, serial: int) -> None:
        """The program has taken the messages of a port up to this serial."""
        entry = self.space.entries.get(name)
        if entry is None or entry.port.receiver is not self.space:
            return
        unacked = entry.port.unacked
        while unacked and unacked[0].serial <= serial:
            self.hub.kernel.taken(unacked.popleft())

    def revoke(self, name: int) -> None:
        """The receive right has left the space."""
        if self.receiver is not None:
            self.transmit(self.receiver.rid, [wire.SHORT.pack(Op.REVOKE, name)])

    # -- connections ------------------------------------------------------------------------------------------------

    def add_conn(self, rid: bytes, kind: int) -> Conn:
        conn = self.conns[rid] = Conn(self, rid)
        if kind == wire.KIND_RECEIVER:
            self.receiver = conn
            for entry in self.space.entries.values():
                if entry.port.receiver is self.space and entry.port.queue:
                    self.hub.kernel.pending.append(entry.port)
        return conn

    def close_conn(self, conn: Conn) -> None:
        """One connection is over, the task lives on."""
        conn.close()
        self.conns.pop(conn.rid, None)
        self.hub.forget_conn(conn.rid)
        if self.receiver is conn:
            self.receiver = None

    def bury(self) -> None:
        """The task is dead: everything it held goes."""
        for conn in list(self.conns.values()):
            conn.close()
            self.hub.forget_conn(conn.rid)
        self.conns.clear()
        self.receiver = None
        self.hub.kernel.destroy_space(self.space)
        for fds in self.side_fds.values():
            sidechannel.close_all(fds)
        self.side_fds.clear()
        for _, _, _, fds in self.blocked_out:
            sidechannel.close_all(fds)
        self.blocked_out.clear()
        self.sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


_KIND = {
    int(MsgType.MOVE_RECEIVE): T_RECEIVE,
    int(MsgType.MOVE_SEND): T_SEND,
    int(MsgType.MOVE_SEND_ONCE): T_SEND_ONCE,
    int(MsgType.COPY_SEND): T_SEND,
    int(MsgType.MAKE_SEND): T_SEND,
    int(MsgType.MAKE_SEND_ONCE): T_SEND_ONCE,
}
_REPLY_DISPOSITIONS = {disposition: kind for disposition, kind in _KIND.items() if kind != T_RECEIVE}
