"""Relays over a wire in memory: an engine with a loop of its own, plain descriptors as its users, a peer behind it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import select
import socket as ksocket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from ulnet.kernelshim.memory import memory_pair
from ulnet.stack import relay, socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.engine import EV_ACCEPTED, EV_RELAY, Engine
from ulnet.stack.metastate import Metastate
from ulnet.stack.relay import DATAGRAMS, LISTENER, NEWS_ENDED, NEWS_HUNG, NEWS_RESET, STREAM, Relay, Relays
from ulnet.stack.session import Session

TCP, UDP = 6, 17
OURS, PEER = "10.0.0.1", "10.0.0.2"
PORT = 7000
STUCK_S = 5.0  # a loop that sleeps so long while data waits has lost a wake-up


class Server:
    """An engine that a loop drives as the network server's does, and the peer's host."""

    def __init__(self) -> None:
        link, other = memory_pair(queue_frames=4096)
        self.peer = Embedded(other, f"{PEER}/24")
        meta = Metastate.create(OURS, 24, link.mac, link.mtu, shared=False)
        self.link = link
        self.engine = Engine(link, meta)
        self.engine.collect_events = True
        self.relays = Relays(self.engine)
        self.listener = self.engine.new_session(TCP)
        self.engine.listen(self.listener, OURS, PORT, 64)
        self.news: dict[Session, int] = {}
        self.accepted: list[Session] = []
        self.turns = 0
        self._lock = threading.Lock()
        self._wake = os.pipe2(os.O_NONBLOCK)
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self.link.fileno(), self.relays.fileno(), self._wake[0]):
            poll.register(fd, select.POLLIN)
        wait_ms = -1
        while not self._stop:
            timeout = STUCK_S
            if self.relays.pending:
                timeout = max(wait_ms, 0) / 1e3
            deadline = self.engine.deadline_ns()
            if deadline is not None:
                timeout = min(timeout, max(0.0, (deadline - time.monotonic_ns()) / 1e9))
            ready = [fd for fd, _ in poll.poll(-(-timeout * 1e3 // 1))]
            if self._wake[0] in ready:
                os.read(self._wake[0], 4096)
            with self._lock:
                self.turns += 1
                self.engine.poll()
                wait_ms = self.relays.run()
                for kind, session, value in self.engine.events():
                    if kind == EV_RELAY and session is not None:
                        self.news[session] = self.news.get(session, 0) | value
                        if value & NEWS_HUNG and session.kind == TCP:
                            self.engine.close_session(session, linger_abort=bool(value & NEWS_RESET))
                    elif kind == EV_ACCEPTED:
                        accepted = self.engine.accept(self.listener)
                        if accepted is not None:
                            self.accepted.append(accepted)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The loop stands; what is done meanwhile it sees afterwards."""
        with self._lock:
            yield
        os.write(self._wake[1], b"x")

    def connection(self) -> tuple[Session, socket.socket]:
        """An established session here, and the peer's socket."""
        peer = socket.create_connection((OURS, PORT), timeout=10, host=self.peer)
        return until(lambda: self.accepted and self.accepted.pop(), "a session"), peer

    def relay(self, session: Session, kind: int = STREAM) -> tuple[Relay, ksocket.socket]:
        """A relay for it, and its users' end."""
        user, manager = ksocket.socketpair(
            ksocket.AF_UNIX, ksocket.SOCK_SEQPACKET if kind == DATAGRAMS else ksocket.SOCK_STREAM
        )
        with self.paused():
            made = Relay(self.relays, session, manager.detach(), kind)
        user.settimeout(10)
        return made, user

    def close(self) -> None:
        self._stop = True
        os.write(self._wake[1], b"x")
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.peer.shutdown(0.2)
        self.relays.close()
        self.engine.close()
        for fd in self._wake:
            os.close(fd)


