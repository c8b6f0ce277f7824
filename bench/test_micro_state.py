"""What a packet passes on its way besides the protocols: datagram queues, buffers, metastate, port names."""

from __future__ import annotations

import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.kernelshim.memory import memory_pair
from ulnet.stack.frames import build_udp
from ulnet.stack.metastate import Metastate
from ulnet.stack.ports import TCP, UDP, PortTable
from ulnet.stack.sim_buf import RingLab
from ulnet.stack.udp import DatagramQueue

OURS = "10.0.0.1"


@pytest.mark.parametrize("size", [1, 1472])
def test_datagram_queue(benchmark: BenchmarkFixture, size: int) -> None:
    """64 datagrams in from a memory link, 64 out."""
    benchmark.group = "datagram queue, 64 datagrams"
    here, there = memory_pair()
    queue = DatagramQueue(there)
    frame = build_udp("10.0.0.2", OURS, 5000, 7, bytes(size))
    buffer = bytearray(size)

    def through() -> int:
        for _ in range(64):
            here.send_frame(frame)
        queue.poll()
        got = 0
        for _ in range(64):
            got += queue.read_into(buffer)[0]
        return got

    assert benchmark(through) == 64 * size


@pytest.mark.parametrize("size", [1448, 65_160], ids=["copied", "held in the ring"])
def test_receive_buffers(benchmark: BenchmarkFixture, size: int) -> None:
    """One payload from a ring slot into the queue and out of it."""
    benchmark.group = "receive buffers"
    lab = RingLab(64)
    payload = bytes(size)

    def through() -> int:
        lab.receive(payload)
        return len(lab.read(size))

    assert benchmark(through) == size


@pytest.mark.parametrize("hold", [False, True], ids=["copied", "held"])
def test_send_buffers(benchmark: BenchmarkFixture, hold: bool) -> None:
    """64 KiB written, cut into pieces of a super-segment, acknowledged."""
    benchmark.group = "send buffers"
    lab = RingLab()
    payload = bytes(65_536)

    def through() -> int:
        lab.write(payload, hold=hold)
        pieces = len(lab.pieces(0, 65_160))
        lab.drop(len(payload))
        lab.reap()
        return pieces

    assert benchmark(through) >= 1


@pytest.mark.parametrize("neighbours", [1, 200])
def test_resolve(benchmark: BenchmarkFixture, neighbours: int) -> None:
    """Route and neighbour of a destination from the shared page."""
    benchmark.group = "metastate resolve"
    meta = Metastate.create(OURS, 24, b"\x02\0\0\0\0\x01", 1500, "10.0.0.254")
    for last in range(2, 2 + neighbours):
        meta.set_neighbour(f"10.0.0.{last}", bytes((2, 0, 0, 0, 1, last)))
    answer = benchmark(meta.resolve, f"10.0.0.{1 + neighbours}")
    assert answer.mac == bytes((2, 0, 0, 0, 1, 1 + neighbours))


@pytest.mark.parametrize("held", [0, 10_000])
@pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])
def test_choose_port(benchmark: BenchmarkFixture, proto: int, held: int) -> None:
    """An ephemeral name chosen and given back, while others hold theirs."""
    benchmark.group = "ports"
    table = PortTable([OURS], rng=random.Random(1))
    for _ in range(held):
        table.choose(proto, OURS, "10.0.0.2", 80, now_ns=0)

    def choose() -> None:
        table.release(table.choose(proto, OURS, "10.0.0.3", 80, now_ns=0), now_ns=0)

    benchmark(choose)
    assert len(table) == held


def test_accept_name(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "ports"
    table = PortTable([OURS], rng=random.Random(1))
    listener = table.bind(TCP, "", 8000, now_ns=0)
    table.listen(listener)

    def accept() -> None:
        table.release(table.accept(listener, OURS, "10.0.0.2", 5000, now_ns=0), now_ns=0)

    benchmark(accept)
    assert len(table) == 1
