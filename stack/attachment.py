"""The library's attachment to a network server: its task, its packet ring, its pages, and how messages are exchanged.

``Attachment`` is the ground that ``leasing.Leasing``, ``sharing.Sharing`` and ``proxy.Proxy`` stand on. Call order:
``_attach()`` once, and again in a forked child; then ``_rpc`` + ``_answer`` for calls with a reply, ``_post`` for those
without. Threads: calls go out from whichever thread makes them; one receiver thread takes what the server says by
itself (``_upcall``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakMethod

from ulnet.ipc import MachError, MachMsgReturn, Message, MigReturn, MsgType, PortRight, Sender, Task
from ulnet.kernelshim import fastpaths
from ulnet.kernelshim.packet import PacketLink
from ulnet.stack import protocol as p
from ulnet.stack.engine import Engine
from ulnet.stack.host import Host
from ulnet.stack.metastate import Metastate
from ulnet.stack.statpage import StatPage

CALL_TIMEOUT_S: Final = 5.0  # a server that lives answers in milliseconds; a stopped one must not hang the program
RESOLVE_TIMEOUT_S: Final = 10.0  # the server gives up on ARP long before
SPIN_NS: Final = {"ipf": 50_000, "shm": 0, "ipc": 0}  # how long a waiting call polls before it sleeps
UPCALL_QUEUE: Final = 1024  # Mach's largest queue limit


class Attachment(Host):
    """See ``proxy.Proxy``, the class that programs use."""

    def __init__(self, path: str | None, interface: str, spin_ns: int | None) -> None:
        if interface not in p.PACKET_INTERFACES:
            raise ValueError(f"packet interface {interface!r}: use one of {', '.join(p.PACKET_INTERFACES)}")
        interface = self.interface = fastpaths.interface(interface)
        self.path = p.server_path(path)
        self.counters: Counter[str] = Counter()
        self._spin_ns = SPIN_NS[interface] if spin_ns is None else spin_ns
        self._gone = False
        self._closed = False
        self._start_anew()

    def _start_anew(self) -> None:
        """What belongs to this process alone; a forked child begins here, too."""
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a garbage collection inside may close a socket
        self._inside = threading.local()
        self._deferred: deque[tuple[p.Call, p.Record, list[bytes]]] = deque()

    def _attach(self, heir: int = 0) -> None:
        """Join the server and make the engine. ``heir``: what FORK told the parent."""
        self._task = join(self.path)
        try:
            self._attach_task(heir)
        except BaseException:
            self._task.close()
            raise

    def _attach_task(self, heir: int) -> None:
        try:
            self._server = self._task.look_up(p.SERVICE)
            self._port = self._task.allocate()
            self._task.set_attributes(self._port, qlimit=UPCALL_QUEUE)
        except MachError as error:
            raise self._lost(error) from None
        request = p.Attach(p.VERSION, p.PACKET_INTERFACES.index(self.interface), heir)
        message = self._rpc(p.Call.ATTACH, request, rights=[PortRight(self._port, MsgType.MAKE_SEND)])
        attached = self._answer(message, p.Attached)
        fds = message.take_fds()
        wanted = 3 if self.interface == "ipc" else 4
        if len(fds) != wanted:
            for fd in fds:
                os.close(fd)
            raise OSError(
                errno.EPROTO, f"the network server at {self.path} sent {len(fds)} descriptors instead of {wanted}"
            )
        *channel_fds, meta_fd, stat_fd = fds
        self._serial = attached.serial
        self.address = attached.address
        self.prefix = attached.prefix
        self.link = PacketLink(
            channel_fds,
            ifindex=attached.ifindex,
            loopback_ifindex=attached.loopback_ifindex,
            mac=attached.mac,
            mtu=attached.mtu,
            interface=self.interface,
            small=(attached.small_slots, attached.small_slot_bytes),
            large=(attached.large_slots, attached.large_slot_bytes),
        )
        try:
            meta, stats = Metastate.open(meta_fd), StatPage.open(stat_fd, writable=True)
        finally:
            os.close(meta_fd)  # mapped; the descriptors served their purpose
            os.close(stat_fd)
        self.engine = Engine(self.link, meta, library=True, stats=stats, spin_ns=self._spin_ns)
        self.engine.resolver = self._resolve
        self.engine.on_strays = self._forward_strays
        self.engine.set_serial(attached.serial)
        self.engine.collect_ends()
        self._prepare_engine(self.engine)
        self._task.on_server_death(_weakly(self._server_died))
        self._task.start_receiver(_weakly(self._upcall), names=[self._port])
        self.engine.start_helper()

    # -- what those above do -------------------------------------------------------------------

    @abstractmethod
    def _prepare_engine(self, engine: Engine) -> None:
        """A new engine, before its helper starts."""

    @abstractmethod
    def _upcall(self, message: Message, sender: Sender) -> None:
        """What the server says by itself. Runs in the receiver thread."""

    @abstractmethod
    def _server_died(self) -> None:
        """The server has gone."""

    def _resolve(self, next_hop: str) -> None:
        """Engine.resolver: the server asks by ARP and writes the answer into the metastate page."""
        self._answer(self._rpc(p.Call.RESOLVE, p.Resolve(next_hop), timeout=RESOLVE_TIMEOUT_S), p.Status)

    def _forward_strays(self, frames: list[bytes]) -> None:
        self.counters["strays_out"] += len(frames)
        for start in range(0, len(frames), p.FRAMES_A_MESSAGE):
            self._post_quietly(p.Call.STRAY, p.Nothing(), ool=frames[start : start + p.FRAMES_A_MESSAGE])

    # -- messages ------------------------------------------------------------------------------

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise OSError(
                errno.EBADF, "this stack belongs to the parent process; it was forked without Python's knowledge"
            )
        if self._closed:
            raise OSError(errno.EBADF, "the stack was shut down")
        if self._gone:
            raise self._lost(None)

    def _lost(self, error: MachError | None) -> OSError:
        """The OSError for a call that got no answer."""
        if error is not None and error.code == MachMsgReturn.MACH_RCV_TIMED_OUT:
            return TimeoutError(errno.ETIMEDOUT, f"the network server at {self.path} does not answer")
        if error is None or error.code == MigReturn.SERVER_DIED or not self._task.alive:
            return OSError(
                errno.ENETDOWN,
                f"the network server at {self.path} has gone; start it (ulnet netserver) and restart this program",
            )
        return OSError(errno.EPROTO, f"the network server at {self.path}: {error}")

    @contextlib.contextmanager
    def _ipc(self) -> Iterator[None]:
        """Around each call of the task. A garbage collection in it may close a socket, whose message then waits here:
        a thread's connection to the server is not made for a message inside another."""
        self._inside.ipc = True
        try:
            yield
        finally:
            self._inside.ipc = False
        while self._deferred:
            with contextlib.suppress(IndexError):  # another thread was quicker
                call, record, ool = self._deferred.popleft()
                self._post_quietly(call, record, ool=ool)

    def _rpc(
        self,
        call: p.Call,
        record: p.Record,
        *,
        rights: Sequence[PortRight] = (),
        fds: Sequence[int] = (),
        ool: Sequence[bytes] = (),
        timeout: float | None = CALL_TIMEOUT_S,
    ) -> Message:
        try:
            with self._ipc():
                return self._task.rpc(
                    self._server, call, record.pack(), rights=rights, fds=fds, ool=ool, timeout=timeout
                )
        except MachError as error:
            if error.code == MachMsgReturn.MACH_RCV_TIMED_OUT and call == p.Call.CONNECT:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            raise self._lost(error) from None

    def _answer(self, message: Message, record: type[p._T]) -> p._T:
        """The reply's record, or the OSError it stands for."""
        inline = bytes(message.inline)
        error = int.from_bytes(inline[:4], "little")
        if error == 0:
            return record.unpack(inline)
        refused = p.Connected if len(inline) == p.Connected.size() else p.Status
        reason = refused.unpack(inline).reason
        message.close()
        raise OSError(error, reason or os.strerror(error))  # OSError picks ConnectionRefusedError and its like

    def _post(
        self,
        call: p.Call,
        record: p.Record,
        *,
        ool: Iterable[bytes] = (),
        fds: Sequence[int] = (),
        reply_to: int = 0,
    ) -> None:
        try:
            with self._ipc():
                self._task.post(self._server, call, record.pack(), ool=list(ool), fds=fds, local=reply_to)
        except MachError as error:
            raise self._lost(error) from None

    def _post_quietly(self, call: p.Call, record: p.Record, *, ool: Iterable[bytes] = ()) -> None:
        """A one-way call that has no meaning any more once the server has gone."""
        if self._gone or self._closed:
            return
        if getattr(self._inside, "ipc", False):
            self._deferred.append((call, record, list(ool)))
            return
        try:
            self._post(call, record, ool=ool)
        except OSError:
            self.counters["posts_lost"] += 1


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method, without keeping its object: what a closed task still refers to must not hold an engine's memory."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call


