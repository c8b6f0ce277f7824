"""The faulty link: each fault at its rate, the same for the same seed, at virtual time and at the machine's."""

from __future__ import annotations

import contextlib
import errno
import select
import time
from collections import Counter

import pytest
from linkframes import TCP, frame, is_sound

from ulnet.kernelshim import link
from ulnet.kernelshim.fault import FaultLink
from ulnet.kernelshim.memory import MemoryLink, memory_pair

MAC_A, MAC_B = b"\x02\x75\x6c\x00\x00\x01", b"\x02\x75\x6c\x00\x00\x02"
MS = 1_000_000


def numbered(number: int) -> bytes:
    return frame(MAC_A, MAC_B, payload=number.to_bytes(4) + bytes(60))


def number_of(got: link.Frame | None) -> int:
    assert got is not None
    return int.from_bytes(got.data[42:46])


def drain(end: link.Link) -> list[int]:
    found = []
    while (got := end.recv_frame()) is not None:
        found.append(number_of(got))
    return found


def pair(seed: int = 1, **faults: object) -> tuple[FaultLink, MemoryLink]:
    a, b = memory_pair(queue_frames=1 << 16)
    return FaultLink(a, seed, virtual=True, **faults), b  # type: ignore[arg-type]


def run(seed: int, count: int = 2000, **faults: object) -> tuple[list[int], dict[str, int]]:
    """Send numbered frames a microsecond apart; the order of arrival and the counters."""
    faulty, b = pair(seed, **faults)
    arrived: list[int] = []
    for number in range(count):
        faulty.advance(number * 1000)
        faulty.send_frame(numbered(number))
        arrived += drain(b)
    while (due := faulty.due()) is not None:
        faulty.advance(due)
        faulty.recv_frame()
        arrived += drain(b)
    return arrived, faulty.counters()


def test_without_faults_nothing_changes() -> None:
    arrived, counters = run(7)
    assert arrived == list(range(2000))
    assert counters["fault_tx_packets"] == 2000 and counters["fault_tx_lost"] == 0
    faulty, b = pair()
    assert (faulty.mac, faulty.mtu, faulty.fileno()) == (MAC_A, 1500, faulty.fileno())
    b.send_frame(numbered(5))
    assert select.select([faulty.fileno()], [], [], 0)[0]
    assert drain(faulty) == [5]


def test_same_seed_same_faults() -> None:
    faults = {"loss": 0.1, "duplicate": 0.1, "reorder": 0.1, "corrupt": 0.05, "delay_ns": MS, "jitter_ns": MS}
    assert run(42, **faults) == run(42, **faults)
    assert run(42, **faults)[0] != run(43, **faults)[0]


def test_one_fault_does_not_move_another() -> None:
    lost = set(range(2000)) - set(run(9, loss=0.05)[0])
    also = set(range(2000)) - set(run(9, loss=0.05, duplicate=0.3, reorder=0.2, jitter_ns=MS)[0])
    assert lost == also and 60 < len(lost) < 140


@pytest.mark.parametrize("fault", ["loss", "duplicate", "reorder"])
def test_rates_are_met_and_counted(fault: str) -> None:
    arrived, counters = run(3, **{fault: 0.2})
    seen = Counter(arrived)
    hit = {
        "loss": 2000 - len(seen),
        "duplicate": sum(count == 2 for count in seen.values()),
        "reorder": counters["fault_tx_reordered"],
    }[fault]
    assert 330 < hit < 470
    assert (
        counters[{"loss": "fault_tx_lost", "duplicate": "fault_tx_duplicated", "reorder": "fault_tx_reordered"}[fault]]
        == hit
    )
    assert (arrived != sorted(arrived)) == (fault == "reorder")
    assert set(seen) == set(range(2000)) or fault == "loss"


def test_extremes() -> None:
    assert run(1, 50, loss=1.0)[0] == []
    assert Counter(run(1, 50, duplicate=1.0)[0]) == Counter(dict.fromkeys(range(50), 2))


def test_corruption_is_one_bit_and_found_by_the_checksums() -> None:
    faulty, b = pair(5, corrupt=1.0)
    sizes = set()
    for number in range(300):
        # From a partial checksum: it must be completed first, or the damage would be summed in.
        data = frame(MAC_A, MAC_B, proto=TCP, payload=number.to_bytes(4) * 20, partial=True)
        whole = frame(MAC_A, MAC_B, proto=TCP, payload=number.to_bytes(4) * 20)
        faulty.send_frame(data, flags=link.FRAME_CSUM_PARTIAL, csum_start=34, csum_offset=16)
        got = b.recv_frame()
        assert got is not None and got.flags == 0
        differing = int.from_bytes(got.data) ^ int.from_bytes(whole)
        assert differing.bit_count() == 1
        assert got.data[:14] == whole[:14]
        with contextlib.suppress(IndexError):  # the header's own length was hit
            assert not is_sound(got.data)
        sizes.add(differing.bit_length())
    assert len(sizes) > 100  # anywhere
    assert faulty.counters()["fault_tx_corrupted"] == 300


