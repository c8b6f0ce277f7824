"""Shared connections through a real server: plain reads and writes on a descriptor, by several processes."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket as ksocket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests import shared_party
from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from tests.shared_party import (
    Heritage,
    Party,
    finish,
    home_send,
    pair,
    read_all,
    read_exactly,
    refused,
)
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import protocol as p

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

running, bed, listener = shared_party.running, shared_party.bed, shared_party.listener


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
