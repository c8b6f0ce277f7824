"""Hand-back at a fork and re-promotion of one session, again and again, with data waiting both ways."""

from __future__ import annotations

import hashlib
import os
import socket as ksocket
import statistics
import time

import pytest

from tests.acceptance.beds import SOAK, Hosts, open_files, rss_kib
from ulnet.kernelshim.testbed import can_testbed

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

TURNS = 10_000 if SOAK else 300
SIZE = 1 << 20

CODE = """
import os, time
def turn():
    t0 = time.perf_counter()
    pid = os.fork()
    if not pid:
        os._exit(0)
    t1 = time.perf_counter()
    os.waitpid(pid, 0)
    t2 = time.perf_counter()
    while sock.session.shared:
        sock.recv(1, socket.MSG_PEEK)
    t3 = time.perf_counter()
    return t1 - t0, t3 - t2
def turns(n):
    times = [turn() for _ in range(n)]
    return [a for a, _ in times], [b for _, b in times]
"""


def quantiles(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return f"median {cuts[49] * 1e3:.2f} ms, 99 % under {cuts[98] * 1e3:.2f} ms, worst {max(seconds) * 1e3:.2f} ms"


@pytest.mark.timeout(1200 if SOAK else 120)
def test_forks_with_a_mebibyte_each_way(hosts: Hosts) -> None:
    """1 MiB unread and 1 MiB unsent: nothing is lost, doubled or left behind. ``-s`` shows how long it takes."""
    app = hosts.app()
    with hosts.listener() as listener:
        app.do(f"sock = socket.create_connection({listener.getsockname()!r}, timeout=30)")
        peer, _ = listener.accept()
    with peer:
        peer.settimeout(60)
        peer.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_RCVBUF, 65536)
        unread = os.urandom(SIZE)
        peer.sendall(unread)
        app.do(CODE)
        app.do(f"while sock.session.stat()['unread_bytes'] < {SIZE}: time.sleep(0.01)")
        # What the peer's window takes, and 1 MiB more.
        app.do(
            "sent = os.urandom(8 << 20); at = 0\n"
            "import hashlib\n"
            "while True:\n"
            f"    unsent = sock.session.stat()['unsent_bytes']\n"
            f"    if unsent >= {SIZE}: break\n"
            f"    at += sock.send(sent[at:at + min(65536, {SIZE} - unsent)])\n"
            "    time.sleep(0.005 if unsent == 0 else 0)\n"
        )
        app.value("turns(50)")
        before = rss_kib(hosts.server.pid), open_files(hosts.server.pid), rss_kib(app.pid), open_files(app.pid)
        start = time.monotonic()
        back, again = [], []
        for _ in range(TURNS // 100):
            some = app.value("turns(100)")
            back += some[0]
            again += some[1]
        took = time.monotonic() - start
        after = rss_kib(hosts.server.pid), open_files(hosts.server.pid), rss_kib(app.pid), open_files(app.pid)
        print(f"\n{TURNS} forks in {took:.1f} s")
        print(f"  hand-back and fork: {quantiles(back)}")
        print(f"  re-promotion:       {quantiles(again)}")
        print(f"  server: {before[0]} -> {after[0]} KiB, {before[1]} -> {after[1]} descriptors")
        print(f"  program: {before[2]} -> {after[2]} KiB, {before[3]} -> {after[3]} descriptors")
        assert abs(after[1] - before[1]) <= 1 and abs(after[3] - before[3]) <= 1
        assert after[0] - before[0] < 8192 and after[2] - before[2] < 8192
        app.do(
            f"data = b''\nwhile len(data) < {SIZE}: data += sock.recv(65536)\n"
            "digest = hashlib.sha256(data).hexdigest()\n"
            "out = hashlib.sha256(sent[:at]).hexdigest(), at\n"
            "sock.close()"
        )
        assert app.value("digest") == hashlib.sha256(unread).hexdigest()
        digest, total = app.value("out")
        received = hashlib.sha256()
        count = 0
        while data := peer.recv(1 << 20):
            received.update(data)
            count += len(data)
        assert count == total
        assert received.hexdigest() == digest
