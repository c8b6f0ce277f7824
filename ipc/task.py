"""A task that reaches its hub over ZeroMQ: Mach's calls for a program's threads.

Each thread has a connection of its own for calls and RPC, so that an answer comes back to it without a lock or a hop;
a thread that ends leaves its connection to the next. Pushed messages come on one more connection (receiver.py).
"""

from __future__ import annotations

import atexit
import errno
import itertools
import json
import os
import socket
import struct
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import zmq
import zmq.utils.garbage  # noqa: F401  first, so that _close_all below runs before it ends at exit

from . import sidechannel, wire
from .channel import Channel, Context, Frames, ServerGone, raise_status, status_of
from .codes import (
    PORT_DEAD,
    PORT_NULL,
    MachError,
    MachMsgReturn,
    MigReturn,
    MsgOption,
    MsgType,
    Notify,
)
from .message import Buffer, Message, PortRight, Sender
from .names import Names
from .receiver import Receiver
from .wire import Op

# How long close() waits for the hub to take the last one-way messages.
LINGER = 2.0
# How long past its time-out a call waits to hear which half of it failed.
_CANCEL_WAIT = 1.0
_MAX_FDS = 253


class _Holder:
    """A thread's hold on its channel: when the thread ends, the channel is free for another."""

    __slots__ = ("_pool", "channel")

    def __init__(self, channel: Channel, pool: deque[Channel]) -> None:
        self.channel = channel
        self._pool = pool

    def __del__(self) -> None:
        self._pool.append(self.channel)


