"""Selective acknowledgement: what the receiver reports (RFC 2018), what the sender makes of it (RFC 6675, 8985 7)."""

from __future__ import annotations

import random

import pytest

from ulnet.stack.sim import Endpoint, Sim
from ulnet.stack.sim_trace import Segment
from ulnet.stack.tcp_recovery import Recovery

MS = 1_000_000
MSS = 1448
OPTIONS = {"sack": True, "sndbuf": 1 << 20, "rcvbuf": 1 << 20}


# ---- the scoreboard alone ----


def test_more_than_two_segments_beyond_a_hole_mean_that_it_is_lost() -> None:
    r = Recovery("sack", iss=0)
    assert r.on_sack([(3000, 5000)], 1000, 9000, 1000) == {"news"}
    assert (r.gone, r.hole(1000), r.extra_segments) == (2000, None, 0)  # may be on its way; what came left the network
    assert r.on_sack([(3000, 5001)], 1000, 9000, 1000) == {"news", "enter"}
    assert r.hole(1000) == (1000, 2000)
    assert r.gone == 2001 + 2000
    r.resent(1000, 500, 1000, 9000)
    assert (r.gone, r.hole(1000)) == (2001 + 1500, (1500, 1500))
    r.resent(1500, 1500, 1000, 9000)
    assert (r.gone, r.hole(1000)) == (2001, None)


def test_three_separate_blocks_mean_it_too() -> None:
    r = Recovery("sack", iss=0)
    r.on_sack([(2000, 2010)], 1000, 9000, 1000)
    r.on_sack([(3000, 3010)], 1000, 9000, 1000)
    assert r.on_sack([(4000, 4010), (3000, 3010), (2000, 2010)], 1000, 9000, 1000) == {"news", "enter"}
    assert r.hole(1000) == (1000, 1000)
    r.resent(1000, 1000, 1000, 9000)
    assert r.hole(1000) is None  # what lies between the blocks is not lost yet


def test_what_was_sent_again_is_lost_when_later_data_arrive() -> None:
    r = Recovery("sack", iss=0)
    r.on_sack([(2000, 6000)], 1000, 6000, 1000)
    r.resent(1000, 1000, 1000, 6000)
    r.on_sack([(2000, 8000)], 1000, 9000, 1000)
    assert r.hole(1000) is None  # two segments may have overtaken it
    r.on_sack([(2000, 8001)], 1000, 9000, 1000)
    assert r.hole(1000) == (1000, 1000)


def test_recovery_ends_where_it_began_and_partial_acks_send_nothing_by_themselves() -> None:
    r = Recovery("sack", iss=0)
    r.on_sack([(2000, 6000)], 1000, 9000, 1000)
    r.resent(1000, 1000, 1000, 9000)
    assert r.on_ack(6000, 9500) == set()
    assert (r.resend, r.hole(6000), r.gone, r.state) == (None, None, 0, "fast")
    assert r.on_ack(9000, 9500) == {"exit"}
    assert r.state == "open"


def test_duplicates_without_blocks_count_as_for_newreno() -> None:
    r = Recovery("sack", iss=0)
    assert [r.on_dup_ack(1000, 9000) for _ in range(4)] == [set(), set(), {"enter"}, {"inflate"}]
    assert r.resend == 1000
    assert r.on_ack(3000, 9000) == {"partial"}
    assert r.resend == 3000


def test_lies_and_old_news() -> None:
    r = Recovery("sack", iss=0)
    for left, right in ((500, 900), (900, 1000), (1000, 2000), (8000, 9001), (4000, 3000), (3000, 3000)):
        assert r.on_sack([(left, right)], 1000, 9000, 10) == set()
        assert r.gone == 0
    r.on_sack([(3000, 4000)], 1000, 9000, 1000)
    r.on_ack(3000, 9000)  # it has given 3000 to 4000 back
    assert r.gone == 0
    r.on_sack([(5000, 8000)], 3000, 9000, 100)
    r.on_rto(3000, 9000)
    assert (r.gone, r.hole(3000), r.state) == (0, None, "loss")


