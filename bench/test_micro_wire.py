"""Checksums and wire formats: RFC 1071 sums by way and size, frames parsed and built."""

from __future__ import annotations

import os
from typing import Literal

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.stack import checksum, frames, wire

A, B = "10.0.0.1", "10.0.0.2"
REPEATS = 200  # inside C, so that no calls are measured


@pytest.mark.parametrize("name", ["fast", "portable", "naive"])
@pytest.mark.parametrize("size", [1460, 65536])
def test_checksum(benchmark: BenchmarkFixture, name: Literal["fast", "portable", "naive"], size: int) -> None:
    benchmark.group = f"checksum {size} B, {REPEATS} times"
    data = os.urandom(size)
    assert checksum.repeat(name, data, 3) == checksum.repeat("naive", data, 3)
    benchmark(checksum.repeat, name, data, REPEATS)
    if benchmark.stats is not None:
        benchmark.extra_info["GB_per_second"] = round(size * REPEATS / benchmark.stats["median"] / 1e9, 2)


def test_copy_checksum(benchmark: BenchmarkFixture) -> None:
    source, target = os.urandom(65536), bytearray(65536)
    benchmark.group = "copy and checksum 65536 B"
    benchmark(checksum.copy_checksum, target, source)
    assert target == source


FRAMES = {
    "udp 1 B": frames.build_udp(A, B, 5000, 7, b"x"),
    "udp 1472 B": frames.build_udp(A, B, 5000, 7, bytes(1472)),
    "tcp ack": frames.build_tcp(A, B, 5000, 7, ".", seq=1, ack=1),
    "tcp 1460 B": frames.build_tcp(A, B, 5000, 7, "P.", seq=1, ack=1, payload=bytes(1460)),
    "tcp syn": frames.build_tcp(A, B, 5000, 7, "S", options=b"\x02\x04\x05\xb4\x01\x03\x03\x07"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_parse(benchmark: BenchmarkFixture, kind: str) -> None:
    benchmark.group = "parse, checksum verified"
    frame = benchmark(wire.parse_frame, FRAMES[kind])
    assert (frame.tcp or frame.udp).dport == 7


@pytest.mark.parametrize("size", [1, 1472])
def test_build_udp(benchmark: BenchmarkFixture, size: int) -> None:
    benchmark.group = "build"
    payload = bytes(size)
    frame = benchmark(frames.build_udp, A, B, 5000, 7, payload)
    assert len(frame) == 42 + size


@pytest.mark.parametrize("size", [0, 1460])
def test_build_tcp(benchmark: BenchmarkFixture, size: int) -> None:
    benchmark.group = "build"
    payload = bytes(size)
    frame = benchmark(frames.build_tcp, A, B, 5000, 7, "P.", seq=1, ack=1, payload=payload)
    assert len(frame) == 54 + size
