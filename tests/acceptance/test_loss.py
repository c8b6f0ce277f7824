"""Loss, duplication, reordering and corruption on the way: data equal, no stall.

Twice: two embedded stacks over a faulty link in this process; and an application of a server against the kernel's TCP
with a program between two cables that loses and mixes up frames.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import select
import socket as ksocket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.beds import ADDRESS, PEER, Hosts, meanwhile, total_retrans
from tests.acceptance.shell import digest_of, receive_into, send_stream
from ulnet.kernelshim.fault import FaultLink
from ulnet.kernelshim.memory import memory_pair
from ulnet.kernelshim.testbed import Host, can_testbed
from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

STALL_S = 60.0  # a transfer that ends at all ends in a few seconds, some retransmission time-outs included
FAULTS: dict[str, dict[str, Any]] = {
    "loss": {"loss": 0.01},
    "heavy loss": {"loss": 0.05},
    "reordering": {"reorder": 0.05},
    "duplication": {"duplicate": 0.05},
    "corruption": {"corrupt": 0.01},
    "everything": {"loss": 0.01, "duplicate": 0.01, "reorder": 0.02, "corrupt": 0.01},
}


@pytest.mark.parametrize("what", FAULTS)
def test_embedded(what: str) -> None:
    size = 2 << 20
    # Without offload: a fault then hits one segment and not 64 KiB of them.
    links = [FaultLink(link, seed, **FAULTS[what], rx=False) for seed, link in enumerate(memory_pair(features=0))]
    with Embedded(links[0], "10.0.0.1/24") as one, Embedded(links[1], "10.0.0.2/24") as two:
        with socket.create_server(("", 80), host=two) as listener:
            listener.settimeout(STALL_S)
            client = socket.create_connection(("10.0.0.2", 80), timeout=STALL_S, host=one)
            server, _ = listener.accept()
        server.settimeout(STALL_S)
        with (
            meanwhile(send_stream, client, size, 1),
            meanwhile(send_stream, server, size, 2),
            meanwhile(receive_into, client, size) as at_client,
        ):
            assert receive_into(server, size) == digest_of(size, 1)
        assert at_client == [digest_of(size, 2)]
        for link in links:
            counted = link.counters()
            assert any(counted[f"fault_tx_{kind}"] for kind in ("lost", "duplicated", "reordered", "corrupted")), (
                counted
            )
        client.close()
        assert server.recv(1) == b""
        server.close()


class Middle:
    """A program on a host between two cables: passes frames on, some of them late, twice, changed or never."""

    def __init__(self, host: Host, seed: int) -> None:
        self.random = random.Random(seed)
        self.loss = self.duplicate = self.reorder = self.corrupt = 0.0
        self.counts = {"passed": 0, "lost": 0, "doubled": 0, "delayed": 0, "changed": 0}
        self.socks = []
        for interface in host.interfaces:
            with host:
                sock = ksocket.socket(ksocket.AF_PACKET, ksocket.SOCK_RAW, 0)
            sock.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING
            sock.setsockopt(ksocket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE: this program loses on purpose only
            sock.setsockopt(ksocket.SOL_SOCKET, 32, 32 << 20)
            sock.bind((interface.name, 3))
            sock.setblocking(False)
            self.socks.append(sock)
        self.late: list[tuple[float, int, int, bytes]] = []
        self.ended = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended:
            ready, _, _ = select.select(self.socks, [], [], 0.001 if self.late else 0.2)
            for sock in ready:
                side = self.socks.index(sock)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        self._judge(1 - side, sock.recv(70000))
            while self.late and self.late[0][0] <= time.monotonic():
                _, _, side, frame = heapq.heappop(self.late)
                self._pass(side, frame)

    def _judge(self, side: int, frame: bytes) -> None:
        draw = self.random.random
        if draw() < self.loss:
            self.counts["lost"] += 1
            return
        if draw() < self.corrupt and frame[12:14] == b"\x08\x00":  # ARP has nothing to find it out by
            at = self.random.randrange(14, len(frame))
            frame = frame[:at] + bytes([frame[at] ^ (1 << self.random.randrange(8))]) + frame[at + 1 :]
            self.counts["changed"] += 1
        if draw() < self.reorder:
            self.counts["delayed"] += 1
            heapq.heappush(self.late, (time.monotonic() + 0.002, self.counts["delayed"], side, frame))
            return
        if draw() < self.duplicate:
            self.counts["doubled"] += 1
            self._pass(side, frame)
        self._pass(side, frame)

    def _pass(self, side: int, frame: bytes) -> None:
        self.counts["passed"] += 1
        with contextlib.suppress(OSError):
            self.socks[side].send(frame)

    def end(self) -> None:
        self.ended = True
        self.thread.join(10)
        for sock in self.socks:
            sock.close()


class Apart(Hosts):
    """Two hosts with a third one between them."""

    def wire(self) -> None:
        middle = self.testbed.host(f"m{self._count}")
        self.testbed.wire(self.a, middle)
        self.testbed.wire(middle, self.b, b_addr=f"{PEER}/24")
        for host in (self.a, self.b, middle):
            host.offload(False)  # real checksums, and no frame larger than the cable's
        self.middle = Middle(middle, 1)

    def close(self) -> None:
        self.middle.end()
        super().close()


@pytest.fixture(scope="module")
def apart_module() -> Iterator[Apart]:
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    hosts = Apart()
    yield hosts
    hosts.close()


@pytest.fixture
def apart(apart_module: Apart) -> Iterator[Apart]:
    yield apart_module
    faults(apart_module)
    apart_module.tidy()


def faults(apart: Apart, *, loss: float = 0, duplicate: float = 0, reorder: float = 0, corrupt: float = 0) -> None:
    middle = apart.middle
    middle.loss, middle.duplicate, middle.reorder, middle.corrupt = loss, duplicate, reorder, corrupt


@pytest.mark.parametrize("what", FAULTS)
def test_against_the_kernel(apart: Apart, what: str) -> None:
    size = 1 << 20
    app = apart.app()
    with apart.listener() as listener:
        # The handshake goes through the same bad wire.
        faults(apart, **FAULTS[what])
        app.do(f"s = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout={STALL_S})")
        peer, _ = listener.accept()
    peer.settimeout(STALL_S)
    start = time.monotonic()
    with meanwhile(receive_into, peer, size) as got:
        app.do(f"send_stream(s, {size}, 1)")
    middle = time.monotonic()
    with meanwhile(send_stream, peer, size, 2):
        assert app.value(f"receive_into(s, {size})") == digest_of(size, 2)
    end = time.monotonic()
    assert got == [digest_of(size, 1)]
    mine = app.value("s.session.stat()['retransmits']")
    print(
        f"\n{what}: sent in {middle - start:.2f} s, {mine} retransmissions;"
        f" received in {end - middle:.2f} s, {total_retrans(peer)} by the kernel; {apart.middle.counts}"
    )
    faults(apart)
    peer.close()
    app.do("assert s.recv(1) == b''; s.close()")


def test_datagrams_over_a_bad_wire(apart: Apart) -> None:
    """What arrives is whole and unchanged; what does not is lost; nothing else."""
    app = apart.app()
    app.do("u = udp_socket(); u.settimeout(0.5); got = []")
    port = app.value("u.getsockname()[1]")
    sent = [bytes([n]) * (n * 37) for n in range(100)]
    app.start(
        "with contextlib.suppress(TimeoutError):\n"
        "    while True: got.append(hashlib.sha256(u.recv(65535)).hexdigest())\n"
    )
    with apart.datagrams() as sock:
        sock.sendto(b"", (ADDRESS, port))  # the neighbour is known before the wire gets bad
        time.sleep(0.1)
        faults(apart, **FAULTS["everything"])
        for data in sent:
            sock.sendto(data, (ADDRESS, port))
            time.sleep(0.002)
    app.answer()
    import hashlib

    got = app.value("got")
    assert len(got) > 50 and set(got) <= {hashlib.sha256(data).hexdigest() for data in [b"", *sent]}
