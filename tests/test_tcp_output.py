"""What goes out and when: windows, Nagle, delayed ACK, silly windows, super-segments, full links."""

from __future__ import annotations

import contextlib
import errno
import random

import pytest
from tcp_lone import IN_STATE, ISS, MS, PEER, SECOND, established

from ulnet.stack.sim import Endpoint, Sim

NODELAY, CORK, QUICKACK, MAXSEG = 1, 3, 12, 2
TCP, SOCKET = 6, 1
SO_SNDBUF, SO_LINGER = 7, 13


def lengths(e: Endpoint) -> list[int]:
    return [s.length for s in e.sim.trace if s.length]


def connected(sim: Sim, **options: int) -> tuple[Endpoint, Endpoint]:
    a, b = sim.pair(options=options)
    b.listen()
    a.connect()
    sim.advance(MS)
    return a, b


# ---- Nagle, as Minshall has it ----


def test_a_second_small_segment_waits_for_the_first() -> None:
    e = established()
    for _ in range(5):
        e.write(b"x")
    assert lengths(e) == [1]
    e.inject("A")
    assert lengths(e) == [1, 4]


def test_full_segments_do_not_wait_and_the_tail_does() -> None:
    e = established()
    e.write(b"x")
    e.write(bytes(1460 * 2 + 5))
    assert lengths(e) == [1, 1460, 1460]
    e.inject("A", ack=ISS + 1 + 1)
    assert lengths(e)[3:] == [5]


def test_a_small_tail_behind_full_segments_may_leave() -> None:
    e = established()
    e.write(bytes(1460 * 2 + 5))
    assert lengths(e) == [1460, 1460, 5]


def test_nodelay_sends_each_write() -> None:
    e = established(nodelay=True)
    for _ in range(5):
        e.write(b"x")
    assert lengths(e) == [1] * 5


def test_cork_holds_small_segments_for_at_most_200_ms() -> None:
    e = established()
    e.setopt(TCP, CORK, 1)
    e.write(b"x")
    assert lengths(e) == []
    e.sim.advance(200 * MS)
    assert lengths(e) == [1]
    e.inject("A")
    e.write(b"y")
    e.setopt(TCP, CORK, 0)
    assert lengths(e) == [1, 1]


def test_fin_takes_the_small_tail_along() -> None:
    e = established()
    e.write(b"x")
    e.write(b"y")
    e.shutdown()
    assert [(s.length, "F" in s.flags) for s in e.sim.trace[-2:]] == [(1, False), (1, True)]


# ---- delayed ACK ----


def test_one_small_segment_is_acknowledged_after_40_ms() -> None:
    e = established()
    assert e.inject("PA", payload=b"x") == []
    assert e.timers["delack"] == 40 * MS
    e.sim.advance(40 * MS)
    assert e.sim.trace[-1].ack == 2


def test_two_full_segments_are_acknowledged_at_once() -> None:
    e = established()
    e.inject("A", payload=bytes(1460))
    before = len(e.sim.trace)
    e.sim.advance(SECOND)
    e.inject("A", payload=bytes(1460))
    answers = e.inject("A", payload=bytes(1460))
    assert [a.ack for a in answers] == [1 + 3 * 1460]
    assert len(e.sim.trace) - before <= 2


def test_the_acknowledgement_rides_on_data() -> None:
    e = established()
    e.inject("PA", payload=b"request")
    e.write(b"answer")
    assert (e.sim.trace[-1].ack, e.sim.trace[-1].length) == (8, 6)
    assert "delack" not in e.timers


def test_a_burst_is_acknowledged_once() -> None:
    sim = Sim(1)
    a, b = connected(sim)
    b.drain()
    a.write(bytes(14_480))
    mark = sim.now_ns
    sim.advance(MS)
    assert len(sim.trace.since(mark).of("b")) == 1


def test_quickack_never_waits() -> None:
    e = established()
    e.setopt(TCP, QUICKACK, 1)
    assert [a.ack for a in e.inject("PA", payload=b"x")] == [2]


# ---- the peer's window ----


def test_never_beyond_the_peers_window() -> None:
    e = established(wnd=5000)
    e.write(bytes(20_000))
    assert sum(lengths(e)) <= 5000
    e.inject("A", wnd=2000)
    assert sum(lengths(e)) <= 7000


