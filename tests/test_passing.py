"""One connection under several descriptors and in several programs: dup, detach, exec, multiprocessing, port rights."""

from __future__ import annotations

import array
import errno
import os
import select
import socket as ksocket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fork_bed import exactly, read_to_end, run, told
from tests.netserver_bed import ADDRESS, PEER, Bed
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.proxy import Proxy

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def shared_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("ns"))
    yield bed
    bed.close()


@pytest.fixture
def bed(shared_bed: Bed) -> Iterator[Bed]:
    yield shared_bed
    socket.set_default_host(None)
    shared_bed.end_programs()
    shared_bed.expect_empty(10)
    calls = shared_bed.counters()["calls"]
    assert not calls.get("internal_errors") and not calls.get("violations"), shared_bed.log.read_text()


@pytest.fixture
def proxy(bed: Bed) -> Proxy:
    proxy = bed.proxy()
    socket.set_default_host(proxy)
    return proxy


@pytest.fixture
def listener(bed: Bed) -> Iterator[ksocket.socket]:
    with bed.b.socket() as sock:
        sock.bind((PEER, 0))
        sock.listen(64)
        sock.settimeout(20)
        yield sock


@pytest.fixture
def joined(proxy: Proxy, listener: ksocket.socket) -> Iterator[tuple[socket.socket, ksocket.socket]]:
    sock = socket.create_connection(listener.getsockname(), timeout=20)
    peer, _ = listener.accept()
    peer.settimeout(20)
    with sock, peer:
        yield sock, peer


def test_dup_is_the_same_connection(joined: tuple[socket.socket, ksocket.socket]) -> None:
    sock, peer = joined
    twin = sock.dup()
    assert twin.fileno() != sock.fileno() and twin.gettimeout() == sock.gettimeout()
    assert (twin.getsockname(), twin.getpeername()) == (sock.getsockname(), sock.getpeername())
    sock.sendall(b"one")
    twin.sendall(b"two")
    assert exactly(peer, 6) == b"onetwo"
    sock.close()
    with pytest.raises(OSError) as failure:
        sock.send(b"x")
    assert failure.value.errno == errno.EBADF
    twin.sendall(b"three")
    assert exactly(peer, 5) == b"three"
    assert twin.session is not None and not twin.session.shared  # all this needs no server
    twin.close()
    assert peer.recv(1) == b""


def test_fromfd_and_fileno(joined: tuple[socket.socket, ksocket.socket]) -> None:
    sock, peer = joined
    copy = socket.fromfd(sock.fileno(), socket.AF_INET, socket.SOCK_STREAM)
    other = socket.socket(fileno=os.dup(copy.fileno()))
    with copy, other:
        copy.sendall(b"a")
        other.sendall(b"b")
        assert exactly(peer, 2) == b"ab"
        assert other.family == socket.AF_INET and other.type == socket.SOCK_STREAM
    sock.sendall(b"c")
    assert exactly(peer, 1) == b"c"


def test_foreign_descriptors_are_refused(proxy: Proxy) -> None:
    a, b = ksocket.socketpair()
    with a, b, open(os.devnull) as file:
        for fd in (a.fileno(), file.fileno()):
            with pytest.raises(OSError) as failure:
                socket.socket(fileno=fd)
            assert failure.value.errno == errno.ENOTSOCK
    with pytest.raises(OSError) as failure:
        socket.socket(fileno=9999)
    assert failure.value.errno == errno.EBADF


def test_detached_descriptor_carries_the_data(joined: tuple[socket.socket, ksocket.socket]) -> None:
    sock, peer = joined
    peer.sendall(b"early")
    while not sock.session.stat()["unread_bytes"]:  # type: ignore[union-attr]
        pass
    number = sock.fileno()
    fd = sock.detach()
    assert fd == number and sock.fileno() == -1
    assert select.select([fd], [], [], 10)[0] and os.read(fd, 100) == b"early"
    os.write(fd, b"by hand")
    assert exactly(peer, 7) == b"by hand"
    again = socket.socket(fileno=fd)
    assert again.fileno() == fd and again.getpeername() == peer.getsockname()
    again.settimeout(20)
    for _ in range(50):
        again.sendall(b"ping")
        assert exactly(peer, 4) == b"ping"
        peer.sendall(b"pong")
        assert again.recv(4) == b"pong"
    assert again.session is not None and not again.session.shared  # it is this process's own again
    again.close()
    assert peer.recv(1) == b""


