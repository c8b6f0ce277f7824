"""Shared listeners and datagram sessions through a real server, and users who mean harm."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as ksocket
import struct
import threading
import time

import pytest

from tests import shared_party
from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from tests.shared_party import (
    TCP,
    UDP,
    Party,
    finish,
    pair,
    refused,
)
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import protocol as p
from ulnet.stack import socket

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

running, bed, listener = shared_party.running, shared_party.bed, shared_party.listener


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