def join(path: str) -> Task:
    """A task at the server's hub, or one clear line."""
    hint = f"start it with 'ulnet netserver', or name its socket in {p.PATH_VARIABLE}"
    try:
        return Task(path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"no network server at {path}: {hint}") from None
    except ConnectionRefusedError:
        reason = f"the network server at {path} is not running: {hint}"
        raise ConnectionRefusedError(errno.ECONNREFUSED, reason) from None
    except PermissionError:
        raise PermissionError(errno.EACCES, f"no permission to reach the network server at {path}") from None
    except MachError as error:
        raise OSError(errno.EPROTO, f"the network server at {path} does not answer as one: {error}") from None


def query(call: p.Call, path: str | None = None) -> Any:
    """The answer to SESSIONS or COUNTERS, without attaching. OSError as from Proxy."""
    path = p.server_path(path)
    with join(path) as task:
        try:
            message = task.rpc(task.look_up(p.SERVICE), call, p.Nothing().pack(), timeout=CALL_TIMEOUT_S)
        except MachError as error:
            if error.code == MachMsgReturn.MACH_RCV_TIMED_OUT:
                raise TimeoutError(errno.ETIMEDOUT, f"the network server at {path} does not answer") from None
            raise OSError(errno.ENETDOWN, f"the network server at {path} has gone") from None
        status = p.Status.unpack(bytes(message.inline))
        if status.error:
            raise OSError(status.error, status.reason or os.strerror(status.error))
        return json.loads(bytes(message.ool[0]))
