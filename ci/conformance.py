"""CPython's own socket tests against this stack: ``python -m ci.conformance [-v] [CLASS ...]``; more with --help.

``test.test_socket`` and ``test.test_selectors`` of this interpreter run over a real link: network namespaces, a veth
cable, a network server. Three arrangements: our client to a kernel server, a kernel client to our server, our stack
to itself. The tests make the server's sockets in the main thread and the client's in another, so the module they see
as ``socket`` is ours or the standard one by thread. What is not run, and why, is in conformance_table.py.

Each arrangement has a worker process, which a watchdog ends at a test that hangs (it counts as failed); another one
goes on with the rest. Exit status 1: something failed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import faulthandler
import importlib.util
import inspect
import json
import os
import resource
import signal
import socket as std
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from zmq.utils import garbage

from ci import conformance_table as table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from netserver_bed import ADDRESS, PEER, Bed  # noqa: E402

from ulnet.kernelshim.testbed import Host, can_testbed, ensure_privilege  # noqa: E402
from ulnet.stack import socket as ours  # noqa: E402

ARRANGEMENTS = {
    "to-kernel": "client ours, server the kernel's",
    "from-kernel": "client the kernel's, server ours",
    "itself": "both ours",
}
HANG_S = 40.0  # CPython's slowest test takes some 6 s, its own patience with threads ends after 30
DESCRIPTORS = 2400  # test_selectors opens as many as it may; FD_SETSIZE is 1024

Outcome = dict[str, Any]


def missing() -> str | None:
    """Why the conformance tests cannot run here, or None."""
    if importlib.util.find_spec("test.test_socket") is None:
        return "this interpreter was installed without its test package (Debian: libpython3-testsuite)"
    return can_testbed()


# -- inside a worker: the world as the tests see it ----------------------------------------------


class Door(types.ModuleType):
    """The module ``socket`` of the tests: ours or the standard one, by the thread that looks."""

    def __init__(self, client_is_ours: bool, server_is_ours: bool) -> None:
        super().__init__("socket")
        self.__dict__["_main"] = threading.get_ident()
        self.choose(client_is_ours, server_is_ours)

    def choose(self, client_is_ours: bool, server_is_ours: bool) -> None:
        """Which module other threads (clients) and the main thread (the server) have from now on."""
        pick = {False: std, True: ours}
        self.__dict__["_modules"] = pick[client_is_ours], pick[server_is_ours]

    def here(self) -> types.ModuleType:
        """The module of the calling thread."""
        inside: types.ModuleType = self.__dict__["_modules"][threading.get_ident() == self.__dict__["_main"]]
        return inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.here(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.here(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.here(), name)


class Loopbacks(ast.NodeTransformer):
    """The addresses written out in the tests become the served one."""

    def __init__(self, host: str) -> None:
        self.host = host

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if node.value in ("127.0.0.1", "localhost"):
            return ast.copy_location(ast.Constant(self.host), node)
        return node


def load(name: str, host: str, door: types.ModuleType) -> types.ModuleType:
    """A test module with ``import socket`` giving the door and loopback addresses replaced."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    tree = Loopbacks(host).visit(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    code = compile(tree, spec.origin, "exec")
    standard = sys.modules["socket"]
    sys.modules[name] = module
    sys.modules["socket"] = door
    try:
        exec(code, module.__dict__)
    finally:
        sys.modules["socket"] = standard
    return module


def pair_of(client: types.ModuleType, server: types.ModuleType, host: str, far: Host) -> Callable[[], Any]:
    """socketpair() for test_selectors: a TCP connection, (server's end, client's end)."""

    def on(module: types.ModuleType) -> contextlib.AbstractContextManager[Any]:
        return far if module is std else contextlib.nullcontext()

    def socketpair() -> Any:
        with on(server):
            listener = server.create_server((host, 0))
        with listener:
            with on(client):
                near = client.create_connection(listener.getsockname())
            end, _ = listener.accept()
        for sock in (near, end):
            sock.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        return end, near

    return socketpair


