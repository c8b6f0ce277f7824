"""Waiting for many sessions at once, inside the engine: what a PollSet tells, what it costs, who may share it."""

import errno
import os
import select as kernel
import signal
import socket as kernel_socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sockethosts import A, B, listening, running

from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.pollset import PollSet, session_moved
from ulnet.stack.session import Session, session_of

pytest_plugins = ["socketfixtures"]

IN, OUT, ERR, HUP, RDHUP = kernel.EPOLLIN, kernel.EPOLLOUT, kernel.EPOLLERR, kernel.EPOLLHUP, kernel.EPOLLRDHUP
ALL = IN | OUT | RDHUP
SECOND = 1_000_000_000
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def events() -> Iterator[PollSet]:
    with PollSet() as events:
        yield events


def of(sock: socket.socket) -> Session:
    assert sock.session is not None
    return sock.session


def until(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.001)


# -- what it tells -----------------------------------------------------------------------------


def test_readable_writable_both_and_neither(joined: Pair, events: PollSet) -> None:
    client, server = joined
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.setblocking(False)
    events.register(of(client), IN | OUT, "c")
    assert events.wait() == [("c", OUT)] == events.wait(0)  # level-triggered: again and again
    server.send(b"x")
    until(lambda: events.wait(0) == [("c", IN | OUT)])

    def full() -> bool:
        with pytest.raises(BlockingIOError):
            while True:
                client.send(b"y" * 4096)
        time.sleep(0.02)  # acknowledgements may still make room
        return events.wait(0) == [("c", IN)]

    until(full)
    assert events.wait() == [("c", IN)]
    assert client.recv(10) == b"x"
    assert events.wait(0) == []
    received = 0
    while not events.wait(0):
        received += len(server.recv(65536))
    assert events.wait(0) == [("c", OUT)] and received


def test_only_what_was_asked_for(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), IN, 1)
    assert events.wait(0) == []
    events.modify(of(client), OUT, 2)
    assert events.wait(0) == [(2, OUT)]
    events.modify(of(client), OUT, 3)  # only the data
    assert events.wait(0) == [(3, OUT)]
    events.modify(of(client), 0, 4)
    assert events.wait(0) == []
    server.close()
    client.close()


def test_end_of_file_hang_up_and_reset_as_the_descriptor_shows_them(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), ALL)

    def both() -> int:
        """What the set says; the descriptor must say the same."""
        poller = kernel.poll()
        poller.register(client.fileno(), ALL)
        got = dict(events.wait(0)).get(None, 0)
        assert got == dict(poller.poll(0)).get(client.fileno(), 0)
        return got

    assert both() == OUT
    server.shutdown(socket.SHUT_WR)
    until(lambda: both() == IN | OUT | RDHUP)
    client.shutdown(socket.SHUT_WR)
    until(lambda: both() == IN | OUT | RDHUP | HUP)


def test_reset(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), 0, "asked for nothing")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    assert events.wait(5 * SECOND) == [("asked for nothing", ERR | HUP)]
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    assert events.wait(0) == [("asked for nothing", HUP)]