def test_more_blocks_than_there_is_room_for() -> None:
    r = Recovery("sack", iss=0)
    for i in range(100):
        r.on_sack([(1000 + 20 * i, 1010 + 20 * i)], 900, 9000, 1000)
    assert r.gone >= 640
    r.on_ack(9000, 9000)
    assert r.gone == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_blocks_against_a_model_of_single_bytes(seed: int) -> None:
    rng = random.Random(seed)
    mss, size, start = 7, 300, 2**32 - rng.randrange(600)
    r = Recovery("sack", iss=start - 1)
    una, sacked, resent = 0, set[int](), set[int]()
    for _ in range(200):
        if rng.random() < 0.8:
            left = rng.randrange(una + 1, size - 1) if una < size - 2 else size - 1
            right = min(size, left + rng.randrange(1, 40))
            r.on_sack([(start + left, start + right)], start + una, start + size, mss)
            if left > una:
                sacked |= set(range(left, right))
        elif sacked:
            una = rng.choice(sorted(b + 1 for b in sacked if b + 1 not in sacked))
            r.on_ack(start + una, start + size)
            sacked = {b for b in sacked if b >= una}
        holes, edge, above, blocks = [b for b in range(una, size) if b not in sacked], una, 0, 0
        for b in range(size - 1, una, -1):
            if b in sacked:
                above += 1
                if b - 1 not in sacked:
                    blocks += 1
                    if above > 2 * mss or blocks >= 3:
                        edge = b
                        break
        lost = [b for b in holes if b < edge]
        assert r.gone == len(sacked) + len([b for b in lost if b not in resent]), (seed, una)
        hole = r.hole(start + una)
        if r.state == "fast":
            first = next((b for b in lost if b not in resent), None)
            assert (None if hole is None else (hole[0] - start) % 2**32) == first
            if hole is not None and rng.random() < 0.5:
                n = rng.randrange(1, hole[1] + 1)
                r.resent(hole[0], n, start + una, start + size)
                assert first is not None
                resent |= set(range(first, first + n))
        if una == size or (una >= size - 2):
            break


# ---- two ends ----


def joined(seed: int = 1, **wire: float) -> tuple[Sim, Endpoint, Endpoint]:
    sim = Sim(seed=seed, capture=False)
    a, b = sim.pair(options=OPTIONS | ({"max_gso_bytes": 65_160} if wire.get("gso") else {}), **wire)  # type: ignore[arg-type]
    b.listen()
    a.connect()
    sim.run(for_ns=100 * MS)
    assert (a.state, b.state) == ("ESTABLISHED", "ESTABLISHED")
    return sim, a, b


def lose(*numbers: int) -> tuple[list[int], object]:
    """A filter that loses the data segments with these numbers, counted from 0; and how many there were."""
    seen: list[int] = []

    def drop(segment: Segment) -> bool:
        if not segment.length:
            return False
        seen.append(segment.seq)
        return len(seen) - 1 in numbers

    return seen, drop


def test_several_holes_of_one_window_are_repaired_together() -> None:
    sim, a, b = joined(delay_ns=MS)
    _, a.wire.drop = lose(3, 5, 8)
    data = random.Random(1).randbytes(40 * MSS)
    a.pour(data)
    b.drain()
    sim.run(for_ns=40 * MS)  # NewReno would need a round trip for each, and more with a small window
    assert bytes(b.received) == data
    assert a.counters["retransmits"] == 3
    assert a.counters["rto_events"] == 0
    assert a.counters["fast_retransmits"] == 1


def test_one_lost_super_segment_is_seen_by_the_next_one() -> None:
    sim, a, b = joined(delay_ns=MS, gso=True)
    data = random.Random(1).randbytes(1 << 20)
    a.pour(data[: 1 << 19])
    b.drain()
    sim.run(for_ns=100 * MS)
    seen, a.wire.drop = lose(2)
    a.pour(data[1 << 19 :])
    sim.run(for_ns=100 * MS)
    assert bytes(b.received) == data
    assert a.counters["rto_events"] == 0
    assert len(seen) < 20


def window_with_losses(*numbers: int) -> Endpoint:
    """The sender of an initial window, all of which arrives without a timeout although these segments are lost."""
    sim, a, b = joined(delay_ns=MS)
    _, a.wire.drop = lose(*numbers)
    data = random.Random(1).randbytes(10 * MSS)
    a.pour(data)
    b.drain()
    sim.run(for_ns=60 * MS)
    assert bytes(b.received) == data
    assert a.counters["rto_events"] == 0
    return a


def test_a_lost_tail_is_repaired_without_a_timeout() -> None:
    window_with_losses(7, 8, 9)  # the end of the initial window, and of all


def test_a_lost_tail_whose_repair_is_lost_too() -> None:
    """The probe's answer says that the path works, so silence is asked after once more."""
    a = window_with_losses(7, 8, 9, 11, 12)  # 10 is the probe
    assert a.counters["tail_probes"] == 2


def test_a_lost_single_segment_is_asked_after_before_the_timeout() -> None:
    """But not before a receiver that delays its ACK has answered."""
    sim, a, b = joined(delay_ns=MS)
    b.drain()
    a.pour(b"kept")
    sim.run(for_ns=150 * MS)
    assert a.counters["tail_probes"] == 0
    _, a.wire.drop = lose(0)
    a.pour(b"lost")
    sim.run(for_ns=70 * MS)
    assert bytes(b.received) == b"keptlost"
    assert (a.counters["tail_probes"], a.counters["rto_events"]) == (1, 0)


def test_a_peer_that_says_nothing_is_probed_once() -> None:
    sim, a, b = joined(delay_ns=MS)
    a.wire.drop = lambda segment: True
    a.pour(bytes(10 * MSS))
    sim.run(for_ns=5000 * MS)
    assert a.counters["tail_probes"] == 1
    assert a.counters["rto_events"] > 3


