"""Sessions placed in the server, reached by several processes through one descriptor (SOSP 1993 section 3.2: fork).

Call order: ``share`` (or ``requeue``), then the holders' calls (``hold``, ``release``, ``fork``, ``claim``,
``publish``, ``status``, ``option``); ``promote`` ends it for the last holder, the descriptor's hang-up for good.

A shared session has no owner but holders: applications, and heirs (children that have not attached yet). Who holds it
was its owner, was forked while its parent held it, or has shown its descriptor. The kernel counts the copies of that;
the table of holders only says when a session may go home, and outlives a connection for who asks what became of it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from ulnet.netserver.heirs import Heirs
from ulnet.netserver.leases import LeaseTable
from ulnet.netserver.records import TCP, Application, Heir, Holder, Place, Refusal, SessionRecord, Share
from ulnet.netserver.sessions import SESSIONS_PER_APPLICATION
from ulnet.stack import protocol as p
from ulnet.stack.engine import EV_ACCEPTED, EV_CONNECTED, EV_FAILED, EV_RELAY
from ulnet.stack.ports import WILDCARDS
from ulnet.stack.relay import DATAGRAMS, LISTENER, NEWS_ENDED, NEWS_HUNG, NEWS_RESET, NEWS_ROOM, STREAM, Relay, Relays
from ulnet.stack.session import STATES, Session

log = logging.getLogger("ulnet.netserver")

SHARES_PER_USER: Final = 4096  # each is a descriptor and up to some megabytes of the server's
BUFFER_MAX_BYTES: Final = 8 << 20  # of a shared session, each way: the memory is the server's
TRANSIT_MAX: Final = 1 << 16
CLAIM_NS: Final = 5_000_000_000  # who has read an announcement claims it at once, or has died
CHECK_NS: Final = 1_000_000_000


class SharedTable(LeaseTable):
    """A SessionTable with shared sessions."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.relays = Relays(self.engine)
        self.heirs = Heirs()
        self._pairs: dict[tuple[int, int], SessionRecord] = {}
        self._by_user: Counter[int] = Counter()  # shared sessions
        self._unclaimed: dict[SessionRecord, None] = {}  # listeners with announcements
        self._checked_ns = 0
        self._retry_ms = 0

    def close(self) -> None:
        """End the relays. Sessions are the engine's matter."""
        for record in list(self.records.values()):
            if record.share is not None and record.share.relay is not None:
                record.share.relay.close()
        self.relays.close()
        self.heirs.close()

    # -- into the server and back --------------------------------------------------------------

    def share(self, app: Application, number: int, state: bytes | memoryview | None, fds: Sequence[int]) -> None:
        """The session is everybody's who has its pair's user end. ``fds``: both ends; copies are made."""
        record = self._own(app, number)
        if record.owner is not app:
            raise Refusal(errno.EINVAL, "it is shared already", violation=True)
        try:
            self._share(app, record, state, fds)
        except BaseException:
            # Its state has left the application: nobody else will end it.
            if self.records.get(number) is record:
                self._end(record, reset=True)
            raise

    def _share(
        self, app: Application, record: SessionRecord, state: bytes | memoryview | None, fds: Sequence[int]
    ) -> None:
        kind = socket.SOCK_STREAM if record.protocol == TCP else socket.SOCK_SEQPACKET
        if len(fds) != 2:
            raise Refusal(errno.EINVAL, f"{len(fds)} descriptors came, two are meant", violation=True)
        pair = _identity(fds[0], kind)
        _identity(fds[1], kind)
        known = self._pairs.get(pair)
        if known is not None and known.share is not None and known.share.relay is not None:
            raise Refusal(errno.EINVAL, "the descriptor is another session's", violation=True)
        uid = app.sender.uid
        if uid and self._by_user[uid] >= SHARES_PER_USER:
            raise Refusal(errno.EMFILE, f"{SHARES_PER_USER} sessions of user {uid} are shared already")
        if (state is not None) != (record.place is Place.APPLICATION):
            raise Refusal(
                errno.EINVAL, f"a state that does not fit a session that is {record.place.value}", violation=True
            )
        if record.place is Place.APPLICATION:
            assert state is not None
            record.engine_session = self._import(app, record, state)
            _bound(record.engine_session)
        elif record.place is Place.NAMED:
            record.engine_session = self._shell(record)
        elif record.place is Place.LISTENING:
            if record.local:
                self.take_listener(app, record)
        else:
            raise Refusal(errno.EINVAL, f"a session that is {record.place.value} cannot be shared", violation=True)
        self._unguard(record)
        record.owner = None
        what, record.place = record.place, Place.SHARED
        # Before the relay: should that fail, the session is ended as what it is now.
        record.share = Share(what, pair, uid, None, {app})
        self._pairs[pair] = record
        self._by_user[uid] += 1
        self._replay_early(record)
        record.share.relay = self._relay(record, os.dup(fds[1]))
        self.counters["shared"] += 1
        if what is Place.LISTENING:
            self._announce(record)

    def _shell(self, record: SessionRecord) -> Session:
        session = self.engine.new_session(TCP)
        session.session_id = record.number
        session.set_local(record.laddr, record.lport)
        return session

    def _relay(self, record: SessionRecord, fd: int) -> Relay:
        assert record.share is not None and record.engine_session is not None
        kind = LISTENER
        if record.share.what is Place.APPLICATION:
            kind = STREAM if record.protocol == TCP else DATAGRAMS
        try:
            return Relay(self.relays, record.engine_session, fd, kind)
        except BaseException:
            os.close(fd)
            raise

    def promote(self, app: Application, number: int, reply: Callable[[bytes | None, int], None]) -> None:
        """The only holder takes it home: ``reply`` gets the state and the manager's end."""
        record = self._own(app, number)
        share = record.share
        if share is None:
            raise Refusal(errno.EINVAL, "it is not shared")
        if share.relay is None:
            raise Refusal(errno.ENOTCONN, "it has ended")
        if share.public or share.transit or share.holders != {app} or share.what is Place.CONNECTING:
            raise Refusal(errno.EBUSY, "it has other holders")
        share.relay.drain()
        if share.relay.news & (NEWS_HUNG | NEWS_ENDED):
            raise Refusal(errno.ENOTCONN, "it has ended")
        self._count(share)
        fd = share.relay.detach()
        waiting: list[SessionRecord] = []
        embryos: list[bytes] = []
        try:
            share.relay = None
            self._forget_share(record)
            record.owner = app
            record.place = share.what
            if share.what is Place.APPLICATION:
                try:
                    state = self._hand_over(record)
                except OSError:
                    record.place = Place.CONNECTING  # the engine has it still
                    self._end(record, reset=True)
                    raise
                reply(state, fd)
            else:
                if share.what is Place.LISTENING:
                    waiting, embryos = self.give_listener(app, record)
                else:
                    record.engine_session = None
                reply(None, fd)
        finally:
            os.close(fd)  # the reply has a copy
        self.counters["promoted"] += 1
        if share.what is Place.LISTENING:
            for connection in [*(row[0] for row in share.announced.values()), *share.waiting, *waiting]:
                connection.listener = None
                connection.owner = app
                app.sessions[connection.number] = connection
                self._push(app, record, connection)
            for embryo in embryos:
                self._deliver(app, record, 0, embryo)

    def _forget_share(self, record: SessionRecord) -> None:
        share, record.share = record.share, None
        if share is None:
            return
        self._by_user[share.uid] -= 1
        if not self._by_user[share.uid]:
            del self._by_user[share.uid]
        if self._pairs.get(share.pair) is record:
            del self._pairs[share.pair]
        self._unclaimed.pop(record, None)

    # -- listening -----------------------------------------------------------------------------

    def requeue(self, app: Application, request: p.Requeue, state: bytes | memoryview) -> None:
        """A connection that was delivered before its listener was shared: whoever accepts there may have it."""
        record = self._own(app, request.session)
        if record.owner is not app or record.place is not Place.APPLICATION or record.protocol != TCP:
            raise Refusal(errno.EINVAL, f"a session that is {record.place.value} cannot be queued", violation=True)
        listener = app.sessions.get(request.listener)
        share = listener.share if listener is not None else None
        if listener is None or share is None or share.what is not Place.LISTENING or share.relay is None:
            self._end(record, reset=True)  # closed meanwhile: as BSD resets who was not accepted
            return
        if (listener.laddr, listener.lport) != (record.laddr, record.lport):
            self._end(record, reset=True)
            raise Refusal(errno.EINVAL, f"{record} was not accepted at {listener}", violation=True)
        record.engine_session = self._import(app, record, state)
        app.sessions.pop(record.number)
        record.place = Place.CONNECTING
        record.listener = listener
        self._replay_early(record)
        share.waiting.append(record)
        self._announce(listener)

    def _announce(self, listener: SessionRecord) -> None:
        share = listener.share
        if share is None or share.relay is None or share.what is not Place.LISTENING:
            return
        now = time.monotonic_ns()
        while len(share.announced) < max(listener.backlog, 1):
            if not share.waiting:
                record = self._accept(listener)
                if record is None:
                    break
                record.listener = listener
                share.waiting.append(record)
            if not share.relay.announce(share.waiting[0].number):
                break
            record = share.waiting.popleft()
            share.announced[record.number] = (record, 0)
            self.counters["announced"] += 1
        if share.announced and listener not in self._unclaimed:
            self._unclaimed[listener] = None
            self._checked_ns = self._checked_ns or now

    def claim(self, app: Application, number: int) -> bytes:
        """A connection that was announced; its state."""
        record = self.records.get(number)
        listener = record.listener if record is not None else None
        share = listener.share if listener is not None else None
        if record is None or listener is None or share is None or number not in share.announced:
            raise Refusal(errno.ECONNABORTED, "somebody else has it, or it has ended")
        if app not in share.holders:
            raise Refusal(errno.EBADF, f"connection {number:#x} is not for you", violation=True)
        if len(app.sessions) >= SESSIONS_PER_APPLICATION:
            raise Refusal(errno.EMFILE, f"{SESSIONS_PER_APPLICATION} sessions are open: close some")
        del share.announced[number]
        record.listener = None
        record.owner = app
        app.sessions[number] = record
        try:
            state = self._hand_over(record)
        except OSError as error:
            self._end(record, reset=True)
            raise Refusal(errno.ECONNABORTED, error.strerror or "it has ended") from None
        self.counters["claimed"] += 1
        self._announce(listener)
        return state

    def _check_claims(self, now_ns: int) -> None:
        """Who reads an announcement and dies takes the connection along: after a while it is announced again."""
        for listener in list(self._unclaimed):
            share = listener.share
            if share is None or share.relay is None or not share.announced:
                del self._unclaimed[listener]
                continue
            read = len(share.announced) - share.relay.unread()
            for number, (record, since_ns) in list(share.announced.items())[: max(read, 0)]:
                if not since_ns:
                    share.announced[number] = (record, now_ns)
                elif now_ns - since_ns >= CLAIM_NS and share.relay.announce(number):
                    del share.announced[number]
                    share.announced[number] = (record, 0)  # in the order of the announcements
                    self.counters["announced_again"] += 1

    def listen(self, app: Application, request: p.Listen) -> None:
        """See SessionTable; any holder may do it."""
        record = self._own(app, request.session)
        share, session = record.share, record.engine_session
        if share is None:
            super().listen(app, request)
            return
        assert session is not None
        backlog = min(max(request.backlog, 1), p.MAX_BACKLOG)
        if share.relay is None or record.protocol != TCP or share.what not in (Place.NAMED, Place.LISTENING):
            raise Refusal(errno.EINVAL, f"{record} cannot listen")
        if share.what is Place.LISTENING:
            self.engine.set_backlog(session, backlog)
            record.backlog = backlog
            self._announce(record)
            return
        self.ports.listen(record.name)
        self.engine.listen(session, record.laddr, record.lport, backlog)
        share.what = Place.LISTENING
        record.backlog = record.credit = backlog

    def accepted(self, app: Application, request: p.Accepted) -> None:
        """See SessionTable. A shared listener has no credits; these were on their way when it was shared."""
        if self._own(app, request.session).share is None:
            super().accepted(app, request)

    # -- connecting ----------------------------------------------------------------------------

    def connect(
        self, app: Application, request: p.Connect, done: Callable[[SessionRecord, int, bytes], None]
    ) -> SessionRecord:
        """See SessionTable. A shared session that has a name connects where it is: no state goes with the answer."""
        record = app.sessions.get(request.session)
        if record is None or record.share is None or record.protocol != TCP or request.protocol != TCP:
            return super().connect(app, request, done)
        peer = self._check_peer(request)
        share, session = record.share, record.engine_session
        if share.relay is None or session is None or share.what is not Place.NAMED:
            raise Refusal(errno.EISCONN, f"{record} is connected, or listens")
        self.ports.connect(record.name, record.laddr, *peer, now_ns=time.monotonic_ns())
        record.peer = peer
        self._flows[record.key] = record
        share.what = Place.CONNECTING
        record.done = done
        # The relay goes on watching for the end of its users.
        self.engine.open_tcp(session, record.laddr, record.lport, *peer)
        return record

    def unreachable(self, record: SessionRecord, error: int) -> None:
        """See SessionTable."""
        if record.share is not None and record.share.what is Place.CONNECTING:
            self._connected_shared(record, error)
        else:
            super().unreachable(record, error)

    def _connected_shared(self, record: SessionRecord, error: int) -> None:
        """The handshake has ended: from now on data is relayed, or the session has but its name again."""
        share = record.share
        if share is None or share.relay is None:
            return
        done, record.done = record.done, None
        fd = share.relay.detach()
        share.relay = None
        if error:
            assert record.engine_session is not None
            self.engine.close_session(record.engine_session, linger_abort=True)
            self._flows.pop(record.key, None)
            self.ports.disconnect(record.name)
            record.peer = None
            record.engine_session = self._shell(record)
        share.what = Place.NAMED if error else Place.APPLICATION
        try:
            share.relay = self._relay(record, fd)
        except OSError:
            self._end(record, reset=True)
            error = error or errno.ECONNABORTED
        if done is not None:
            done(record, error, b"")
        if error == 0:
            self._left(record)

    # -- holders -------------------------------------------------------------------------------

    def fork(self, app: Application) -> tuple[Heir, socket.socket]:
        """An heir to everything the application shares now, and the child's end of its lifeline."""
        shared = [record for record in app.sessions.values() if record.share is not None]
        heir, lifeline = self.heirs.make(app, len(shared))
        for record in shared:
            self._add(heir, record)
        self.counters["forks"] += 1
        return heir, lifeline

    def adopt(self, app: Application, token: int) -> None:
        """A forked child has attached: it takes over what its heir holds still."""
        heir = self.heirs.get(token)
        if heir is None:
            self.counters["heirs_unknown"] += 1
            return
        for record in heir.sessions.values():
            self._add(app, record)
        self._end_heir(heir)
        self.counters["adopted"] += 1

    def look_at_lifelines(self) -> None:
        """Children say what they have closed, or end."""
        for heir, number in self.heirs.news():
            if number is None:
                self._end_heir(heir)
            else:
                self.release(heir, number)

    def _end_heir(self, heir: Heir) -> None:
        self.heirs.end(heir)
        for number in list(heir.sessions):
            self.release(heir, number)

    def hold(self, app: Application, fds: Sequence[int]) -> SessionRecord:
        """Whose descriptor is this? Having it is the right to hold its session."""
        if len(fds) != 1:
            raise Refusal(errno.EINVAL, f"{len(fds)} descriptors came, one is meant", violation=True)
        info = os.fstat(fds[0])
        record = self._pairs.get((info.st_dev, info.st_ino))
        if record is None or record.share is None:
            raise Refusal(errno.ENOTSOCK, "the descriptor is no shared session's")
        if record.number not in app.sessions and len(app.sessions) >= SESSIONS_PER_APPLICATION:
            raise Refusal(errno.EMFILE, f"{SESSIONS_PER_APPLICATION} sessions are open: close some")
        record.share.transit = max(record.share.transit - 1, 0)
        self._add(app, record)
        self._left(record)
        return record

    def release(self, holder: Holder, number: int, *, abort: bool = False) -> None:
        """It holds the session no more. The last one may ask for a reset instead of a FIN."""
        record = holder.sessions.get(number)
        if record is None or record.share is None or holder not in record.share.holders:
            self.counters["released_unknown"] += 1  # honest: it has ended meanwhile
            return
        share = record.share
        share.holders.discard(holder)
        del holder.sessions[number]
        if not share.holders and abort and not share.public and not share.transit:
            if record.place is Place.SERVER:
                session = record.engine_session
                if session is not None:
                    self.engine.close_session(session, linger_abort=True)
            else:
                self._end(record, reset=True)
            return
        self._left(record)

    def publish(self, app: Application, request: p.Publish) -> None:
        """Others have, or will have, its descriptor."""
        share = self._shared(app, request.session).share
        assert share is not None
        share.public = request.public
        share.transit = min(share.transit + request.transit, TRANSIT_MAX)
        self._left(self._shared(app, request.session))

    def _add(self, holder: Holder, record: SessionRecord) -> None:
        assert record.share is not None
        record.share.holders.add(holder)
        holder.sessions[record.number] = record

    def _left(self, record: SessionRecord) -> None:
        """Somebody let go: is one left, who may take it home, or none who asks what became of a dead one?"""
        share = record.share
        if share is None:
            return
        if share.relay is not None:
            if len(share.holders) == 1 and not share.public and not share.transit:
                self.engine.meta.bump_shares()
        elif not share.holders and record.place is Place.SHARED:
            self._drop(record)

    def application_ended(self, app: Application, *, reset: bool = False, left: bool = False) -> None:
        """The kernel has closed, or will close, its copies of the descriptors; the others go on."""
        super().application_ended(app, reset=reset, left=left)
        for number in list(app.sessions):
            self.release(app, number)

    # -- questions -----------------------------------------------------------------------------

    def status(self, app: Application, number: int) -> p.Info:
        """Names, state, and the pending error, which is cleared."""
        record = self._shared(app, number)
        error = record.engine_session.take_error() if record.engine_session is not None else 0
        return self.info(record, error)

    def info(self, record: SessionRecord, error: int = 0) -> p.Info:
        """What HOLD and STATUS tell."""
        share, session = record.share, record.engine_session
        assert share is not None
        raddr, rport = record.peer or ("0.0.0.0", 0)
        state = session.state if session is not None and record.protocol == TCP else STATES[0]
        return p.Info(
            error=0,
            session=record.number,
            protocol=record.protocol,
            laddr=record.laddr,
            lport=record.lport,
            raddr=raddr,
            rport=rport,
            state=STATES.index(state),
            listening=share.what is Place.LISTENING,
            named=record.name.explicit,
            wildcard=record.name.addr in WILDCARDS,
            eof=share.relay is None or share.relay.eof,
            so_error=error,
        )

    def option(self, app: Application, request: p.Option) -> int:
        """Set or ask; the value then."""
        session = self._shared(app, request.session).engine_session
        if session is None:
            raise Refusal(errno.EINVAL, "it has ended")
        if request.change:
            session.setopt(request.level, request.name, request.value)
            _bound(session)
            return request.value
        return session.getopt(request.level, request.name)

    def _shared(self, app: Application, number: int) -> SessionRecord:
        record = app.sessions.get(number)
        if record is None or record.share is None:
            raise Refusal(errno.EBADF, f"session {number:#x} is not shared, or has ended")
        return record

    # -- ends ----------------------------------------------------------------------------------

    def _obey(self, kind: int, record: SessionRecord, value: int) -> None:
        share = record.share
        if share is None:
            super()._obey(kind, record, value)
        elif kind == EV_RELAY:
            self._on_relay(record, share, value)
        elif kind == EV_ACCEPTED:
            self._announce(record)
        elif kind in (EV_CONNECTED, EV_FAILED) and share.what is Place.CONNECTING:
            self._connected_shared(record, 0 if kind == EV_CONNECTED else value or errno.ECONNABORTED)

    def _on_relay(self, record: SessionRecord, share: Share, news: int) -> None:
        if share.relay is None:
            return
        if news & NEWS_HUNG:
            self._hung_up(record, reset=bool(news & NEWS_RESET))
        elif news & NEWS_ENDED:
            # The descriptor's users see the end; why it came they ask for.
            self._close_relay(share)
            self.counters["shared_died"] += 1
            self._left(record)
        elif news & NEWS_ROOM:
            self._announce(record)

    def _hung_up(self, record: SessionRecord, *, reset: bool) -> None:
        """No copy of the descriptor is left, or nothing can go through it any more: as by close()."""
        share, session = record.share, record.engine_session
        assert share is not None and session is not None
        self._close_relay(share)
        self.counters["shared_closed"] += 1
        if record.protocol != TCP or share.what is not Place.APPLICATION:
            self._end(record, reset=True)  # it has no peer, or none that was ever answered
            return
        record.place = Place.SERVER
        self.engine.close_session(session, linger_abort=reset)

    def _close_relay(self, share: Share) -> None:
        if share.relay is not None:
            self._count(share)
            share.relay.close()
            share.relay = None

    def _count(self, share: Share) -> None:
        assert share.relay is not None
        for name, value in share.relay.counters().items():
            self.counters[f"relay_{name}"] += value

    def _drop(self, record: SessionRecord, quarantine_ns: int = 0) -> None:
        share = record.share
        if share is not None:
            self._close_relay(share)
            self._forget_share(record)
            for holder in share.holders:
                holder.sessions.pop(record.number, None)
            share.holders.clear()
            for connection in [*(row[0] for row in share.announced.values()), *share.waiting]:
                self._end(connection, reset=True)  # nobody will accept it: reset, as in BSD
        listener, record.listener = record.listener, None
        if listener is not None and listener.share is not None:
            listener.share.announced.pop(record.number, None)
            with suppress(ValueError):
                listener.share.waiting.remove(record)
        super()._drop(record, quarantine_ns)

    # -- the loop ------------------------------------------------------------------------------

    def run_relays(self) -> None:
        """Move data, and do what is due."""
        self._retry_ms = max(self.relays.run(), 0)
        if self._unclaimed:
            now = time.monotonic_ns()
            if now - self._checked_ns >= CHECK_NS:
                self._checked_ns = now
                self._check_claims(now)

    def wait_s(self) -> float | None:
        """When ``run_relays`` and ``drive`` are needed again, should no descriptor say so before. None: then only."""
        waits = [super().wait_s()]
        if self.relays.pending:
            waits.append(self._retry_ms / 1e3)
        if self._unclaimed:
            waits.append(max(0.0, (self._checked_ns + CHECK_NS - time.monotonic_ns()) / 1e9))
        return min((wait for wait in waits if wait is not None), default=None)

    def totals(self) -> dict[str, Any]:
        """With the sizes of the tables here."""
        shared = sum(r.share is not None and r.share.relay is not None for r in self.records.values())
        return super().totals() | {"shared": shared, "heirs": len(self.heirs)}

    def relayed(self) -> dict[str, int]:
        """What the relays of today have moved; those that ended are in ``counters``."""
        total: dict[str, int] = {}
        for record in self.records.values():
            if record.share is not None and record.share.relay is not None:
                for name, value in record.share.relay.counters().items():
                    total[f"relay_{name}"] = total.get(f"relay_{name}", 0) + value
        return total


def _bound(session: Session) -> None:
    for name in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        if session.getopt(socket.SOL_SOCKET, name) > BUFFER_MAX_BYTES:
            session.setopt(socket.SOL_SOCKET, name, BUFFER_MAX_BYTES)


def _identity(fd: int, kind: int) -> tuple[int, int]:
    """What file a descriptor is of; Refusal unless it is an AF_UNIX socket of this type."""
    info = os.fstat(fd)
    if stat.S_ISSOCK(info.st_mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            domain = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
            if domain == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == kind:
                return info.st_dev, info.st_ino
    raise Refusal(errno.ENOTSOCK, "a descriptor that is no AF_UNIX socket of the session's type", violation=True)
