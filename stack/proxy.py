"""The library's side of the network server: sessions are set up by its calls and handed over (SOSP 1993 table 1).

Call order: ``connect_default()`` (or ``Proxy(path)``), then the calls of ``host.Host``. Sending and receiving ask
nobody. Threads: calls go out from whichever thread makes them; one receiver thread takes what the server says by
itself (delivered sessions, strays, the outcome of connects nobody waits for); the engine's helper does its timers.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import threading
import weakref
from multiprocessing import util
from typing import Any, Final, cast

from ulnet.ipc import Message, Sender
from ulnet.stack import protocol as p
from ulnet.stack.attachment import query
from ulnet.stack.leasing import TCP
from ulnet.stack.session import Session
from ulnet.stack.sharing import ANY, UDP, Sharing

log = logging.getLogger("ulnet.proxy")

DETACH_TIMEOUT_S: Final = 2.0
FORGET_TIMEOUT_S: Final = 1.0
PLACEMENTS: Final = ("application", "server")


class Proxy(Sharing):
    """One application's attachment to a network server.

    ``path``: the server's socket; None: ``ULNET_SERVER`` or the default. Raises OSError with one clear line when no
    server is there, when it may not be reached, or when it refuses. ``interface``: how packets come in, "ipf" (ring
    polled in user space), "shm" (ring with wake-ups) or "ipc" (one call a packet); SOSP 1993 section 4.1.
    ``spin_ns``: how long a waiting call polls before it sleeps; None: as the interface has it (SPIN_NS).
    ``placement``: who manages open sessions, "application", or "server": data then goes through the server and the
    session's descriptor, which other programs and libraries may read and write by themselves.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        interface: str = "ipf",
        spin_ns: int | None = None,
        placement: str = "application",
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement {placement!r}: use one of {', '.join(PLACEMENTS)}")
        self.placement = placement
        super().__init__(path, interface, spin_ns)
        _open.add(self)

    # -- Host ----------------------------------------------------------------------------------

    def bind(
        self, session: Session, address: str, port: int, *, reuse_address: bool = False, reuse_port: bool = False
    ) -> tuple[str, int]:
        """See Host. A UDP session is the application's own from here on."""
        self._take_along(session)
        with session.shared_lock:  # who forks meanwhile waits for what it becomes
            return self._bind(session, address, port, reuse_address, reuse_port)

    def _bind(
        self, session: Session, address: str, port: int, reuse_address: bool, reuse_port: bool
    ) -> tuple[str, int]:
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
        if session.kind == UDP:
            self._place(session)
        return bound.address, bound.port

    def _place(self, session: Session) -> None:
        """A session that just opened goes where this proxy has them."""
        if self.placement == "server":
            self.publish(session, True)

    def connect(self, session: Session, address: str, port: int, timeout_ns: int) -> None:
        """See Host. The blocking form is one message pair, taken by the calling thread itself."""
        self._take_along(session)
        with self._lock:
            if session.session_id in self._connecting:
                raise OSError(errno.EALREADY, os.strerror(errno.EALREADY))
        if session.shared and not self._on_shared(session):
            self._connect_shared(session, address, port, timeout_ns)
            return
        if session.kind == UDP:
            with session.shared_lock:
                self._connect_udp(session, address, port)
            return
        if session.live:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        self.engine.reopen(session)  # after an attempt that failed
        here = self.placement == "application" and (not session.session_id or self._is_here(session.session_id))
        if here and self._connect_here(session, address, port, timeout_ns):
            return
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
        with self._lock:
            self._connecting[number] = session  # it stays this process's alone until then
        try:
            self._connect_by_server(session, request, named, timeout_ns)
        finally:
            with self._lock:
                self._connecting.pop(number, None)
        self._place(session)

    def _connect_by_server(self, session: Session, request: p.Connect, named: bool, timeout_ns: int) -> None:
        number = session.session_id
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

    def _connect_shared(self, session: Session, address: str, port: int, timeout_ns: int) -> None:
        """A bound socket that several processes hold: the server connects it, and goes on relaying."""
        request = p.Connect(session.session_id, session.kind, address, port)
        message = self._rpc(p.Call.CONNECT, request, timeout=None if timeout_ns <= 0 else timeout_ns / 1e9)
        connected = self._answer(message, p.Connected)
        session.set_shared(local=(connected.address, connected.port), peer=(address, port))

    def _connect_udp(self, session: Session, address: str, port: int) -> None:
        number = session.session_id or self._name(session)
        try:
            connected = self._answer(self._rpc(p.Call.CONNECT, p.Connect(number, UDP, address, port)), p.Connected)
            opened = session.live
            self.engine.open_udp(session, connected.address, connected.port, address, port)
            if not opened:
                self._place(session)
        except BaseException as error:
            if not session.live:
                if not isinstance(error, OSError) or error.errno in (errno.ETIMEDOUT, errno.ENOMEM):
                    self._forget(number)
                self._unname(session)
            raise

    def listen(self, session: Session, backlog: int) -> None:
        """See Host. Called again it changes the backlog."""
        self._take_along(session)
        backlog = min(max(backlog, 1), p.MAX_BACKLOG)
        if not session.session_id:
            self.bind(session, ANY, 0)
        number = session.session_id
        if session.shared and not self._on_shared(session):
            self._backlogs[number] = backlog
            self._answer(self._rpc(p.Call.LISTEN, p.Listen(number, backlog)), p.Status)
            session.set_shared(listening=True)
            return
        with session.shared_lock:
            self._listen(session, number, backlog)

    def _listen(self, session: Session, number: int, backlog: int) -> None:
        again = number in self._listeners
        if again:
            self.engine.set_backlog(session, backlog)
        else:
            # The first connection request, or session delivered, may come before the reply is read.
            self.engine.open_listener_shell(session, *session.local, backlog)
        with self._lock:
            self._listeners[number] = session
            self._backlogs[number] = backlog
        local = self.placement == "application" or number in self._local_listeners
        try:
            self._answer(self._rpc(p.Call.LISTEN, p.Listen(number, backlog, local)), p.Status)
            if local:
                self._local_listeners.add(number)
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
        self._accepted_here(session)
        with self._lock:
            self._sessions[session.session_id] = session
        self._place(session)
        with self._lock:
            if number not in self._listeners or number in self._local_listeners or listener.shared:
                return
            self._credits[number] += 1
            count = self._credits[number]
            if count * 2 < self._backlogs[number]:
                return
            del self._credits[number]
        self._post_quietly(p.Call.ACCEPTED, p.Accepted(number, count))

    def close(self, session: Session, *, abort: bool = False) -> None:
        """See Host. What the server has set up goes back there with its unsent data, and the FIN exchange runs there;
        what was set up here ends here, unless it has data that cannot be sent now."""
        with session.shared_lock:
            self._close(session, abort)

    def _close(self, session: Session, abort: bool) -> None:
        number = session.session_id
        if session.shared and os.getpid() == self._pid and not self._closed:
            self._close_shared(session, abort=abort)
            return
        with self._lock:
            self._connecting.pop(number, None)
            listening = self._listeners.pop(number, None) is not None
            self._backlogs.pop(number, None)
            self._credits.pop(number, None)
            self._sessions.pop(number, None)
            named = number in self._named
            self._named.discard(number)
        if os.getpid() != self._pid or self._closed or session.engine is not self.engine or self._dormant:
            return  # what stayed with the parent ends there
        if listening:
            self._abort_queue(session)
            if number in self._local_listeners:
                self._local_listeners.discard(number)
                if not self._gone:
                    with contextlib.suppress(OSError):  # its port is the server's again
                        self._return_rest(session.local[1])
                        self._declare_all(session.local[1])
        elif self._is_here(number):
            self._close_here(session, abort=abort)
            return
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
        _open.discard(self)
        with self._lock:
            held = list(self._sessions.values())
        for session in held:
            with contextlib.suppress(OSError):
                self.close(session)
        if not self._dormant and not self._gone:
            self._return_rest()
        self._closed = True
        if self._dormant:
            self._drop_lifeline()
            return
        if not self._gone:
            with contextlib.suppress(OSError):  # it died: it resets what it could not take
                self._rpc(p.Call.DETACH, p.Nothing(), timeout=DETACH_TIMEOUT_S)
        self.engine.close()
        self._task.close()
        if not self.engine.counters()["buf_lent"]:  # else the ring goes with the last buffer lent
            self.link.close()
        self._release_engine(self.engine)
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
            self._declare(session)
            state = self.engine.export_session(session)
            self._gone_from_here(number)
        except OSError as error:
            if session.live:
                self.counters["export_failed"] += 1
                log.warning("session %d could not be handed back, its peer is reset: %s", number, error)
                self.engine.close_session(session, linger_abort=True)
            self._forget(number)  # else it has just come to its end
            return
        try:
            if self._forked and not getattr(self._inside, "ipc", False):
                # Its process may end by os._exit() next, which leaves posted messages behind.
                self._answer(self._rpc(p.Call.RETURN, p.Return(number), ool=[state]), p.Status)
            else:
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
            if number & 0xFFFFFFFF >= p.SERVER_NUMBER:
                self._forget(number)

    def _forget(self, number: int, *, reset: bool = False, wait: bool = False) -> None:
        """``wait``: until its name is free, so that who binds it next, in whatever process, is not refused."""
        if wait and not self._gone and not getattr(self._inside, "ipc", False):
            with contextlib.suppress(OSError):
                self._rpc(p.Call.FORGET, p.Forget(number, reset), timeout=FORGET_TIMEOUT_S)
        else:
            self._post_quietly(p.Call.FORGET, p.Forget(number, reset))

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
            elif message.id == p.Call.LEASE + p.REPLY_OFFSET:
                self._on_leased(message)
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
            if record.session:
                self._forget(record.session, reset=True)
            return
        try:
            with listener.shared_lock:
                if listener.shared:
                    self._send_back(record, bytes(message.ool[0]))
                else:
                    self.engine.deliver(listener, message.ool[0], record.session)
        except (OSError, ValueError, IndexError) as error:
            self.counters["deliver_failed"] += 1
            log.warning("a delivered session could not be taken, its peer is reset: %s", error)
            if record.session:
                self._forget(record.session, reset=True)

    def _send_back(self, record: p.Deliver, state: bytes) -> None:
        """Its listener was shared meanwhile: the connection waits there. What came for it here goes along."""
        if not record.session:  # its handshake is under way
            self._post(p.Call.EMBRYO, p.Embryo(record.listener), ool=[state])
            return
        session = self.engine.new_session(TCP)
        self.engine.import_session(session, state, record.session)
        state = self.engine.export_session(session)
        self._post(p.Call.REQUEUE, p.Requeue(record.listener, record.session), ool=[state])

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
        self._place(session)

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

    # -- names ---------------------------------------------------------------------------------

    def _name(self, session: Session) -> int:
        with self._lock:
            number = self.engine.number()
            self._sessions[number] = session
        session.session_id = number
        return number

    def _unname(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.session_id, None)
        session.session_id = 0
        if not session.live:
            session.set_local(ANY, 0)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.shutdown()


_open: weakref.WeakSet[Proxy] = weakref.WeakSet()


def _end_all() -> None:
    """The program ends: what it holds is given back, in good order."""
    for proxy in list(_open):
        proxy._at_exit()


# After the finalizers of multiprocessing, which still talk over our sockets: what is registered last runs first.
atexit.unregister(cast(Any, util)._exit_function)
atexit.register(_end_all)
atexit.register(cast(Any, util)._exit_function)

_hosts: dict[str, Proxy] = {}
_hosts_lock = threading.Lock()


def connect_default(path: str | None = None) -> Proxy:
    """This process's attachment to the server at ``path`` (None: ``ULNET_SERVER`` or the default), made once.

    A child after fork goes on with its parent's, which attaches anew; who asks again after the server was restarted
    gets a new one.
    """
    path = p.server_path(path)
    with _hosts_lock:
        host = _hosts.get(path)
        if host is None or host._closed or host._gone:
            host = _hosts[path] = Proxy(path)
        return host


os.register_at_fork(before=_hosts_lock.acquire, after_in_parent=_hosts_lock.release, after_in_child=_hosts_lock.release)

__all__ = ["Proxy", "connect_default", "query"]