def prepare(arrangement: str, far: Host) -> Iterator[tuple[type[unittest.TestCase], bool]]:
    """Load the tests for an arrangement: each class to run in it, and whether the main thread is the kernel's."""
    from test.support import socket_helper

    client_is_ours, server_is_ours = arrangement != "from-kernel", arrangement != "to-kernel"
    host = ADDRESS if server_is_ours else PEER
    door = Door(client_is_ours, server_is_ours)

    def own_address() -> str:
        return ADDRESS if door.here() is ours else PEER

    def bind_port(sock: Any, host: str = host) -> int:
        sock.bind((own_address(), 0))
        return int(sock.getsockname()[1])

    helper: Any = socket_helper
    helper.socket = door
    helper.HOST = host
    helper.IPV6_ENABLED = False
    helper.bind_port = bind_port
    private: Any = ours
    private._LOCALHOST = host
    sockets: Any = load("test.test_socket", host, door)
    selectors: Any = load("test.test_selectors", host, door)
    selectors.socketpair = pair_of(ours if client_is_ours else std, ours if server_is_ours else std, host, far)
    # It opens sockets up to the limit, and counts on one descriptor each; ours have two.
    selectors.resource = types.SimpleNamespace(
        RLIMIT_NOFILE=resource.RLIMIT_NOFILE,
        getrlimit=lambda _: (DESCRIPTORS, DESCRIPTORS),
        setrlimit=lambda *_: None,
    )
    run_client = sockets.ThreadableTest.clientRun

    def clientRun(self: Any, function: Any) -> None:
        with far if not client_is_ours else contextlib.nullcontext():
            run_client(self, function)

    sockets.ThreadableTest.clientRun = clientRun
    for module in (sockets, selectors):
        for value in list(vars(module).values()):
            if inspect.isclass(value) and issubclass(value, unittest.TestCase) and value.__module__ == module.__name__:
                threaded = issubclass(value, sockets.ThreadableTest)
                client = value.__name__ in table.CLIENTS and client_is_ours
                if threaded or client or module is selectors or arrangement == "itself":
                    door.choose(client_is_ours, server_is_ours or client)
                    yield value, threaded and not server_is_ours


class Recorder(unittest.TestResult):
    """The outcome of one test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome, self.detail = "passed", ""

    def _worst(self, outcome: str, detail: str) -> None:
        if self.outcome != "failed":
            self.outcome, self.detail = outcome, detail

    def addError(self, test: Any, err: Any) -> None:
        self._worst("failed", "".join(traceback.format_exception(*err)))

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addError(test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        self._worst("skipped", reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        pass

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._worst("failed", "unexpected success")


def work(arrangement: str, bed: Bed, wanted: list[str], done: set[tuple[str, str]], out: int) -> None:
    """Run what is wanted and not done, a JSON line to ``out`` before and after each test."""

    def tell(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(5 * DESCRIPTORS, limit), limit))
    garbage.gc.start()  # pyzmq's own thread, begun at the first large message: the tests count threads
    ours.set_default_host(bed.proxy())
    for case, main_is_kernel in prepare(arrangement, bed.b):
        name, ready = case.__name__, False
        if not chosen(name, wanted):
            continue
        reason = table.class_reason(name)
        if reason:
            tell(cls=name, test="*", outcome="excluded", detail=reason)
            continue
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            method = test.id().rpartition(".")[2]
            if (name, method) in done or not chosen(f"{name}.{method}", wanted):
                continue
            reason = table.test_reason(name, method, arrangement)
            if reason:
                tell(cls=name, test=method, outcome="excluded", detail=reason)
                continue
            if not ready:
                case.setUpClass()
                ready = True
            tell(cls=name, test=method, outcome="started")
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            result, began = Recorder(), time.monotonic()
            with bed.b if main_is_kernel else contextlib.nullcontext():
                test.run(result)
            faulthandler.cancel_dump_traceback_later()
            seconds = round(time.monotonic() - began, 3)
            tell(cls=name, test=method, outcome=result.outcome, detail=result.detail, seconds=seconds)
        if ready:
            case.tearDownClass()
            case.doClassCleanups()
    tell(cls="", test="", outcome="end")


# -- the runner ----------------------------------------------------------------------------------


def chosen(name: str, wanted: list[str]) -> bool:
    """Whether a class, or Class.test, is among the patterns: a class with any of its tests, and vice versa."""
    if not wanted:
        return True
    if "." in name:
        return any(fnmatchcase(name, p) or fnmatchcase(name.partition(".")[0], p) for p in wanted)
    return any(fnmatchcase(name, p.partition(".")[0]) for p in wanted)


def run_worker(arrangement: str, bed: Bed, wanted: list[str], done: set[tuple[str, str]]) -> Iterator[Outcome]:
    """One worker's outcomes; when it dies within a test, that test's is "failed" and the last."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as noise:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                os.dup2(noise.fileno(), 1)
                os.dup2(noise.fileno(), 2)
                sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                faulthandler.enable()
                work(arrangement, bed, wanted, done, writing)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                    bed.end_programs()
                os._exit(status)
        os.close(writing)
        running: Outcome | None = None
        try:
            with open(reading, "rb") as lines:
                for line in lines:
                    outcome: Outcome = json.loads(line)
                    running = outcome if outcome["outcome"] == "started" else None
                    if outcome["outcome"] not in ("started", "end"):
                        yield outcome
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        noise.seek(0)
        text = noise.read().decode(errors="replace")
    if running is not None:
        yield running | {"outcome": "failed", "detail": f"the worker ended within it, status {status}\n{text[-6000:]}"}
    elif os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit(f"the worker for {arrangement} ended with status {status}:\n{text[-6000:]}")


