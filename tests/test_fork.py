"""fork() with BSD's meaning: parent and child share each connection, and the last holder has it to itself again."""

from __future__ import annotations

import hashlib
import os
import socket as ksocket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.fork_bed import exactly, read_to_end, run, told
from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from ulnet.kernelshim.testbed import can_testbed

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def shared_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("ns"))
    yield bed
    bed.close()


@pytest.fixture
def bed(shared_bed: Bed) -> Iterator[Bed]:
    yield shared_bed
    shared_bed.end_programs()
    shared_bed.expect_empty(10)
    calls = shared_bed.counters()["calls"]
    assert not calls.get("internal_errors") and not calls.get("violations"), shared_bed.log.read_text()


@pytest.fixture
def listener(bed: Bed) -> Iterator[ksocket.socket]:
    with bed.b.socket() as sock:
        sock.bind((PEER, 0))
        sock.listen(64)
        sock.settimeout(20)
        yield sock


def accepted(listener: ksocket.socket) -> ksocket.socket:
    sock, _ = listener.accept()
    sock.settimeout(20)
    return sock


def program(bed: Bed, listener: ksocket.socket, code: str) -> tuple[subprocess.Popen[bytes], ksocket.socket]:
    """A program that connects first, and its peer."""
    head = "sock = socket.create_connection((HOST, PORT), timeout=20)\n"
    app = run(bed, head + code, port=listener.getsockname()[1])
    return app, accepted(listener)


def ended(app: subprocess.Popen[bytes]) -> None:
    assert app.wait(20) == 0


def test_both_write_and_the_last_one_ends_it(bed: Bed, listener: ksocket.socket) -> None:
    code = """
pid = child(lambda: sock.sendall(b"child"))
wait_child(pid)
sock.sendall(b"parent")
report(placed=settle(sock))
sys.stdin.read(1)
sock.sendall(b"more")
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert exactly(peer, 11) == b"childparent"
        assert told(app) == {"placed": "application"}  # the parent is alone with it again
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):  # the child's end did not end the connection
            peer.recv(1)
        peer.settimeout(20)
        assert app.stdin is not None
        app.stdin.write(b"x")
        app.stdin.close()
        assert read_to_end(peer) == b"more"
    ended(app)


def test_child_goes_on_alone_on_the_fast_path(bed: Bed, listener: ksocket.socket) -> None:
    code = """
def work():
    for _ in range(200):
        request = sock.recv(5)
        sock.sendall(request.upper())
        if placed(sock) == "application":
            break
    report(placed=placed(sock), pid=os.getpid())
    while request := sock.recv(100):
        sock.sendall(request.upper())
pid = child(work)
sock.close()
wait_child(pid)
"""
    app, peer = program(bed, listener, code)
    with peer:
        for _ in range(200):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
            row = [row for row in bed.sessions() if row["proto"] == "tcp" and row["state"] == "ESTABLISHED"]
            if row and row[0]["owner"] and row[0]["owner"] != app.pid and "shared" not in str(row[0]["owner"]):
                break
        assert told(app)["placed"] == "application"
        peer.sendall(b"direct")
        assert exactly(peer, 6) == b"DIRECT"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""
    ended(app)


@pytest.mark.parametrize("reader", ["parent", "child"])
def test_nothing_is_lost_or_doubled(bed: Bed, listener: ksocket.socket, reader: str) -> None:
    """1 MiB unread and 1 MiB unsent at the time of the fork; one side reads it all, another writes on."""
    code = f"""
import hashlib
size = 1 << 20
out = os.urandom(size)
while sock.session.stat()["unread_bytes"] < size:
    time.sleep(0.01)
sock.settimeout(0)
queued = 0
big = out * 8
try:
    while queued < len(big):
        queued += sock.send(big[queued:queued + 65536])
except BlockingIOError:
    pass
sock.settimeout(20)
def work(mine):
    if mine:
        sock.sendall(b"<end>")
        data = read_exactly(sock, size)
        report(got=hashlib.sha256(data).hexdigest(), sent=hashlib.sha256(big[:queued]).hexdigest(), queued=queued)
