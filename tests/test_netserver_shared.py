"""Shared sessions through a real server: plain reads and writes on a descriptor, by several processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import socket as ksocket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from ulnet.ipc import Message, MsgType, PortRight, Task
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import protocol as p
from ulnet.stack import socket
from ulnet.stack._socket import Socket
from ulnet.stack.proxy import Proxy
from ulnet.stack.session import Session

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

TCP, UDP = 6, 17


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("shared"))
    yield bed
    bed.close()


@pytest.fixture
def bed(running: Bed) -> Iterator[Bed]:
    """The server, with empty tables and no new descriptor after each test."""
    yield running
    running.end_programs()
    running.expect_empty()
    wait_for(lambda: running.tables()["applications"] == 0, "no applications")
    tables = running.tables()
    assert (tables["shared"], tables["heirs"]) == (0, 0)
    assert running.counters()["calls"].get("internal_errors", 0) == 0, running.log.read_text()


@pytest.fixture
def listener(bed: Bed) -> Iterator[ksocket.socket]:
    with bed.b.socket() as sock:
        sock.bind((PEER, 0))
        sock.listen(256)
        sock.settimeout(10)
        yield sock


class Party:
    """A process that takes part, by hand: its calls, without the library's own shared sockets."""

    def __init__(self, bed: Bed) -> None:
        self.proxy: Proxy = bed.proxy()

    def call(self, call: p.Call, record: p.Record, **parts: Any) -> Message:
        message = self.proxy._task.rpc(self.proxy._server, call, record.pack(), timeout=5, **parts)
        error = int.from_bytes(bytes(message.inline)[:4], "little")
        if error:
            raise OSError(error, os.strerror(error))
        return message

    def tell(self, call: p.Call, record: p.Record, **parts: Any) -> None:
        self.proxy._task.send(self.proxy._server, call, record.pack(), timeout=5, **parts)

    def connect(self, address: tuple[str, int]) -> Session:
        sock = socket.socket(host=self.proxy)
        sock.settimeout(10)
        sock.connect(address)
        return self.take(sock)

    def take(self, sock: socket.socket) -> Session:
        """The session of a socket, which forgets it."""
        session = sock.session
        assert session is not None
        sock._adopt(None, False)
        self.proxy._sessions.pop(session.session_id, None)
        return session

    def share(self, session: Session, *, state: bool = True) -> tuple[int, ksocket.socket]:
        """Into the server; its number and the users' end."""
        kind = ksocket.SOCK_STREAM if session.kind == TCP else ksocket.SOCK_SEQPACKET
        user, manager = ksocket.socketpair(ksocket.AF_UNIX, kind)
        number = session.session_id
        self.proxy._declare(session)
        ool = [self.proxy.engine.export_session(session)] if state else []
        self.proxy._gone_from_here(number)
        self.tell(p.Call.SHARE, p.Share(number), ool=ool, fds=[user.fileno(), manager.fileno()])
        manager.close()
        user.settimeout(10)
        return number, user

    def hold(self, user: ksocket.socket) -> p.Info:
        return p.Info.unpack(bytes(self.call(p.Call.HOLD, p.Nothing(), fds=[user.fileno()]).inline))

    def release(self, number: int, *, abort: bool = False) -> None:
        self.tell(p.Call.RELEASE, p.Release(number, abort))

    def status(self, number: int) -> p.Info:
        return p.Info.unpack(bytes(self.call(p.Call.STATUS, p.Shared(number)).inline))

    def promote(self, number: int, user: ksocket.socket, kind: int = TCP) -> Session:
        """Home again, with what the users' end holds still in front."""
        info = self.status(number)
        peer = (info.raddr, info.rport) if info.rport else (None, 0)
        # Frames that come from now on wait for the state.
        self.proxy.engine.forget_flow(kind, info.laddr, info.lport, *peer)
        message = self.call(p.Call.PROMOTE, p.Shared(number))
        (fd,) = message.take_fds()
        os.close(fd)
        return self.take_in(number, message.ool[0], unread(user, kind), kind)

    def take_in(self, number: int, state: Any, prefix: bytes = b"", kind: int = TCP) -> Session:
        session = self.proxy.engine.new_session(kind)
        self.proxy.engine.import_session(session, state, number, prefix)
        return session

    def give_back(self, session: Session) -> None:
        self.proxy._return(session, session.session_id)

    def fork(self) -> tuple[int, ksocket.socket]:
        message = self.call(p.Call.FORK, p.Nothing())
        forked = p.Forked.unpack(bytes(message.inline))
        (fd,) = message.take_fds()
        return forked.heir, ksocket.socket(fileno=fd)


