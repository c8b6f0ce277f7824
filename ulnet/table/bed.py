"""Two hosts made for measuring: a cable, an address served on each by a network server, a measuring process on each.

Call order: ``with Bed() as bed:`` and ``bed.once(command, api)``. Everything is removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ulnet.kernelshim.testbed import Host, Testbed

KERNEL = {"a": "10.77.0.1", "b": "10.77.0.2"}
USER = {"a": "10.77.0.10", "b": "10.77.0.20"}
ANSWER_S = 90.0  # longer than any measurement: who is silent for so long hangs
START_S = 20.0


class MeasureError(Exception):
    """A measurement that cannot be made, in one line."""


def start_server(host: Host, address: str, path: Path, *, stamps: Path | None = None) -> subprocess.Popen[str]:
    """Run ``ulnet netserver`` on the host and wait for its ready line, which is left in ``.ready``."""
    module = ["ulnet"] if stamps is None else ["ulnet.table.stamped_server", str(stamps)]
    process: subprocess.Popen[str] = host.popen(
        [
            sys.executable,
            *("-m", *module, "netserver", "--interface", host.interface.name),
            *("--address", f"{address}/24", "--socket", str(path), "--log-level", "warning"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "serving" not in line:
        raise MeasureError(f"the network server for {address} did not start; its error is above")
    process.ready = line.strip()  # type: ignore[attr-defined]
    return process


def processors() -> tuple[list[int], list[int]]:
    """Processors for end a and end b: different ones where there are two."""
    cpus = sorted(os.sched_getaffinity(0))
    return [cpus[0]], [cpus[1 % len(cpus)]]


class Worker:
    """The process of one end (worker.py)."""

    def __init__(self, host: Host, server: Path, local: dict[str, str], cpus: list[int]) -> None:
        self.local = local
        self.cpus = cpus
        self._rest = b""
        setup = {"server": str(server), "local": local, "cpus": cpus}
        self.process: subprocess.Popen[bytes] = host.popen(
            [sys.executable, "-m", "ulnet.table.worker", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.who: str = self.read(START_S)["who"]

    def write(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def read(self, limit_s: float = ANSWER_S) -> dict[str, Any]:
        """Its next answer; MeasureError with its reason, or when none comes."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise MeasureError(f"a measuring process did not answer within {limit_s:.0f} s")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise MeasureError(f"a measuring process ended with status {self.process.wait()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasureError(answer["error"])
        return answer

    def tell(self, **command: Any) -> dict[str, Any]:
        """An operation of this end alone; its figures."""
        self.write(command)
        figures: dict[str, Any] = self.read()["ok"]
        return figures

    def address(self, api: str) -> str:
        """Where this end is reached: every ulnet interface serves the same address."""
        return self.local["kernel" if api == "kernel" else "ulnet"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def once(a: Worker, b: Worker, command: dict[str, Any], api: str, api_b: str | None = None) -> dict[str, Any]:
    """Run one measurement; both ends' figures. ``api_b``: how end b opens its sockets, if not as a does.

    MeasureError with the reason of the end that failed first; both are ready for the next command then.
    """
    api_b = api_b or api
    b.write(command | {"api": api_b, "side": "b"})
    port = b.read()["port"]
    a.write(command | {"api": api, "side": "a", "peer": b.address(api_b), "port": port})
    figures: dict[str, Any] = {}
    failed: MeasureError | None = None
    for end in (a, b):
        try:
            figures.update(end.read()["ok"])
        except MeasureError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return figures


class Bed:
    """The hosts, servers and measuring processes. ``stamps``: a folder for the files of layers.py."""

    def __init__(self, *, stamps: bool = False) -> None:
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ulnet-table-")))
            folder.chmod(0o755)  # the measuring processes give root up and must reach the sockets
            self.folder = folder
            self.testbed = undo.enter_context(Testbed())
            self.a, self.b = self.testbed.host("a"), self.testbed.host("b")
            self.testbed.wire(self.a, self.b, a_addr=f"{KERNEL['a']}/24", b_addr=f"{KERNEL['b']}/24")
            self.paths = {name: folder / f"{name}.sock" for name in ("a", "b")}
            self.stamps = {name: folder / f"{name}.stamps" for name in ("server-a", "server-b", "a", "b")}
            if stamps:
                from ulnet.stack import stamps as stamping

                for path in self.stamps.values():
                    stamping.create(str(path), mode=0o666)
            self.servers = [
                start_server(host, USER[name], self.paths[name], stamps=self.stamps[f"server-{name}"] if stamps else None)
                for name, host in (("a", self.a), ("b", self.b))
            ]
            self.cpus = processors()
            self.workers = [
                Worker(host, self.paths[name], {"kernel": KERNEL[name], "ulnet": USER[name]}, cpus)
                for name, host, cpus in (("a", self.a, self.cpus[0]), ("b", self.b, self.cpus[1]))
            ]
            if stamps:
                for name, worker in zip("ab", self.workers, strict=True):
                    worker.tell(op="stamps", path=str(self.stamps[name]))
            self._undo = undo.pop_all()

    def once(self, command: dict[str, Any], api: str, api_b: str | None = None) -> dict[str, Any]:
        return once(self.workers[0], self.workers[1], command, api, api_b)

    @contextlib.contextmanager
    def one_processor(self) -> Any:
        """Both ends on the processor of end a, meanwhile."""
        self.workers[1].tell(op="place", cpus=self.cpus[0])
        try:
            yield
        finally:
            self.workers[1].tell(op="place", cpus=self.cpus[1])

    @contextlib.contextmanager
    def no_offload(self) -> Any:
        """Checksum and segmentation offload off at both ends, meanwhile."""
        self.a.offload(False)
        self.b.offload(False)
        try:
            yield
        finally:
            self.a.offload(True)
            self.b.offload(True)

    def close(self) -> None:
        with self._undo:
            for worker in self.workers:
                with contextlib.suppress(OSError):
                    worker.close()
            for server in self.servers:
                server.terminate()
            for server in self.servers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(10)

    def __enter__(self) -> Bed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
