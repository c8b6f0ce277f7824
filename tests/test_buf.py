"""Buffers: who holds slots, what is copied, what comes back; bytes always in order."""

from __future__ import annotations

import random
import sys

import pytest

from ulnet.stack.sim_buf import LabSegment, RingLab

BIG = 9000


def frame(i: int, n: int = BIG) -> bytes:
    return bytes([i & 0xFF]) * n


def test_small_payload_is_copied_and_its_slot_returns_at_once() -> None:
    lab = RingLab()
    assert not lab.receive(b"x" * 4095)
    assert lab.released == [0]
    assert lab.numbers["busy"] == 0
    assert lab.read(9999) == b"x" * 4095


def test_big_payload_stays_in_its_slot_until_read() -> None:
    lab = RingLab()
    assert lab.receive(frame(1))
    assert lab.numbers["copied"] == 0
    assert lab.read(BIG - 1) == frame(1, BIG - 1)
    assert lab.released == []
    assert lab.read(10) == frame(1, 1)
    assert lab.released == [0]


def test_bytes_of_every_length_come_as_they_were() -> None:
    """Lines are taken over as they are read: also at the ends, and what is only looked at stays."""
    r = random.Random(5)
    lab = RingLab()
    for n in [*range(1, 400), *(r.randrange(400, 20_000) for _ in range(100))]:
        data = r.randbytes(n)
        lab.receive(data)
        assert lab.read(n, peek=True) == data
        if r.random() < 0.5:
            part = r.randrange(n)
            assert lab.read(part) + lab.read(n) == data
        else:
            segment = lab.take()
            assert segment is not None and segment.data == data
            segment.release()
    assert lab.numbers["busy"] == lab.numbers["blocks"] == 0


def test_at_most_half_of_the_ring_is_held() -> None:
    lab = RingLab(8)
    kept = [lab.receive(frame(i)) for i in range(7)]
    assert kept == [True] * 4 + [False] * 3
    assert lab.read(1 << 20) == b"".join(frame(i) for i in range(7))
    assert lab.numbers["busy"] == lab.numbers["blocks"] == 0


def test_slots_that_are_not_scarce_are_held_freely() -> None:
    lab = RingLab(0)
    assert all(lab.receive(frame(i)) for i in range(100))
    lab.relieve()
    assert lab.numbers["copied"] == 0


def test_a_datagram_train_never_holds_its_slot() -> None:
    lab = RingLab()
    assert not lab.receive(frame(1), stream=False, train=True)


def test_stream_segments_coalesce_but_datagrams_do_not() -> None:
    lab = RingLab()
    for i in range(100):
        lab.receive(bytes([i]))
    assert lab.numbers["segments"] == 1
    assert lab.read(100) == bytes(range(100))
    for i in range(5):
        lab.receive(bytes([i]), stream=False)
    lab.receive(b"", stream=False)
    assert lab.numbers["segments"] == 6
    got = []
    for seg in iter(lab.take, None):
        got.append(seg.data)
        seg.release()
    assert got == [b"\0", b"\1", b"\2", b"\3", b"\4", b""]


def test_relieve_copies_queued_payload_before_the_ring_gets_there() -> None:
    lab = RingLab(16)
    assert lab.receive(frame(7))
    for i in range(12):
        lab.relieve()
        assert lab.numbers["held"] == 1, i
        lab.receive(b"s")
    lab.receive(b"s")
    lab.relieve()
    assert lab.numbers["held"] == 0
    assert lab.released[-1] == 0
    for _ in range(10):  # and on, over the slot that was relieved
        lab.receive(b"s")
    assert lab.read(BIG) == frame(7)


def test_relieve_evacuates_lent_payload_and_the_slot_comes_back_with_the_segment() -> None:
    lab = RingLab(16)
    lab.receive(frame(7))
    seg = lab.take()
    assert seg is not None and seg.origin == "slot"
    for _ in range(13):
        lab.receive(b"s")
    lab.relieve()
    assert seg.origin == "evacuated"
    assert lab.numbers["held"] == 0 and 0 not in lab.released
    assert seg.data == frame(7)
    seg.release()
    assert lab.released[-1] == 0 and lab.numbers["lent"] == 0


def test_a_lent_slot_that_cannot_be_evacuated_stays_held() -> None:
    lab = RingLab(16)
    lab.can_evacuate = False
    lab.receive(frame(7))
    seg = lab.take()
    assert seg is not None
    for _ in range(13):
        lab.receive(b"s")
    lab.relieve()
    assert seg.origin == "slot" and lab.numbers["held"] == 1
    with pytest.raises(BlockingIOError):
        for _ in range(16):
            lab.receive(b"s")
    seg.release()