def test_a_retransmission_that_is_lost_too() -> None:
    sim, a, b = joined(delay_ns=MS)
    first: list[int] = []

    def drop(segment: Segment) -> bool:
        if segment.length and not first:
            first.append(segment.seq)
        lost = bool(segment.length) and segment.seq == first[0] and len(first) < 3
        if lost:
            first.append(segment.seq)
        return lost

    a.wire.drop = drop
    data = random.Random(1).randbytes(200 * MSS)
    a.pour(data)
    b.drain()
    sim.run(for_ns=150 * MS)
    assert len(first) == 3
    assert bytes(b.received) == data
    assert a.counters["rto_events"] == 0


def test_what_came_twice_is_said_once() -> None:
    """RFC 2883: the first block, before what lies beyond a gap."""
    sim, a, b = joined(delay_ns=MS)
    a.pour(bytes(3 * MSS))
    b.drain()
    sim.run(for_ns=50 * MS)
    nxt = b.numbers["rcv_nxt"]
    end = 1 + 3 * MSS
    again = b.inject("A", seq=nxt - 2 * MSS, payload=bytes(MSS))
    assert [(s.ack, s.sack) for s in again] == [(end, ((end - 2 * MSS, end - MSS),))]
    assert b.inject("A", seq=nxt + MSS, payload=b"z")[-1].sack == ((end + MSS, end + MSS + 1),)
    both = b.inject("A", seq=nxt - MSS, payload=bytes(MSS))[-1]
    assert both.sack == ((end - MSS, end), (end + MSS, end + MSS + 1))
    partly = b.inject("A", seq=nxt - 1, payload=bytes(MSS + 1))[-1]
    assert (partly.ack, partly.sack) == (end + MSS + 1, ((end - 1, end),))


def test_answers_to_what_was_sent_twice_mean_no_loss() -> None:
    sim, a, b = joined(delay_ns=MS)
    a.pour(bytes(10 * MSS))  # in flight
    una = a.numbers["snd_una"]
    for _ in range(4):
        a.inject("A", ack=una, sack=((una - MSS, una),))
    assert (a.counters["dsacks_in"], a.counters["dup_acks_in"], a.counters["fast_retransmits"]) == (4, 0, 0)
    for _ in range(3):
        a.inject("A", ack=una)
    assert a.counters["fast_retransmits"] == 1


@pytest.mark.parametrize("options", [{"sack": True}, {"sack": False}])
def test_only_if_both_ends_do(options: dict[str, int]) -> None:
    sim = Sim(seed=1)
    a, b = sim.pair(options={"sack": True}, options_b=options)
    b.listen()
    a.connect()
    _, a.wire.drop = lose(2)
    a.pour(bytes(20 * MSS))
    b.drain()
    sim.run(for_ns=1000 * MS)
    assert len(b.received) == 20 * MSS
    assert a.counters["retransmits"] == 1
    assert a.counters["rto_events"] == 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("gso", [False, True])
def test_everything_arrives_once_and_in_order_over_a_bad_wire(seed: int, gso: bool) -> None:
    sim, a, b = joined(seed, delay_ns=MS // 20, loss=0.0, gso=gso)
    for wire in (a.wire, b.wire):
        wire.loss, wire.duplicate, wire.reorder, wire.reorder_ns = 0.05, 0.02, 0.02, MS // 5
    there, back = random.Random(seed).randbytes(600_000), random.Random(-seed).randbytes(100_000)
    a.pour(there)
    b.pour(back)
    a.drain()
    b.drain()
    while len(b.received) < len(there) or len(a.received) < len(back):
        sim.run(for_ns=10 * MS)
        assert sim.now_ns < 600_000 * MS
    assert bytes(b.received) == there
    assert bytes(a.received) == back


@pytest.mark.parametrize("seed", range(6))
def test_handing_over_in_the_middle_of_recovery(seed: int) -> None:
    sim, a, b = joined(seed, delay_ns=MS // 20, loss=0.0)
    a.wire.loss = b.wire.loss = 0.03
    data = random.Random(seed).randbytes(800_000)
    a.pour(data)
    b.drain()
    rng = random.Random(seed)
    while len(b.received) < len(data):
        sim.run(for_ns=rng.randrange(MS // 2, 3 * MS))
        for end in (a, b):
            if rng.random() < 0.5:
                end.migrate(rng.randrange(1 << 40))
        assert sim.now_ns < 300_000 * MS
    assert bytes(b.received) == data


def test_loss_costs_less_than_with_newreno() -> None:
    took = {True: 0, False: 0}
    size = 4 << 20
    for sack in took:
        for seed in range(3):
            sim = Sim(seed=seed, capture=False)
            a, b = sim.pair(options=OPTIONS | {"sack": sack}, delay_ns=MS // 20, loss=0.05, rate_bps=10_000_000_000)
            b.listen()
            a.connect()
            a.pour(bytes(size))
            b.drain()
            start = sim.now_ns
            while len(b.received) < size:
                assert sim.step()
            took[sack] += sim.now_ns - start
    assert took[True] < took[False] / 2, took