pid = child(work, {reader!r} == "child")
work({reader!r} == "parent")
wait_child(pid)
"""
    app, peer = program(bed, listener, code)
    with peer:
        peer.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_RCVBUF, 65536)
        data = os.urandom(1 << 20)
        peer.sendall(data)
        time.sleep(0.5)  # it forks now, with its window closed
        everything = read_to_end(peer)
    answer = told(app)
    assert answer["got"] == hashlib.sha256(data).hexdigest()
    assert len(everything) == answer["queued"] + 5
    assert hashlib.sha256(everything[:-5]).hexdigest() == answer["sent"]
    assert everything.endswith(b"<end>")
    ended(app)


def test_shutdown_by_one_is_for_all(bed: Bed, listener: ksocket.socket) -> None:
    code = """
pid = child(lambda: sock.shutdown(socket.SHUT_WR))
wait_child(pid)
try:
    for _ in range(100):
        sock.send(b"x")
        time.sleep(0.01)
except BrokenPipeError as error:
    report(errno=error.errno)
report(got=sock.recv(100).decode(), end=sock.recv(100).decode())
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert read_to_end(peer) == b""
        assert told(app) == {"errno": 32}
        peer.sendall(b"still")
    assert told(app) == {"got": "still", "end": ""}
    ended(app)


def test_reset_reaches_the_child(bed: Bed, listener: ksocket.socket) -> None:
    code = """
def work():
    report(ready=1)
    try:
        sock.recv(1)
    except ConnectionResetError as error:
        report(error=error.errno)
pid = child(work)
wait_child(pid)
"""
    app, peer = program(bed, listener, code)
    assert told(app) == {"ready": 1}
    time.sleep(0.2)
    peer.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert told(app) == {"error": 104}
    ended(app)


def test_prefork_server(bed: Bed) -> None:
    """Four workers on one listener; each connection is its worker's own."""
    code = """
listener = socket.create_server(("", 8080), backlog=64)
def work():
    while True:
        conn, _ = listener.accept()
        with conn:
            data = conn.recv(100)
            if data == b"stop":
                return
            conn.sendall(b"%d %s" % (os.getpid(), placed(conn).encode()))
pids = [child(work) for _ in range(4)]
report(pids=pids)
for pid in pids:
    wait_child(pid)
"""
    app = run(bed, code)
    pids = told(app)["pids"]
    seen = set()
    for _ in range(60):
        with bed.b.socket() as sock:
            sock.settimeout(20)
            sock.connect((ADDRESS, 8080))
            sock.sendall(b"hi")
            pid, place = read_to_end(sock).split()
            assert place == b"application"
            seen.add(int(pid))
    assert seen <= set(pids) and len(seen) > 1
    for _ in pids:
        with bed.b.socket() as sock:
            sock.settimeout(20)
            sock.connect((ADDRESS, 8080))
            sock.sendall(b"stop")
            assert read_to_end(sock) == b""
    ended(app)


def test_socketserver_forking(bed: Bed) -> None:
    code = """
import socketserver
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
class Server(socketserver.ForkingTCPServer):
    def __init__(self):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket()
        self.socket.bind(("", 7000))
        self.server_activate()
server = Server()
report(ready=1)
server.timeout = 20
for _ in range(6):
    server.handle_request()
server.server_close()
"""
    app = run(bed, code)
    told(app)
    payload = os.urandom(300_000)
    for _ in range(6):
        with bed.b.socket() as sock:
            sock.settimeout(20)
            sock.connect((ADDRESS, 7000))
            sock.sendall(payload)
            sock.shutdown(ksocket.SHUT_WR)
            assert read_to_end(sock) == payload
    ended(app)


