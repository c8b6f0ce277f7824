"""What arrives: RFC 9293 3.10.7 acceptability, RFC 5961, RFC 7323 PAWS, reassembly, RFC 5927."""

from __future__ import annotations

import contextlib
import errno
import random

import pytest
from tcp_lone import ISS, MS, PEER, SECOND, closing, established, last_ack, lone, syn_received, syn_sent, time_wait

from ulnet.stack.sim import Sim


def test_handshake_offers_mss_timestamps_and_scale() -> None:
    e = syn_sent(rcvbuf=1 << 20)
    (syn,) = e.sim.trace
    assert (syn.flags, syn.mss, syn.wscale, syn.ts_ecr) == ("S", 1460, 5, 0)
    assert syn.ts_val is not None


def test_syn_ack_offers_only_what_was_offered() -> None:
    e = syn_received()
    (answer,) = e.sim.trace
    assert (answer.flags, answer.wscale, answer.ts_val) == ("SA", 255, None)


@pytest.mark.parametrize(("offer", "mss"), [(0, 536), (1460, 1460), (9000, 1460), (500, 500), (1, 88)])
def test_mss_is_the_smaller_of_both_and_never_a_crumb(offer: int, mss: int) -> None:
    assert established(mss=offer).numbers["mss"] == mss


def test_timestamps_take_twelve_bytes_of_each_segment() -> None:
    assert established(ts=True).numbers["mss"] == 1448


def test_in_order_data_is_read_and_acknowledged() -> None:
    e = established()
    e.inject("PA", payload=b"hello ")
    e.inject("PA", payload=b"world")
    assert e.read() == b"hello world"
    e.sim.advance(40 * MS)
    assert e.sim.trace[-1].ack == 12


def test_overlapping_retransmission_gives_only_what_is_new() -> None:
    e = established()
    e.inject("A", payload=b"abcdef")
    e.inject("A", seq=PEER + 4, payload=b"XYZghi")
    assert e.read() == b"abcdefghi"


def test_old_duplicate_is_acknowledged_at_once() -> None:
    e = established()
    e.inject("A", payload=b"abc")
    (ack,) = e.inject("A", seq=PEER + 1, payload=b"abc")
    assert (ack.flags, ack.ack) == ("A", 4)
    assert e.counters["duplicate_in"] == 1
    assert e.read() == b"abc"


def test_data_beyond_the_window_is_cut_and_answered() -> None:
    e = established(rcvbuf=4096)
    wnd = e.numbers["rcv_wnd"]
    (ack,) = e.inject("A", payload=bytes(wnd + 100))
    assert ack.ack == 1 + wnd
    assert e.numbers["unread"] == wnd
    assert e.counters["out_of_window_in"] == 1


@pytest.mark.parametrize(
    ("rtt_ms", "rings", "size", "frames"),
    [
        (0, {"slots": 32}, 1460, 24),
        (20, {"slots": 32}, 1460, 24 * 21),
        (0, {"slots": 32, "small_slots": 256}, 1460, 192),
        (0, {"slots": 32, "small_slots": 256}, 20_000, 24),
    ],
)
def test_the_window_is_what_a_ring_takes_in_a_millisecond(
    rtt_ms: int, rings: dict[str, int], size: int, frames: int
) -> None:
    """Three quarters of the slots for frames of that size; on a longer way only a part of the window comes at once."""
    e = syn_sent(rcvbuf=1 << 24, **rings)
    e.sim.advance(rtt_ms * MS)
    e.inject("SA", seq=PEER, ack=ISS + 1, wnd=65535, mss=1460, wscale=7)
    # A window once announced is not taken back: so many frames that only what they allow is left of it.
    for at in range(0, 600 * size, size):
        e.inject("PA", seq=PEER + 1 + at, payload=bytes(size))
        e.read(size)
    e.sim.advance(100 * MS)
    assert (frames - 2) * size < e.numbers["rcv_wnd"] <= frames * size


def test_segment_outside_the_window_is_dropped_and_answered() -> None:
    e = established()
    (ack,) = e.inject("A", seq=PEER + 1 + 10_000_000, payload=b"x")
    assert (ack.ack, e.numbers["unread"], e.counters["out_of_window_in"]) == (1, 0, 1)


def test_out_of_order_data_is_answered_at_once_and_kept() -> None:
    e = established()
    (dup,) = e.inject("A", seq=PEER + 4, payload=b"def")
    assert (dup.ack, dup.length) == (1, 0)
    (ack,) = e.inject("A", payload=b"abc")
    assert ack.ack == 7
    assert e.read() == b"abcdef"


