"""One random walk through the calls of sockets, taken on ours and on the kernel's: the same answers, errnos, readiness.

Each step makes one call on a twin (a socket of ours and one of the kernel's), waits until nothing moves on the wire,
and compares what came back and what poll(2) says of every twin. Ports and addresses are compared by what they stand
for. A step never fills a buffer: their sizes differ. ULNET_SOAK=1 walks a hundred times as far.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket as kernel
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

SOAK = os.environ.get("ULNET_SOAK") == "1"
# Our address of a host, and the kernel's that stands for it. What is not bound speaks from 127.0.0.1, as host A does.
OURS = {"A": "10.0.0.1", "B": "10.0.0.2"}
KERNELS = {"A": "127.0.0.1", "B": "127.0.0.2"}
DEAD_PORT = 1  # nobody listens there
MOST_UNREAD = 30_000
POLL_BITS = select.POLLIN | select.POLLOUT | select.POLLERR | select.POLLHUP | select.POLLRDHUP

Sock = Any


class Twin:
    """A socket of ours and the kernel's counterpart, on the same side of the wire."""

    def __init__(self, side: str, ours: Sock, theirs: Sock) -> None:
        self.side = side
        self.ours = ours
        self.theirs = theirs
        self.listening = False
        self.tried = False  # connect() was called: it is no fresh socket any more
        self.spent = False  # and failed: what it is then, POSIX leaves open; so do we
        self.unread = 0  # bytes sent to it, at most
        self.peer: Twin | None = None
        self.file: tuple[Any, Any] | None = None
        self.closed = False
        self.odd = False  # shutdown() failed on it, and yet Linux remembers it
        for sock in (ours, theirs):
            sock.settimeout(0)


