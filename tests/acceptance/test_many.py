"""Connections in numbers, one after another and at once, as client and as server: afterwards nothing is left.

200 in a row and 100 at once; with ULNET_SOAK=1 it is 1,000 and 200.
"""

from __future__ import annotations

import socket as ksocket
from dataclasses import dataclass

import pytest

from tests.acceptance.beds import PEER, SOAK, App, Hosts, meanwhile, open_files, rss_kib
from tests.netserver_bed import wait_for

IN_A_ROW = 1000 if SOAK else 200
AT_ONCE = 200 if SOAK else 100
WARM_UP = 50
SERVER_KIB_EACH = 6  # a session in TIME-WAIT, and its name
SLACK_KIB = 4 << 10
PYZMQ_FILES = 7  # made once, when it first sends a large message (a long table) without a copy
THREADS = 3  # of a program: its own, the one that receives, the helper

pytestmark = pytest.mark.timeout(300 if SOAK else 120)

SETUP = f"""
def exchange(s):
    s.sendall(b'x' * 3000)
    return receive_exactly(s, 3000) == b'y' * 3000

def finish(s, we_close_first):
    if not we_close_first:
        assert s.recv(1) == b''
    s.close()

def call(port, count):
    good = 0
    for number in range(count):
        s = socket.create_connection(('{PEER}', port), timeout=30)
        good += exchange(s)
        finish(s, number % 2)
    return good

def answer(l, count):
    good = 0
    for number in range(count):
        s, _ = l.accept()
        s.settimeout(30)
        good += exchange(s)
        finish(s, number % 2)
    return good

def call_at_once(port, count):
    every = [socket.socket() for _ in range(count)]
    for s in every:
        s.setblocking(False)
        assert s.connect_ex(('{PEER}', port)) == errno.EINPROGRESS
    return use_at_once(every)

def answer_at_once(l, count):
    return use_at_once([l.accept()[0] for _ in range(count)])

def use_at_once(every):
    for s in every:
        s.settimeout(30)
        s.sendall(b'x' * 3000)
    good = sum(receive_exactly(s, 3000) == b'y' * 3000 for s in every)
    for number, s in enumerate(every):
        finish(s, number % 2)
    return good
"""


@dataclass
class Usage:
    """Of the server and of the application, from outside."""

    server_kib: int
    server_files: int
    app_kib: int
    app_files: int


def usage(hosts: Hosts, app: App) -> Usage:
    server = hosts.server.pid
    return Usage(rss_kib(server), open_files(server), rss_kib(app.pid), open_files(app.pid))


def exchange(sock: ksocket.socket) -> None:
    """The other end of the program's exchange()."""
    data = b""
    while len(data) < 3000 and (piece := sock.recv(3000)):
        data += piece
    assert data == b"x" * 3000
    sock.sendall(b"y" * 3000)


def finish(sock: ksocket.socket, they_close_first: bool) -> None:
    if they_close_first:
        assert sock.recv(1) == b""
    sock.close()


def serve(listener: ksocket.socket, count: int) -> None:
    for number in range(count):
        sock, _ = listener.accept()
        sock.settimeout(30)
        exchange(sock)
        finish(sock, bool(number % 2))


def serve_at_once(listener: ksocket.socket, count: int) -> None:
    every = [listener.accept()[0] for _ in range(count)]
    use_at_once(every)


def use_at_once(every: list[ksocket.socket]) -> None:
    for sock in every:
        sock.settimeout(30)
        exchange(sock)
    # Half of them are closed by the program first, in its order and not in ours: shut down our halves, then read on.
    for sock in every:
        sock.shutdown(ksocket.SHUT_WR)
    for sock in every:
        assert sock.recv(1) == b""
        sock.close()