def unread(user: ksocket.socket, kind: int = TCP) -> bytes:
    user.setblocking(False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := user.recv(1 << 20):
            if kind == UDP:  # as a state has it
                part = part[:18] + struct.pack("<I", len(part) - 18) + part[18:]
            parts.append(part)
    return b"".join(parts)


def refused(code: int) -> Any:
    return pytest.raises(OSError, match=os.strerror(code))


def read_all(sock: ksocket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def pair(bed: Bed, listener: ksocket.socket) -> tuple[Party, int, ksocket.socket, ksocket.socket]:
    """A shared connection: its holder, number, users' end, and the peer."""
    party = Party(bed)
    session = party.connect(listener.getsockname())
    peer, _ = listener.accept()
    peer.settimeout(10)
    number, user = party.share(session)
    return party, number, user, peer


def finish(user: ksocket.socket, peer: ksocket.socket) -> None:
    """Ended by the peer first, so that no TIME-WAIT is ours."""
    peer.close()
    assert user.recv(1) == b""
    user.close()


class TestStream:
    def test_both_ways(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        user.sendall(b"question")
        assert peer.recv(100) == b"question"
        peer.sendall(b"answer")
        assert user.recv(100) == b"answer"
        info = party.status(number)
        assert (info.laddr, info.raddr, info.rport) == (ADDRESS, *peer.getsockname())
        assert (info.protocol, info.state, info.listening, info.named, info.eof, info.so_error) == (6, 4, 0, 0, 0, 0)
        (row,) = bed.live()
        assert (row["place"], row["state"], row["owner"]["name"]) == ("shared", "ESTABLISHED", "shared: 1")
        assert row["bytes_in"] == 6
        assert (bed.tables()["guarded"], bed.tables()["flows"]) == (0, 0)
        finish(user, peer)

    def test_data_in_flight_at_the_share_and_at_the_promotion(self, bed: Bed, listener: ksocket.socket) -> None:
        """Both sides write all the time; the session moves in and out of the server under them."""
        party = Party(bed)
        session = party.connect(listener.getsockname())
        peer, _ = listener.accept()
        peer.settimeout(20)
        down, up = os.urandom(6 << 20), os.urandom(6 << 20)
        seen = []
        threads = [
            threading.Thread(target=lambda: peer.sendall(down)),
            threading.Thread(target=lambda: seen.append(read_exactly(peer, len(up)))),
        ]
        for thread in threads:
            thread.start()
        got, sent = b"", 0
        moves = 0
        deadline = time.monotonic() + 30
        while (len(got) < len(down) or sent < len(up)) and time.monotonic() < deadline:
            # a while at home
            stop = min(len(got) + 700_000, len(down))
            sent += home_send(session, up[sent : sent + 300_000])
            while len(got) < stop:
                with session.recv_buffer(100_000, 10**10) as part:
                    got += bytes(part)
            # a while away
            number, user = party.share(session)
            stop = min(len(got) + 700_000, len(down))
            user.setblocking(False)
            pushed = min(sent + 300_000, len(up))
            while len(got) < stop or sent < pushed:
                readable, writable, _ = select.select([user], [user] if sent < pushed else [], [], 5)
                assert readable or writable
                if writable:
                    sent += user.send(up[sent:pushed])
                if readable:
                    got += user.recv(100_000)
            session = party.promote(number, user)
            user.close()
            moves += 1
        assert moves >= 4
        for thread in threads:
            thread.join(20)
        assert hashlib.sha256(got).digest() == hashlib.sha256(down).digest()
        assert seen and hashlib.sha256(seen[0]).digest() == hashlib.sha256(up).digest()
        assert party.proxy.engine.counters()["buf_lent"] == 0
        peer.close()
        party.give_back(session)

    def test_much_data(self, bed: Bed, listener: ksocket.socket) -> None:
        """More than every buffer on the way holds, with slow readers: nothing lost, nothing doubled."""
        _, _, user, peer = pair(bed, listener)
        data = os.urandom(12 << 20)
        for sender, receiver in ((user, peer), (peer, user)):
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            time.sleep(0.1)
            assert read_exactly(receiver, len(data)) == data
            thread.join(10)
        counters = bed.counters()["sessions"]
        assert counters["relay_up_bytes"] >= len(data) and counters["relay_down_bytes"] >= len(data)
        assert counters.get("relay_down_blocked", 0) >= 1
        finish(user, peer)

    def test_half_close(self, bed: Bed, listener: ksocket.socket) -> None:
        _, _, user, peer = pair(bed, listener)
        user.sendall(b"request")
        user.shutdown(ksocket.SHUT_WR)
        assert read_all(peer) == b"request"
        peer.sendall(b"x" * 500_000)
        peer.close()
        assert read_all(user) == b"x" * 500_000
        user.close()

    def test_half_close_by_the_peer(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        peer.sendall(b"question")
        peer.shutdown(ksocket.SHUT_WR)
        assert read_all(user) == b"question"
        wait_for(lambda: party.status(number).eof, "end of file")
        user.sendall(b"y" * 300_000)
        user.close()
        assert read_all(peer) == b"y" * 300_000
        peer.close()

    def test_half_close_is_kept_by_moves(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        user.sendall(b"all")
        user.shutdown(ksocket.SHUT_WR)
        assert read_all(peer) == b"all"
        peer.sendall(b"rest")
        wait_for(lambda: select.select([user], [], [], 0)[0], "data")
        session = party.promote(number, user)
        assert session.state == "FIN-WAIT-2"
        with session.recv_buffer(100) as part:
            assert bytes(part) == b"rest"
        number, again = party.share(session)
        assert party.status(number).state == 6
        with pytest.raises(BrokenPipeError):
            again.send(b"shut")
        peer.sendall(b"more")
        peer.close()
        assert read_all(again) == b"more"
        again.close()
        user.close()

    def test_shut_both_ways_with_data_unread(self, bed: Bed, listener: ksocket.socket) -> None:
        """shutdown(SHUT_RDWR) is no close: unread data stays readable, and the peer gets a FIN, no reset."""
        _, _, user, peer = pair(bed, listener)
        peer.sendall(b"unread")
        wait_for(lambda: select.select([user], [], [], 0)[0], "data")
        user.shutdown(ksocket.SHUT_RDWR)
        assert peer.recv(10) == b""
        assert user.recv(10) == b"unread"
        peer.close()
        user.close()

    def test_close_sends_what_was_written(self, bed: Bed, listener: ksocket.socket) -> None:
        listener.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_RCVBUF, 20_000)
        party, number, user, peer = pair(bed, listener)
        data = os.urandom(150_000)
        user.sendall(data)
        user.close()
        party.release(number)
        wait_for(lambda: [r["place"] for r in bed.live()] == ["server"], "the server finishes it")
        assert read_all(peer) == data
        peer.close()

    def test_close_with_unread_data_resets(self, bed: Bed, listener: ksocket.socket) -> None:
        _, _, user, peer = pair(bed, listener)
        peer.sendall(b"unread")
        wait_for(lambda: select.select([user], [], [], 0)[0], "data")
        user.close()
        with pytest.raises(ConnectionResetError):
            peer.recv(10)
        peer.close()

    @pytest.mark.parametrize("first", ["release", "close"])
    def test_abort_by_the_last_holder(self, bed: Bed, listener: ksocket.socket, first: str) -> None:
        party, number, user, peer = pair(bed, listener)
        if first == "close":
            user.close()
            wait_for(lambda: [r["place"] for r in bed.live()] == ["server"], "the server finishes it")
            party.release(number, abort=True)
            assert peer.recv(1) == b""
            with pytest.raises(OSError):
                wait_for(lambda: peer.send(b"x") and False, "a reset", 2)
        else:
            party.release(number, abort=True)
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
            user.close()
        peer.close()

    def test_the_peer_resets(self, bed: Bed, listener: ksocket.socket) -> None:
        """What came before is read; then the end, and the reason waits for who asks, once."""
        party, number, user, peer = pair(bed, listener)
        peer.sendall(b"last words")
        wait_for(lambda: select.select([user], [], [], 0)[0], "data")
        peer.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        poll = select.poll()
        poll.register(user, select.POLLIN)
        wait_for(lambda: poll.poll(0)[0][1] & select.POLLHUP, "hang-up")
        assert user.recv(100) == b"last words"
        assert user.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            user.send(b"x")
        info = party.status(number)
        assert (info.so_error, info.eof, info.state) == (errno.ECONNRESET, True, 0)
        assert party.status(number).so_error == 0
        with refused(errno.ENOTCONN):
            party.call(p.Call.PROMOTE, p.Shared(number))
        user.close()
        party.release(number)

    def test_options(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)

        def option(name: int, value: int, change: bool, level: int = 6) -> int:
            message = party.call(p.Call.OPTION, p.Option(number, level, name, value, change))
            return p.OptionValue.unpack(bytes(message.inline)).value

        assert option(ksocket.TCP_NODELAY, 0, False) == 0
        option(ksocket.TCP_NODELAY, 1, True)
        assert option(ksocket.TCP_NODELAY, 0, False) == 1
        with refused(errno.ENOPROTOOPT):
            option(999, 1, True)
        option(ksocket.SO_LINGER, 0, True, ksocket.SOL_SOCKET)
        user.close()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        peer.close()


class TestHolders:
    def test_two_processes_and_promotion_to_the_other(self, bed: Bed, listener: ksocket.socket) -> None:
        """The first shares and leaves, the second takes it home."""
        one, number, user, peer = pair(bed, listener)
        two = Party(bed)
        other = user.dup()
        info = two.hold(other)
        assert (info.session, info.raddr, info.rport) == (number, *peer.getsockname())
        for party in (one, two):
            with refused(errno.EBUSY):
                party.call(p.Call.PROMOTE, p.Shared(number))
        before = two.proxy.engine.meta.shares
        user.sendall(b"from one ")
        other.sendall(b"from two")
        assert read_exactly(peer, 17) == b"from one from two"
        peer.sendall(b"unread, ")
        wait_for(lambda: select.select([other], [], [], 0)[0], "data")
        one.release(number)
        user.close()
        wait_for(lambda: two.proxy.engine.meta.shares > before, "word that one is left")
        with refused(errno.EBADF):
            one.call(p.Call.PROMOTE, p.Shared(number))
        session = two.promote(number, other)
        peer.sendall(b"unread no more")
        got = b""
        while len(got) < 22:
            with session.recv_buffer(100, 10**10) as part:
                got += bytes(part)
        assert got == b"unread, unread no more"
        (row,) = bed.live()
        assert row["owner"]["pid"] == os.getpid() and row["place"] == "application"
        assert bed.tables()["guarded"] == 1
        peer.close()
        two.give_back(session)
        other.close()

    def test_in_another_process(self, bed: Bed, listener: ksocket.socket) -> None:
        """A real child, which knows nothing but the descriptor; its parent goes first."""
        party, number, user, peer = pair(bed, listener)
        heir, lifeline = party.fork()
        assert heir
        user.setblocking(True)  # of the open file, which the child shares
        pid = os.fork()
        if pid == 0:
            try:
                while data := os.read(user.fileno(), 1000):
                    os.write(user.fileno(), data.upper())
            finally:
                os._exit(0)
        lifeline.close()
        party.release(number)
        user.close()
        for word in (b"one", b"two"):
            peer.sendall(word)
            assert peer.recv(100) == word.upper()
        peer.shutdown(ksocket.SHUT_WR)
        assert peer.recv(100) == b""
        assert os.waitpid(pid, 0)[1] == 0
        peer.close()

    def test_an_heir_attaches(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        heir, lifeline = party.fork()
        assert bed.tables()["heirs"] == 1
        with refused(errno.EBUSY):
            party.call(p.Call.PROMOTE, p.Shared(number))
        child = Heritage(bed, heir)
        assert bed.tables()["heirs"] == 0
        lifeline.close()  # means nothing any more
        assert p.Info.unpack(bytes(child.call(p.Call.STATUS, p.Shared(number)).inline)).session == number
        with refused(errno.EBUSY):
            party.call(p.Call.PROMOTE, p.Shared(number))
        child.task.close()
        wait_for(lambda: bed.live()[0]["owner"]["name"] == "shared: 1", "the child's end")
        session = party.promote(number, user)
        peer.close()
        party.give_back(session)
        user.close()

    def test_a_lifeline_releases_and_ends(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        session2 = party.connect(listener.getsockname())
        peer2, _ = listener.accept()
        number2, user2 = party.share(session2)
        _, lifeline = party.fork()
        shares = party.proxy.engine.meta.shares
        lifeline.send(number.to_bytes(8, "little"))
        lifeline.send(b"nonsense that is longer")
        lifeline.send((number + 77).to_bytes(8, "little"))
        wait_for(lambda: party.proxy.engine.meta.shares > shares, "a release")
        with refused(errno.EBUSY):
            party.call(p.Call.PROMOTE, p.Shared(number2))
        session = party.promote(number, user)
        lifeline.close()
        wait_for(lambda: bed.tables()["heirs"] == 0, "the heir's end")
        session2 = party.promote(number2, user2)
        for side in (peer, peer2):
            side.close()
        for each in (session, session2):
            party.give_back(each)
        user.close()
        user2.close()

    def test_death_of_the_only_holder(self, bed: Bed, listener: ksocket.socket) -> None:
        """The kernel closes the descriptor: as by close(), not the reset of a session that the program managed."""
        party, _, user, peer = pair(bed, listener)
        user.sendall(b"last")
        user.close()
        party.proxy._task.close()
        assert read_all(peer) == b"last"
        peer.close()
        bed.proxies.remove(party.proxy)
        party.proxy._gone = True
        party.proxy.shutdown()

    def test_public_and_in_transit(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)

        def publish(public: bool, transit: int) -> None:
            party.call(p.Call.PUBLISH, p.Publish(number, public, transit))

        shares = party.proxy.engine.meta.shares
        publish(True, 0)
        with refused(errno.EBUSY):
            party.call(p.Call.PROMOTE, p.Shared(number))
        assert party.proxy.engine.meta.shares == shares
        publish(False, 1)
        with refused(errno.EBUSY):
            party.call(p.Call.PROMOTE, p.Shared(number))
        other = Party(bed)
        other.hold(user)
        assert party.proxy.engine.meta.shares == shares
        other.release(number)
        wait_for(lambda: party.proxy.engine.meta.shares == shares + 1, "one is left")
        publish(True, 0)
        publish(False, 0)
        assert party.proxy.engine.meta.shares == shares + 2
        # Public, without any holder: it lives as long as the descriptor.
        publish(True, 0)
        party.release(number)
        user.sendall(b"still")
        assert peer.recv(10) == b"still"
        other.hold(user)
        finish(user, peer)


class TestListener:
    def shared_listener(self, bed: Bed, backlog: int = 8) -> tuple[Party, int, ksocket.socket, tuple[str, int]]:
        party = Party(bed)
        sock = socket.socket(host=party.proxy)
        sock.bind(("", 0))
        sock.listen(backlog)
        name = ADDRESS, sock.getsockname()[1]
        number = sock.session.session_id if sock.session else 0
        session = sock.session
        assert session is not None
        party.proxy._listeners.pop(number)
        session = party.take(sock)
        number, user = party.share(session, state=False)
        session.session_id = 0
        party.proxy.engine.close_session(session)
        return party, number, user, name

    def test_two_claimers(self, bed: Bed) -> None:
        one, number, user, name = self.shared_listener(bed)
        two = Party(bed)
        info = two.hold(user)
        assert info.listening and info.named and (info.laddr, info.lport) == name
        peers = [bed.b.socket() for _ in range(6)]
        for peer in peers:
            peer.settimeout(10)
            peer.connect(name)
        sessions = []
        for turn in range(6):
            party = (one, two)[turn % 2]
            connection = int.from_bytes(user.recv(8), "little")
            message = party.call(p.Call.CLAIM, p.Shared(connection))
            sessions.append((party, party.take_in(connection, message.ool[0])))
            with refused(errno.ECONNABORTED):
                (two, one)[turn % 2].call(p.Call.CLAIM, p.Shared(connection))
        by_port = {peer.getsockname()[1]: peer for peer in peers}
        for party, session in sessions:
            assert session.peer is not None
            peer = by_port[session.peer[1]]
            peer.sendall(b"hello")
            with session.recv_buffer(10, 10**10) as part:
                assert bytes(part) == b"hello"
            peer.close()
            party.give_back(session)
        one.release(number)
        two.release(number)
        user.close()

    def test_no_more_than_the_backlog_is_announced(self, bed: Bed) -> None:
        party, number, user, name = self.shared_listener(bed, 2)
        peers = [bed.b.socket() for _ in range(4)]
        for peer in peers:
            peer.settimeout(10)
            peer.connect(name)
        user.settimeout(0.3)
        numbers = [int.from_bytes(user.recv(8), "little") for _ in range(2)]
        with pytest.raises(TimeoutError):
            user.recv(8)
        claimed = [party.take_in(n, party.call(p.Call.CLAIM, p.Shared(n)).ool[0]) for n in numbers]
        numbers = [int.from_bytes(user.recv(8), "little") for _ in range(2)]
        assert len(set(numbers)) == 2
        user.close()  # nobody accepts the other two: they are reset
        party.release(number)
        resets = 0
        for peer in peers:
            peer.settimeout(0.5)
            try:
                peer.recv(1)
            except ConnectionResetError:
                resets += 1
            except TimeoutError:
                pass
            peer.close()
        assert resets == 2
        for session in claimed:
            party.give_back(session)
        bed.expect_empty()

    def test_promotion_delivers_what_nobody_claimed(self, bed: Bed) -> None:
        party, number, user, name = self.shared_listener(bed)
        with bed.b.socket() as peer:
            peer.settimeout(10)
            peer.connect(name)
            wait_for(lambda: select.select([user], [], [], 0)[0], "an announcement")
            home = party.proxy.engine.new_session(TCP)
            party.proxy.engine.open_listener_shell(home, *name, 8)
            home.session_id = number
            party.proxy._listeners[number] = home
            party.proxy._backlogs[number] = 8
            message = party.call(p.Call.PROMOTE, p.Shared(number))
            assert not message.ool
            (fd,) = message.take_fds()
            os.close(fd)
            user.close()
            wait_for(lambda: home.ready & 1, "a delivery")
            session = party.proxy.engine.accept(home)
            assert session is not None
            peer.sendall(b"hello")
            with session.recv_buffer(10, 10**10) as part:
                assert bytes(part) == b"hello"
            # and it goes on as any listener
            with bed.b.socket() as second:
                second.settimeout(10)
                second.connect(name)
                wait_for(lambda: home.ready & 1, "another delivery")
            peer.close()
            party.give_back(session)
            party.proxy.close(home)

    def test_requeue(self, bed: Bed) -> None:
        """A connection delivered before the listener was shared goes to whoever claims it."""
        party = Party(bed)
        sock = socket.socket(host=party.proxy)
        sock.bind(("", 0))
        sock.listen(8)
        name = ADDRESS, sock.getsockname()[1]
        with bed.b.socket() as peer:
            peer.settimeout(10)
            peer.connect(name)
            peer.sendall(b"early")
            home = sock.session
            assert home is not None
            wait_for(lambda: home.ready & 1, "a delivery")
            session = party.proxy.engine.accept(home)
            assert session is not None
            party.proxy._listeners.pop(home.session_id)
            party.proxy._accepted_here(session)
            party.proxy._declare(session)
            party.take(sock)
            number, user = party.share(home, state=False)
            state = party.proxy.engine.export_session(session)
            party.tell(p.Call.REQUEUE, p.Requeue(number, session.session_id), ool=[state])
            other = Party(bed)
            other.hold(user)
            connection = int.from_bytes(user.recv(8), "little")
            assert connection == session.session_id
            session = other.take_in(connection, other.call(p.Call.CLAIM, p.Shared(connection)).ool[0])
            with session.recv_buffer(10, 10**10) as part:
                assert bytes(part) == b"early"
            peer.close()
            other.give_back(session)
            user.close()
            home.session_id = 0

    def test_a_name_then_a_listener(self, bed: Bed) -> None:
        """Bound, shared, and told to listen by another holder."""
        party = Party(bed)
        sock = socket.socket(host=party.proxy)
        sock.bind(("", 0))
        name = ADDRESS, sock.getsockname()[1]
        session = party.take(sock)
        number, user = party.share(session, state=False)
        assert party.status(number).listening is False
        other = Party(bed)
        with refused(errno.EBADF):
            other.call(p.Call.LISTEN, p.Listen(number, 4))
        other.hold(user)
        other.call(p.Call.LISTEN, p.Listen(number, 4))
        with bed.b.socket() as peer:
            peer.settimeout(10)
            peer.connect(name)
            connection = int.from_bytes(user.recv(8), "little")
            claimed = party.take_in(connection, party.call(p.Call.CLAIM, p.Shared(connection)).ool[0])
            peer.close()
            party.give_back(claimed)
        user.close()
        session.session_id = 0

    def test_a_name_then_a_connection(self, bed: Bed, listener: ksocket.socket) -> None:
        party = Party(bed)
        sock = socket.socket(host=party.proxy)
        sock.bind(("", 0))
        name = ADDRESS, sock.getsockname()[1]
        session = party.take(sock)
        number, user = party.share(session, state=False)
        with refused(errno.ECONNREFUSED):
            party.call(p.Call.CONNECT, p.Connect(number, 6, PEER, 9))
        message = party.call(p.Call.CONNECT, p.Connect(number, 6, *listener.getsockname()))
        assert not message.ool
        peer, address = listener.accept()
        assert address == name
        user.sendall(b"hello")
        assert peer.recv(10) == b"hello"
        finish(user, peer)
        session.session_id = 0

    def test_announced_again_when_nobody_claims(self, bed: Bed) -> None:
        party, number, user, name = self.shared_listener(bed)
        with bed.b.socket() as peer:
            peer.settimeout(10)
            peer.connect(name)
            first = user.recv(8)  # and whoever read it is no more
            start = time.monotonic()
            assert user.recv(8) == first
            assert 3 < time.monotonic() - start < 9
            connection = int.from_bytes(first, "little")
            session = party.take_in(connection, party.call(p.Call.CLAIM, p.Shared(connection)).ool[0])
            peer.close()
            party.give_back(session)
        party.release(number)
        user.close()


class TestUdp:
    def test_shared_and_home_again(self, bed: Bed) -> None:
        party = Party(bed)
        sock = socket.socket(type=socket.SOCK_DGRAM, host=party.proxy)
        sock.bind(("", 0))
        name = ADDRESS, sock.getsockname()[1]
        session = party.take(sock)
        with bed.b.socket(type=ksocket.SOCK_DGRAM) as peer:
            peer.bind((PEER, 0))
            peer.settimeout(5)
            to_peer = p.pack_address(PEER) + struct.pack(">H", peer.getsockname()[1])
            peer.sendto(b"before", name)
            wait_for(lambda: session.ready & 1, "a datagram")
            number, user = party.share(session)
            assert user.recv(70_000) == to_peer + b"before"
            peer.sendto(b"", name)
            assert user.recv(70_000) == to_peer
            big = os.urandom(60_000)
            user.send(to_peer + big)
            assert peer.recvfrom(70_000) == (big, name)
            peer.sendto(big, name)
            assert user.recv(70_000) == to_peer + big
            user.send(b"too short")
            user.send(b"")
            user.send(to_peer + b"still open")
            assert peer.recv(100) == b"still open"
            assert bed.tables()["flows"] == 1
            peer.sendto(b"in the descriptor", name)
            wait_for(lambda: select.select([user], [], [], 0)[0], "a datagram")
            session = party.promote(number, user, UDP)
            peer.sendto(b"at home", name)
            for expected in (b"in the descriptor", b"at home"):
                with session.recv_buffer(100, 10**10) as part:
                    assert bytes(part) == expected and part.address == peer.getsockname()
            assert bed.counters()["sessions"]["relay_malformed"] >= 2
            number, again = party.share(session)
            again.send(to_peer + b"once more")
            assert peer.recv(100) == b"once more"
            # Connected where it is: others are not heard any more
            party.call(p.Call.CONNECT, p.Connect(number, UDP, *peer.getsockname()))
            with bed.b.socket(type=ksocket.SOCK_DGRAM) as stranger:
                stranger.sendto(b"noise", name)
            peer.sendto(b"signal", name)
            assert again.recv(100) == to_peer + b"signal"
            again.send(bytes(18) + b"to whom it is connected")
            assert peer.recv(100) == b"to whom it is connected"
            user.close()
            again.close()
        bed.expect_empty()

    def test_an_unknown_neighbour(self, bed: Bed) -> None:
        """The first datagram waits for ARP; one to nobody leaves an error, and the next ones pass."""
        party = Party(bed)
        sock = socket.socket(type=socket.SOCK_DGRAM, host=party.proxy)
        sock.bind(("", 0))
        number, user = party.share(party.take(sock))
        with bed.b.socket(type=ksocket.SOCK_DGRAM) as peer:
            peer.bind((PEER, 0))
            peer.settimeout(10)
            user.send(p.pack_address("10.77.0.97") + b"\0\x09" + b"nobody")
            user.send(p.pack_address(PEER) + struct.pack(">H", peer.getsockname()[1]) + b"somebody")
            assert peer.recv(100) == b"somebody"
            wait_for(lambda: party.status(number).so_error == errno.EHOSTUNREACH, "an error")
        user.close()

    def test_order_while_the_session_moves(self, bed: Bed) -> None:
        """A stream of numbered datagrams: moves lose none (the buffers are large enough) and double none."""
        party = Party(bed)
        sock = socket.socket(type=socket.SOCK_DGRAM, host=party.proxy)
        sock.bind(("", 0))
        name = ADDRESS, sock.getsockname()[1]
        session = party.take(sock)
        count = 1500

        def send() -> None:
            with bed.b.socket(type=ksocket.SOCK_DGRAM) as peer:
                for number in range(count):
                    peer.sendto(number.to_bytes(4, "big"), name)
                    time.sleep(0.0005)

        thread = threading.Thread(target=send)
        thread.start()
        seen: list[int] = []
        deadline = time.monotonic() + 15
        while len(seen) < count and time.monotonic() < deadline:
            stop = len(seen) + 60
            while len(seen) < min(stop, count):
                with session.recv_buffer(100, 5 * 10**9) as part:
                    seen.append(int.from_bytes(bytes(part), "big"))
            number, user = party.share(session)
            stop = len(seen) + 60
            while len(seen) < min(stop, count):
                seen.append(int.from_bytes(user.recv(100)[18:], "big"))
            session = party.promote(number, user, UDP)
            user.close()
        thread.join(10)
        assert sorted(seen) == list(range(count))
        party.proxy.engine.close_session(session)
        party.proxy._forget(session.session_id)


class TestHostile:
    def test_what_is_not_ones_own(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        thief = Party(bed)
        before = bed.counters()["calls"].get("violations", 0)
        for call, record in (
            (p.Call.PROMOTE, p.Shared(number)),
            (p.Call.STATUS, p.Shared(number)),
            (p.Call.PUBLISH, p.Publish(number, True, 0)),
            (p.Call.OPTION, p.Option(number, 6, 1, 1, True)),
            (p.Call.LISTEN, p.Listen(number, 5)),
        ):
            with refused(errno.EBADF):
                thief.call(call, record)
        with refused(errno.ECONNABORTED):
            thief.call(p.Call.CLAIM, p.Shared(number))
        one, two = ksocket.socketpair()
        with one, two, open("/dev/null") as null:
            for fds in ([one.fileno()], [null.fileno()], [], [one.fileno(), two.fileno()]):
                with pytest.raises(OSError):
                    thief.call(p.Call.HOLD, p.Nothing(), fds=fds)
        thief.release(number, abort=True)
        thief.tell(p.Call.STRAY, p.Nothing(), ool=[bytes(100)])
        thief.tell(p.Call.FORGET, p.Forget(number, True))
        thief.tell(p.Call.RETURN, p.Return(number), ool=[bytes(200)])
        wait_for(lambda: bed.counters()["calls"].get("violations", 0) > before, "violations")
        user.sendall(b"unharmed")
        assert peer.recv(100) == b"unharmed"
        # And the holder itself may not treat it as its own.
        party.tell(p.Call.FORGET, p.Forget(number, True))
        party.tell(p.Call.RETURN, p.Return(number), ool=[bytes(200)])
        party.tell(p.Call.SHARE, p.Share(number), ool=[bytes(200)])
        assert party.status(number).state == 4
        finish(user, peer)

    def test_descriptors_that_are_no_pair(self, bed: Bed, listener: ksocket.socket) -> None:
        """Whoever shares with rubbish loses that session (the peer is reset) and nothing else."""
        party, number, user, peer = pair(bed, listener)
        before = bed.server_fds()
        stream = ksocket.socketpair()
        packets = ksocket.socketpair(ksocket.AF_UNIX, ksocket.SOCK_SEQPACKET)
        inet = ksocket.socket()
        reading, writing = os.pipe()
        bad = [
            [user.fileno(), stream[0].fileno()],  # the users' end of another session
            [stream[0].fileno()],
            [],
            [s.fileno() for s in packets],
            [inet.fileno(), stream[0].fileno()],
            [stream[0].fileno(), inet.fileno()],
            [reading, writing],
        ]
        for fds in bad * 2:
            session = party.connect(listener.getsockname())
            other, _ = listener.accept()
            other.settimeout(5)
            party.proxy._declare(session)
            state = party.proxy.engine.export_session(session)
            party.tell(p.Call.SHARE, p.Share(session.session_id), ool=[state], fds=fds)
            with pytest.raises(ConnectionResetError):
                other.recv(1)
            other.close()
        for sock in (*stream, *packets, inet):
            sock.close()
        os.close(reading)
        os.close(writing)
        assert bed.server_fds() <= before + 6  # the application's threads have connections of their own
        user.sendall(b"unharmed")
        assert peer.recv(100) == b"unharmed"
        finish(user, peer)

    def test_a_pair_that_is_torn(self, bed: Bed, listener: ksocket.socket) -> None:
        """The manager's end shut, full or closed behind: the session ends or stands, the server goes on."""
        party = Party(bed)
        for what in ("shut", "unconnected", "two ends of different pairs"):
            session = party.connect(listener.getsockname())
            peer, _ = listener.accept()
            peer.settimeout(5)
            user, manager = ksocket.socketpair()
            extra: list[ksocket.socket] = []
            if what == "shut":
                manager.shutdown(ksocket.SHUT_RDWR)
            elif what == "unconnected":
                extra.append(manager)
                manager = ksocket.socket(ksocket.AF_UNIX)
            else:
                extra.append(manager)
                manager, another = ksocket.socketpair()
                extra.append(another)
            party.proxy._declare(session)
            state = party.proxy.engine.export_session(session)
            party.tell(p.Call.SHARE, p.Share(session.session_id), ool=[state], fds=[user.fileno(), manager.fileno()])
            manager.close()
            with contextlib.suppress(ConnectionResetError):  # the server may have ended it already
                peer.sendall(b"x" * 1000)
            assert party.status(session.session_id) if what.startswith("two") else True
            for sock in (user, *extra):
                sock.close()
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
            peer.close()
        bed.expect_empty()

    def test_a_full_descriptor_stops_nobody_else(self, bed: Bed, listener: ksocket.socket) -> None:
        party, number, user, peer = pair(bed, listener)
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):
                peer.send(bytes(65536))
        other = party.connect(listener.getsockname())
        peer2, _ = listener.accept()
        _, user2 = party.share(other)
        start = time.monotonic()
        for _ in range(50):
            user2.sendall(b"ping")
            assert peer2.recv(10) == b"ping"
        assert time.monotonic() - start < 5
        user.close()
        finish(user2, peer2)
        peer.close()
        assert number

    def test_an_idle_relay_uses_no_processor(self, bed: Bed, listener: ksocket.socket) -> None:
        """Blocked both ways, half closed, or with nothing to do: the server sleeps."""
        party, _, user, peer = pair(bed, listener)
        user.setblocking(False)
        peer.setblocking(False)
        for side in (user, peer):
            for _ in range(3):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        side.send(bytes(65536))
                time.sleep(0.05)

        def ticks() -> int:
            with open(f"/proc/{bed.server.pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        time.sleep(0.2)
        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 10  # of 50 that a busy loop would take
        user.close()
        peer.close()


class TestEnd:
    @pytest.mark.parametrize("how", ["in order", "killed"])
    def test_of_the_server(self, tmp_path: Path, how: str) -> None:
        """Its users see a hang-up, the peer of a server that ended in order a reset."""
        bed = Bed(tmp_path)
        try:
            with bed.b.socket() as listening:
                listening.bind((PEER, 0))
                listening.listen()
                listening.settimeout(10)
                party, _, user, peer = pair(bed, listening)
                _, lifeline = party.fork()
                if how == "killed":
                    bed.server.kill()
                    bed.server.wait()
                else:
                    assert bed.stop() == 0
                    with pytest.raises(ConnectionResetError):
                        peer.recv(1)
                assert user.recv(1) == b"" and lifeline.recv(1) == b""
                for sock in (user, peer, lifeline):
                    sock.close()
        finally:
            bed.close()


class Heritage:
    """A child that attaches with what it inherited."""

    def __init__(self, bed: Bed, heir: int) -> None:
        self.task = Task(bed.path)
        self.server = self.task.look_up(p.SERVICE)
        rights = [PortRight(self.task.allocate(), MsgType.MAKE_SEND)]
        self.call(p.Call.ATTACH, p.Attach(p.VERSION, 0, heir), rights=rights).close()

    def call(self, call: p.Call, record: p.Record, **parts: Any) -> Message:
        message = self.task.rpc(self.server, call, record.pack(), timeout=5, **parts)
        assert int.from_bytes(bytes(message.inline)[:4], "little") == 0
        return message


def read_exactly(sock: ksocket.socket, n: int) -> bytes:
    got = bytearray()
    while len(got) < n:
        part = sock.recv(min(n - len(got), 1 << 18))
        if not part:
            break
        got += part
    return bytes(got)


def home_send(session: Session, data: bytes) -> int:
    """Into a session of this process, as much as it takes now."""
    sock = Socket()
    sock._adopt(session, False)
    sock.setblocking(False)
    try:
        return sock.send(data) if data else 0
    except BlockingIOError:
        return 0
    finally:
        sock._adopt(None, False)
