"""Hand-over: nothing of a connection is lost or changed, and bytes that lie are refused."""

from __future__ import annotations

import errno
import random

import pytest
from tcp_lone import IN_STATE, MS, PEER, SECOND, established

from ulnet.stack.sim import Endpoint, Sim

SKIP = {"LISTEN"}  # a listener is no connection


def snapshot(e: Endpoint) -> tuple[object, ...]:
    return (e.state, e.numbers, e.timers, {k: v for k, v in e.stat.items() if k != "changed_ns"}, e.ready, e.error)


@pytest.mark.parametrize("state", sorted(set(IN_STATE) - SKIP))
@pytest.mark.parametrize("offset", [0, 10**18, -(10**9)])
def test_every_state_survives_with_all_its_numbers(state: str, offset: int) -> None:
    e = IN_STATE[state]()
    e.sim.advance(20 * MS)
    before = snapshot(e)
    sent = len(e.sim.trace)
    e.migrate(offset)
    assert snapshot(e) == before
    assert len(e.sim.trace) == sent  # the peer notices nothing


def test_all_kinds_of_data_travel() -> None:
    e = established(wnd=5000, rcvbuf=100_000, slots=32, user_timeout_ms=70_000)
    e.setopt(6, 1, 1)
    e.setopt(1, 9, 1)
    e.inject("A", payload=b"unread" * 1000)
    e.inject("A", seq=PEER + 1 + 7000, payload=b"out of order" * 500)
    e.inject("FA", seq=PEER + 1 + 50_000)
    e.write(b"unacknowledged and unsent" * 1000)
    e.shutdown()
    before = snapshot(e)
    export = e.export()
    assert e.state == "EXPORTED"
    assert e.memory["blocks"] == e.memory["slots"] == 0
    e.import_(export)
    after = snapshot(e)
    for name in ("unread_memory", "out_of_order_memory"):  # slots became blocks
        before[1].pop(name)  # type: ignore[attr-defined]
        after[1].pop(name)  # type: ignore[attr-defined]
    assert after == before
    assert (e.getopt(6, 1), e.getopt(1, 9), e.getopt(6, 18)) == (1, 1, 70_000)
    assert e.read(6000) == b"unread" * 1000
    e.inject("A", seq=PEER + 1 + 6000, payload=bytes(1000))
    assert e.read(1 << 20)[1000:] == b"out of order" * 500
    e.inject("A", seq=PEER + 1 + 13_000, payload=bytes(37_000))
    assert e.state == "CLOSING"


def test_timers_go_on_where_they_stood() -> None:
    e = established()
    e.write(b"x")
    e.sim.advance(150 * MS)
    e.migrate(10**15)
    e.sim.advance(49 * MS)
    assert e.counters["rto_events"] == 0
    e.sim.advance(1 * MS)
    assert e.counters["rto_events"] == 1


def test_timestamp_clock_goes_on() -> None:
    e = established(ts=True)
    e.write(b"x")
    first = e.sim.trace[-1].ts_val
    e.sim.advance(30 * MS)
    e.migrate(77 * SECOND)
    e.inject("A", ts=(101, 0))
    e.write(b"y")
    assert first is not None
    assert e.sim.trace[-1].ts_val == first + 30


def test_transfer_with_migration_equals_one_without() -> None:
    def run(migrate: bool) -> tuple[list[tuple[int, int, int]], bytes]:
        sim = Sim(9)
        a, b = sim.pair(options={"sndbuf": 100_000, "rcvbuf": 100_000}, rate_bps=10**9)
        b.listen()
        a.connect()
        b.drain(close=True)
        a.pour(random.Random(9).randbytes(400_000), close=True)
        while b.finished is None:
            sim.step()
            if migrate and sim.events % 7 == 0:
                a.migrate()
                b.migrate()
        return [(s.seq, s.length, s.ack) for s in sim.trace.data("a")], bytes(b.received)

    assert run(True) == run(False)


@pytest.fixture(scope="module")
def full_export() -> bytes:
    e = established(wnd=5000, rcvbuf=100_000)
    e.inject("A", payload=b"unread" * 100)
    for at in (1000, 1500, 3000):
        e.inject("A", seq=PEER + 1 + at, payload=b"ooo" * 50)
    e.write(bytes(3000))
    return e.export()


def refused(data: bytes) -> bool:
    e = Sim(0, capture=False).endpoint("x")
    try:
        e.import_(data)
    except OSError as err:
        assert err.errno == errno.EINVAL
        assert e.memory["blocks"] == 0
        return True
    # What was believed must be safe to run on.
    e.inject("A")
    e.inject("PA", payload=b"data")
    e.inject("FA")
    try:
        e.write(b"x" * 5000)
        e.read()
        e.shutdown()
    except OSError:
        pass
    e.sim.run(for_ns=2000 * SECOND, max_events=2000)
    if e.state != "CLOSED":
        e.migrate()
    e.forget()
    assert e.memory["blocks"] == 0
    return False


def test_every_truncation_is_refused(full_export: bytes) -> None:
    assert not refused(full_export)
    assert all(refused(full_export[:n]) for n in range(len(full_export)))
    assert refused(full_export + b"\0")


@pytest.mark.parametrize("block", range(8))
def test_corrupted_exports_are_refused_or_harmless(full_export: bytes, block: int) -> None:
    rng = random.Random(block)
    header = 420
    for _ in range(400):
        data = bytearray(full_export)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(header if rng.random() < 0.9 else len(data))
            if rng.random() < 0.5:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, rng.randbytes(4)])
        refused(bytes(data[: len(full_export)]))


def test_garbage_is_refused() -> None:
    rng = random.Random(0)
    for n in (0, 1, 4, 415, 416, 417, 5000):
        assert refused(rng.randbytes(n))
