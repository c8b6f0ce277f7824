"""One program, run twice: on kernel sockets and by ``ulnet run``; what it and its peer saw must be equal.

``Program`` says how it is started, how to know it is ready, what its peer on host b does, and how it ends.
``compare(program, worlds)`` runs it in both worlds at once, which have the same addresses, and checks what it leaves.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from ulnet.kernelshim.testbed import Host, Testbed

ROOT = Path(__file__).resolve().parents[2]
APPS = "tests.programs.apps"
LIMIT_S = 30.0  # for a program to get ready, or to end; loaded machines included

#: What differs from run to run by nature, on kernel sockets too: dates, process numbers, ephemeral ports, durations.
SCRUBBED = (
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d([.,]\d+)?( [+-]\d{4})?"), "DATE"),
    (re.compile(r"\d\d?/\w{3}/\d{4}[ :]\d\d:\d\d:\d\d( [+-]\d{4})?"), "DATE"),
    (re.compile(r"\[\d+\]|pid[ =:]*\d+", re.I), "PID"),
    (re.compile(rf"({re.escape(PEER)}:)\d+"), r"\1PORT"),
    (re.compile(r"\d[\d.]* seconds\b(?!=)|seconds=[\d.]+"), "DURATION"),
    (re.compile(r"ulnet-programs-\w+/(kernel|again|ulnet)"), "FOLDER"),
)


class World:
    """Host a, where programs run, and host b, where their peers are. ``name``: kernel or ulnet."""

    name = "kernel"

    def __init__(self, folder: Path, certificate: tuple[Path, Path] | None) -> None:
        self.folder = folder
        self.certificate = certificate
        folder.mkdir()
        self.running: list[subprocess.Popen[bytes]] = []
        self.a, self.b = self.hosts()

    def hosts(self) -> tuple[Host, Host]:
        self.testbed = Testbed()
        a, b = (self.testbed.host(f"{self.folder.name}_{end}") for end in "ab")
        self.testbed.wire(a, b, a_addr=f"{ADDRESS}/24", b_addr=f"{PEER}/24")
        return a, b

    def python(self) -> list[str]:
        """What stands in place of ``python`` for programs on host a."""
        return [sys.executable]

    def expect_nothing(self) -> None:
        """What a program leaves: no process on host a."""
        wait_for(lambda: not self.processes(), f"no process left on host a (there is {self.processes()})", 10)

    def processes(self) -> list[int]:
        return self.a.pids()

    def abandon(self) -> None:
        """After a failure: the next program must not find what is left of this one."""
        for process in self.running:
            end(process, signal.SIGKILL)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.testbed.close()

    # -- starting things -----------------------------------------------------------------------

    def popen(
        self, host: Host, argv: list[str], cwd: Path, output: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program with its output in ``cwd/<output>.out`` and ``.err``."""
        more = {
            "HOME": str(cwd),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
        }
        with open(cwd / f"{output}.out", "wb") as out, open(cwd / f"{output}.err", "wb") as err:
            process = host.popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={**os.environ, **more, **(env or {})},
            )
        self.running.append(process)
        return process

    @contextlib.contextmanager
    def stock(self, argv: list[str], port: int, cwd: Path, name: str) -> Iterator[None]:
        """A stock server on host b, on kernel sockets, from when it answers to the end of the block."""
        process = self.popen(self.b, argv, cwd, name)

        def answers() -> bool:
            assert process.poll() is None, f"{name} ended: {(cwd / f'{name}.err').read_text()}"
            with self.b.socket() as sock:
                return sock.connect_ex((PEER, port)) == 0

        wait_for(answers, name, LIMIT_S)
        try:
            yield
        finally:
            end(process, signal.SIGTERM)

    def peer(self, argv: list[str], cwd: Path, name: str = "peer") -> tuple[int, str]:
        """Run a program on host b to its end: status, what it printed. Its stderr must be empty."""
        process = self.popen(self.b, argv, cwd, name)
        status = process.wait(LIMIT_S)
        complaint = (cwd / f"{name}.err").read_text()
        assert not complaint, complaint
        return status, (cwd / f"{name}.out").read_text()


class Ulnet(World):
    """Host a has no address of its own: only a network server and ``ulnet run`` make it answer to one."""

    name = "ulnet"

    def hosts(self) -> tuple[Host, Host]:
        self.bed = Bed(self.folder)
        self.testbed = self.bed.testbed
        self._own = set(self.bed.a.pids())
        self._logged = 0
        return self.bed.a, self.bed.b

    def python(self) -> list[str]:
        return [sys.executable, "-m", "ulnet.cli", "run", "--server", self.bed.path]

    def processes(self) -> list[int]:
        return [pid for pid in self.a.pids() if pid not in self._own]

    def expect_nothing(self) -> None:
        """Also: no session, flow, name, guard entry or application in the server, and no error in its log."""
        super().expect_nothing()
        wait_for(lambda: not self.leftovers(), f"an empty server (there is {self.leftovers()})", 15)
        log = self.bed.log.read_text()
        fresh, self._logged = log[self._logged :], len(log)
        assert not re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", fresh), fresh
        assert self.bed.counters()["calls"].get("internal_errors", 0) == 0

    def leftovers(self) -> list[str]:
        """What the server still has of programs; TIME-WAIT, which it must keep, excepted."""
        tables, rows = self.bed.tables(), self.bed.sessions()
        held = [f"{name}: {tables[name]}" for name in ("flows", "guarded", "applications") if tables[name]]
        waiting = sum(row["state"] == "TIME-WAIT" for row in rows)
        if tables["names"] > waiting:
            held.append(f"names: {tables['names']} with {waiting} sessions in TIME-WAIT")
        return held + [f"{r['local']} {r['remote']} {r['state']}" for r in rows if r["state"] != "TIME-WAIT"]