class Task(Names):
    """Joins the hub at `path`. Usable from any thread of this process, not from a child after fork."""

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 5.0) -> None:
        self.path = os.fspath(path)
        self._unusable = ""
        self._pid = os.getpid()
        self.counters: Counter[str] = Counter()
        self._side = sidechannel.connect(self.path, timeout)
        try:
            data, fds = sidechannel.receive_packet(self._side, wire.WELCOME.size + 1, 1)
            sidechannel.close_all(fds)
            if len(data) != wire.WELCOME.size:
                what = "the hub refused this process (too many tasks?)"
                raise ConnectionRefusedError(errno.ECONNREFUSED, what, self.path)
            magic, version, self.hub_pid, self.task_id, self._token = wire.WELCOME.unpack(data)
            if magic != wire.MAGIC or version != wire.VERSION:
                raise OSError(errno.EPROTO, f"no hub of version {wire.VERSION} serves this path", self.path)
            # libzmq would try for ever in the background.
            if not os.access(self.path, os.R_OK | os.W_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, "may not use the socket", self.path)
        except BlockingIOError:
            self._side.close()
            raise TimeoutError(errno.ETIMEDOUT, f"the hub did not answer within {timeout} s", self.path) from None
        except BaseException:
            self._side.close()
            raise
        self._side_lock = threading.Lock()
        self._side_fds: dict[int, list[int]] = {}
        self._tags = itertools.count(1)
        self._context = Context(io_threads=1)
        self._local = threading.local()
        self._pool: deque[Channel] = deque()
        self._channels: list[Channel] = []
        self._receiver: Receiver | None = None
        self._make_lock = threading.Lock()
        self._receiver_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._death_callbacks: list[Callable[[], object]] = []
        _tasks.add(self)

    # -- connections ------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._unusable:
            raise RuntimeError(self._unusable)

    def _channel(self) -> Channel:
        """The calling thread's own channel."""
        if self._unusable:
            raise RuntimeError(self._unusable)
        try:
            channel: Channel = self._local.holder.channel
            return channel
        except AttributeError:
            pass
        try:
            channel = self._pool.pop()
        except IndexError:
            channel = self._new_channel(wire.KIND_CALLS)
        self._local.holder = _Holder(channel, self._pool)
        return channel

    def _new_channel(self, kind: int) -> Channel:
        with self._make_lock:
            self._check_usable()
            channel = Channel(self._context, self.path, self._token, kind, self._side.fileno())
            self._channels.append(channel)
            return channel

    def _receive_side(self) -> Receiver:
        """The receiver; from its first use on the hub pushes messages."""
        self._check_usable()
        with self._receiver_lock:  # the hub refuses a second one
            if self._receiver is None:
                self._receiver = Receiver(self, self._new_channel(wire.KIND_RECEIVER), self._side.fileno())
            return self._receiver

    # -- sending ----------------------------------------------------------------------------------------------------

    def rpc(
        self,
        dest: int,
        id: int,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
        timeout: float | None = None,
        remote_disposition: int = MsgType.AUTO,
    ) -> Message:
        """Send a request and wait for its reply; the reply right is made on the way.

        MACH_SEND_TIMED_OUT: not sent, all rights are as before. MACH_RCV_TIMED_OUT: sent, no reply in time.
        SERVER_DIED: the reply right was destroyed unused, or the hub is gone.
        """
        result = self._request(Op.RPC, dest, id, inline, ool, fds, rights, 0, remote_disposition, 0, timeout)
        assert result is not None
        if result.id == Notify.SEND_ONCE:
            raise MachError(MigReturn.SERVER_DIED, f"no reply to message {id}: its receiver died or dropped it")
        return result

    def send(
        self,
        dest: int,
        id: int,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
        local: int = PORT_NULL,
        timeout: float | None = None,
        remote_disposition: int = MsgType.AUTO,
        local_disposition: int = MsgType.MAKE_SEND_ONCE,
    ) -> None:
        """Send a message and wait until it is in the port's queue. MACH_SEND_TIMED_OUT: it is not; nothing moved."""
        dispositions = remote_disposition, local_disposition
        self._request(Op.SEND, dest, id, inline, ool, fds, rights, local, *dispositions, timeout)

    def post(
        self,
        dest: int,
        id: int,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
        local: int = PORT_NULL,
    ) -> None:
        """Send a message without waiting for the hub's word; in order with what this thread sends otherwise.

        A refusal is counted (`posts_refused()`), not raised. Blocks while POST_WINDOW posts of this thread wait.
        """
        if any(right.disposition == MsgType.MOVE_RECEIVE for right in rights):
            self.send(dest, id, inline, ool=ool, fds=fds, rights=rights, local=local)
            return
        channel = self._channel()
        with channel.lock:
            self._check_usable()
            while channel.posts_sent - channel.posts_handled >= wire.POST_WINDOW:
                channel.wait(-1)
                channel.answer(0, time.monotonic())
            channel.posts_sent += 1
            self._transmit(
                channel, Op.POST, 0, dest, id, inline, ool, fds, [(n, int(d), 0) for n, d in rights], local,
                MsgType.AUTO, MsgType.MAKE_SEND_ONCE,
            )  # fmt: skip

    def posts_refused(self) -> int:
        """Posts refused by the hub, as far as it has told."""
        return sum(channel.posts_refused for channel in self._channels)

    def reply(
        self,
        message: Message,
        inline: bytes = b"",
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
        id: int | None = None,
    ) -> None:
        """Answer a received message. Does nothing when it carried no reply right or the caller is gone (counted)."""
        remote, message.remote = message.remote, PORT_NULL
        if not remote:
            return
        if remote == PORT_DEAD:
            self.counters["reply dropped: caller is gone"] += 1
            return
        try:
            reply_id = message.id + 100 if id is None else id
            self.send(remote, reply_id, inline, ool=ool, fds=fds, rights=rights)
        except MachError as error:
            if error.code != MachMsgReturn.MACH_SEND_INVALID_DEST:
                raise
            self.counters["reply dropped: caller is gone"] += 1
            with suppress(MachError):
                self.deallocate(remote)

    def msg(
        self, message: Message, options: int, timeout: float | None = None, rcv_name: int = PORT_NULL
    ) -> Message | None:
        """mach_msg: send, receive, or both (the receive is not tried if the send failed)."""
        if options & MsgOption.SEND:
            self.send(
                message.remote, message.id, message.inline, ool=message.ool, fds=message.fds, rights=message.rights,
                local=message.local, timeout=timeout, remote_disposition=message.remote_disposition,
                local_disposition=message.local_disposition,
            )  # fmt: skip
        if options & MsgOption.RCV:
            return self.receive(rcv_name, timeout)
        return None

    def _request(
        self,
        op: int,
        dest: int,
        id: int,
        inline: bytes,
        ool: Iterable[Buffer],
        fds: Sequence[int],
        rights: Sequence[PortRight],
        local: int,
        remote_disposition: int,
        local_disposition: int,
        timeout: float | None,
    ) -> Message | None:
        channel = self._channel()
        leaving: list[int] = []
        body = self._body(rights, leaving) if rights else []
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with channel.lock:
                self._check_usable()
                seq = channel.next_seq()
                self._transmit(
                    channel, op, seq, dest, id, inline, ool, fds, body, local, remote_disposition, local_disposition
                )
                frames = self._await(channel, seq, deadline)
            data, buffers = frames
            if data[0] == Op.REPLY:
                return self.parse_message(data, buffers)[2]
            code, _ = status_of(data)
            raise_status(code, f"message {id} to {dest}")
        except BaseException:
            for name in leaving:
                if self._receiver is not None:
                    self._receiver.unfreeze(name)
            raise
        return None

    def _body(self, rights: Sequence[PortRight], leaving: list[int]) -> list[tuple[int, int, int]]:
        """The body's rights with how far a leaving receive right's messages were taken."""
        body = []
        for name, disposition in rights:
            taken = 0
            if disposition == MsgType.MOVE_RECEIVE and self._receiver is not None:
                taken = self._receiver.freeze(name)
                leaving.append(name)
            body.append((name, int(disposition), taken))
        return body

    def _await(self, channel: Channel, seq: int, deadline: float | None) -> Frames:
        """The answer to a request; on time-out or interruption the request is taken back."""
        try:
            frames = channel.answer(seq, deadline)
            if frames is None:
                channel.send(wire.SHORT.pack(Op.CANCEL, seq), [])
                frames = channel.answer(seq, time.monotonic() + _CANCEL_WAIT)
        except ServerGone:
            raise
        except BaseException:  # interrupted by a signal's handler
            with suppress(zmq.ZMQError):
                channel.send(wire.SHORT.pack(Op.CANCEL, seq), [])
            raise
        if frames is None:
            raise MachError(MachMsgReturn.MACH_RCV_TIMED_OUT, "the hub does not answer")
        return frames

    def _transmit(
        self,
        channel: Channel,
        op: int,
        seq: int,
        dest: int,
        id: int,
        inline: bytes,
        ool: Iterable[Buffer],
        fds: Sequence[int],
        body: list[tuple[int, int, int]],
        local: int,
        remote_disposition: int,
        local_disposition: int,
    ) -> None:
        """Descriptors first, on the side channel; then the message that names them."""
        buffers: list[Buffer] = [b if isinstance(b, bytes) else memoryview(b).cast("B") for b in ool] if ool else []
        tag = 0
        try:
            if fds:
                if len(fds) > _MAX_FDS:
                    raise MachError(MachMsgReturn.MACH_SEND_TOO_LARGE, f"{len(fds)} descriptors in one message")
                tag = next(self._tags)
            header = wire.REQUEST.pack(
                op, remote_disposition, local_disposition, 0, seq, dest, local, id, tag,
                len(buffers), len(fds), len(body),
            )  # fmt: skip
        except struct.error as error:
            raise MachError(MachMsgReturn.MACH_SEND_INVALID_HEADER, str(error)) from None
        if body:
            header += b"".join(wire.RIGHT.pack(*right) for right in body)
        if fds:
            self._send_fds(tag, list(fds))
        channel.send(header + inline, buffers)

    def _send_fds(self, tag: int, fds: list[int]) -> None:
        try:
            sidechannel.send_packet(self._side, wire.TAG.pack(tag), fds)
        except BlockingIOError:
            raise MachError(MachMsgReturn.MACH_SEND_TIMED_OUT, "the hub does not read its side channel") from None
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise ServerGone(self.path) from None
            if error.errno == errno.ETOOMANYREFS:
                raise MachError(MachMsgReturn.MACH_SEND_NO_BUFFER, "too many descriptors in flight") from None
            raise

    def tell(self, frame: bytes) -> None:
        """A frame that has no answer, on this thread's channel."""
        channel = self._channel()
        with channel.lock:
            self._check_usable()
            channel.send(frame, [])

    # -- receiving --------------------------------------------------------------------------------------------------

    def parse_message(self, data: bytes, ool: list[Buffer]) -> tuple[int, int, Message]:
        """A REPLY or DELIVER frame: (name, serial, message)."""
        (
            _, _, _, _, _, remote, local, id, tag, _, nfds, nrights, task, pid, uid, gid, seqno, serial,
        ) = wire.MESSAGE.unpack_from(data)  # fmt: skip
        start = wire.MESSAGE.size
        rights: list[PortRight] = []
        if nrights:
            end = start + nrights * wire.GIVEN.size
            rights = [PortRight(name, MsgType(kind)) for name, kind in wire.GIVEN.iter_unpack(data[start:end])]
            start = end
        fds = self._take_fds(tag) if nfds else []
        message = Message(
            remote, id, data[start:], local, ool, rights, fds, MsgType.AUTO, MsgType.MAKE_SEND_ONCE,
            Sender(task, pid, uid, gid), seqno, bool(fds),
        )  # fmt: skip
        return local, serial, message

    def _take_fds(self, tag: int) -> list[int]:
        """The descriptors of a message. The hub sent them before it."""
        with self._side_lock:
            while tag not in self._side_fds:
                try:
                    flags = socket.MSG_DONTWAIT
                    data, fds = sidechannel.receive_packet(self._side, wire.TAG.size, _MAX_FDS, flags)
                except BlockingIOError:
                    break
                except OSError:
                    break
                if not data:
                    break
                self._side_fds[wire.TAG.unpack(data)[0]] = fds
            found = self._side_fds.pop(tag, None)
        if found is None:
            self.counters["descriptors missing"] += 1
            return []
        return found

    def receive(self, name: int, timeout: float | None = None) -> Message:
        """The next message of a receive right. MACH_RCV_TIMED_OUT, MACH_RCV_INVALID_NAME, MACH_RCV_PORT_DIED."""
        return self._receive_side().receive(name, timeout)

    def start_receiver(self, handler: Callable[[Message, Sender], object], names: Iterable[int] | None = None) -> None:
        """A daemon thread hands messages to handler(message, sender); with `names`, only those to these ports."""
        receiver = self._receive_side()
        if self._thread is not None:
            raise RuntimeError("the receiver thread of this task runs already")
        chosen = None if names is None else list(names)
        arguments = (receiver, handler, chosen)
        self._thread = threading.Thread(target=self._run, args=arguments, name="ulnet-ipc", daemon=True)
        self._thread.start()

    def _run(self, receiver: Receiver, handler: Callable[[Message, Sender], object], names: list[int] | None) -> None:
        try:
            receiver.run(lambda message: self._handle(handler, message), names)
        except ServerGone:
            self._server_died()
        except RuntimeError:
            if not self._unusable:  # closed meanwhile
                raise

    def _handle(self, handler: Callable[[Message, Sender], object], message: Message) -> None:
        assert message.sender is not None
        try:
            handler(message, message.sender)
        except Exception:
            self.counters["handler failed"] += 1
            _log_exception(f"handler of message {message.id}")

    def _server_died(self) -> None:
        callbacks, self._death_callbacks = self._death_callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                self.counters["handler failed"] += 1
                _log_exception("on_server_death callback")

    def fileno(self) -> int:
        """Readable when drain() has work."""
        return self._receive_side().fileno()

    def drain(self, handler: Callable[[Message, Sender], object]) -> int:
        """Hand over what has been pushed; never waits. Raises MachError(SERVER_DIED) after the hub's death."""
        try:
            return self._receive_side().drain(lambda message: self._handle(handler, message))
        except ServerGone:
            self._server_died()
            raise

    def on_server_death(self, callback: Callable[[], object]) -> None:
        """callback() once, from the receiver thread or drain, when the hub is gone."""
        self._death_callbacks.append(callback)

    @property
    def alive(self) -> bool:
        """Is the hub there, and this task usable?"""
        if self._unusable:
            return False
        return not zmq.zmq_poll([(self._side.fileno(), zmq.POLLERR)], 0)

    # -- names ------------------------------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any, leaving: int = PORT_NULL) -> Any:
        """A call on the name space, made by the hub. `leaving`: a name whose receive right may go by it."""
        channel = self._channel()
        receiver = self._receiver if leaving else None
        taken = receiver.freeze(leaving) if receiver is not None else 0
        payload = json.dumps([method, *arguments, taken]).encode()
        try:
            with channel.lock:
                self._check_usable()
                seq = channel.next_seq()
                channel.send(wire.SHORT.pack(Op.CALL, seq) + payload, [])
                data, _ = self._await(channel, seq, None)
            code, result = status_of(data)
            value = json.loads(result) if result else None
            raise_status(code, str(value or method))
        except BaseException:
            if receiver is not None:
                receiver.unfreeze(leaving)
            raise
        return value

    # -- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the hub: all rights are destroyed. Posts are waited for, at most LINGER seconds."""
        if self._unusable:
            return
        deadline = time.monotonic() + LINGER
        for channel in list(self._channels):
            if channel.posts_sent == channel.posts_handled or not channel.lock.acquire(timeout=LINGER):
                continue
            try:
                seq = channel.next_seq()
                channel.send(wire.SHORT.pack(Op.BYE, seq), [])
                if channel.answer(seq, deadline) is None:
                    self.counters["posts not confirmed at close"] += 1
            except (MachError, OSError, zmq.ZMQError):
                self.counters["posts not confirmed at close"] += 1
            finally:
                channel.lock.release()
        with self._make_lock:
            self._unusable = f"this task ({self.path}) is closed"
        # Wakes every thread that waits.
        with suppress(OSError):
            self._side.shutdown(socket.SHUT_RDWR)
        free = self._stop_receiver()
        for channel in self._channels:
            if channel.lock.acquire(timeout=1.0):
                channel.close()
                channel.lock.release()
            else:
                free = False
        for fds in self._side_fds.values():
            sidechannel.close_all(fds)
        if free:
            self._context.term()
            self._side.close()
        _tasks.discard(self)

    def _stop_receiver(self) -> bool:
        receiver = self._receiver
        if receiver is None:
            return True
        receiver.stop()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(LINGER)
        if not receiver.wait_idle(LINGER):
            return False
        receiver.close()
        return True

    def forked(self) -> None:
        """In the child of a fork: the connections are the parent's."""
        self._unusable = f"this task ({self.path}) belongs to process {self._pid}; a forked child makes its own"
        # Only the parent's copy may keep the side channel open, so that its death shows as a hang-up.
        os.close(self._side.detach())

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _log_exception(what: str) -> None:
    import logging

    logging.getLogger("ulnet.ipc").exception("%s failed", what)


_tasks: weakref.WeakSet[Task] = weakref.WeakSet()


def _close_all() -> None:
    for task in list(_tasks):
        task.close()


def _forked() -> None:
    for task in list(_tasks):
        task.forked()
    _tasks.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)
