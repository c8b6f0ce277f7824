"""Sessions placed in the server: the same handle and descriptor, used by kernel calls on the pair, and back again."""

import errno
import hashlib
import os
import random
import select
import signal
import socket as standard
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import pytest
from placed import Placed, Relay
from sockethosts import listening, running

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.engine import READABLE, WRITABLE
from ulnet.stack.session import Session

pytest_plugins = ["socketfixtures"]
Joined = tuple[socket.socket, socket.socket]
IN, OUT = select.POLLIN, select.POLLOUT


def session_of(sock: socket.socket) -> Session:
    assert sock.session is not None
    return sock.session


def settled(sock: socket.socket, unread: int) -> None:
    """Until so much has arrived."""
    deadline = time.monotonic() + 5
    while session_of(sock).stat()["unread_bytes"] < unread and time.monotonic() < deadline:
        session_of(sock).engine.poll()
        time.sleep(0.001)


# -- there and back ----------------------------------------------------------------------------


def test_number_names_and_data_stay(joined: Joined) -> None:
    client, server = joined
    number, session = server.fileno(), session_of(server)
    client.sendall(b"unread")
    settled(server, 6)
    with Placed(session) as placed:
        assert session.shared and session.live and session.state == "ESTABLISHED"
        assert placed.user_fd == number == server.fileno()
        assert server.getsockname() == client.getpeername() and server.getpeername() == client.getsockname()
        placed.end.sendall(b"by the server")
        assert server.recv(100) == b"by the server"
        server.sendall(b"to the server")
        assert placed.end.recv(100) == b"to the server"
        assert placed.back() == 0
    assert not session.shared and server.fileno() == number
    assert server.recv(100) == b"unread"
    client.sendall(b"more")
    assert server.recv(100) == b"more"
    server.sendall(b"back")
    assert client.recv(100) == b"back"


def test_a_pair_is_made_where_nobody_asked_for_a_descriptor(joined: Joined) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Placed(session_of(joined[1])) as placed:
        assert len(os.listdir("/proc/self/fd")) == before + 2
        placed.back()
    joined[0].sendall(b"x")
    assert select.select([joined[1]], [], [], 5)[0]


def test_what_the_pair_holds_goes_in_front(joined: Joined) -> None:
    client, server = joined
    client.sendall(b"second ")
    settled(server, 7)
    with Placed(session_of(server)) as placed:
        placed.end.sendall(b"first " + bytes(100_000))
        assert server.recv(6) == b"first "
        assert placed.back() == 100_000
    client.sendall(b"third")
    assert server.recv(100_012, socket.MSG_WAITALL) == bytes(100_000) + b"second third"


def test_unsent_and_unread_megabytes_survive(joined: Joined) -> None:
    client, server = joined
    client.setblocking(False)
    server.setblocking(False)
    sent = received = 0
    for _ in range(40):  # both directions fill up
        for sock in joined:
            try:
                got = sock.send(bytes(1 << 20))
            except BlockingIOError:
                got = 0
            sent, received = (sent + got, received) if sock is client else (sent, received + got)
    with Placed(session_of(server)) as placed:
        assert placed.state is not None and len(placed.state) > 1 << 20
        placed.back()
    client.settimeout(10)
    server.settimeout(10)
    with running(lambda: [client.recv(1 << 16) for _ in range(received >> 16)]):
        got = 0
        while got < sent:
            got += len(server.recv(1 << 20))
    assert got == sent


