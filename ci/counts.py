"""Exact counts of the hot path, compared with ci/counts.json: ``python -m ci.counts [--update]``.

What is counted and how: ulnet/table/counts.py. Where strace is installed it counts the system calls, too: of a program
with some round trips, less those with half as many. Exit status 1: a difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ulnet.kernelshim.testbed import can_testbed
from ulnet.table.counts import Counts, measure, traced

EXPECTED = Path(__file__).resolve().with_name("counts.json")
LINKS = ("memory", "ipf", "shm", "ipc")


def show(found: dict[str, Counts], expected: dict[str, Counts]) -> list[str]:
    """Print the table; what differs from what is expected."""
    wrong = []
    out = Table(title="Exact counts of the hot path", title_justify="left")
    out.add_column("what")
    names = list(dict.fromkeys(name for counts in found.values() for name in counts))
    for name in names:
        out.add_column(name, justify="right")
    for what, counts in found.items():
        cells = []
        wanted = expected.get(what, {})
        for name in names:
            value, want = counts.get(name), wanted.get(name)
            if value != want:
                wrong.append(f"{what}: {name} is {value}, expected {want}")
                cells.append(f"[bold red]{value}[/bold red]")
            else:
                cells.append("" if value is None else str(value))
        out.add_row(what, *cells)
    Console().print(out)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write what is found to {EXPECTED.name}")
    arguments = parser.parse_args()
    expected: dict[str, Counts] = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    found: dict[str, Counts] = {}
    reason = can_testbed()
    for link in LINKS if reason is None else LINKS[:1]:
        found.update(measure(link))
    skipped = [] if reason is None else [f"packet interfaces: {reason}"]
    if reason is None and shutil.which("strace") is None:
        skipped.append("system calls by strace: it is not installed")
    elif reason is None:
        try:
            for proto in ("tcp", "udp"):
                found[f"ipf, by strace: a {proto} message of 1 B"] = traced("ipf", proto)
        except (OSError, subprocess.TimeoutExpired) as error:
            skipped.append(f"system calls by strace: {error}")
    wrong = show(found, expected)
    if not skipped:
        wrong += [f"{what}: expected, but not counted any more" for what in expected.keys() - found.keys()]
    for line in skipped:
        print(f"counts: not counted: {line}")
    if arguments.update:
        EXPECTED.write_text(json.dumps(found if not skipped else expected | found, indent=2) + "\n")
        print(f"counts: wrote {EXPECTED}")
        return 0
    for line in wrong:
        print(f"counts: {line}", file=sys.stderr)
    if wrong:
        print("counts: if the change is meant, `python -m ci.counts --update` and commit the file", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
