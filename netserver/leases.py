"""Ports that applications manage by themselves: leased ones to connect from, and those where only they listen.

Packets of such a port go to the application's channel, whatever their peer; its library does the handshakes and the
ends (stack/leasing.py). The server knows those connections only once they are declared, or from the status page of an
application that died. differs: in SOSP 1993 (3.1) the server does every handshake.

Call order: ``lease`` or ``listen``; ``declare`` before any other call about a connection made there.
A port's own flow stands behind the flows of single connections: what the server manages there has one, to itself.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from ulnet.netserver.flows import flow_of_stray, is_request, wire
from ulnet.netserver.records import TCP, Application, Flow, Place, Refusal, SessionRecord
from ulnet.netserver.sessions import FORMER_NS, QUARANTINE_NS, SESSIONS_PER_APPLICATION, SessionTable
from ulnet.stack import protocol as p
from ulnet.stack.ports import Name
from ulnet.stack.statpage import StatRecord

log = logging.getLogger("ulnet.netserver")

LEASE_MOST: Final = 256  # ports in one call: one transaction of the guard
LEASES_PER_APPLICATION: Final = 4096
LEASES_CLASSIC: Final = 16  # without eBPF all flows stand in one program of some 500


class LeaseTable(SessionTable):
    """A SessionTable with ports that applications manage."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Ports whose packets an application gets, whoever sends them, and the name that its connections share.
        self._own_ports: dict[tuple[str, int], tuple[Application, Name]] = {}
        self._moved: dict[tuple[str, int], SessionRecord] = {}  # listeners that were an application's own until shared

    # -- leasing -------------------------------------------------------------------------------

    def lease(self, app: Application, request: p.Lease) -> list[int]:
        """Local ports for connections that the application makes by itself. EADDRNOTAVAIL: it gets no more."""
        most = LEASES_PER_APPLICATION if self.demux.ebpf else LEASES_CLASSIC
        count = min(request.count, LEASE_MOST, most - len(app.leases))
        if count <= 0:
            raise Refusal(errno.EADDRNOTAVAIL, f"{len(app.leases)} ports are leased to you already")
        names = self.ports.lease(self.address, count, now_ns=time.monotonic_ns(), uid=app.sender.uid)
        try:
            endpoints = [(TCP, self.address, name.port) for name in names]
            self.guard.update(allow=((app.channel.channel_id, *endpoint) for endpoint in endpoints))
            for name, endpoint in zip(names, endpoints, strict=True):
                app.guarded[endpoint] += 1
                app.leases[name.port] = name
                self._lead(app, self.address, name)
        except BaseException:
            for name in names:
                if name.port in app.leases:
                    self._unlease(app, name.port)
                else:
                    self.ports.release(name, now_ns=time.monotonic_ns())
            raise
        self.counters["leased"] += len(names)
        return [name.port for name in names]

    def _unlease(self, app: Application, port: int, quarantine_ns: int = 0) -> None:
        """The port is everybody's again, but for connections on it, which have names of their own."""
        name = app.leases.pop(port)
        self._unlead(self.address, port)
        self._release_guard(app, (TCP, self.address, port))
        self.ports.release(name, now_ns=time.monotonic_ns(), quarantine_ns=quarantine_ns)

    def _lead(self, app: Application, laddr: str, name: Name) -> None:
        key = (laddr, name.port)
        if key in self._own_ports:
            # SO_REUSEPORT shares a name, but a flow has one holder.
            raise Refusal(errno.EADDRINUSE, f"port {name.port} of {laddr} has a listener already")
        self.demux.add_flow(*wire((TCP, laddr, name.port, "", 0)), app.channel.channel_id)
        self._own_ports[key] = app, name

    def _unlead(self, laddr: str, lport: int) -> None:
        if self._own_ports.pop((laddr, lport), None) is not None:
            self.demux.remove_flow(*wire((TCP, laddr, lport, "", 0)))

    # -- listening -----------------------------------------------------------------------------

    def listen(self, app: Application, request: p.Listen) -> None:
        """See SessionTable; ``local``: the application answers."""
        record = self._own(app, request.session)
        if not request.local or record.place is Place.LISTENING and not record.local:
            super().listen(app, request)
            return
        record.backlog = min(max(request.backlog, 1), p.MAX_BACKLOG)
        if record.place is Place.LISTENING:
            return
        if record.place is not Place.NAMED or record.protocol != TCP:
            raise Refusal(errno.EINVAL, f"a session that is {record.place.value} cannot listen")
        self.ports.listen(record.name)
        try:
            self._guard(record)
            self._lead_listener(app, record)
        except BaseException:
            self._drop(record)
            raise
        record.place = Place.LISTENING

    def _lead_listener(self, app: Application, record: SessionRecord) -> None:
        for other in self._beside(record):
            if other.flow is None:
                self._turn_to_server(other)
        self._lead(app, record.laddr, record.name)
        record.local = True
        self._moved.pop((record.laddr, record.lport), None)

    def _unlead_listener(self, record: SessionRecord) -> None:
        if record.local:
            record.local = False
            self._unlead(record.laddr, record.lport)
            for other in self._beside(record):
                if other.place is not Place.APPLICATION:
                    self._turn_back(other)

    def _beside(self, listener: SessionRecord) -> list[SessionRecord]:
        """The connections at a listener's local endpoint."""
        return self._flows.connections(listener.lport)

    def _turn_to_server(self, record: SessionRecord) -> None:
        """A flow of its own, led here: else its packets would go where its port's do."""
        lead = self.demux.add_flow if record.flow is None else self.demux.move_flow
        lead(*wire(record.key), 0)
        record.flow = record.key

    def take_listener(self, app: Application, record: SessionRecord) -> None:
        """A listener that the application runs comes to be run by the server's engine."""
        record.engine_session = session = self.engine.new_session(TCP)
        session.session_id = record.number
        self.engine.listen(session, record.laddr, record.lport, record.backlog)
        self._unlead_listener(record)
        self._moved[(record.laddr, record.lport)] = record
        record.former[app.serial] = time.monotonic_ns() + FORMER_NS

    def give_listener(self, app: Application, record: SessionRecord) -> tuple[list[SessionRecord], list[bytes]]:
        """The way back: connections that were waiting here, and the states of those whose handshake is under way."""
        session = record.engine_session
        assert session is not None
        self._guard(record)
        self._lead_listener(app, record)
        self.engine.poll()  # what came before the turn is answered here
        waiting = []
        while (connection := self._accept(record)) is not None:
            waiting.append(connection)
        embryos = self.engine.export_embryos(session)
        for state in embryos:
            self.engine.forget_flow(*p.flow_of_state(state))
        self.engine.close_session(session)
        record.engine_session = None
        return waiting, embryos

    def embryo(self, app: Application, request: p.Embryo, state: bytes | memoryview) -> None:
        """A connection whose handshake was under way when its listener was shared."""
        listener = app.sessions.get(request.listener)
        session = listener.engine_session if listener is not None else None
        flow: Flow = p.flow_of_state(state)
        if listener is None or session is None or flow[:3] != (TCP, listener.laddr, listener.lport):
            self.counters["embryos_lost"] += 1  # its peer tries again
            return
        try:
            if flow in self._flows:
                raise ValueError("it has a connection already")
            self.engine.deliver(session, state, 0)
        except (OSError, ValueError) as error:
            raise Refusal(errno.EINVAL, f"the state of a connection of {listener} is not valid: {error}") from None

    # -- connections made there ----------------------------------------------------------------

    def declare(self, app: Application, connections: Sequence[p.Connection]) -> None:
        """From now on the server knows them as it knows those that it has set up."""
        for connection in connections:
            if connection.session in app.sessions:
                continue  # two threads were about to share it
            if len(app.sessions) >= SESSIONS_PER_APPLICATION:
                raise Refusal(errno.EMFILE, f"{SESSIONS_PER_APPLICATION} sessions are open: close some")
            record = self._enroll(app, connection)
            try:
                self._guard(record)
                self._turn(record)
            except BaseException:
                self._drop(record)
                raise

    def _enroll(self, app: Application, connection: p.Connection) -> SessionRecord:
        number, lport, raddr, rport = connection
        self._check_new(app, number, TCP)
        holder = self._holder(app, lport)
        if holder is None or rport == 0 or ipaddress.ip_address(raddr).version != 4:
            raise Refusal(errno.EINVAL, f"port {lport} to {raddr}:{rport} is no connection of yours", violation=True)
        name = self.ports.accept(holder, self.address, raddr, rport, now_ns=time.monotonic_ns())
        record = SessionRecord(number, TCP, app, Place.APPLICATION, name, self.address, (raddr, rport))
        self._enter(record)
        self._flows[record.key] = record
        self.counters["declared"] += 1
        return record

    def _holder(self, app: Application, lport: int) -> Name | None:
        """The name that connections at one of the application's own ports share."""
        owner, name = self._own_ports.get((self.address, lport), (None, None))
        return name if owner is app else None

    # -- moving and ending ---------------------------------------------------------------------

    def _leave_application(self, app: Application, record: SessionRecord) -> None:
        """See SessionTable. A leased port goes with its connection, which has it alone."""
        if record.lport in app.leases:
            self._unlease(app, record.lport)
        if (record.laddr, record.lport) in self._own_ports:
            self._turn_to_server(record)
        else:
            super()._leave_application(app, record)

    def strays(self, app: Application, frames: Sequence[bytes]) -> None:
        """See SessionTable. Connection requests for a listener that was shared a moment ago are answered here."""
        rest = []
        for frame in frames:
            flow = flow_of_stray(frame)
            listener = self._moved.get(flow[1:3]) if flow is not None and flow not in self._flows else None
            if flow is None or listener is None or listener.former.get(app.serial, 0) <= time.monotonic_ns():
                rest.append(frame)
            elif is_request(frame) or self.engine.knows_flow(*flow):
                self.counters["strays_in"] += 1
                self.engine.inject(frame)
            else:  # ahead of its state: refused here, it would end the connection; it comes again
                self.counters["strays_early"] += 1
        super().strays(app, rest)

    def _drop(self, record: SessionRecord, quarantine_ns: int = 0) -> None:
        self._unlead_listener(record)
        if self._moved.get((record.laddr, record.lport)) is record:
            del self._moved[(record.laddr, record.lport)]
        super()._drop(record, quarantine_ns)

    def application_ended(self, app: Application, *, reset: bool = False, left: bool = False) -> None:
        """See SessionTable. Connections that only its status page knows are found there."""
        for row in self._last_records(app).values():
            if row.session_id not in app.sessions and row.proto == TCP and row.laddr == self.address:
                try:
                    self._enroll(app, p.Connection(row.session_id, row.lport, row.raddr, row.rport))
                except OSError as error:
                    self.counters["undeclared_lost"] += 1
                    log.debug("a connection of %s that only its status page knows: %s", app, error)
        for laddr, lport in [key for key, (owner, _) in self._own_ports.items() if owner is app]:
            self._unlead(laddr, lport)
        super().application_ended(app, reset=reset, left=left)
        for port in list(app.leases):
            self._unlease(app, port, 0 if left else QUARANTINE_NS)

    def totals(self) -> dict[str, Any]:
        """See SessionTable; leased ports are counted apart."""
        sizes = super().totals()
        leased = sum(name.state == "leased" for _, name in self._own_ports.values())
        return sizes | {name: sizes[name] - leased for name in ("flows", "guarded", "names")} | {"leased": leased}

    def undeclared(self, app: Application) -> list[StatRecord]:
        """Its connections that the server has no record of, as its status page has them."""
        return [
            row
            for row in self._last_records(app).values()
            if row.session_id not in self.records and row.proto == TCP and self._holder(app, row.lport) is not None
        ]