def test_detached_and_closed_by_hand(joined: tuple[socket.socket, ksocket.socket]) -> None:
    sock, peer = joined
    sock.sendall(b"last words")
    os.close(sock.detach())
    assert read_to_end(peer) == b"last words"


def test_server_placement(bed: Bed, listener: ksocket.socket) -> None:
    """A proxy may leave all its sessions in the server; their descriptors are complete."""
    proxy = bed.proxy(placement="server")
    with socket.create_connection(listener.getsockname(), timeout=20, host=proxy) as sock:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(20)
            assert sock.session is not None and sock.session.shared
            payload = os.urandom(500_000)
            peer.sendall(payload[:100_000])
            got = b""
            while len(got) < 100_000:
                assert select.select([sock], [], [], 10)[0]
                got += os.read(sock.fileno(), 65536)
            assert got == payload[:100_000]
            sock.sendall(b"answer")
            assert exactly(peer, 6) == b"answer"
            assert sock.session.shared


def test_inheritable_is_server_placed(joined: tuple[socket.socket, ksocket.socket]) -> None:
    sock, peer = joined
    assert sock.get_inheritable() is False
    sock.set_inheritable(True)
    assert sock.get_inheritable() is True and os.get_inheritable(sock.fileno())
    assert sock.session is not None
    for _ in range(20):
        sock.sendall(b"x")
        assert exactly(peer, 1) == b"x"
        assert sock.session.shared
    sock.set_inheritable(False)
    assert sock.get_inheritable() is False
    for _ in range(100):
        sock.sendall(b"x")
        assert exactly(peer, 1) == b"x"
        if not sock.session.shared:
            break
    assert not sock.session.shared


def test_embedded_sessions_stay(tmp_path: Path) -> None:
    from ulnet.stack.embedded import pair

    hosts: tuple[Embedded, Embedded] = pair()
    try:
        with socket.create_server(("", 7), host=hosts[1]) as listener:
            sock = socket.create_connection(("10.0.0.2", 7), timeout=5, host=hosts[0])
            twin = sock.dup()
            conn, _ = listener.accept()
            with conn:
                twin.sendall(b"twin")
                assert conn.recv(10) == b"twin"
                with pytest.raises(OSError) as failure:
                    sock.set_inheritable(True)
                assert failure.value.errno == errno.EOPNOTSUPP
                sock.close()
                again = socket.socket(fileno=twin.detach())
                again.sendall(b"again")
                assert conn.recv(10) == b"again"
                again.close()
                assert conn.recv(10) == b""
    finally:
        hosts[0].shutdown(0.2)
        hosts[1].shutdown(0.2)


TAKER = """
from ulnet.stack import socket
import sys
sock = socket.socket(fileno=int(sys.argv[1]))
sock.settimeout(20)
turn = 0
while data := sock.recv(100):
    sock.sendall(data.upper())
    turn += 1
    if turn == 50:
        assert sock.session.shared      # others may have the descriptor
        sock.set_inheritable(False)     # they have not
print("application" if not sock.session.shared else "server")
"""


