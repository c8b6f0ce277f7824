"""Whole connections over bad wires: every byte arrives, both ends close, nothing leaks, runs replay from their seed."""

from __future__ import annotations

import random

import pytest

from ulnet.stack.sim import Endpoint, Sim

SIZES = [0, 1, 1000, 50_000, 300_000]
BUFFERS = [2048, 10_000, 65_536, 1 << 20]


class Run:
    """One random pair of transfers; everything about it comes from the seed."""

    def __init__(self, seed: int, *, migrate: bool = False, loss: float | None = None, capture: bool = False) -> None:
        r = random.Random(seed)
        self.sim = Sim(seed, capture=capture)
        options = {
            "sndbuf": r.choice(BUFFERS),
            "rcvbuf": r.choice(BUFFERS),
            "mtu": r.choice([576, 1500, 9000]),
            "nodelay": r.random() < 0.5,
            "max_gso_bytes": r.choice([0, 0, 20_000, 65_483]),
            "slots": r.choice([0, 0, 64, 256]),
            "iss": r.choice([r.getrandbits(32), 2**32 - 1000]),
        }
        delay = r.choice([1000, 10_000, 1_000_000, 50_000_000])
        self.a, self.b = self.sim.pair(
            options=options,
            options_b=options | {"sndbuf": r.choice(BUFFERS), "rcvbuf": r.choice(BUFFERS), "slots": r.choice([0, 128])},
            delay_ns=delay,
            jitter_ns=r.choice([0, 0, delay]),
            loss=r.choice([0, 0.01, 0.05, 0.15]) if loss is None else loss,
            duplicate=r.choice([0, 0.05]),
            reorder=r.choice([0, 0.1, 0.3]),
            corrupt=r.choice([0, 0.02]),
            gso=r.random() < 0.5,
            rate_bps=r.choice([0, 0, 10**9, 10**7]),
            queue_bytes=r.choice([20_000, 10**6]),
        )
        self.data_a = r.randbytes(r.choice(SIZES))
        self.data_b = r.randbytes(r.choice(SIZES))
        self.b.listen()
        self.a.connect()
        for end, data in ((self.a, self.data_a), (self.b, self.data_b)):
            end.drain(close=True)
            end.pour(data, close=True)
        self.migrations = 0
        if migrate:
            for _ in range(r.randrange(1, 60)):
                self.sim.run(for_ns=r.choice([delay // 2, delay, 5 * delay, 300_000_000]))
                end = r.choice([self.a, self.b])
                end.migrate(r.choice([0, 10**9, -(5 * 10**8), 10**15]))
                self.migrations += 1
        self.sim.run(max_events=3_000_000)

    def check(self) -> None:
        seed = f"seed {self.sim.seed}"
        assert bytes(self.b.received) == self.data_a, seed
        assert bytes(self.a.received) == self.data_b, seed
        assert (self.a.state, self.b.state) == ("CLOSED", "LISTEN"), seed
        for end in (self.a, self.b):
            m = end.memory
            assert m["blocks"] == m["slots"] == m["held"] == m["lent"] == 0, (seed, m)


@pytest.mark.parametrize("block", range(20))
def test_transfers_over_bad_wires(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        Run(seed).check()


@pytest.mark.parametrize("block", range(10))
def test_migration_at_random_times_changes_nothing(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        run = Run(seed, migrate=True)
        assert run.migrations
        run.check()


def test_a_run_replays_from_its_seed() -> None:
    first, again, other = (Run(seed, loss=0.1, capture=True) for seed in (5, 5, 6))
    assert first.sim.trace == again.sim.trace
    assert first.sim.trace != other.sim.trace


def test_clean_wire_needs_no_retransmission() -> None:
    for seed in range(20):
        sim = Sim(seed, capture=False)
        size = random.Random(seed).choice(BUFFERS[1:])
        a, b = sim.pair(options={"max_gso_bytes": 65_483, "sndbuf": size, "rcvbuf": size}, gso=seed % 2 == 1)
        b.listen()
        a.connect()
        for end in (a, b):
            end.drain(close=True)
            end.pour(bytes(500_000), close=True)
        sim.run()
        assert a.counters["retransmits"] == b.counters["retransmits"] == 0, seed
        assert len(a.received) == len(b.received) == 500_000


def test_a_thousand_connections_in_a_row_leave_nothing() -> None:
    sim = Sim(3, capture=False)
    a, b = sim.pair(delay_ns=1000)
    b.listen()
    b.drain(close=True)
    for i in range(1000):
        a.connect()
        a.drain(close=True)
        a.pour(b"x" * i, close=True)
        sim.run(for_ns=70_000_000_000)
        assert (len(b.received), a.state, b.state) == (i * (i + 1) // 2, "CLOSED", "LISTEN"), i
        b.drain(close=True)
    assert a.memory["blocks"] == b.memory["blocks"] == 0


def test_simultaneous_open_and_close() -> None:
    sim = Sim(1)
    a, b = sim.pair()
    a.connect()
    b.connect()
    sim.advance(5000)
    assert (a.state, b.state) == ("SYN-SENT", "SYN-SENT")
    sim.advance(1_000_000)
    assert (a.state, b.state) == ("ESTABLISHED", "ESTABLISHED"), str(sim.trace)
    a.write(b"from a")
    b.write(b"from b")
    sim.advance(1_000_000)
    assert (a.read(), b.read()) == (b"from b", b"from a")
    a.shutdown()
    b.shutdown()
    sim.advance(15_000)
    assert (a.state, b.state) == ("CLOSING", "CLOSING")
    sim.run()
    assert (a.state, b.state) == ("CLOSED", "CLOSED")
    assert a.counters["retransmits"] == b.counters["retransmits"] == 0


def test_half_close_leaves_the_other_direction_open() -> None:
    sim = Sim(1)
    a, b = sim.pair()
    b.listen()
    a.connect()
    a.pour(b"request", close=False)
    sim.advance(1_000_000)
    a.shutdown()
    sim.advance(1_000_000)
    assert (a.state, b.state) == ("FIN-WAIT-2", "CLOSE-WAIT")
    assert (b.read(), b.read()) == (b"request", b"")
    a.drain(close=True)
    b.pour(bytes(200_000), close=True)
    sim.run()
    assert len(a.received) == 200_000
    assert (a.state, b.state) == ("CLOSED", "LISTEN")


def test_slow_reader_with_a_small_ring_loses_nothing() -> None:
    sim = Sim(4, capture=False)
    a, b = sim.pair(
        options={"max_gso_bytes": 65_483, "sndbuf": 1 << 20, "rcvbuf": 1 << 20},
        options_b={"slots": 8, "rcvbuf": 1 << 20},
        gso=True,
    )
    b.listen()
    a.connect()
    data = random.Random(1).randbytes(3_000_000)
    a.pour(data, close=True)
    got, lent = bytearray(), []
    while True:
        sim.advance(200_000)
        try:
            seg = b.lend(30_000)
        except BlockingIOError:
            continue
        except EOFError:
            break
        got += bytes(seg)
        lent.append((seg, bytes(seg)))
        if len(lent) > 12:
            old, was = lent.pop(0)
            assert bytes(old) == was
            old.release()
    for old, was in lent:
        assert bytes(old) == was
        old.release()
    assert bytes(got) == data
    assert b.memory["evacuated"] > 0
    assert b.memory["blocks"] == b.memory["slots"] == b.memory["lent"] == 0


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="'sndbuff'"):
        Sim(0).endpoint("a", sndbuff=1)
    a = Sim(0).endpoint("a")
    assert isinstance(a, Endpoint)
    with pytest.raises(ValueError, match="SFRPUA"):
        a.inject("Q")