def test_registrations_survive_both_ways(joined: Joined) -> None:
    client, server = joined
    number = server.fileno()
    level, edge, inner, outer = (select.epoll() for _ in range(4))
    level.register(number, IN)
    edge.register(number, IN | select.EPOLLET)
    inner.register(number, IN)
    outer.register(inner.fileno(), IN)

    def expect(ready: bool, first: bool = True) -> None:
        want = [(number, IN)] if ready else []
        assert level.poll(2 if ready else 0) == want
        assert edge.poll(0) == (want if first else [])
        assert inner.poll(0) == want
        assert bool(outer.poll(0)) == ready

    try:
        expect(False)
        for _ in range(3):
            with Placed(session_of(server)) as placed:
                expect(False)
                placed.end.sendall(b"real")
                expect(True)
                expect(True, first=False)
                assert server.recv(10) == b"real"
                expect(False)
                placed.back()
            expect(False)
            client.sendall(b"steered")
            expect(True)
            expect(True, first=False)
            assert server.recv(10) == b"steered"
            expect(False)
    finally:
        for epoll in (level, edge, inner, outer):
            epoll.close()


def test_writable_is_true_in_each_placement(joined: Joined) -> None:
    client, server = joined
    server.setblocking(False)
    poller = select.poll()
    poller.register(server, OUT)
    while poller.poll(200):  # until both ends of the session are full
        with pytest.raises(BlockingIOError):
            while True:
                server.send(bytes(1 << 16))
    with Placed(session_of(server)) as placed:
        assert poller.poll(0)  # the pair is not
        with pytest.raises(BlockingIOError):
            while True:
                server.send(bytes(1 << 16))
        assert not poller.poll(0)
        placed.end.setblocking(False)
        with pytest.raises(BlockingIOError):
            while placed.end.recv(1 << 16):
                pass
        assert poller.poll(0)
        placed.back()
    assert not poller.poll(0)  # it is as full as it was


def test_half_closed_by_us(joined: Joined) -> None:
    client, server = joined
    server.fileno()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    with Placed(session_of(server)) as placed:
        assert placed.end.recv(1) == b""  # the manager learns it from the pair
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        placed.end.sendall(b"still this way")
        assert server.recv(100) == b"still this way"
        placed.back()
    with pytest.raises(BrokenPipeError):
        server.send(b"x")
    client.sendall(b"and that")
    assert server.recv(100) == b"and that"
    client.close()
    assert server.recv(1) == b""
    poller = select.poll()
    poller.register(server, IN)
    assert poller.poll(2000)[0][1] & select.POLLHUP


@pytest.mark.parametrize("unread", [b"", b"unread"])
def test_half_closed_by_the_peer(joined: Joined, unread: bytes) -> None:
    client, server = joined
    number = server.fileno()
    client.sendall(unread)
    client.shutdown(socket.SHUT_WR)
    poller = select.poll()
    poller.register(number, select.POLLRDHUP)
    assert poller.poll(2000)
    with Placed(session_of(server)) as placed:
        assert placed.user_fd == number
        if unread:
            assert not poller.poll(0)  # a new pair: this one can carry what is to come
            placed.end.sendall(unread)
        placed.end.shutdown(socket.SHUT_WR)
        assert server.recv(100) == unread
        if unread:
            assert server.recv(100) == b""
        server.sendall(b"answer")
        assert placed.end.recv(100) == b"answer"
        assert session_of(server).state == "CLOSE-WAIT"
        placed.back()
    assert poller.poll(0)[0][1] == select.POLLRDHUP
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"


def test_shutdown_on_the_pair(joined: Joined) -> None:
    with Placed(session_of(joined[1])) as placed:
        server = joined[1]
        server.sendall(b"last")
        server.shutdown(socket.SHUT_WR)
        assert placed.end.recv(100) == b"last" and placed.end.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        placed.end.sendall(b"unread")
        server.shutdown(socket.SHUT_RD)
        assert server.recv(100) == b"unread" and server.recv(100) == b""
        placed.back()


