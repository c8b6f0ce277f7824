"""An application dies: its peer is reset at once if something was lost, else the connection ends in order."""

from __future__ import annotations

import contextlib
import socket as ksocket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netserver_bed import PEER, Bed, read_line, wait_for
from ulnet.kernelshim.testbed import can_testbed

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("death"))
    yield bed
    bed.close()


def test_killed_while_it_sends(bed: Bed) -> None:
    """Most of these kills fall between a segment and its entry in the status page: the first RST is then too old.

    A few fall between two calls, with everything sent: then the peer gets just that, and an end in order."""
    with bed.b.socket() as listener:
        listener.bind((PEER, 0))
        listener.listen(1)
        listener.settimeout(10)
        for turn in range(8):
            program = bed.program(
                "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\nwhile True: s.sendall(bytes(100_000))",
                PEER,
                str(listener.getsockname()[1]),
            )
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(2)
                got = 0
                until = time.monotonic() + 0.005 * turn
                while time.monotonic() < until:
                    got += len(peer.recv(1 << 20))
                program.kill()
                with contextlib.suppress(ConnectionResetError):
                    while data := peer.recv(1 << 20):
                        got += len(data)
                    assert got % 100_000 == 0
            program.wait()
    bed.expect_empty()


CONNECT = "s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)\n"


@pytest.fixture(scope="module")
def shared_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("end"))
    yield bed
    bed.close()


def run(bed: Bed, code: str) -> ksocket.socket:
    """The peer of a program's connection."""
    with bed.b.socket() as listener:
        listener.bind((PEER, 0))
        listener.listen(1)
        listener.settimeout(10)
        bed.program(CONNECT + code, PEER, str(listener.getsockname()[1]))
        peer, _ = listener.accept()
    peer.settimeout(10)
    return peer


def changed(bed: Bed, name: str, before: dict[str, Any]) -> int:
    now: int = bed.counters()["sessions"].get(name, 0)
    return now - int(before.get(name, 0))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("time.sleep(0.2)", b""),
        ("s.sendall(b'last words')", b"last words"),  # dead before their acknowledgement can be seen
        ("s.sendall(b'x' * 10000)", b"x" * 10000),
        ("s.sendall(b'end'); s.shutdown(socket.SHUT_WR)", b"end"),
    ],
)
def test_nothing_lost(shared_bed: Bed, code: str, said: bytes) -> None:
    """As from a program on the kernel's sockets: everything it sent, then the end of the stream."""
    before = shared_bed.counters()["sessions"]
    with run(shared_bed, f"{code}\nimport os; os.kill(os.getpid(), 9)") as peer:
        got = b""
        while data := peer.recv(1 << 16):
            got += data
        assert got == said
    wait_for(lambda: changed(shared_bed, "finished", before), "the server's word")
    shared_bed.expect_empty()


def test_the_peer_ended_first(shared_bed: Bed) -> None:
    with run(shared_bed, "assert s.recv(1) == b''\nprint(1, flush=True); sys.stdin.read()") as peer:
        peer.shutdown(ksocket.SHUT_WR)
        assert read_line(shared_bed.programs[-1]) == "1"
        shared_bed.programs[-1].kill()
        assert peer.recv(1) == b""
    shared_bed.expect_empty()


def test_unread_data_is_lost_data(shared_bed: Bed) -> None:
    with run(shared_bed, "time.sleep(0.1)\ns.recv(1)\nprint(1, flush=True); sys.stdin.read()") as peer:
        peer.sendall(b"two")
        assert read_line(shared_bed.programs[-1]) == "1"
        shared_bed.programs[-1].kill()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    shared_bed.expect_empty()


def test_what_never_arrived_is_found_out(shared_bed: Bed) -> None:
    """The record says that 50 bytes were sent; the peer never saw them. It must not take the end for all there was."""
    code = """
import mmap, os, struct
s.sendall(b"seen")
time.sleep(0.3)
fds = [int(n) for n in os.listdir("/proc/self/fd")]
(fd,) = [n for n in fds if os.path.exists(f"/proc/self/fd/{n}") and "ulnet-status" in os.readlink(f"/proc/self/fd/{n}")]
page = mmap.mmap(fd, os.fstat(fd).st_size)
at = 64 + 64 + 8
struct.pack_into("<I", page, at, struct.unpack_from("<I", page, at)[0] + 50)
os.kill(os.getpid(), 9)
"""
    with run(shared_bed, code) as peer:
        assert peer.recv(10) == b"seen"
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    shared_bed.expect_empty()


def test_rubbish_in_the_record_costs_the_session_only(shared_bed: Bed) -> None:
    """Whatever a dead program left in its page: its own peer is reset, or ended, at the latest when it says something;
    the server goes on."""
    code = """
import mmap, os, random
fds = [int(n) for n in os.listdir("/proc/self/fd")]
(fd,) = [n for n in fds if os.path.exists(f"/proc/self/fd/{n}") and "ulnet-status" in os.readlink(f"/proc/self/fd/{n}")]
page = mmap.mmap(fd, os.fstat(fd).st_size)
time.sleep(0.1)
rng = random.Random(int(sys.argv[2]))
for at in rng.sample(range(64 + 64, 64 + 64 + 128), 6):
    page[at] = rng.randrange(256)
os.kill(os.getpid(), 9)
"""
    for _ in range(6):
        with run(shared_bed, code) as peer, contextlib.suppress(ConnectionResetError):
            peer.settimeout(1)
            try:
                assert peer.recv(1) == b""
            except TimeoutError:  # the record was all that the server could have known it by
                peer.sendall(b"x")
                with pytest.raises(ConnectionResetError):
                    peer.recv(1)
    shared_bed.expect_empty(15)
    assert not shared_bed.counters()["calls"].get("internal_errors")
