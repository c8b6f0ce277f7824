"""The select module over our sockets: select, poll and epoll, alone and mixed with ordinary descriptors."""

from __future__ import annotations

import errno
import functools
import os
import random
import resource
import select as kernel
import signal
import socket as kernel_socket
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sockethosts import A, B, running

from tests.netserver_bed import PEER, Bed
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import select, socket
from ulnet.stack.embedded import Embedded, pair
from ulnet.stack.pollset import PollSet
from ulnet.stack.selectors import EVENT_READ, UlnetSelector

pytest_plugins = ["socketfixtures"]

cpython = pytest.importorskip("test.test_select", reason="this Python has no test package")
import test.test_epoll  # noqa: E402
import test.test_poll  # noqa: E402

Pair = tuple[socket.socket, socket.socket]
CLOSED = object()
IN, OUT, ERR, HUP, RDHUP = select.POLLIN, select.POLLOUT, select.POLLERR, select.POLLHUP, select.POLLRDHUP


def until(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.001)


# -- CPython's own tests, on ordinary descriptors ------------------------------------------------


@pytest.fixture
def substituted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpython, test.test_poll, test.test_epoll):
        monkeypatch.setattr(module, "select", select)


@pytest.mark.usefixtures("substituted")
class TestSelectOfCPython(cpython.SelectTestCase):  # type: ignore[misc, name-defined]
    test_disallow_instantiation = None  # poll is a class here, not a function
    test_select = unittest.skip("runs a shell for 10 s")(cpython.SelectTestCase.test_select)


@pytest.mark.usefixtures("substituted")
class TestPollOfCPython(test.test_poll.PollTests):  # type: ignore[misc, name-defined]
    test_poll2 = unittest.skip("runs a shell for 10 s")(test.test_poll.PollTests.test_poll2)


@pytest.mark.usefixtures("substituted")
class TestEpollOfCPython(test.test_epoll.TestEPoll):  # type: ignore[misc, name-defined]
    pass


def test_every_name_of_the_standard_module() -> None:
    public = {name for name in dir(kernel) if not name.startswith("_")}
    assert public <= set(dir(select)) and public <= set(select.__all__)
    assert select.EPOLLET == kernel.EPOLLET and select.error is OSError


# -- select --------------------------------------------------------------------------------------


def test_select_of_ours(joined: Pair) -> None:
    client, server = joined
    assert select.select([client], [client], [client], 0) == ([], [client], [])
    assert select.select([client], [], [], 0.01) == ([], [], [])
    server.send(b"x")
    assert select.select([client, server], [], []) == ([client], [], [])
    assert select.select([client, client.fileno()], [server], []) == ([client, client.fileno()], [server], [])
    server.shutdown(socket.SHUT_WR)
    client.recv(1)
    until(lambda: select.select([client], [], [], 0)[0] == [client])
    assert client.recv(1) == b""


