"""Sudden ends: of a program in the middle of everything, of the server in order, of the server by SIGKILL."""

from __future__ import annotations

import errno
import signal
import socket as ksocket
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.beds import ADDRESS, PEER, App, AppError, Hosts, meanwhile, open_files
from tests.acceptance.shell import digest_of, receive_into, send_stream
from tests.netserver_bed import wait_for
from ulnet.kernelshim.testbed import can_testbed

PROMPT_S = 5.0  # of a RST; some milliseconds on a machine that is not loaded


def expect_reset(sock: ksocket.socket, *, sending: bool = False) -> None:
    """The peer is reset promptly, not left to its time-outs. What was on its way before may still be read."""
    sock.settimeout(PROMPT_S)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            if sending:
                sock.sendall(bytes(65536))
            elif not sock.recv(1 << 20):
                raise AssertionError("the peer saw an orderly end")


def expect_end(sock: ksocket.socket) -> None:
    """The peer of a connection of which nothing was lost sees an end in order, as from a kernel socket."""
    sock.settimeout(PROMPT_S)
    assert sock.recv(1) == b""


def connect(hosts: Hosts, app: App, name: str = "s") -> ksocket.socket:
    with hosts.listener() as listener:
        app.do(f"{name} = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout=60)")
        peer, _ = listener.accept()
    peer.settimeout(30)
    return peer


