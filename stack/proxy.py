"""The library's side of the network server: sessions are set up by its calls and handed over (SOSP 1993 table 1).

Call order: ``connect_default()`` (or ``Proxy(path)``), then the calls of ``host.Host``. Sending and receiving ask
nobody. Threads: calls go out from whichever thread makes them; one receiver thread takes what the server says by
itself (delivered sessions, strays, the outcome of connects nobody waits for); the engine's helper does its timers.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakMethod, WeakValueDictionary

from ulnet.ipc import MachError, MachMsgReturn, Message, MigReturn, MsgType, PortRight, Sender, Task
from ulnet.kernelshim.packet import PacketLink
from ulnet.stack import protocol as p
from ulnet.stack.engine import Engine
from ulnet.stack.host import Host
from ulnet.stack.metastate import Metastate
from ulnet.stack.session import Session
from ulnet.stack.statpage import StatPage

log = logging.getLogger("ulnet.proxy")

TCP: Final = 6
UDP: Final = 17

CALL_TIMEOUT_S: Final = 5.0  # a server that lives answers in milliseconds; a stopped one must not hang the program
RESOLVE_TIMEOUT_S: Final = 10.0  # the server gives up on ARP long before
DETACH_TIMEOUT_S: Final = 2.0
FORGET_TIMEOUT_S: Final = 1.0
SPIN_NS: Final = {"ipf": 50_000, "shm": 0, "ipc": 0}  # how long a waiting call polls before it sleeps
UPCALL_QUEUE: Final = 1024  # Mach's largest queue limit
ANY: Final = "0.0.0.0"


class Proxy(Host):
    """One application's attachment to a network server.

    ``path``: the server's socket; None: ``ULNET_SERVER`` or the default. Raises OSError with one clear line when no
    server is there, when it may not be reached, or when it refuses. ``interface``: how packets come in, "ipf" (ring
    polled in user space), "shm" (ring with wake-ups) or "ipc" (one call a packet); SOSP 1993 section 4.1.
    ``spin_ns``: how long a waiting call polls before it sleeps; None: as the interface has it (SPIN_NS).
    """

    def __init__(self, path: str | None = None, *, interface: str = "ipf", spin_ns: int | None = None) -> None:
        if interface not in p.PACKET_INTERFACES:
            raise ValueError(f"packet interface {interface!r}: use one of {', '.join(p.PACKET_INTERFACES)}")
        self.interface = interface
        self.path = p.server_path(path)
        self.counters: Counter[str] = Counter()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a garbage collection inside may close a socket
        self._inside = threading.local()
        self._deferred: deque[tuple[p.Call, p.Record, list[bytes]]] = deque()
        self._named: set[int] = set()  # bound to a port of the program's choice
        self._gone = False
        self._closed = False
        self._next = 1
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()  # all with a number
        self._connecting: dict[int, Session] = {}
        self._listeners: dict[int, Session] = {}
        self._credits: Counter[int] = Counter()
        self._backlogs: dict[int, int] = {}
        self._task = _join(self.path)
        try:
            self._attach(SPIN_NS[interface] if spin_ns is None else spin_ns)
        except BaseException:
            self._task.close()
            raise
        atexit.register(self._at_exit)

    def _attach(self, spin_ns: int) -> None:
        try:
            self._server = self._task.look_up(p.SERVICE)
            self._port = self._task.allocate()
            self._task.set_attributes(self._port, qlimit=UPCALL_QUEUE)
        except MachError as error:
            raise self._lost(error) from None
        request = p.Attach(p.VERSION, p.PACKET_INTERFACES.index(self.interface))
        message = self._rpc(p.Call.ATTACH, request, rights=[PortRight(self._port, MsgType.MAKE_SEND)])
        attached = self._answer(message, p.Attached)
        fds = message.take_fds()
        if len(fds) != 3:
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EPROTO, f"the network server at {self.path} sent {len(fds)} descriptors instead of 3")
        channel_fd, meta_fd, stat_fd = fds
        self._serial = attached.serial
        self.address = attached.address
        self.ifindex = attached.ifindex
        self.prefix = attached.prefix
        self.link = PacketLink(
            channel_fd,
            ifindex=attached.ifindex,
            loopback_ifindex=attached.loopback_ifindex,
            mac=attached.mac,
            mtu=attached.mtu,
            interface=self.interface,
            slots=attached.slots,
            slot_bytes=attached.slot_bytes,
        )
        try:
            meta, stats = Metastate.open(meta_fd), StatPage.open(stat_fd, writable=True)
        finally:
            os.close(meta_fd)  # mapped; the descriptors served their purpose
            os.close(stat_fd)
        self.engine = Engine(self.link, meta, library=True, stats=stats, spin_ns=spin_ns)
        self.engine.resolver = self._resolve
        self.engine.on_strays = self._forward_strays
        self._task.on_server_death(_weakly(self._server_died))
        self._task.start_receiver(_weakly(self._upcall), names=[self._port])
        self.engine.start_helper()

    # -- Host ----------------------------------------------------------------------------------

    def bind(
        self, session: Session, address: str, port: int, *, reuse_address: bool = False, reuse_port: bool = False
    ) -> tuple[str, int]:
        """See Host. A UDP session is the application's own from here on."""
        self._check()
        if session.session_id:
            raise OSError(errno.EINVAL, "the socket is bound already, to {}:{}".format(*session.local))
        number = self._name(session)
        request = p.Bind(number, session.kind, address or ANY, port, reuse_address, reuse_port)
        try:
            bound = self._answer(self._rpc(p.Call.BIND, request), p.Bound)
            if session.kind == UDP:
                self.engine.open_udp(session, bound.address, bound.port)
            else:
                session.set_local(bound.address, bound.port)
        except BaseException as error:
            self._unname(session)
            if not isinstance(error, OSError) or error.errno in (errno.ETIMEDOUT, errno.ENOMEM):
                self._forget(number)  # the server may have done it, or will
            raise
        if port:
            self._named.add(number)
        return bound.address, bound.port

    def connect(self, session: Session, address: str, port: int, timeout_ns: int) -> None:
        """See Host. The blocking form is one message pair, taken by the calling thread itself."""
        self._check()
        with self._lock:
            if session.session_id in self._connecting:
                raise OSError(errno.EALREADY, os.strerror(errno.EALREADY))
        if session.kind == UDP:
            self._connect_udp(session, address, port)
            return
        if session.live:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        self.engine.reopen(session)  # after an attempt that failed
        named = session.session_id != 0
        number = session.session_id or self._name(session)
        request = p.Connect(number, session.kind, address, port)
        if timeout_ns == 0:
            with self._lock:
                self._connecting[number] = session
            session.begin_connect()
            try:
                self._post(p.Call.CONNECT, request, reply_to=self._port)
            except OSError:
                with self._lock:
                    self._connecting.pop(number, None)
                raise
            raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        try:
            message = self._rpc(p.Call.CONNECT, request, timeout=None if timeout_ns < 0 else timeout_ns / 1e9)
            self._answer(message, p.Connected)
        except BaseException as error:
            refused = isinstance(error, OSError) and not isinstance(error, TimeoutError)
            if not refused:  # timed out or interrupted: nobody else will end what the server goes on with
                self._forget(number, reset=True)
            if not (refused and named):
                self._unname(session)
            raise
        try:
            if session.closed:  # by another thread, while this one waited
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.engine.import_session(session, message.ool[0], number)
        except BaseException:
            self._forget(number, reset=True)
            self._unname(session)
            raise

    def _connect_udp(self, session: Session, address: str, port: int) -> None:
        number = session.session_id or self._name(session)
        try:
            connected = self._answer(self._rpc(p.Call.CONNECT, p.Connect(number, UDP, address, port)), p.Connected)
            self.engine.open_udp(session, connected.address, connected.port, address, port)
        except BaseException as error:
            if not session.live:
                if not isinstance(error, OSError) or error.errno in (errno.ETIMEDOUT, errno.ENOMEM):
                    self._forget(number)
                self._unname(session)
            raise

    def listen(self, session: Session, backlog: int) -> None:
        """See Host. Called again it changes the backlog."""
        self._check()
        backlog = min(max(backlog, 1), p.MAX_BACKLOG)
        if not session.session_id:
            self.bind(session, ANY, 0)
        number = session.session_id
        again = number in self._listeners
        if again:
            self.engine.set_backlog(session, backlog)
        else:
            # The first session may be delivered before the reply is read.
            self.engine.open_listener_shell(session, *session.local, backlog)
        with self._lock:
            self._listeners[number] = session
            self._backlogs[number] = backlog
        try:
            self._answer(self._rpc(p.Call.LISTEN, p.Listen(number, backlog)), p.Status)
        except BaseException:
            if not again:
                with self._lock:
                    self._listeners.pop(number, None)
                    self._backlogs.pop(number, None)
                self._abort_queue(session)
                self.engine.close_session(session)
                self._forget(number)
                self._unname(session)
            raise

    def accepted(self, listener: Session, session: Session) -> None:
        """See Host. Credits go back in batches of half a backlog, so that the server can always send the other half."""
        number = listener.session_id
        with self._lock:
            self._sessions[session.session_id] = session
            if number not in self._listeners:
                return
            self._credits[number] += 1
            count = self._credits[number]
            if count * 2 < self._backlogs[number]:
                return
            del self._credits[number]
        self._post_quietly(p.Call.ACCEPTED, p.Accepted(number, count))

    def close(self, session: Session, *, abort: bool = False) -> None:
        """See Host. A TCP session goes back to the server with its unsent data; the FIN exchange runs there."""
        number = session.session_id
        with self._lock:
            self._connecting.pop(number, None)
            listening = self._listeners.pop(number, None) is not None
            self._backlogs.pop(number, None)
            self._credits.pop(number, None)
            self._sessions.pop(number, None)
            named = number in self._named
            self._named.discard(number)
        if os.getpid() != self._pid or self._closed:
            return
        if listening:
            self._abort_queue(session)
        live = session.live
        if self._gone or not live or session.kind == UDP or listening or abort or session.state == "CLOSED":
            # Without a server the end of a session runs here, as long as this process does.
            self.engine.close_session(session, linger_abort=abort)
            if number:
                # Not live: perhaps it is on its way here. Then nobody but the server can tell the peer.
                self._forget(number, reset=not live, wait=named)
            return
        self._return(session, number)

    def shutdown(self) -> None:
        """Give every session back, wait until the server has them, leave it. Safe to call twice."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
        atexit.unregister(self._at_exit)
        with self._lock:
            held = list(self._sessions.values())
        for session in held:
            with contextlib.suppress(OSError):
                self.close(session)
        self._closed = True
        if not self._gone:
            with contextlib.suppress(OSError):  # it died: it resets what it could not take
                self._rpc(p.Call.DETACH, p.Nothing(), timeout=DETACH_TIMEOUT_S)
        self.engine.close()
        self._task.close()
        if not self.engine.counters()["buf_lent"]:  # else the ring goes with the last buffer lent
            self.link.close()
        self.engine.resolver = self.engine.on_strays = None  # no circle keeps descriptors open
        with _hosts_lock:
            for key in [key for key, host in _hosts.items() if host is self]:
                del _hosts[key]

    # -- what the socket layer and tools may ask -----------------------------------------------

    @property
    def server_alive(self) -> bool:
        """False once the server has gone; sessions held here go on without it."""
        return not self._gone

    # -- sessions going back -------------------------------------------------------------------

    def _return(self, session: Session, number: int) -> None:
        try:
            state = self.engine.export_session(session)
        except OSError as error:
            self.counters["export_failed"] += 1
            log.warning("session %d could not be handed back, its peer is reset: %s", number, error)
            if session.live:
                self.engine.close_session(session, linger_abort=True)
            self._forget(number)
            return
        try:
            self._post(p.Call.RETURN, p.Return(number), ool=[state])
        except OSError:
            # The server went in this very moment: what it did not take ends here.
            self.counters["return_failed"] += 1
            shell = self.engine.new_session(TCP)
            self.engine.forget_flow(TCP, *session.local, *(session.peer or (ANY, 0)))
            self.engine.import_session(shell, state, number)
            self.engine.close_session(shell)

    def _abort_queue(self, listener: Session) -> None:
        """Sessions that nobody accepted before the listener was closed are reset, as in BSD."""
        while (session := self.engine.accept(listener)) is not None:
            number = session.session_id
            self.engine.close_session(session, linger_abort=True)
            self._forget(number)

    def _forget(self, number: int, *, reset: bool = False, wait: bool = False) -> None:
        """``wait``: until its name is free, so that who binds it next, in whatever process, is not refused."""
        if wait and not self._gone and not getattr(self._inside, "ipc", False):
            with contextlib.suppress(OSError):
                self._rpc(p.Call.FORGET, p.Forget(number, reset), timeout=FORGET_TIMEOUT_S)
        else:
            self._post_quietly(p.Call.FORGET, p.Forget(number, reset))

    def _forward_strays(self, frames: list[bytes]) -> None:
        self.counters["strays_out"] += len(frames)
        for start in range(0, len(frames), p.FRAMES_A_MESSAGE):
            self._post_quietly(p.Call.STRAY, p.Nothing(), ool=frames[start : start + p.FRAMES_A_MESSAGE])

    # -- what the server says by itself --------------------------------------------------------

    def _upcall(self, message: Message, sender: Sender) -> None:
        """Runs in the receiver thread. Nothing here may end it."""
        try:
            if message.id == p.Upcall.DELIVER:
                self._on_deliver(message)
            elif message.id == p.Upcall.STRAY:
                for frame in message.ool:
                    self.counters["strays_in"] += 1
                    self.engine.inject(bytes(frame))
            elif message.id == p.Call.CONNECT + p.REPLY_OFFSET:
                self._on_connected(message)
            elif message.id == p.Upcall.REFUSED:
                refused = p.Refused.unpack(message.inline)
                self.counters["refused"] += 1
                log.warning(
                    "the network server refused call %d for session %#x: %s",
                    refused.call,
                    refused.session,
                    refused.reason or os.strerror(refused.error),
                )
            else:
                self.counters["unknown_upcalls"] += 1
        except Exception:
            self.counters["upcall_failed"] += 1
            if not self._closed:
                log.exception("a message of the network server (id %d) could not be obeyed", message.id)
        finally:
            message.close()

    def _on_deliver(self, message: Message) -> None:
        record = p.Deliver.unpack(message.inline)
        with self._lock:
            listener = self._listeners.get(record.listener)
        if listener is None:  # closed while it was on its way
            self._forget(record.session, reset=True)
            return
        try:
            self.engine.deliver(listener, message.ool[0], record.session)
        except (OSError, ValueError, IndexError) as error:
            self.counters["deliver_failed"] += 1
            log.warning("a delivered session could not be taken, its peer is reset: %s", error)
            self._forget(record.session, reset=True)

    def _on_connected(self, message: Message) -> None:
        if len(message.inline) != p.Connected.size():  # refused before it was understood: a bug of ours
            raise p.ProtocolError(p.Status.unpack(message.inline).reason)
        record = p.Connected.unpack(message.inline)
        with self._lock:
            session = self._connecting.pop(record.session, None)
        if session is None:  # closed meanwhile; its forget may have overtaken the connect
            if not record.error:
                self._forget(record.session, reset=True)
            return
        if record.error:
            # The server keeps the name of a session that was bound before; it says so by the address.
            if record.port == 0:
                self._unname(session)
            self.engine.fail(session, record.error)
            return
        try:
            self.engine.import_session(session, message.ool[0], record.session)
        except (OSError, ValueError, IndexError):
            self._forget(record.session, reset=True)
            self._unname(session)
            self.engine.fail(session, errno.EPROTO)
            raise

    def _server_died(self) -> None:
        with self._lock:
            if self._gone or self._closed:
                return
            self._gone = True
            ended = [*self._connecting.values(), *self._listeners.values()]
            self._connecting.clear()
            # Killed, it leaves open sessions alone; in good order it reset their peers (netserver/server.py).
            in_order = self.engine.meta.ended
            if in_order:
                ended += [session for session in self._sessions.values() if session.live and session not in ended]
        what = "with it all sessions" if in_order else "open sessions go on, new ones need it"
        log.warning("the network server at %s has gone; %s", self.path, what)
        for session in ended:
            with contextlib.suppress(OSError):
                self.engine.fail(session, errno.ENETDOWN)

    def _resolve(self, next_hop: str) -> None:
        """Engine.resolver: the server asks by ARP and writes the answer into the metastate page."""
        self._answer(self._rpc(p.Call.RESOLVE, p.Resolve(next_hop), timeout=RESOLVE_TIMEOUT_S), p.Status)

    # -- messages ------------------------------------------------------------------------------

    def _name(self, session: Session) -> int:
        with self._lock:
            number = self._serial << 32 | self._next
            self._next = self._next % (p.SERVER_NUMBER - 1) + 1
            self._sessions[number] = session
        session.session_id = number
        return number

    def _unname(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.session_id, None)
        session.session_id = 0
        if not session.live:
            session.set_local(ANY, 0)

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise OSError(
                errno.EBADF, "this socket belongs to the parent process; after a fork the child opens its own"
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
        timeout: float | None = CALL_TIMEOUT_S,
    ) -> Message:
        try:
            with self._ipc():
                return self._task.rpc(self._server, call, record.pack(), rights=rights, timeout=timeout)
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

    def _post(self, call: p.Call, record: p.Record, *, ool: Iterable[bytes] = (), reply_to: int = 0) -> None:
        try:
            with self._ipc():
                self._task.post(self._server, call, record.pack(), ool=list(ool), local=reply_to)
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

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.shutdown()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method, without keeping its object: what a closed task still refers to must not hold an engine's memory."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call


def _join(path: str) -> Task:
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


_hosts: dict[tuple[int, str], Proxy] = {}
_hosts_lock = threading.Lock()


def connect_default(path: str | None = None) -> Proxy:
    """This process's attachment to the server at ``path`` (None: ``ULNET_SERVER`` or the default), made once.

    A child after fork gets one of its own, and so does who asks again after the server was restarted.
    """
    key = (os.getpid(), p.server_path(path))
    with _hosts_lock:
        host = _hosts.get(key)
        if host is None or host._closed or host._gone:
            host = _hosts[key] = Proxy(key[1])
        return host


def query(call: p.Call, path: str | None = None) -> Any:
    """The answer to SESSIONS or COUNTERS, without attaching. OSError as from Proxy."""
    path = p.server_path(path)
    with _join(path) as task:
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