def test_udp_is_shared(bed: Bed) -> None:
    code = """
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("", 5000))
sock.settimeout(20)
report(ready=1)
while sock.session.ready & 1 == 0:
    time.sleep(0.01)
def work():
    for _ in range(2):
        data, peer = sock.recvfrom(2000)
        sock.sendto(b"child " + data, peer)
pid = child(work)
wait_child(pid)
report(placed=settle(sock))
for _ in range(2):
    data, peer = sock.recvfrom(2000)
    sock.sendto(b"parent " + data, peer)
"""
    app = run(bed, code)
    told(app)
    with bed.b.socket(type=ksocket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect((ADDRESS, 5000))
        sock.send(b"one")  # before the fork
        assert sock.recv(100) == b"child one"
        sock.send(b"two" * 400)
        assert sock.recv(2000) == b"child " + b"two" * 400
        assert told(app) == {"placed": "application"}
        for text in (b"three", b""):
            sock.send(text)
            assert sock.recv(100) == b"parent " + text
    ended(app)


def test_buffer_on_loan_survives(bed: Bed, listener: ksocket.socket) -> None:
    code = """
import hashlib
buffer = sock.recv_buffer(1 << 20)
view = memoryview(buffer)
before = hashlib.sha256(view).hexdigest()
def work():
    assert hashlib.sha256(view).hexdigest() == before
pid = child(work)
wait_child(pid)
total = len(view)
while total < 40_000_000:
    total += len(sock.recv(1 << 20))
report(same=hashlib.sha256(view).hexdigest() == before, size=len(view))
view.release()
buffer.release()
"""
    app, peer = program(bed, listener, code)
    with peer:
        peer.sendall(os.urandom(1 << 20) + bytes(39_000_000 - (1 << 20)) + bytes(2_000_000))
        answer = told(app)
        assert answer["same"] and answer["size"] > 0
    app.wait(20)


def test_fork_beside_a_thread_that_receives(bed: Bed, listener: ksocket.socket) -> None:
    code = """
got = []
def receive():
    while data := sock.recv(100):
        got.append(data)
thread = threading.Thread(target=receive)
thread.start()
time.sleep(0.2)
for _ in range(20):
    wait_child(child(lambda: None))
    sock.sendall(b"x")
report(ready=1)
thread.join(20)
report(got=b"".join(got).decode())
"""
    app, peer = program(bed, listener, code)
    with peer:
        for _ in range(20):
            assert exactly(peer, 1) == b"x"
            peer.sendall(b"yz")
        told(app)
        peer.shutdown(ksocket.SHUT_WR)
        assert told(app)["got"] == "yz" * 20
    ended(app)


def test_fork_from_a_thread(bed: Bed, listener: ksocket.socket) -> None:
    code = """
def run():
    wait_child(child(lambda: sock.sendall(b"child")))
thread = threading.Thread(target=run)
thread.start()
thread.join(20)
sock.sendall(b"parent")
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert read_to_end(peer) == b"childparent"
    ended(app)


def test_grandchild_inherits(bed: Bed, listener: ksocket.socket) -> None:
    """A daemon's double fork: the middle one is gone, the grandchild has the connection."""
    code = """
def middle():
    def last():
        while data := sock.recv(100):
            sock.sendall(data.upper())
    child(last)
wait_child(child(middle))
sock.close()
report(ready=1)
sys.stdin.read(1)
"""
    app, peer = program(bed, listener, code)
    with peer:
        told(app)
        for _ in range(20):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""


def test_child_opens_its_own(bed: Bed, listener: ksocket.socket) -> None:
    code = """
def work():
    with socket.create_connection((HOST, PORT), timeout=20) as own:
        own.sendall(b"own")
wait_child(child(work))
sock.sendall(b"first")
"""
    app, peer = program(bed, listener, code)
    with peer, accepted(listener) as second:
        assert read_to_end(second) == b"own"
        assert read_to_end(peer) == b"first"
    ended(app)


def test_what_was_not_open_stays_private(bed: Bed, listener: ksocket.socket) -> None:
    """A socket without a name is each process's own."""
    code = """
fresh = socket.socket()
fresh.settimeout(20)
def work():
    fresh.connect((HOST, PORT))
    fresh.sendall(b"child")
wait_child(child(work))
fresh.connect((HOST, PORT))
fresh.sendall(b"parent")
sock.close()
"""
    app, peer = program(bed, listener, code)
    with peer, accepted(listener) as first, accepted(listener) as second:
        assert read_to_end(first) == b"child"
        assert read_to_end(second) == b"parent"
    ended(app)


def test_bound_in_the_parent_listening_in_the_child(bed: Bed) -> None:
    code = """
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("", 9000))
def work():
    sock.listen(5)
    report(ready=1)
    conn, _ = sock.accept()
    conn.sendall(b"here")
    conn.close()
wait_child(child(work))
"""
    app = run(bed, code)
    told(app)
    with bed.b.socket() as sock:
        sock.settimeout(20)
        sock.connect((ADDRESS, 9000))
        assert read_to_end(sock) == b"here"
    ended(app)


def test_select_and_epoll_across_the_fork(bed: Bed, listener: ksocket.socket) -> None:
    """A registration made before the fork goes on to tell the truth in both."""
    code = """
epoll = select.epoll()
epoll.register(sock.fileno(), select.EPOLLIN)
def work():
    assert epoll.poll(5) == [(sock.fileno(), select.EPOLLIN)]
    assert sock.recv(5) == b"first"
    assert epoll.poll(0) == []
    sock.sendall(b"!")
pid = child(work)
wait_child(pid)
assert epoll.poll(5) == [(sock.fileno(), select.EPOLLIN)], "registration lost"
assert sock.recv(6) == b"second"
assert epoll.poll(0) == []
report(placed=settle(sock))
assert epoll.poll(5) == [(sock.fileno(), select.EPOLLIN)], "registration lost on the way back"
report(got=sock.recv(5).decode())
"""
    app, peer = program(bed, listener, code)
    with peer:
        peer.sendall(b"first")
        assert exactly(peer, 1) == b"!"
        peer.sendall(b"second")
        assert told(app) == {"placed": "application"}
        peer.sendall(b"third")
        assert told(app) == {"got": "third"}
    ended(app)


def test_fork_in_a_running_event_loop(bed: Bed, listener: ksocket.socket) -> None:
    code = """
import asyncio
async def main():
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    reader = asyncio.create_task(loop.sock_recv(sock, 100))
    await asyncio.sleep(0.1)
    pid = child(lambda: os.write(1, b"") and None)
    wait_child(pid)
    await loop.sock_sendall(sock, b"ping")
    return await asyncio.wait_for(reader, 10)
report(got=asyncio.run(main()).decode())
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert exactly(peer, 4) == b"ping"
        peer.sendall(b"pong")
        assert told(app) == {"got": "pong"}
    ended(app)


def test_subprocess_does_not_inherit(bed: Bed, listener: ksocket.socket) -> None:
    """Close-on-exec: a program that is run knows nothing of the connection, and does not keep it open."""
    code = """
import subprocess
for hook in (None, lambda: None):           # the second makes subprocess run the fork hooks
    done = subprocess.run([sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')))"],
                          capture_output=True, preexec_fn=hook, check=True)
    assert int(done.stdout) <= 4, done.stdout
sleeper = subprocess.Popen(["sleep", "30"], preexec_fn=lambda: None)
report(placed=settle(sock))
sock.close()
sys.stdin.read(1)
sleeper.kill()
sleeper.wait()
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert told(app) == {"placed": "application"}
        assert read_to_end(peer) == b""
        assert app.stdin is not None
        app.stdin.close()
    ended(app)


def test_parent_killed_child_goes_on(bed: Bed, listener: ksocket.socket) -> None:
    code = """
def work():
    while data := sock.recv(100):
        sock.sendall(data.upper())
child(work)
report(ready=1)
time.sleep(60)
"""
    app, peer = program(bed, listener, code)
    with peer:
        told(app)
        app.kill()
        app.wait()
        for _ in range(20):
            peer.sendall(b"hello")
            assert exactly(peer, 5) == b"HELLO"
        peer.shutdown(ksocket.SHUT_WR)
        assert read_to_end(peer) == b""
    wait_for(lambda: bed.tables()["applications"] == 0, "the child's end")


def test_hundreds_of_forks_leave_nothing(bed: Bed, listener: ksocket.socket) -> None:
    code = """
sock.sendall(b"go")
before = None
for turn in range(150):
    wait_child(child(lambda: None))
    sock.recv(1, socket.MSG_PEEK)
    if turn == 20:
        settle(sock)  # while it is here it has a descriptor more than while it is not
        before = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    settle(sock)
report(placed=settle(sock), files=len(os.listdir("/proc/self/fd")) - before)
report(got=read_exactly(sock, 5).decode())
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert exactly(peer, 2) == b"go"
        files = bed.server_fds()
        peer.sendall(b"hello")
        assert told(app, 60) == {"placed": "application", "files": 0}
        assert told(app) == {"got": "hello"}
        assert bed.server_fds() <= files + 1
    ended(app)


def test_what_another_thread_closes_meanwhile_is_nobodys(bed: Bed, listener: ksocket.socket) -> None:
    """It must not keep the other connections from the child."""
    code = """
import logging
said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("ulnet").addHandler(Said())
stop = threading.Event()
def churn():
    while not stop.is_set():
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
        for each in socks:
            each.bind(("", 0))
        socks.append(socket.create_server(("", 0)))
        for each in socks:
            each.close()
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
def write():
    sock.sendall(b"x")
for _ in range(60):
    wait_child(child(write))
stop.set()
for thread in threads:
    thread.join()
report(said=said)
"""
    app, peer = program(bed, listener, code)
    with peer:
        assert exactly(peer, 60) == b"x" * 60
        assert told(app, 60) == {"said": []}
    ended(app)