def test_select_of_ours_makes_no_descriptor(joined: Pair) -> None:
    client, server = joined
    server.send(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert select.select([client], [server], []) == ([client], [server], [])
        assert select.select([server], [], [], 0) == ([], [], [])
    assert len(os.listdir("/proc/self/fd")) == before


def test_select_mixed(joined: Pair) -> None:
    client, server = joined
    r, w = os.pipe()
    left, right = kernel_socket.socketpair()
    try:
        assert select.select([client, r, left], [], [r], 0.01) == ([], [], [])
        os.write(w, b"x")
        server.send(b"x")
        until(lambda: select.select([client, r, left], [right], [client], 1) == ([client, r], [right], []))
        client.recv(1)
        assert select.select([client, r, left], [], [], 1) == ([r], [], [])
        os.read(r, 1)
        for act, what in ((lambda: os.write(w, b"x"), r), (lambda: server.send(b"x"), client)):
            timer = threading.Timer(0.05, act)
            timer.start()
            assert select.select([client, r, left], [], [], 10) == ([what], [], [])
            os.read(r, 1) if what == r else client.recv(1)
            timer.join()
        with open(__file__, "rb") as plain:  # never waits
            assert select.select([client, plain], [], [], 10) == ([plain], [], [])
    finally:
        os.close(r)
        os.close(w)
        left.close()
        right.close()


def test_select_exceptional(joined: Pair) -> None:
    """Urgent data of a kernel socket is; nothing of ours, and a hang-up that nobody asked for does not spin."""
    client, server = joined
    with kernel_socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = kernel_socket.create_connection(listener.getsockname())
        mine, _ = listener.accept()
    theirs.send(b"!", kernel_socket.MSG_OOB)
    assert select.select([client], [], [mine], 10) == ([], [], [mine])
    mine.close()
    theirs.close()
    r, w = os.pipe()
    os.close(w)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    started, used = time.monotonic(), time.process_time()
    assert select.select([], [], [client, r], 0.3) == ([], [], [])
    assert time.monotonic() - started >= 0.3 and time.process_time() - used < 0.2
    os.close(r)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, [], []), TypeError),
        (([object()], [], []), TypeError),
        (([], [], [], "soon"), TypeError),
        (([], [], [], -1), ValueError),
        (([-1], [], []), ValueError),
        (([99999], [], []), ValueError),
        (([CLOSED], [], [], 0), OSError),
    ],
)
@pytest.mark.parametrize("with_ours", [False, True])
def test_select_errors_are_the_standard_ones(
    joined: Pair, arguments: tuple[Any, ...], error: type[Exception], with_ours: bool
) -> None:
    if arguments[0] == [CLOSED]:
        fd = os.dup(0)  # select(2) passes over numbers beyond the table of descriptors
        os.close(fd)
        arguments = ([fd], *arguments[1:])
    if with_ours and isinstance(arguments[0], list):
        arguments = ([joined[0], *arguments[0]], *arguments[1:])
    with pytest.raises(error) as caught:
        select.select(*arguments)
    if error is OSError:
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.EBADF


def test_select_of_a_closed_socket(joined: Pair) -> None:
    joined[0].close()
    with pytest.raises(ValueError, match="negative"):
        select.select([joined[0]], [], [])


def test_select_and_signals(joined: Pair) -> None:
    hits: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    r, w = os.pipe()
    try:
        for files in ([joined[0]], [joined[0], r]):
            started = time.monotonic()
            assert select.select(files, [], [], 0.15) == ([], [], [])  # PEP 475: the whole time
            assert time.monotonic() - started >= 0.15
        assert len(hits) > 4
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            select.select([joined[0]], [], [], 5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(r)
        os.close(w)


# -- poll ----------------------------------------------------------------------------------------


def test_poll(joined: Pair) -> None:
    client, server = joined
    r, w = os.pipe()
    poller = select.poll()
    poller.register(client, IN)
    number = client.fileno()
    assert poller.poll(0) == [] == poller.poll(10)
    poller.modify(number, IN | OUT)
    assert poller.poll() == [(number, OUT)]
    poller.register(r, IN)
    os.write(w, b"x")
    server.send(b"x")
    until(lambda: sorted(poller.poll()) == sorted([(r, IN), (number, IN | OUT)]))
    client.recv(1)
    os.read(r, 1)
    poller.modify(client, IN | RDHUP)
    for act, want in ((lambda: os.write(w, b"x"), (r, IN)), (lambda: server.close(), (number, IN | RDHUP))):
        timer = threading.Timer(0.05, act)
        timer.start()
        assert poller.poll(10_000) == [want]
        timer.join()
        if want[0] == r:
            os.read(r, 1)
    poller.unregister(client)
    with pytest.raises(KeyError):
        poller.unregister(client)
    with pytest.raises(FileNotFoundError):
        poller.modify(client, IN)
    poller.register(client, IN)
    client.close()
    os.close(w)
    assert sorted(poller.poll(0)) == sorted([(number, select.POLLNVAL), (r, HUP)])
    os.close(r)


def test_poll_notices_a_descriptor_that_changed(joined: Pair) -> None:
    """The same number, another file: poll(2) knows only numbers."""
    client, _ = joined
    poller = select.poll()
    poller.register(client, IN)
    r, w = os.pipe()
    poller.register(r, IN)
    assert poller.poll(0) == []
    os.close(r)
    r2, w2 = os.pipe()
    if r2 != r:
        os.dup2(r2, r)
    timer = threading.Timer(0.05, os.write, (w2, b"x"))
    timer.start()
    assert poller.poll(5000) == [(r, IN)]
    for fd in {r, r2, w, w2}:
        os.close(fd)


def test_concurrent_poll_is_refused(joined: Pair) -> None:
    client, server = joined
    poller = select.poll()
    poller.register(client, IN)
    with running(lambda: poller.poll(5000)):
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match="concurrent"):
            poller.poll(0)
        server.send(b"x")


