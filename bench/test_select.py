"""Waiting for many sockets: one is ready among 10 and among 10,000, by the engine, by the kernel on our descriptors.

The ready one must cost the same however many are idle; the ratio of the two sizes is what to look at, not the times.
"""

from __future__ import annotations

import resource
import select as kernel
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.stack import embedded, select, socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.pollset import PollSet
from ulnet.stack.selectors import EVENT_READ, UlnetSelector

PORT = 7000


@pytest.fixture(scope="module")
def host() -> Iterator[Embedded]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    a, b = embedded.pair()
    yield a
    a.shutdown(0)
    b.shutdown(0)


@pytest.fixture(scope="module", params=[10, 10_000])
def sockets(request: pytest.FixtureRequest, host: Embedded) -> Iterator[list[socket.socket]]:
    opened = []
    for i in range(request.param):
        sock = socket.socket(type=socket.SOCK_DGRAM, host=host)
        sock.bind(("", PORT if i == 0 else 0))
        opened.append(sock)
    yield opened
    for sock in opened:
        sock.close()


def pollset(files: list[socket.socket]) -> Callable[[], object]:
    events = PollSet()
    for sock in files:
        assert sock.session is not None
        events.register(sock.session, select.EPOLLIN, sock)
    return events.wait


def epoll(files: list[socket.socket]) -> Callable[[], object]:
    poller = select.epoll()
    for sock in files:
        poller.register(sock, select.EPOLLIN)
    return poller.poll


def selector(files: list[socket.socket]) -> Callable[[], object]:
    made = UlnetSelector()
    for sock in files:
        made.register(sock, EVENT_READ)
    return made.select


def kernel_epoll(files: list[socket.socket]) -> Callable[[], object]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < 2 * len(files) + 500:
        pytest.skip(f"two descriptors each; the limit is {limit}")
    poller = kernel.epoll()
    for sock in files:
        poller.register(sock, kernel.EPOLLIN)
    return poller.poll


@pytest.mark.parametrize("way", [pollset, epoll, selector, kernel_epoll])
def test_one_ready(
    benchmark: BenchmarkFixture,
    host: Embedded,
    sockets: list[socket.socket],
    way: Callable[[Any], Callable[[], object]],
) -> None:
    """Send to one, wait, receive."""
    benchmark.group = f"one ready of {len(sockets)}"
    wait = way(sockets)
    address = (host.address, PORT)
    send, recv = sockets[0].sendto, sockets[0].recv

    def once() -> None:
        send(b"x", address)
        wait()
        recv(1)

    benchmark(once)