def test_fin_out_of_order_waits_for_the_data_before_it() -> None:
    e = established()
    e.inject("FA", seq=PEER + 4, payload=b"def")
    assert e.state == "ESTABLISHED"
    e.inject("A", seq=PEER + 7, payload=b"beyond the FIN")
    e.inject("A", payload=b"abc")
    assert e.state == "CLOSE-WAIT"
    assert e.read() == b"abcdef"
    assert e.read() == b""


@pytest.mark.parametrize("seed", range(30))
def test_reassembly_of_any_overlapping_pieces(seed: int) -> None:
    rng = random.Random(seed)
    e = established(rcvbuf=1 << 20, slots=rng.choice([0, 32]))
    data = rng.randbytes(rng.choice([100, 3000, 60000]))
    step = max(1, len(data) // 40)
    pieces = [(i, min(len(data), i + rng.randrange(1, 3 * step))) for i in range(0, len(data), step)]
    pieces += [(i, min(len(data), i + step)) for i in range(0, len(data), step)]
    rng.shuffle(pieces)
    for i, j in pieces:
        e.inject("A", seq=PEER + 1 + i, payload=data[i:j])
    got = b""
    while e.numbers["unread"]:
        got += e.read(rng.randrange(1, 70000))
    assert got == data
    assert e.numbers["out_of_order"] == e.numbers["out_of_order_pieces"] == e.numbers["out_of_order_memory"] == 0
    assert e.memory["blocks"] == e.memory["slots"] == 0


def test_memory_of_out_of_order_crumbs_is_bounded() -> None:
    e = established(rcvbuf=1 << 20)
    for i in range(3000):
        e.inject("A", seq=PEER + 3 + 2 * i, payload=b"x")
    assert e.numbers["out_of_order_pieces"] <= 1024
    assert e.numbers["out_of_order_memory"] < 4 << 20
    assert e.counters["nomem_dropped"] > 0
    e.close()
    assert e.memory["blocks"] == 0


def test_neighbouring_crumbs_become_few_blocks() -> None:
    e = established(rcvbuf=1 << 20)
    e.inject("A", seq=PEER + 3, payload=b"x")
    for i in range(1000):
        e.inject("A", seq=PEER + 4 + i, payload=b"y")
    assert e.numbers["out_of_order_pieces"] < 5


# ---- RFC 5961 ----


def test_only_the_exact_reset_resets() -> None:
    e = established()
    nxt = e.numbers["rcv_nxt"]
    (challenge,) = e.inject("R", seq=nxt + 1)
    assert (challenge.flags, challenge.raw_ack, e.state) == ("A", nxt, "ESTABLISHED")
    assert not e.inject("R", seq=nxt - 1)
    assert not e.inject("R", seq=nxt + e.numbers["rcv_wnd"])
    assert e.state == "ESTABLISHED"
    e.inject("R", seq=nxt)
    assert (e.state, e.error) == ("CLOSED", errno.ECONNRESET)


def test_data_before_a_reset_can_still_be_read() -> None:
    e = established()
    e.inject("A", payload=b"last words")
    e.inject("R")
    assert e.read() == b"last words"
    with pytest.raises(ConnectionResetError):
        e.read()
    assert e.read() == b""


@pytest.mark.parametrize("offset", [-100, 0, 5, 10**8])
def test_syn_on_a_connection_gets_a_challenge_whatever_its_number(offset: int) -> None:
    e = established()
    (ack,) = e.inject("S", seq=e.numbers["rcv_nxt"] + offset, ack=0)
    assert (ack.flags, e.state, e.counters["challenge_acks"]) == ("A", "ESTABLISHED", 1)


def test_challenges_are_rate_limited() -> None:
    e = established()
    answers = [a for _ in range(50) for a in e.inject("S", seq=7, ack=0)]
    assert len(answers) == 10
    e.sim.advance(5 * SECOND)
    assert e.inject("S", seq=7, ack=0)


@pytest.mark.parametrize("delta", [1, 1000, 2**31 - 1, -(2**31) + 10, -70000])
def test_ack_of_what_was_never_sent_or_long_ago_is_refused(delta: int) -> None:
    e = established()
    answers = e.inject("A", ack=ISS + 1 + delta, payload=b"evil")
    assert e.numbers["unread"] == 0
    assert e.counters["bad_ack_in"] == 1
    assert [a.flags for a in answers] == ["A"]


def test_blind_data_with_a_plausible_old_ack_is_taken() -> None:
    e = established(wnd=10000)
    e.inject("A", ack=ISS + 1 - 9000, payload=b"late")
    assert e.read() == b"late"


def test_window_that_comes_with_the_segment_that_fills_a_gap_counts() -> None:
    """Its sequence number lies before SND.WL1, but it acknowledges more: the old window would overshoot."""
    e = established(wnd=10_000)
    e.inject("A", seq=PEER + 1001, payload=b"later", wnd=10_000)
    e.write(bytes(8000))
    e.inject("A", seq=PEER + 1, ack=ISS + 8001, payload=bytes(1000), wnd=2000)
    e.write(bytes(20_000))
    assert e.numbers["snd_una"] == ISS + 8001
    assert e.numbers["snd_max"] <= ISS + 8001 + 2000


def test_segment_without_ack_is_dropped() -> None:
    e = established()
    assert not e.inject("", payload=b"x")
    assert e.numbers["unread"] == 0


# ---- RFC 7323 ----


def test_paws_drops_old_timestamps_and_answers() -> None:
    e = established(ts=True)
    e.inject("A", payload=b"new", ts=(200, 0))
    (ack,) = e.inject("A", payload=b"old", ts=(150, 0))
    assert (ack.ts_ecr, e.counters["paws_dropped"]) == (200, 1)
    assert e.read() == b"new"


def test_paws_gives_way_after_24_idle_days() -> None:
    e = established(ts=True)
    e.inject("A", payload=b"a", ts=(200, 0))
    e.sim.advance(25 * 86400 * SECOND)
    e.inject("A", payload=b"b", ts=(150, 0))
    assert e.read() == b"ab"


def test_segment_without_the_agreed_timestamps_is_dropped_but_a_reset_counts() -> None:
    e = established(ts=True)
    e.inject("A", payload=b"x", no_ts=True)
    assert (e.numbers["unread"], e.counters["paws_dropped"]) == (0, 1)
    e.inject("R", no_ts=True)
    assert e.state == "CLOSED"


def test_timestamp_of_a_segment_that_fills_a_gap_is_echoed_not_that_beyond_it() -> None:
    e = established(ts=True)
    (dup,) = e.inject("A", seq=PEER + 4, payload=b"def", ts=(300, 0))
    assert dup.ts_ecr == 100
    (ack,) = e.inject("A", payload=b"abc", ts=(250, 0))
    assert ack.ts_ecr == 250


# ---- ends ----


def test_close_with_unread_data_resets() -> None:
    e = established()
    e.inject("A", payload=b"never read")
    before = len(e.sim.trace)
    e.close()
    assert "R" in e.sim.trace[before].flags
    assert (e.state, e.memory["blocks"]) == ("CLOSED", 0)


def test_data_after_close_resets() -> None:
    e = established()
    e.close()
    (rst,) = e.inject("A", payload=b"nobody is here")
    assert "R" in rst.flags
    assert e.state == "CLOSED"


def test_what_comes_after_reading_was_shut_down_can_be_read() -> None:
    e = established()
    e.shutdown(0)
    assert e.read() == b""
    e.inject("A", payload=bytes(3000))
    e.sim.advance(SECOND)
    assert e.sim.trace[-1].ack == 3001
    assert e.read() == bytes(3000)
    assert e.read() == b""


def test_data_after_both_directions_were_shut_down_resets() -> None:
    e = established()
    e.shutdown(2)
    (rst,) = e.inject("A", payload=b"nobody is here")
    assert "R" in rst.flags
    assert e.state == "CLOSED"


def test_reset_while_closing_is_no_error() -> None:
    for make in (closing, last_ack):
        e = make()
        e.inject("R")
        assert (e.state, e.error) == ("CLOSED", 0)


def test_refused_connection() -> None:
    e = syn_sent()
    e.inject("RA", seq=0, ack=ISS + 1)
    assert (e.state, e.error) == ("CLOSED", errno.ECONNREFUSED)


def test_syn_in_time_wait_with_a_later_number_begins_anew_beyond_the_old_sequence() -> None:
    e = time_wait()
    old = e.numbers["snd_max"]
    e.listen()
    (answer,) = e.inject("S", seq=e.numbers["rcv_nxt"] + 1, ack=0)
    assert answer.flags == "SA"
    assert (answer.raw_seq - old) % 2**32 > 65535


def test_old_syn_in_time_wait_is_challenged() -> None:
    e = time_wait()
    e.listen()
    (answer,) = e.inject("S", seq=e.numbers["rcv_nxt"] - 1, ack=0)
    assert (answer.flags, e.state) == ("A", "TIME-WAIT")


def test_retransmitted_fin_restarts_time_wait() -> None:
    e = time_wait()
    e.sim.advance(50 * SECOND)
    e.inject("FA", seq=e.numbers["rcv_nxt"] - 1)
    e.sim.advance(50 * SECOND)
    assert e.state == "TIME-WAIT"
    e.sim.advance(10 * SECOND)
    assert e.state == "CLOSED"


# ---- a closed port ----


@pytest.mark.parametrize("flags", ["S", "A", "FA", "SA", ""])
def test_refusal_carries_numbers_the_sender_believes(flags: str) -> None:
    e = lone()
    (rst,) = e.inject(flags, seq=777, ack=888, payload=b"12")
    if "A" in flags:
        assert (rst.flags, rst.raw_seq) == ("R", 888)
    else:
        assert (rst.flags, rst.raw_seq, rst.raw_ack) == ("RA", 0, 777 + 2 + ("S" in flags))
    assert not e.inject("R" + flags)


# ---- ICMP (RFC 5927) ----


def test_icmp_ends_an_attempt_but_not_a_connection() -> None:
    e = syn_sent()
    e.icmp(errno.EHOSTUNREACH)
    assert (e.state, e.error) == ("CLOSED", errno.EHOSTUNREACH)
    e = established()
    e.write(b"x")
    e.icmp(errno.EHOSTUNREACH)
    assert (e.state, e.error) == ("ESTABLISHED", 0)
    e.sim.run()
    assert (e.state, e.error) == ("CLOSED", errno.EHOSTUNREACH)  # the reason, when time runs out


def test_icmp_about_a_number_not_in_flight_is_ignored() -> None:
    e = syn_sent()
    e.icmp(errno.ECONNREFUSED, seq=ISS + 1)
    e.icmp(errno.ECONNREFUSED, seq=ISS - 1)
    assert e.state == "SYN-SENT"


def test_packet_too_big_resends_in_smaller_pieces() -> None:
    e = established()
    e.write(bytes(1460))
    before = len(e.sim.trace)
    e.icmp(0, mtu=1000)
    assert [s.length for s in e.sim.trace[before:]] == [960, 500]
    e.icmp(0, mtu=68)
    assert e.numbers["mss"] == 512  # not below what a path may honestly have
    e.icmp(0, mtu=9000)
    assert e.numbers["mss"] == 512


# ---- garbage ----


@pytest.mark.parametrize("seed", range(25))
def test_hostile_segments_never_break_the_books(seed: int) -> None:
    rng = random.Random(seed)
    sim = Sim(seed, capture=False)
    e = sim.endpoint(
        "a", iss=rng.choice([0, ISS, 2**32 - 5]), rcvbuf=rng.choice([2048, 65536]), slots=rng.choice([0, 8])
    )
    if rng.random() < 0.5:
        e.listen()
    else:
        e.connect()
    for _ in range(800):
        n = e.numbers
        near = rng.choice(
            [n["rcv_nxt"], n["snd_una"], n["snd_max"], n["irs"], n["rcv_nxt"] + n["rcv_wnd"], rng.getrandbits(32)]
        )
        e.inject(
            "".join(c for c in "SFRPA" if rng.random() < {"S": 0.1, "F": 0.05, "R": 0.03, "P": 0.5, "A": 0.9}[c]),
            seq=near + rng.randrange(-3, 4),
            ack=rng.choice([n["snd_una"], n["snd_max"], n["iss"] + 1, rng.getrandbits(32)])
            + rng.choice([0, 0, 0, 1, -1]),
            payload=bytes(rng.choice([0, 0, 1, 100, 1460, 5000])),
            wnd=rng.choice([0, 1, 1000, 65535]),
            wscale=rng.choice([255, 0, 7, 14, 200]),
            mss=rng.choice([0, 1, 536, 1460, 65535]),
            ts=rng.choice([None, (rng.getrandbits(32), 0)]),
        )
        if rng.random() < 0.2:
            with contextlib.suppress(OSError):
                rng.choice(
                    [lambda: e.write(bytes(3000)), lambda: e.read(500), lambda: e.shutdown(), lambda: e.migrate()]
                )()
        if rng.random() < 0.1:
            sim.advance(rng.choice([MS, SECOND]))
        n = e.numbers
        assert (n["snd_nxt"] - n["snd_una"]) % 2**32 <= (n["snd_max"] - n["snd_una"]) % 2**32 < 2**31
        assert n["rcv_wnd"] < 2**31
        if e.state in ("CLOSED", "LISTEN") and rng.random() < 0.3:
            e.forget()
            e.listen()
    e.forget()
    assert e.memory["blocks"] == e.memory["slots"] == e.memory["held"] == 0
