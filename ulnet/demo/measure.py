"""Kernel sockets against ulnet, both ends alike, alternating in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ulnet.kernelshim.testbed import Host


@dataclass
class Test:
    """One row. ``values[api]`` grows by one figure a round."""

    name: str
    unit: str
    command: dict[str, Any]
    values: dict[str, list[float]] = field(default_factory=lambda: {"kernel": [], "ulnet": []})

    def median(self, api: str) -> float:
        return statistics.median(self.values[api])

    @property
    def ratio(self) -> float:
        """ulnet / kernel, median over the rounds' own ratios: a slow moment hits both sides of a pair."""
        return statistics.median(u / k for u, k in zip(self.values["ulnet"], self.values["kernel"], strict=True))


def tests(count: int = 2000, bulk_bytes: int = 256 << 20) -> list[Test]:
    """The demo's comparison: 1-byte round trips and bulk."""
    rtt = {"op": "rtt", "size": 1, "count": count, "warm": count // 10}
    return [
        Test("TCP 1 B round trip", "us", rtt | {"proto": "tcp"}),
        Test("UDP 1 B round trip", "us", rtt | {"proto": "udp"}),
        Test("TCP bulk", "Gbit/s", {"op": "bulk", "proto": "tcp", "bytes": bulk_bytes}),
    ]


class Worker:
    """The process of one end (see worker.py)."""

    def __init__(self, host: Host, server: str, local: dict[str, str], cpus: list[int]) -> None:
        setup = {"server": server, "local": local, "cpus": cpus}
        self.local = local
        self.process = host.popen(
            [sys.executable, "-m", "ulnet.demo.worker", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.who: str = self.read()["who"]

    def write(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"measuring process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def address(self, api: str) -> str:
        """Where this end is reached: every ulnet interface serves the same address."""
        return self.local["kernel" if api == "kernel" else "ulnet"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def cpu_plan() -> tuple[list[int], list[int]]:
    """Processors for end a and end b: different ones where there are two."""
    cpus = sorted(os.sched_getaffinity(0))
    return [cpus[0]], [cpus[1 % len(cpus)]]


def once(a: Worker, b: Worker, api: str, command: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement; both ends' figures."""
    b.write(command | {"api": api, "side": "b"})
    port = b.read()["port"]
    a.write(command | {"api": api, "side": "a", "peer": b.address(api), "port": port})
    figures: dict[str, Any] = a.read()["ok"]
    figures.update(b.read()["ok"])
    return figures


def compare(a: Worker, b: Worker, rows: list[Test], rounds: int, step: Callable[[], None]) -> None:
    """Fill the rows, kernel and ulnet in turn; ``step`` is called after each single measurement."""
    for test in rows:
        for _ in range(rounds):
            for api in ("kernel", "ulnet"):
                figures = once(a, b, api, test.command)
                test.values[api].append(figures["us" if test.unit == "us" else "gbit"])
                step()


def table(rows: list[Test]) -> Table:
    """The rows as a table with ratios."""
    out = Table(title="From Python, medians; kernel sockets spin for round trips", title_justify="left")
    for heading in ("", "kernel", "ulnet", "ratio", "ulnet from/to"):
        out.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for test in rows:
        low, high = min(test.values["ulnet"]), max(test.values["ulnet"])
        figures = (f"{test.median('kernel'):.1f}", f"{test.median('ulnet'):.1f}", f"{test.ratio:.2f}")
        out.add_row(f"{test.name}, {test.unit}", *figures, f"{low:.1f} to {high:.1f}")
    return out
