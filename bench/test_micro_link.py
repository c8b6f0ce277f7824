"""Frames through a link and nothing above it: memory, and packet sockets over a veth pair where privilege is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.kernelshim.channel import open_embedded
from ulnet.kernelshim.link import FRAME_CSUM_PARTIAL, FRAME_GSO_TCP4, Link
from ulnet.kernelshim.memory import memory_pair
from ulnet.kernelshim.testbed import Testbed, can_testbed
from ulnet.stack.frames import build_tcp, build_udp

A, B = "10.79.0.1", "10.79.0.2"


@contextmanager
def links(kind: str) -> Iterator[tuple[Link, Link]]:
    """Two joined links: memory, or packet sockets with the given packet interface on two hosts."""
    if kind == "memory":
        yield memory_pair()
        return
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    with Testbed() as bed:
        hosts = bed.host("link_a"), bed.host("link_b")
        bed.wire(*hosts)
        made: list[Link] = []
        for host, address in zip(hosts, (A, B), strict=True):
            with host:
                made.append(open_embedded(host.interface.name, IPv4Address(address), packet_interface=kind))
        yield made[0], made[1]
        for link in made:
            link.close()


def receive(link: Link) -> bytes:
    deadline = time.monotonic() + 2
    while (frame := link.recv_frame()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("the frame did not arrive")
    return frame.data


KINDS = ["memory", "ipf", "ipc"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 1472])
def test_frame(benchmark: BenchmarkFixture, kind: str, size: int) -> None:
    """One frame there and taken, in one thread."""
    benchmark.group = f"frame, {size} B of UDP"
    with links(kind) as (here, there):
        frame = build_udp(A, B, 5000, 7, bytes(size), eth_src=here.mac.hex(":"), eth_dst=there.mac.hex(":"))

        def through() -> int:
            here.send_frame(frame)
            return len(receive(there))

        assert benchmark(through) == len(frame)


@pytest.mark.parametrize("kind", KINDS)
def test_super_segment(benchmark: BenchmarkFixture, kind: str) -> None:
    """65,160 bytes of TCP in one frame, cut by nobody."""
    benchmark.group = "frame, super-segment"
    with links(kind) as (here, there):
        frame = build_tcp(
            *(A, B, 5000, 7, "P."),
            payload=bytes(65_160),
            partial=True,
            eth_src=here.mac.hex(":"),
            eth_dst=there.mac.hex(":"),
        )

        def through() -> int:
            here.send_frame(frame, FRAME_CSUM_PARTIAL | FRAME_GSO_TCP4, 1448, 54, 34, 16)
            return len(receive(there))

        assert benchmark(through) == len(frame)
    if benchmark.stats is not None:
        benchmark.extra_info["Gbit_per_second"] = round(len(frame) * 8 / benchmark.stats["median"] / 1e9, 1)
