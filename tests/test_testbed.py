"""Test hosts: made, wired, entered, and always removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ulnet.kernelshim.lossy import LossyHop
from ulnet.kernelshim.testbed import NETNS_DIR, Testbed, can_testbed, remove_stale

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture
def bed() -> Iterator[Testbed]:
    with Testbed() as bed:
        yield bed


def test_kernels_of_two_hosts_talk(bed: Testbed) -> None:
    a, b = bed.host("a"), bed.host("b")
    ia, ib = bed.wire(a, b, a_addr="10.77.0.1/24", b_addr="10.77.0.2/24", mtu=1400)
    assert (a.interface, b.interface) == (ia, ib)
    assert ia.mac != ib.mac and len(ia.mac) == 6
    with b.socket() as server, a.socket() as client:
        server.bind(("10.77.0.2", 7000))
        server.listen()
        client.settimeout(2)
        client.connect(("10.77.0.2", 7000))
        peer, address = server.accept()
        with peer:
            assert address[0] == "10.77.0.1"
            client.sendall(b"hello")
            assert peer.recv(5) == b"hello"
    mtu = a.popen([sys.executable, "-c", "print(open('/sys/class/net/lo/mtu').read())"], stdout=subprocess.PIPE)
    assert mtu.wait(5) == 0


def test_program_runs_on_its_host(bed: Testbed) -> None:
    a, b = bed.host("a"), bed.host("b")
    bed.wire(a, b, b_addr="10.77.0.2/24")
    code = "import socket; print([n for _, n in socket.if_nameindex()])"
    here = a.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert here.communicate(timeout=5)[0].strip() == "['lo', 'eth0']"
    assert a.call(socket.if_nameindex) == [(1, "lo"), (a.interface.index, "eth0")]


def test_entering_concerns_one_thread_and_nests(bed: Testbed) -> None:
    a, b = bed.host("a"), bed.host("b")
    home = os.stat("/proc/thread-self/ns/net").st_ino
    seen: list[int] = []
    with a:
        inside = os.stat("/proc/thread-self/ns/net").st_ino
        other = threading.Thread(target=lambda: seen.append(b.call(os.stat, "/proc/thread-self/ns/net").st_ino))
        other.start()
        other.join()
        with b:
            assert os.stat("/proc/thread-self/ns/net").st_ino == seen[0]
        assert os.stat("/proc/thread-self/ns/net").st_ino == inside
    assert len({home, inside, seen[0]}) == 3
    assert os.stat("/proc/thread-self/ns/net").st_ino == home


def test_offload_off_means_plain_frames(bed: Testbed) -> None:
    """With offload a receiver of raw frames sees segments larger than the MTU; without it never."""
    a, b = bed.host("a"), bed.host("b")
    ia, ib = bed.wire(a, b, a_addr="10.77.0.1/24", b_addr="10.77.0.2/24")
    largest = {}
    for enabled in (True, False):
        ia.offload(enabled)
        with (
            b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap,
            b.socket() as server,
            a.socket() as client,
        ):
            tap.bind((ib.name, 3))
            tap.settimeout(0.2)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("10.77.0.2", 7001))
            server.listen()
            client.connect(("10.77.0.2", 7001))
            client.sendall(bytes(40_000))
            size = 0
            try:
                while True:
                    size = max(size, len(tap.recv(70_000)))
            except TimeoutError:
                pass
            largest[enabled] = size
    assert largest[True] > 1514
    assert largest[False] == 1514


def test_quiet_cable_carries_nothing_unasked(bed: Testbed) -> None:
    a, b = bed.host("a"), bed.host("b")
    with b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        bed.wire(a, b, b_addr="10.77.0.2/24")
        tap.settimeout(0.3)
        with pytest.raises(TimeoutError):
            tap.recv(2000)


def test_everything_is_removed_with_its_processes() -> None:
    with Testbed() as bed:
        a = bed.host("a")
        path, name = a.path, a.netns
        # A program that starts another and ignores SIGTERM: the grandchild must go, too.
        code = (
            "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
        )
        child = a.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        begin = time.monotonic()
    assert time.monotonic() - begin < 3
    assert child.returncode == -signal.SIGKILL
    assert not os.path.exists(path)
    deadline = time.monotonic() + 2
    while _alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if os.getuid() == 0 and name is not None:
        assert name not in os.listdir(NETNS_DIR)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_names_of_a_killed_program_are_swept() -> None:
    code = textwrap.dedent("""
        from ulnet.kernelshim.testbed import Testbed
        import os, sys, time
        bed = Testbed()
        host = bed.host("left")
        child = host.run(["sleep", "60"])
        print(host.netns, child.pid, flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        name, pid = program.stdout.readline().split()
        program.kill()
    if name == "None":
        os.kill(int(pid), signal.SIGKILL)
        pytest.skip("namespaces have no names here")
    assert name in os.listdir(NETNS_DIR)
    assert name in remove_stale()
    assert name not in os.listdir(NETNS_DIR)
    deadline = time.monotonic() + 2
    while _alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_mistakes_are_named(bed: Testbed) -> None:
    a = bed.host("a")
    with pytest.raises(ValueError, match="exists already"):
        bed.host("a")
    with pytest.raises(ValueError, match="use 1 to 32"):
        bed.host("a/b")
    with pytest.raises(ValueError, match="wired to itself"):
        bed.wire(a, a)
    with pytest.raises(ValueError, match="prefix length"):
        bed.wire(a, bed.host("b"), a_addr="10.0.0.1")


def test_unprivileged_process_gets_hosts_of_its_own() -> None:
    """ensure_privilege() in a process of an ordinary user, and hosts that talk from there."""
    code = textwrap.dedent("""
        import ctypes, os, socket
        from ulnet.kernelshim.testbed import Testbed, can_testbed, ensure_privilege
        with Testbed() as warm:  # imports all there is to import, while its files may still be read
            warm.host("warm")
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after an exec by that user
        assert "ensure_privilege" in can_testbed()
        try:
            entered = ensure_privilege()
        except PermissionError as error:
            print("skip", error)
            raise SystemExit
        assert entered and os.getuid() == 0 and can_testbed() is None
        with Testbed() as bed:
            a, b = bed.host("a"), bed.host("b")
            bed.wire(a, b, a_addr="10.77.0.1/24", b_addr="10.77.0.2/24")
            server = b.socket(type=socket.SOCK_DGRAM)
            server.bind(("10.77.0.2", 9))
            server.settimeout(2)
            a.socket(type=socket.SOCK_DGRAM).sendto(b"hi", ("10.77.0.2", 9))
            print(*server.recvfrom(9))
    """)
    if os.getuid() != 0 or Path("/proc/self/setgroups").read_text() == "deny\n":
        pytest.skip("needs root, outside a user namespace, to become an ordinary user first")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.startswith("b'hi' ('10.77.0.1'"), done.stderr


def test_user_namespace_refuses_threads_with_a_reason() -> None:
    code = textwrap.dedent("""
        import threading, time
        from ulnet.kernelshim.testbed import enter_user_namespace
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        try:
            enter_user_namespace()
        except RuntimeError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert "2 threads" in done.stdout and "unshare" in done.stdout


def test_a_lossy_hop_loses_its_share_both_ways(bed: Testbed) -> None:
    a, middle, b = bed.host("a"), bed.host("m"), bed.host("b")
    bed.wire(a, middle, a_addr="10.77.0.1/24")
    bed.wire(b, middle, a_addr="10.77.0.2/24")
    with LossyHop(middle) as hop, a.socket(type=socket.SOCK_DGRAM) as asks, b.socket(type=socket.SOCK_DGRAM) as answers:
        answers.bind(("10.77.0.2", 7000))
        answers.settimeout(0.05)
        asks.settimeout(0.05)
        asks.connect(("10.77.0.2", 7000))

        def lost(count: int) -> tuple[int, int]:
            there = back = 0
            for _ in range(count):
                asks.send(b"q")
                try:
                    _, peer = answers.recvfrom(1)
                except TimeoutError:
                    there += 1
                    continue
                answers.sendto(b"a", peer)
                try:
                    asks.recv(1)
                except TimeoutError:
                    back += 1
            return there, back

        assert lost(100) == (0, 0)
        hop.lose(4)
        there, back = lost(40)
        assert 1 <= there <= 25
        assert 1 <= back <= 25
        hop.lose(0)
        assert lost(100) == (0, 0)
        with pytest.raises(ValueError, match="cannot be lost"):
            hop.lose(1)
    with pytest.raises(ValueError, match="wired to 1"):
        LossyHop(a)