def test_sender_avoids_silly_windows() -> None:
    e = established(wnd=10_000)
    e.write(bytes(9_000))
    e.inject("A", wnd=10)
    e.write(bytes(5_000))
    before = len(lengths(e))
    e.inject("A", wnd=500)
    assert len(lengths(e)) == before
    e.inject("A", wnd=1460)
    assert lengths(e)[before:] == [1460]


def test_zero_window_is_probed_with_backoff_for_as_long_as_the_peer_answers() -> None:
    e = established(wnd=3000)
    e.write(bytes(10_000))
    e.inject("A", wnd=0)
    sent = len(e.sim.trace)
    times = []
    for i in range(40):
        start = e.sim.now_ns
        while len(e.sim.trace) == sent + i:
            e.sim.step()
        times.append(e.sim.now_ns - start)
        probe = e.sim.trace[-1]
        assert (probe.length, probe.raw_seq) == (1, e.numbers["snd_una"])
        e.inject("A", wnd=0, ack=e.numbers["snd_una"])
    assert times[:4] == [200 * MS, 400 * MS, 800 * MS, 1600 * MS]
    assert times[-1] == 60 * SECOND
    assert len(e.sim.trace) == sent + 40
    assert e.state == "ESTABLISHED"
    e.inject("A", wnd=60_000, ack=e.numbers["snd_una"])
    assert sum(s.length for s in e.sim.trace[sent + 40 :]) == 7_080
    assert e.numbers["retransmits"] == 0


def test_a_probe_that_is_taken_counts() -> None:
    e = established(wnd=3000)
    e.write(bytes(10_000))
    e.inject("A", wnd=0)
    e.sim.step()
    e.inject("A", wnd=0)  # acknowledges the probe's byte too
    assert e.numbers["unsent"] == 7_079


def test_an_unanswered_probe_ends_in_a_timeout() -> None:
    e = established(wnd=3000)
    e.write(bytes(10_000))
    e.inject("A", wnd=0)
    e.sim.run()
    assert (e.state, e.error) == ("CLOSED", errno.ETIMEDOUT)


def test_fin_needs_no_window() -> None:
    e = established(wnd=3000)
    e.write(bytes(3000))
    e.inject("A", wnd=0)
    e.shutdown()
    assert "F" in e.sim.trace[-1].flags


# ---- our window ----


def test_receive_window_never_shrinks_by_more_than_its_scale_hides_and_never_exceeds_the_buffer() -> None:
    rng = random.Random(3)
    e = established(rcvbuf=1 << 20, wscale=7)
    edge = 0
    for _ in range(500):
        room = e.numbers["rcv_wnd"]
        e.inject("A", payload=bytes(min(room, rng.choice([1, 100, 1460, 8000]))))
        if rng.random() < 0.4 and e.numbers["unread"]:
            e.read(rng.randrange(1, 50_000))
        for s in e.sim.trace:
            assert s.ack + s.wnd > edge - 32 or "S" in s.flags, str(s)
            edge = max(edge, s.ack + s.wnd)
        e.sim.trace.clear()
        n = e.numbers
        assert n["unread"] + n["rcv_wnd"] <= 1 << 20


def test_window_updates_are_few_but_the_sender_never_stalls() -> None:
    sim = Sim(1)
    a, b = sim.pair(options={"rcvbuf": 1 << 20, "sndbuf": 1 << 20, "max_gso_bytes": 65_483}, gso=True)
    b.listen()
    a.connect()
    data = bytes(8 << 20)
    a.pour(data, close=True)
    got = 0
    while got < len(data):
        sim.advance(20_000)
        with contextlib.suppress(BlockingIOError):
            got += len(b.read(65_536))
        assert sim.now_ns < 100 * SECOND
    assert a.counters["rto_events"] == a.counters["retransmits"] == 0
    assert len(sim.trace.of("b")) < 400
    assert sim.now_ns - SECOND < 20 * MS  # 128 reads of 20 us, and the start


def test_small_receiver_announces_no_crumbs() -> None:
    e = established(rcvbuf=4096)
    e.inject("A", payload=bytes(4096))
    before = len(e.sim.trace)
    for _ in range(10):
        e.read(100)
    assert len(e.sim.trace) == before
    e.read(1100)
    assert e.sim.trace[-1].wnd >= 2048


