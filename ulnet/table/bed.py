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
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ulnet.kernelshim.lossy import LossyHop
from ulnet.kernelshim.testbed import Host, Testbed
from ulnet.stack import stamps as stamping

KERNEL = {"a": "10.77.0.1", "b": "10.77.0.2"}
USER = {"a": "10.77.0.10", "b": "10.77.0.20"}
ANSWER_S = 90.0  # longer than any measurement: who is silent for so long hangs
START_S = 20.0


class MeasureError(Exception):
    """A measurement that cannot be made, in one line."""


class Server:
    """A network server in the foreground; ``ready`` is what it said when it was."""

    def __init__(self, process: subprocess.Popen[str], ready: str) -> None:
        self.process = process
        self.ready = ready

    @property
    def pid(self) -> int:
        return self.process.pid

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it in good order; its exit status."""
        self.process.terminate()
        return self.process.wait(10)


def start_server(host: Host, address: str, path: Path, *, stamps: Path | None = None) -> Server:
    """Run ``ulnet netserver`` on the host and wait for its ready line."""
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
    return Server(process, line.strip())


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
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            raise MeasureError(f"a measuring process ended with status {self.process.wait()}") from None

    def read(self, limit_s: float = ANSWER_S) -> dict[str, Any]:
        """Its next answer; MeasureError with its reason, or when none comes."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.process.kill()  # an answer that came later would be taken for another's
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


class Pair:
    """Measuring processes on two hosts whose addresses are served at ``paths["a"]`` and ``paths["b"]``."""

    def __init__(self, a: Host, b: Host, paths: dict[str, Path]) -> None:
        self.a, self.b = a, b
        self.paths = paths
        self.cpus = processors()
        self.workers: list[Worker] = []
        for name, host, cpus in (("a", a, self.cpus[0]), ("b", b, self.cpus[1])):
            self.workers.append(Worker(host, paths[name], {"kernel": KERNEL[name], "ulnet": USER[name]}, cpus))

    def once(self, command: dict[str, Any], api: str, api_b: str | None = None) -> dict[str, Any]:
        return once(self.workers[0], self.workers[1], command, api, api_b)

    @contextlib.contextmanager
    def one_processor(self) -> Iterator[None]:
        """Both ends on the processor of end a, meanwhile."""
        self.workers[1].tell(op="place", cpus=self.cpus[0])
        try:
            yield
        finally:
            self.workers[1].tell(op="place", cpus=self.cpus[1])

    @contextlib.contextmanager
    def no_offload(self) -> Iterator[None]:
        """Checksum and segmentation offload off at both ends, meanwhile."""
        self.a.offload(False)
        self.b.offload(False)
        try:
            yield
        finally:
            self.a.offload(True)
            self.b.offload(True)

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Bed(Pair):
    """The same with the hosts and servers, made for it. ``stamps``: every process can leave time stamps (layers.py).

    ``lossy``: a third host between the two, whose ``hop`` loses frames when it is told to.
    """

    hop: LossyHop

    def __init__(self, *, stamps: bool = False, lossy: bool = False) -> None:
        with contextlib.ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ulnet-table-")))
            folder.chmod(0o755)  # the measuring processes give root up and must reach the sockets
            self.testbed = testbed = undo.enter_context(Testbed())
            a, b = testbed.host("a"), testbed.host("b")
            if lossy:
                middle = testbed.host("m")
                testbed.wire(a, middle, a_addr=f"{KERNEL['a']}/24")
                testbed.wire(b, middle, a_addr=f"{KERNEL['b']}/24")
                self.hop = undo.enter_context(LossyHop(middle))
            else:
                testbed.wire(a, b, a_addr=f"{KERNEL['a']}/24", b_addr=f"{KERNEL['b']}/24")
            paths = {name: folder / f"{name}.sock" for name in ("a", "b")}
            self.stamps = {name: str(folder / f"{name}.stamps") for name in ("server-a", "server-b", "a", "b")}
            if stamps:
                for path in self.stamps.values():
                    stamping.create(path, mode=0o666)
            self.servers = [
                start_server(
                    host, USER[name], paths[name], stamps=Path(self.stamps[f"server-{name}"]) if stamps else None
                )
                for name, host in (("a", a), ("b", b))
            ]
            super().__init__(a, b, paths)
            if stamps:
                for name, worker in zip("ab", self.workers, strict=True):
                    worker.tell(op="stamps", path=self.stamps[name])
            self._undo = undo.pop_all()

    def close(self) -> None:
        with self._undo:
            super().close()
            for server in self.servers:
                with contextlib.suppress(subprocess.TimeoutExpired):  # the test hosts kill what is left
                    server.stop()