# -- epoll ---------------------------------------------------------------------------------------


def test_epoll_level_edge_oneshot(joined: Pair) -> None:
    client, server = joined
    number = client.fileno()
    with select.epoll() as poller:
        poller.register(client, IN | OUT)
        assert poller.poll() == [(number, OUT)] == poller.poll(0)
        with pytest.raises(FileExistsError):
            poller.register(number, IN)
        poller.modify(client, IN | select.EPOLLET)
        assert poller.poll(0) == []
        server.send(b"x")
        assert poller.poll(5) == [(number, IN)] and poller.poll(0) == []
        client.recv(1)
        server.send(b"y")
        assert poller.poll(5) == [(number, IN)] and poller.poll(0.01) == []
        poller.modify(client, IN | select.EPOLLONESHOT)
        assert poller.poll(5) == [(number, IN)] and poller.poll(0) == []
        poller.modify(number, IN | select.EPOLLONESHOT)
        assert poller.poll(5) == [(number, IN)] and poller.poll(0) == []
        poller.modify(number, IN)
        assert poller.poll(5) == [(number, IN)] == poller.poll(0)
        poller.unregister(number)
        with pytest.raises(FileNotFoundError):
            poller.unregister(client)
        poller.register(client, IN)
        client.close()
        assert poller.poll(0) == []
        with pytest.raises(OSError) as caught:
            poller.unregister(number)
        assert caught.value.errno == errno.EBADF
    with pytest.raises(ValueError, match="closed epoll"):
        poller.poll(0)


def test_nested_epolls(joined: Pair) -> None:
    client, server = joined
    r, w = os.pipe()
    with select.epoll() as inner, select.epoll() as outer, kernel.epoll() as outermost:
        inner.register(client, IN)
        inner.register(r, IN)
        outer.register(inner, IN)
        outermost.register(outer.fileno(), IN)
        outermost.register(client.fileno(), IN | kernel.EPOLLET)
        assert outermost.poll(0) == []
        for act, number in ((lambda: server.send(b"x"), client.fileno()), (lambda: os.write(w, b"x"), r)):
            act()
            assert outer.poll(5) == [(inner.fileno(), IN)]
            assert (outer.fileno(), IN) in outermost.poll(5)
            assert inner.poll(5) == [(number, IN)]
            client.recv(1) if number != r else os.read(r, 1)
            assert inner.poll(0) == [] == outer.poll(0)
    os.close(r)
    os.close(w)


# -- no wake-up is lost --------------------------------------------------------------------------


