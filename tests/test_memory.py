"""The in-memory link: order, bounds, flags, descriptors, threads."""

from __future__ import annotations

import errno
import gc
import os
import select
import threading
import time

import pytest

from ulnet.kernelshim import link
from ulnet.kernelshim.memory import MemoryLink, memory_pair

MAC_A, MAC_B = b"\x02\x75\x6c\x00\x00\x01", b"\x02\x75\x6c\x00\x00\x02"


def frame(payload: bytes, dst: bytes = MAC_B, src: bytes = MAC_A) -> bytes:
    return dst + src + b"\x08\x00" + payload


def readable(end: MemoryLink) -> bool:
    return bool(select.select([end.fileno()], [], [], 0)[0])


def test_frames_arrive_in_order_and_whole() -> None:
    a, b = memory_pair(mtu=9000)
    assert (a.mac, b.mac, a.mtu) == (MAC_A, MAC_B, 9000)
    frames = [frame(os.urandom(size)) for size in (0, 1, 45, 46, 1500, 9000)]
    for data in frames:
        a.send_frame([data[:14], data[14:]])
    assert b.waiting() == len(frames)
    got = [b.recv_frame() for _ in frames]
    assert [g.data for g in got if g] == frames
    assert b.recv_frame() is None and a.recv_frame() is None
    b.send_frame(frame(b"back"))
    back = a.recv_frame()
    assert back is not None and back.data.endswith(b"back")


def test_descriptor_is_readable_while_frames_wait() -> None:
    a, b = memory_pair()
    assert not readable(b)
    a.send_frame(frame(b"1"))
    a.send_frame(frame(b"2"))
    assert readable(b) and not readable(a)
    assert b.recv_frame() and readable(b)
    assert b.recv_frame() and b.recv_frame() is None
    assert not readable(b)
    a.send_frame(frame(b"3"))
    assert readable(b)


def test_full_queue_drops_and_counts() -> None:
    a, b = memory_pair(queue_frames=3)
    for number in range(5):
        a.send_frame(frame(bytes([number])))
    counters = b.counters()
    assert counters["dropped_full"] == 2 and a.counters()["tx_frames"] == 5
    got = [b.recv_frame() for _ in range(3)]
    assert [g.data[-1] for g in got if g] == [0, 1, 2]
    assert b.counters()["rx_frames"] == 3
    a.send_frame(frame(b"\x09"))
    last = b.recv_frame()
    assert last is not None and last.data[-1] == 9


def test_zero_mac_comes_back_to_the_sender() -> None:
    a, b = memory_pair()
    a.send_frame(frame(b"self", dst=bytes(6)))
    assert b.recv_frame() is None
    got = a.recv_frame()
    assert got is not None and got.data.endswith(b"self")


def test_offload_flags_pass_on() -> None:
    a, b = memory_pair()
    assert a.features == link.LINK_CSUM | link.LINK_TSO | link.LINK_USO
    big = frame(bytes(60_000))
    a.send_frame(
        big,
        flags=link.FRAME_CSUM_PARTIAL | link.FRAME_GSO_TCP4,
        gso_size=1448,
        hdr_len=66,
        csum_start=34,
        csum_offset=16,
    )
    got = b.recv_frame()
    assert got is not None
    assert got.data == big
    assert (got.flags, got.gso_size) == (link.FRAME_CSUM_PARTIAL | link.FRAME_GSO_TCP4, 1448)
    a.send_frame(frame(b"small"))
    got = b.recv_frame()
    assert got is not None and (got.flags, got.gso_size) == (0, 0)


@pytest.mark.parametrize(
    ("data", "flags", "gso_size", "hdr_len", "code"),
    [
        (frame(bytes(1501)), 0, 0, 0, errno.EMSGSIZE),
        (frame(bytes(66_000)), link.FRAME_GSO_TCP4, 1000, 54, errno.EMSGSIZE),
        (frame(bytes(9000)), link.FRAME_GSO_TCP4, 1470, 54, errno.EMSGSIZE),
        (frame(bytes(9000)), link.FRAME_GSO_TCP4, 0, 54, errno.EINVAL),
        (frame(bytes(9000)), link.FRAME_UFO, 1000, 54, errno.EOPNOTSUPP),
        (b"short", 0, 0, 0, errno.EINVAL),
    ],
)
def test_frames_no_device_takes(data: bytes, flags: int, gso_size: int, hdr_len: int, code: int) -> None:
    a, b = memory_pair()
    with pytest.raises(OSError) as caught:
        a.send_frame(data, flags=flags, gso_size=gso_size, hdr_len=hdr_len)
    assert caught.value.errno == code
    assert b.waiting() == 0 and a.counters()["refused"] == 1


@pytest.mark.parametrize("flag", [link.FRAME_CSUM_PARTIAL, link.FRAME_GSO_TCP4, link.FRAME_GSO_UDP])
def test_plain_wire_takes_no_offload(flag: int) -> None:
    a, _ = memory_pair(features=0)
    with pytest.raises(OSError) as caught:
        a.send_frame(frame(bytes(100)), flags=flag, gso_size=50, hdr_len=54)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_closed_ends() -> None:
    a, b = memory_pair()
    a.send_frame(frame(b"waiting"))
    b.close()
    b.close()
    assert b.recv_frame() is None
    a.send_frame(frame(b"lost"))
    assert b.counters()["dropped_closed"] == 2
    with pytest.raises(OSError) as caught:
        b.send_frame(frame(b"x"))
    assert caught.value.errno == errno.EBADF
    # The far end may go while the near one lives, and the other way round.
    del b
    gc.collect()
    a.send_frame(frame(b"still"))
    a.close()


def test_descriptors_go_with_both_ends() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        a, b = memory_pair()
        a.send_frame(frame(b"x"))
    del a, b
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_send_while_one_receives() -> None:
    a, b = memory_pair(queue_frames=1 << 16)
    each, senders = 3000, 3

    def send(number: int) -> None:
        for count in range(each):
            a.send_frame(frame(number.to_bytes(2) + count.to_bytes(4)))

    threads = [threading.Thread(target=send, args=(n,)) for n in range(senders)]
    for thread in threads:
        thread.start()
    seen = [0] * senders
    deadline = time.monotonic() + 20
    while sum(seen) < each * senders and time.monotonic() < deadline:
        select.select([b.fileno()], [], [], 1)
        while (got := b.recv_frame()) is not None:
            number, count = int.from_bytes(got.data[14:16]), int.from_bytes(got.data[16:20])
            assert count == seen[number]  # in order for each sender
            seen[number] += 1
    for thread in threads:
        thread.join()
    assert seen == [each] * senders


def test_mistakes_are_named() -> None:
    for arguments, text in [
        ({"mtu": 60}, "mtu 60"),
        ({"mac_a": b"12345"}, "6 bytes, not 5"),
        ({"features": 8}, "features 0x8"),
        ({"queue_frames": 0}, "queue_frames 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            memory_pair(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memory_pair"):
        MemoryLink()
