"""A host that needs nobody: sessions, port names and neighbours managed in this very process, over any link.

For programs without privilege or kernel interface (a tunnel, a simulator), for tests, and for a packet link or TAP
device of one's own. Call order: ``host = Embedded(link, "10.0.0.1/24")``; sockets by ``socket(..., host=host)``;
``host.close()`` or ``with``. The same stack runs under a network server instead with ``proxy.Proxy``.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import ipaddress
import os
import random
import threading
import time
import warnings
import weakref
from types import TracebackType

from ulnet.kernelshim.link import Link
from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import forking
from ulnet.stack.engine import EV_GONE, Engine
from ulnet.stack.host import Host
from ulnet.stack.metastate import Metastate
from ulnet.stack.ports import TCP, UDP, WILDCARDS, Name, PortTable
from ulnet.stack.session import Session

# States in which the peer has all we sent, our FIN included, or never will.
_DELIVERED = frozenset(("CLOSED", "LISTEN", "FIN-WAIT-2", "TIME-WAIT", "OPEN"))
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
_hosts: weakref.WeakSet[Embedded] = weakref.WeakSet()


class Embedded(Host):
    """One address on one link. The link is the host's from here on: ``close()`` closes it.

    ``address``: "a.b.c.d/length" (no length: 24). ``gateway``: next hop to everywhere else. ``spin_ns``: how long a
    waiting call polls the link before it sleeps. ``rng``: a seeded one makes port choice repeatable.
    ``helper=False``: no thread of its own; timers and acknowledgements then run only inside calls or ``engine.poll()``.
    """

    def __init__(
        self,
        link: Link,
        address: str,
        gateway: str | None = None,
        *,
        spin_ns: int = 50_000,
        rng: random.Random | None = None,
        helper: bool = True,
    ) -> None:
        try:
            interface = ipaddress.IPv4Interface(address if "/" in address else f"{address}/24")
            if gateway is not None and ipaddress.IPv4Address(gateway) not in interface.network:
                raise ValueError(f"gateway {gateway} is not on the network {interface.network}")
        except ipaddress.AddressValueError as e:
            raise ValueError(f"{e} in an address of the form a.b.c.d/length") from None
        self.address = str(interface.ip)
        self.prefix = interface.network.prefixlen
        self.link = link
        self.engine = Engine(
            link,
            Metastate.create(self.address, self.prefix, link.mac, link.mtu, gateway, shared=False),
            spin_ns=spin_ns,
        )
        self.engine.collect_events = True
        self._ports = PortTable([self.address], rng=rng)
        self._lock = threading.Lock()
        self._names: dict[int, Name] = {}  # by session id, until the engine is done with the session
        self._next = 1
        self._open: weakref.WeakSet[Session] = weakref.WeakSet()
        self._closed = False
        _hosts.add(self)
        forking.watch(self)
        if helper:
            self.engine.start_helper()

    # -- Host ----------------------------------------------------------------------------------

    def socket(self, kind: int) -> Session:
        """See Host."""
        if self._closed:
            raise OSError(errno.ENETDOWN, f"the host {self.address} is closed")
        return self.engine.new_session(kind)

    def bind(
        self, session: Session, address: str, port: int, *, reuse_address: bool = False, reuse_port: bool = False
    ) -> tuple[str, int]:
        """See Host. One address: any address ("", 0.0.0.0) is this one."""
        local = self.address if address in WILDCARDS else address
        with self._lock:
            self._settle()
            if session.session_id in self._names:
                raise OSError(errno.EINVAL, "the socket is bound already")
            name = self._ports.bind(
                session.kind,
                local,
                port,
                now_ns=time.monotonic_ns(),
                uid=os.getuid(),
                privileged=True,  # the address is this process's own
                reuse_address=reuse_address,
                reuse_port=reuse_port,
            )
            self._hold(session, name)
        if session.kind == UDP:
            try:
                self.engine.open_udp(session, local, name.port)
            except BaseException:
                self._drop(session)
                raise
        else:
            session.set_local(local, name.port)
        return local, name.port

    def connect(self, session: Session, address: str, port: int, timeout_ns: int) -> None:
        """See Host."""
        if address in WILDCARDS:
            address = self.address
        elif ipaddress.IPv4Address(address) in _LOOPBACK:
            raise OSError(
                errno.ENETUNREACH, f"{address} is the kernel's loopback address: this stack's own is {self.address}"
            )
        if session.kind == UDP:
            self._connect_udp(session, address, port)
            return
        if session.live and session.state != "CLOSED":
            number = errno.EALREADY if session.state == "SYN-SENT" else errno.EISCONN
            raise OSError(number, os.strerror(number))
        self.engine.reopen(session)
        name = self._name_flow(session, address, port)
        self._open_tcp(session, (name.addr, name.port), (address, port), timeout_ns, self._unname_flow)

    def _connect_udp(self, session: Session, address: str, port: int) -> None:
        with self._lock:
            self._settle()
            name = self._names.get(session.session_id)
            if name is None:
                name = self._ports.choose(UDP, self.address, address, port, now_ns=time.monotonic_ns(), uid=os.getuid())
                self._hold(session, name)
        self.engine.open_udp(session, self.address, name.port, address, port)

    def listen(self, session: Session, backlog: int) -> None:
        """See Host. Called again it changes the backlog."""
        if session.session_id not in self._names:
            self.bind(session, "", 0)
        with self._lock:
            self._settle()
            name = self._names[session.session_id]
            self._ports.listen(name)
        self.engine.listen(session, name.addr, name.port, backlog)

    def accepted(self, listener: Session, session: Session) -> None:
        """See Host."""
        peer = session.peer
        with self._lock:
            self._settle()
            name = self._names.get(listener.session_id)
            if name is None or peer is None:
                return  # closed meanwhile by another thread: its connection lives on
            child = self._ports.accept(name, self.address, *peer, now_ns=time.monotonic_ns())
            self._hold(session, child)

    def close(self, session: Session | None = None, *, abort: bool = False) -> None:
        """``close(session)``: see Host. ``close()``: shutdown()."""
        if session is None:
            self.shutdown()
            return
        self.engine.close_session(session, linger_abort=abort)
        with self._lock:
            self._settle()

    def shutdown(self, linger_s: float = 2.0) -> None:
        """Close every session, give what was sent ``linger_s`` seconds to reach the peers, then stop. Twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            handles = list(self._open)
        for session in handles:
            if not session.closed:
                with contextlib.suppress(OSError):
                    self.engine.close_session(session)
        self._drain(linger_s)
        self.engine.close()
        if not self.engine.counters()["buf_lent"]:  # else the link goes with the last buffer lent
            self.link.close()

    def _drain(self, seconds: float) -> None:
        """Wait until what closed sessions sent has arrived."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not any(row["closing"] and row["state"] not in _DELIVERED for row in self.engine.sessions()):
                break
            self.engine.poll()
            time.sleep(0.001)

    # -- names ---------------------------------------------------------------------------------

    def _hold(self, session: Session, name: Name) -> None:
        session.session_id = self._next
        self._names[self._next] = name
        self._next += 1
        self._open.add(session)

    def _drop(self, session: Session) -> None:
        with self._lock:
            name = self._names.pop(session.session_id, None)
            if name is not None:
                self._ports.release(name, now_ns=time.monotonic_ns())

    def _name_flow(self, session: Session, address: str, port: int) -> Name:
        now = time.monotonic_ns()
        with self._lock:
            self._settle()
            name = self._names.get(session.session_id)
            if name is None:
                name = self._ports.choose(TCP, self.address, address, port, now_ns=now, uid=os.getuid())
                self._hold(session, name)
            else:
                self._ports.connect(name, self.address, address, port, now_ns=now)
        return name

    def _unname_flow(self, session: Session) -> None:
        """A connection failed: a name that bind() gave stays, a chosen one goes."""
        with self._lock:
            name = self._names.get(session.session_id)
            if name is not None and name.explicit:
                self._ports.disconnect(name)
                return
        self._drop(session)

    def _settle(self) -> None:
        """Names of sessions that have come to their end meanwhile are free again. Lock held."""
        for kind, _, value in self.engine.events():
            if kind == EV_GONE:
                name = self._names.pop(value, None)
                if name is not None:
                    self._ports.release(name, now_ns=time.monotonic_ns())

    def after_fork_in_child(self) -> None:
        """See Host. The link has one owner: nothing of it is the child's."""
        super().after_fork_in_child()
        self._closed = True
        self._lock = threading.Lock()

    # -- for programs --------------------------------------------------------------------------

    @property
    def names_in_use(self) -> int:
        """Local endpoints held now, TIME-WAIT included."""
        with self._lock:
            self._settle()
            return len(self._names)

    def __enter__(self) -> Embedded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        # No socket is left: each holds its host.
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.shutdown(0.0)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.address}/{self.prefix}{' [closed]' if self._closed else ''}>"


@atexit.register
def _at_exit() -> None:
    """What closed sockets sent is delivered, as the kernel would after a program's end."""
    hosts = list(_hosts)
    for host in hosts:  # all of them first: one may be another's peer
        host._drain(1.0)
    for host in hosts:
        host.shutdown(0.5)


def pair(
    address_a: str = "10.0.0.1/24", address_b: str = "10.0.0.2/24", *, mtu: int = 1500, spin_ns: int = 50_000
) -> tuple[Embedded, Embedded]:
    """Two hosts joined by a wire in memory: for tests and demonstrations, without any privilege."""
    link_a, link_b = memory_pair(mtu=mtu)
    return Embedded(link_a, address_a, spin_ns=spin_ns), Embedded(link_b, address_b, spin_ns=spin_ns)