def run(arrangement: str, bed: Bed, wanted: list[str], show: Callable[[Outcome], None]) -> list[Outcome]:
    """Every outcome of an arrangement."""
    outcomes: list[Outcome] = []
    done: set[tuple[str, str]] = set()
    while True:
        hung = False
        for outcome in run_worker(arrangement, bed, wanted, done):
            key = outcome["cls"], outcome["test"]
            if key in done:
                continue
            done.add(key)
            outcomes.append(outcome)
            show(outcome)
            hung = outcome["outcome"] == "failed" and outcome["detail"].startswith("the worker ended")
        if not hung:
            return outcomes


def summary(outcomes: dict[str, list[Outcome]], console: Console, verbose: bool) -> int:
    """Print the table and the reasons; how many failed."""
    grid = Table("class", *(f"{name}" for name in outcomes), title="passed / failed / skipped / excluded")
    for column in grid.columns[1:]:
        column.justify = "right"
    names = dict.fromkeys(o["cls"] for rows in outcomes.values() for o in rows if o["test"] != "*")
    totals: dict[str, Counter[str]] = {}
    kinds = ("passed", "failed", "skipped", "excluded")
    for name in names:
        cells = []
        for arrangement, rows in outcomes.items():
            count = Counter(o["outcome"] for o in rows if o["cls"] == name)
            totals.setdefault(arrangement, Counter()).update(count)
            cells.append(" / ".join(str(count[k]) for k in kinds) if count else "-")
        grid.add_row(name, *cells, style="red" if any(" / " in c and c.split(" / ")[1] != "0" for c in cells) else None)
    grid.add_section()
    grid.add_row("all", *(" / ".join(str(totals.get(a, Counter())[k]) for k in kinds) for a in outcomes))
    console.print(grid)
    if verbose:
        for kind in ("excluded", "skipped"):
            reasons: dict[str, dict[str, None]] = {}
            for rows in outcomes.values():
                for o in rows:
                    if o["outcome"] == kind:
                        label = o["cls"] if o["test"] == "*" else f"{o['cls']}.{o['test']}"
                        reasons.setdefault(o["detail"], {})[label] = None
            for reason, labels in reasons.items():
                console.print(f"[bold]{kind}[/bold]: {reason}", highlight=False)
                console.print(f"    {', '.join(labels)}", highlight=False)
    return sum(count["failed"] for count in totals.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS[.TEST]", help="only these; shell patterns")
    parser.add_argument("-v", "--verbose", action="store_true", help="every test, and the reason of each exclusion")
    parser.add_argument("--quick", action="store_true", help="the quick part that make test runs")
    parser.add_argument("--arrangement", action="append", choices=list(ARRANGEMENTS), help="only this; repeatable")
    parser.add_argument("--json", metavar="FILE", help="write every outcome there")
    options = parser.parse_args()
    if can_testbed() is not None:
        with contextlib.suppress(PermissionError):
            ensure_privilege()
    reason = missing()
    if reason:
        print(f"conformance: {reason}", file=sys.stderr)
        return 2
    wanted = options.classes or (list(table.QUICK) if options.quick else [])
    console = Console(width=max(110, Console().width))

    def show(outcome: Outcome) -> None:
        if outcome["outcome"] == "failed":
            console.print(f"[red]failed[/red] {outcome['cls']}.{outcome['test']}", highlight=False)
            console.print(outcome["detail"], markup=False, highlight=False)
        elif options.verbose and outcome["outcome"] != "excluded":
            console.print(
                f"{outcome['outcome']:8} {outcome.get('seconds', 0):6.2f} s  {outcome['cls']}.{outcome['test']}",
                highlight=False,
            )

    outcomes = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("conformance: ended by SIGTERM"))  # the hosts are removed
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(Path(folder))
        try:
            for arrangement in options.arrangement or ARRANGEMENTS:
                console.print(f"[bold]{arrangement}[/bold]: {ARRANGEMENTS[arrangement]}", highlight=False)
                outcomes[arrangement] = run(arrangement, bed, wanted, show)
        finally:
            bed.close()
    if options.json:
        Path(options.json).write_text(json.dumps(outcomes, indent=1))
    failed = summary(outcomes, console, options.verbose)
    console.print(f"conformance: {f'{failed} failed' if failed else 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