def expect_gone(hosts: Hosts, app: App, before: Usage, count: int) -> None:
    hosts.expect_nothing(applications=1)
    # For two seconds the library remembers sessions it gave back, to forward what still comes for them; and who closes
    # first is in TIME-WAIT.
    waiting = "sum(row['state'] == 'TIME-WAIT' for row in host.engine.sessions())"
    wait_for(lambda: app.value(f"host.engine.counters()['sessions'] - {waiting}") == 0, "no session in the program")
    app.do("import gc; gc.collect()")
    # Each thread of the program that has had something to say keeps a connection to the server.
    most = before.server_files + THREADS + PYZMQ_FILES
    wait_for(lambda: open_files(hosts.server.pid) <= most, f"descriptors of the server back to {most}")
    after = usage(hosts, app)
    print(f"\n{count} connections: {before} -> {after}; {hosts.tables()}")
    assert after.app_files <= before.app_files + 2 * THREADS
    assert after.server_kib - before.server_kib < SLACK_KIB + count * SERVER_KIB_EACH
    assert after.app_kib - before.app_kib < SLACK_KIB


def test_client_in_a_row(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(SETUP)
    with hosts.listener() as listener:
        port = listener.getsockname()[1]
        for count in (WARM_UP, IN_A_ROW):
            before = usage(hosts, app)
            with meanwhile(serve, listener, count):
                assert app.value(f"call({port}, {count})") == count
    expect_gone(hosts, app, before, IN_A_ROW)


def test_server_in_a_row(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(SETUP + "\nl = socket.create_server(('', 6000)); l.settimeout(30)")
    for count in (WARM_UP, IN_A_ROW):
        before = usage(hosts, app)
        app.start(f"answer(l, {count})", "eval")
        for number in range(count):
            sock = hosts.dial(6000)
            exchange(sock)
            finish(sock, bool(number % 2))
        assert app.answer() == count
    app.do("l.close()")
    expect_gone(hosts, app, before, IN_A_ROW)


def test_client_at_once(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(SETUP)
    with hosts.listener() as listener:
        port = listener.getsockname()[1]
        for _ in range(2):
            before = usage(hosts, app)
            with meanwhile(serve_at_once, listener, AT_ONCE):
                assert app.value(f"call_at_once({port}, {AT_ONCE})") == AT_ONCE
    expect_gone(hosts, app, before, AT_ONCE)


def test_server_at_once(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(SETUP + "\nl = socket.create_server(('', 6001), backlog=64); l.settimeout(30)")
    for _ in range(2):
        before = usage(hosts, app)
        app.start(f"answer_at_once(l, {AT_ONCE})", "eval")
        use_at_once([hosts.dial(6001) for _ in range(AT_ONCE)])
        assert app.answer() == AT_ONCE
    app.do("l.close()")
    expect_gone(hosts, app, before, AT_ONCE)


def test_udp_sockets_in_a_row(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(
        "def ask(port, count):\n"
        "    for number in range(count):\n"
        "        with udp_socket() as s:\n"
        f"            s.sendto(b'%d' % number, ('{PEER}', port))\n"
        "            assert s.recv(100) == b'%d' % number\n"
        "    return count\n"
    )

    def echo(sock: ksocket.socket, count: int) -> None:
        for _ in range(count):
            data, address = sock.recvfrom(100)
            sock.sendto(data, address)

    with hosts.datagrams() as sock:
        for count in (WARM_UP, IN_A_ROW):
            before = usage(hosts, app)
            with meanwhile(echo, sock, count):
                assert app.value(f"ask({sock.getsockname()[1]}, {count})") == count
    expect_gone(hosts, app, before, IN_A_ROW)


def test_applications_come_and_go(hosts: Hosts) -> None:
    """Each attachment brings a channel, pages, rights and a task; each leave or death takes them all away."""
    first = hosts.app()
    with hosts.listener() as listener:
        port = listener.getsockname()[1]
        files: list[int] = []
        for number in range(8 if SOAK else 3):
            app = hosts.app()
            app.do(f"s = socket.create_connection(('{PEER}', {port}), timeout=30)")
            app.do("u = udp_socket(); l = socket.create_server(('', 0))")
            peer, _ = listener.accept()
            if number % 2:
                app.kill()
            else:
                assert app.end() == 0
            peer.settimeout(10)
            assert peer.recv(1) == b""  # nothing was under way: a death is as orderly as a leave
            peer.close()
            hosts.expect_nothing(applications=1)
            files.append(open_files(hosts.server.pid))
    wait_for(lambda: open_files(hosts.server.pid) <= files[0], f"descriptors of the server go back to {files[0]}")
    assert first.end() == 0
