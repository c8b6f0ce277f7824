"""Kernel sockets against ulnet, end to end: two hosts, a process and a processor each, filters and guard on.

Ring polled in user space ("ipf") meets kernel sockets that spin; interfaces that sleep between frames ("shm", "ipc")
meet kernel sockets that block. Times are those the measuring processes saw (conftest.Measured).
"""

from __future__ import annotations

import pytest
from conftest import Ends, Measured
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [pytest.mark.benchmark(timer=Measured.clock), pytest.mark.timeout(180)]

API = {"ipf": "ulnet", "shm": "ulnet-shm", "ipc": "ulnet-ipc"}
ROUNDS = 5
BULK_BYTES = 256 << 20


@pytest.mark.parametrize("interface", API)
@pytest.mark.parametrize(("proto", "size"), [("tcp", 1), ("tcp", 1460), ("udp", 1), ("udp", 1472)])
def test_round_trip(benchmark: BenchmarkFixture, ends: Ends, interface: str, proto: str, size: int) -> None:
    benchmark.group = f"round trip {proto} {size} B"
    count = 2000 if interface == "ipf" else 500
    command = {"op": "rtt", "proto": proto, "sizes": [size], "count": count, "warm": 200, "spin": interface == "ipf"}
    ends.compare(benchmark, API[interface], command, "us", rounds=ROUNDS)


@pytest.mark.parametrize("interface", API)
def test_bulk(benchmark: BenchmarkFixture, ends: Ends, interface: str) -> None:
    benchmark.group = "bulk tcp 256 MiB"
    command = {"op": "bulk", "proto": "tcp", "bytes": BULK_BYTES}
    ends.compare(benchmark, API[interface], command, "seconds", rounds=ROUNDS, per_second=BULK_BYTES >> 20)


@pytest.mark.parametrize("interface", API)
def test_connection(benchmark: BenchmarkFixture, ends: Ends, interface: str) -> None:
    """Connect, exchange one byte each way, close."""
    benchmark.group = "connection tcp"
    ends.compare(
        benchmark, API[interface], {"op": "connect", "proto": "tcp", "count": 30}, "us", rounds=3, per_second=1
    )


@pytest.mark.parametrize("interface", API)
@pytest.mark.parametrize("size", [1, 1472])
def test_datagram_train(benchmark: BenchmarkFixture, ends: Ends, interface: str, size: int) -> None:
    """Datagrams in trains of 32, an answer to each train; one send and one receive call a datagram; time for each."""
    benchmark.group = f"train udp {size} B"
    command = {"op": "train", "proto": "udp", "size": size, "count": 16_000, "length": 32, "spin": interface == "ipf"}
    ends.compare(benchmark, API[interface], command, "us", rounds=ROUNDS, per_second=1)
