"""Print the stored history of the benchmarks, a line each: ``python bench/history.py [--match TEXT] [--last N]``.

``make bench`` stores a file a run below .benchmarks/, a folder for each kind of machine. Times of different machines,
or of a busy one, do not compare; the ratio to kernel sockets measured in the same run does, roughly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Line:
    """One benchmark: a figure for each run, oldest first; None where the run lacks it."""

    medians_s: list[float | None] = field(default_factory=list)
    ratios: list[float | None] = field(default_factory=list)


def load(folder: Path, last: int) -> list[dict[str, Any]]:
    """The newest ``last`` runs stored in a machine's folder, oldest first."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(json.loads(path.read_text()))
        except ValueError as error:
            print(f"history: {path} is not a stored run ({error}): left out", file=sys.stderr)
    runs.sort(key=lambda run: str(run["datetime"]))
    return runs[-last:]


def collect(runs: list[dict[str, Any]], match: str) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for place, run in enumerate(runs):
        for row in run["benchmarks"]:
            name = row["fullname"].removeprefix("bench/test_").replace(".py::test_", " ")
            if match not in name:
                continue
            line = lines.setdefault(name, Line([None] * len(runs), [None] * len(runs)))
            line.medians_s[place] = row["stats"]["median"]
            line.ratios[place] = row["extra_info"].get("ratio_to_kernel")
    return dict(sorted(lines.items()))


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def trend(values: list[float | None]) -> str:
    """The runs as bars between the smallest and the largest; a blank where there is none."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(" " if value is None else BARS[round((value - low) / step)] for value in values)


def change(values: list[float | None]) -> str:
    """The newest against the median of those before, where there are any."""
    *before, newest = values
    known = [value for value in before if value is not None]
    if newest is None or not known:
        return "-"
    return f"{(newest / statistics.median(known) - 1) * 100:+.0f} %"


def table(title: str, runs: list[dict[str, Any]], lines: dict[str, Line]) -> Table:
    out = Table(title=title, title_justify="left")
    out.add_column("benchmark", overflow="fold")
    for heading in ("first", "newest", "best", "newest / kernel", "newest against median before"):
        out.add_column(heading, justify="right")
    out.add_column(f"{len(runs)} runs")
    for name, line in lines.items():
        known = [value for value in line.medians_s if value is not None]
        ratio = line.ratios[-1]
        out.add_row(
            escape(name),
            time_text(known[0]),
            time_text(line.medians_s[-1]),
            time_text(min(known)),
            "-" if ratio is None else f"{ratio:.2f}",
            change(line.medians_s),
            trend(line.medians_s),
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--storage", type=Path, default=Path(".benchmarks"), help="where runs are stored")
    parser.add_argument("--match", default="", help="only benchmarks whose name contains this")
    parser.add_argument("--last", type=int, default=20, help="at most so many runs")
    arguments = parser.parse_args()
    if arguments.last < 1:
        parser.error(f"--last {arguments.last}: at least 1 run")
    console = Console()
    shown = 0
    for folder in sorted(path for path in arguments.storage.glob("*") if path.is_dir()):
        runs = load(folder, arguments.last)
        lines = collect(runs, arguments.match)
        if not lines:
            continue
        machine = runs[-1]["machine_info"]
        cpu = machine.get("cpu", {}).get("brand_raw", "unknown processor")
        commit = runs[-1]["commit_info"]["id"][:10]
        console.print(table(f"{folder.name}, {cpu}, newest {runs[-1]['datetime'][:16]} at {commit}", runs, lines))
        shown += len(lines)
    if not shown:
        print(
            f"history: nothing stored below {arguments.storage} that matches; `make bench` stores a run",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