class Targets:
    """Things that become readable: datagram sockets of ours on two engines, and pipes. One datagram or byte each."""

    def __init__(self, mixed: bool, engines: int) -> None:
        self.hosts = pair()
        self.sender = [socket.socket(type=socket.SOCK_DGRAM, host=host) for host in self.hosts]
        for sender in self.sender:
            sender.bind(("", 0))
        self.files: list[Any] = []
        self.raise_: list[Callable[[], object]] = []
        self.take: dict[Any, Callable[[], object]] = {}
        self.pipes = [os.pipe() for _ in range(2 if mixed else 0)]
        for i in range(6):
            sock = socket.socket(type=socket.SOCK_DGRAM, host=self.hosts[i % engines])
            sock.bind(("", 5000 + i))
            sender, address = self.sender[1 - i % engines], ((A, B)[i % engines], 5000 + i)
            send = functools.partial(sender.sendto, b"x", address)
            self.add(sock, send, functools.partial(sock.recv, 1))
        for r, w in self.pipes:
            self.add(r, functools.partial(os.write, w, b"x"), functools.partial(os.read, r, 1))

    def add(self, file: Any, raise_: Callable[[], object], take: Callable[[], object]) -> None:
        self.files.append(file)
        self.raise_.append(raise_)
        self.take[file] = take

    def close(self) -> None:
        for file in self.files:
            if isinstance(file, socket.socket):
                file.close()
        for ends in self.pipes:
            for end in ends:
                os.close(end)
        for sender in self.sender:
            sender.close()
        for host in self.hosts:
            host.shutdown(0.1)


Wait = Callable[[], list[Any]]


def by_select(files: list[Any]) -> Wait:
    return lambda: select.select(files, [], [], 10)[0]


def by_number(files: list[Any], poll: Callable[[], list[tuple[int, int]]]) -> Wait:
    names = {f if isinstance(f, int) else f.session.number(): f for f in files}
    return lambda: [names[number] for number, _ in poll()]


def by_poll(files: list[Any]) -> Wait:
    poller = select.poll()
    for file in files:
        poller.register(file, IN)
    return by_number(files, lambda: poller.poll(10_000))


def by_epoll(files: list[Any]) -> Wait:
    poller = select.epoll()
    for file in files:
        poller.register(file, IN)
    return by_number(files, lambda: poller.poll(10))


def by_edge(files: list[Any]) -> Wait:
    poller = select.epoll()
    for file in files:
        poller.register(file, IN | select.EPOLLET)
    return by_number(files, lambda: poller.poll(10))


def by_kernel_epoll(files: list[Any]) -> Wait:
    poller = kernel.epoll()
    for file in files:
        poller.register(file, IN)
    return by_number(files, lambda: poller.poll(10))


def by_pollset(files: list[Any]) -> Wait:
    events = PollSet()
    for file in files:
        events.register(file if isinstance(file, int) else file.session, IN, file)
    return lambda: [file for file, _ in events.wait(10_000_000_000)]


def by_selector(files: list[Any]) -> Wait:
    selector = UlnetSelector(relaxed=True)
    for file in files:
        selector.register(file, EVENT_READ)
    return lambda: [key.fileobj for key, _ in selector.select(10)]


@pytest.mark.parametrize("way", [by_select, by_poll, by_epoll, by_edge, by_kernel_epoll, by_pollset, by_selector])
@pytest.mark.parametrize(("mixed", "engines"), [(False, 1), (True, 1), (True, 2)])
def test_no_wake_up_is_lost(way: Callable[[list[Any]], Wait], mixed: bool, engines: int) -> None:
    """Two threads make things ready in random order, one thing at a time each; a third drives the engine now and then.

    A wake-up that gets lost stops its thread, and in the end everything: a wait of 10 s without a result."""
    targets = Targets(mixed, engines)
    wait = way(targets.files)
    rounds = 500
    half = len(targets.files) // 2
    taken = {file: threading.Semaphore(0) for file in targets.files}
    stop = threading.Event()

    def produce(indices: range, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rounds):
            i = rng.choice(indices)
            spin = time.perf_counter() + rng.choice((0, 0, 20e-6, 60e-6, 200e-6))
            while time.perf_counter() < spin:
                pass
            targets.raise_[i]()
            assert taken[targets.files[i]].acquire(timeout=10), f"{targets.files[i]} was not told ready"

    def disturb() -> None:
        with socket.socket(type=socket.SOCK_DGRAM, host=targets.hosts[0]) as sock:
            sock.bind(("", 4999))
            sock.settimeout(0.003)
            while not stop.is_set():
                try:
                    sock.recv(1)
                except TimeoutError:
                    time.sleep(0.002)

    with running(disturb):
        try:
            with running(lambda: produce(range(half), 1)), running(lambda: produce(range(half, len(taken)), 2)):
                done = 0
                while done < 2 * rounds:
                    ready = wait()
                    assert ready, f"nothing within 10 s after {done} rounds"
                    for file in ready:
                        targets.take[file]()
                        taken[file].release()
                        done += 1
        finally:
            stop.set()
    targets.close()


