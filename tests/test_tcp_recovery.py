"""What to resend (RFC 6582) and how much to send (RFC 5681): each alone, then together."""

from __future__ import annotations

import pytest
from tcp_lone import ISS, MS, established

from ulnet.stack.sim import Endpoint, Sim
from ulnet.stack.tcp_congestion import Congestion, congestion_names
from ulnet.stack.tcp_isn import isn, siphash
from ulnet.stack.tcp_recovery import Recovery

# ---- recovery alone ----


def dup(r: Recovery, una: int, top: int, n: int) -> list[set[str]]:
    return [r.on_dup_ack(una, top) for _ in range(n)]


def test_third_duplicate_resends_the_first_hole() -> None:
    r = Recovery(iss=0)
    assert dup(r, 1000, 9000, 2) == [set(), set()]
    assert r.extra_segments == 2  # limited transmit, RFC 3042
    assert dup(r, 1000, 9000, 1) == [{"enter"}]
    assert (r.resend, r.state, r.extra_segments) == (1000, "fast", 0)
    assert dup(r, 1000, 9000, 2) == [{"inflate"}, {"inflate"}]


def test_the_very_first_segment_can_be_lost() -> None:
    r = Recovery(iss=500)
    dup(r, 501, 9000, 3)
    assert r.resend == 501


def test_partial_acks_resend_hole_by_hole_until_the_point_of_entry() -> None:
    r = Recovery(iss=0)
    dup(r, 1000, 9000, 3)
    assert r.resend == 1000
    assert r.on_ack(3000, 9500) == {"partial"}
    assert r.resend == 3000
    assert r.on_ack(5000, 9500) == {"partial", "keep-timer"}
    assert r.resend == 5000
    assert r.on_ack(9000, 9500) == {"exit"}
    assert (r.resend, r.state) == (None, "open")


def test_duplicates_of_what_a_timeout_resent_do_not_start_recovery_again() -> None:
    r = Recovery(iss=0)
    r.on_rto(1000, 9000)
    assert r.state == "loss"
    assert dup(r, 1000, 9000, 5) == [set()] * 5
    assert r.on_ack(4000, 9000) == {"grow", "slow"}
    assert r.on_ack(9000, 12_000) == {"grow", "slow"}
    assert r.state == "open"
    assert dup(r, 9000, 12_000, 3) == [set()] * 3  # covers no more than `recover`
    assert r.on_ack(10_000, 12_000) == {"grow"}
    assert dup(r, 10_000, 12_000, 3)[-1] == {"enter"}


def test_numbers_wrap() -> None:
    r = Recovery(iss=2**32 - 2000)
    dup(r, 2**32 - 1000, 3000, 3)
    assert r.resend == 2**32 - 1000
    assert r.on_ack(500, 3000) == {"partial"}
    assert r.on_ack(3000, 3000) == {"exit"}


def test_recovery_still_works_after_gigabytes_without_loss() -> None:
    r = Recovery(iss=0)
    for una in range(0, 5 << 30, 100 << 20):
        r.on_ack(una + 1000, una + 9000)
    dup(r, una + 1000, una + 9000, 3)
    assert r.state == "fast"


# ---- congestion alone ----


@pytest.mark.parametrize(
    ("mss", "window"), [(536, 5360), (1460, 14_600), (9000, 18_000), (2000, 14_600), (65_495, 130_990)]
)
def test_initial_window(mss: int, window: int) -> None:
    assert Congestion("newreno", mss).cwnd == window


def test_slow_start_counts_bytes_then_avoidance_adds_one_mss_a_window() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_ack(10_000)
    assert cc.cwnd == 20_000
    cc.on_enter_recovery(20_000)
    cc.on_exit_recovery(20_000)
    assert (cc.cwnd, cc.ssthresh) == (10_000, 10_000)
    for _ in range(9):
        cc.on_ack(1000)
    assert cc.cwnd == 10_000
    cc.on_ack(1000)
    assert cc.cwnd == 11_000


def test_slow_start_ends_at_the_threshold() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_rto(40_000)
    assert (cc.cwnd, cc.ssthresh) == (1000, 20_000)
    cc.on_ack(65_000)
    assert cc.cwnd == 21_000


def test_a_window_that_is_not_used_does_not_grow() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_ack(10_000, limited=False)
    assert cc.cwnd == 10_000


def test_after_a_timeout_an_ack_counts_one_mss_at_most() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_rto(40_000)
    cc.on_ack(30_000, after_loss=True)
    assert cc.cwnd == 2000


def test_fast_recovery_window() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_enter_recovery(10_000)
    assert (cc.cwnd, cc.ssthresh) == (8000, 5000)
    cc.on_dup_ack()
    assert cc.cwnd == 9000
    cc.on_partial_ack(3000)
    assert cc.cwnd == 7000
    cc.on_partial_ack(100_000)
    assert cc.cwnd == 2000
    cc.on_exit_recovery(0)
    assert cc.cwnd == 2000


