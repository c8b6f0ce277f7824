"""The capturing link: what it writes is what a wire would have carried, by our reading and by tshark's."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from linkframes import TCP, frame, is_sound

from ulnet.kernelshim import link
from ulnet.kernelshim.capture import CaptureLink
from ulnet.kernelshim.fault import FaultLink
from ulnet.kernelshim.memory import memory_pair

MAC_A, MAC_B = b"\x02\x75\x6c\x00\x00\x01", b"\x02\x75\x6c\x00\x00\x02"
PARTIAL = link.FRAME_CSUM_PARTIAL


def read_pcap(data: bytes) -> list[tuple[int, int, bytes]]:
    """(time in ns, original length, bytes) of each packet."""
    magic, major, minor, _, _, snaplen, kind = struct.unpack_from("=IHHIIII", data)
    assert (magic, major, minor, kind) == (0xA1B23C4D, 2, 4, 1)
    at, found = 24, []
    while at < len(data):
        seconds, nanos, kept, size = struct.unpack_from("=IIII", data, at)
        assert kept <= snaplen and nanos < 10**9
        found.append((seconds * 10**9 + nanos, size, data[at + 16 : at + 16 + kept]))
        assert len(found[-1][2]) == kept
        at += 16 + kept
    return found


def test_both_directions_in_order_with_real_times(tmp_path: Path) -> None:
    a, b = memory_pair()
    path = tmp_path / "both.pcap"
    begin = time.time_ns()
    with CaptureLink(a, path) as capture:
        assert (capture.mac, capture.mtu, capture.features, capture.fileno()) == (a.mac, a.mtu, a.features, a.fileno())
        sent = [frame(MAC_A, MAC_B, payload=bytes([n])) for n in range(3)]
        for data in sent:
            capture.send_frame([data[:14], data[14:20], data[20:]])
            b.send_frame(data[::-1])
            got = capture.recv_frame()
            assert got is not None and got.data == data[::-1]
        assert capture.counters()["captured_packets"] == 6
    packets = read_pcap(path.read_bytes())
    assert [data for _, _, data in packets] == [x for data in sent for x in (data, data[::-1])]
    times = [at for at, _, _ in packets]
    assert times == sorted(times) and begin <= times[0] and times[-1] <= time.time_ns()


def test_offloads_are_undone_in_the_copy_only() -> None:
    a, b = memory_pair()
    file = io.BytesIO()
    capture = CaptureLink(a, file)
    small = frame(MAC_A, MAC_B, payload=b"odd", partial=True)
    body = os.urandom(10_100)
    large = frame(MAC_A, MAC_B, proto=TCP, payload=body, partial=True, tcp_flags=0x19)
    train = frame(MAC_A, MAC_B, payload=body[:2500], partial=True)
    v6 = ipv6_udp(b"six", partial=True)
    capture.send_frame(small, flags=PARTIAL, csum_start=34, csum_offset=6)
    capture.send_frame(
        large, flags=PARTIAL | link.FRAME_GSO_TCP4, gso_size=1448, hdr_len=54, csum_start=34, csum_offset=16
    )
    capture.send_frame(
        train, flags=PARTIAL | link.FRAME_GSO_UDP, gso_size=1000, hdr_len=42, csum_start=34, csum_offset=6
    )
    capture.send_frame(v6, flags=PARTIAL, csum_start=54, csum_offset=6)
    for original in (small, large, train, v6):
        got = b.recv_frame()
        assert got is not None and got.data == original and got.flags & PARTIAL
    # Received the same way round.
    b.send_frame(large, flags=PARTIAL | link.FRAME_GSO_TCP4, gso_size=1448, hdr_len=54)
    got = capture.recv_frame()
    assert got is not None and got.data == large
    capture.stop()
    packets = [data for _, _, data in read_pcap(file.getvalue())]
    assert len(packets) == 1 + 7 + 3 + 1 + 7
    assert packets[0] == frame(MAC_A, MAC_B, payload=b"odd")
    cut = packets[1:8]
    assert packets[12:] == cut
    assert all(is_sound(data) and len(data) <= 1514 for data in packets if data[12] == 8)
    assert b"".join(data[54:] for data in cut) == body
    assert [int.from_bytes(data[38:42]) for data in cut] == [1 + 1448 * n for n in range(7)]
    assert [int.from_bytes(data[18:20]) for data in cut] == [1 + n for n in range(7)]  # IP identification
    assert [data[47] for data in cut] == [0x10] * 6 + [0x19]  # FIN and PSH on the last
    assert b"".join(data[42:] for data in packets[8:11]) == body[:2500]
    assert [int.from_bytes(data[38:40]) for data in packets[8:11]] == [1008, 1008, 508]
    assert packets[11] == ipv6_udp(b"six", partial=False)


def ipv6_udp(payload: bytes, partial: bool) -> bytes:
    from linkframes import checksum

    source, target = bytes(15) + b"\1", bytes(15) + b"\2"
    udp = struct.pack("!HHHH", 5, 6, 8 + len(payload), 0) + payload
    head = source + target + struct.pack("!IHBB", len(udp), 0, 0, 17)
    value = ~checksum(head) & 0xFFFF if partial else checksum(head + udp)
    udp = udp[:6] + struct.pack("!H", value) + udp[8:]
    return MAC_B + MAC_A + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + source + target + udp


def test_a_wrong_partial_sum_stays_wrong() -> None:
    """The capture completes what the stack wrote; it does not cover up for it."""
    a, _ = memory_pair()
    file = io.BytesIO()
    capture = CaptureLink(a, file)
    data = bytearray(frame(MAC_A, MAC_B, proto=TCP, payload=bytes(3000), partial=True))
    data[50] ^= 0x40
    capture.send_frame(data[:1000], flags=0)
    capture.send_frame(data, flags=PARTIAL | link.FRAME_GSO_TCP4, gso_size=1448, hdr_len=54)
    capture.stop()
    packets = read_pcap(file.getvalue())
    assert len(packets) == 4 and not any(is_sound(data) for _, _, data in packets[1:])


def test_raw_and_snaplen() -> None:
    a, _ = memory_pair()
    raw, short = io.BytesIO(), io.BytesIO()
    capture = CaptureLink(CaptureLink(a, raw, raw=True), short, snaplen=60)
    large = frame(MAC_A, MAC_B, proto=TCP, payload=bytes(5000), partial=True)
    capture.send_frame(large, flags=PARTIAL | link.FRAME_GSO_TCP4, gso_size=1448, hdr_len=54)
    inner = capture
    inner.close()
    packets = read_pcap(short.getvalue())
    assert [(size, len(data)) for _, size, data in packets] == [(1502, 60)] * 3 + [(5000 - 3 * 1448 + 54, 60)]
    del capture, inner
    assert [data for _, _, data in read_pcap(raw.getvalue())] in ([large], [])


def test_refused_frames_are_not_captured_and_stop_leaves_the_link_at_work() -> None:
    a, b = memory_pair()
    file = io.BytesIO()
    capture = CaptureLink(a, file)
    with pytest.raises(OSError):
        capture.send_frame(bytes(2000))
    capture.stop()
    capture.stop()
    capture.send_frame(frame(MAC_A, MAC_B))
    assert b.recv_frame() is not None
    assert read_pcap(file.getvalue()) == []
    assert not file.closed
    capture.flush()


def test_more_than_a_block_and_flush(tmp_path: Path) -> None:
    a, b = memory_pair(queue_frames=10)
    path = tmp_path / "many.pcap"
    capture = CaptureLink(a, path)
    data = frame(MAC_A, MAC_B, payload=bytes(1400))
    for _ in range(1000):
        capture.send_frame(data)
    assert 24 < path.stat().st_size < 1000 * len(data)
    capture.flush()
    assert len(read_pcap(path.read_bytes())) == 1000
    # An idle receiver writes by itself.
    capture.send_frame(data)
    deadline = time.monotonic() + 2
    while len(read_pcap(path.read_bytes())) == 1000:
        assert time.monotonic() < deadline
        capture.recv_frame()
        time.sleep(0.01)
    # Forgotten without close: nothing is lost.
    capture.send_frame(data)
    del capture
    assert len(read_pcap(path.read_bytes())) == 1002
    assert b.waiting() == 10


def test_virtual_time() -> None:
    a, b = memory_pair()
    file = io.BytesIO()
    capture = CaptureLink(a, file, virtual=True)
    top = FaultLink(capture, 1, virtual=True, delay_ns=1)
    for now in (5, 3 * 10**9 + 7):
        top.advance(now)
        b.send_frame(frame(MAC_B, MAC_A))
        top.recv_frame()
    capture.stop()
    assert [at for at, _, _ in read_pcap(file.getvalue())] == [5, 3 * 10**9 + 7]


def test_a_failing_file_ends_the_capture_not_the_link() -> None:
    a, b = memory_pair(queue_frames=10_000)
    capture = CaptureLink(a, "/dev/full")
    data = frame(MAC_A, MAC_B, payload=bytes(1400))
    for _ in range(500):
        capture.send_frame(data)
    assert b.waiting() == 500
    assert capture.counters()["capture_failed"] == 1
    with pytest.raises(OSError, match="No space left"):
        capture.flush()
    capture.stop()
    with pytest.raises(FileNotFoundError):
        CaptureLink(a, "/nonexistent/x.pcap")
    with pytest.raises(ValueError, match="snaplen 5"):
        CaptureLink(a, io.BytesIO(), snaplen=5)


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_finds_nothing_wrong(tmp_path: Path) -> None:
    a, b = memory_pair()
    path = tmp_path / "offload.pcap"
    with CaptureLink(a, path) as capture:
        sequence = 1
        for size in (1, 1447, 1448, 1449, 20_000, 60_001):
            for partial in (True, False):
                data = frame(MAC_A, MAC_B, proto=TCP, payload=os.urandom(size), sequence=sequence, partial=partial)
                flags = (PARTIAL if partial else 0) | (link.FRAME_GSO_TCP4 if size > 1448 else 0)
                gso = 1448 if size > 1448 else 0
                capture.send_frame(data, flags=flags, gso_size=gso, hdr_len=54, csum_start=34, csum_offset=16)
                sequence += size
        b.send_frame(
            frame(MAC_B, MAC_A, payload=bytes(5000), partial=True), flags=PARTIAL | 8, gso_size=1471, hdr_len=42
        )
        capture.recv_frame()
        capture.send_frame(ipv6_udp(b"odd", partial=True), flags=PARTIAL)
    checks = [f"-o{name}.check_checksum:TRUE" for name in ("ip", "tcp", "udp")]
    fields = ["frame.len", "ip.checksum.status", "tcp.checksum.status", "udp.checksum.status", "tcp.analysis.flags"]
    wanted = [argument for field in fields for argument in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-n", "-r", path, *checks, "-Tfields", "-Eseparator=,", *wanted],
        capture_output=True,
        text=True,
        timeout=60,
    )
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert len(rows) == capture.counters()["captured_packets"] > 110, done.stderr
    for length, ip, tcp, udp, analysis in rows:
        assert int(length) <= 1514
        assert ip in ("1", "") and {tcp, udp} == {"1", ""} and analysis == ""