def until(condition, what: str, limit_s: float = 10):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return value


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def read_all(sock: ksocket.socket | socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_both_ways_and_the_end(server: Server) -> None:
    session, peer = server.connection()
    made, user = server.relay(session)
    user.sendall(b"question")
    assert peer.recv(100) == b"question"
    peer.sendall(b"answer")
    assert user.recv(100) == b"answer"
    until(lambda: made.counters()["down_bytes"] == 6, "the count")
    assert (made.counters()["up_bytes"], made.counters()["dropped"]) == (8, 0)
    peer.shutdown(socket.SHUT_WR)
    assert user.recv(1) == b""
    until(lambda: made.eof, "end of file")
    assert not made.news
    user.sendall(b"bye")
    user.close()
    assert read_all(peer) == b"bye"
    until(lambda: server.news.get(session) == NEWS_HUNG, "a hang-up")
    with server.paused():
        made.close()
    peer.close()


def test_no_wake_up_is_lost(server: Server) -> None:
    """Writers and readers of any pace and size, both ways at once: the loop sleeps 5 s when it misses an edge."""
    session, peer = server.connection()
    made, user = server.relay(session)
    size = 8 << 20
    errors: list[BaseException] = []

    def write(sock: ksocket.socket | socket.socket, seed: int) -> None:
        rng = random.Random(seed)
        try:
            sent = 0
            stuff = random.Random(100 + seed).randbytes(size)
            while sent < size:
                n = rng.choice((1, 100, 1448, 5000, 65_000, 300_000))
                sock.sendall(stuff[sent : sent + n])
                sent += n
                if rng.random() < 0.05:
                    time.sleep(rng.random() * 0.005)
            sock.shutdown(socket.SHUT_WR)
        except BaseException as error:
            errors.append(error)

    def read(sock: ksocket.socket | socket.socket, seed: int, into: list[bytes]) -> None:
        rng = random.Random(50 + seed)
        digest = hashlib.sha256()
        try:
            while part := sock.recv(rng.choice((1, 1000, 70_000, 1 << 20))):
                digest.update(part)
                if rng.random() < 0.02:
                    time.sleep(rng.random() * 0.01)
            into.append(digest.digest())
        except BaseException as error:
            errors.append(error)

    up: list[bytes] = []
    down: list[bytes] = []
    user.settimeout(STUCK_S - 1)
    peer.settimeout(STUCK_S - 1)
    threads = [
        threading.Thread(target=write, args=(user, 1)),
        threading.Thread(target=write, args=(peer, 2)),
        threading.Thread(target=read, args=(peer, 1, up)),
        threading.Thread(target=read, args=(user, 2, down)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert up == [hashlib.sha256(random.Random(101).randbytes(size)).digest()]
    assert down == [hashlib.sha256(random.Random(102).randbytes(size)).digest()]
    assert made.counters()["up_bytes"] == made.counters()["down_bytes"] == size
    until(lambda: server.news.get(session) == NEWS_HUNG, "both directions are over")
    user.close()
    peer.close()


def test_a_reader_that_rests_stops_the_peer(server: Server) -> None:
    """Nothing is read: what is buffered has bounds, the loop sleeps, and all of it comes in the end."""
    session, peer = server.connection()
    made, user = server.relay(session)
    peer.setblocking(False)
    data = random.Random(1).randbytes(1 << 20)
    sent = 0
    quiet = 0
    while quiet < 20:
        try:
            sent += peer.send(data)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.01)
    assert sent < 16 << 20
    assert made.counters()["down_blocked"] >= 1
    before = server.turns
    time.sleep(0.3)
    assert server.turns - before < 30
    peer.settimeout(10)
    peer.shutdown(socket.SHUT_WR)
    got = read_all(user)
    assert len(got) == sent
    user.close()
    peer.close()


def test_bulk_does_not_starve_others(server: Server) -> None:
    session, peer = server.connection()
    bulk, user = server.relay(session)
    session2, peer2 = server.connection()
    small, user2 = server.relay(session2)
    stop = threading.Event()

    def flood() -> None:
        block = bytes(1 << 18)
        with contextlib.suppress(OSError):
            while not stop.is_set():
                user.sendall(block)

    def drain() -> None:
        with contextlib.suppress(OSError):
            while peer.recv(1 << 20):
                pass

    threads = [threading.Thread(target=flood), threading.Thread(target=drain)]
    for thread in threads:
        thread.start()
    peer2.settimeout(5)
    for number in range(40):
        word = b"ping %d" % number
        user2.sendall(word)
        assert peer2.recv(100) == word
        peer2.sendall(word)
        assert user2.recv(100) == word
    stop.set()
    assert bulk.counters()["up_bytes"] > 10 * small.counters()["up_bytes"]
    threads[0].join(10)
    user.close()
    user2.close()
    threads[1].join(10)
    for sock in (peer, peer2):
        sock.close()


def test_drain_and_detach(server: Server) -> None:
    """All that was written goes into the session, beyond its buffer's limit; the descriptor comes back whole."""
    session, peer = server.connection()
    session.setopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    made, user = server.relay(session)
    data = os.urandom(400_000)
    user.setblocking(False)
    sent = 0
    with server.paused():
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += user.send(data[sent:])
        assert sent > 40_000
        made.drain()
        assert made.counters()["up_bytes"] == sent
        made.drain()
        fd = made.detach()
        assert made.fd == -1
        for call in (made.detach, made.drain, made.counters):
            with pytest.raises(ValueError, match="has ended"):
                call()
        made.close()
        with ksocket.socket(fileno=fd) as manager, pytest.raises(BlockingIOError):
            manager.recv(1, ksocket.MSG_DONTWAIT)
        state = server.engine.export_session(session)
        home = server.engine.new_session(TCP)
        server.engine.import_session(home, state, 5)
    got = b""
    while len(got) < sent:
        got += peer.recv(65536)
    assert got == data[:sent]
    user.close()
    peer.close()


def test_a_prefix_comes_first_and_keeps_the_window(server: Server) -> None:
    session, peer = server.connection()
    peer.sendall(b"behind")
    until(lambda: session.ready & 1, "data")
    with server.paused():
        state = server.engine.export_session(session)
        home = server.engine.new_session(TCP)
        front = os.urandom(300_000)
        server.engine.import_session(home, state, 5, front)
        got = b""
        while len(got) < len(front) + 6:
            with home.recv_buffer(1 << 20, 0) as part:
                got += bytes(part)
    assert got == front + b"behind"
    peer.sendall(b"and on")
    until(lambda: home.ready & 1, "data")
    with home.recv_buffer(100, 0) as part:
        assert bytes(part) == b"and on"
    # Only a prefix
    with server.paused():
        state = server.engine.export_session(home)
        again = server.engine.new_session(TCP)
        server.engine.import_session(again, state, 5, b"alone")
    peer.sendall(b" not")
    until(lambda: again.stat()["unread_bytes"] == 9, "data")
    with again.recv_buffer(100, 0) as part:
        assert bytes(part) == b"alone not"
    peer.close()


def test_news(server: Server) -> None:
    """A reset by the peer, and a user that closes with data unread."""
    session, peer = server.connection()
    _, user = server.relay(session)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    user.sendall(b"never read")
    peer.close()
    until(lambda: server.news.get(session, 0) & NEWS_ENDED, "the connection's end")
    assert user.recv(1) == b"" and session.take_error() == errno.ECONNRESET
    user.close()

    session, peer = server.connection()
    _, user = server.relay(session)
    peer.sendall(b"unread")
    until(lambda: select.select([user], [], [], 0)[0], "data")
    user.close()
    until(lambda: server.news.get(session) == NEWS_HUNG | NEWS_RESET, "a reset")
    peer.close()


def test_a_user_who_does_not_read_any_more(server: Server) -> None:
    """shutdown(SHUT_RD): what comes is dropped and counted, the other direction goes on."""
    session, peer = server.connection()
    made, user = server.relay(session)
    user.shutdown(ksocket.SHUT_RD)
    peer.sendall(bytes(6 << 20))  # more than the window
    until(lambda: made.counters()["dropped"] >= 6 << 20, "dropped data")
    user.sendall(b"still here")
    assert peer.recv(100) == b"still here"
    user.close()
    peer.close()


def test_datagrams(server: Server) -> None:
    with socket.socket(type=socket.SOCK_DGRAM, host=server.peer) as peer:
        peer.bind(("", 9))
        peer.settimeout(5)
        with server.paused():
            session = server.engine.new_session(UDP)
            server.engine.open_udp(session, OURS, 5000)
        made, user = server.relay(session, DATAGRAMS)
        address = b"\0" * 10 + b"\xff\xff" + bytes((10, 0, 0, 2)) + b"\0\x09"
        for size in (0, 1, 1472, 65_000):
            data = os.urandom(size)
            user.send(address + data)
            assert peer.recvfrom(70_000) == (data, (OURS, 5000))
            peer.sendto(data, (OURS, 5000))
            assert user.recv(70_000) == address + data
        for number in range(10):
            peer.sendto(number.to_bytes(2, "big") + bytes(20_000), (OURS, 5000))
        first = [int.from_bytes(user.recv(70_000)[18:20], "big") for _ in range(10)]
        assert first == list(range(10))
        for rubbish in (b"", b"x", address[:17], bytes(18) + b"to nobody"):
            user.send(rubbish)
        user.send(address[:12] + bytes((10, 0, 1, 1)) + b"\0\x09" + b"no route")
        until(lambda: made.counters()["malformed"] == 4, "malformed")
        until(lambda: session.take_error() == errno.ENETUNREACH, "an error")
        user.send(address + b"good")
        assert peer.recv(100) == b"good"
        # Closed with a datagram unread: what was sent before goes out nevertheless.
        peer.sendto(b"unread", (OURS, 5000))
        until(lambda: select.select([user], [], [], 0)[0], "a datagram")
        with server.paused():
            user.send(address + b"last")
            user.close()
        assert peer.recv(100) == b"last"
        until(lambda: server.news.get(session, 0) & NEWS_HUNG, "a hang-up")


def test_announcements(server: Server) -> None:
    shell = server.engine.new_session(TCP)
    made, user = server.relay(shell, LISTENER)
    with server.paused():
        assert [made.announce(number) for number in (1, 2, 1 << 60)] == [True] * 3
    assert made.unread() == 3
    assert user.recv(8) == (1).to_bytes(8, "little")
    assert made.unread() == 2
    assert user.recv(8) + user.recv(8) == (2).to_bytes(8, "little") + (1 << 60).to_bytes(8, "little")
    assert made.unread() == 0
    with server.paused():
        count = 0
        while made.announce(count):
            count += 1
    assert 50 < count < 100_000 and not server.news.get(shell)
    while made.unread():
        user.recv(8)
    until(lambda: server.news.get(shell, 0) == relay.NEWS_ROOM, "room")
    user.send(b"rubbish")
    user.shutdown(ksocket.SHUT_RD)
    with server.paused():
        assert not made.announce(7)
    until(lambda: server.news[shell] & NEWS_HUNG, "the end of listening")
    user.close()


def test_what_cannot_be_relayed(server: Server) -> None:
    session, peer = server.connection()
    reading, writing = os.pipe()
    os.close(writing)
    with server.paused():
        with pytest.raises(OSError) as caught:
            Relay(server.relays, session, 99_999)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="kind 4"):
            Relay(server.relays, session, reading, 4)
        made = Relay(server.relays, session, reading)  # no socket: it ends, and nothing else
        with pytest.raises(OSError) as caught:
            Relay(server.relays, session, 0)
        assert caught.value.errno == errno.EISCONN
    until(lambda: server.news.get(session, 0) & NEWS_HUNG, "its end")
    with server.paused():
        made.close()
    peer.close()


def test_a_copy_of_the_descriptor_outlives_the_relay(server: Server) -> None:
    """Epoll knows open files, not descriptors: one that somebody else has, too, must leave the set by hand."""
    session, peer = server.connection()
    user, manager = ksocket.socketpair()
    copy = manager.dup()
    with server.paused():
        made = Relay(server.relays, session, manager.detach())
    user.sendall(b"x")
    assert peer.recv(1) == b"x"
    with server.paused():
        made.close()
    for _ in range(3):
        user.sendall(b"y")
        copy.sendall(b"z")
        time.sleep(0.01)
    assert not select.select([server.relays.fileno()], [], [], 0)[0]
    user.close()
    copy.close()
    peer.close()


class TestUdpStates:
    def queued(self, server: Server, datagrams: list[bytes]) -> tuple[Session, socket.socket]:
        peer = socket.socket(type=socket.SOCK_DGRAM, host=server.peer)
        peer.bind(("", 9))
        with server.paused():
            session = server.engine.new_session(UDP)
            server.engine.open_udp(session, OURS, 5000)
        for data in datagrams:
            peer.sendto(data, (OURS, 5000))
        until(lambda: session.stat()["bytes_in"] == sum(map(len, datagrams)), "datagrams")
        return session, peer

    def test_there_and_back(self, server: Server) -> None:
        sent = [b"one", b"", os.urandom(60_000), b"last"]
        session, peer = self.queued(server, sent)
        with server.paused():
            session.setopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 123_456)
            session.setopt(0, 2, 9)
            state = server.engine.export_session(session)
            assert session.closed and not session.live
            home = server.engine.new_session(UDP)
            address = b"\0" * 10 + b"\xff\xff" + bytes((10, 0, 0, 9)) + b"\x01\x02"
            server.engine.import_session(home, state, 77, address + struct.pack("<I", 5) + b"first")
            assert home.session_id == 77 and home.local == (OURS, 5000) and home.peer is None
            assert home.getopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 123_456 and home.getopt(0, 2) == 9
            for data, source in ((b"first", ("10.0.0.9", 258)), *((data, (PEER, 9)) for data in sent)):
                with home.recv_buffer(1, 0) as part:
                    assert bytes(part) == data and part.address == source
            with pytest.raises(BlockingIOError):
                home.recv_buffer(1, 0)
        peer.sendto(b"goes on", (OURS, 5000))
        until(lambda: home.ready & 1, "a datagram")
        peer.close()

    def test_late_datagrams_are_strays(self, server: Server) -> None:
        session, peer = self.queued(server, [])
        strays: list[bytes] = []
        server.engine.on_strays = strays.extend
        with server.paused():
            state = server.engine.export_session(session)
        peer.sendto(b"late", (OURS, 5000))
        until(lambda: strays, "a stray")
        with server.paused():
            home = server.engine.new_session(UDP)
            server.engine.import_session(home, state, 1)
            server.engine.inject(strays[0])
            with home.recv_buffer(1, 0) as part:
                assert bytes(part) == b"late"
        peer.close()

    def test_states_that_are_none(self, server: Server) -> None:
        """Cut, grown, or with any byte changed: refused, or harmless."""
        session, peer = self.queued(server, [b"some", b"data"])
        rng = random.Random(5)
        with server.paused():
            state = server.engine.export_session(session)
            server.engine.forget_flow(UDP, OURS, 5000, None, 0)
            for cut in range(len(state)):
                shell = server.engine.new_session(UDP)
                if cut not in (len(state) - 26, len(state) - 52):  # whole datagrams less
                    with pytest.raises(ValueError, match="malformed"):
                        server.engine.import_session(shell, state[:cut], 1)
            for _ in range(500):
                changed = bytearray(state)
                changed[rng.randrange(len(state))] = rng.randrange(256)
                shell = server.engine.new_session(UDP)
                with contextlib.suppress(ValueError, OSError):
                    server.engine.import_session(shell, changed, 1)
                server.engine.close_session(shell)
            with pytest.raises(ValueError, match="malformed"):
                server.engine.import_session(server.engine.new_session(TCP), state, 1)
            with pytest.raises(ValueError, match="malformed"):
                server.engine.import_session(server.engine.new_session(UDP), state, 1, b"no datagram")
        peer.close()
