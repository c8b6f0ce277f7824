"""TCP without a network: segments in and out at virtual time, and two whole stacks in one thread over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.stack.sim import Sim
from ulnet.table import lockstep

MSS = 1448
RUN_BYTES = 1 << 20


def rate(benchmark: BenchmarkFixture, moved: float, name: str = "MiB_per_second") -> None:
    if benchmark.stats is not None:
        benchmark.extra_info[name] = round(moved / benchmark.stats["median"], 1)


def pour(loss: float, gso: int) -> int:
    """Move RUN_BYTES over a virtual wire; the bytes that arrived."""
    sim = Sim(seed=1, capture=False)
    options = {"max_gso_bytes": gso, "sndbuf": RUN_BYTES, "rcvbuf": RUN_BYTES}
    a, b = sim.pair(options=options, delay_ns=50_000, loss=loss, gso=bool(gso))
    b.listen()
    a.connect()
    a.pour(bytes(RUN_BYTES), close=True)
    b.drain(close=True)
    sim.run()
    return len(b.received)


@pytest.mark.parametrize(
    ("loss", "gso"), [(0.0, 0), (0.0, 65_160), (0.02, 0)], ids=["segments", "super-segments", "2 percent lost"]
)
def test_pour(benchmark: BenchmarkFixture, loss: float, gso: int) -> None:
    """A connection from SYN to the end and 1 MiB, simulator included."""
    benchmark.group = "tcp, virtual time, 1 MiB"
    assert benchmark(pour, loss, gso) == RUN_BYTES
    rate(benchmark, RUN_BYTES / 2**20)


def connections(count: int) -> int:
    sim = Sim(seed=1, capture=False)
    for _ in range(count):
        a, b = sim.pair(delay_ns=10_000)
        b.listen()
        a.connect()
        a.pour(b"q", close=True)
        b.drain(close=True)
    sim.run()
    return len(b.received)


def test_connections(benchmark: BenchmarkFixture) -> None:
    """Open, one byte, close both ways, TIME-WAIT."""
    benchmark.group = "tcp, virtual time, 100 connections"
    assert benchmark(connections, 100) == 1
    rate(benchmark, 100, "per_second")


def receiver(window: int) -> Any:
    """An endpoint in ESTABLISHED with room for ``window`` bytes; its peer is whoever injects."""
    sim = Sim(seed=1, capture=False)
    a, b = sim.pair(options={"rcvbuf": 2 * window}, delay_ns=1)
    b.listen()
    a.connect()
    sim.run(for_ns=1_000_000)
    assert b.state == "ESTABLISHED"
    return b


@pytest.mark.parametrize("order", ["in order", "backwards", "every second first"])
def test_input(benchmark: BenchmarkFixture, order: str) -> None:
    """32 segments into one connection, read at the end; the reassembly queue does the rest."""
    benchmark.group = "tcp input, 32 segments"
    count = 32  # fits the window of the SYN, which cannot be scaled
    end = receiver(4 * count * MSS)
    places = list(range(count))
    if order == "backwards":
        places.reverse()
    elif order == "every second first":
        places = places[1::2] + places[0::2]
    payload = bytes(MSS)

    def arrive() -> int:
        base = end.numbers["rcv_nxt"]
        for place in places:
            end.inject("A", seq=base + place * MSS, payload=payload)
        return len(end.read(count * MSS))

    assert benchmark(arrive) == count * MSS
    rate(benchmark, count * MSS / 2**20)


@pytest.fixture
def pair() -> Iterator[lockstep.Pair]:
    with lockstep.memory() as made:
        yield made


@pytest.mark.parametrize(("proto", "size"), [("tcp", 1), ("tcp", 1460), ("udp", 1), ("udp", 1472)])
def test_stack_round_trip(benchmark: BenchmarkFixture, pair: lockstep.Pair, proto: str, size: int) -> None:
    """Two whole stacks, sockets included: what a round trip costs in user space."""
    benchmark.group = "two stacks in one thread, 100 round trips"
    a, b = pair.tcp() if proto == "tcp" else pair.udp()
    with a, b:
        benchmark(lockstep.round_trips, a, b, size, 100)


@pytest.mark.parametrize("lend", [False, True], ids=["recv_into", "recv_buffer"])
def test_stack_blocks(benchmark: BenchmarkFixture, pair: lockstep.Pair, lend: bool) -> None:
    benchmark.group = "two stacks in one thread, 64 blocks of 65160 B"
    a, b = pair.tcp()
    with a, b:
        lockstep.warm(pair, a, b)
        benchmark(lockstep.blocks, pair, a, b, 64, lend=lend)
    rate(benchmark, 64 * lockstep.BLOCK / 2**20)
