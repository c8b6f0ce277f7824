"""IPv4 reassembly: any order and any cut gives the datagram back; overlaps, floods and delays do not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulnet.stack.frames import build_ipv4
from ulnet.stack.ip_reass import Reassembler

MF = 0x2000
S = 1_000_000_000


def fragment(
    payload: bytes, start: int, end: int, ident: int = 1, src: str = "10.0.0.1", proto: int = 17, last: bool = False
) -> bytes:
    more = 0 if last or end >= len(payload) else MF
    return build_ipv4(src, "10.0.0.2", proto, payload[start:end], ident=ident, flags_frag=more | start // 8)[14:]


def cut(payload: bytes, size: int, **how: object) -> list[bytes]:
    return [fragment(payload, i, min(i + size, len(payload)), **how) for i in range(0, len(payload), size)]  # type: ignore[arg-type]


def feed(r: Reassembler, packets: list[bytes], now: int = 0) -> list[bytes]:
    return [whole for p in packets if (whole := r.input(p, now)) is not None]


@pytest.fixture
def r() -> Reassembler:
    return Reassembler()


def test_in_order_backwards_and_shuffled(r: Reassembler) -> None:
    payload = random.Random(1).randbytes(20000)
    parts = cut(payload, 1480)
    for order in (parts, parts[::-1], random.Random(2).sample(parts, len(parts))):
        assert feed(r, order) == [payload]
    assert r.counters() == {"held_bytes": 0, "timeouts": 0, "overlaps": 0, "overflow": 0, "done": 3}


def test_datagrams_are_told_apart_by_id_source_and_protocol(r: Reassembler) -> None:
    payloads = {(i, s, p): bytes([i, p]) * 1000 for i in (1, 2) for s in ("10.0.0.1", "10.0.0.3") for p in (6, 17)}
    halves = [cut(d, 1000, ident=i, src=s, proto=p) for (i, s, p), d in payloads.items()]
    assert feed(r, [h[0] for h in halves]) == []
    assert sorted(feed(r, [h[1] for h in halves])) == sorted(payloads.values())


def test_the_largest_datagram_fits_and_a_larger_one_does_not(r: Reassembler) -> None:
    payload = random.Random(3).randbytes(65515)
    assert feed(r, cut(payload, 1480)) == [payload]
    beyond = build_ipv4("10.0.0.1", "10.0.0.2", 17, b"x" * 100, ident=9, flags_frag=65528 // 8)[14:]
    with pytest.raises(ValueError):  # the parser refuses it: the ping of death
        r.input(beyond, 0)


def test_a_doubled_fragment_is_ignored(r: Reassembler) -> None:
    payload = random.Random(4).randbytes(5000)
    parts = cut(payload, 1480)
    assert feed(r, [parts[0], parts[0], parts[3], parts[3], parts[1], parts[1], parts[2]]) == [payload]
    assert r.counters()["overlaps"] == 0


PAYLOAD = bytes(range(256)) * 12  # 3072 bytes


@pytest.mark.parametrize(
    "bad",
    [
        fragment(PAYLOAD, 1016, 1032),  # reaches into the second
        fragment(PAYLOAD, 0, 1032),  # covers the first and more
        fragment(PAYLOAD, 8, 16),  # within the first
        fragment(PAYLOAD, 0, 2048),  # covers both
        fragment(b"\xff" * 3072, 0, 1024),  # the first again with other bytes: what an evader sends
        fragment(PAYLOAD, 1000, 1016, last=True),  # ends before what is here already
    ],
)
def test_an_overlap_ends_the_datagram_and_whatever_still_comes_of_it(r: Reassembler, bad: bytes) -> None:
    parts = cut(PAYLOAD, 1024)
    assert feed(r, [parts[0], parts[1], bad, parts[2], *parts]) == []
    assert r.counters()["overlaps"] == 1
    assert r.counters()["held_bytes"] < 200, "the bytes are given back at once"
    assert feed(r, parts, 30 * S) == [PAYLOAD], "its id is free again after its time"


def test_two_ends_are_a_contradiction(r: Reassembler) -> None:
    parts = cut(PAYLOAD, 1024)
    assert feed(r, [parts[2], fragment(PAYLOAD, 1024, 2048, last=True), parts[0], parts[1]]) == []
    assert r.counters()["overlaps"] == 1
    r2 = Reassembler()
    assert feed(r2, [parts[2], fragment(PAYLOAD + b"more" * 50, 3072, 3200), *parts]) == []
    assert r2.counters()["overlaps"] == 1
    r3 = Reassembler()
    assert feed(r3, [parts[1], fragment(PAYLOAD, 0, 1024, last=True), *parts]) == [], "ends before what is here"
    assert r3.counters()["overlaps"] == 1


def test_time_runs_out_after_thirty_seconds_from_the_first_fragment(r: Reassembler) -> None:
    parts = cut(PAYLOAD, 1024)
    assert r.deadline is None
    r.input(parts[0], 5 * S)
    r.input(parts[1], 20 * S)
    assert r.deadline == 35 * S
    r.timers(35 * S - 1)
    assert r.counters()["timeouts"] == 0
    r.timers(35 * S)
    assert r.counters() == {"held_bytes": 0, "timeouts": 1, "overlaps": 0, "overflow": 0, "done": 0}
    assert r.deadline is None
    assert feed(r, [parts[2]], 36 * S) == []


def test_the_sender_is_told_if_the_first_fragment_was_here(r: Reassembler) -> None:
    for ident in range(20):
        feed(r, cut(PAYLOAD, 1024, ident=ident)[: 2 if ident % 2 else 3][ident % 2 :], 0)
    feed(r, cut(PAYLOAD, 1024, ident=99)[:1], 0)
    r.timers(30 * S)
    quote = r.expired()
    assert quote is not None and len(quote) == 28
    assert quote == cut(PAYLOAD, 1024, ident=99)[0][:28]
    assert r.expired() is None


def test_only_so_many_complaints_are_remembered(r: Reassembler) -> None:
    for ident in range(20):
        feed(r, cut(PAYLOAD, 1024, ident=ident)[:1], 0)
    r.timers(30 * S)
    assert sum(r.expired() is not None for _ in range(20)) == 8


def test_a_late_fragment_does_not_meet_its_timed_out_datagram(r: Reassembler) -> None:
    parts = cut(PAYLOAD, 1024)
    feed(r, parts[:2], 0)
    assert feed(r, parts[2:], 31 * S) == []
    assert r.counters()["timeouts"] == 1


def test_a_flood_is_bounded_and_counted_and_the_newest_still_get_through(r: Reassembler) -> None:
    for i in range(3000):
        r.input(fragment(b"x" * 60000, 0, 40000, ident=i), i)
        assert r.counters()["held_bytes"] <= 4 << 20
    assert r.counters()["overflow"] >= 2800
    payload = b"y" * 3000
    assert feed(r, cut(payload, 1480, ident=5000), 4000) == [payload]


def test_many_tiny_fragments_are_bounded(r: Reassembler) -> None:
    for i in range(1, 4000):
        r.input(fragment(b"x" * 64000, 16 * i, 16 * i + 8, ident=7), 0)
    assert r.counters()["overflow"] == 1
    assert r.counters()["held_bytes"] < 1000


@given(st.binary(min_size=1, max_size=4000), st.lists(st.integers(1, 60), min_size=1, max_size=30), st.randoms())
@settings(max_examples=100, deadline=None)
def test_any_cut_in_any_order_with_doubles(payload: bytes, steps: list[int], rnd: random.Random) -> None:
    r = Reassembler()
    edges = [0]
    while edges[-1] < len(payload):
        edges.append(min(edges[-1] + 8 * steps[len(edges) % len(steps)], len(payload)))
    parts = [fragment(payload, a, b) for a, b in zip(edges, edges[1:], strict=False)]
    order = parts[:-1] * 2
    rnd.shuffle(order)
    order = [*order, parts[-1]]
    assert feed(r, order) == [payload]
    assert r.counters()["overlaps"] == r.counters()["held_bytes"] == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans(), st.integers(0, 2)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_result_has_only_bytes_that_came_for_their_place(pieces: list[tuple[int, int, bool, int]]) -> None:
    r = Reassembler()
    came: dict[int, set[int]] = {}
    for off, units, last, fill in pieces:
        data = bytes([fill]) * (8 * units)
        for at in range(8 * off, 8 * (off + units)):
            came.setdefault(at, set()).add(fill)
        packet = build_ipv4("10.0.0.1", "10.0.0.2", 17, data, ident=1, flags_frag=(0 if last else MF) | off)[14:]
        whole = r.input(packet, 0)
        if whole is not None:
            assert all(byte in came.get(at, ()) for at, byte in enumerate(whole))
    r.timers(31 * S)
    assert r.counters()["held_bytes"] == 0
