"""The session table: names, handshakes, hand-over to applications and back, clean-up (SOSP 1993 sections 3.1 and 3.2).

Call order, TCP: ``bind`` -> ``connect`` (-> ``done``) or ``listen`` (-> ``deliver``) -> ``take_back`` or ``forget``.
``drive`` after each poll of the engine. No messages and no descriptors here; every refusal is a ``Refusal``.

A hand-over never loses a segment: the flow is turned to the new holder first, then the old holder's ring is drained,
then the state moves. What still arrives in the old place is forwarded. The guard is in place before the state leaves.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from ulnet.kernelshim.demux import Demux
from ulnet.kernelshim.guard import Guard
from ulnet.netserver.flows import FlowTable, flow_of_stray, wire
from ulnet.netserver.records import TCP, UDP, Application, Flow, Place, Refusal, SessionRecord
from ulnet.stack import protocol as p
from ulnet.stack.engine import EV_ACCEPTED, EV_CONNECTED, EV_FAILED, EV_GONE, Engine
from ulnet.stack.ports import WILDCARDS, PortTable
from ulnet.stack.session import Session
from ulnet.stack.statpage import StatRecord

log = logging.getLogger("ulnet.netserver")

SESSIONS_PER_APPLICATION: Final = 16_384  # records of a status page
QUARANTINE_NS: Final = 60_000_000_000  # RFC 9293 (3.4.1) asks for 2 MSL; 60 s as Linux's TIME-WAIT
EARLY_FRAMES: Final = 64
FORMER_NS: Final = 10_000_000_000  # a library forwards frames of what it gave away for 2 s; messages take their time
TCP_CLOSED: Final = 0  # tcp_stat.state
DOUBT_NS: Final = 1_000_000_000  # and some RTOs: how long a dead application's last bytes may stay unacknowledged
DOUBT_MAX_NS: Final = 10_000_000_000
_UNACKNOWLEDGED: Final = frozenset(("FIN-WAIT-1", "CLOSING", "LAST-ACK"))


class SessionTable:
    """Every session of the served address that a record exists for.

    ``deliver(application, listener, number, state)`` is called with accepted sessions and returns False when the
    application cannot be reached; ``forward(application, frames)`` with strays for it.
    """

    def __init__(
        self,
        address: str,
        engine: Engine,
        demux: Demux,
        guard: Guard,
        deliver: Callable[[Application, SessionRecord, int, bytes], bool],
        forward: Callable[[Application, list[bytes]], None],
    ) -> None:
        self.address = address
        self.engine = engine
        self.demux = demux
        self.guard = guard
        self.ports = PortTable([address])
        self.counters: Counter[str] = Counter()
        self.records: dict[int, SessionRecord] = {}
        self._flows = FlowTable()  # sessions with a peer, wherever they are
        self._numbers = 0  # of connections accepted for nobody in particular
        self._deliver = deliver
        self._events: deque[tuple[int, Session, int]] = deque()
        self._forward = forward
        self._doubtful: deque[tuple[int, Session]] = deque()  # until when their FIN must be acknowledged
        engine.collect_events = True
        engine.on_strays = self._strays_from_engine

    # -- calls ---------------------------------------------------------------------------------

    def bind(self, app: Application, request: p.Bind) -> SessionRecord:
        """Name a local endpoint. UDP sessions migrate here."""
        self._check_new(app, request.session, request.protocol)
        wildcard = request.address in WILDCARDS
        name = self.ports.bind(
            request.protocol,
            request.address,
            request.port,
            now_ns=time.monotonic_ns(),
            uid=app.sender.uid,
            privileged=app.sender.uid == 0,
            reuse_address=request.reuse_address,
            reuse_port=request.reuse_port,
        )
        laddr = self.address if wildcard else request.address
        record = SessionRecord(request.session, request.protocol, app, Place.NAMED, name, laddr)
        self._enter(record)
        if record.protocol == UDP:
            try:
                self._open_udp(record)
            except BaseException:
                self._drop(record)
                raise
        return record

    def connect(
        self, app: Application, request: p.Connect, done: Callable[[SessionRecord, int, bytes], None]
    ) -> SessionRecord:
        """TCP: start the handshake; ``done`` is called later, with the state once the application holds the session.
        UDP: name the peer; done at once, and ``done`` is not called."""
        peer = self._check_peer(request)
        record = app.sessions.get(request.session)
        now = time.monotonic_ns()
        if record is None:
            self._check_new(app, request.session, request.protocol)
            name = self.ports.choose(request.protocol, self.address, *peer, now_ns=now, uid=app.sender.uid)
            record = SessionRecord(request.session, request.protocol, app, Place.NAMED, name, self.address)
            self._enter(record)
        elif record.protocol != request.protocol:
            raise Refusal(errno.EPROTOTYPE, "the session is of another protocol", violation=True)
        elif record.protocol == UDP:
            self._narrow_udp(record, peer, now)
            return record
        elif record.place is not Place.NAMED:
            raise Refusal(errno.EISCONN, f"the session is {record.place.value} already")
        else:
            self.ports.connect(record.name, record.laddr, *peer, now_ns=now)
        record.peer = peer
        try:
            if record.protocol == UDP:
                self._open_udp(record)
            else:
                self._open_tcp(record, done)
        except BaseException:
            self._connect_failed(record)
            raise
        return record

    def listen(self, app: Application, request: p.Listen) -> None:
        """Answer connection requests; called again, change the backlog."""
        record = self._own(app, request.session)
        backlog = min(max(request.backlog, 1), p.MAX_BACKLOG)
        if record.place is Place.LISTENING:
            assert record.engine_session is not None
            self.engine.set_backlog(record.engine_session, backlog)
            record.credit += backlog - record.backlog
            record.backlog = backlog
            self._pump(record)
            return
        if record.place is not Place.NAMED or record.protocol != TCP:
            raise Refusal(errno.EINVAL, f"a session that is {record.place.value} cannot listen")
        self.ports.listen(record.name)
        session = self.engine.new_session(TCP)
        session.session_id = record.number
        try:
            # One guard element for the endpoint serves every connection accepted there.
            self._guard(record)
            self.engine.listen(session, record.laddr, record.lport, backlog)
        except BaseException:
            self._drop(record)
            raise
        record.engine_session = session
        record.place = Place.LISTENING
        record.backlog = record.credit = backlog

    def accepted(self, app: Application, request: p.Accepted) -> None:
        """Credits come back: so many more sessions may be pushed."""
        record = self._own(app, request.session)
        if record.place is not Place.LISTENING or request.count > record.backlog - record.credit:
            raise Refusal(errno.EINVAL, f"{request.count} credits were never out", violation=True)
        record.credit += request.count
        self._pump(record)

    def take_back(self, app: Application, number: int, state: bytes | memoryview) -> None:
        """A TCP session returns: the server runs it to its end."""
        record = self._own(app, number)
        if record.place is not Place.APPLICATION or record.protocol != TCP:
            raise Refusal(errno.EINVAL, f"a session that is {record.place.value} cannot be returned", violation=True)
        session = self._import(app, record, state)
        app.sessions.pop(number)
        record.place = Place.SERVER
        record.engine_session = None  # the engine finishes by itself and says EV_GONE
        self._replay_early(record)
        self.engine.close_session(session)
        self.counters["returned"] += 1

    def forget(self, app: Application, request: p.Forget) -> None:
        """The session has ended in the application (``reset``: it never took it, the peer must hear)."""
        record = app.sessions.get(request.session)
        if record is None:
            # Honest: a connect failed while its socket was closed.
            self.counters["forgotten_unknown"] += 1
            return
        if record.owner is not app:
            raise Refusal(errno.EINVAL, f"{record} is shared: release it", violation=True)
        self._end(record, reset=request.reset)

    def strays(self, app: Application, frames: Sequence[bytes]) -> None:
        """Frames that reached the application after it gave their session back."""
        for frame in frames:
            flow = flow_of_stray(frame)
            record = self._record_of(flow)
            lately = record is not None and record.former.get(app.serial, 0) > time.monotonic_ns()
            if record is not None and record.owner is app and not lately and len(record.early) < EARLY_FRAMES:
                record.early.append(frame)
            elif record is None or not lately:
                self.counters["strays_refused"] += 1
            elif record.owner is None:
                self.counters["strays_in"] += 1
                self.engine.inject(frame)
            else:  # another application has it now, or the same one again
                self.counters["strays_out"] += 1
                self._forward(record.owner, [frame])

    def application_ended(self, app: Application, *, reset: bool = False, left: bool = False) -> None:
        """Its death, or its leave (``left``). A connection of which nothing is lost ends in order, as the kernel has
        it; the peers of others are reset and the reuse of those endpoints delayed. ``reset``: the peers of all."""
        last = self._last_records(app)
        for record in list(app.sessions.values()):
            # UDP has no connection that old packets could disturb: a server that crashed may bind again at once.
            quarantine_ns = QUARANTINE_NS if record.protocol == TCP else 0
            if record.owner is not app:
                continue  # shared: the others go on with it
            if not reset and self._finish(record, last.get(record.number)):
                continue
            self._end(record, reset=True, quarantine_ns=quarantine_ns, last=last.get(record.number))

    def _last_records(self, app: Application) -> dict[int, StatRecord]:
        try:
            return {row.session_id: row for row in app.stats.records()}
        except ValueError as error:  # what stands there is the application's; without it the hand-over's numbers serve
            log.warning("status page of %s: %s", app, error)
            return {}

    def _finish(self, record: SessionRecord, last: StatRecord | None) -> bool:
        """FIN for a connection whose application is dead, by the numbers of its last status record. False: not so,
        for data was lost: the peer must not take what it got for everything (RFC 2525 2.17)."""
        if record.place is not Place.APPLICATION or record.protocol != TCP or last is None or not last.settled:
            return False
        assert record.peer is not None
        session = self.engine.new_session(TCP)
        self._forget_foreign(record)
        try:
            in_doubt = self.engine.revive_session(
                session, record.laddr, record.lport, *record.peer, last.raw, record.number
            )
        except (OSError, ValueError) as error:
            log.debug("%s ends by a reset: %s", record, error)
            return False
        self._leave_owner(record)
        self.engine.close_session(session)
        self.counters["finished"] += 1
        if in_doubt:
            wait_ns = min(DOUBT_NS + 3 * last.rto_ns, DOUBT_MAX_NS)
            self._doubtful.append((time.monotonic_ns() + wait_ns, session))
        return True

    def _leave_owner(self, record: SessionRecord) -> None:
        """The engine runs it to its end for nobody and says EV_GONE."""
        self._turn_back(record)
        self._unguard(record)
        if record.owner is not None:
            record.owner.sessions.pop(record.number, None)
        record.owner = None
        record.place = Place.SERVER
        record.engine_session = None

    def _check_doubtful(self) -> None:
        """Who has not acknowledged the FIN misses bytes that nobody has any more."""
        now = time.monotonic_ns()
        while self._doubtful and self._doubtful[0][0] <= now:
            session = self._doubtful.popleft()[1]
            if session.state in _UNACKNOWLEDGED:
                self.engine.close_session(session, linger_abort=True)
                self.counters["reset"] += 1

    def wait_s(self) -> float | None:
        """When ``drive`` is needed again, should nothing happen before. None: not at all."""
        return max(0.0, (self._doubtful[0][0] - time.monotonic_ns()) / 1e9) if self._doubtful else None

    # -- the engine's side ---------------------------------------------------------------------

    def drive(self) -> None:
        """Obey the engine's events. Each may cause more, so until there are none."""
        if self._doubtful:
            self._check_doubtful()
        self._collect()
        while self._events:
            kind, session, value = self._events.popleft()
            record = self.records.get(session.session_id)
            if record is not None:
                self._obey(kind, record, value)
            self._collect()

    def _obey(self, kind: int, record: SessionRecord, value: int) -> None:
        if kind == EV_CONNECTED and record.place is Place.CONNECTING:
            self._on_connected(record)
        elif kind == EV_FAILED and record.place is Place.CONNECTING:
            self._on_failed(record, value)
        elif kind == EV_ACCEPTED and record.place is Place.LISTENING:
            self._pump(record)

    def _collect(self) -> None:
        """Fetch the engine's events. What is gone leaves the tables at once, before a new connection has its names."""
        for kind, session, value in self.engine.events():
            if kind == EV_GONE:
                record = self.records.get(value)
                if record is not None and record.place is Place.SERVER:
                    self._drop(record)
            elif session is not None:
                self._events.append((kind, session, value))

    def _on_connected(self, record: SessionRecord) -> None:
        done, record.done = record.done, None
        assert done is not None
        try:
            state = self._hand_over(record)
        except OSError as error:
            self._connect_failed(record)
            done(record, error.errno or errno.ECONNABORTED, b"")
            return
        done(record, 0, state)

    def _on_failed(self, record: SessionRecord, error: int) -> None:
        done, record.done = record.done, None
        self._connect_failed(record)
        if done is not None:
            done(record, error or errno.ECONNABORTED, b"")

    def unreachable(self, record: SessionRecord, error: int) -> None:
        """Nobody answers where a connecting session's packets would go."""
        if record.place is Place.CONNECTING and record.engine_session is not None and record.done is not None:
            done, record.done = record.done, None
            self._connect_failed(record)
            done(record, error, b"")

    def _pump(self, listener: SessionRecord) -> None:
        """Push established sessions as far as the credit goes; the rest wait in the engine's queue."""
        app = listener.owner
        assert app is not None
        while listener.credit > 0 and (record := self._accept(listener)) is not None:
            self._push(app, listener, record)

    def _push(self, app: Application, listener: SessionRecord, record: SessionRecord) -> None:
        try:
            state = self._hand_over(record)
        except OSError as error:
            log.warning("session %s could not be handed over: %s", record, error)
            self._end(record, reset=True)
            return
        listener.credit -= 1
        if self._deliver(app, listener, record.number, state):
            self.counters["delivered"] += 1
        else:
            self._end(record, reset=True)

    def _accept(self, listener: SessionRecord) -> SessionRecord | None:
        """The oldest established session of a listener's queue, with its name; its owner is the listener's, if any."""
        app, queue = listener.owner, listener.engine_session
        assert queue is not None
        while (session := self.engine.accept(queue)) is not None:
            self._collect()
            if not session.live or session.peer is None:
                self.counters["accepted_dead"] += 1
                continue
            if app is not None and len(app.sessions) >= SESSIONS_PER_APPLICATION:
                self.counters["accepted_refused"] += 1
                self.engine.close_session(session, linger_abort=True)
                continue
            try:
                name = self.ports.accept(listener.name, listener.laddr, *session.peer, now_ns=time.monotonic_ns())
            except OSError as error:
                log.warning("accepted session from %s:%d dropped: %s", *session.peer, error)
                self.counters["accepted_refused"] += 1
                self.engine.close_session(session, linger_abort=True)
                continue
            session.session_id = number = self._number_for(app)
            record = SessionRecord(number, TCP, app, Place.CONNECTING, name, listener.laddr, session.peer, session)
            self._enter(record)
            self._flows[record.key] = record
            return record
        return None

    def _number_for(self, app: Application | None) -> int:
        """A number of the server's half. No application has serial 0."""
        if app is None:
            self._numbers = self._numbers % (p.SERVER_NUMBER - 1) + 1
            return p.SERVER_NUMBER | self._numbers
        app.numbers = app.numbers % (p.SERVER_NUMBER - 1) + 1
        return app.serial << 32 | p.SERVER_NUMBER | app.numbers

    def _strays_from_engine(self, frames: list[bytes]) -> None:
        """Frames that were in the server's ring when their session was handed over."""
        batches: dict[Application, list[bytes]] = {}
        for frame in frames:
            flow = flow_of_stray(frame)
            record = self._record_of(flow)
            if record is None or record.owner is None or record.place is not Place.APPLICATION:
                self.counters["strays_lost"] += 1
            else:
                batches.setdefault(record.owner, []).append(frame)
        for app, batch in batches.items():
            self.counters["strays_out"] += len(batch)
            self._forward(app, batch)

    # -- moving --------------------------------------------------------------------------------

    def _record_of(self, flow: Flow | None) -> SessionRecord | None:
        if flow is None:
            return None
        record = self._flows.get(flow)
        if record is None and flow[0] == UDP:  # from anybody
            record = self._flows.get((*flow[:3], "", 0))
        return record

    def _import(self, app: Application, record: SessionRecord, state: bytes | memoryview) -> Session:
        """Into the engine with what an application gave back. Rubbish costs it the session."""
        session = self.engine.new_session(record.protocol)
        try:
            protocol, laddr, lport, raddr, rport = p.flow_of_state(state)
            if (protocol, laddr, lport, raddr if rport else "", rport) != record.key:
                raise ValueError("it is another session's")
            # The state first, then the flow: in between frames reach the application, which forwards them.
            self._forget_foreign(record)
            self.engine.import_session(session, state, record.number)
        except (OSError, ValueError) as error:
            self._end(record, reset=True)
            raise Refusal(errno.EINVAL, f"the state of {record} is not valid: {error}", violation=True) from None
        if record.protocol == TCP:
            self._leave_application(app, record)
        elif record.flow is not None:
            # It stays in the map: another holder of the port may take datagrams from everybody.
            self.demux.move_flow(*wire(record.flow), 0)
        self._unguard(record)
        record.owner = None
        now = time.monotonic_ns()
        record.former = {serial: until for serial, until in record.former.items() if until > now}
        record.former[app.serial] = now + FORMER_NS
        return session

    def _leave_application(self, app: Application, record: SessionRecord) -> None:
        """The packets of a TCP connection come here from now on."""
        self._turn_back(record)

    def _replay_early(self, record: SessionRecord) -> None:
        early, record.early = record.early, []
        for frame in early:
            self.engine.inject(frame)

    def _hand_over(self, record: SessionRecord) -> bytes:
        """The state of an established session; from here on the owner's library manages it."""
        session, app = record.engine_session, record.owner
        assert session is not None and app is not None
        self._guard(record)
        self._turn(record)
        self.engine.poll()  # drain the server's ring: what came before the turn belongs into the state
        if not session.live:
            raise OSError(session.take_error() or errno.ECONNRESET, "ended during the hand-over")
        if record.protocol == TCP:
            stat = session.stat()
            record.snd_nxt, record.rcv_nxt = stat["snd_nxt"], stat["rcv_nxt"]
        state = self.engine.export_session(session)
        record.engine_session = None
        record.place = Place.APPLICATION
        self.counters["handed_over"] += 1
        return state

    def _open_tcp(self, record: SessionRecord, done: Callable[[SessionRecord, int, bytes], None]) -> None:
        assert record.peer is not None
        session = self.engine.new_session(TCP)
        session.session_id = record.number
        self.engine.open_tcp(session, record.laddr, record.lport, *record.peer)
        record.engine_session = session
        record.place = Place.CONNECTING
        record.done = done
        self._flows[record.key] = record

    def _open_udp(self, record: SessionRecord) -> None:
        if record.key in self._flows:
            # SO_REUSEPORT shares a name, but a flow has one holder.
            raise Refusal(errno.EADDRINUSE, f"{record} has a holder already")
        self._guard(record)
        self._flows[record.key] = record
        self._turn(record)
        record.place = Place.APPLICATION

    def _narrow_udp(self, record: SessionRecord, peer: tuple[str, int], now_ns: int) -> None:
        """UDP connect (again): from every peer, or the last one, to this one."""
        key = (UDP, record.laddr, record.lport, *peer)
        if self._flows.get(key, record) is not record:
            raise Refusal(errno.EADDRINUSE, f"{record} to {peer[0]}:{peer[1]} has a holder already")
        self.ports.connect(record.name, record.laddr, *peer, now_ns=now_ns)
        old = record.key
        if old == key:
            return
        if record.share is not None:
            assert record.engine_session is not None
            self.engine.open_udp(record.engine_session, record.laddr, record.lport, *peer)
        self._forget_foreign(record)
        self.demux.add_flow(*wire(key), self._channel(record))
        self.demux.remove_flow(*wire(old))
        self._flows.pop(old, None)
        record.peer = peer
        record.flow = key
        self._flows[key] = record

    def _turn(self, record: SessionRecord) -> None:
        lead = self.demux.add_flow if record.flow is None else self.demux.move_flow
        lead(*wire(record.key), self._channel(record))
        record.flow = record.key

    def _turn_back(self, record: SessionRecord) -> None:
        if record.flow is not None:
            flow, record.flow = record.flow, None
            self.demux.remove_flow(*wire(flow))

    def _channel(self, record: SessionRecord) -> int:
        return record.owner.channel.channel_id if record.owner is not None else 0

    def _guard(self, record: SessionRecord) -> None:
        app = record.owner
        assert app is not None
        endpoint = (record.protocol, record.laddr, record.lport)
        if not app.guarded[endpoint]:
            self.guard.allow(app.channel.channel_id, *endpoint)
        app.guarded[endpoint] += 1
        record.guarded = True

    def _unguard(self, record: SessionRecord) -> None:
        app = record.owner
        if not record.guarded or app is None:
            return
        record.guarded = False
        self._release_guard(app, (record.protocol, record.laddr, record.lport))

    def _release_guard(self, app: Application, endpoint: tuple[int, str, int]) -> None:
        app.guarded[endpoint] -= 1
        if app.guarded[endpoint] <= 0:
            del app.guarded[endpoint]
            self.guard.revoke(app.channel.channel_id, *endpoint)

    # -- ending --------------------------------------------------------------------------------

    def _end(
        self, record: SessionRecord, *, reset: bool, quarantine_ns: int = 0, last: StatRecord | None = None
    ) -> None:
        """A session ends out of turn, wherever it is. ``last``: its status record, where it is known already."""
        held = record.place is Place.APPLICATION and record.protocol == TCP
        done, record.done = record.done, None
        if record.place in (Place.CONNECTING, Place.LISTENING, Place.SHARED):
            if record.engine_session is not None and record.engine_session.live:
                self.engine.close_session(record.engine_session, linger_abort=True)
        elif held:
            if reset and record.owner is not None:
                self._leave_application(record.owner, record)  # what the peer says from now on meets the server's RST
            else:
                self._turn_back(record)
            self._forget_foreign(record)
            if reset:
                self._reset(record, last)
        if record.place is Place.LISTENING or record.place is Place.SHARED:
            quarantine_ns = 0  # no stream, nothing that could be taken for an old segment
        self._drop(record, quarantine_ns)
        if done is not None:
            done(record, errno.ECONNABORTED, b"")

    def _reset(self, record: SessionRecord, last: StatRecord | None = None) -> None:
        """RST with the numbers the library stood at, so that the peer obeys at once (RFC 5961 3.2)."""
        assert record.owner is not None and record.peer is not None
        last = last or record.owner.stats.record_for(record.number)
        snd_nxt, rcv_nxt = record.snd_nxt, record.rcv_nxt
        if last is not None:
            if last.state == TCP_CLOSED and last.settled:
                return
            if last.state != TCP_CLOSED:  # else it was never written
                snd_nxt, rcv_nxt = last.snd_nxt, last.rcv_nxt
        self.engine.abort_flow(record.laddr, record.lport, *record.peer, snd_nxt, rcv_nxt)
        self.counters["reset"] += 1

    def _connect_failed(self, record: SessionRecord) -> None:
        """Back to the name, where the application had given one; else nothing is left."""
        if record.engine_session is not None and record.engine_session.live:
            self.engine.close_session(record.engine_session, linger_abort=True)
        record.engine_session = None
        if not record.name.explicit or record.protocol == UDP:
            self._drop(record)
            return
        self._turn_back(record)
        self._unguard(record)
        self._flows.pop(record.key, None)
        self.ports.disconnect(record.name)
        record.peer = None
        record.place = Place.NAMED

    def _forget_foreign(self, record: SessionRecord) -> None:
        raddr, rport = record.peer or (None, 0)
        self.engine.forget_flow(record.protocol, record.laddr, record.lport, raddr, rport)

    def _enter(self, record: SessionRecord) -> None:
        self.records[record.number] = record
        if record.owner is not None:
            record.owner.sessions[record.number] = record

    def _drop(self, record: SessionRecord, quarantine_ns: int = 0) -> None:
        """Out of every table. Each step stands alone: one that fails must not keep the others."""
        for step in (self._turn_back, self._unguard):
            try:
                step(record)
            except (OSError, KeyError) as error:
                self.counters["drop_failed"] += 1
                log.error("%s of %s: %s", step.__name__, record, error)
        if self._flows.get(record.key) is record:
            del self._flows[record.key]
            if record.protocol == UDP:
                self._forget_foreign(record)
        self.records.pop(record.number, None)
        if record.owner is not None:
            record.owner.sessions.pop(record.number, None)
        record.engine_session = None
        self.ports.release(record.name, now_ns=time.monotonic_ns(), quarantine_ns=quarantine_ns)

    # -- checks --------------------------------------------------------------------------------

    def _own(self, app: Application, number: int) -> SessionRecord:
        record = app.sessions.get(number)
        if record is None:
            raise Refusal(errno.EBADF, f"session {number:#x} is not one of yours", violation=True)
        return record

    def _check_new(self, app: Application, number: int, protocol: int) -> None:
        if number >> 32 != app.serial or not 0 < number & 0xFFFFFFFF < p.SERVER_NUMBER:
            raise Refusal(errno.EBADF, f"session number {number:#x} is not one of yours", violation=True)
        if number in self.records:
            raise Refusal(errno.EINVAL, f"session {number:#x} exists already")
        if protocol not in (TCP, UDP):
            raise Refusal(errno.EPROTONOSUPPORT, f"protocol {protocol} is not served, 6 and 17 are", violation=True)
        if len(app.sessions) >= SESSIONS_PER_APPLICATION:
            raise Refusal(errno.EMFILE, f"{SESSIONS_PER_APPLICATION} sessions are open: close some")

    def _check_peer(self, request: p.Connect) -> tuple[str, int]:
        address = ipaddress.ip_address(request.address)
        if address.version != 4:
            raise Refusal(errno.EAFNOSUPPORT, f"{address} is not an IPv4 address")
        if address.is_unspecified:  # BSD: this host
            address = ipaddress.ip_address(self.address)
        if request.port == 0:
            raise Refusal(errno.EADDRNOTAVAIL if request.protocol == TCP else errno.EINVAL, "port 0 is no peer's port")
        if request.protocol == TCP and (address.is_multicast or str(address) == "255.255.255.255"):
            raise Refusal(errno.ENETUNREACH, f"TCP has one peer; {address} are many")
        return str(address), request.port

    # -- telling -------------------------------------------------------------------------------

    def totals(self) -> dict[str, Any]:
        """Sizes of the tables, for `ulnet counters` and for tests that nothing is left."""
        return {
            "sessions": len(self.records),
            "flows": len(self.demux.flows()),
            "guarded": len(self.guard.allowed()),
            "names": len(self.ports),
            "quarantined": len(self.ports.quarantined()),
            "engine_flows": self.engine.counters()["flows"],
        }
