"""One ZeroMQ connection of a remote task to its hub, used by one thread at a time; waiting notices its death."""

import threading
import time
from typing import Any

import zmq

from . import wire
from .codes import MachError, MigReturn, code_of
from .message import Buffer
from .wire import Op

_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
# After a hang-up a reply may still be on its way through libzmq's own thread.
_GRACE_MS = 50


class Context(zmq.Context[zmq.Socket[bytes]]):
    """A context that can be garbage. pyzmq's finalizer waits until the sockets are closed; when both are found in one
    cycle the sockets may be closed later than that, which is never."""

    def __del__(self) -> None:
        pass


Frames = tuple[bytes, list[Buffer]]


def milliseconds(deadline: float | None) -> int:
    """Time left until a time.monotonic() deadline, rounded up, as poll wants it (-1: no deadline)."""
    if deadline is None:
        return -1
    return max(0, int((deadline - time.monotonic()) * 1000 + 0.999))


class ServerGone(MachError):
    """The hub hung up."""

    def __init__(self, path: str) -> None:
        super().__init__(MigReturn.SERVER_DIED, f"the hub at {path} is gone")


class Channel:
    """A DEALER socket with the request numbers and the flow control of posts. Hold `lock` while using it."""

    def __init__(self, context: Context, path: str, token: bytes, kind: int, side_fd: int) -> None:
        self.path = path
        self._key = token[-wire.KEY_BYTES :]
        self.lock = threading.Lock()
        self.seq = 0
        self.posts_sent = 0
        self.posts_handled = 0
        self.posts_refused = 0
        self.closed = False
        self.sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.setsockopt(zmq.SNDHWM, 0)  # bounded by POST_WINDOW and one request
        self.sock.setsockopt(zmq.RCVHWM, 0)  # bounded by the ports' queue limits
        self.sock.connect(f"ipc://{path}")
        self.sock.send(wire.HELLO.pack(Op.HELLO, wire.VERSION, kind, token))
        # Events 0 on the side channel: only its hang-up, not descriptors that arrive on it.
        self.side_fd = side_fd
        self.items: list[tuple[Any, int]] = [(self.sock, _POLLIN), (side_fd, int(zmq.POLLERR))]

    def next_seq(self) -> int:
        self.seq = (self.seq + 1) & 0xFFFFFFFF
        return self.seq

    def send(self, header: bytes, ool: list[Buffer]) -> None:
        """Never blocks: the queue in this process is unbounded, and what goes in is bounded."""
        if ool:
            self.sock.send_multipart([self._key + header, *ool], copy=False)
        else:
            self.sock.send(self._key + header, _NOBLOCK)

    def readable(self) -> bool:
        """Is a frame there? (Also lets libzmq handle its commands.)"""
        return bool(int(self.sock.get(zmq.EVENTS)) & _POLLIN)

    def wait(self, timeout_ms: int) -> bool:
        """Wait for a frame; False: time is over, or only another descriptor of `items` is ready. Raises ServerGone."""
        sock = self.sock
        hung_up = False
        for what, _ in zmq.zmq_poll(self.items, timeout_ms):
            if what is sock:
                return True
            hung_up = hung_up or what == self.side_fd
        if not hung_up:
            return False
        if sock.poll(_GRACE_MS):
            return True
        raise ServerGone(self.path)

    def read(self) -> Frames:
        """The next frame (there is one) and the out-of-line buffers with it."""
        frame = self.sock.recv(_NOBLOCK, copy=False)
        data = frame.bytes
        ool: list[Buffer] = []
        while frame.more:
            frame = self.sock.recv(_NOBLOCK, copy=False)
            ool.append(frame.buffer.toreadonly())
        return data, ool

    def answer(self, seq: int, deadline: float | None) -> Frames | None:
        """The STATUS or REPLY to a request; None when the time is over. Answers nobody waits for go to `late`."""
        while self.wait(milliseconds(deadline)):
            data, ool = self.read()
            op = data[0]
            if op == Op.POSTED:
                self.posted(data)
            elif op == Op.REFUSED:
                number = wire.STATUS.unpack_from(data)[2]
                raise PermissionError(number, "the hub refused this process a connection", self.path)
            elif wire.SHORT.unpack_from(data)[1] == seq:
                return data, ool
            elif op == Op.REPLY:
                self.late(data)
        return None

    def posted(self, data: bytes) -> None:
        """Posts the hub has handled."""
        _, handled, self.posts_refused = wire.POSTED.unpack(data)
        self.posts_handled += (handled - self.posts_handled) & 0xFFFFFFFF

    def late(self, data: bytes) -> None:
        """A reply after its caller was interrupted: give back the rights that came with it."""
        fields = wire.MESSAGE.unpack_from(data)
        names = [fields[5]]
        end = wire.MESSAGE.size + wire.GIVEN.size * fields[11]
        names += [name for name, _ in wire.GIVEN.iter_unpack(data[wire.MESSAGE.size : end])]
        for name in names:
            if name not in (0, 0xFFFFFFFF):
                call = b'["destroy", %d, 0]' % name
                self.send(wire.SHORT.pack(Op.CALL, self.next_seq()) + call, [])

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.sock.close(linger=0)


def status_of(data: bytes) -> tuple[int, bytes]:
    """Code and result of a STATUS frame."""
    return wire.STATUS.unpack_from(data)[2], data[wire.STATUS.size :]


def raise_status(code: int, what: str = "") -> None:
    """Raise what the hub refused with."""
    if code:
        raise MachError(code_of(code), what)