# -- many ----------------------------------------------------------------------------------------


@pytest.fixture
def descriptors() -> Iterator[int]:
    """How many this process may have; as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(hard, 21_000)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        most = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, min(hard, most)))


@pytest.mark.parametrize("epoll", [select.epoll, kernel.epoll])
def test_ten_thousand_sockets_in_one_epoll_cost_what_ten_do(
    hosts: tuple[Embedded, Embedded], epoll: Callable[[], Any], descriptors: int
) -> None:
    """Ours by their engine: one descriptor each, as a name. The kernel's by the descriptors they steer: two each."""
    many = min(10_000, (descriptors - 500) // (1 if epoll is select.epoll else 2))
    if many < 1000:
        pytest.skip(f"needs thousands of descriptors, the limit is {descriptors}")
    socks: list[socket.socket] = []
    costs = {}
    for count in (10, many):
        while len(socks) < count:
            sock = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
            sock.bind(("", 0))
            socks.append(sock)
        address = (A, socks[5].getsockname()[1])
        with epoll() as poller:
            for sock in socks:
                poller.register(sock, IN)
            best = 1e9
            for _ in range(500):
                socks[5].sendto(b"x", address)
                assert len(poller.poll(5)) == 1  # a thread may have to be woken for it
                started = time.perf_counter()
                assert len(poller.poll(5)) == 1
                best = min(best, time.perf_counter() - started)
                socks[5].recv(1)
            costs[count] = best
    for sock in socks:
        sock.close()
    assert costs[many] < 5 * costs[10], costs


# -- the network server is not asked -------------------------------------------------------------


@pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))
def test_the_server_gets_no_message(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All sessions here, and mixed with ordinary descriptors: waiting costs the server nothing, ready or not."""
    bed = Bed(tmp_path_factory.mktemp("select"))
    try:
        proxy = bed.proxy()
        service = bed.b.socket()
        service.bind((PEER, 0))
        service.listen()
        ours = socket.create_connection(service.getsockname(), 5, host=proxy)
        theirs, _ = service.accept()
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        r, w = os.pipe()

        def messages() -> int:
            """Calls the server has served, but those that ask it for this."""
            calls = bed.counters()["calls"]
            return sum(n for name, n in calls.items() if name.upper() != "COUNTERS")

        before = messages()
        for files in ([ours], [ours, r]):
            for way in (by_select, by_poll, by_epoll, by_edge, by_pollset, by_selector):
                wait = way(files)
                for _ in range(20):
                    theirs.send(b"x")
                    assert wait() == [ours]
                    assert ours.recv(1) == b"x"
                timer = threading.Timer(0.02, theirs.send, (b"x",))
                timer.start()
                assert wait() == [ours]
                ours.recv(1)
            assert select.select(files, [], [], 0.02) == ([], [], [])
        assert messages() - before == 0
        ours.close()
        theirs.close()
        service.close()
        os.close(r)
        os.close(w)
    finally:
        bed.close()