def test_program_run_by_exec_takes_it_over(bed: Bed, listener: ksocket.socket) -> None:
    code = f"""
import subprocess
sock = socket.create_connection((HOST, PORT), timeout=20)
sock.set_inheritable(True)
process = subprocess.Popen([sys.executable, "-c", {TAKER!r}, str(sock.fileno())], pass_fds=[sock.fileno()],
                           stdout=subprocess.PIPE)
sock.close()
report(out=process.communicate(timeout=30)[0].decode().strip(), status=process.returncode)
"""
    app = run(bed, code, port=listener.getsockname()[1])
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(20)
        for _ in range(100):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""
    assert told(app, 30) == {"out": "application", "status": 0}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(bed: Bed, tmp_path: Path, method: str) -> None:
    """As an argument of a Process, and through a Connection; listeners and connections."""
    script = tmp_path / "program.py"
    script.write_text(
        """
import json, multiprocessing, os, sys
from ulnet.stack import socket
def serve(listener, pipe):
    for _ in range(2):
        conn, _ = listener.accept()
        conn.sendall(b"worker")
        conn.close()
    sock = pipe.recv()
    while data := sock.recv(100):
        sock.sendall(data.upper())
    pipe.send("application" if not sock.session.shared else "server")
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    listener = socket.create_server(("", 7100))
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(listener, theirs))
    worker.start()
    passed = socket.create_server(("", 7101))
    print("ready", flush=True)
    conn, _ = passed.accept()
    ours.send(conn)
    conn.close()
    print(ours.recv(), flush=True)
    worker.join(20)
    assert worker.exitcode == 0
"""
    )
    app = bed.program(
        f"sys.argv[1:] = [{method!r}]\nimport runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    from tests.netserver_bed import read_line

    assert read_line(app) == "ready"
    for _ in range(2):
        with bed.b.socket() as sock:
            sock.settimeout(20)
            sock.connect((ADDRESS, 7100))
            assert read_to_end(sock) == b"worker"
    with bed.b.socket() as sock:
        sock.settimeout(20)
        sock.connect((ADDRESS, 7101))
        for _ in range(100):
            sock.sendall(b"hello")
            assert exactly(sock, 5) == b"HELLO"
        sock.shutdown(ksocket.SHUT_WR)
        assert read_to_end(sock) == b""
    assert read_line(app, 30) == "application"
    assert app.wait(20) == 0


def test_by_a_unix_socket(bed: Bed, joined: tuple[socket.socket, ksocket.socket]) -> None:
    from ulnet.stack.passing import departing

    sock, peer = joined
    ours, theirs = ksocket.socketpair()
    code = """
import array
pipe = __import__("socket").socket(fileno=int(sys.argv[3]))
_, fds, _, _ = __import__("socket").recv_fds(pipe, 1, 1)
sock = socket.socket(fileno=fds[0])
sock.settimeout(20)
while data := sock.recv(100):
    sock.sendall(data.upper())
report(placed=placed(sock))
"""
    from tests.fork_bed import HEAD

    with ours, theirs:
        app = bed.a.popen(
            [sys.executable, "-c", "import sys, time\nfrom ulnet.stack import socket\n" + HEAD + code, "-", "0",
             str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=-1,
            env=os.environ | {"ULNET_SERVER": bed.path},
        )  # fmt: skip
        bed.programs.append(app)
        fds = array.array("i", [departing(sock)])
        ours.sendmsg([b"x"], [(ksocket.SOL_SOCKET, ksocket.SCM_RIGHTS, fds)])
        sock.close()
        for _ in range(100):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""
        assert told(app) == {"placed": "application"}


def test_by_a_port_right(bed: Bed, joined: tuple[socket.socket, ksocket.socket]) -> None:
    """In a Mach message, to whoever holds the receive right."""
    from ulnet.ipc import Task
    from ulnet.stack.passing import departing

    sock, peer = joined
    code = """
from ulnet.ipc import Task
with Task(os.environ["ULNET_SERVER"]) as task:
    port = task.check_in("user.%d.sockets" % os.getuid())
    report(ready=1)
    message = task.receive(port, timeout=20)
    sock = socket.socket(fileno=message.take_fds()[0])
    sock.settimeout(20)
    while data := sock.recv(100):
        sock.sendall(data.upper())
    report(placed=placed(sock))
"""
    app = run(bed, code)
    assert told(app) == {"ready": 1}
    with Task(bed.path) as task:
        port = task.look_up(f"user.{os.getuid()}.sockets")
        task.send(port, 1, fds=[departing(sock)], timeout=5)
        sock.close()
        for _ in range(100):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""
    assert told(app) == {"placed": "application"}