def end(process: subprocess.Popen[bytes], how: signal.Signals | None) -> int:
    """Signal it (or wait for it); its exit status. It is killed, and -SIGKILL, when it does not end in time."""
    if how is not None and process.poll() is None:
        process.send_signal(how)
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclass(frozen=True)
class Program:
    """A program under test.

    ``command``: what follows ``python``; {port}, {peer}, {address}, {folder}, {cert}, {key} and {files} are filled in.
    ``needs``: modules, and programs (marked by a slash, as in "/redis-server"), without which it is skipped.
    ``ready``: a regular expression and how often its output must match it before the peer begins; None: at once.
    ``around``: a context manager around it all: stock servers on host b.
    ``peer``: what host b does meanwhile, called in a thread that is on host b; returns what is compared (JSON).
    ``stop``: the signal that ends it; None: it ends by itself.
    ``tls``: its peers speak TLS.
    ``traceback``: its output may hold some, on kernel sockets too.
    ``scrub``: more of its output that differs by nature: (regular expression, what stands for it).
    """

    name: str
    command: tuple[str, ...]
    port: int = 0
    needs: tuple[str, ...] = ()
    ready: tuple[str, int] | None = None
    around: Callable[[World, Run], Any] | None = None
    peer: Callable[[World, Run], Any] | None = None
    stop: signal.Signals | None = None
    status: int = 0
    tls: bool = False
    traceback: bool = False
    scrub: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run of a program: its folder (it is its working directory), process, and what came of it."""

    program: Program
    folder: Path
    files: Path
    authority: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    seen: Any = None
    status: int | None = None

    @property
    def port(self) -> int:
        return self.program.port

    def url(self, path: str) -> str:
        return f"http{'s' * self.program.tls}://{ADDRESS}:{self.port}{path}"

    def output(self) -> str:
        return "".join((self.folder / f"program.{kind}").read_text(errors="replace") for kind in ("out", "err"))

    def lines(self) -> list[str]:
        """What it printed, without what differs by nature; sorted, since threads and processes take turns."""
        text = self.output()
        for pattern, instead in (*((re.compile(p), i) for p, i in self.program.scrub), *SCRUBBED):
            text = pattern.sub(instead, text)
        return sorted(text.splitlines())


def missing(program: Program) -> str | None:
    """Why it cannot run here."""
    for need in program.needs:
        if need.startswith("/"):
            if shutil.which(need[1:]) is None:
                return f"{need[1:]} is not installed"
        elif importlib.util.find_spec(need) is None:
            return f"the module {need} is not installed"
    return None


def execute(program: Program, world: World, files: Path) -> Run:
    """Run it in one world, from start to end, and see that it leaves nothing."""
    folder = world.folder / re.sub(r"\W+", "-", program.name)
    folder.mkdir()
    certificate, key = world.certificate or (None, None)
    run = Run(program, folder, files, certificate)
    values = {
        "port": program.port, "peer": PEER, "address": ADDRESS, "folder": folder, "files": files,
        "cert": certificate, "key": key,
    }  # fmt: skip
    try:
        with program.around(world, run) if program.around else nothing():
            argv = world.python() + [part.format(**values) for part in program.command]
            run.process = world.popen(world.a, argv, folder, "program", program.env)
            await_ready(run)
            try:
                if program.peer is not None:
                    with world.b:
                        run.seen = program.peer(world, run)
            finally:
                run.status = end(run.process, program.stop)
        world.expect_nothing()
    except BaseException as error:
        world.abandon()
        error.add_note(f"{program.name} on {world.name}, status {run.status}, said:\n{run.output()[-6000:]}")
        raise
    finally:
        world.running.clear()
    return run


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def await_ready(run: Run) -> None:
    if run.program.ready is None:
        return
    pattern, times = run.program.ready
    process = run.process
    assert process is not None

    def is_ready() -> bool:
        if len(re.findall(pattern, run.output())) >= times:
            return True
        assert process.poll() is None, f"it ended with status {process.returncode}"
        return False

    wait_for(is_ready, f"{run.program.name}: {pattern!r} {times} times in its output", LIMIT_S)


def compare(program: Program, worlds: tuple[World, World], files: Path) -> None:
    """Run it in both worlds and compare: what the peer saw, what the program said, its exit status."""
    reason = missing(program)
    if reason is not None:
        pytest.skip(reason)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(execute, program, world, files) for world in worlds]
    kernel, ours = (run.result() for run in runs)  # the kernel's failure first: then the test is wrong
    for run in (kernel, ours):
        assert program.traceback or "Traceback" not in run.output(), run.output()[-6000:]
        assert run.status == program.status, f"status {run.status}: {run.output()[-6000:]}"
    assert program.peer is None or kernel.seen, "the peer saw nothing"
    expect_equal("what the peer saw", readable(kernel.seen), readable(ours.seen))
    expect_equal("what the program said", kernel.lines(), ours.lines())


def readable(value: Any) -> list[str]:
    """One line for each leaf or pair of leaves, so that a difference stays small."""
    return json.dumps(value, indent=1).splitlines()


def expect_equal(what: str, kernel: list[str], ours: list[str]) -> None:
    """Fail with the lines that differ."""
    if ours != kernel:
        difference = list(difflib.unified_diff(kernel, ours, "on kernel sockets", "by ulnet run", lineterm="", n=4))
        pytest.fail("\n".join([f"{what} differs", *difference[:80]]), pytrace=False)


def in_threads(count: int, function: Callable[[int], Any], host: Host) -> list[Any]:
    """``function(0)``, ``function(1)``, ... at once, each in a thread on the host; their results in this order."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        with host:
            barrier.wait(LIMIT_S)
            return function(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