def test_slow_reader_gets_its_window_update_without_probes() -> None:
    sim = Sim(1)
    a, b = connected(sim, rcvbuf=10_000)
    a.pour(bytes(30_000))
    sim.advance(10 * MS)
    assert b.numbers["rcv_wnd"] < 1460
    got = 0
    while got < 30_000:
        got += len(b.read(2_500))
        sim.advance(100_000)
    assert sim.now_ns < SECOND + 20 * MS


# ---- super-segments ----


@pytest.mark.parametrize(("limit", "largest"), [(0, 1448), (10_000, 8688), (65_483, 65_160), (1 << 20, 65_160)])
def test_super_segments_are_multiples_of_the_mss_and_fit_an_ip_packet(limit: int, largest: int) -> None:
    sim = Sim(1)
    a, b = sim.pair(options={"max_gso_bytes": limit, "sndbuf": 1 << 20, "rcvbuf": 1 << 20}, gso=True)
    b.listen()
    a.connect()
    a.pour(bytes(1 << 20), close=True)
    b.drain(close=True)
    sim.run()
    sizes = [s.length for s in sim.trace.data("a")]
    assert max(sizes) == largest
    assert all(n % 1448 == 0 for n in sizes[:-1])


def test_many_small_pieces_are_cut_at_segment_ends() -> None:
    e = established(max_gso_bytes=65_483, nodelay=True)
    e.setopt(TCP, CORK, 1)
    parts = [bytes([i]) * 4200 for i in range(3)]
    for p in parts:
        e.write(p, hold=True)
    e.setopt(TCP, CORK, 0)
    assert sum(lengths(e)) == 12_600
    e.inject("A")
    assert e.memory["blocks"] == 0


def test_slow_start_with_super_segments_does_not_wait_for_delayed_acks() -> None:
    sim = Sim(1)
    a, b = sim.pair(options={"max_gso_bytes": 65_483, "sndbuf": 4 << 20, "rcvbuf": 4 << 20}, gso=True)
    b.listen()
    a.connect()
    b.drain(close=True)
    a.pour(bytes(10 << 20), close=True)
    start = sim.now_ns
    while len(b.received) < 10 << 20:
        assert sim.step()
    assert sim.now_ns - start < 40 * MS  # a delayed ACK alone would take as long


# ---- a full link ----


def test_full_link_loses_nothing_and_does_not_spin() -> None:
    sim = Sim(1)
    a, b = connected(sim)
    b.drain()
    a.wire.full = True
    a.write(b"x" * 5000)
    events = sim.events
    sim.advance(100 * MS)
    assert sim.events - events < 40
    assert b.received == b""
    a.wire.full = False
    sim.advance(10 * MS)
    assert b.received == b"x" * 5000
    assert a.counters["retransmits"] == 0


def test_acknowledgement_that_met_a_full_link_is_sent_later() -> None:
    sim = Sim(1)
    a, b = connected(sim)
    b.drain()
    b.wire.full = True
    a.write(bytes(5000))
    sim.advance(5 * MS)
    b.wire.full = False
    sim.advance(10 * MS)
    assert a.numbers["unsent"] == 0
    assert a.counters["rto_events"] == 0


def test_syn_and_fin_that_met_a_full_link_are_sent_later() -> None:
    sim = Sim(1)
    a, b = sim.pair()
    b.listen()
    a.wire.full = True
    a.connect()
    sim.advance(MS)
    a.wire.full = False
    sim.advance(10 * MS)
    assert a.state == "ESTABLISHED"
    a.wire.full = True
    a.shutdown()
    sim.advance(MS)
    a.wire.full = False
    sim.advance(10 * MS)
    assert (a.state, b.state) == ("FIN-WAIT-2", "CLOSE-WAIT")
    assert a.counters["retransmits"] == 0


# ---- the user's calls ----