def test_window_has_a_floor_and_a_ceiling() -> None:
    cc = Congestion("newreno", 1000)
    cc.on_enter_recovery(100)
    assert cc.ssthresh == 2000
    cc = Congestion("newreno", 1000)
    for _ in range(10):
        cc.on_ack(0x7FFFFFFF)
    assert cc.cwnd == 0x3FFFFFFF


def test_names() -> None:
    assert congestion_names() == ["newreno"]
    with pytest.raises(ValueError, match="'vegas'.*newreno"):
        Congestion("vegas")
    with pytest.raises(ValueError, match="'rack'"):
        Recovery("rack")


# ---- together ----


def test_limited_transmit_then_fast_retransmit() -> None:
    e = established()
    e.write(bytes(60_000))
    una, before = e.numbers["snd_una"], len(e.sim.trace)
    for _ in range(2):
        e.inject("A", ack=una)
    new = e.sim.trace[before:]
    assert [s.seq for s in new] == [14_601, 16_061]
    (again,) = e.inject("A", ack=una)
    assert (again.seq, again.length) == (1, 1460)
    assert e.counters["fast_retransmits"] == 1
    assert e.numbers["cwnd"] == (10 + 2) * 1460 // 2 + 3 * 1460


def test_a_window_update_or_data_is_no_duplicate_ack() -> None:
    e = established()
    e.write(bytes(14_600))
    una = e.numbers["snd_una"]
    for i in range(5):
        e.inject("A", ack=una, wnd=60_000 + i)
        e.inject("A", ack=una, payload=b"x", wnd=60_000 + i)
    assert e.counters["dup_acks_in"] == 0


def transfer(drop_seq: set[int], size: int = 100_000) -> tuple[Sim, Endpoint, Endpoint]:
    sim = Sim(1)
    a, b = sim.pair(options={"sndbuf": 1 << 20, "rcvbuf": 1 << 20})
    b.listen()
    a.connect()
    b.drain(close=True)
    once = set(drop_seq)

    def drop(s: object) -> bool:
        if s.length and s.seq in once:  # type: ignore[attr-defined]
            once.discard(s.seq)  # type: ignore[attr-defined]
            return True
        return False

    a.wire.drop = drop
    a.pour(bytes(size), close=True)
    while b.finished is None:
        assert sim.step()
    assert len(b.received) == size
    return sim, a, b


@pytest.mark.parametrize(
    "lost", [{1}, {1 + 1448 * 12}, {1, 1449}, {1 + 1448 * i for i in range(10, 20)}, {1 + 1448 * 20, 1 + 1448 * 30}]
)
def test_losses_are_repaired_without_a_timeout_each_segment_once(lost: set[int]) -> None:
    sim, a, _ = transfer(lost)
    assert a.counters["rto_events"] == 0
    assert {s.seq for s in sim.trace.resent("a")} == lost
    assert a.numbers["retransmits"] == len(lost)
    assert sim.now_ns < 1_000_000_000 + 20 * MS


def test_loss_of_the_last_segment_needs_the_timer() -> None:
    sim, a, _ = transfer({1 + 1448 * 69})
    assert a.counters["rto_events"] == 1
    assert a.numbers["retransmits"] == 1


def test_a_resent_segment_lost_again_needs_the_timer() -> None:
    sim = Sim(1)
    a, b = sim.pair()
    b.listen()
    a.connect()
    b.drain(close=True)
    left = [2]

    def drop(s: object) -> bool:
        if s.length and s.seq == 1 and left[0]:  # type: ignore[attr-defined]
            left[0] -= 1
            return True
        return False

    a.wire.drop = drop
    a.pour(bytes(50_000), close=True)
    sim.run()
    assert len(b.received) == 50_000
    assert (a.counters["rto_events"], a.counters["fast_retransmits"]) == (1, 1)


def test_lost_acks_cost_nothing() -> None:
    sim = Sim(1)
    a, b = sim.pair(rate_bps=10**9)
    b.listen()
    a.connect()
    b.drain(close=True)
    sim.advance(MS)
    b.wire.loss = 0.3
    a.pour(bytes(300_000))
    sim.advance(500 * MS)
    assert len(b.received) == 300_000


# ---- initial sequence numbers ----


def test_siphash_matches_its_paper() -> None:
    key = bytes(range(16))
    assert siphash(key, bytes(range(15))) == 0xA129CA6149BE45E5
    assert siphash(key, b"") == 0x726FDB47DD0E0E31
    assert siphash(key, bytes(range(8))) == 0x93F5F5799A932462


def test_isn_differs_by_flow_and_secret_and_ticks_every_4_us() -> None:
    secret, flow = bytes(range(16)), b"a flow"
    first = isn(secret, flow, 10**15)
    assert (isn(secret, flow, 10**15 + 4_000_000) - first) % 2**32 == 1000
    assert isn(secret, b"b flow", 10**15) != first
    assert isn(bytes(16), flow, 10**15) != first
    with pytest.raises(ValueError, match="3 bytes"):
        isn(b"abc", flow, 0)


def test_iss_is_used() -> None:
    assert established().sim.trace[0].raw_seq == ISS
