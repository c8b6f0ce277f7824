"""Sessions through a real server, real processes and a real kernel peer."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import signal
import socket as ksocket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netserver_bed import ADDRESS, NOBODY, PEER, Bed, read_line, wait_for
from ulnet.ipc import MsgType, PortRight, Task
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import protocol as p
from ulnet.stack import socket
from ulnet.stack.proxy import Proxy

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("ns"))
    yield bed
    bed.close()


@pytest.fixture
def bed(shared: Bed) -> Iterator[Bed]:
    """The server, with empty tables before and after each test."""
    yield shared
    shared.end_programs()
    shared.expect_empty()
    tables = shared.tables()
    assert tables["applications"] == 0
    internal = shared.counters()["calls"].get("internal_errors", 0)
    assert internal == 0, shared.log.read_text()


@pytest.fixture
def listener(bed: Bed) -> Iterator[ksocket.socket]:
    """A kernel socket on host b that listens."""
    with bed.b.socket() as sock:
        sock.bind((PEER, 0))
        sock.listen(256)
        sock.settimeout(10)
        yield sock


def tcp(proxy: Proxy, timeout: float | None = 10) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, host=proxy)
    sock.settimeout(timeout)
    return sock


def udp(proxy: Proxy) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, host=proxy)
    sock.settimeout(10)
    return sock


class TestConnect:
    def test_a_session_comes_and_goes(self, bed: Bed, listener: ksocket.socket) -> None:
        app = tcp(bed.proxy())
        app.connect(listener.getsockname())
        peer, address = listener.accept()
        assert address == app.getsockname() and address[0] == ADDRESS
        assert app.getpeername() == listener.getsockname()
        app.sendall(b"question")
        assert peer.recv(100) == b"question"
        peer.sendall(b"answer")
        assert app.recv(100) == b"answer"
        tables = bed.tables()
        assert len(bed.live()) == 1 and tables["flows"] == tables["guarded"] <= 1
        peer.close()
        assert app.recv(100) == b""
        app.close()
        bed.expect_empty()

    def test_the_server_finishes_what_the_application_left(self, bed: Bed, listener: ksocket.socket) -> None:
        """Closed right after a large send: the unsent data travels back to the server, the peer gets it all."""
        app = tcp(bed.proxy())
        listener.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_RCVBUF, 20_000)
        app.connect(listener.getsockname())
        peer, _ = listener.accept()
        data = os.urandom(300_000)
        app.sendall(data)
        app.close()
        (row,) = wait_for(lambda: [r for r in bed.live() if r["place"] == "server"], "a session in the server")
        assert row["owner"] is None and row["state"].startswith("FIN-WAIT")
        assert bed.tables()["flows"] == 0 and bed.tables()["guarded"] == 0
        peer.settimeout(10)
        got = b""
        while chunk := peer.recv(65536):
            got += chunk
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        peer.close()
        # We closed first: RFC 9293 (3.10.7.4) leaves us in TIME-WAIT.
        wait_for(lambda: [r["state"] for r in bed.sessions() if r["id"] == row["id"]] == ["TIME-WAIT"], "TIME-WAIT")

    def test_refused_unreachable_timed_out(self, bed: Bed) -> None:
        proxy = bed.proxy()
        start = time.monotonic()
        with tcp(proxy) as app, pytest.raises(ConnectionRefusedError):
            app.connect((PEER, 9))
        assert time.monotonic() - start < 1
        with tcp(proxy) as app, pytest.raises(OSError) as caught:
            app.connect(("192.0.2.1", 9))
        assert caught.value.errno == errno.ENETUNREACH
        start = time.monotonic()
        with tcp(proxy) as app, pytest.raises(OSError) as caught:
            app.connect((NOBODY, 9))
        assert caught.value.errno == errno.EHOSTUNREACH and time.monotonic() - start < 6
        with tcp(proxy, 0.2) as app, pytest.raises(TimeoutError):
            app.connect(("10.77.0.98", 9))

    def test_not_blocking(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        app = tcp(proxy, 0)
        assert app.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        assert select.select([], [app], [], 5)[1] == [app]
        assert app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        peer, _ = listener.accept()
        assert app.send(b"x") == 1
        assert peer.recv(1) == b"x"
        peer.close()
        with tcp(proxy, 0) as other:
            assert other.connect_ex((PEER, 9)) == errno.EINPROGRESS
            select.select([], [other], [], 5)
            assert other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        wait_for(lambda: select.select([app], [], [], 0)[0], "end of file")
        app.close()

    def test_data_waits_for_the_connection(self, bed: Bed, listener: ksocket.socket) -> None:
        """As with the kernel: EAGAIN for who does not wait, and who waits for data waits for the connection first."""
        app = tcp(bed.proxy(), 0)
        bed.server.send_signal(signal.SIGSTOP)
        try:
            assert app.connect_ex(listener.getsockname()) == errno.EINPROGRESS
            for call in (lambda: app.send(b"x"), lambda: app.recv(1)):
                with pytest.raises(BlockingIOError):
                    call()
            app.settimeout(0.05)
            with pytest.raises(TimeoutError):
                app.send(b"x")
        finally:
            bed.server.send_signal(signal.SIGCONT)
        app.settimeout(5)
        app.sendall(b"early")
        peer, _ = listener.accept()
        assert peer.recv(10) == b"early"
        peer.close()
        assert app.recv(1) == b""
        app.close()

    def test_closed_while_connecting(self, bed: Bed) -> None:
        app = tcp(bed.proxy(), 0)
        assert app.connect_ex((NOBODY, 9)) == errno.EINPROGRESS
        app.close()
        bed.expect_empty(1)

    def test_bound_first(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        app = tcp(proxy)
        app.bind(("", 5555))
        with pytest.raises(ConnectionRefusedError):
            app.connect((PEER, 9))
        app.connect(listener.getsockname())  # the name outlives the attempt
        peer, address = listener.accept()
        assert address == (ADDRESS, 5555)
        peer.close()
        assert app.recv(1) == b""
        app.close()

    def test_names_are_unique_across_applications(self, bed: Bed) -> None:
        one, two = bed.proxy(), bed.proxy()
        with tcp(one) as first, tcp(two) as second:
            first.bind(("", 6000))
            with pytest.raises(OSError) as caught:
                second.bind((ADDRESS, 6000))
            assert caught.value.errno == errno.EADDRINUSE
            with pytest.raises(OSError) as caught:
                second.bind((PEER, 6000))
            assert caught.value.errno == errno.EADDRNOTAVAIL
        with tcp(two) as third:
            third.bind(("", 6000))


class TestAccept:
    def test_sessions_are_accepted_here(self, bed: Bed) -> None:
        proxy = bed.proxy()
        with tcp(proxy) as app:
            app.bind(("", 7000))
            app.listen(8)
            peers = []
            for number in range(12):
                peer = bed.b.socket()
                peer.settimeout(10)
                if number < 8:
                    peer.connect((ADDRESS, 7000))
                    peer.sendall(b"%d" % number)
                    peers.append(peer)
                else:
                    peer.close()
            assert "delivered" not in bed.counters()["sessions"]  # the server has nothing to do with it
            seen = set()
            for _ in range(8):
                session, address = app.accept()
                assert address[0] == PEER and session.getsockname() == (ADDRESS, 7000)
                seen.add(session.recv(10))
                session.sendall(b"ok")
                session.close()
            assert seen == {b"%d" % number for number in range(8)}
            for peer in peers:
                assert peer.recv(10) == b"ok"
                assert peer.recv(10) == b""
                peer.close()
        # The application closed first, TIME-WAIT stays; the peers' FINs ended everything else.
        bed.expect_empty()

    def test_data_under_way_while_the_session_moves(self, bed: Bed) -> None:
        """Peers that send the moment they are connected: every byte arrives, however the hand-over fell into it."""
        app = tcp(bed.proxy())
        app.bind(("", 7004))
        app.listen(64)
        blocks = [os.urandom(200_000) for _ in range(24)]

        def send(block: bytes) -> None:
            with bed.b.socket() as peer:
                peer.settimeout(10)
                peer.connect((ADDRESS, 7004))
                peer.sendall(block)
                peer.shutdown(ksocket.SHUT_WR)
                peer.recv(1)

        senders = [threading.Thread(target=send, args=(block,)) for block in blocks]
        for sender in senders:
            sender.start()
        seen = set()
        for _ in blocks:
            session, _ = app.accept()
            got = b""
            while chunk := session.recv(1 << 20):
                got += chunk
            seen.add(got)
            session.close()
        for sender in senders:
            sender.join(10)
        assert seen == set(blocks)
        app.close()
        engine = bed.counters()["engine"]
        # A server that is busy with all of them for 60 ms may ask after a FIN whose acknowledgement lies in its ring.
        retransmits = engine["tcp_retransmits"] - engine["tcp_tail_probes"]
        assert retransmits <= 0

    def test_close_of_the_listener_resets_who_waits(self, bed: Bed) -> None:
        app = tcp(bed.proxy())
        app.bind(("", 7001))
        app.listen(1)
        peers = [bed.b.socket() for _ in range(2)]
        for peer in peers:
            peer.settimeout(5)
            peer.connect((ADDRESS, 7001))
        app.close()
        for peer in peers:
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
            peer.close()
        bed.expect_empty()
        with bed.b.socket() as late:
            late.settimeout(5)
            with pytest.raises(ConnectionRefusedError):
                late.connect((ADDRESS, 7001))

    def test_the_endpoint_stays_guarded_as_long_as_a_session_lives(self, bed: Bed) -> None:
        app = tcp(bed.proxy())
        app.bind(("", 7002))
        app.listen(4)
        peer = bed.b.socket()
        peer.settimeout(5)
        peer.connect((ADDRESS, 7002))
        session, _ = app.accept()
        app.close()
        assert bed.tables()["guarded"] == 1
        session.sendall(b"still here")
        assert peer.recv(100) == b"still here"
        peer.close()
        assert session.recv(1) == b""
        session.close()
        bed.expect_empty()

    def test_two_applications_of_one_address(self, bed: Bed) -> None:
        one, two = bed.proxy(), bed.proxy()
        with tcp(one) as app:
            app.bind(("", 7003))
            app.listen(4)
            with tcp(two) as client:
                client.connect((ADDRESS, 7003))
                session, address = app.accept()
                assert address == client.getsockname()
                client.sendall(b"hello")
                assert session.recv(100) == b"hello"
                session.sendall(b"world")
                assert client.recv(100) == b"world"
                session.close()
                assert client.recv(1) == b""
        bed.expect_empty()


class TestUdp:
    def test_bound_and_connected(self, bed: Bed) -> None:
        proxy = bed.proxy()
        with bed.b.socket(type=ksocket.SOCK_DGRAM) as peer, udp(proxy) as app:
            peer.bind((PEER, 0))
            peer.settimeout(5)
            app.bind(("", 5353))
            peer.sendto(b"one", (ADDRESS, 5353))
            assert app.recvfrom(100) == (b"one", peer.getsockname())
            app.sendto(b"two", peer.getsockname())
            assert peer.recvfrom(100) == (b"two", (ADDRESS, 5353))
            app.connect(peer.getsockname())  # narrowed: others are not heard any more
            with bed.b.socket(type=ksocket.SOCK_DGRAM) as stranger:
                stranger.sendto(b"noise", (ADDRESS, 5353))
                peer.sendto(b"three", (ADDRESS, 5353))
                assert app.recv(100) == b"three"
            app.send(b"four")
            assert peer.recv(100) == b"four"
            assert bed.tables()["flows"] == 1
        bed.expect_empty()

    def test_first_send_finds_the_neighbour(self, bed: Bed) -> None:
        with udp(bed.proxy()) as app, bed.b.socket(type=ksocket.SOCK_DGRAM) as peer:
            peer.bind((PEER, 0))
            peer.settimeout(5)
            app.sendto(b"x", peer.getsockname())
            assert peer.recv(10) == b"x"
            with pytest.raises(OSError) as caught:
                app.sendto(b"x", (NOBODY, 9))
            assert caught.value.errno == errno.EHOSTUNREACH


class TestDeath:
    def test_a_killed_application(self, bed: Bed, listener: ksocket.socket) -> None:
        before = bed.server_fds()
        program = bed.program(
            "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
            "l = socket.create_server(('', 7100)); c, _ = l.accept()\n"
            "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 7100))\n"
            "b = socket.socket(); b.bind(('', 7101))\n"
            "print('up', flush=True)\n"
            "while True: s.sendall(bytes(100_000))\n",
            PEER,
            str(listener.getsockname()[1]),
        )
        peer, _ = listener.accept()
        other = bed.b.socket()
        other.settimeout(5)
        wait_for(lambda: other.connect_ex((ADDRESS, 7100)) == 0, "the listener")
        assert read_line(program) == "up"
        peer.recv(1000)
        assert len(bed.live()) == 5
        time.sleep(0.3)  # the window is closed by now: much is left to send
        start = time.monotonic()
        program.kill()
        with pytest.raises(ConnectionResetError):
            while peer.recv(1 << 20):
                pass
        assert other.recv(1) == b""  # nothing was lost there: an end in order, as the kernel has it
        assert time.monotonic() - start < 1
        program.wait()
        peer.close()
        other.close()
        bed.expect_empty()
        assert bed.tables()["applications"] == 0 and bed.tables()["quarantined"] >= 1
        wait_for(lambda: bed.server_fds() <= before, "descriptors back")

    def test_the_server_stands_still_and_data_flows_on(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        app = tcp(proxy)
        app.connect(listener.getsockname())
        peer, _ = listener.accept()
        data = os.urandom(1 << 20)
        bed.server.send_signal(signal.SIGSTOP)
        try:
            sender = threading.Thread(target=lambda: [peer.sendall(data) for _ in range(8)])
            sender.start()
            digest, left = hashlib.sha256(), 8 << 20
            while left:
                chunk = app.recv(1 << 20)
                digest.update(chunk)
                left -= len(chunk)
            sender.join(5)
            assert digest.digest() == hashlib.sha256(data * 8).digest()
            with tcp(proxy, 3) as another:  # from a leased port
                another.connect(listener.getsockname())
            listener.accept()[0].close()
        finally:
            bed.server.send_signal(signal.SIGCONT)
        peer.close()
        assert app.recv(1) == b""
        app.close()

    def test_an_ordinary_user(self, bed: Bed, listener: ksocket.socket) -> None:
        """No user id 0 and no capability in the program: it talks, but gets no port below 1024."""
        program = bed.program(
            "import os, errno; import ulnet.stack.proxy; 'x'.encode('idna')\n"
            "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
            "s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.sendall(b'hello'); s.recv(1)\n"
            "try: socket.create_server(('', 80))\n"
            "except PermissionError as e: print(e.errno == errno.EACCES, flush=True)\n",
            PEER,
            str(listener.getsockname()[1]),
        )
        bed.folder.chmod(0o755)
        for folder in list(bed.folder.parents)[:-2]:
            folder.chmod(folder.stat().st_mode | 0o011)
        peer, _ = listener.accept()
        assert peer.recv(100) == b"hello"
        peer.close()
        assert read_line(program) == "True"
        assert program.wait(10) == 0

    def test_leaving_in_order_gives_everything_back(self, bed: Bed, listener: ksocket.socket) -> None:
        program = bed.program(
            "s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.sendall(b'last words')",
            PEER,
            str(listener.getsockname()[1]),
        )
        peer, _ = listener.accept()
        assert program.wait(10) == 0
        assert peer.recv(100) == b"last words"
        assert peer.recv(100) == b""  # FIN, not RST
        peer.close()
        bed.expect_empty()


class TestMany:
    def test_in_a_row(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        fds: list[int] = []
        for number in range(300):
            app = tcp(proxy)
            app.connect(listener.getsockname())
            peer, _ = listener.accept()
            app.sendall(b"x")
            assert peer.recv(1) == b"x"
            peer.close()  # the peer closes first, so that nothing of ours stays in TIME-WAIT
            assert app.recv(1) == b""
            app.close()
            if number in (20, 299):
                fds += [len(os.listdir("/proc/self/fd")), bed.server_fds()]
        assert fds[2] <= fds[0] and fds[3] <= fds[1], fds
        bed.expect_empty()

    def test_at_once(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        apps = [tcp(proxy, 0) for _ in range(200)]
        for app in apps:
            assert app.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        peers = [listener.accept()[0] for _ in apps]
        for app in apps:
            assert select.select([], [app], [], 10)[1] == [app]
            app.settimeout(10)
            app.sendall(b"y")
        for peer in peers:
            assert peer.recv(1) == b"y"
        assert len(bed.live()) == 200
        for peer in peers:
            peer.close()
        for app in apps:
            assert app.recv(1) == b""
            app.close()
        bed.expect_empty()


class TestHostileApplications:
    def test_the_guard_stands(self, bed: Bed, listener: ksocket.socket) -> None:
        """With its own descriptor an application sends from its own endpoints only."""
        proxy = bed.proxy()
        app = tcp(proxy)
        app.connect(listener.getsockname())
        peer, _ = listener.accept()
        before = bed.counters()["guard"]["refused"]
        head = bed.b.mac + bed.a.mac + b"\x08\x00"
        ip = bytes.fromhex("4500001c0000400040110000") + ksocket.inet_aton(ADDRESS) + ksocket.inet_aton(PEER)
        with pytest.raises(OSError) as caught:  # a datagram from a port that is not its own
            proxy.link.send_frame(head + ip + bytes.fromhex("0035003500080000"))
        assert caught.value.errno == errno.ENOBUFS
        assert bed.counters()["guard"]["refused"] == before + 1
        peer.close()
        assert app.recv(1) == b""
        app.close()

    def raw(self, bed: Bed) -> tuple[Task, int, int]:
        """A task that speaks the protocol by hand: it, the server's port, its serial."""
        task = Task(bed.path)
        server = task.look_up(p.SERVICE)
        port = task.allocate()
        rights = [PortRight(port, MsgType.MAKE_SEND)]
        reply = task.rpc(server, p.Call.ATTACH, p.Attach(p.VERSION, 0).pack(), rights=rights, timeout=5)
        attached = p.Attached.unpack(bytes(reply.inline))
        assert attached.error == 0 and len(reply.fds) == 4
        reply.close()
        return task, server, attached.serial

    def error(self, task: Task, server: int, call: int, data: bytes, **parts: Any) -> int:
        reply = task.rpc(server, call, data, timeout=5, **parts)
        return int.from_bytes(bytes(reply.inline)[:4], "little")

    def test_who_is_not_attached_gets_nothing(self, bed: Bed) -> None:
        with Task(bed.path) as task:
            server = task.look_up(p.SERVICE)
            assert self.error(task, server, p.Call.BIND, p.Bind(1 << 32 | 1, 6, "0.0.0.0", 0).pack()) == errno.ENOTCONN
            assert self.error(task, server, p.Call.ATTACH, p.Attach(99, 0).pack()) == errno.EPROTONOSUPPORT
            assert self.error(task, server, p.Call.ATTACH, p.Attach(p.VERSION, 0).pack()) == errno.EINVAL

    def test_garbage(self, bed: Bed) -> None:
        task, server, _ = self.raw(bed)
        with task:
            for call in [*p.Call, 0, 9299, 9349, 12345]:
                for data in (b"", b"\0", os.urandom(40), os.urandom(1000)):
                    if call in p.REQUESTS and len(data) == p.REQUESTS[call].size():
                        continue
                    if call in p.ONE_WAY:
                        task.send(server, call, data, timeout=5)
                    else:
                        assert self.error(task, server, call, data) == errno.EPROTO
            assert self.error(task, server, p.Call.ATTACH, p.Attach(p.VERSION, 0).pack()) == errno.EISCONN
        assert bed.counters()["calls"]["violations"] >= 30

    def test_sessions_of_others(self, bed: Bed, listener: ksocket.socket) -> None:
        app = tcp(bed.proxy())
        app.connect(listener.getsockname())
        peer, _ = listener.accept()
        (row,) = bed.live()
        task, server, serial = self.raw(bed)
        with task:
            assert self.error(task, server, p.Call.LISTEN, p.Listen(row["id"], 5).pack()) == errno.EBADF
            assert self.error(task, server, p.Call.BIND, p.Bind(row["id"], 6, "0.0.0.0", 0).pack()) == errno.EBADF
            for call, data, ool in (
                (p.Call.FORGET, p.Forget(row["id"], True).pack(), []),
                (p.Call.RETURN, p.Return(row["id"]).pack(), [bytes(500)]),
                (p.Call.ACCEPTED, p.Accepted(row["id"], 5).pack(), []),
                (p.Call.STRAY, b"", [bytes(100), os.urandom(60)]),
            ):
                task.send(server, call, data, ool=ool, timeout=5)
            # a number of its own, but of the server's half
            number = serial << 32 | p.SERVER_NUMBER | 1
            assert self.error(task, server, p.Call.BIND, p.Bind(number, 6, "0.0.0.0", 0).pack()) == errno.EBADF
            app.sendall(b"unharmed")
            assert peer.recv(100) == b"unharmed"
        peer.close()
        assert app.recv(1) == b""
        app.close()

    def test_a_state_of_another_flow(self, bed: Bed, listener: ksocket.socket) -> None:
        proxy = bed.proxy()
        victim, thief = tcp(proxy), tcp(proxy)
        victim.connect(listener.getsockname())
        peer, _ = listener.accept()
        thief.connect(listener.getsockname())
        other, _ = listener.accept()
        assert thief.session is not None
        proxy._declare(thief.session)
        state = bytearray(proxy.engine.export_session(thief.session))
        lport = victim.getsockname()[1]
        state[40:42] = lport.to_bytes(2, "little")
        assert p.flow_of_state(state)[:3] == (6, ADDRESS, lport)
        proxy._post(p.Call.RETURN, p.Return(thief.session.session_id), ool=[bytes(state)])
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        victim.sendall(b"unharmed")
        assert peer.recv(100) == b"unharmed"
        peer.close()
        other.close()
        assert victim.recv(1) == b""
        victim.close()

    def test_a_state_that_is_no_state(self, bed: Bed, listener: ksocket.socket) -> None:
        """Whoever returns rubbish loses that session (the peer is reset) and nothing else."""
        proxy = bed.proxy()
        app = tcp(proxy)
        app.connect(listener.getsockname())
        peer, _ = listener.accept()
        (row,) = bed.live()
        assert app.session is not None
        proxy._declare(app.session)
        proxy._post(p.Call.RETURN, p.Return(row["id"]), ool=[os.urandom(400)])
        peer.settimeout(5)
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        peer.close()
        bed.expect_empty()
        app.close()

    def test_credits_that_never_were(self, bed: Bed) -> None:
        task, server, serial = self.raw(bed)
        with task:
            number = serial << 32 | 1
            assert self.error(task, server, p.Call.BIND, p.Bind(number, 6, "0.0.0.0", 7200).pack()) == 0
            assert self.error(task, server, p.Call.LISTEN, p.Listen(number, 5).pack()) == 0
            before = bed.counters()["calls"].get("violations", 0)
            task.send(server, p.Call.ACCEPTED, p.Accepted(number, 1000).pack(), timeout=5)
            wait_for(lambda: bed.counters()["calls"].get("violations", 0) > before, "a violation")
            assert self.error(task, server, p.Call.CONNECT, p.Connect(number, 6, PEER, 9).pack()) == errno.EISCONN