class Machine(RuleBasedStateMachine):
    """What both kinds have in common; the subclasses have the rules."""

    kind = kernel.SOCK_STREAM

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[str, Embedded] = {}
        self.twins: list[Twin] = []
        self.ports: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.said: list[str] = []

    @initialize()
    def start(self) -> None:
        # Without helpers: frames move only when a step looks, so a walk is the same at each repetition.
        for side, link in zip("AB", memory_pair(), strict=True):
            self.hosts[side] = Embedded(link, OURS[side], spin_ns=0, helper=False)
        for side, other in ("AB", "BA"):
            self.hosts[side].engine.ask_neighbour(OURS[other])  # nobody answers ARP while the other one is in a call
        self.settle()

    def teardown(self) -> None:
        for twin in self.twins:
            for file in twin.file or ():
                with contextlib.suppress(Exception):
                    file.close()
            twin.ours.close()
            twin.theirs.close()
        for host in self.hosts.values():
            host.shutdown(0.0)

    # -- steps --

    def settle(self) -> None:
        """Until no frame is on its way between our hosts. The kernel's loopback is done when a call returns."""
        quiet = 0
        while quiet < 2:
            moved = sum(host.engine.poll() + host.link.waiting() for host in self.hosts.values())
            quiet = 0 if moved else quiet + 1

    @contextlib.contextmanager
    def driven(self, waits: float) -> Iterator[None]:
        """A call that waits for the other host needs somebody there."""
        stop = threading.Event()

        def drive() -> None:
            while not stop.wait(0.0005):
                self.settle()

        thread = threading.Thread(target=drive)
        if waits:
            thread.start()
        yield
        stop.set()
        if waits:
            thread.join()

    def same(self, value: Any, world: int) -> Any:
        """A value in words that mean the same in both worlds."""
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            side = {v: k for k, v in (OURS, KERNELS)[world].items()}.get(value[0], value[0])
            names = self.ports[world]
            return side, names.setdefault(value[1], f"port {len(names)}") if value[1] > DEAD_PORT else value[1]
        if isinstance(value, tuple):
            return tuple(self.same(v, world) for v in value)
        return bytes(value) if isinstance(value, memoryview | bytearray) else value

    def outcome(self, call: Callable[[Sock, int], Any], sock: Sock, world: int) -> Any:
        try:
            return self.same(call(sock, world), world)
        except OSError as e:
            return type(e).__name__, e.errno

    def step(self, what: str, twin: Twin, call: Callable[[Sock, int], Any]) -> Any:
        """Make the call on both; the common answer."""
        self.said.append(f"{what} on twin {self.twins.index(twin) if twin in self.twins else 'new'}")
        ours = self.outcome(call, twin.ours, 0)
        self.settle()
        theirs = self.outcome(call, twin.theirs, 1)
        assert ours == theirs, f"{self.story()}: ours {ours!r}, the kernel's {theirs!r}"
        self.compare_readiness()
        return ours

    def story(self) -> str:
        return "\n".join(self.said)

    def readiness(self, sock: Sock) -> int:
        poller = select.poll()
        poller.register(sock.fileno(), POLL_BITS)
        events = poller.poll(0)
        return events[0][1] if events else 0

    def compare_readiness(self) -> None:
        for twin in self.twins:
            if twin.closed or twin.odd or twin.ours.fileno() < 0 or self.is_fresh(twin):
                continue
            deadline = time.monotonic() + 0.3
            while True:
                ours, theirs = self.readiness(twin.ours), self.readiness(twin.theirs)
                if self.kind == kernel.SOCK_DGRAM and theirs & select.POLLERR:
                    theirs |= select.POLLIN | select.POLLOUT  # as select() has it
                    theirs &= ~select.POLLERR
                if ours & theirs & select.POLLHUP:
                    theirs &= ours | ~select.POLLERR  # differs: a descriptor that hung up shows no later error
                if ours == theirs:
                    break
                self.settle()
                assert time.monotonic() < deadline, (
                    f"{self.story()}: poll of twin {self.twins.index(twin)}: ours {ours:#x}, the kernel's {theirs:#x}"
                )

    def is_fresh(self, twin: Twin) -> bool:
        """differs: Linux shows a hang-up on a TCP socket that was never connected, ours does not."""
        return False

    def new_twin(self, side: str) -> Twin:
        return Twin(
            side, socket.socket(type=self.kind, host=self.hosts[side]), kernel.socket(kernel.AF_INET, self.kind)
        )

    def pick(self, data: st.DataObject, wanted: Callable[[Twin], bool] = lambda t: True) -> Twin | None:
        among = [t for t in self.twins if not t.odd and not t.spent and wanted(t)]
        return data.draw(st.sampled_from(among), label="twin") if among else None

    def address(self, twin: Twin, world: int) -> tuple[str, int]:
        return (twin.ours, twin.theirs)[world].getsockname()  # type: ignore[no-any-return]

    # -- calls that both kinds have --

    @precondition(lambda self: len(self.twins) < 8)
    @rule(side=st.sampled_from("AB"))
    def open(self, side: str) -> None:
        self.twins.append(self.new_twin(side))

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        # differs: of a connection that is over Linux lets the socket be bound anew.
        twin = self.pick(data, lambda t: not t.tried or t.closed or t.ours.session.state == "ESTABLISHED")
        if twin is None:
            return
        other = (
            self.pick(data, lambda t: not t.closed and not t.tried and t.side == twin.side)
            if data.draw(st.booleans())
            else None
        )
        if other is not None and self.address(other, 0)[1] == 0:
            other = None

        def call(sock: Sock, world: int) -> Any:
            port = self.address(other, world)[1] if other else 0
            return sock.bind(((OURS, KERNELS)[world][twin.side], port))

        self.step("bind" if other is None else "bind to a port in use", twin, call)

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), call=st.sampled_from(("getsockname", "getpeername", "gettimeout", "getblocking")))
    def names(self, data: st.DataObject, call: str) -> None:
        twin = self.pick(data)
        if twin is None or (call == "getpeername" and not twin.closed and twin.ours.session.state == "TIME-WAIT"):
            return  # differs: to Linux a socket in TIME-WAIT is closed and has no peer any more
        self.step(call, twin, lambda sock, _: getattr(sock, call)())

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), seconds=st.sampled_from((0, 0.005)))
    def settimeout(self, data: st.DataObject, seconds: float) -> None:
        twin = self.pick(data, lambda t: not t.closed and not t.listening)
        if twin is not None:
            self.step(f"settimeout({seconds})", twin, lambda sock, _: sock.settimeout(seconds))

    OPTIONS = (
        (kernel.SOL_SOCKET, kernel.SO_KEEPALIVE),
        (kernel.SOL_SOCKET, kernel.SO_BROADCAST),
        (kernel.IPPROTO_IP, kernel.IP_TTL),
        (kernel.IPPROTO_IP, kernel.IP_TOS),
        (kernel.IPPROTO_TCP, kernel.TCP_NODELAY),
        (kernel.IPPROTO_TCP, kernel.TCP_KEEPIDLE),
        (kernel.IPPROTO_TCP, kernel.TCP_KEEPINTVL),
        (kernel.IPPROTO_TCP, kernel.TCP_KEEPCNT),
        (kernel.IPPROTO_TCP, kernel.TCP_USER_TIMEOUT),
        (kernel.IPPROTO_TCP, 9999),
        (9999, 1),
    )
    READ_ONLY = (
        (kernel.SOL_SOCKET, kernel.SO_ERROR),
        (kernel.SOL_SOCKET, kernel.SO_TYPE),
        (kernel.SOL_SOCKET, kernel.SO_DOMAIN),
        (kernel.SOL_SOCKET, kernel.SO_PROTOCOL),
        (kernel.SOL_SOCKET, kernel.SO_ACCEPTCONN),
    )

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), option=st.sampled_from(OPTIONS), value=st.sampled_from((0, 1, 2, 40, 127)))
    def setsockopt(self, data: st.DataObject, option: tuple[int, int], value: int) -> None:
        twin = self.pick(data)
        if twin is None:
            return
        self.step(f"setsockopt({option}, {value})", twin, lambda sock, _: sock.setsockopt(*option, value))

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), option=st.sampled_from(OPTIONS + READ_ONLY))
    def getsockopt(self, data: st.DataObject, option: tuple[int, int]) -> None:
        twin = self.pick(data)
        if twin is None:
            return
        self.step(f"getsockopt({option})", twin, lambda sock, _: sock.getsockopt(*option))

    @precondition(lambda self: self.twins)
    @rule(
        data=st.data(), n=st.sampled_from((0, 1, 7, 5000, 20_000)), flags=st.sampled_from((0, 0, kernel.MSG_NOSIGNAL))
    )
    def send(self, data: st.DataObject, n: int, flags: int) -> None:
        twin = self.pick(data, lambda t: t.peer is None or t.peer.unread + n <= MOST_UNREAD)
        if twin is None:
            return
        call = data.draw(st.sampled_from(("send", "sendall", "sendmsg")), label="call")
        payload = bytes((len(self.said) + i) & 0xFF for i in range(n))

        def act(sock: Sock, _: int) -> Any:
            if call == "sendmsg":
                return sock.sendmsg([payload[: n // 2], payload[n // 2 :]], [], flags)
            return getattr(sock, call)(payload, flags)

        self.step(f"{call} of {n} bytes", twin, act)
        if twin.peer is not None:
            twin.peer.unread += n

    @precondition(lambda self: self.twins)
    @rule(
        data=st.data(),
        n=st.sampled_from((1, 3, 4096, 40_000)),
        flags=st.sampled_from((0, 0, kernel.MSG_PEEK, kernel.MSG_DONTWAIT, kernel.MSG_WAITALL, kernel.MSG_TRUNC)),
    )
    def recv(self, data: st.DataObject, n: int, flags: int) -> None:
        # differs: a datagram socket without a name gets one of ours by reading; Linux's waits for nothing.
        named = self.kind == kernel.SOCK_STREAM
        twin = self.pick(data, lambda t: t.file is None and (named or t.closed or self.address(t, 0)[1] != 0))
        if twin is None:
            return
        call = data.draw(st.sampled_from(("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg")), label="call")
        if flags == kernel.MSG_TRUNC and (call in ("recv", "recvfrom", "recvmsg") or self.kind == kernel.SOCK_STREAM):
            flags = 0  # tcp(7): it throws data away; and CPython cannot give more bytes than it has room for
        if flags == kernel.MSG_DONTWAIT and not twin.closed and twin.ours.gettimeout():
            flags = 0  # differs: CPython waits for the time-out all the same

        def act(sock: Sock, _: int) -> Any:
            if not call.endswith("_into"):
                return getattr(sock, call)(n, flags) if call != "recvmsg" else sock.recvmsg(n, 0, flags)
            room = bytearray(n)
            got = getattr(sock, call)(room, 0, flags)
            count = got[0] if isinstance(got, tuple) else got
            return got, bytes(room[:count])

        got = self.step(f"{call}({n}, flags={flags})", twin, act)
        self.consumed(twin, got)

    def consumed(self, twin: Twin, got: Any) -> None:
        """Bytes that were read make room for others; when in doubt nothing does."""
        if isinstance(got, bytes) and self.kind == kernel.SOCK_STREAM and len(got) > 3000:
            twin.unread = max(twin.unread - len(got), 0) if twin.unread > MOST_UNREAD // 2 else twin.unread

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), how=st.sampled_from((kernel.SHUT_RD, kernel.SHUT_WR, kernel.SHUT_RDWR)))
    def shutdown(self, data: st.DataObject, how: int) -> None:
        twin = self.pick(data, lambda t: not t.listening)
        if twin is not None:
            try:
                twin.theirs.getpeername()
            except OSError:
                twin.odd = not twin.closed
            got = self.step(f"shutdown({how})", twin, lambda sock, _: sock.shutdown(how))
            # With datagrams a read after SHUT_RD is an end of file to Linux only if it may wait.
            twin.odd = not twin.closed and (
                got is not None or (self.kind == kernel.SOCK_DGRAM and how != kernel.SHUT_WR)
            )

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        twin = data.draw(st.sampled_from(self.twins), label="twin")
        for file in twin.file or ():  # else it stays open under them
            file.close()
        twin.file = None
        twin.closed = True
        twin.odd = twin.spent = False
        self.step("close", twin, lambda sock, _: (sock.close(), None)[1])


class Streams(Machine):
    """TCP: a listener on each side at most, connections of all ages."""

    def is_fresh(self, twin: Twin) -> bool:
        return (not twin.tried and not twin.listening) or twin.spent

    @precondition(lambda self: len(self.twins) < 8)
    @rule(data=st.data(), side=st.sampled_from("AB"))
    def join(self, data: st.DataObject, side: str) -> None:
        """A connection, with its listener closed again: most steps need one."""
        listener = self.new_twin(side)
        client = self.new_twin("A")
        self.step("bind", listener, lambda sock, world: sock.bind(((OURS, KERNELS)[world][side], 0)))
        self.step("listen", listener, lambda sock, _: sock.listen(5))
        for sock in (client.ours, client.theirs):
            sock.settimeout(5)
        client.tried = True
        self.twins.append(client)
        with self.driven(5):
            self.step("connect", client, lambda sock, world: sock.connect(self.address(listener, world)))
        self.accept_from(listener)
        listener.ours.close()
        listener.theirs.close()
        for sock in (client.ours, client.theirs):
            sock.settimeout(0)
        # To Linux a connect() with a time-out is one that did not wait: the next one still tells its outcome.
        with contextlib.suppress(OSError):
            client.theirs.connect(client.theirs.getpeername())

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), backlog=st.sampled_from((0, 1, 5)))
    def listen(self, data: st.DataObject, backlog: int) -> None:
        # An unbound one would get the wildcard address, which stands for other addresses in either world.
        twin = self.pick(data, lambda t: t.closed or self.address(t, 0)[1] != 0)
        if twin is None:
            return
        if not twin.closed:  # with a time-out CPython waits on it until it can be read from or written to: never
            twin.ours.settimeout(0)
            twin.theirs.settimeout(0)
        got = self.step(f"listen({backlog})", twin, lambda sock, _: sock.listen(backlog))
        twin.listening = twin.listening or got is None

    @precondition(lambda self: any(t.listening and not t.closed for t in self.twins))
    @rule(data=st.data(), timeout=st.sampled_from((0, 5)))
    def connect(self, data: st.DataObject, timeout: float) -> None:
        listener = self.pick(data, lambda t: t.listening and not t.closed)
        twin = self.pick(data, lambda t: t is not listener and (t.side == "A" or t.closed) and self.may_connect(t))
        if twin is None or listener is None or listener.unread >= 1:
            return
        if twin.tried:
            timeout = 0  # the second call
        for sock in (twin.ours, twin.theirs):
            if not twin.closed:
                sock.settimeout(timeout)
        twin.tried = True
        with self.driven(timeout):
            got = self.step(
                f"connect(timeout {timeout})", twin, lambda sock, world: sock.connect(self.address(listener, world))
            )
        if got is None or got == ("BlockingIOError", 115):
            listener.unread += 1  # one waits in its queue: a backlog of 0 still takes one
            for world, sock in enumerate((twin.ours, twin.theirs)):  # see join()
                with contextlib.suppress(OSError):
                    sock.connect(self.address(listener, world))
        for sock in (twin.ours, twin.theirs):
            if not twin.closed:
                sock.settimeout(0)

    def may_connect(self, twin: Twin) -> bool:
        """Again only while it stands: what a second attempt finds after the end is left open by POSIX."""
        return not twin.spent and (not twin.tried or twin.closed or twin.ours.session.state == "ESTABLISHED")

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), timeout=st.sampled_from((0, 5)), ex=st.booleans())
    def connect_refused(self, data: st.DataObject, timeout: float, ex: bool) -> None:
        twin = self.pick(data, lambda t: not t.closed and t.side == "A" and self.may_connect(t))
        if twin is None:
            return
        if not twin.tried:
            twin.spent = True
        for sock in (twin.ours, twin.theirs):
            sock.settimeout(timeout)
        twin.tried = True
        call = "connect_ex" if ex else "connect"
        with self.driven(timeout):
            self.step(
                f"{call} to a dead port (timeout {timeout})",
                twin,
                lambda sock, world: getattr(sock, call)(((OURS, KERNELS)[world]["B"], DEAD_PORT)),
            )
        for sock in (twin.ours, twin.theirs):
            sock.settimeout(0)

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        twin = self.pick(data, lambda t: t.listening or t.closed or not t.tried)
        if twin is not None:
            self.accept_from(twin)

    def accept_from(self, listener: Twin) -> None:
        new: list[Any] = []

        def call(sock: Sock, _: int) -> Any:
            sock, peer = sock.accept()
            new.append(sock)
            return peer

        self.step("accept", listener, call)
        if len(new) == 2:
            listener.unread = max(listener.unread - 1, 0)
            twin = Twin(listener.side, *new)
            twin.tried = True
            client = next(
                (t for t in self.twins if not t.closed and t.tried and t.ours.getsockname() == new[0].getpeername()),
                None,
            )
            twin.peer, self.twins = client, [*self.twins, twin]
            if client is not None:
                client.peer = twin

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), on=st.booleans())
    def linger_zero(self, data: st.DataObject, on: bool) -> None:
        twin = self.pick(data)
        if twin is None:
            return
        value = struct.pack("ii", on, 0)
        self.step(
            f"SO_LINGER {on}",
            twin,
            lambda sock, _: (
                sock.setsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, value),
                sock.getsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, 8),
            )[1],
        )

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), n=st.sampled_from((0, 1, 100, 20_000)))
    def read_file(self, data: st.DataObject, n: int) -> None:
        """A file over a socket whose peer is gone or silent: what is there, None, or the error."""
        twin = self.pick(data, lambda t: not t.closed and t.tried)
        if twin is None:
            return
        if twin.file is None:
            twin.file = (twin.ours.makefile("rb", buffering=0), twin.theirs.makefile("rb", buffering=0))
        file = twin.file
        self.step(f"makefile().read({n})", twin, lambda _, world: file[world].read(n))


