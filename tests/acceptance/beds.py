"""Served hosts with unprivileged programs on them, and what is measured from outside: memory, descriptors, TCP_INFO."""

from __future__ import annotations

import errno
import json
import os
import socket as ksocket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.netserver_bed import ADDRESS as ADDRESS
from tests.netserver_bed import PEER as PEER
from tests.netserver_bed import Bed, wait_for
from tests.netserver_bed import read_line as read_line

SOAK = os.environ.get("ULNET_SOAK", "") not in ("", "0")
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0 if SOAK else 60.0  # of one answer


class AppError(Exception):
    """What a program's code raised: ``name`` of the class, ``errno`` or None."""

    def __init__(self, name: str, number: int | None, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.errno = number


class App:
    """One unprivileged program (shell.py) that takes code: ``app.do(statements)``, ``app.value(expression)``."""

    def __init__(self, bed: Bed) -> None:
        self.process: subprocess.Popen[bytes] = bed.a.popen(
            [sys.executable, "-m", "tests.acceptance.shell", bed.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.pid = self.process.pid
        self.who = self.answer(30)

    def start(self, code: str, kind: str = "exec") -> None:
        """Let it run; ``answer`` waits."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, "code": code}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, limit_s: float = LIMIT_S) -> Any:
        line = read_line(self.process, limit_s)
        assert line, f"the program ended with status {self.process.wait(10)}"
        answer = json.loads(line)
        if "error" in answer:
            raise AppError(answer["error"], answer["errno"], answer["text"])
        return answer["value"]

    def do(self, code: str, limit_s: float = LIMIT_S) -> None:
        self.start(code)
        self.answer(limit_s)

    def value(self, expression: str, limit_s: float = LIMIT_S) -> Any:
        self.start(expression, "eval")
        return self.answer(limit_s)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is no more."""
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def end(self) -> int:
        """Let it come to its end in good order; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = self.process.wait(20)
        self._close_pipes()
        return status

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Hosts(Bed):
    """A Bed whose applications are unprivileged processes."""

    def __init__(self) -> None:
        self.apps: list[App] = []
        # Not pytest's tmp_path: its parents are the owner's alone, and the programs run as nobody.
        self._temporary = tempfile.TemporaryDirectory(prefix="ulnet-test-")
        folder = Path(self._temporary.name)
        folder.chmod(0o755)
        try:
            super().__init__(folder)
        except BaseException:
            self._temporary.cleanup()
            raise

    def close(self) -> None:
        super().close()
        self._temporary.cleanup()

    def app(self) -> App:
        app = App(self)
        self.apps.append(app)
        return app

    def listener(self, port: int = 0) -> ksocket.socket:
        """A kernel socket on host b that listens."""
        sock = self.b.socket()
        sock.setsockopt(ksocket.SOL_SOCKET, ksocket.SO_REUSEADDR, 1)
        sock.bind((PEER, port))
        sock.listen(1024)
        sock.settimeout(30)
        return sock

    def datagrams(self, port: int = 0) -> ksocket.socket:
        """A kernel UDP socket on host b."""
        sock = self.b.socket(type=ksocket.SOCK_DGRAM)
        sock.bind((PEER, port))
        sock.settimeout(10)
        return sock

    def dial(self, port: int) -> ksocket.socket:
        """A kernel socket on host b, connected to an application."""
        sock = self.b.socket()
        sock.settimeout(30)
        sock.connect((ADDRESS, port))
        return sock

    def tidy(self) -> None:
        """End what is left of a test and see that the server holds nothing of it."""
        for app in self.apps:
            if app.process.poll() is None:
                app.kill()
        self.apps.clear()
        self.expect_nothing()
        assert self.counters()["calls"].get("internal_errors", 0) == 0, self.log.read_text()

    def expect_nothing(self, limit_s: float = 15.0, applications: int = 0) -> None:
        """No session but those in TIME-WAIT, no flow, no guard entry, no channel."""
        wait_for(lambda: not self.leftovers(applications), f"an empty server (there is {self.leftovers()})", limit_s)

    def leftovers(self, applications: int = 0) -> list[str]:
        tables = self.tables()
        held = [f"{name}: {tables[name]}" for name in ("flows", "guarded") if tables[name]]
        if tables["applications"] != applications:
            held.append(f"applications: {tables['applications']}")
        rows = self.sessions()
        waiting = sum(row["state"] == "TIME-WAIT" for row in rows)
        if tables["names"] > waiting:
            held.append(f"names: {tables['names']} with {waiting} sessions in TIME-WAIT")
        return held + [f"{r['local']} {r['remote']} {r['state']}" for r in rows if r["state"] != "TIME-WAIT"]


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ProcessLookupError(errno.ESRCH, f"process {pid} has no memory")


def open_files(pid: int) -> int:
    """Descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def total_retrans(sock: ksocket.socket) -> int:
    """tcpi_total_retrans of a kernel socket: 8 bytes, then the 24th word (linux/tcp.h)."""
    info = sock.getsockopt(ksocket.IPPROTO_TCP, ksocket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 8 + 4 * 23)[0])


@contextmanager
def one_processor() -> Iterator[None]:
    """What starts in the block runs on one processor: this thread and its children.

    A veth pair queues frames on the processor that sends them. A peer that sends from its own call on one and, as an
    acknowledgement comes in, from another, overtakes itself; its fast retransmissions are then nobody's loss.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def meanwhile(function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """Run it in a thread during the block; the list holds its result after the block. What it raises fails the test."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function(*arguments))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield result
    thread.join(LIMIT_S)
    assert not thread.is_alive(), f"{function} hangs"
    if failure:
        raise failure[0]
