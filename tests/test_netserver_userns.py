"""The whole path without root: server and application in a user namespace, demultiplexed by classic BPF."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import pathlib, sys
from ulnet.kernelshim.testbed import enter_user_namespace
try:
    enter_user_namespace()
except PermissionError as error:
    sys.exit(f"skip: {error}")
from tests.netserver_bed import ADDRESS, PEER, Bed
from ulnet.stack import socket

bed = Bed(pathlib.Path(sys.argv[1]))
try:
    proxy = bed.proxy()
    with bed.b.socket() as listener, socket.create_server(("", 7000), host=proxy) as server:
        listener.bind((PEER, 0))
        listener.listen()
        for _ in range(20):
            with socket.create_connection(listener.getsockname(), 5, host=proxy) as app:
                peer, _ = listener.accept()
                app.sendall(b"out" * 50_000)
                got = 0
                while got < 150_000:
                    got += len(peer.recv(1 << 20))
                peer.close()
                assert app.recv(1) == b""
            with bed.b.socket() as peer:
                peer.settimeout(5)
                peer.connect((ADDRESS, 7000))
                app, _ = server.accept()
                peer.sendall(b"in")
                assert app.recv(10) == b"in"
                peer.close()
                assert app.recv(10) == b""
                app.close()
    bed.expect_empty()
    assert bed.counters()["guard"]["refused"] == 0
    print("fine")
finally:
    bed.close()
"""


def test_in_a_user_namespace(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=Path.cwd()
    )
    if "skip:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr
