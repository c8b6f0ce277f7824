"""One socket in the hands of several threads: who gets which bytes, who is woken by what, and that nobody is forgotten.

What Linux decides is checked on its own sockets by the same code. One thing differs: close() wakes the threads that
wait on the socket, with EBADF; on Linux they sleep on, on a descriptor number that may soon be another file.
"""

from __future__ import annotations

import contextlib
import errno
import random
import signal
import socket as kernel
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sockethosts import B, listening, running

from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]

Sock = Any


@pytest.fixture(params=["ours", "the kernel's"])
def two(request: pytest.FixtureRequest) -> Iterator[tuple[Sock, Sock]]:
    """A connected pair; the same test for both."""
    if request.param == "ours":
        yield request.getfixturevalue("joined")
        return
    with kernel.create_server(("127.0.0.1", 0)) as listener:
        client = kernel.create_connection(listener.getsockname(), 5)
        server, _ = listener.accept()
    with client, server:
        server.settimeout(5)
        yield client, server


@contextlib.contextmanager
def many(count: int, target: Callable[[int], object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for i in range(count):
            stack.enter_context(running(lambda i=i: target(i)))  # type: ignore[misc]
        yield


def errno_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as e:
        return e.errno
    return None


# -- who gets what -----------------------------------------------------------------------------


def test_each_byte_goes_to_one_reader(two: tuple[Sock, Sock]) -> None:
    client, server = two
    data = random.Random(1).randbytes(2_000_000)
    got = [bytearray() for _ in range(4)]

    def read(i: int) -> None:
        while piece := server.recv(random.Random(i).randrange(1, 20_000)):
            got[i] += piece

    with many(4, read):
        client.sendall(data)
        client.shutdown(kernel.SHUT_WR)
    assert sum(map(len, got)) == len(data)
    assert Counter(b"".join(got)) == Counter(data)


def test_a_send_that_fits_is_not_torn(two: tuple[Sock, Sock]) -> None:
    """What finds room is one piece of the stream; several threads' pieces come in some order. More is not promised."""
    client, server = two
    size, rounds, threads = 100, 150, 5
    # All of it fits the smallest send buffer, so no call has to wait in its middle, where others may come between.

    def write(i: int) -> None:
        for n in range(rounds):
            client.sendall(b"%04d%04d" % (i, n) + bytes([i]) * (size - 8))

    with many(threads, write):
        got = b""
        while len(got) < size * rounds * threads:
            got += server.recv(1 << 16)
    pieces = [got[at : at + size] for at in range(0, len(got), size)]
    seen: dict[int, int] = dict.fromkeys(range(threads), 0)
    for piece in pieces:
        i, n = int(piece[:4]), int(piece[4:8])
        assert piece[8:] == bytes([i]) * (size - 8)
        assert n == seen[i]
        seen[i] += 1


def test_long_sends_lose_nothing(two: tuple[Sock, Sock]) -> None:
    client, server = two
    client.settimeout(20)
    with many(3, lambda i: client.sendall(bytes([i]) * 6_000_000)):
        total: Counter[int] = Counter()
        while sum(total.values()) < 18_000_000:
            piece = server.recv(1 << 20)
            for i in range(3):
                total[i] += piece.count(i)
    assert total == {0: 6_000_000, 1: 6_000_000, 2: 6_000_000}


def test_both_directions_at_once(two: tuple[Sock, Sock]) -> None:
    client, server = two
    data = random.Random(2).randbytes(4_000_000)

    def read(sock: Sock) -> None:
        got = bytearray()
        while len(got) < len(data):
            got += sock.recv(1 << 17)
        assert got == data

    with (
        running(lambda: read(client)),
        running(lambda: read(server)),
        running(lambda: client.sendall(data)),
        running(lambda: server.sendall(data)),
    ):
        pass


# -- shutdown() and close() while others wait --------------------------------------------------


@pytest.mark.parametrize("how", [kernel.SHUT_RD, kernel.SHUT_RDWR])
def test_shutdown_wakes_readers_with_the_end(two: tuple[Sock, Sock], how: int) -> None:
    client, _ = two
    client.settimeout(None)
    ends: list[bytes] = []
    with many(3, lambda _: ends.append(client.recv(1))):
        time.sleep(0.1)
        client.shutdown(how)
    assert ends == [b"", b"", b""]


def test_shutdown_wakes_writers(two: tuple[Sock, Sock]) -> None:
    client, _ = two
    client.settimeout(None)
    numbers: list[int | None] = []
    with many(2, lambda _: numbers.append(errno_of(lambda: client.sendall(bytes(1 << 26))))):
        time.sleep(0.3)
        client.shutdown(kernel.SHUT_WR)
    assert numbers == [errno.EPIPE, errno.EPIPE]


@pytest.mark.parametrize("kind", ["ours", "the kernel's"])
def test_shutdown_of_a_listener_wakes_who_accepts(hosts: tuple[Embedded, Embedded], kind: str) -> None:
    listener: Sock = listening(hosts[1]) if kind == "ours" else kernel.create_server(("127.0.0.1", 0))
    listener.settimeout(None)
    numbers: list[int | None] = []
    with listener, many(2, lambda _: numbers.append(errno_of(listener.accept))):
        time.sleep(0.1)
        listener.shutdown(kernel.SHUT_RDWR)
    assert numbers == [errno.EINVAL] * 2


def test_close_wakes_readers_and_writers(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        for call in (
            lambda s: s.recv(1),
            lambda s: s.recv_into(bytearray(1)),
            lambda s: s.recv_buffer(),
            lambda s: s.recv_buffers(4),
            lambda s: s.sendall(bytes(1 << 26)),
            lambda s: [s.send_buffer(s.alloc_buffer(1 << 22)) for _ in range(9)],
        ):
            client = socket.create_connection(listener.getsockname(), None, host=hosts[0])
            server, _ = listener.accept()
            numbers: list[int | None] = []
            with many(3, lambda _: numbers.append(errno_of(lambda: call(client)))):  # noqa: B023
                time.sleep(0.1)
                client.close()
            assert numbers == [errno.EBADF] * 3
            server.close()


def test_close_wakes_who_accepts_connects_or_receives_datagrams(hosts: tuple[Embedded, Embedded]) -> None:
    listener = listening(hosts[1])
    listener.settimeout(None)
    connecting = socket.socket(host=hosts[0])
    datagrams = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
    datagrams.bind(("", 0))
    calls: list[tuple[socket.socket, Callable[[], object]]] = [
        (listener, listener.accept),
        (connecting, lambda: connecting.connect(("10.0.0.77", 7))),
        (datagrams, lambda: datagrams.recv(1)),
        (datagrams, lambda: datagrams.recv_buffers(9)),
    ]
    numbers: list[int | None] = [None] * len(calls)

    def run(i: int) -> None:
        numbers[i] = errno_of(calls[i][1])

    with many(len(calls), run):
        time.sleep(0.1)
        for sock in (listener, connecting, datagrams):
            sock.close()
    assert numbers == [errno.EBADF] * len(calls)


def test_calls_and_close_at_the_same_moment(hosts: tuple[Embedded, Embedded]) -> None:
    """Whoever comes too late is told so; nobody reads an end of file that the peer did not send."""
    with listening(hosts[1], backlog=64) as listener:
        for turn in range(60):
            client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
            server, _ = listener.accept()
            ends: list[object] = []

            def read(_: int, client: socket.socket = client, ends: list[object] = ends) -> None:
                try:
                    while True:
                        ends.append(client.recv(1))
                except OSError as e:
                    ends.append(e.errno)

            with many(2, read):
                time.sleep(0.0002 * (turn % 5))
                client.close()
            assert ends == [errno.EBADF] * 2
            server.close()


# -- the interpreter goes on -------------------------------------------------------------------


def test_the_gil_is_free_while_waiting(two: tuple[Sock, Sock]) -> None:
    client, server = two
    count = 0
    with running(lambda: client.recv(1)) as thread:
        time.sleep(0.05)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            count += 1
        assert thread.is_alive()
        server.sendall(b"x")
    assert count > 1000


def test_a_spinning_wait_leaves_the_gil_too() -> None:
    links = memory_pair()
    with (
        Embedded(links[0], "10.0.0.1", spin_ns=10**10) as a,
        Embedded(links[1], "10.0.0.2") as b,
        listening(b) as listener,
        socket.create_connection(listener.getsockname(), 5, host=a) as client,
    ):
        server, _ = listener.accept()
        with server, running(lambda: client.recv(1)):
            time.sleep(0.05)
            other = socket.socket(type=socket.SOCK_DGRAM, host=a)  # another caller of the same engine gets in
            assert other.sendto(b"x", (B, 7)) == 1
            other.close()
            server.sendall(b"x")


@pytest.mark.parametrize("spin_ns", [0, 400_000_000])
def test_a_signal_during_a_wait_is_handled_in_time(spin_ns: int) -> None:
    """Also one that comes while the wait polls: it must not be found only when the next frame arrives."""

    class Rang(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rang

    links = memory_pair()
    before = signal.signal(signal.SIGALRM, ring)
    with Embedded(links[0], "10.0.0.1", spin_ns=spin_ns) as a, socket.socket(type=socket.SOCK_DGRAM, host=a) as sock:
        sock.bind(("", 0))
        sock.settimeout(20)
        try:
            for _ in range(2):
                started = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(Rang):
                    sock.recv(1)
                assert time.monotonic() - started < 5
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    links[1].close()


def test_a_signal_while_another_thread_drives(hosts: tuple[Embedded, Embedded], udp: tuple[Sock, Sock]) -> None:
    class Rang(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rang

    server = udp[1]
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) as other:
        other.bind(("", 0))
        other.settimeout(20)
        server.settimeout(20)
        before = signal.signal(signal.SIGALRM, ring)
        try:
            with running(lambda: server.recv(1)):
                time.sleep(0.1)
                started = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(Rang):
                    other.recv(1)
                assert time.monotonic() - started < 5
                udp[0].sendto(b"x", (B, 9000))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


# -- nobody is forgotten -----------------------------------------------------------------------


@pytest.mark.parametrize("spin_ns", [0, 50_000])
def test_short_waits_of_many_threads(spin_ns: int) -> None:
    """Pairs of threads pass a byte to and fro: each hand-over of the driver's role must find the next one."""
    pairs, rounds = 6, 150
    a, b = embedded.pair(spin_ns=spin_ns)
    with a, b, listening(b, backlog=pairs) as listener:
        clients = [socket.create_connection(listener.getsockname(), 20, host=a) for _ in range(pairs)]
        servers = [listener.accept()[0] for _ in range(pairs)]
        by_name = {c.getsockname(): c for c in clients}

        def serve(i: int) -> None:
            servers[i].settimeout(20)
            for _ in range(rounds):
                servers[i].send(servers[i].recv(1))

        def ask(i: int) -> None:
            client = by_name[servers[i].getpeername()]
            for n in range(rounds):
                client.send(bytes([n]))
                assert client.recv(1) == bytes([n])

        with many(pairs, serve), many(pairs, ask):
            pass
        for sock in (*clients, *servers):
            sock.close()


def test_time_outs_among_traffic(hosts: tuple[Embedded, Embedded]) -> None:
    """Waits that end by time-out come and go between waits that end by data; the driver's role passes through both."""
    stop = threading.Event()
    quiet = [socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) for _ in range(4)]
    server = socket.socket(type=socket.SOCK_DGRAM, host=hosts[1])
    client = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
    server.bind(("", 9000))
    server.settimeout(5)
    client.settimeout(5)
    outs = [0] * len(quiet)

    def time_out(i: int) -> None:
        quiet[i].bind(("", 0))
        quiet[i].settimeout(0.0005 * (i + 1))
        while not stop.is_set():
            with pytest.raises(TimeoutError):
                quiet[i].recv(1)
            outs[i] += 1

    def echo() -> None:
        for _ in range(400):
            data, peer = server.recvfrom(10)
            server.sendto(data, peer)

    with many(len(quiet), time_out):
        try:
            with running(echo):
                for i in range(400):
                    client.sendto(b"%d" % i, (B, 9000))
                    assert client.recv(10) == b"%d" % i
        finally:
            stop.set()
    assert all(outs)
    for sock in (*quiet, server, client):
        sock.close()


def test_the_helper_takes_over_and_gives_back(joined: tuple[Sock, Sock]) -> None:
    """Between calls the helper acknowledges; a call that comes takes the engine from it, again and again."""
    client, server = joined
    rng = random.Random(3)
    for i in range(30):
        client.sendall(b"%d" % i * 1000)
        time.sleep(rng.choice((0, 0.0005, 0.003, 0.01)))
        assert server.recv(len(b"%d" % i) * 1000, socket.MSG_WAITALL) == b"%d" % i * 1000
    deadline = time.monotonic() + 5
    while client.session.stat()["snd_una"] != client.session.stat()["snd_nxt"]:
        assert time.monotonic() < deadline, "nobody acknowledges while both programs are elsewhere"
        time.sleep(0.01)
