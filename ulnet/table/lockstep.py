"""Two stacks in one thread of one process: nothing waits, nothing races, so that every count is exact.

Call order: ``with memory() as pair`` or ``with packet("ipf") as pair``; ``pair.tcp()`` or ``pair.udp()`` for two joined
sockets; ``round_trips`` and ``blocks`` move data; ``pair.counted(action)`` tells what that cost. Used where counts or
profiles matter, not times: the two ends share one processor, as no real pair does.
"""

from __future__ import annotations

import contextlib
import socket as kernel
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Any

import ulnet.stack.socket as user
from ulnet.kernelshim.channel import open_embedded
from ulnet.kernelshim.link import Link
from ulnet.kernelshim.memory import memory_pair
from ulnet.kernelshim.testbed import Testbed
from ulnet.stack.embedded import Embedded

ADDRESS_A, ADDRESS_B = "10.78.0.1", "10.78.0.2"
BLOCK = 65_160  # one super-segment: 45 times the 1448 bytes that fit behind a header with timestamps
PATIENCE_S = 10.0
# What a waiting call would poll before it sleeps: longer than any pause of the machine, so that none is counted.
SPIN_NS = 5_000_000_000
WARM_BLOCKS = 64  # opens the congestion window beyond a block


class Pair:
    """Host a and host b."""

    def __init__(self, link_a: Link, link_b: Link) -> None:
        self.a = Embedded(link_a, f"{ADDRESS_A}/24", spin_ns=SPIN_NS, helper=False)
        self.b = Embedded(link_b, f"{ADDRESS_B}/24", spin_ns=SPIN_NS, helper=False)
        self._asked = 0

    def turn(self) -> None:
        """Let both stacks take what has come."""
        self.a.engine.poll()
        self.b.engine.poll()

    def tcp(self) -> tuple[user.socket, user.socket]:
        """Connected sockets of a and b, without Nagle's delay."""
        with user.create_server(("", 0), host=self.b) as listener:
            listener.setblocking(False)
            client = user.socket(kernel.AF_INET, kernel.SOCK_STREAM, host=self.a)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect((ADDRESS_B, listener.getsockname()[1]))
            server = self._until(lambda: listener.accept()[0])
        for sock in (client, server):
            sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
            sock.settimeout(PATIENCE_S)
        return client, server

    def udp(self) -> tuple[user.socket, user.socket]:
        """Connected sockets of a and b that have exchanged a datagram, so that both know the way."""
        socks = [user.socket(kernel.AF_INET, kernel.SOCK_DGRAM, host=host) for host in (self.a, self.b)]
        for sock in socks:
            sock.bind(("", 0))
            sock.setblocking(False)
        for sock, address, other in ((socks[0], ADDRESS_B, socks[1]), (socks[1], ADDRESS_A, socks[0])):
            sock.connect((address, other.getsockname()[1]))
        self._first(self.a, socks[0], socks[1])
        self._first(self.b, socks[1], socks[0])
        for sock in socks:
            sock.settimeout(PATIENCE_S)
        return socks[0], socks[1]

    def _first(self, host: Embedded, sender: user.socket, receiver: user.socket) -> None:
        """A stack that asks for the way itself holds a datagram only while a call waits: so ask, then send."""
        peer = sender.getpeername()[0]
        host.engine.ask_neighbour(peer)

        def known() -> None:
            if host.engine.meta.resolve(peer).mac is None:
                raise BlockingIOError

        self._until(known)
        sender.send(b"h")
        self._until(lambda: receiver.recv(1))

    def _until(self, ask: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.turn()
            try:
                return ask()
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the two stacks did not come together within {PATIENCE_S} s") from None

    def counted(self, action: Callable[[], None]) -> dict[str, int]:
        """What both engines and links counted during ``action``, together."""
        before = self._counters()
        action()
        return {name: value - before[name] for name, value in self._counters().items()}

    def _counters(self) -> dict[str, int]:
        a, b = self.a.engine.counters(), self.b.engine.counters()
        both = {name: a.get(name, 0) + b.get(name, 0) for name in a.keys() | b.keys()}
        if "link_syscalls" in both:
            # Reading a packet link's counters is a system call itself, and counted.
            self._asked += 2
            both["link_syscalls"] -= self._asked
        return both

    def close(self) -> None:
        self.a.shutdown(0)
        self.b.shutdown(0)


@contextlib.contextmanager
def memory() -> Iterator[Pair]:
    """Over a wire in memory: needs no privilege."""
    pair = Pair(*memory_pair())
    try:
        yield pair
    finally:
        pair.close()


@contextlib.contextmanager
def packet(interface: str = "ipf") -> Iterator[Pair]:
    """Over packet sockets ("ipf", "shm" or "ipc") on two test hosts; needs ``can_testbed() is None``."""
    with Testbed() as bed:
        hosts = bed.host("lock_a"), bed.host("lock_b")
        bed.wire(*hosts)
        links = []
        for host, address in zip(hosts, (ADDRESS_A, ADDRESS_B), strict=True):
            with host:
                links.append(open_embedded(host.interface.name, IPv4Address(address), packet_interface=interface))
        pair = Pair(*links)
        try:
            yield pair
        finally:
            pair.close()


def round_trips(a: Any, b: Any, size: int, count: int) -> None:
    """``size`` bytes there and back, ``count`` times."""
    message = bytes(size)
    view = memoryview(bytearray(size))
    for _ in range(count):
        for sender, receiver in ((a, b), (b, a)):
            sender.send(message)
            got = 0
            while got < size:
                got += receiver.recv_into(view[got:])


def blocks(pair: Pair, a: Any, b: Any, count: int, *, lend: bool = False) -> None:
    """``count`` blocks from a to b, one at a time; ``lend``: taken out as buffers instead of copied out."""
    block = bytes(BLOCK)
    view = memoryview(bytearray(BLOCK))
    for _ in range(count):
        a.sendall(block)
        got = 0
        while got < BLOCK:
            if lend:
                with b.recv_buffer(BLOCK) as piece:
                    got += len(piece)
            else:
                got += b.recv_into(view[got:])
            if got < BLOCK:
                pair.a.engine.poll()  # what is left waits for an acknowledgement
        pair.a.engine.poll()


def warm(pair: Pair, a: Any, b: Any) -> None:
    """Open the congestion window so far that a block goes out at once."""
    blocks(pair, a, b, WARM_BLOCKS)
