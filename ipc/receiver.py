"""The receive side of a remote task: messages pushed by the hub, sorted by port, for whichever thread wants them.

At any time one thread (the leader) waits at the socket and files what comes; the others wait on the condition. A
message counts against its port's queue limit until a program's thread takes it, which is told to the hub (TAKEN).
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq

from . import wire
from .channel import Channel, ServerGone, milliseconds
from .codes import MachError, MachMsgReturn, RightSet
from .message import Message
from .wire import Op

if TYPE_CHECKING:
    from .task import Task


class Receiver:
    """Made when a task first wants to receive; from then on the hub pushes."""

    def __init__(self, task: Task, channel: Channel, side_fd: int) -> None:
        self._task = task
        self._channel = channel
        self._side_fd = side_fd
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        channel.items.append((self._wake, int(zmq.POLLIN)))
        self._cond = threading.Condition()
        self._leading = False
        self._inbox: dict[int, deque[tuple[int, Message]]] = {}
        self._last_taken: dict[int, int] = {}
        self._frozen: set[int] = set()  # ports on their way out of this task
        self._known: set[int] = set()  # names that are receive rights as far as we were told
        self.stopped = False
        self._epoll: select.epoll | None = None

    # -- one thread at the socket -----------------------------------------------------------------------------------

    def _lead(self, timeout_ms: int) -> None:
        """Wait for frames and file them all. The caller has set _leading and holds no lock."""
        channel = self._channel
        frames = []
        if channel.wait(timeout_ms) and not self.stopped:
            # The wake-up descriptor may be what is ready.
            while channel.readable():
                frames.append(channel.read())
        if not frames:
            return
        with self._cond:
            for data, ool in frames:
                op = data[0]
                if op == Op.DELIVER:
                    name, serial, message = self._task.parse_message(data, ool)
                    self._known.add(name)
                    self._inbox.setdefault(name, deque()).append((serial, message))
                elif op == Op.REVOKE:
                    self._revoke(wire.SHORT.unpack(data)[1])
                elif op == Op.REFUSED:
                    raise PermissionError(wire.STATUS.unpack_from(data)[2], "the hub refused this process a connection")

    def _revoke(self, name: int) -> None:
        """The receive right is gone from this task; what was not taken went with it."""
        for _, message in self._inbox.pop(name, ()):
            message.close()
        self._frozen.discard(name)
        self._known.discard(name)
        self._last_taken.pop(name, None)

    def _pop(self, names: Iterable[int] | None) -> tuple[int, int, Message] | None:
        """Take a message to one of these ports (None: any), under the lock. Oldest port first, so that none starves."""
        for name in list(self._inbox) if names is None else names:
            box = self._inbox.get(name)
            if box and name not in self._frozen:
                serial, message = box.popleft()
                self._last_taken[name] = serial
                del self._inbox[name]
                if box:
                    self._inbox[name] = box  # to the end of the turn
                return name, serial, message
        return None

    def _waiting(self, names: Iterable[int] | None) -> bool:
        """Is there a message to one of these ports, under the lock?"""
        return any(self._inbox.get(n) and n not in self._frozen for n in (self._inbox if names is None else names))

    # -- receiving --------------------------------------------------------------------------------------------------

    def receive(self, name: int, timeout: float | None) -> Message:
        """The next message of one port."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if name not in self._known:
            if not self._task.type(name) & RightSet.RECEIVE:
                raise MachError(MachMsgReturn.MACH_RCV_INVALID_NAME, f"name {name} is not a receive right")
            with self._cond:
                self._known.add(name)
        while True:
            with self._cond:
                while True:
                    taken = self._pop((name,))
                    if taken is not None:
                        break
                    if self.stopped:
                        raise MachError(MachMsgReturn.MACH_RCV_PORT_DIED, "the task is closed")
                    if name not in self._known:
                        raise MachError(MachMsgReturn.MACH_RCV_PORT_DIED, f"receive right {name} is gone")
                    if not self._leading:
                        self._leading = True
                        break
                    left = milliseconds(deadline)
                    if not left or not self._cond.wait(None if left < 0 else left / 1000):
                        raise MachError(MachMsgReturn.MACH_RCV_TIMED_OUT, f"no message in {name}")
            if taken is not None:
                self._tell_taken(taken[0], taken[1])
                return taken[2]
            left = milliseconds(deadline)
            try:
                self._lead(left)
            except ServerGone:
                if not self.stopped:
                    raise
            finally:
                self._follow()
            if left == 0 and name not in self._inbox:
                raise MachError(MachMsgReturn.MACH_RCV_TIMED_OUT, f"no message in {name}")

    def _follow(self) -> None:
        with self._cond:
            self._leading = False
            self._cond.notify_all()

    def _tell_taken(self, name: int, serial: int) -> None:
        self._task.tell(wire.TAKEN.pack(Op.TAKEN, name, serial))

    def drain(self, handler: Callable[[Message], object], names: Iterable[int] | None = None) -> int:
        """Hand over all that is here to handler(message); never waits. Raises ServerGone after the hub's death."""
        if self._epoll is not None:
            self._settle_wake()
        with self._cond:
            lead, self._leading = not self._leading, True
        if lead:
            try:
                self._lead(0)
            finally:
                self._follow()
        return self._hand_over(handler, names)

    def _hand_over(self, handler: Callable[[Message], object], names: Iterable[int] | None) -> int:
        count = 0
        while not self.stopped:
            with self._cond:
                taken = self._pop(names)
            if taken is None:
                break
            self._tell_taken(taken[0], taken[1])
            handler(taken[2])
            count += 1
        return count

    def run(self, handler: Callable[[Message], object], names: Iterable[int] | None) -> None:
        """Receive and hand over until the task is closed or the hub gone (ServerGone)."""
        while not self.stopped:
            self._hand_over(handler, names)
            with self._cond:
                if self._waiting(names):
                    continue
                if self._leading:
                    self._cond.wait()
                    continue
                self._leading = True
            try:
                self._lead(-1)
            finally:
                self._follow()

    def fileno(self) -> int:
        """Readable when drain has work."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._epoll.register(int(self._channel.sock.get(zmq.FD)), select.EPOLLIN)
            self._epoll.register(self._side_fd, 0)
            self._epoll.register(self._wake, select.EPOLLIN)
            # ZeroMQ's descriptor shows only what comes from now on: look once at what is there.
            os.eventfd_write(self._wake, 1)
        return self._epoll.fileno()

    def _settle_wake(self) -> None:
        """Take back the wake-up that fileno() began with."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    # -- receive rights that leave ----------------------------------------------------------------------------------

    def freeze(self, name: int) -> int:
        """Nobody takes messages of this port any more; returns the serial of the last one taken."""
        with self._cond:
            self._frozen.add(name)
            return self._last_taken.get(name, 0)

    def unfreeze(self, name: int) -> None:
        """The right stayed."""
        with self._cond:
            self._frozen.discard(name)
            self._cond.notify_all()

    # -- end --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Wake whoever waits; they end with MACH_RCV_PORT_DIED."""
        self.stopped = True
        os.eventfd_write(self._wake, 1)
        with self._cond:
            self._cond.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """After stop: wait until no thread leads."""
        with self._cond:
            return self._cond.wait_for(lambda: not self._leading, timeout)

    def close(self) -> None:
        """After stop and after the leader has left."""
        with self._cond:
            for box in self._inbox.values():
                for _, message in box:
                    message.close()
            self._inbox.clear()
        if self._epoll is not None:
            self._epoll.close()
        os.close(self._wake)
