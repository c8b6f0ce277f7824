"""The hub: sockets, admission of tasks, and the single-threaded loop that moves messages between them.

`poll` -> `_read_router` -> `Conn.receive` -> kernel -> `settle` (deliver what is queued, resume who waits) -> handlers
of the local task. A task is admitted on the side channel by the kernel's credentials; each of its ZeroMQ connections
must begin with the token it got there, and libzmq must report the same process ("Peer-Address"). Later
frames carry the token's second half, because a routing id is no proof: see wire.py.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import secrets
import select
import socket
import stat
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq
import zmq.utils.garbage  # noqa: F401  first, so that _close_all below runs before it ends at exit

from . import sidechannel, wire
from .calls import Calls, Policy, default_policy
from .channel import Context
from .local import LocalTask
from .message import Buffer, Message, Sender
from .objects import Limits, Port, Space
from .ports import Kernel
from .remote import Conn, RemoteTask
from .wire import Op

log = logging.getLogger("ulnet.ipc")

Handler = Callable[[Message, Sender], object]

# Frames handled between two looks at the side channels and the caller's own descriptors.
_BATCH = 64
# Plain ints: or-ing pyzmq's flag enums costs microseconds.
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
_LISTEN_BACKLOG = 1024


class Hub:
    """Serves ports at a path. Not thread-safe: all calls come from the thread that polls."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o600,
        limits: Limits | None = None,
        bootstrap_policy: Policy = default_policy,
    ) -> None:
        self.path = os.fspath(path)
        self.thread = threading.get_ident()
        self.limits = limits or Limits()
        self.counters: Counter[str] = Counter()
        self.sender = Sender(0, os.getpid(), os.geteuid(), os.getegid())
        self.kernel = Kernel(self.limits, self.sender, self.counters)
        self.kernel.on_recall = self._on_recall
        self.calls = Calls(self.kernel, bootstrap_policy)
        self._tasks: dict[int, RemoteTask] = {}
        self._tokens: dict[bytes, RemoteTask] = {}
        self._conns: dict[bytes, Conn] = {}
        self._next_task = 1
        self._dead: deque[RemoteTask] = deque()
        self._callbacks: list[Callable[[Sender], object]] = []
        self._handlers: dict[Port, Handler] = {}
        self._ready: deque[Port] = deque()
        self._settling = False
        self._polling = False
        self._closed = False
        self._listener_off = False
        self._seen_empty = False  # no message was in the router at the last look, and nothing was sent since
        self._watched: dict[int, Callable[[int], None]] = {}
        local_space = Space(self.sender, 1 << 20)
        self._local = LocalTask(self, local_space)
        self._open(mode)
        _hubs.add(self)

    # -- start and end ----------------------------------------------------------------------------------------------

    def _open(self, mode: int) -> None:
        path = self.path
        sidechannel.check_path(path)
        folder = os.path.dirname(path) or "."
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Two hubs that start at once must not both take a dead one's files.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in (path, path + sidechannel.SUFFIX):
                self._remove_stale(name)
            self._bind(mode)
        finally:
            os.close(lock)
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch(self._wake, lambda events: None)
        self._router_fd = int(self._router.get(zmq.FD))
        self._watch(self._router_fd, lambda events: None)
        self._watch(self._listener.fileno(), self._on_connect)

    def _remove_stale(self, name: str) -> None:
        try:
            kind = os.lstat(name).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(kind):
            raise FileExistsError(errno.EEXIST, "exists and is not a socket", name)
        if name.endswith(sidechannel.SUFFIX):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                try:
                    probe.connect(name)
                except OSError as error:
                    number = error.errno or errno.EIO
                    if number != errno.ECONNREFUSED:  # refused: nobody listens, the file is a dead hub's
                        raise OSError(number, os.strerror(number), name) from None
                else:
                    pid = sidechannel.peer_credentials(probe)[0]
                    raise OSError(errno.EADDRINUSE, f"already served at {self.path} by pid {pid}")
            os.unlink(name)
        # libzmq removes the other one itself when it binds, but only if we may; the check is made there.

    def _bind(self, mode: int) -> None:
        side_path = self.path + sidechannel.SUFFIX
        self._context = Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        # No moment in which the sockets are open to more users than they will be.
        umask = os.umask(0o777 & ~mode)
        try:
            self._listener.bind(side_path)
            self._router.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.MAXMSGSIZE, self.limits.message_bytes + wire.REQUEST.size + wire.KEY_BYTES)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.BACKLOG, _LISTEN_BACKLOG)
            self._router.setsockopt(zmq.RCVHWM, 256)
            self._router.setsockopt(zmq.SNDHWM, 4096)
            self._router.bind(f"ipc://{self.path}")
        except (OSError, zmq.ZMQError) as error:
            self._listener.close()
            self._router.close()
            self._context.term()
            number = error.errno or errno.EIO
            if not isinstance(error, zmq.ZMQError) and number == errno.EADDRINUSE:
                number = errno.EEXIST
            else:
                with suppress(OSError):
                    os.unlink(side_path)
            raise OSError(number, os.strerror(number), self.path) from None
        finally:
            os.umask(umask)
        os.chmod(self.path, mode)
        os.chmod(side_path, mode)
        self._listener.listen(_LISTEN_BACKLOG)

    def close(self) -> None:
        """Every client's outstanding RPC ends with SERVER_DIED; the socket files are removed."""
        if self._closed:
            return
        self._closed = True
        for path in (self.path, self.path + sidechannel.SUFFIX):
            with suppress(OSError):
                os.unlink(path)
        self._listener.close()
        for task in list(self._tasks.values()):
            self._tasks.pop(task.sender.task)
            task.bury()
        self.kernel.destroy_space(self._local.space)
        self.kernel.destroy_space(self.calls.bootstrap_space)
        self.kernel.collect()
        # Frames already given to libzmq (last replies) have a moment to leave.
        self._router.close(linger=200)
        self._context.term()
        self._epoll.close()
        os.close(self._wake)

    def forked(self) -> None:
        """In the child of a fork: the hub is the parent's; its death must show as a hang-up at once."""
        self._closed = True
        os.close(self._listener.detach())
        for task in self._tasks.values():
            os.close(task.sock.detach())
        self._epoll.close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the public door --------------------------------------------------------------------------------------------

    def local_task(self) -> LocalTask:
        """The hub's own task."""
        return self._local

    def serve(self, name: int, handler: Handler) -> None:
        """Messages to a receive right of the local task go to `handler(message, sender)`, in `poll`."""
        port = self._local.receive_right(name)
        self._handlers[port] = handler
        if port.queue:
            self._ready.append(port)
            self.stir()

    def unserve(self, name: int) -> None:
        """Messages to this port wait for receive() again."""
        self._handlers.pop(self._local.receive_right(name), None)

    def on_task_death(self, callback: Callable[[Sender], object]) -> None:
        """callback(sender), once for each task, after its rights are destroyed."""
        self._callbacks.append(callback)

    def tasks(self) -> list[Sender]:
        """The remote tasks alive."""
        return [task.sender for task in self._tasks.values()]

    def disconnect(self, task_id: int) -> None:
        """End a task as if it had died."""
        task = self._tasks.get(task_id)
        if task is not None:
            self._dead.append(task)
            self.stir()

    def fileno(self) -> int:
        """Readable while poll() has something to do (level-triggered)."""
        return self._epoll.fileno()

    def poll(self, timeout: float | None = 0.0) -> int:
        """Handle what is there; wait for something first, at most `timeout` seconds (None: for ever)."""
        if self._polling or self._closed:
            what = "called from a handler" if self._polling else "closed, or of the parent process"
            raise RuntimeError(f"Hub.poll: {what}")
        self._polling = True
        try:
            handled = look = 0
            for fd, events in self._epoll.poll(timeout):
                if fd == self._router_fd:
                    look = 1
                elif fd == self._wake:
                    os.eventfd_read(self._wake)
                    look = 1
                elif (callback := self._watched.get(fd)) is not None:
                    callback(events)
                    handled += 1
            if handled and self._listener_off:
                self._listener_off = False
                self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
            if look or self._dead:  # what the dead sent before they died
                handled += self._read_router()
            while self._dead:
                self._bury(self._dead.popleft())
                handled += 1
            self.settle()
            if self._ready:
                handled += self._run_ready()
            return handled
        finally:
            self._polling = False
            if not self._closed:
                self.stir()

    # -- for the local task and remote tasks ------------------------------------------------------------------------

    def stir(self) -> None:
        """Make fileno() readable if there is work that no descriptor shows.

        ZeroMQ's descriptor is edge-triggered: a send may have swallowed the sign of messages that wait
        (zmq_getsockopt(3), ZMQ_FD). Called at the end of poll and after every operation from outside it. Looking costs
        about 3 us, so it is done only when something was sent since the last look.
        """
        if self._polling or self._closed:
            return
        if self._ready or self._dead or not (self._seen_empty or self._router_empty()):
            os.eventfd_write(self._wake, 1)

    def _router_empty(self) -> bool:
        self._seen_empty = not int(self._router.get(zmq.EVENTS)) & _POLLIN
        return self._seen_empty

    def settle(self) -> None:
        """Move messages until nothing can move. Handlers of the local task run later, from poll."""
        if self._settling:
            return  # the outer call goes on
        kernel = self.kernel
        self._settling = True
        try:
            while kernel.pending or kernel.garbage or kernel.roomy:
                self._drain_pending()
                if kernel.garbage:
                    kernel.collect()
                if kernel.roomy:
                    self._resume(kernel.roomy.popleft())
        finally:
            self._settling = False

    def _deliver(self, port: Port) -> None:
        if not port.queue:
            return
        if port.slot is not None:
            message = port.queue.popleft()
            conn, seq = port.slot
            conn.reply(seq, message)
            port.alive = False
            return
        space = port.receiver
        if space is None:
            return
        if space is self._local.space:
            if port in self._handlers:
                self._ready.append(port)
        elif space.host is not None:
            space.host.deliver(port)

    def _resume(self, port: Port) -> None:
        while port.waiters and not (port.alive and port.full()):
            waiter = port.waiters.popleft()
            waiter.resume()
            self._drain_pending()

    def _drain_pending(self) -> None:
        while self.kernel.pending:
            self._deliver(self.kernel.pending.popleft())

    def _run_ready(self) -> int:
        """Give queued messages to the local task's handlers."""
        handled = 0
        while self._ready:
            port = self._ready.popleft()
            while port.queue and (handler := self._handlers.get(port)) is not None:
                message = self._local.take(port)
                sender = message.sender
                assert sender is not None
                handled += 1
                try:
                    handler(message, sender)
                except Exception:
                    # A handler's bug must not take the server down; its caller learns by the dropped reply right.
                    self.counters["handler failed"] += 1
                    log.exception("handler of message %d from pid %d failed", message.id, sender.pid)
                    self._local.abandon(message)
                self.settle()
        return handled

    def send_frames(self, rid: bytes, frames: list[Buffer]) -> None:
        """Frames to a peer. Never blocks: who does not read loses, nobody else."""
        self._seen_empty = False
        try:
            if len(frames) == 1:
                self._router.send(rid, _MORE)
                self._router.send(frames[0], _NOBLOCK)
            else:
                self._router.send_multipart([rid, *frames], _NOBLOCK, copy=False)
        except zmq.Again:
            self.counters["frame dropped: peer does not read"] += 1
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.counters["frame dropped: peer is gone"] += 1

    def watch_writable(self, task: RemoteTask, on: bool) -> None:
        """Tell task.flush when its side channel takes packets again."""
        self._epoll.modify(task.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if on else 0))

    def forget_port(self, port: Port) -> None:
        """A port of the local task may have died: its handler goes with it."""
        if not port.alive:
            self._handlers.pop(port, None)

    def forget_conn(self, rid: bytes) -> None:
        self._conns.pop(rid, None)

    def _on_recall(self, space: Space, name: int) -> None:
        if space.host is not None and space.alive:
            space.host.revoke(name)

    # -- the router -------------------------------------------------------------------------------------------------

    def _read_router(self) -> int:
        router = self._router
        handled = self._run_ready() if self._ready else 0
        for _ in range(_BATCH):
            try:
                rid = router.recv(_NOBLOCK)
            except zmq.Again:
                self._seen_empty = True
                break
            conn = self._conns.get(rid)
            if conn is None:
                self._admit(rid, router.recv_multipart(_NOBLOCK, copy=False))
            else:
                frame = router.recv(_NOBLOCK, copy=False)
                self._receive(conn, frame.bytes, self._read_buffers() if frame.more else [])
            handled += 1
            self.settle()
            if self._ready:
                handled += self._run_ready()
            if self._router_empty():
                break
        return handled

    def _receive(self, conn: Conn, data: bytes, ool: list[Buffer]) -> None:
        try:
            conn.receive(data, ool)
        except Exception:
            # A hole in our checks must cost the peer that found it, not everybody.
            self.counters["task ended: internal error"] += 1
            log.exception("a request of pid %d failed", conn.task.sender.pid)
            self._dead.append(conn.task)

    def _read_buffers(self) -> list[Buffer]:
        """The out-of-line buffers of a message, uncopied; beyond the limit they are read and dropped."""
        router, limit = self._router, self.limits.buffers_per_message + 1
        buffers: list[Buffer] = []
        more = True
        while more:
            frame = router.recv(copy=False)
            if len(buffers) < limit:
                buffers.append(frame.buffer.toreadonly())
            more = frame.more
        return buffers

    def _admit(self, rid: bytes, frames: list[Any]) -> None:
        """The first frame of a connection: only a task's token opens it."""
        hello = bytes(frames[0]) if len(frames) == 1 and len(frames[0]) == wire.HELLO.size else b""
        if not hello or hello[0] != Op.HELLO or hello[1] != wire.VERSION:
            self.counters["frame dropped: unknown peer"] += 1
            return
        _, _, kind, token = wire.HELLO.unpack(hello)
        task = self._tokens.get(token)
        if task is None:
            self.counters["connection refused: wrong token"] += 1
            return
        if not _same_peer(frames[0], task.sender):
            self.counters["connection refused: other credentials"] += 1
            self.send_frames(rid, [wire.STATUS.pack(Op.REFUSED, 0, errno.EPERM)])
            return
        if len(task.conns) >= self.limits.connections_per_task:
            self.counters["connection refused: too many"] += 1
            self.send_frames(rid, [wire.STATUS.pack(Op.REFUSED, 0, errno.EUSERS)])
            return
        if kind == wire.KIND_RECEIVER and task.receiver is not None:
            self.counters["connection refused: second receiver"] += 1
            return
        self._conns[rid] = task.add_conn(rid, kind)

    # -- the side channel -------------------------------------------------------------------------------------------

    def _watch(self, fd: int, callback: Callable[[int], None]) -> None:
        self._watched[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def _on_connect(self, events: int) -> None:
        for _ in range(_BATCH):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self.counters[f"connection refused: {errno.errorcode.get(error.errno or 0, 'error')}"] += 1
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    # Still readable: do not spin on it until something else has happened.
                    self._epoll.modify(self._listener.fileno(), 0)
                    self._listener_off = True
                return
            self._new_task(sock)

    def _new_task(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if len(self._tasks) >= self.limits.tasks:
            self.counters["task refused: too many"] += 1
            sock.close()
            return
        try:
            pid, uid, gid = sidechannel.peer_credentials(sock)
            if uid not in (0, self.sender.uid) and self._tasks_of(uid) >= self.limits.tasks_per_user:
                self.counters["task refused: too many of one user"] += 1
                sock.close()
                return
            pidfd = sidechannel.peer_pidfd(sock, pid)
        except OSError:
            self.counters["task refused: no credentials"] += 1
            sock.close()
            return
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        task = RemoteTask(self, sock, Sender(self._next_task, pid, uid, gid), token, pidfd)
        self._next_task += 1
        try:
            sock.send(wire.WELCOME.pack(wire.MAGIC, wire.VERSION, os.getpid(), task.sender.task, token))
        except OSError:
            self.counters["task refused: hung up"] += 1
            sock.close()
            if pidfd >= 0:
                os.close(pidfd)
            return
        self._tasks[task.sender.task] = task
        self._tokens[token] = task
        self._watch(sock.fileno(), lambda events: self._on_side(task, events))
        if pidfd >= 0:
            self._watch(pidfd, lambda events: self._dead.append(task))

    def _tasks_of(self, uid: int) -> int:
        return sum(task.sender.uid == uid for task in self._tasks.values())

    def _on_side(self, task: RemoteTask, events: int) -> None:
        if events & select.EPOLLOUT:
            task.flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not task.read_side():
            self._dead.append(task)

    def _bury(self, task: RemoteTask) -> None:
        if self._tasks.pop(task.sender.task, None) is None:
            return
        del self._tokens[task.token]
        for fd in (task.sock.fileno(), task.pidfd):
            if self._watched.pop(fd, None) is not None:
                self._epoll.unregister(fd)
        task.bury()
        self.settle()
        for callback in self._callbacks:
            try:
                callback(task.sender)
            except Exception:
                self.counters["handler failed"] += 1
                log.exception("on_task_death callback failed for pid %d", task.sender.pid)
        self.settle()


def _same_peer(frame: Any, sender: Sender) -> bool:
    """Does libzmq see the same process and user at the other end? ("host:uid:gid:pid" for ipc)"""
    try:
        fields = frame.get("Peer-Address").split(":")
        return (int(fields[-1]), int(fields[-3])) == (sender.pid, sender.uid)
    except (zmq.ZMQError, ValueError, IndexError, AttributeError):
        return True  # a libzmq built without peer credentials: the token alone decides


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


def _forked() -> None:
    for hub in list(_hubs):
        if not hub._closed:
            hub.forked()


def _close_all() -> None:
    for hub in list(_hubs):
        if hub.thread == threading.get_ident():
            hub.close()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)
