"""UDP receive queues: what was sent is read, whole, in order, within a memory limit, and nothing is lost uncounted."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulnet.kernelshim.link import FRAME_CSUM_PARTIAL, FRAME_GSO_UDP, Link
from ulnet.kernelshim.memory import memory_pair
from ulnet.stack.frames import build_tcp, build_udp
from ulnet.stack.udp import DatagramQueue

READABLE, WRITABLE, ERROR = 1, 2, 4
SENDER = ("10.0.0.1", 5000)


def rig(rcvbuf: int = 212992) -> tuple[Link, DatagramQueue]:
    """A sender's link and a queue at its other end."""
    here, there = memory_pair(mtu=65535)
    return here, DatagramQueue(there, rcvbuf)


def send(link: Link, payload: bytes, flags: int = 0, gso_size: int = 0, sport: int = 5000) -> None:
    frame = build_udp("10.0.0.1", "10.0.0.2", sport, 7, payload, partial=bool(flags & FRAME_CSUM_PARTIAL))
    link.send_frame(frame, flags=flags, gso_size=gso_size, hdr_len=42, csum_start=34, csum_offset=6)


def send_train(link: Link, payload: bytes, gso_size: int) -> None:
    send(link, payload, FRAME_CSUM_PARTIAL | FRAME_GSO_UDP, gso_size)


def everything(queue: DatagramQueue) -> list[bytes]:
    got = []
    while queue.ready & READABLE:
        got.append(queue.read())
    return got


def test_datagrams_come_out_whole_in_order_with_their_sender() -> None:
    link, queue = rig()
    for i, payload in enumerate((b"one", b"", b"x" * 1472, b"y" * 60000)):
        send(link, payload, sport=6000 + i)
    assert queue.poll() == 4
    buf = bytearray(65536)
    for i, payload in enumerate((b"one", b"", b"x" * 1472, b"y" * 60000)):
        assert queue.ready == READABLE | WRITABLE
        assert queue.read_into(buf) == (len(payload), len(payload), ("10.0.0.1", 6000 + i))
        assert buf[: len(payload)] == payload
    assert queue.ready == WRITABLE
    with pytest.raises(BlockingIOError):
        queue.read_into(buf)
    with pytest.raises(BlockingIOError):
        queue.read()


def test_a_short_buffer_gets_the_front_and_learns_the_real_length() -> None:
    link, queue = rig()
    send(link, b"abcdef")
    queue.poll()
    buf = bytearray(4)
    assert queue.read_into(buf, peek=True) == (4, 6, SENDER)
    assert queue.read_into(buf) == (4, 6, SENDER)
    assert bytes(buf) == b"abcd"
    assert queue.ready == WRITABLE  # the rest is gone, as with every datagram socket


def test_large_datagrams_keep_their_slot_and_give_it_back() -> None:
    link, queue = rig()
    big = os.urandom(50000)
    send(link, big)
    send(link, b"small")
    queue.poll()
    held = queue.counters()
    assert held["slots_held"] == 1
    assert held["copied_bytes"] == 5
    assert queue.read() == big
    after = queue.counters()
    assert (after["slots_held"], after["copied_bytes"]) == (0, 5)
    assert queue.read() == b"small"
    assert queue.counters()["live_blocks"] == 0


def test_the_limit_is_on_memory_and_every_datagram_refused_is_counted() -> None:
    link, queue = rig(rcvbuf=20000)
    for _ in range(200):
        send(link, b"z")
    queue.poll()
    n = queue.counters()
    assert n["queued"] + n["dropped_full"] == 200
    assert n["dropped_full"] > 0, "one byte each is small, the blocks that hold them are not"
    assert n["queued_bytes"] == n["queued"] == n["datagrams_in"]
    assert 19000 < n["memory_bytes"] < 21000
    assert len(everything(queue)) == n["queued"]
    assert queue.counters()["memory_bytes"] == 0


def test_an_empty_queue_takes_a_datagram_beyond_its_limit() -> None:
    link, queue = rig(rcvbuf=1000)
    send(link, b"a" * 5000)
    send(link, b"b")
    queue.poll()
    assert everything(queue) == [b"a" * 5000]
    assert queue.counters()["dropped_full"] == 1


@pytest.mark.parametrize(
    ("total", "size"), [(3000, 1000), (3001, 1000), (999, 1000), (1000, 1000), (60000, 1472), (5, 1)]
)
def test_a_train_is_split_into_its_datagrams(total: int, size: int) -> None:
    link, queue = rig()
    data = os.urandom(total)
    send_train(link, data, size)
    queue.poll()
    assert queue.bad == 0
    assert everything(queue) == [data[i : i + size] for i in range(0, total, size)]
    assert queue.counters()["slots_held"] == 0
    assert queue.counters()["live_blocks"] == 0


def test_a_train_that_does_not_fit_loses_its_end_and_counts_each_piece() -> None:
    link, queue = rig(rcvbuf=10000)
    data = os.urandom(40 * 1000)
    send_train(link, data, 1000)
    queue.poll()
    n = queue.counters()
    assert n["datagrams_in"] + n["dropped_full"] == 40
    assert n["dropped_full"] > 0
    assert b"".join(everything(queue)) == data[: n["bytes_in"]]


def test_bad_frames_are_counted_and_dropped() -> None:
    link, queue = rig()
    frame = bytearray(build_udp("10.0.0.1", "10.0.0.2", 1, 2, b"payload"))
    frame[-1] ^= 1
    link.send_frame(bytes(frame))
    link.send_frame(build_tcp("10.0.0.1", "10.0.0.2", 1, 2))
    assert queue.poll() == 2
    assert queue.bad == 2
    assert queue.ready == WRITABLE


def test_an_icmp_error_is_reported_once_and_before_data() -> None:
    link, queue = rig()
    send(link, b"data")
    queue.poll()
    queue.icmp(errno.ECONNREFUSED)
    assert queue.ready == READABLE | WRITABLE | ERROR
    with pytest.raises(ConnectionRefusedError):
        queue.read_into(bytearray(10))
    assert queue.ready == READABLE | WRITABLE
    assert queue.read_into(bytearray(10)) == (4, 4, SENDER)


@given(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, 9000)), max_size=60), st.integers(1000, 60000), st.randoms()
)
@settings(max_examples=40, deadline=None)
def test_any_mix_of_sends_and_reads_loses_only_what_it_counts(sizes: list[int], rcvbuf: int, random) -> None:  # type: ignore[no-untyped-def]
    link, queue = rig(rcvbuf)
    sent, got = [], []
    for i, size in enumerate(sizes):
        payload = i.to_bytes(2, "big") + bytes([i & 255]) * size
        sent.append(payload)
        send(link, payload)
        queue.poll()
        if random.random() < 0.3 and queue.ready & READABLE:
            got.append(queue.read())
    got += everything(queue)
    assert [p for p in sent if p in got] == got
    assert len(got) + queue.counters()["dropped_full"] == len(sent)
    assert (queue.counters()["live_blocks"], queue.counters()["slots_held"]) == (0, 0)