def test_delay_moves_at_its_time_in_both_directions() -> None:
    faulty, b = pair(delay_ns=5 * MS)
    faulty.advance(100 * MS)
    faulty.send_frame(numbered(1))
    b.send_frame(numbered(2))
    assert drain(b) == [] and drain(faulty) == []
    assert faulty.due() == 105 * MS
    faulty.advance(105 * MS - 1)
    assert drain(faulty) == [] and drain(b) == []
    faulty.advance(105 * MS)
    assert drain(faulty) == [2] and drain(b) == [1]
    assert faulty.due() is None


def test_jitter_keeps_the_order() -> None:
    arrived, _ = run(11, jitter_ns=10 * MS)
    assert arrived == list(range(2000))


def test_directions_are_chosen_and_changed() -> None:
    faulty, b = pair(loss=1.0, tx=False)
    faulty.send_frame(numbered(1))
    b.send_frame(numbered(2))
    assert drain(b) == [1] and drain(faulty) == []
    faulty.configure(loss=1.0, rx=False)
    faulty.configure(tx=False)
    faulty.send_frame(numbered(3))
    b.send_frame(numbered(4))
    assert drain(b) == [] and drain(faulty) == [4]
    counters = faulty.counters()
    assert counters["fault_tx_lost"] == counters["fault_rx_lost"] == 1
    assert counters["tx_frames"] == 1  # the inner link's own


def test_rate_spaces_packets_and_bounds_the_queue() -> None:
    size = len(numbered(0))
    faulty, b = pair(rate_bps=8_000_000, queue_bytes=10 * size)  # a byte a microsecond
    for number in range(30):
        faulty.send_frame(numbered(number))
    times = []
    while (due := faulty.due()) is not None:
        faulty.advance(due)
        faulty.recv_frame()
        times += [due] * len(drain(b))
    assert times == [size * 1000 * (n + 1) for n in range(len(times))]
    assert len(times) in (10, 11)
    assert faulty.counters()["fault_tx_overflowed"] == 30 - len(times)


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_super_segments_become_packets_first(direction: str) -> None:
    a, b = memory_pair()
    faulty = FaultLink(a, 4, loss=0.3, virtual=True)
    sender, receiver = (faulty, b) if direction == "tx" else (b, faulty)
    body = bytes(range(256)) * 100
    data = frame(MAC_A, MAC_B, proto=TCP, payload=body, partial=True, tcp_flags=0x18, sequence=2**32 - 5000)
    sender.send_frame(
        data,
        flags=link.FRAME_CSUM_PARTIAL | link.FRAME_GSO_TCP4,
        gso_size=1000,
        hdr_len=54,
        csum_start=34,
        csum_offset=16,
    )
    got = []
    while (one := receiver.recv_frame()) is not None:
        assert one.flags == 0 and one.gso_size == 0
        assert is_sound(one.data)
        offset = (int.from_bytes(one.data[38:42]) + 5000) % 2**32
        assert one.data[54:] == body[offset : offset + 1000]
        got.append(offset)
    lost = faulty.counters()[f"fault_{direction}_lost"]
    assert len(got) + lost == 26 and 2 < lost < 16
    assert got == sorted(got)


def test_real_time_delay() -> None:
    a, b = memory_pair()
    faulty = FaultLink(a, 1, delay_ns=20 * MS)
    begin = time.monotonic_ns()
    faulty.send_frame(numbered(1))
    due = faulty.due()
    assert due is not None and 15 * MS < due - begin < 60 * MS
    while not b.waiting():
        assert time.monotonic_ns() - begin < 2000 * MS
        faulty.recv_frame()
        time.sleep(0.001)
    assert time.monotonic_ns() - begin >= 20 * MS


def test_links_stack() -> None:
    """A faulty link over a faulty link: both delays add up, and due() sees through."""
    a, b = memory_pair()
    outer = FaultLink(FaultLink(a, 1, delay_ns=3 * MS, virtual=True), 2, delay_ns=4 * MS, virtual=True)
    b.send_frame(numbered(1))
    now = 0
    while not drain(outer):
        due = outer.due()
        assert due is not None and now < due <= 7 * MS
        now = due
        outer.advance(now)
    assert now == 7 * MS


def test_refusals_and_closing() -> None:
    faulty, b = pair(delay_ns=MS)
    for data, code in ((bytes(1600), errno.EMSGSIZE), (b"x", errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            faulty.send_frame(data)
        assert caught.value.errno == code
    faulty.send_frame(numbered(1))
    faulty.close()
    assert faulty.recv_frame() is None and b.recv_frame() is None
    with pytest.raises(OSError) as caught:
        faulty.send_frame(numbered(1))
    assert caught.value.errno == errno.EBADF
    a, _ = memory_pair()
    for arguments, text in [
        ({"loss": 1.5}, "loss=1.5"),
        ({"corrupt": -0.1}, "corrupt=-0.1"),
        ({"delay_ns": -1}, "delay_ns=-1"),
        ({"rate_bps": -1}, "rate_bps=-1"),
    ]:
        with pytest.raises(ValueError, match=text):
            FaultLink(a, 1, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="virtual=True"):
        FaultLink(a, 1).advance(5)
