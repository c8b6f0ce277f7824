"""What many datagrams a call, and memory given away, are worth: two stacks in one thread over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

BATCH = 64
SMALL = b"x" * 64
BLOCK = 262_144
PORT = 9000


@pytest.fixture
def hosts() -> Iterator[tuple[Embedded, Embedded]]:
    """Nobody but the measured calls moves frames."""
    a, b = memory_pair()
    with (
        Embedded(a, "10.0.0.1", spin_ns=0, helper=False) as one,
        Embedded(b, "10.0.0.2", spin_ns=0, helper=False) as two,
    ):
        one.engine.ask_neighbour("10.0.0.2")
        two.engine.poll()
        one.engine.poll()
        yield one, two


@pytest.fixture
def datagrams(hosts: tuple[Embedded, Embedded]) -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as client,
        socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) as server,
    ):
        server.bind(("", PORT))
        client.connect(("10.0.0.2", PORT))
        yield client, server


def per_datagram(benchmark: BenchmarkFixture, call: Any) -> None:
    benchmark.group = f"udp, {BATCH} datagrams of 64 bytes there"
    benchmark(call)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_datagram"] = round(benchmark.stats["median"] / BATCH * 1e9, 1)


def test_one_by_one(benchmark: BenchmarkFixture, datagrams: tuple[socket.socket, socket.socket]) -> None:
    client, server = datagrams

    def turn() -> None:
        for _ in range(BATCH):
            client.send(SMALL)
        for _ in range(BATCH):
            server.recvfrom(2048)

    per_datagram(benchmark, turn)


def test_batches(benchmark: BenchmarkFixture, datagrams: tuple[socket.socket, socket.socket]) -> None:
    client, server = datagrams
    batch = [SMALL] * BATCH

    def turn() -> None:
        client.send_buffers(batch)
        for buffer in server.recv_buffers(BATCH):
            buffer.release()

    per_datagram(benchmark, turn)


@pytest.fixture
def stream(hosts: tuple[Embedded, Embedded]) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("", 7), host=hosts[1]) as listener:
        client = socket.socket(host=hosts[0])
        client.settimeout(0)
        client.connect_ex(("10.0.0.2", 7))
        for _ in range(4):
            hosts[1].engine.poll()
            hosts[0].engine.poll()
        server, _ = listener.accept()
    with client, server:
        server.settimeout(0)
        yield client, server


def pour(benchmark: BenchmarkFixture, hosts: tuple[Embedded, Embedded], send: Any, receive: Any) -> None:
    benchmark.group = f"tcp, {BLOCK} bytes there"

    def turn() -> None:
        send()
        left = BLOCK
        while left:
            hosts[0].engine.poll()
            left -= receive()

    benchmark(turn)
    if benchmark.stats is not None:
        benchmark.extra_info["MiB_per_second"] = round(BLOCK / 2**20 / benchmark.stats["median"], 1)


def test_stream_by_copies(
    benchmark: BenchmarkFixture, hosts: tuple[Embedded, Embedded], stream: tuple[socket.socket, socket.socket]
) -> None:
    client, server = stream
    data, room = bytearray(BLOCK), bytearray(BLOCK)

    def receive() -> int:
        try:
            return server.recv_into(room)
        except BlockingIOError:
            return 0

    pour(benchmark, hosts, lambda: client.sendall(data), receive)


def test_stream_by_buffers(
    benchmark: BenchmarkFixture, hosts: tuple[Embedded, Embedded], stream: tuple[socket.socket, socket.socket]
) -> None:
    client, server = stream

    def receive() -> int:
        got = 0
        try:
            for buffer in server.recv_buffers(64):
                got += len(buffer)
                buffer.release()
        except BlockingIOError:
            pass
        return got

    pour(benchmark, hosts, lambda: client.send_buffer(client.alloc_buffer(BLOCK)), receive)
