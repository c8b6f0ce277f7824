"""Times and instructions of this tree against another revision: ``python -m ci.compare BASE``.

BASE is built in a temporary worktree. A process of each measures in turn, round after round, in one run on one machine:
stored times gate nothing, they are noise. Exit status 1: something takes more than TIME_LIMIT times as long as in BASE
(median of the ratios of the rounds), or more than INSTRUCTION_LIMIT times as many instructions, counted by callgrind
where valgrind is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 1.20  # what repeated runs of one revision against itself stay below on two shared processors
INSTRUCTION_LIMIT = 1.02  # a pause of the machine may add a timer's work
ROUNDS = 9
TRIPS = 300  # under callgrind, some fifty times slower
KINDS = ("tcp", "udp")


# -- one side: a process that measures what it is told (``--serve``), with the ulnet of its PYTHONPATH ----------------


def _measures(stack: contextlib.ExitStack) -> dict[str, Callable[[], float]]:
    """Seconds, for each name."""
    from ulnet.kernelshim.testbed import can_testbed
    from ulnet.stack import checksum
    from ulnet.stack.sim import Sim
    from ulnet.table import lockstep

    def timed(action: Callable[[], Any]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def pour() -> None:
        sim = Sim(seed=1, capture=False)
        a, b = sim.pair(delay_ns=50_000, options={"sndbuf": 1 << 20, "rcvbuf": 1 << 20})
        b.listen()
        a.connect()
        a.pour(bytes(1 << 20), close=True)
        b.drain(close=True)
        sim.run()

    data = bytes(range(256)) * 256
    pair = stack.enter_context(lockstep.memory())
    tcp, udp = pair.tcp(), pair.udp()
    lockstep.warm(pair, *tcp)
    measures: dict[str, Callable[[], float]] = {
        "checksum of 64 KiB": lambda: timed(lambda: checksum.repeat("fast", data, 3000)),
        "TCP at virtual time, 1 MiB": lambda: timed(pour),
        "TCP round trip in memory": lambda: timed(lambda: lockstep.round_trips(*tcp, 1, 5000)),
        "UDP round trip in memory": lambda: timed(lambda: lockstep.round_trips(*udp, 1, 5000)),
        "TCP bulk in memory": lambda: timed(lambda: lockstep.blocks(pair, *tcp, 500)),
    }
    if can_testbed() is None:
        from ulnet.table.bed import Bed

        bed = stack.enter_context(Bed())
        for proto in KINDS:
            trips = {"op": "rtt", "proto": proto, "sizes": [1], "count": 3000, "warm": 200, "spin": True}
            measures[f"{proto.upper()} round trip between two hosts"] = lambda command=trips: (  # type: ignore[misc]
                float(bed.once(command, "ulnet-ipf")["us"]) / 1e6
            )
        bulk = {"op": "bulk", "proto": "tcp", "bytes": 256 << 20}
        measures["TCP bulk between two hosts"] = lambda: float(bed.once(bulk, "ulnet-ipf")["seconds"])
    return measures


def serve() -> None:
    with contextlib.ExitStack() as stack:
        measures = _measures(stack)
        print(json.dumps(list(measures)), flush=True)
        for line in sys.stdin:
            print(json.dumps(measures[json.loads(line)]()), flush=True)


class Side:
    """Base or head."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            cwd=tree, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.names: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the measuring process of {self.tree} ended; its error is above")
        return json.loads(line)

    def measure(self, name: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def instructions(self, kind: str, count: int) -> int:
        """Of a process with ``count`` round trips in memory (ulnet.table.counts.work)."""
        with tempfile.NamedTemporaryFile(prefix="ulnet-callgrind-") as out:
            run = subprocess.run(
                ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}", sys.executable, "-m",
                 "ulnet.table.counts", "memory", kind, str(count)],
                cwd=self.tree, env=self.environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            found = re.search(r"Collected : (\d+)", run.stderr)
            if run.returncode != 0 or found is None:
                raise OSError((run.stderr.strip().splitlines() or ["no reason given"])[-1])
            return int(found[1])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)


# -- both --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def built(base: str) -> Iterator[Path]:
    """A worktree of the revision, compiled in place."""
    with tempfile.TemporaryDirectory(prefix="ulnet-compare-") as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, base], cwd=ROOT, check=True)
        try:
            print(f"compare: building {base} (a minute or two)", flush=True)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            build = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            if build.returncode != 0:
                raise SystemExit(f"compare: {base} does not build:\n{build.stderr}")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def rows(base: Side, head: Side, rounds: int) -> Iterator[tuple[str, float, float, float, float]]:
    """What, base's median, head's, the median of the ratios, and their limit."""
    shared = [name for name in head.names if name in base.names]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in shared}
    for turn in range(rounds + 1):
        for name in shared:
            # Who goes first changes, so that neither always finds the other's warmth.
            pair = {side: side.measure(name) for side in ((base, head) if turn % 2 else (head, base))}
            if turn:  # the first warms
                found[name].append((pair[base], pair[head]))
    for name, pairs in found.items():
        yield (
            f"{name}, ms", 1e3 * statistics.median(b for b, _ in pairs), 1e3 * statistics.median(h for _, h in pairs),
            statistics.median(h / b for b, h in pairs), TIME_LIMIT,
        )  # fmt: skip


def instruction_rows(base: Side, head: Side) -> Iterator[tuple[str, float, float, float, float]]:
    if shutil.which("valgrind") is None:
        print("compare: instructions are not counted: valgrind is not installed")
        return
    for kind in KINDS:
        try:
            each = [(s.instructions(kind, 2 * TRIPS) - s.instructions(kind, TRIPS)) / TRIPS for s in (base, head)]
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"compare: instructions are not counted: {error}")
            return
        yield f"{kind.upper()} round trip in memory, instructions", *each, each[1] / each[0], INSTRUCTION_LIMIT


def compare(base: Path, rounds: int, *, instructions: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    out = Table(title="This tree against the base, in turn", title_justify="left")
    for title in ("what", "base", "head", "ratio", "limit"):
        out.add_column(title, justify="left" if title == "what" else "right")
    wrong = []
    with contextlib.closing(Side(base)) as before, contextlib.closing(Side(ROOT)) as after:
        found = list(rows(before, after, rounds))
        if instructions:
            found += instruction_rows(before, after)
    for what, old, new, ratio, limit in found:
        bad = ratio > limit
        mark = ("[bold red]", "[/bold red]") if bad else ("", "")
        figures = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in (old, new)]
        out.add_row(what, *figures, f"{mark[0]}{ratio:.3f}{mark[1]}", f"{limit:.2f}")
        if bad:
            wrong.append(f"{what}: {ratio:.3f} times the base, more than {limit:.2f}")
    Console().print(out)
    for line in wrong:
        print(f"compare: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("base", nargs="?", default="HEAD", help="a revision of this repository (default: HEAD)")
    parser.add_argument("--tree", type=Path, help="a built tree to compare with, instead of building the revision")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-instructions", action="store_true", help="times only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    with contextlib.nullcontext(arguments.tree.resolve()) if arguments.tree else built(arguments.base) as tree:
        return compare(tree, arguments.rounds, instructions=not arguments.no_instructions)


if __name__ == "__main__":
    sys.exit(main())
