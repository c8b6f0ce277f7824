"""Connections that the library sets up by itself, on local ports that the server has leased to it.

``connect`` from a leased port, and everything that a listener of this program's alone accepts, asks the server nothing:
packets of those ports come here, so handshakes, refusals and the ends of connections are this engine's. The server
hears of such a connection (DECLARE) only when it is to be asked something of it, or when its port goes: before it is
shared or given back, and when its listener closes. Should the process die, the server finds it in the status page.

differs: in SOSP 1993 (3.1, table 1) the server does every handshake and hands the session over.
"""

from __future__ import annotations

import errno
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Final

from ulnet.ipc import Message
from ulnet.stack import protocol as p
from ulnet.stack.attachment import CALL_TIMEOUT_S, Attachment
from ulnet.stack.session import Session

TCP: Final = 6
FIRST_LEASE: Final = 8
MOST_AT_ONCE: Final = 256
REST_NS: Final = 10_000_000
REFUSED_NS: Final = 1_000_000_000  # before the server is asked again
RECYCLED_AT_ONCE: Final = 64
TIME_WAITS_RETURNED: Final = 1024  # at the program's end; what they guard against is improbable, a late exit is not


class Leasing(Attachment):
    """See ``proxy.Proxy``, the class that programs use."""

    def _start_anew(self) -> None:
        super()._start_anew()
        self._free_ports: deque[tuple[int, int]] = deque()  # and since when (ns)
        self._leases = 0  # ports leased to this process, those of open connections included
        self._lease_asked = False
        self._no_lease_until = 0  # the server refused one
        self._ports_used: dict[int, int] = {}  # by session
        self._undeclared: dict[int, p.Connection] = {}  # sessions here that the server does not know by number
        self._accepted_at: dict[int, set[int]] = {}  # of those, by the listener's port
        self._declared: set[int] = set()  # that it knows, of those set up here
        self._local_listeners: set[int] = set()

    # -- connecting ----------------------------------------------------------------------------

    def _connect_here(self, session: Session, address: str, port: int, timeout_ns: int) -> bool:
        """As Host.connect, for TCP without a bound name. False: the server has to do it (it knows no neighbour yet, or
        has no port to lease)."""
        if port == 0 or int(address.partition(".")[0]) >= 224 or self.engine.meta.resolve(address).mac is None:
            return False
        number = session.session_id
        local = self._ports_used.get(number, 0) if number else self._take_port(address, port, timeout_ns)
        if not local:
            return False
        if not number:
            number = self._name(session)
            self._ports_used[number] = local
            self._undeclared[number] = p.Connection(number, local, address, port)
        self._open_tcp(session, (self.address, local), (address, port), timeout_ns, self._connect_failed)
        return True

    def _connect_failed(self, session: Session) -> None:
        number = session.session_id
        self._unname(session)
        self._leave_port(number)

    def _take_port(self, address: str, port: int, timeout_ns: int) -> int:
        """A leased port that no session has; 0: there is none to be had now."""
        self._settle()
        now = time.monotonic_ns()
        may_lease = now >= self._no_lease_until
        if timeout_ns != 0 and may_lease and not self._rested(now):
            patience_s = CALL_TIMEOUT_S if timeout_ns < 0 else min(CALL_TIMEOUT_S, timeout_ns / 1e9)
            self._on_leased(self._rpc(p.Call.LEASE, self._more(), timeout=patience_s))
        if not self._free_ports and now < self._no_lease_until and self.engine.recycle(RECYCLED_AT_ONCE):
            self._settle()
        with self._lock:
            # Ahead of the need, for who does not wait.
            few = len(self._free_ports) <= self._leases // 4 or not self._rested(now)
            ask = few and may_lease and not self._lease_asked
            self._lease_asked |= ask
            found = 0
            for _ in range(len(self._free_ports)):
                candidate = self._free_ports.popleft()
                if address != self.address or candidate[0] != port:  # else it would be connected to itself
                    found = candidate[0]
                    break
                self._free_ports.append(candidate)
        if ask:
            self._post(p.Call.LEASE, self._more(), reply_to=self._port)
        return found

    def _rested(self, now_ns: int) -> bool:
        """Is there a port that a peer which closed first, and is in TIME-WAIT, will take a new connection from? It does
        by the timestamp, a clock of milliseconds (RFC 6191)."""
        return bool(self._free_ports) and now_ns - self._free_ports[0][1] >= REST_NS

    def _more(self) -> p.Lease:
        """As many again as there are."""
        return p.Lease(min(max(self._leases, FIRST_LEASE), MOST_AT_ONCE))

    def _on_leased(self, message: Message) -> None:
        """The reply to LEASE, in whichever thread."""
        try:
            self._answer(message, p.Status)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            self._no_lease_until = time.monotonic_ns() + REFUSED_NS
            return
        finally:
            self._lease_asked = False
        ports = p.unpack_ports(message.ool[0])
        self.engine.lease(ports)
        with self._lock:
            self._free_ports.extendleft((port, 0) for port in ports)
            self._leases += len(ports)

    def _leave_port(self, number: int) -> None:
        """Its session has come to its end: the next one may have the port."""
        with self._lock:
            self._known(number)
            port = self._ports_used.pop(number, 0)
            if port:
                self._free_ports.append((port, time.monotonic_ns()))

    def _settle(self) -> None:
        """Sessions that were closed have come to their end meanwhile."""
        for _, _, number in self.engine.events():
            self._leave_port(number)
            if number in self._declared:
                self._declared.discard(number)
                self._post_quietly(p.Call.FORGET, p.Forget(number))
        self.engine.tell_ends = bool(self._declared)

    # -- accepting -----------------------------------------------------------------------------

    def _accepted_here(self, session: Session) -> None:
        """One session left a listener's queue; it was set up here unless the server delivered it."""
        number = session.session_id
        if number & 0xFFFFFFFF >= p.SERVER_NUMBER:
            return
        port = session.local[1]
        with self._lock:
            self._undeclared[number] = p.Connection(number, port, *(session.peer or ("0.0.0.0", 0)))
            self._accepted_at.setdefault(port, set()).add(number)

    # -- closing -------------------------------------------------------------------------------

    def _is_here(self, number: int) -> bool:
        """Was it set up here, and is it here still?"""
        return number in self._undeclared or number in self._declared

    def _close_here(self, session: Session, *, abort: bool) -> None:
        if self.engine.close_session(session, linger_abort=abort) and not self._gone:
            # What could not be sent yet would be lost with this process: the server goes on with it.
            self._return(session, session.session_id)
        self._settle()

    def _return_rest(self, port: int = 0) -> None:
        """What was closed and goes on is the server's from here on: everything, at the program's end, or what is on a
        port whose listener is closed."""
        self._settle()
        waits = 0
        for session in self.engine.closing_sessions():
            if port not in (0, session.local[1]):
                continue
            if session.state == "TIME-WAIT":
                waits += 1
                if waits > TIME_WAITS_RETURNED:
                    self.counters["time_waits_dropped"] += 1
                    continue
            self._return(session, session.session_id)

    # -- what the server is told ---------------------------------------------------------------

    def _declare(self, session: Session) -> None:
        """Before a call about it."""
        connection = self._undeclared.get(session.session_id)
        if connection is not None:
            self._post_connections([connection])

    def _declare_all(self, port: int) -> None:
        """Every connection that was accepted at a port, closed ones included."""
        self._settle()
        with self._lock:
            connections = [self._undeclared[number] for number in self._accepted_at.get(port, ())]
        self._post_connections(connections)

    def _known(self, number: int) -> None:
        """To the server, or gone. Lock held."""
        connection = self._undeclared.pop(number, None)
        there = self._accepted_at.get(connection.lport) if connection is not None else None
        if connection is not None and there is not None:
            there.discard(number)
            if not there:
                del self._accepted_at[connection.lport]

    def _post_connections(self, rows: Sequence[p.Connection]) -> None:
        for start in range(0, len(rows), p.CONNECTIONS_A_MESSAGE):
            part = rows[start : start + p.CONNECTIONS_A_MESSAGE]
            self._post(p.Call.DECLARE, p.Nothing(), ool=[p.pack_connections(part)])
            with self._lock:
                for row in part:
                    if row.session in self._undeclared:
                        self._known(row.session)
                        self._declared.add(row.session)
                    elif row.session not in self._declared:  # it came to its end meanwhile
                        self._post_quietly(p.Call.FORGET, p.Forget(row.session))
        self.engine.tell_ends = bool(self._declared)

    def _gone_from_here(self, number: int) -> None:
        """The server has it now, and with it the port, if that was a leased one."""
        with self._lock:
            self._declared.discard(number)
            port = self._ports_used.pop(number, 0)
            if port:
                self._leases -= 1
                self.engine.lease([port], False)

    # -- what those above do -------------------------------------------------------------------

    @abstractmethod
    def _name(self, session: Session) -> int:
        """Give it a number and note it."""

    @abstractmethod
    def _unname(self, session: Session) -> None:
        """Take that back."""

    @abstractmethod
    def _return(self, session: Session, number: int) -> None:
        """Give its state to the server, which runs it to its end."""
