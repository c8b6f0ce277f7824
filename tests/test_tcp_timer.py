"""Timers: retransmission and its backoff, round trips, keep-alive, user timeout, orphans, TIME-WAIT."""

from __future__ import annotations

import errno

import pytest
from tcp_lone import IN_STATE, ISS, MS, SECOND, established, syn_received, syn_sent

from ulnet.stack.sim import Endpoint, Sim

TCP, SOCKET = 6, 1
KEEPALIVE, KEEPIDLE, KEEPINTVL, KEEPCNT, USER_TIMEOUT = 9, 4, 5, 6, 18


def gaps(e: Endpoint, n: int) -> list[int]:
    """Nanoseconds between the next n segments that leave by themselves."""
    times = [e.sim.now_ns]
    seen = len(e.sim.trace)
    while len(times) <= n and e.sim.step():
        for s in e.sim.trace[seen:]:
            times.append(s.time_ns)
        seen = len(e.sim.trace)
    return [b - a for a, b in zip(times, times[1:], strict=False)][:n]


def test_syn_is_resent_after_1_s_and_given_up_after_127() -> None:
    e = syn_sent()
    assert gaps(e, 6) == [SECOND * n for n in (1, 2, 4, 8, 16, 32)]
    e.sim.run()
    assert (e.state, e.error) == ("CLOSED", errno.ETIMEDOUT)
    assert e.sim.now_ns == 128 * SECOND


def test_syn_ack_is_resent() -> None:
    e = syn_received()
    assert gaps(e, 5) == [SECOND * n for n in (1, 2, 4, 8, 16)]
    assert all(s.flags == "SA" and s.raw_seq == ISS for s in e.sim.trace)


def test_data_is_resent_with_doubling_time_from_200_ms() -> None:
    e = established()
    e.write(b"x")
    assert gaps(e, 6) == [200 * MS << n for n in range(6)]
    assert all(s.seq == 1 and s.length == 1 for s in e.sim.trace[-6:])


def test_timeout_collapses_the_window_and_halves_the_threshold_once() -> None:
    e = established()
    e.write(bytes(14_600))
    gaps(e, 1)
    n = e.numbers
    assert (n["cwnd"], n["ssthresh"], n["backoff"]) == (1460, 7300, 1)
    gaps(e, 2)
    assert e.numbers["ssthresh"] == 7300
    assert [s.length for s in e.sim.trace[-3:]] == [1460] * 3


def test_after_a_timeout_everything_is_sent_again_in_slow_start() -> None:
    e = established()
    e.write(bytes(14_600))
    gaps(e, 1)
    una = e.numbers["snd_una"]
    e.inject("A", ack=una + 1460)
    assert [s.seq for s in e.sim.trace[-2:]] == [1461, 2921]
    e.inject("A", ack=una + 14_600)
    assert e.timers == {}
    assert e.numbers["retransmits"] == 3


def test_give_up_takes_a_quarter_of_an_hour_and_resets() -> None:
    e = established()
    e.write(b"x")
    e.sim.run()
    assert (e.state, e.error) == ("CLOSED", errno.ETIMEDOUT)
    assert 900 * SECOND <= e.sim.now_ns - SECOND < 1100 * SECOND
    assert "R" in e.sim.trace[-1].flags
    with pytest.raises(TimeoutError):
        e.read()


def test_user_timeout_ends_sooner() -> None:
    e = established(user_timeout_ms=3000)
    e.write(b"x")
    e.sim.run()
    assert (e.error, e.sim.now_ns) == (errno.ETIMEDOUT, 4 * SECOND)


def test_round_trip_is_measured_in_nanoseconds_and_not_from_what_was_resent() -> None:
    sim = Sim(1)
    a, b = sim.pair(delay_ns=7_000)
    b.listen()
    a.connect()
    sim.advance(MS)
    assert a.numbers["srtt_ns"] == b.numbers["srtt_ns"] == 14_000
    assert a.numbers["rto_ns"] == 200 * MS
    b.drain()
    a.wire.down = True
    a.write(b"x")
    sim.advance(100 * MS)
    a.wire.down = False
    sim.advance(200 * MS)
    assert b.received == b"x"
    assert a.numbers["srtt_ns"] == 14_000  # Karn


def test_lost_syn_starts_with_one_segment() -> None:
    sim = Sim(1)
    a, b = sim.pair()
    b.listen()
    a.wire.down = True
    a.connect()
    sim.advance(500 * MS)
    a.wire.down = False
    sim.advance(600 * MS)
    assert (a.state, a.numbers["cwnd"], a.numbers["rto_ns"]) == ("ESTABLISHED", 1448, 3 * SECOND)


def test_keepalive_probes_and_gives_up() -> None:
    e = established(keepalive=True, keepidle=10, keepintvl=3, keepcnt=4)
    assert gaps(e, 5) == [10 * SECOND, 3 * SECOND, 3 * SECOND, 3 * SECOND, 3 * SECOND]
    probes = e.sim.trace[-5:-1]
    assert all(p.raw_seq == ISS and p.length == 0 for p in probes)
    assert "R" in e.sim.trace[-1].flags
    assert (e.state, e.error) == ("CLOSED", errno.ETIMEDOUT)


def test_keepalive_is_content_with_an_answer() -> None:
    sim = Sim(1)
    a, b = sim.pair(options={"keepalive": True, "keepidle": 10, "keepintvl": 3, "keepcnt": 4}, options_b={})
    b.listen()
    a.connect()
    sim.advance(1000 * SECOND)
    assert (a.state, b.state) == ("ESTABLISHED", "ESTABLISHED")
    probes = [s for s in sim.trace.of("a") if s.seq == 0 and s.flags == "A"]
    assert 90 <= len(probes) <= 100
    assert len(sim.trace.of("b")) == len(probes) + 1


def test_keepalive_can_be_turned_on_and_off() -> None:
    e = established()
    e.setopt(TCP, KEEPIDLE, 5)
    e.setopt(SOCKET, KEEPALIVE, 1)
    assert e.timers == {"keep": 5 * SECOND}
    e.setopt(SOCKET, KEEPALIVE, 0)
    assert e.timers == {}


def test_time_wait_lasts_a_minute_and_survives_a_reset() -> None:
    e = IN_STATE["TIME-WAIT"]()
    assert e.timers == {"2msl": 60 * SECOND}
    e.inject("R")
    e.sim.advance(59 * SECOND)
    assert e.state == "TIME-WAIT"
    e.sim.advance(SECOND)
    assert e.state == "CLOSED"


def test_fin_wait_2_waits_for_its_user_but_an_orphan_only_a_minute() -> None:
    e = IN_STATE["FIN-WAIT-2"]()
    e.sim.advance(10_000 * SECOND)
    assert e.state == "FIN-WAIT-2"
    e.close()
    e.sim.advance(60 * SECOND)
    assert e.state == "CLOSED"


def test_orphan_without_progress_is_given_up() -> None:
    e = established()
    e.write(b"x")
    e.close()
    e.sim.run()
    assert e.state == "CLOSED"
    assert 100 * SECOND <= e.sim.now_ns - SECOND < 210 * SECOND


def test_no_timer_runs_on_an_idle_connection() -> None:
    e = established()
    e.write(b"x")
    e.inject("PA", payload=b"y")
    e.sim.advance(SECOND // 10)
    e.inject("A")
    assert e.timers == {}
    assert not e.sim.step() or e.sim.now_ns < 2 * SECOND