class Datagrams(Machine):
    """UDP: sockets on two hosts, bound, connected, or neither."""

    kind = kernel.SOCK_DGRAM

    @precondition(lambda self: len(self.twins) < 8)
    @rule(side=st.sampled_from("AB"))
    def open_bound(self, side: str) -> None:
        twin = self.new_twin(side)
        self.twins.append(twin)
        self.step("bind", twin, lambda sock, world: sock.bind(((OURS, KERNELS)[world][side], 0)))

    def sender(self, data: st.DataObject) -> Twin | None:
        # Unbound ones of B would speak from 127.0.0.1 in the kernel's world.
        return self.pick(data, lambda t: t.closed or self.address(t, 0)[1] != 0)

    def send(self, *_: Any, **__: Any) -> None: ...

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), n=st.sampled_from((0, 1, 7, 5000, 20_000)))
    def send_connected(self, data: st.DataObject, n: int) -> None:
        twin = self.sender(data)
        if twin is None or (twin.peer is not None and twin.peer.unread + n + 1 > MOST_UNREAD):
            return
        call = data.draw(st.sampled_from(("send", "sendall", "sendmsg")), label="call")
        payload = bytes((len(self.said) + i) & 0xFF for i in range(n))
        self.step(
            f"{call} of {n} bytes",
            twin,
            lambda sock, _: getattr(sock, call)([payload] if call == "sendmsg" else payload),
        )
        if twin.peer is not None:
            twin.peer.unread += n + 1

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), n=st.sampled_from((0, 1, 600, 20_000, 65_507, 65_508)))
    def sendto(self, data: st.DataObject, n: int) -> None:
        twin = self.sender(data)
        other = self.pick(data, lambda t: not t.closed and self.address(t, 0)[1] != 0)
        if twin is None or other is None or other.unread + n + 1 > MOST_UNREAD + 65_508 * (other.unread == 0):
            return
        payload = bytes((len(self.said) + i) & 0xFF for i in range(n))

        def call(sock: Sock, world: int) -> Any:
            address = (OURS, KERNELS)[world][other.side], self.address(other, world)[1]
            return sock.sendto(payload, address)

        self.step(f"sendto of {n} bytes", twin, call)
        other.unread += n + 1

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), dead=st.booleans())
    def connect(self, data: st.DataObject, dead: bool) -> None:
        twin = self.sender(data)
        other = self.pick(data, lambda t: not t.closed and self.address(t, 0)[1] != 0)
        if twin is None or (other is None and not dead):
            return

        def call(sock: Sock, world: int) -> Any:
            port = DEAD_PORT if dead or other is None else self.address(other, world)[1]
            side = "B" if dead or other is None else other.side
            return sock.connect(((OURS, KERNELS)[world][side], port))

        if self.step("connect", twin, call) is None:
            twin.peer = None if dead else other

    def consumed(self, twin: Twin, got: Any) -> None:
        if got == ("BlockingIOError", 11):
            twin.unread = 0


SETTINGS = settings(
    max_examples=6000 if SOAK else 60,
    stateful_step_count=60 if SOAK else 40,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
Streams.TestCase.settings = SETTINGS
Datagrams.TestCase.settings = SETTINGS
TestStreams = pytest.mark.timeout(3600 if SOAK else 120)(Streams.TestCase)
TestDatagrams = pytest.mark.timeout(3600 if SOAK else 120)(Datagrams.TestCase)