def test_connecting_and_refused(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    with socket.socket(host=hosts[0]) as sock:
        events.register(of(sock), IN | OUT)
        sock.setblocking(False)
        assert sock.connect_ex((B, 9)) == errno.EINPROGRESS
        assert events.wait(5 * SECOND)[0][1] & (OUT | ERR | HUP) == OUT | ERR | HUP
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        with listening(hosts[1], 9):
            sock.connect_ex((B, 9))
            until(lambda: events.wait(SECOND) == [(None, OUT)])  # still in the set


def test_listener_and_datagrams(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    with listening(hosts[1]) as listener, socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) as udp:
        udp.bind(("", 4000))
        events.register(of(listener), IN, listener)
        events.register(of(udp), IN, udp)
        assert events.wait(0) == []
        with socket.create_connection(listener.getsockname(), 5, host=hosts[0]):
            assert events.wait(5 * SECOND) == [(listener, IN)]
            listener.accept()[0].close()
            assert events.wait(0) == []
        with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as sender:
            sender.sendto(b"1", (B, 4000))
            assert events.wait(5 * SECOND) == [(udp, IN)]


def test_all_that_are_ready_and_fair_to_each(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    socks = [socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) for _ in range(300)]
    for i, sock in enumerate(socks):
        sock.bind(("", 0))
        events.register(of(sock), OUT, i)
    assert sorted(events.wait(0)) == [(i, OUT) for i in range(300)]
    seen = [events.wait(0, 7) for _ in range(43)]
    assert all(len(some) == 7 for some in seen)
    assert len({i for some in seen for i, _ in some}) == 300  # each had its turn
    for sock in socks:
        sock.close()
    assert events.wait(0) == [] and len(events) == 0


def test_time_out(joined: Pair, events: PollSet) -> None:
    events.register(of(joined[0]), IN)
    started = time.monotonic()
    assert events.wait(SECOND // 20) == []
    assert 0.05 <= time.monotonic() - started < 2


def test_errors(joined: Pair, events: PollSet) -> None:
    client, _ = joined
    session = of(client)
    events.register(session, IN)
    with pytest.raises(FileExistsError):
        events.register(session, IN)
    events.unregister(session)
    for call in (lambda: events.unregister(session), lambda: events.modify(session, IN)):
        with pytest.raises(FileNotFoundError):
            call()
    client.close()
    with pytest.raises(OSError) as caught:
        events.register(session, IN)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        events.register(99999, IN)
    assert caught.value.errno == errno.EBADF
    events.close()
    events.close()
    with pytest.raises(ValueError, match="closed"):
        events.wait(0)


def test_closed_sessions_disappear(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), IN | OUT, "c")
    events.register(of(server), IN, "s")
    assert len(events) == 2
    client.close()
    assert len(events) == 1
    assert events.wait(5 * SECOND) == [("s", IN)]
    server.close()
    assert len(events) == 0 and events.wait(0) == []


def test_a_session_nobody_holds_ends_in_spite_of_its_sets(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    before = hosts[0].engine.counters()["sessions"]
    session = hosts[0].socket(socket.IPPROTO_UDP)
    events.register(session, IN)
    del session
    assert len(events) == 0
    events.close()
    hosts[0].engine.events()  # each holds its session
    assert hosts[0].engine.counters()["sessions"] == before


def test_one_session_in_many_sets(joined: Pair) -> None:
    client, server = joined
    sets = [PollSet() for _ in range(5)]
    for i, events in enumerate(sets):
        events.register(of(client), IN, i)
    server.send(b"x")
    for i, events in enumerate(sets):
        assert events.wait(5 * SECOND) == [(i, IN)]
    sets[2].close()
    client.recv(1)
    assert all(events.wait(0) == [] for events in sets if not events.closed)
    client.close()
    assert all(len(events) == 0 for events in sets if not events.closed)
    for events in sets:
        events.close()


# -- numbers and descriptors -------------------------------------------------------------------


def test_a_number_is_only_a_name(joined: Pair) -> None:
    client, server = joined
    session = of(client)
    before = len(os.listdir("/proc/self/fd"))
    number = session.number()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert session_of(number) is session and session.number() == number
    poller = kernel.poll()
    poller.register(number, IN)
    server.send(b"x")
    session.wait(1, SECOND)
    assert poller.poll(0) == []  # nobody steers it ...
    assert client.fileno() == number
    assert poller.poll(0) == [(number, IN)]  # ... until it is asked for
    client.recv(1)
    assert poller.poll(0) == []
    client.close()
    assert session.number() == -1 and session_of(number) is None


def test_ordinary_descriptors(joined: Pair, events: PollSet) -> None:
    client, server = joined
    r, w = os.pipe()
    left, right = kernel_socket.socketpair()
    events.register(of(client), IN, "ours")
    events.register(r, IN, "pipe")
    events.register(left.fileno(), IN | RDHUP, "pair")
    assert events.wait(0) == [] == events.wait(SECOND // 50)
    os.write(w, b"x")
    assert events.wait() == [("pipe", IN)] == events.wait(0)
    server.send(b"x")
    until(lambda: sorted(events.wait(0)) == [("ours", IN), ("pipe", IN)])
    os.read(r, 1)
    client.recv(1)
    right.close()
    assert events.wait() == [("pair", IN | RDHUP | HUP)]
    events.unregister(left.fileno())
    os.close(w)
    assert events.wait() == [("pipe", HUP)]
    os.close(r)
    left.close()
    assert events.wait(0) == []


def test_a_busy_engine_does_not_starve_descriptors(joined: Pair, events: PollSet) -> None:
    client, _ = joined
    r, w = os.pipe()
    events.register(of(client), OUT, "ours")
    events.register(r, IN, "pipe")
    events.wait()
    looks, rounds = events.side_looks, 0
    started = time.monotonic()
    while time.monotonic() - started < 0.2:
        assert events.wait() == [("ours", OUT)]
        rounds += 1
    elapsed = time.monotonic() - started
    assert rounds > 100
    assert events.side_looks - looks <= elapsed / 100e-6 + 2  # bounded however often it waits
    os.write(w, b"x")
    deadline = time.monotonic() + 5
    while ("pipe", IN) not in events.wait():
        assert time.monotonic() < deadline
    os.close(r)
    os.close(w)


def test_no_system_calls_while_data_is_there(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as sock:
        sock.bind(("", 4001))
        descriptors = len(os.listdir("/proc/self/fd"))
        events.register(of(sock), IN)
        events.wait(0)  # the helper is sent to nap
        before = hosts[0].engine.counters()
        for i in range(200):
            sock.sendto(b"%d" % i, (A, 4001))
            assert events.wait() == [(None, IN)]
            assert sock.recv(10) == b"%d" % i
        after = hosts[0].engine.counters()
        assert events.side_looks == 0 and len(os.listdir("/proc/self/fd")) == descriptors
        assert after["kicks"] - before["kicks"] <= 5  # a pause of this test lets the helper in
        assert after["polls"] - before["polls"] <= 5


def test_edge_triggered_and_one_shot(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), IN | kernel.EPOLLET)
    server.send(b"x")
    assert events.wait(5 * SECOND) == [(None, IN)]
    assert events.wait(0) == []
    server.send(b"y")
    client.recv(2)
    until(lambda: client.session is not None and client.session.stat()["bytes_in"] == 2)
    events.modify(of(client), IN | kernel.EPOLLONESHOT)
    server.send(b"z")
    assert events.wait(5 * SECOND) == [(None, IN)]
    assert events.wait(0) == []
    events.modify(of(client), IN, "level")
    assert events.wait(5 * SECOND) == [("level", IN)] == events.wait(0)
    events.unregister(of(client))
    assert len(events) == 0


def test_nested_in_a_kernel_epoll(joined: Pair, events: PollSet) -> None:
    client, server = joined
    r, w = os.pipe()
    with kernel.epoll() as outer:
        outer.register(events.fileno(), IN)
        assert outer.poll(0) == []
        events.register(of(client), IN, "ours")
        events.register(r, IN, "pipe")
        events.fileno()
        server.send(b"x")
        assert outer.poll(5) == [(events.fileno(), IN)]
        assert events.wait(0) == [("ours", IN)]
        client.recv(1)
        assert outer.poll(0) == [] == events.wait(0)
        os.write(w, b"x")
        assert outer.poll(5) == [(events.fileno(), IN)]
        assert events.wait(0) == [("pipe", IN)]
    os.close(r)
    os.close(w)


# -- several engines ---------------------------------------------------------------------------


def test_sessions_of_several_engines(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), IN, "a")
    events.register(of(server), IN, "b")
    for _ in range(50):
        client.send(b"x")
        assert events.wait(5 * SECOND) == [("b", IN)]
        server.recv(1)
        server.send(b"x")
        assert events.wait(5 * SECOND) == [("a", IN)]
        client.recv(1)
        assert events.wait(0) == []
    client.send(b"x")
    server.send(b"x")
    until(lambda: sorted(events.wait()) == [("a", IN), ("b", IN)])


def test_an_engine_ends_and_the_others_go_on(events: PollSet) -> None:
    old, new = embedded.pair(), embedded.pair()
    socks = []
    for host in (old[0], new[0], new[1]):
        sock = socket.socket(type=socket.SOCK_DGRAM, host=host)
        sock.bind(("", 4002))
        events.register(of(sock), IN, sock)
        socks.append(sock)

    def replace() -> None:
        time.sleep(0.05)
        for host in old:
            host.shutdown(0)
        socks[2].sendto(b"x", (A, 4002))

    with running(replace):
        assert events.wait(5 * SECOND) == [(socks[1], IN)]
    socks[1].recv(1)
    assert events.wait(SECOND // 50) == []
    with socket.socket(type=socket.SOCK_DGRAM, host=new[0]) as sock:
        sock.bind(("", 4003))
        events.register(of(sock), IN, "driven now")
        socks[2].sendto(b"x", (A, 4003))
        assert events.wait(5 * SECOND) == [("driven now", IN)]
    for sock in socks:
        sock.close()
    for host in new:
        host.shutdown(0)


# -- sessions that move to the server and back -------------------------------------------------


def end_reading(number: int) -> None:
    """Make a descriptor of a socket pair readable, as what the server sends would."""
    with kernel_socket.socket(fileno=os.dup(number)) as copy:
        copy.shutdown(socket.SHUT_RD)


def test_a_session_moves_out_and_back(hosts: tuple[Embedded, Embedded], events: PollSet) -> None:
    sock = socket.socket(host=hosts[0])
    events.register(of(sock), IN | OUT, "s")
    assert events.wait(0) == [("s", OUT)]
    assert session_moved(of(sock), True)
    assert events.wait(0) == [("s", OUT)]  # now the kernel says so
    end_reading(of(sock).number())
    assert events.wait(0) == [("s", IN | OUT)]
    events.modify(of(sock), IN, "t")
    assert events.wait(0) == [("t", IN)]
    assert session_moved(of(sock), False)
    assert events.wait(0) == []
    events.modify(of(sock), OUT, "u")
    assert events.wait(0) == [("u", OUT)]
    assert session_moved(of(sock), True)
    with PollSet() as late:
        late.register(of(sock), IN, "late")
        assert late.wait(0) == [("late", IN)]
    events.unregister(of(sock))
    assert events.wait(0) == []
    events.register(of(sock), IN, "v")
    sock.close()
    assert len(events) == 0 and events.wait(0) == []


@pytest.mark.parametrize("follower", [False, True])
def test_who_waits_follows_a_session_that_moves(
    hosts: tuple[Embedded, Embedded], events: PollSet, follower: bool
) -> None:
    """The waiter knew no descriptors when it went to sleep. No timer of a connection is there to wake it."""
    sock = socket.socket(host=hosts[0])
    udp = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
    udp.bind(("", 4005))
    events.register(of(sock), IN, "moved")
    thread = threading.Thread(target=udp.recv, args=(1,))
    if follower:
        thread.start()  # it drives
        time.sleep(0.05)

    def move() -> None:
        time.sleep(0.05)
        assert session_moved(of(sock), True)
        time.sleep(0.05)
        end_reading(of(sock).number())

    with running(move):
        started = time.monotonic()
        assert events.wait(8 * SECOND) == [("moved", IN)]
        assert time.monotonic() - started < 5
    if follower:
        udp.sendto(b"x", (A, 4005))
        thread.join(5)
        assert not thread.is_alive()
    sock.close()
    udp.close()


# -- threads and signals -----------------------------------------------------------------------


def test_beside_a_thread_that_drives(joined: Pair, events: PollSet) -> None:
    """The set's waiter follows; both its sides wake it at once, not at the next look around."""
    client, server = joined
    r, w = os.pipe()
    with socket.socket(type=socket.SOCK_DGRAM, host=client.host) as udp:
        udp.bind(("", 4004))
        events.register(of(udp), IN, "udp")
        events.register(r, IN, "pipe")
        thread = threading.Thread(target=client.recv, args=(1,))
        thread.start()
        time.sleep(0.05)
        late = 0.0
        for _ in range(10):
            for act, what in ((lambda: os.write(w, b"x"), "pipe"), (lambda: udp.sendto(b"x", (A, 4004)), "udp")):
                timer = threading.Timer(0.01, act)
                timer.start()
                started = time.monotonic()
                assert events.wait(5 * SECOND) == [(what, IN)]
                late += time.monotonic() - started
                timer.join()
                if what == "pipe":
                    os.read(r, 1)
                else:
                    udp.recv(1)
        assert late < 2  # 20 naps of a fifth of a second would be 4
        server.send(b"x")
        thread.join(5)
        assert not thread.is_alive()
        timer = threading.Timer(0.05, os.write, (w, b"x"))  # the driver has left: this one drives now
        timer.start()
        assert events.wait(5 * SECOND) == [("pipe", IN)]
    os.close(r)
    os.close(w)


def test_two_threads_wait_for_one_set(joined: Pair, events: PollSet) -> None:
    client, server = joined
    r, w = os.pipe()
    events.register(of(client), IN, "ours")
    events.register(r, IN, "pipe")
    got: list[object] = []

    def wait() -> None:
        got.append(events.wait(10 * SECOND))

    for act, what in ((lambda: server.send(b"x"), "ours"), (lambda: os.write(w, b"x"), "pipe")):
        with running(wait), running(wait):
            time.sleep(0.05)
            act()
        assert [(what, IN)] in got
        assert len(got) == 2
        got.clear()
        if what == "ours":
            client.recv(1)
    os.close(r)
    os.close(w)


def test_close_ends_a_wait(joined: Pair) -> None:
    events = PollSet()
    events.register(of(joined[0]), IN)

    def wait() -> None:
        with pytest.raises(ValueError, match="closed"):
            events.wait()

    with running(wait):
        time.sleep(0.05)
        events.close()


def test_registering_wakes_who_waits(joined: Pair, events: PollSet) -> None:
    client, server = joined
    events.register(of(client), IN, "in")
    with running(lambda: (time.sleep(0.05), events.modify(of(client), OUT, "out"))):
        assert events.wait(5 * SECOND) == [("out", OUT)]
    events.modify(of(client), IN, "in")
    with running(lambda: (time.sleep(0.05), server.send(b"x"))):
        assert events.wait(5 * SECOND) == [("in", IN)]


@pytest.mark.parametrize("beside", [False, True])
def test_signals(joined: Pair, events: PollSet, beside: bool) -> None:
    client, server = joined
    r, w = os.pipe()
    events.register(of(client), IN, "s")
    if beside:
        events.register(r, IN, "pipe")
    hits: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with running(lambda: (time.sleep(0.2), server.send(b"late"))):
            assert events.wait(5 * SECOND) == [("s", IN)]
        assert len(hits) > 3
        client.recv(10)

        def raise_it(*_: object) -> None:
            raise InterruptedError("the handler's own")

        signal.signal(signal.SIGALRM, raise_it)
        with pytest.raises(InterruptedError, match="own"):
            events.wait(5 * SECOND)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.close(r)
    os.close(w)


# -- what it costs -----------------------------------------------------------------------------


def cost_us(events: PollSet, sock: socket.socket, address: tuple[str, int]) -> float:
    """The least time of a wait that finds one ready session."""
    best = 1e9
    for _ in range(300):
        sock.sendto(b"x", address)
        started = time.perf_counter()
        ready = events.wait(5 * SECOND)
        best = min(best, time.perf_counter() - started)
        assert len(ready) == 1
        sock.recv(1)
    return best * 1e6


def test_ten_thousand_sessions_cost_what_ten_do(hosts: tuple[Embedded, Embedded]) -> None:
    socks = []
    costs = {}
    for count in (10, 10_000):
        while len(socks) < count:
            sock = socket.socket(type=socket.SOCK_DGRAM, host=hosts[0])
            sock.bind(("", 0))
            socks.append(sock)
        with PollSet() as events:
            for sock in socks:
                events.register(of(sock), IN, sock)
            costs[count] = min(cost_us(events, socks[5], (A, socks[5].getsockname()[1])) for _ in range(3))
            assert events.side_looks == 0
    for sock in socks:
        sock.close()
    assert costs[10_000] < 5 * costs[10], costs
