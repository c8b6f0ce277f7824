"""Sessions in several processes: placed in the server before a fork, to be inherited or passed on, and fetched back.

``share`` hands a session's state and the manager's end of its descriptor pair to the server, which relays from then on;
every process that has the user's end goes on by plain kernel calls (``stack/session.pyx``). When one process is left,
its next use of the session fetches it back (``_on_shared``): the server counts in the metastate page how often some
session came down to one holder, so nobody asks in vain. At a fork (``os.register_at_fork``) everything is shared; the
child is its parent's *heir* by a lifeline, and attaches itself when it first needs more than its descriptors.

SOSP 1993 section 3.2 (proxy_return); that sessions come back to the last holder is new.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from abc import abstractmethod
from collections import Counter
from multiprocessing import process, util
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakMethod, WeakValueDictionary

from ulnet.stack import forking
from ulnet.stack import protocol as p
from ulnet.stack.leasing import TCP, Leasing
from ulnet.stack.session import Session

if TYPE_CHECKING:
    from ulnet.stack.engine import Engine

log = logging.getLogger("ulnet.proxy")

UDP: Final = 17
ANY: Final = "0.0.0.0"
# Nothing is left of these that two processes could share, or nothing is there yet.
_UNSHARED: Final = frozenset(("CLOSED", "TIME-WAIT", "SYN-SENT", "SYN-RECEIVED"))


class Sharing(Leasing):
    """See ``proxy.Proxy``, the class that programs use."""

    def __init__(self, path: str | None, interface: str, spin_ns: int | None) -> None:
        super().__init__(path, interface, spin_ns)
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()  # all with a number
        self._connecting: dict[int, Session] = {}
        self._listeners: dict[int, Session] = {}
        self._credits: Counter[int] = Counter()
        self._backlogs: dict[int, int] = {}
        self._named: set[int] = set()  # bound to a port of the program's choice
        self._asked: dict[int, int] = {}  # shared sessions: the page's counter when we last asked for them
        # In a forked child, until it attaches: the token and the lifeline that stand for what it inherited.
        self._dormant = False
        self._heir = 0
        self._lifeline = -1
        self._before: tuple[int, int] = (0, -1)
        # Children end by os._exit(), mostly, also those that were forked before they attached.
        self._forked = forking.is_child or process.parent_process() is not None
        self._inherited: list[Any] = []  # a parent's tasks: nothing of theirs may be ended here
        self._attach()
        forking.watch(self)
        # Workers of multiprocessing end by os._exit(), after finalizers of their own kind.
        util.register_after_fork(self, Sharing._end_with_worker)
        self._end_with_worker()

    def _end_with_worker(self) -> None:
        reference = WeakMethod(self._at_exit)

        def end() -> None:
            at_exit = reference()
            if at_exit is not None:
                at_exit()

        util.Finalize(None, end, exitpriority=-100)

    def _prepare_engine(self, engine: Engine) -> None:
        engine.on_ends = self._settle
        engine.on_shared = self._on_shared
        engine.on_shared_end = self._on_shared_end
        engine.on_shared_error = self._on_shared_error
        engine.on_shared_option = self._on_shared_option

    def _release_engine(self, engine: Engine) -> None:
        """No circle of references keeps its descriptors open."""
        engine.resolver = engine.on_strays = engine.on_ends = engine.on_shared = engine.on_shared_end = None
        engine.on_shared_error = engine.on_shared_option = None

    def _check(self) -> None:
        """Before every call of the server: a child attaches itself now."""
        if self._dormant:
            with self._lock:
                if self._dormant:
                    self._wake_up()
        super()._check()

    def _wake_up(self) -> None:
        self._attach(self._heir)
        self._dormant = False
        self._heir = 0
        self._drop_lifeline()

    def _drop_lifeline(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def _take_along(self, session: Session) -> None:
        """Before a call that opens a session: a socket that the parent had made, but not named, is the child's, too."""
        self._check()
        if session.engine is not self.engine and not session.shared:
            session.rebind(self.engine)

    def socket(self, kind: int) -> Session:
        """See Host."""
        self._check()
        return super().socket(kind)

    @abstractmethod
    def _at_exit(self) -> None:
        """This process ends in good order."""

    # -- to the server -------------------------------------------------------------------------

    def share(self, session: Session) -> None:
        """Place a session in the server. OSError EINVAL without a name, EALREADY while it connects."""
        self._check()
        with session.shared_lock:
            if session.closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if not session.shared:
                self._surrender(session)

    def _surrender(self, session: Session) -> None:
        number = session.session_id
        if not number:
            raise OSError(errno.EINVAL, "a socket without a name is this process's alone: bind or connect it first")
        if number in self._connecting:
            raise OSError(errno.EALREADY, "a socket cannot be shared while it connects")
        queued, embryos = [], []
        if number in self._listeners:
            embryos = self.engine.export_embryos(session)
            while (waiting := self.engine.accept(session)) is not None:
                self._accepted_here(waiting)
                queued.append(waiting)
            self._declare_all(session.local[1])
        else:
            self._declare(session)
        seen = self.engine.meta.shares
        user, manager, state = session.share_begin()
        try:
            self._post(p.Call.SHARE, p.Share(number), fds=[user, manager], ool=[] if state is None else [state])
        except OSError:
            self._regain(session, os.dup(manager), state)
            raise
        finally:
            os.close(manager)
        self._asked[number] = seen
        self._credits.pop(number, None)
        self._local_listeners.discard(number)
        self._gone_from_here(number)
        for state in embryos:
            self._post(p.Call.EMBRYO, p.Embryo(number), ool=[state])
        for child in queued:
            self._post(p.Call.REQUEUE, p.Requeue(number, child.session_id), ool=[self.engine.export_session(child)])
            self._gone_from_here(child.session_id)
        self.counters["shared"] += 1

    def publish(self, session: Session, public: bool) -> None:
        """``public``: it stays in the server, for nobody can tell who has its descriptor; False ends that."""
        if public:
            self.share(session)
        if session.shared:
            self._answer(self._rpc(p.Call.PUBLISH, p.Publish(session.session_id, public)), p.Status)

    def send_off(self, session: Session) -> None:
        """Its descriptor is on its way to a process that will ``hold`` it."""
        self.share(session)
        self._answer(self._rpc(p.Call.PUBLISH, p.Publish(session.session_id, False, 1)), p.Status)

    def leave(self, session: Session) -> int:
        """Let go of a session but not of its descriptor, which is the caller's from now on."""
        self.send_off(session)
        number = session.session_id
        fd = session.leave()
        self._forget_shared(number)
        self._post_quietly(p.Call.RELEASE, p.Release(number))
        return fd

    def hold(self, fd: int) -> tuple[Session, tuple[str, int]] | None:
        """See Host."""
        self._check()
        try:
            info = self._answer(self._rpc(p.Call.HOLD, p.Nothing(), fds=[fd]), p.Info)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTSOCK):
                return None
            raise
        session = self.engine.new_session(info.protocol)
        peer = (info.raddr, info.rport) if info.rport else None
        named = not peer and not info.listening and info.protocol == TCP
        session.adopt_fd(fd, local=(info.laddr, info.lport), peer=peer, listening=info.listening, named=named)
        session.session_id = info.session
        if info.named:
            self._named.add(info.session)
        self._sessions[info.session] = session
        return session, (ANY if info.wildcard else info.laddr, info.lport)

    # -- and back ------------------------------------------------------------------------------

    def _on_shared(self, session: Session) -> bool:
        """Engine.on_shared: before a use of a shared session. True: it is this process's own again."""
        seen = session.engine.meta.shares  # shared memory: readable in a dormant child, too
        if self._asked.get(session.session_id) == seen:
            return False
        return self._promote(session, seen)

    def _promote(self, session: Session, seen: int) -> bool:
        number = session.session_id
        try:
            self._check()
            with session.shared_lock:
                if not session.shared:
                    return True
                if session.live:
                    # Frames that come before the state wait here, instead of going round by the server.
                    flow = session.peer or (None, 0)
                    self.engine.forget_flow(session.kind, *session.local, *flow)
                message = self._rpc(p.Call.PROMOTE, p.Shared(number))
                self._answer(message, p.Status)
                (manager,) = message.take_fds()
                if session.engine is not self.engine:
                    session.rebind(self.engine)
                self._regain(session, manager, memoryview(message.ool[0]) if message.ool else None)
        except OSError as error:
            self._asked[number] = seen
            if error.errno != errno.EBUSY:
                self.counters["promote_failed"] += 1
                log.debug("session %#x stays in the server: %s", number, error)
            return False
        self._asked.pop(number, None)
        self.counters["promoted"] += 1
        return True

    def _regain(self, session: Session, manager: int, state: bytes | memoryview | None) -> None:
        """The session is managed here again. Takes the descriptor over."""
        number = session.session_id
        listening = session.listening
        try:
            session.share_end(manager, state, number)
        except (OSError, ValueError) as error:
            self.counters["promote_failed"] += 1
            log.error("session %#x was lost on its way back: %s", number, error)
            os.close(manager)
            self._post_quietly(p.Call.FORGET, p.Forget(number, True))
            return
        if listening:
            with self._lock:
                self._listeners[number] = session
                self._local_listeners.add(number)
            self.engine.open_listener_shell(session, *session.local, self._backlogs.setdefault(number, 128))
        self._sessions[number] = session

    def _on_shared_end(self, session: Session) -> None:
        """Engine.on_shared_end: nothing more comes through the descriptor. Raises what SO_ERROR would tell."""
        poll = select.poll()
        poll.register(session.fileno(), select.POLLHUP)
        if not poll.poll(0):
            return  # the peer's FIN: an end in order
        if self._gone:
            raise self._lost(None)
        error = self._status(session).so_error
        if error:
            raise OSError(error, os.strerror(error))

    def _status(self, session: Session) -> p.Info:
        self._check()
        return self._answer(self._rpc(p.Call.STATUS, p.Shared(session.session_id)), p.Info)

    # -- calls on shared sessions --------------------------------------------------------------

    def accept(self, listener: Session) -> Session | None:
        """See Host. A shared listener: the next connection announced that can still be had."""
        if listener.shared:
            self._on_shared(listener)
        while listener.shared:
            number = listener.announced()
            if number is None:
                return None
            self._check()
            try:
                message = self._rpc(p.Call.CLAIM, p.Shared(number))
                self._answer(message, p.Status)
                session = self.engine.new_session(TCP)
                self.engine.import_session(session, message.ool[0], number)
            except OSError as error:  # it ended, or another process was told of it, too
                self.counters["claims_missed"] += 1
                log.debug("connection %#x could not be claimed: %s", number, error)
                continue
            self._sessions[number] = session
            return session
        return self.engine.accept(listener)

    def _on_shared_error(self, session: Session) -> int:
        """Engine.on_shared_error: SO_ERROR."""
        return self._status(session).so_error

    def _on_shared_option(self, session: Session, level: int, name: int, value: int | None) -> int:
        """Engine.on_shared_option: get (None) or set an option. OSError ENOPROTOOPT."""
        self._check()
        request = p.Option(session.session_id, level, name, value or 0, value is not None)
        return self._answer(self._rpc(p.Call.OPTION, request), p.OptionValue).value

    def _close_shared(self, session: Session, *, abort: bool) -> None:
        """This process's hold ends; the connection ends with the last one."""
        number = session.session_id
        if self._dormant:
            if self._lifeline >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._lifeline, number.to_bytes(8, "little"))
        else:
            self._post_quietly(p.Call.RELEASE, p.Release(number, abort))
        session.engine.close_session(session)
        self._forget_shared(number)

    def _forget_shared(self, number: int) -> None:
        self._asked.pop(number, None)
        with self._lock:
            self._sessions.pop(number, None)
            self._listeners.pop(number, None)
            self._backlogs.pop(number, None)
            self._named.discard(number)

    # -- fork ----------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """See Host. Everything that can be shared is; the child's share in it is prepared."""
        self._before = 0, -1
        if not (self._closed or self._gone or os.getpid() != self._pid):
            try:
                if self._share_all():
                    message = self._rpc(p.Call.FORK, p.Nothing())
                    forked = self._answer(message, p.Forked)
                    self._before = forked.heir, message.take_fds()[0]
            except Exception as error:  # what is raised here would stop neither the fork nor the hooks after it
                log.warning("open connections stay with the parent of this fork: %s", error)
        self._lock.acquire()
        super().before_fork()

    def _share_all(self) -> bool:
        """True: there is something to inherit."""
        shared = False
        for session in list(self._sessions.values()):
            if session.closed or session.session_id in self._connecting:
                continue
            if not session.shared:
                if session.kind == TCP and session.live and not session.listening and session.state in _UNSHARED:
                    continue
                try:
                    self.share(session)
                except OSError:
                    if session.closed:
                        continue  # by another thread, at this moment: it is nobody's any more
                    raise
            shared = True
        if shared:
            self._check()
        return shared

    def after_fork_in_parent(self) -> None:
        """See Host."""
        super().after_fork_in_parent()
        self._lock.release()
        lifeline = self._before[1]
        if lifeline >= 0:
            os.close(lifeline)  # the child's copy is the one that counts

    def after_fork_in_child(self) -> None:
        """See Host. The child holds what was shared, by its lifeline until it attaches."""
        super().after_fork_in_child()
        sessions = [session for session in self._sessions.values() if session.shared]
        self._start_anew()
        self._inherited.append(self._task)
        self._sessions = WeakValueDictionary({session.session_id: session for session in sessions})
        self._listeners = {n: session for n, session in self._listeners.items() if session.shared}
        self._connecting.clear()
        self._credits.clear()
        self._drop_lifeline()  # the parent's own, if it was dormant
        self._heir, self._lifeline = self._before
        self._dormant = self._forked = True