def test_the_newest_frame_alone_is_a_whole_turn_away() -> None:
    lab = RingLab(16)
    lab.receive(frame(1))
    lab.relieve()
    assert lab.numbers["held"] == 1


@pytest.mark.parametrize("part", [1, 100, 4000, 8000, 8999, 9000, 10000])
def test_take_of_a_part_leaves_the_rest(part: int) -> None:
    lab = RingLab()
    data = random.Random(part).randbytes(BIG)
    lab.receive(data, seq=77)
    seg = lab.take(part)
    assert seg is not None and seg.data == data[:part] and seg.seq == 77
    rest = lab.take()
    if part < BIG:
        assert rest is not None and rest.data == data[part:] and rest.seq == 77 + part
        rest.release()
    else:
        assert rest is None
    seg.release()
    assert lab.numbers["busy"] == lab.numbers["blocks"] == lab.numbers["memory"] == lab.numbers["lent"] == 0


def test_peek_leaves_everything() -> None:
    lab = RingLab()
    lab.receive(frame(1))
    lab.receive(b"abc")
    assert lab.read(BIG + 3, peek=True) == lab.read(BIG + 3)


@pytest.mark.parametrize("seed", range(12))
def test_random_receiving_reading_and_lending(seed: int) -> None:
    rng = random.Random(seed)
    lab = RingLab(rng.choice([0, 8, 16, 64]))
    sent, got = bytearray(), bytearray()
    lent: list[tuple[LabSegment, bytes]] = []
    for _ in range(600):
        what = rng.random()
        if what < 0.55:
            data = rng.randbytes(rng.choice([1, 50, 300, 1448, 4096, 9000]))
            try:
                lab.receive(data)
                sent += data
            except BlockingIOError:  # the sim's ring is strict: it drops
                pass
        elif what < 0.8:
            got += lab.read(rng.choice([1, 100, 5000, 20000]))
        elif what < 0.9:
            seg = lab.take(rng.choice([10, 3000, 1 << 20]))
            if seg is not None:
                got += seg.data
                lent.append((seg, seg.data))
        elif lent:
            old, was = lent.pop(rng.randrange(len(lent)))
            assert old.data == was
            old.release()
        lab.relieve()
    for left, was in lent:
        assert left.data == was
        left.release()
    got += lab.read(1 << 24)
    assert got == sent
    n = lab.numbers
    assert n["blocks"] == n["busy"] == n["held"] == n["lent"] == n["memory"] == 0


def test_tiny_writes_share_a_chunk() -> None:
    lab = RingLab()
    for i in range(200):
        lab.write(bytes([i]))
    assert lab.numbers["blocks"] == 1
    assert lab.pieces(0, 200) == [bytes(range(200))]


def test_held_objects_are_referenced_until_acknowledged() -> None:
    lab = RingLab()
    data = random.Random(1).randbytes(10000)
    before = sys.getrefcount(data)
    lab.write(data, hold=True)
    assert sys.getrefcount(data) == before + 1
    lab.drop(9999)
    assert lab.pieces(0, 10) == [data[-1:]]
    lab.drop(1)
    lab.reap()
    assert sys.getrefcount(data) == before
    assert lab.numbers["blocks"] == 0


def test_pieces_are_limited() -> None:
    lab = RingLab()
    parts = [bytes([i]) * 5000 for i in range(8)]
    for p in parts:
        lab.write(p, hold=True)
    assert lab.pieces(0, 40000, max_pieces=3) == parts[:3]
    assert lab.pieces(12000, 40000, max_pieces=2) == [parts[2][2000:], parts[3]]
    assert lab.pieces(40000, 1) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_send_queue(seed: int) -> None:
    rng = random.Random(seed)
    lab = RingLab()
    model = bytearray()
    for _ in range(800):
        what = rng.random()
        if what < 0.4:
            data = rng.randbytes(rng.choice([1, 10, 1000, 5000, 70000]))
            lab.write(data, hold=rng.random() < 0.4)
            model += data
        elif what < 0.6:
            n = rng.randrange(len(model) + 1) if rng.random() < 0.3 else min(len(model), rng.randrange(3000))
            lab.drop(n)
            del model[:n]
            lab.reap()
        elif model:
            off = rng.randrange(len(model))
            n = rng.randrange(1, 70000)
            got = b"".join(lab.pieces(off, n, 64))
            assert got == bytes(model[off : off + len(got)])
            assert lab.copy_out(off, min(n, len(model) - off)) == bytes(model[off : off + n])
        assert lab.numbers["unsent"] == len(model)
    lab.clear()
    assert lab.numbers["blocks"] == 0
