"""Names of local endpoints: who holds which TCP and UDP port, as BSD and Linux have it.

A name is one socket's hold on a (protocol, address, port). Call order: ``bind`` and then ``listen`` or ``connect``;
or ``choose`` alone (connect without bind), or ``lease`` for a program that chooses by itself; ``accept`` for each
connection of a listener or a lease; ``release`` for each name
once. A port is free again when the last name on it has gone and no quarantine is left. Each operation takes constant
time whatever else the table holds; only ``choose`` searches when nearly the whole range is in use toward one peer.

Sources: RFC 9293 (3.10.1, sockets are unique), RFC 6056 (3.3.1 for ``bind`` to port 0, 3.3.4 for ``choose``), socket(7)
and Linux's inet_csk_bind_conflict() for SO_REUSEADDR and SO_REUSEPORT; SOSP 1993 3.2 for the delayed reuse of the
endpoints of a program that died. No clock and no I/O in here: ``now_ns`` is an argument.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import random
from array import array
from collections.abc import Iterable, Iterator
from typing import Final

TCP: Final = 6
UDP: Final = 17
PRIVILEGED_BELOW: Final = 1024  # RFC 6335 (6): system ports
EPHEMERAL_FIRST: Final = 32768  # Linux's net.ipv4.ip_local_port_range
EPHEMERAL_LAST: Final = 60999
QUARANTINED_MAX: Final = 65536  # one port's worth of peers; then the oldest is let go early, and counted
WILDCARDS: Final = frozenset(("", "0.0.0.0", "::"))
_PROTO_TEXT: Final = {TCP: "TCP", UDP: "UDP"}
_COUNTERS: Final = 65536  # RFC 6056 (3.3.4): the larger this table, the less one peer learns about others


class Name:
    """One socket's hold on a local endpoint. Read it freely; only its PortTable changes it.

    ``state``: "bound", "listening", "leased", "connected" (explicitly or by ``choose``), "accepted", "quarantined",
    "released".
    ``peer``: set while this is one end of a TCP connection; no second name has the same four-tuple.
    """

    __slots__ = ("addr", "explicit", "peer", "port", "proto", "reuse_address", "reuse_port", "state", "uid", "_flow")

    def __init__(
        self, proto: int, addr: str, port: int, uid: int, reuse_address: bool, reuse_port: bool, explicit: bool
    ) -> None:
        self.proto = proto
        self.addr = addr
        self.port = port
        self.uid = uid
        self.reuse_address = reuse_address
        self.reuse_port = reuse_port
        self.explicit = explicit
        self.state = "bound"
        self.peer: tuple[str, int] | None = None
        self._flow: _Flow | None = None

    def __repr__(self) -> str:
        peer = f" to {self.peer[0]}:{self.peer[1]}" if self.peer else ""
        return f"<Name {_PROTO_TEXT[self.proto]} {self.addr}:{self.port}{peer} {self.state} uid={self.uid}>"


_Flow = tuple[str, int, str, int]  # TCP: local address and port, remote address and port


class _Group:
    """The names on one port with one address, counted so that a conflict is found without looking at each."""

    __slots__ = ("both", "by_address", "by_port", "total")

    def __init__(self) -> None:
        self.total = 0
        self.by_address = 0  # would share with a SO_REUSEADDR newcomer: have it too and do not listen
        self.by_port: dict[int, int] = {}  # would share with a SO_REUSEPORT newcomer of this uid
        self.both: dict[int, int] = {}  # counted in by_address and in by_port[uid]

    def add(self, name: Name, step: int) -> None:
        self.total += step
        yields = name.reuse_address and name.state != "listening"
        self.by_address += step * yields
        if name.reuse_port:
            _count(self.by_port, name.uid, step)
            if yields:
                _count(self.both, name.uid, step)

    def conflicts(self, name: Name) -> bool:
        """Whether some name in here shares with ``name`` neither by SO_REUSEADDR nor by SO_REUSEPORT."""
        alone = self.total
        if name.reuse_address:
            alone -= self.by_address
        if name.reuse_port:
            alone -= self.by_port.get(name.uid, 0)
            if name.reuse_address:
                alone += self.both.get(name.uid, 0)
        return alone > 0


def _count(table: dict[int, int], key: int, step: int) -> None:
    value = table.get(key, 0) + step
    if value:
        table[key] = value
    else:
        del table[key]


class _Port:
    """Everything that holds one port."""

    __slots__ = ("any_address", "explicit", "groups")

    def __init__(self) -> None:
        self.groups: dict[str, _Group] = {}  # by address; "" for the wildcard
        self.any_address = _Group()  # all of them: what a wildcard newcomer meets
        self.explicit = 0  # names not made by choose(): those ports are not shared by choose()


class _FreePorts:
    """The ephemeral ports nobody holds: random choice, removal and return in constant time."""

    __slots__ = ("_first", "_place", "_ports")

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._ports = array("i", range(first, last + 1))
        self._place = array("i", range(last + 1 - first))  # index in _ports, or -1

    def __len__(self) -> int:
        return len(self._ports)

    def pick(self, rng: random.Random) -> int:
        return self._ports[rng.randrange(len(self._ports))]

    def take(self, port: int) -> None:
        at = port - self._first
        if not 0 <= at < len(self._place):
            return
        hole = self._place[at]
        last = self._ports.pop()
        if last != port:
            self._ports[hole] = last
            self._place[last - self._first] = hole
        self._place[at] = -1

    def give(self, port: int) -> None:
        at = port - self._first
        if 0 <= at < len(self._place):
            self._place[at] = len(self._ports)
            self._ports.append(port)


class PortTable:
    """The port names of one host's addresses.

    ``addresses``: ours, as canonical text. ``ephemeral``: first and last port given out unasked.
    ``rng``: a seeded one makes a run repeatable; the default takes the system's randomness (RFC 6056 3.1).
    ``len()``: names held, without quarantined ones.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        *,
        ephemeral: tuple[int, int] = (EPHEMERAL_FIRST, EPHEMERAL_LAST),
        rng: random.Random | None = None,
    ) -> None:
        first, last = ephemeral
        if not 1 <= first <= last <= 65535:
            raise ValueError(f"ephemeral port range {first}-{last} is not within 1-65535")
        self._addresses = set(addresses)
        self._first, self._span = first, last + 1 - first
        self._range_text = f"{first}-{last}"
        self._rng = rng if rng is not None else random.SystemRandom()
        self._secret = self._rng.getrandbits(128).to_bytes(16, "little")
        self._counters = array("H", bytes(2 * _COUNTERS))
        self._ports: dict[tuple[int, int], _Port] = {}
        self._free = {proto: _FreePorts(first, last) for proto in (TCP, UDP)}
        self._flows: dict[_Flow, Name] = {}
        self._toward: dict[tuple[str, str, int], int] = {}  # flows of shareable ports by (local address, peer)
        self._unshared = 0  # TCP ports of the range with an explicit name: no use to choose()
        self._held: dict[Name, None] = {}
        self._quarantined: dict[Name, int] = {}  # value: until when
        self._expiries: list[tuple[int, int, Name]] = []
        self._serial = 0
        self.quarantine_cut = 0  # quarantines ended early because there were too many

    # --- looking ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._held)

    def items(self) -> Iterator[Name]:
        """Every name held, in the order they were made."""
        return iter(tuple(self._held))

    def quarantined(self) -> dict[Name, int]:
        """Names that nobody holds but that must not be used yet, and until when (ns)."""
        return dict(self._quarantined)

    @property
    def ports_in_use(self) -> int:
        """(protocol, port) pairs with a holder or a quarantine."""
        return len(self._ports)

    @property
    def addresses(self) -> frozenset[str]:
        return frozenset(self._addresses)

    def add_address(self, addr: str) -> None:
        self._addresses.add(addr)

    def remove_address(self, addr: str) -> None:
        """No new names on it; those held stay until they are released."""
        self._addresses.discard(addr)

    # --- naming ----------------------------------------------------------------------------------------

    def bind(
        self,
        proto: int,
        addr: str,
        port: int,
        *,
        now_ns: int,
        uid: int = 0,
        privileged: bool = False,
        reuse_address: bool = False,
        reuse_port: bool = False,
    ) -> Name:
        """Name a local endpoint. Port 0: a random one that nobody holds. "", 0.0.0.0, ::: every address of ours.

        OSError: EADDRINUSE, EADDRNOTAVAIL (not our address), EACCES (port below 1024), EINVAL (no such port).
        """
        self.expire(now_ns)
        self._check(proto, addr, port)
        if port and port < PRIVILEGED_BELOW and not privileged:
            raise PermissionError(
                errno.EACCES,
                f"port {port} is below {PRIVILEGED_BELOW} and needs privilege: take a port from {PRIVILEGED_BELOW} on",
            )
        if port == 0:
            if not self._free[proto]:
                raise OSError(
                    errno.EADDRINUSE, f"no free {_PROTO_TEXT[proto]} port: all of {self._range_text} are in use"
                )
            port = self._free[proto].pick(self._rng)
        name = Name(proto, addr or "0.0.0.0", port, uid, reuse_address, reuse_port, True)
        self._refuse_conflict(name)
        self._add(name)
        return name

    def listen(self, name: Name) -> None:
        """A bound TCP name starts to listen. EADDRINUSE: another one listens there (SO_REUSEADDR allows bind only)."""
        if name.state == "listening":
            return
        self._expect(name, "bound")
        if name.proto != TCP:
            raise OSError(errno.EOPNOTSUPP, f"{_PROTO_TEXT[name.proto]} does not listen")
        self._count(name, -1)
        name.state = "listening"
        try:
            self._refuse_conflict(name)
        except OSError:
            name.state = "bound"
            raise
        finally:
            self._count(name, 1)

    def connect(self, name: Name, laddr: str, raddr: str, rport: int, *, now_ns: int) -> None:
        """A bound name gets its peer. ``laddr``: the address used where the name is a wildcard.

        TCP: EADDRNOTAVAIL when this four-tuple exists or is in quarantine. UDP: many may share a peer.
        """
        self.expire(now_ns)
        self._expect(name, "bound", *(("connected",) if name.proto == UDP else ()))
        local = laddr if name.addr in WILDCARDS else name.addr
        if name.proto == TCP:
            flow = (local, name.port, raddr, rport)
            if flow in self._flows:
                raise self._flow_taken(flow)
            self._flows[flow] = name
            name._flow = flow
        name.peer = (raddr, rport)
        name.state = "connected"

    def disconnect(self, name: Name) -> None:
        """Take the peer off again (the connection failed, or UDP): the name is as bound before."""
        self._expect(name, "connected")
        if not name.explicit:
            raise ValueError(f"{name} was made by choose(): release it")
        self._drop_flow(name)
        name.state, name.peer = "bound", None

    def choose(
        self, proto: int, laddr: str, raddr: str, rport: int, *, now_ns: int, uid: int = 0, reuse_address: bool = False
    ) -> Name:
        """Name a local endpoint for a connection to a peer: connect without bind.

        TCP: one port may serve connections to many peers, so that each peer has the whole range (RFC 6056 3.3.4).
        UDP: a random port of its own. OSError: EADDRNOTAVAIL when the range is used up, or laddr is not ours.
        """
        self.expire(now_ns)
        self._check(proto, laddr, 0)
        if laddr in WILDCARDS:
            raise OSError(errno.EADDRNOTAVAIL, f"a connection to {raddr}:{rport} needs a local address, not a wildcard")
        if proto == TCP:
            port = self._choose_tcp(laddr, raddr, rport)
        else:
            if not self._free[proto]:
                raise OSError(errno.EADDRNOTAVAIL, f"no free UDP port: all of {self._range_text} are in use")
            port = self._free[proto].pick(self._rng)
        name = Name(proto, laddr, port, uid, reuse_address, False, False)
        name.state, name.peer = "connected", (raddr, rport)
        if proto == TCP:
            name._flow = (laddr, port, raddr, rport)
            self._flows[name._flow] = name
            key = (laddr, raddr, rport)
            self._toward[key] = self._toward.get(key, 0) + 1
        self._add(name)
        return name

    def lease(self, laddr: str, count: int, *, now_ns: int, uid: int = 0) -> list[Name]:
        """Random TCP ports of the range that nobody holds, for connections that their holder makes without asking.

        Half of the range stays for others. OSError EADDRNOTAVAIL: no port is left to lease, or laddr is not ours.
        """
        self.expire(now_ns)
        self._check(TCP, laddr, 0)
        free = self._free[TCP]
        names: list[Name] = []
        while len(names) < count and len(free) > self._span // 2:
            name = Name(TCP, laddr, free.pick(self._rng), uid, False, False, True)
            name.state = "leased"
            self._add(name)
            names.append(name)
        if not names:
            raise OSError(errno.EADDRNOTAVAIL, f"half of the ports {self._range_text} are in use: none is leased")
        return names

    def accept(self, listener: Name, laddr: str, raddr: str, rport: int, *, now_ns: int) -> Name:
        """A connection of a listener or a leased port: shares its port, uid and options, and keeps the port alone.

        A quarantine of this four-tuple ends here: the peer itself opened it anew (RFC 9293 3.6.1, RFC 6191).
        EADDRINUSE when the four-tuple is held.
        """
        self.expire(now_ns)
        self._expect(listener, "listening", "leased")
        flow = (laddr, listener.port, raddr, rport)
        old = self._flows.get(flow)
        if old is not None:
            if old.state != "quarantined":
                raise OSError(errno.EADDRINUSE, f"connection {_flow_text(flow)} exists")
            self._forget(old)
        name = Name(TCP, laddr, listener.port, listener.uid, listener.reuse_address, listener.reuse_port, True)
        name.state, name.peer, name._flow = "accepted", (raddr, rport), flow
        self._flows[flow] = name
        self._add(name)
        return name

    def release(self, name: Name, *, now_ns: int, quarantine_ns: int = 0) -> bool:
        """Its socket is gone. With ``quarantine_ns`` the endpoint (TCP: the four-tuple) stays unusable so long.

        False if it was released before.
        """
        self.expire(now_ns)
        if name not in self._held:
            return False
        del self._held[name]
        if quarantine_ns <= 0:
            self._forget(name)
            return True
        self._count(name, -1)
        name.state = "quarantined"
        self._count(name, 1)
        self._quarantined[name] = now_ns + quarantine_ns
        self._serial += 1
        heapq.heappush(self._expiries, (now_ns + quarantine_ns, self._serial, name))
        while len(self._quarantined) > QUARANTINED_MAX:
            self.quarantine_cut += 1
            self._forget(next(iter(self._quarantined)))
        if len(self._expiries) > 2 * len(self._quarantined) + 64:  # ended early: do not keep them for long
            self._expiries = [row for row in self._expiries if row[2] in self._quarantined]
            heapq.heapify(self._expiries)
        return True

    def expire(self, now_ns: int) -> None:
        """End the quarantines that are over. Every other method does it by itself."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            name = heapq.heappop(self._expiries)[2]
            if name in self._quarantined:
                self._forget(name)

    # --- inside ----------------------------------------------------------------------------------------

    def _check(self, proto: int, addr: str, port: int) -> None:
        if proto not in _PROTO_TEXT:
            raise OSError(errno.EPROTONOSUPPORT, f"protocol {proto} has no ports here: 6 (TCP) and 17 (UDP) have")
        if not 0 <= port <= 65535:
            raise OSError(errno.EINVAL, f"port {port} is not within 0-65535")
        if addr not in self._addresses and addr not in WILDCARDS:
            ours = ", ".join(sorted(self._addresses)) or "none"
            raise OSError(errno.EADDRNOTAVAIL, f"{addr} is not an address of this host (it has: {ours})")

    def _expect(self, name: Name, *states: str) -> None:
        if name not in self._held or name.state not in states:
            raise OSError(errno.EINVAL, f"{name} is not {' or '.join(states)}")

    def _refuse_conflict(self, name: Name) -> None:
        port = self._ports.get((name.proto, name.port))
        if port is None:
            return
        if name.addr in WILDCARDS:
            taken = port.any_address.conflicts(name)
        else:
            groups = (port.groups.get(name.addr), port.groups.get(""))
            taken = any(group.conflicts(name) for group in groups if group is not None)
        if taken:
            raise OSError(
                errno.EADDRINUSE,
                f"{_PROTO_TEXT[name.proto]} port {name.port} of {name.addr} is in use: take another one, or share it "
                "with SO_REUSEADDR (nobody listens there) or SO_REUSEPORT (same user) set on every holder",
            )

    def _flow_taken(self, flow: _Flow) -> OSError:
        why = "was aborted or closed a moment ago" if self._flows[flow].state == "quarantined" else "exists"
        return OSError(errno.EADDRNOTAVAIL, f"connection {_flow_text(flow)} {why}: take another local port")

    def _choose_tcp(self, laddr: str, raddr: str, rport: int) -> int:
        if self._toward.get((laddr, raddr, rport), 0) + self._unshared < self._span:
            # RFC 6056 (3.3.4), double-hash: where to start depends on the peer and a secret, the step is counted
            # for a group of peers; so ports go up one by one toward a peer, and an outsider cannot guess them.
            digest = hashlib.blake2b(f"{laddr} {raddr} {rport}".encode(), key=self._secret, digest_size=8).digest()
            offset = int.from_bytes(digest[:4], "little")
            slot = int.from_bytes(digest[4:], "little") % _COUNTERS
            start = self._counters[slot]
            for step in range(self._span):
                port = self._first + (offset + start + step) % self._span
                holders = self._ports.get((TCP, port))
                if holders is not None and (holders.explicit or (laddr, port, raddr, rport) in self._flows):
                    continue
                if port == rport and laddr == raddr:  # it would be connected to itself
                    continue
                self._counters[slot] = (start + step + 1) & 0xFFFF
                return port
        raise OSError(
            errno.EADDRNOTAVAIL,
            f"no free TCP port for a connection from {laddr} to {raddr}:{rport}: all of {self._range_text} are in use",
        )

    def _add(self, name: Name) -> None:
        self._count(name, 1)
        self._held[name] = None

    def _count(self, name: Name, step: int) -> None:
        """Put a name into the counts of its port, or take it out."""
        key = (name.proto, name.port)
        port = self._ports.get(key)
        if port is None:
            port = self._ports[key] = _Port()
            self._free[name.proto].take(name.port)
        addr = "" if name.addr in WILDCARDS else name.addr
        group = port.groups.get(addr)
        if group is None:
            group = port.groups[addr] = _Group()
        group.add(name, step)
        port.any_address.add(name, step)
        if name.explicit:
            port.explicit += step
            first_or_last = port.explicit == (1 if step > 0 else 0)
            if first_or_last and name.proto == TCP and 0 <= name.port - self._first < self._span:
                self._unshared += step
        if not group.total:
            del port.groups[addr]
            if not port.groups:
                del self._ports[key]
                self._free[name.proto].give(name.port)

    def _drop_flow(self, name: Name) -> None:
        if name._flow is None:
            return
        del self._flows[name._flow]
        if not name.explicit:
            key = (name._flow[0], name._flow[2], name._flow[3])
            self._toward[key] -= 1
            if not self._toward[key]:
                del self._toward[key]
        name._flow = None

    def _forget(self, name: Name) -> None:
        """The end of a name, held or quarantined."""
        self._quarantined.pop(name, None)
        self._drop_flow(name)
        self._count(name, -1)
        name.state = "released"


def _flow_text(flow: _Flow) -> str:
    return f"{flow[0]}:{flow[1]} to {flow[2]}:{flow[3]}"