class TestEnd:
    def test_the_interface_goes(self, tmp_path: Any) -> None:
        bed = Bed(tmp_path)
        try:
            with bed.a.netlink() as ip:
                ip.link("del", index=bed.a.interface.index)
            assert bed.server.wait(5) == 1
            assert "no interface 'eth0'" in bed.log.read_text()
        finally:
            bed.close()

    def test_the_server_ends(self, tmp_path: Any) -> None:
        bed = Bed(tmp_path)
        try:
            proxy = bed.proxy()
            with bed.b.socket() as listening:
                listening.bind((PEER, 0))
                listening.listen()
                listening.settimeout(5)
                app = tcp(proxy)
                app.connect(listening.getsockname())
                peer, _ = listening.accept()
                peer.settimeout(5)
                left = tcp(proxy)
                left.connect(listening.getsockname())
                half, _ = listening.accept()
                left.close()
                wait_for(lambda: [r for r in bed.sessions() if r["state"] == "FIN-WAIT-2"], "a session of the server's")
                assert bed.stop() == 0
                with pytest.raises(ConnectionResetError):
                    peer.recv(1)
                peer.close()
                # RST in CLOSE-WAIT: Linux says EPIPE
                assert wait_for(lambda: half.getsockopt(ksocket.SOL_SOCKET, ksocket.SO_ERROR), "RST") == errno.EPIPE
                half.close()
            wait_for(lambda: not proxy.server_alive, "news of the server's end")
            start = time.monotonic()
            with pytest.raises(OSError) as caught:
                tcp(proxy).connect((PEER, 9))
            assert caught.value.errno == errno.ENETDOWN and bed.path in str(caught.value)
            assert time.monotonic() - start < 1
            app.close()
        finally:
            bed.close()

    def test_the_server_is_killed_and_sessions_go_on(self, tmp_path: Any) -> None:
        bed = Bed(tmp_path)
        try:
            proxy = bed.proxy()
            with bed.b.socket() as listening:
                listening.bind((PEER, 0))
                listening.listen()
                listening.settimeout(5)
                app = tcp(proxy)
                app.connect(listening.getsockname())
                peer, _ = listening.accept()
                peer.settimeout(5)
                bed.server.kill()
                bed.server.wait()
                wait_for(lambda: not proxy.server_alive, "news of the server's end")
                app.sendall(b"still here")
                assert peer.recv(100) == b"still here"
                peer.sendall(b"me too")
                assert app.recv(100) == b"me too"
                app.close()
                assert peer.recv(100) == b""
                peer.close()
                bed.server = bed.start()  # its socket files and rules lie there still
                with tcp(bed.proxy()) as again:
                    again.connect(listening.getsockname())
                    peer, _ = listening.accept()
                    again.sendall(b"new life")
                    assert peer.recv(100) == b"new life"
                    peer.close()
        finally:
            bed.close()
