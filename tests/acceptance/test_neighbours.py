"""Programs of one address with each other, a program with itself, threads among themselves: TCP and UDP."""

from __future__ import annotations

import pytest

from tests.acceptance.beds import ADDRESS, App, Hosts
from tests.acceptance.shell import digest_of

BULK = 16 << 20

SERVE = """
def serve(l, count):
    for _ in range(count):
        s, who = l.accept()
        threading.Thread(target=echo, args=(s,)).start()

def echo(s):
    with s:
        s.settimeout(30)
        while data := s.recv(65536):
            s.sendall(data)

l = socket.create_server(('', 0)); l.settimeout(30)
port = l.getsockname()[1]
"""

ASK = f"""
def ask(port, size, seed):
    with socket.create_connection(('{ADDRESS}', port), timeout=30) as s:
        sender = threading.Thread(target=lambda: (send_stream(s, size, seed), s.shutdown(socket.SHUT_WR)))
        sender.start()
        got = receive_into(s, size)
        sender.join()
        return got if s.recv(1) == b'' else 'more than was sent'
"""


def test_tcp_between_two_programs(hosts: Hosts) -> None:
    one, two = hosts.app(), hosts.app()
    one.do(SERVE + "threading.Thread(target=serve, args=(l, 3)).start()")
    two.do(ASK)
    for seed, size in enumerate((1, 100_000, BULK)):
        assert two.value(f"ask({one.value('port')}, {size}, {seed})") == digest_of(size, seed)
    for app in (one, two):
        counters = app.value("host.link.counters()")
        assert counters["tx_errors"] == 0 and counters["rx_drops"] == 0
        app.do("l = None")
        assert app.end() == 0


def test_tcp_of_a_program_with_itself(hosts: Hosts) -> None:
    app = hosts.app()
    app.do(SERVE + ASK + "threading.Thread(target=serve, args=(l, 2)).start()")
    for seed, size in enumerate((1, BULK)):
        assert app.value(f"ask(port, {size}, {seed})") == digest_of(size, seed)


def test_tcp_within_one_thread(hosts: Hosts) -> None:
    """Connecting to one's own listener before accepting: no second thread, no deadlock."""
    app = hosts.app()
    app.do(SERVE)
    app.do(
        f"s = socket.create_connection(('{ADDRESS}', port), timeout=10); c, who = l.accept(); c.settimeout(10)\n"
        "assert who == s.getsockname() and c.getpeername() == who\n"
        "s.sendall(b'to'); assert c.recv(10) == b'to'\n"
        "c.sendall(b'fro'); assert s.recv(10) == b'fro'\n"
        "s.close(); assert c.recv(1) == b''; c.close(); l.close()"
    )


def test_threads_share_one_stack(hosts: Hosts) -> None:
    """Eight clients and eight servers of one program, all at once."""
    app = hosts.app()
    size = 2 << 20
    app.do(SERVE + ASK + "threading.Thread(target=serve, args=(l, 8)).start()")
    app.do(
        "results = {}\n"
        f"def run(seed): results[seed] = ask(port, {size}, seed)\n"
        "every = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]\n"
        "for t in every: t.start()\n"
        "for t in every: t.join(60)\n"
    )
    got = app.value("[results.get(seed) for seed in range(8)]")
    assert got == [digest_of(size, seed) for seed in range(8)]


def test_udp_between_two_programs_and_with_itself(hosts: Hosts) -> None:
    one, two = hosts.app(), hosts.app()
    for app in (one, two):
        app.do(f"u = udp_socket(); me = ({ADDRESS!r}, u.getsockname()[1])")  # bound to any address it shows none
    target = one.value("list(me)")
    for app in (two, one):
        for size in (0, 1, 1472, 1473, 9000, 60000):
            app.do(f"data = os.urandom({size}); n = u.sendto(data, {tuple(target)!r})")
            assert app.value("n") == size
            one.do("got, who = u.recvfrom(65535)")
            assert one.value("who") == app.value("list(me)")
            assert one.value("hashlib.sha256(got).hexdigest()") == app.value("hashlib.sha256(data).hexdigest()")


@pytest.mark.parametrize("who", ["itself", "another"])
def test_refused(hosts: Hosts, who: str) -> None:
    """Nobody listens, at the own address, too: TCP at once, UDP by ICMP."""
    app: App = hosts.app()
    port = 1 if who == "itself" else 2
    app.do(
        f"try: socket.create_connection(('{ADDRESS}', {port}), timeout=10); result = None\n"
        "except OSError as e: result = e.errno"
    )
    assert app.value("result == errno.ECONNREFUSED")
    app.do(
        f"u = udp_socket(); u.connect(('{ADDRESS}', {port})); u.send(b'x')\n"
        "try: u.recv(1); result = None\n"
        "except OSError as e: result = e.errno"
    )
    assert app.value("result == errno.ECONNREFUSED")


def test_a_neighbour_that_dies(hosts: Hosts) -> None:
    one, two = hosts.app(), hosts.app()
    one.do(SERVE)
    two.do(f"s = socket.create_connection(('{ADDRESS}', {one.value('port')}), timeout=10)")
    one.do("c, _ = l.accept(); c.sendall(b'last')")
    two.do("assert s.recv(10) == b'last'")
    one.kill()
    assert two.value("s.recv(1) == b''")  # nothing was under way