def test_reset_while_we_had_it(joined: Joined) -> None:
    client, server = joined
    server.fileno()
    session = session_of(server)
    session.engine.fail(session, errno.ECONNRESET)
    with Placed(session) as placed:
        assert placed.state is not None
        placed.end.shutdown(socket.SHUT_RDWR)
        with running(lambda: None):
            placed.back()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_what_cannot_be_shared_says_why(joined: Joined, hosts: tuple[Embedded, Embedded]) -> None:
    session = session_of(joined[1])
    with pytest.raises(OSError, match="not shared"):
        session.share_end(-1, b"", 1)
    with Placed(session) as placed:
        with pytest.raises(OSError) as twice:
            session.share_begin()
        assert twice.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="malformed"):
            session.share_end(-1, b"nonsense", 1)
        assert session.shared
        placed.back()
    shell = hosts[0].engine.new_session(6)
    shell.begin_connect()
    with pytest.raises(OSError) as busy:
        shell.share_begin()
    assert busy.value.errno == errno.EALREADY
    joined[1].close()
    with pytest.raises(OSError) as closed:
        session.share_begin()
    assert closed.value.errno == errno.EBADF


# -- calls on the pair -------------------------------------------------------------------------


def test_flags_and_timeouts(joined: Joined) -> None:
    server = joined[1]
    with Placed(session_of(server)) as placed:
        placed.end.sendall(b"abcdef")
        assert server.recv(3, socket.MSG_PEEK) == b"abc"
        assert server.recv(3) == b"abc"
        assert server.recv(10, socket.MSG_DONTWAIT) == b"def"
        with pytest.raises(BlockingIOError):
            server.recv(1, socket.MSG_DONTWAIT)
        server.settimeout(0.05)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            server.recv(1)
        assert 0.04 < time.monotonic() - started < 2
        placed.end.sendall(b"part")
        assert server.recv(10, socket.MSG_WAITALL) == b"part"  # what came before the time-out
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(1)
        server.settimeout(5)
        with running(lambda: [(time.sleep(0.02), placed.end.sendall(b"12")) for _ in range(5)]):
            assert server.recv(10, socket.MSG_WAITALL) == b"12" * 5
        into = bytearray(4)
        placed.end.sendall(b"wxyz")
        assert server.recv_into(into) == 4 and into == b"wxyz"
        assert session_of(server).ready == WRITABLE
        assert session_of(server).wait(READABLE, 0) == 0
        placed.end.sendall(bytes(150_000))
        assert session_of(server).wait(READABLE, 0) == READABLE
        assert len(server.recv(1 << 20)) == 150_000
        placed.back()


def test_buffers_from_the_pair(joined: Joined) -> None:
    server = joined[1]
    with Placed(session_of(server)) as placed:
        placed.end.sendall(b"x" * 70_000 + b"end")
        first = server.recv_buffer(5)
        rest = server.recv_buffer(1 << 20)
        assert bytes(first) == b"xxxxx" and bytes(rest) == b"x" * 69_995 + b"end"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv_buffer(5)
        server.settimeout(5)
        placed.back()
        first.release()
        rest.release()
    with Placed(session_of(server)) as placed:
        placed.end.shutdown(socket.SHUT_WR)
        assert len(server.recv_buffer(5)) == 0
    assert session_of(server).engine.counters()["buf_lent"] == 0


def test_ends_are_explained_by_the_hook(joined: Joined) -> None:
    server = joined[1]
    session = session_of(server)
    asked = []

    def explain(one: Session) -> None:
        asked.append(one)
        if len(asked) == 3:
            raise ConnectionResetError(errno.ECONNRESET, "by the peer")

    session.engine.on_shared_end = explain
    with Placed(session) as placed:
        placed.end.shutdown(socket.SHUT_RDWR)
        assert server.recv(10) == b""
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        with pytest.raises(ConnectionResetError, match="by the peer"):
            server.recv(10)
    assert asked == [session] * 3
    session.engine.on_shared_end = None


def test_the_managers_death_with_unread_data(joined: Joined) -> None:
    server = joined[1]
    placed = Placed(session_of(server))
    server.sendall(b"nobody reads this")
    placed.end.close()
    with pytest.raises(ConnectionResetError):
        server.recv(10)
    assert server.recv(10) == b""