class TestAProgramIsKilled:
    """SIGKILL: the peers hear of it at once, and the server forgets it."""

    def test_while_it_sends(self, hosts: Hosts) -> None:
        app = hosts.app()
        peer = connect(hosts, app)
        app.start("send_stream(s, 1 << 40, 1)")
        receive_into(peer, 8 << 20)
        time.sleep(0.3)  # much is left to send by now: the window is closed
        app.kill()
        expect_reset(peer)
        peer.close()
        hosts.expect_nothing()

    def test_while_it_sends_into_a_closed_window(self, hosts: Hosts) -> None:
        app = hosts.app()
        peer = connect(hosts, app)
        app.start("send_stream(s, 1 << 40, 1)")
        time.sleep(0.5)  # nobody reads: the window is closed
        app.kill()
        expect_reset(peer)
        peer.close()
        hosts.expect_nothing()

    def test_while_it_receives(self, hosts: Hosts) -> None:
        app = hosts.app()
        peer = connect(hosts, app)
        app.start("receive_into(s, 1 << 40)", "eval")
        send_stream(peer, 8 << 20, 1)
        app.kill()
        expect_reset(peer, sending=True)
        peer.close()
        hosts.expect_nothing()

    def test_while_data_waits_for_it(self, hosts: Hosts) -> None:
        """It never read what was sent: the ring and the buffers are full of it."""
        app = hosts.app()
        peer = connect(hosts, app)
        peer.settimeout(0.5)
        with pytest.raises(TimeoutError):
            send_stream(peer, 1 << 30, 1)
        app.kill()
        expect_reset(peer, sending=True)
        peer.close()
        hosts.expect_nothing()

    def test_with_connections_in_the_queue(self, hosts: Hosts) -> None:
        """More of them than the backlog: some were pushed to the program, some wait in the server."""
        app = hosts.app()
        app.do("l = socket.create_server(('', 0), backlog=2)")
        port = app.value("l.getsockname()[1]")
        peers = [hosts.b.socket() for _ in range(5)]
        for peer in peers:
            peer.settimeout(0.3)
        there = [peer for peer in peers if peer.connect_ex((ADDRESS, port)) == 0]
        assert len(there) >= 2
        # Each has its answer; the ACK of the last one may not have been looked at.
        wait_for(lambda: app.value("len(host.engine.sessions())") > len(there), "all of them, and the listener")
        app.kill()
        for peer in there:
            expect_reset(peer)
        for peer in peers:
            peer.close()
        hosts.expect_nothing()
        with hosts.b.socket() as late:
            late.settimeout(PROMPT_S)
            with pytest.raises(ConnectionRefusedError):
                late.connect((ADDRESS, port))

    def test_with_udp_sockets(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.do("u = udp_socket()")
        port = app.value("u.getsockname()[1]")
        with hosts.datagrams() as sock:
            sock.connect((ADDRESS, port))
            sock.send(b"x")
            app.do("u.recv(1)")
            app.kill()
            hosts.expect_nothing()
            sock.send(b"y")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(1)

    def test_while_it_connects(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.start("socket.create_connection(('10.77.0.99', 9), timeout=30)")  # nobody answers ARP there
        time.sleep(0.3)
        app.kill()
        hosts.expect_nothing()

    def test_again_and_again(self, hosts: Hosts) -> None:
        """Descriptors of the server, its memory mappings included, come back each time."""
        files = 0
        for number in range(4):
            app = hosts.app()
            peers = [connect(hosts, app, f"s{n}") for n in range(5)]
            app.do("l = socket.create_server(('', 0)); u = udp_socket()")
            app.kill()
            for peer in peers:
                expect_end(peer)
                peer.close()
            hosts.expect_nothing()
            if not number:
                files = open_files(hosts.server.pid)
        wait_for(lambda: open_files(hosts.server.pid) <= files, f"descriptors of the server back to {files}")

    def test_its_listening_port_can_be_taken_again_at_once(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.do("l = socket.create_server(('', 0))")
        port = app.value("l.getsockname()[1]")
        peer = hosts.dial(port)
        app.do("s, _ = l.accept()")
        app.kill()
        expect_end(peer)
        peer.close()
        hosts.expect_nothing()
        again = hosts.app()
        again.do(f"l = socket.create_server(('', {port}))")  # with SO_REUSEADDR, as servers do
        peer = hosts.dial(port)
        again.do("s, _ = l.accept(); s.sendall(b'back')")
        assert peer.recv(10) == b"back"
        peer.close()


@pytest.fixture
def own() -> Iterator[Hosts]:
    """A server that the test may end."""
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    hosts = Hosts()
    yield hosts
    hosts.close()


def expect_new_calls_to_fail_at_once(hosts: Hosts, app: App) -> None:
    """One clear line, the right errno, no waiting."""
    for code in (
        f"socket.create_connection(('{PEER}', 9), timeout=30)",
        "socket.create_server(('', 0))",
        "udp_socket()",
    ):
        start = time.monotonic()
        with pytest.raises(AppError) as caught:
            app.do(code)
        assert caught.value.errno == errno.ENETDOWN, caught.value
        assert hosts.path in str(caught.value) and "\n" not in str(caught.value)
        assert time.monotonic() - start < PROMPT_S
    assert app.value("host.server_alive") is False


class TestTheServerEndsInOrder:
    """SIGTERM: what applications hold is reset, for nobody would clean up after them (netserver/server.py)."""

    def test_while_programs_run(self, own: Hosts) -> None:
        app = own.app()
        peer = connect(own, app)
        app.do("l = socket.create_server(('', 0)); u = udp_socket(); threads = []")
        waiting = own.dial(app.value("l.getsockname()[1]"))
        app.start("receive_into(s, 1 << 30)", "eval")
        with meanwhile(own.stop) as status:
            expect_reset(peer, sending=True)
        assert status == [0]
        expect_reset(waiting)
        # The session's own end learns it, too: by the rest of its calls, if not by the one under way.
        with pytest.raises(AppError) as caught:
            app.answer(30)
        assert caught.value.errno in (errno.ECONNRESET, errno.ENETDOWN, errno.ETIMEDOUT), caught.value
        expect_new_calls_to_fail_at_once(own, app)
        with pytest.raises(AppError) as caught:
            app.do("l.settimeout(5); l.accept()")
        assert caught.value.errno is not None
        assert app.end() == 0
        peer.close()
        waiting.close()
        # Nothing of it is left: no socket file, no rules; the same address can be served again.
        own.server = own.start()
        again = own.app()
        peer = connect(own, again)
        again.do("s.sendall(b'new')")
        assert peer.recv(10) == b"new"
        peer.close()

    def test_leaves_no_rules(self, own: Hosts) -> None:
        assert own.stop() == 0
        assert not (own.folder / "netserver.sock").exists()
        ruleset = own.a.popen(["nft", "list", "ruleset"], stdout=-1) if _has_nft() else None
        if ruleset is not None:
            out, _ = ruleset.communicate(timeout=10)
            assert out.strip() == b""


def _has_nft() -> bool:
    import shutil

    return shutil.which("nft") is not None


class TestTheServerIsKilled:
    """SIGKILL: sessions that applications hold go on; new ones need the server."""

    @pytest.mark.parametrize("way", ["receiving", "sending"])
    def test_in_the_middle_of_a_transfer(self, own: Hosts, way: str) -> None:
        app = own.app()
        peer = connect(own, app)
        size = 64 << 20
        if way == "receiving":
            app.start(f"receive_into(s, {size})", "eval")
            head = 8 << 20
            half = list(_pieces(size))
            for piece in half[: head >> 20]:
                peer.sendall(piece)
            own.server.kill()
            own.server.wait()
            for piece in half[head >> 20 :]:
                peer.sendall(piece)
            assert app.answer() == digest_of(size, 1)
        else:
            app.start(f"send_stream(s, {size}, 1)")
            with meanwhile(receive_into, peer, size) as got:
                own.server.kill()
                own.server.wait()
                app.answer()
            assert got == [digest_of(size, 1)]
        wait_for(lambda: not app.value("host.server_alive"), "the news in the program")
        expect_new_calls_to_fail_at_once(own, app)
        # The end of a session without a server: the program runs it itself.
        app.do("s.shutdown(socket.SHUT_WR)")
        assert peer.recv(1) == b""
        peer.sendall(b"last")
        peer.close()
        app.do("assert receive_exactly(s, 10) == b'last'; s.close()")
        assert app.end() == 0

    def test_listeners_and_connects_fail(self, own: Hosts) -> None:
        app, other = own.app(), own.app()
        app.do("l = socket.create_server(('', 0))")
        app.start("l.accept()")
        other.start("socket.create_connection(('10.77.0.99', 9), timeout=30)")
        time.sleep(0.3)
        own.server.kill()
        own.server.wait()
        start = time.monotonic()
        for each in (app, other):
            with pytest.raises(AppError) as caught:
                each.answer(30)
            assert caught.value.errno == errno.ENETDOWN
        assert time.monotonic() - start < PROMPT_S

    def test_restart_over_what_it_left(self, own: Hosts) -> None:
        """A stale socket file, stale rules, applications of old: a new server serves the same address."""
        app = own.app()
        peer = connect(own, app)
        app.do("u = udp_socket()")
        own.server.kill()
        own.server.wait()
        own.server = own.start()
        again = own.app()
        other = connect(own, again)
        again.do("s.sendall(b'new')")
        assert other.recv(10) == b"new"
        again.do("u = udp_socket(7000)")
        with own.datagrams() as sock:
            sock.sendto(b"x", (ADDRESS, 7000))
            again.do("data, who = u.recvfrom(10); u.sendto(data, who)")
            assert sock.recv(10) == b"x"
        # The old application's new calls fail; its program ends in order all the same.
        expect_new_calls_to_fail_at_once(own, app)
        peer.close()
        assert app.end() == 0
        other.close()
        assert again.end() == 0
        own.expect_nothing()
        assert own.stop() == 0

    def test_a_program_joins_the_new_server(self, own: Hosts) -> None:
        """After a restart the default host attaches anew (proxy.connect_default)."""
        app = own.app()
        app.do(f"os.environ['ULNET_SERVER'] = {own.path!r}; socket.set_default_host(None)\nold = udp_socket()")
        own.server.kill()
        own.server.wait()
        own.server = own.start()
        wait_for(lambda: not app.value("old.host.server_alive"), "the news in the program")
        app.do("u = udp_socket(7001)")
        with own.datagrams() as sock:
            sock.sendto(b"x", (ADDRESS, 7001))
            assert app.value("u.recv(10).decode()") == "x"


def test_the_server_stands_still_for_a_while(own: Hosts) -> None:
    """SIGSTOP: who holds a session notices nothing; set-up waits and goes on afterwards."""
    app = own.app()
    peer = connect(own, app)
    own.server.send_signal(signal.SIGSTOP)
    try:
        size = 32 << 20
        with meanwhile(send_stream, peer, size, 1):
            assert app.value(f"receive_into(s, {size})") == digest_of(size, 1)
        with own.listener() as listener:
            app.start(f"t = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout=30)")
            time.sleep(0.3)
            own.server.send_signal(signal.SIGCONT)
            app.answer()
            listener.accept()[0].close()
    finally:
        own.server.send_signal(signal.SIGCONT)
    peer.close()
    assert app.end() == 0
    own.expect_nothing()


def _pieces(size: int) -> Iterator[memoryview]:
    from tests.acceptance.shell import blocks

    return blocks(size, 1)