def test_write_takes_what_fits() -> None:
    e = established(sndbuf=10_000)
    assert e.write(bytes(30_000)) == 10_000
    with pytest.raises(BlockingIOError):
        e.write(b"x")
    assert not e.ready & 2
    e.inject("A")
    assert e.ready & 2


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("CLOSED", errno.ENOTCONN),
        ("SYN-SENT", errno.EAGAIN),
        ("SYN-RECEIVED", errno.EAGAIN),
        ("FIN-WAIT-1", errno.EPIPE),
        ("FIN-WAIT-2", errno.EPIPE),
        ("CLOSING", errno.EPIPE),
        ("LAST-ACK", errno.EPIPE),
        ("TIME-WAIT", errno.EPIPE),
    ],
)
def test_write_says_why_not(state: str, error: int) -> None:
    with pytest.raises(OSError) as caught:
        IN_STATE[state]().write(b"x")
    assert caught.value.errno == error


def test_read_says_why_not() -> None:
    for state, error in (("CLOSED", errno.ENOTCONN), ("ESTABLISHED", errno.EAGAIN), ("SYN-SENT", errno.EAGAIN)):
        with pytest.raises(OSError) as caught:
            IN_STATE[state]().read()
        assert caught.value.errno == error
    for state in ("CLOSE-WAIT", "LAST-ACK", "TIME-WAIT"):
        assert IN_STATE[state]().read() == b""


def test_readiness_bits() -> None:
    readable, writable, err, hup, rdhup = 1, 2, 4, 8, 16
    assert IN_STATE["SYN-SENT"]().ready == 0
    e = established()
    assert e.ready == writable
    e.inject("A", payload=b"x")
    assert e.ready == readable | writable
    assert IN_STATE["CLOSE-WAIT"]().ready == readable | writable | rdhup
    assert IN_STATE["TIME-WAIT"]().ready == readable | writable | rdhup | hup
    e.inject("R")
    assert e.ready == readable | writable | err | hup | rdhup


def test_peek_and_lend() -> None:
    e = established(slots=16)
    e.inject("A", payload=bytes(8000))
    assert e.memory["held"] == 1
    assert e.read(4, peek=True) == bytes(4)
    with e.lend() as seg:
        assert bytes(seg) == bytes(8000)
        assert e.memory["slots"] == 1
    assert e.memory["slots"] == e.memory["blocks"] == 0


def test_linger_zero_resets_on_close() -> None:
    e = established()
    e.setopt(SOCKET, SO_LINGER, 0)
    e.close()
    assert "R" in e.sim.trace[-1].flags
    assert e.state == "CLOSED"


def test_reset_carries_the_next_sequence_number() -> None:
    e = established()
    e.write(bytes(3000))
    e.abort()
    rst = e.sim.trace[-1]
    assert (rst.flags, rst.raw_seq, rst.raw_ack) == ("RA", ISS + 1 + 3000, PEER + 1)


def test_options_are_checked_and_read_back() -> None:
    e = established()
    for level, name, value in (
        (TCP, NODELAY, 1),
        (TCP, 4, 10),
        (TCP, 5, 11),
        (TCP, 6, 12),
        (TCP, 18, 5000),
        (SOCKET, 9, 1),
        (SOCKET, SO_SNDBUF, 99_999),
    ):
        e.setopt(level, name, value)
        assert e.getopt(level, name) == value
    assert e.getopt(TCP, MAXSEG) == 1460
    for level, name, value, error in (
        (TCP, 4, 0, errno.EINVAL),
        (TCP, 6, 128, errno.EINVAL),
        (TCP, MAXSEG, 500, errno.EISCONN),
        (TCP, 99, 1, errno.ENOPROTOOPT),
        (99, 1, 1, errno.ENOPROTOOPT),
        (SOCKET, SO_SNDBUF, -1, errno.EINVAL),
    ):
        with pytest.raises(OSError) as caught:
            e.setopt(level, name, value)
        assert caught.value.errno == error


def test_idle_window_restarts() -> None:
    sim = Sim(1)
    a, b = connected(sim, sndbuf=1 << 20, rcvbuf=1 << 20)
    b.drain()
    a.pour(bytes(1 << 20))
    sim.advance(50 * MS)
    assert a.numbers["cwnd"] > 100_000
    sim.advance(SECOND)
    a.write(bytes(100_000))
    assert a.numbers["cwnd"] <= 14_600


def test_control_block_is_small() -> None:
    assert established().memory["pcb_bytes"] <= 1024
    assert established().memory["blocks"] == 0