def test_hooks_for_options_and_errors(joined: Joined) -> None:
    server = joined[1]
    engine = session_of(server).engine
    seen: list[tuple[int, int, int | None]] = []

    def option(_: Session, level: int, name: int, value: int | None) -> int:
        seen.append((level, name, value))
        return 77

    engine.on_shared_option = option
    engine.on_shared_error = lambda _: errno.ETIMEDOUT
    with Placed(session_of(server)) as placed:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
        placed.back()
    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in seen
    assert (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, None) in seen
    engine.on_shared_option = engine.on_shared_error = None


CALLS: dict[str, Callable[[socket.socket], object]] = {
    "recv": lambda s: s.recv(10),
    "recv_buffer": lambda s: len(s.recv_buffer(10)),
    "send": lambda s: s.send(b"x"),
    "sendall": lambda s: s.sendall(b"x"),
    "wait": lambda s: session_of(s).wait(READABLE),
    "shutdown": lambda s: s.shutdown(socket.SHUT_WR),
    "error": lambda s: s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
    "option": lambda s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_next_use_may_bring_it_home(joined: Joined, name: str) -> None:
    client, server = joined
    session = session_of(server)
    placed = Placed(session)
    asked = []

    def home(one: Session) -> bool:
        asked.append(one)
        placed.back()
        return True

    session.engine.on_shared = home
    client.sendall(b"0123456789")
    try:
        CALLS[name](server)
    finally:
        session.engine.on_shared = None
    assert asked == [session] and not session.shared


def test_signals_and_interrupts(joined: Joined) -> None:
    server = joined[1]
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with Placed(session_of(server)) as placed:
            with running(lambda: (time.sleep(0.2), placed.end.sendall(b"late"))):
                assert server.recv(10) == b"late"  # PEP 475
            signal.signal(signal.SIGALRM, lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                server.recv(10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits


# -- threads across the transitions ------------------------------------------------------------


@pytest.mark.parametrize("at_home", [True, False])
@pytest.mark.parametrize("call", ["recv", "wait", "waitall", "recv_buffer"])
def test_a_thread_that_receives_goes_on(joined: Joined, call: str, at_home: bool) -> None:
    client, server = joined
    server.settimeout(10)
    got: list[object] = []

    def receive() -> None:
        if call == "wait":
            assert session_of(server).wait(READABLE, 10**10) & READABLE
            got.append(server.recv(2))
        elif call == "recv_buffer":
            got.append(bytes(server.recv_buffer(2)))
        else:
            got.append(server.recv(4 if call == "waitall" else 2, socket.MSG_WAITALL))

    with running(receive):
        time.sleep(0.05)
        placed = Placed(session_of(server))
        time.sleep(0.05)
        if call == "waitall":
            placed.end.sendall(b"ab")
            time.sleep(0.05)
        if at_home:
            placed.back()
            time.sleep(0.05)
            client.sendall(b"cd")
        else:
            placed.end.sendall(b"cd")
    assert got == [b"abcd" if call == "waitall" else b"cd"]
    placed.end.close()


def test_a_thread_that_sends_goes_on(joined: Joined) -> None:
    client, server = joined
    server.settimeout(10)
    client.settimeout(10)
    data = os.urandom(1 << 20) * 12
    with running(lambda: server.sendall(data)):
        time.sleep(0.1)  # it is stuck: nobody reads
        placed = Placed(session_of(server))
        through = bytearray()  # what it goes on with, on the pair
        while len(through) < 1 << 20:
            through += placed.end.recv(1 << 16)
        placed.end.setblocking(False)
        with session_of(server).shared_lock:  # nobody sends between the last read and the promotion
            try:
                while True:
                    through += placed.end.recv(1 << 16)
            except BlockingIOError:
                placed.back()
        got = bytearray()
        while len(got) < len(data) - len(through):
            got += client.recv(1 << 20)
    # The state had a beginning, the pair a middle.
    at = data.find(bytes(through[:4096]), 1)
    cut = [i for i in (got.find(data[at + len(through) : at + len(through) + 4096]),) if i >= 0]
    assert cut and len(got) + len(through) == len(data)


def test_close_wakes_who_waits_on_the_pair(joined: Joined) -> None:
    server = joined[1]
    server.settimeout(None)
    placed = Placed(session_of(server))
    outcome: list[int | None] = []

    def receive() -> None:
        with pytest.raises(OSError) as caught:
            server.recv(1)
        outcome.append(caught.value.errno)

    with running(receive):
        time.sleep(0.05)
        started = time.monotonic()
        server.close()
    assert outcome == [errno.EBADF] and time.monotonic() - started < 2
    assert placed.end.recv(1) == b""  # the last copy is gone: the session ends
    placed.end.close()


# -- listeners and shells ----------------------------------------------------------------------


def test_listener(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        session = session_of(listener)
        client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        assert select.select([listener], [], [], 5)[0]
        with pytest.raises(BlockingIOError):  # what was delivered must be taken out before
            session.share_begin()
        listener.accept()[0].close()
        client.close()
        with Placed(session) as placed:
            assert placed.state is None and session.listening and session.state == "LISTEN"
            assert session.announced() is None and not select.select([listener], [], [], 0)[0]
            placed.end.sendall((5).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little"))
            assert select.select([listener], [], [], 0)[0] and session.ready == READABLE
            assert [session.announced() for _ in range(3)] == [5, 1 << 40, None]
            placed.end.sendall((7).to_bytes(8, "little"))
            assert session.engine.accept(session) is None
            assert placed.back() == 8  # a number that was not claimed is dropped
        assert session.listening and not select.select([listener], [], [], 0)[0]
        client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        assert select.select([listener], [], [], 5)[0]
        listener.accept()[0].close()
        client.close()


def test_a_shell_with_a_name(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[1]) as sock:
        sock.bind(("", 7777))
        session = session_of(sock)
        with Placed(session) as placed:
            assert placed.state is None and session.local[1] == 7777 and not session.live
            placed.back()
        sock.listen()
        with Placed(session) as placed:
            session.set_shared(listening=True)
            placed.end.sendall(bytes(8))
            assert session.announced() == 0
            placed.back()
        assert session.listening
        with Placed(session) as placed:
            placed.end.close()
            with pytest.raises(OSError, match="ended this listener"):
                session.announced()


# -- descriptors that come from elsewhere ------------------------------------------------------


def test_adopted_stream(hosts: tuple[Embedded, Embedded]) -> None:
    user, end = standard.socketpair(standard.AF_UNIX, standard.SOCK_STREAM)
    session = hosts[1].engine.new_session(6)
    with pytest.raises(OSError) as wrong:
        hosts[1].engine.new_session(17).adopt_fd(user.fileno())
    assert wrong.value.errno == errno.EPROTOTYPE
    number = user.detach()
    session.adopt_fd(number, local=("10.0.0.2", 1234), peer=("10.0.0.1", 4321))
    assert session.fileno() == number and session.local == ("10.0.0.2", 1234) and session.peer == ("10.0.0.1", 4321)
    end.sendall(b"hello")
    with session.recv_buffer(100) as data:
        assert bytes(data) == b"hello"
    hosts[1].engine.close_session(session)
    assert end.recv(1) == b""
    end.close()


def address(host: str, port: int) -> bytes:
    return bytes(10) + b"\xff\xff" + standard.inet_aton(host) + port.to_bytes(2, "big")


def adopted_udp(host: Embedded, peer: tuple[str, int] | None) -> tuple[socket.socket, standard.socket]:
    user, end = standard.socketpair(standard.AF_UNIX, standard.SOCK_SEQPACKET)
    sock = socket.socket(type=socket.SOCK_DGRAM, host=host)
    session_of(sock).adopt_fd(user.detach(), local=("10.0.0.2", 53), peer=peer)
    sock._adopt(session_of(sock), True)
    sock.settimeout(5)
    end.settimeout(5)
    return sock, end


def test_datagrams_on_the_pair(hosts: tuple[Embedded, Embedded]) -> None:
    sock, end = adopted_udp(hosts[1], None)
    there = ("10.0.0.1", 5353)
    for size in (0, 1, 1472, 65507):
        data = os.urandom(size)
        assert sock.sendto(data, there) == size
        assert end.recv(1 << 17) == address(*there) + data
        end.send(address(*there) + data)
        assert sock.recvfrom(1 << 17) == (data, there)
    with pytest.raises(OSError) as large:
        sock.sendto(bytes(65508), there)
    assert large.value.errno == errno.EMSGSIZE
    with pytest.raises(OSError) as nowhere:
        sock.send(b"x")
    assert nowhere.value.errno == errno.EDESTADDRREQ
    end.send(address(*there) + b"0123456789")
    assert sock.recvfrom(4, socket.MSG_PEEK) == (b"0123", there)
    assert sock.recv(4, socket.MSG_PEEK | socket.MSG_TRUNC)[:4] == b"0123"
    assert sock.recvmsg(4) == (b"0123", [], socket.MSG_TRUNC, there)
    end.send(b"too short")
    end.send(address("192.0.2.7", 1) + b"lent")
    with sock.recv_buffer() as lent:
        assert bytes(lent) == b"lent" and lent.address == ("192.0.2.7", 1)
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recvfrom(1)
    with pytest.raises(BlockingIOError):
        while True:
            sock.sendto(bytes(60_000), there)
    assert not select.select([], [sock], [], 0)[1]
    end.setblocking(False)
    with pytest.raises(BlockingIOError):
        while end.recv(1 << 17):
            pass
    assert select.select([], [sock], [], 0)[1]
    sock.close()
    end.close()


def test_connected_datagrams_on_the_pair(hosts: tuple[Embedded, Embedded]) -> None:
    sock, end = adopted_udp(hosts[1], ("10.0.0.1", 5353))
    sock.send(b"to the peer")
    assert end.recv(100) == address("10.0.0.1", 5353) + b"to the peer"
    sock.sendto(b"to another", ("192.0.2.1", 7))
    assert end.recv(100) == address("192.0.2.1", 7) + b"to another"
    end.shutdown(standard.SHUT_RDWR)  # the server has gone; that is no empty datagram
    for call in (lambda: sock.recv(100), lambda: sock.send(b"x")):
        with pytest.raises(OSError) as gone:
            call()
        assert gone.value.errno == errno.ENETDOWN
    sock.close()
    end.close()


def test_udp_there_and_back(hosts: tuple[Embedded, Embedded], udp: Joined) -> None:
    client, server = udp
    number, session = server.fileno(), session_of(server)
    client.sendto(b"second", ("10.0.0.2", 9000))
    client.sendto(b"", ("10.0.0.2", 9000))
    assert select.select([server], [], [], 5)[0]
    session.engine.poll()
    source = "10.0.0.1", client.getsockname()[1]
    with Placed(session) as placed:
        assert placed.user_fd == number and session.live and session.state == "OPEN"
        assert server.getsockname() == ("0.0.0.0", 9000)
        assert not select.select([server], [], [], 0)[0]
        placed.end.send(address("192.0.2.7", 4) + b"read on the pair")
        placed.end.send(address("192.0.2.8", 5) + b"first" * 10_000)
        placed.end.send(address("192.0.2.8", 6))
        assert server.recvfrom(100) == (b"read on the pair", ("192.0.2.7", 4))
        server.sendto(b"out", source)
        assert placed.end.recv(100) == address(*source) + b"out"
        assert placed.back() == 22 + 50_000 + 22
    assert server.fileno() == number and select.select([server], [server], [], 0)[:2] == ([server], [server])
    assert server.recvfrom(1 << 16) == (b"first" * 10_000, ("192.0.2.8", 5))
    assert server.recvfrom(100) == (b"", ("192.0.2.8", 6))
    assert [server.recvfrom(100) for _ in range(2)] == [(b"second", source), (b"", source)]
    assert not select.select([server], [], [], 0)[0]
    client.sendto(b"third", ("10.0.0.2", 9000))
    assert server.recvfrom(100) == (b"third", source)
    server.sendto(b"back", source)
    assert client.recvfrom(100) == (b"back", ("10.0.0.2", 9000))


@pytest.mark.parametrize("at_home", [True, False])
def test_a_thread_that_receives_datagrams_goes_on(udp: Joined, at_home: bool) -> None:
    client, server = udp
    got: list[object] = []
    with running(lambda: got.append(server.recvfrom(100)[0])):
        time.sleep(0.05)
        placed = Placed(session_of(server))
        time.sleep(0.05)
        if at_home:
            placed.back()
            client.sendto(b"here", ("10.0.0.2", 9000))
        else:
            placed.end.send(address("192.0.2.7", 4) + b"there")
    assert got == [b"here" if at_home else b"there"]
    placed.end.close()


# -- hammering ---------------------------------------------------------------------------------


def test_transitions_under_load(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    """Both directions full of data while the session moves to and fro: every byte arrives, in order, once."""
    client, server = joined
    client.settimeout(20)
    server.settimeout(20)
    stop = threading.Event()
    sums: dict[str, list[bytes]] = {}

    def flow(name: str, out: socket.socket, into: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        rng = random.Random(name)
        hashes = hashlib.sha256(), hashlib.sha256()
        block = rng.randbytes(1 << 20)

        def send() -> None:
            count = 0
            while not stop.is_set() or count < 20:
                at = rng.randrange(1 << 19)
                piece = block[at : at + rng.choice((1, 700, 20_000, 300_000))]
                out.sendall(piece)
                hashes[0].update(piece)
                count += 1
            out.shutdown(socket.SHUT_WR)

        def receive() -> None:
            how = random.Random(name)
            while True:
                if how.random() < 0.3:
                    with into.recv_buffer(how.randrange(1, 1 << 18)) as lent:
                        data = bytes(lent)
                elif how.random() < 0.1:
                    assert select.select([into], [], [], 20)[0]
                    data = into.recv(100)
                else:
                    data = into.recv(how.randrange(1, 1 << 18))
                if not data:
                    break
                hashes[1].update(data)
            sums[name] = [h.digest() for h in hashes]

        return send, receive

    workers = [*flow("to", client, server), *flow("from", server, client)]
    with ExitStack() as stack:
        for work in workers:
            stack.enter_context(running(work))
        for turn in range(30):
            relay = Relay(session_of(server), hosts[1])
            time.sleep(0.002 * (turn % 5))
            relay.back()
            relay.end.close()
            time.sleep(0.002 * (turn % 3))
        stop.set()
    assert sums["to"][0] == sums["to"][1] and sums["from"][0] == sums["from"][1]


# -- nothing is left behind --------------------------------------------------------------------


def test_transitions_leak_nothing(joined: Joined) -> None:
    client, server = joined
    session = session_of(server)
    server.fileno()

    def round_trip() -> None:
        with Placed(session) as placed:
            placed.end.sendall(b"12")
            server.recv(1)
            placed.back()
        assert server.recv(1) == b"2"

    round_trip()
    counts = []
    for _ in range(3):
        for _ in range(100):
            round_trip()
        counters = session.engine.counters()
        held = counters["buf_held"], counters["buf_lent"]
        counts.append((len(os.listdir("/proc/self/fd")), held, threading.active_count()))
    assert all(a == b for a, b in pairwise(counts))
