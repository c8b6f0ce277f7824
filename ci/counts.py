"""Exact counts of the hot path, compared with ci/counts.json: ``python -m ci.counts [--update]``.

Two stacks in one thread (ulnet.table.lockstep), so that no count depends on time: system calls, frames and copied bytes
of a message and of bulk data, over memory and over each packet interface. Where strace is installed it counts the
system calls, too: of this program with some round trips, less those with half as many. Exit status 1: a difference.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ulnet.kernelshim.testbed import can_testbed
from ulnet.table import lockstep

EXPECTED = Path(__file__).resolve().with_name("counts.json")
TRIPS = 200
BLOCKS = 64
# A pause of the machine may add a frame (a delayed acknowledgement, a retransmission); nothing takes one away.
ROUNDS = 3
LINKS = ("memory", "ipf", "shm", "ipc")
RECEIVING = ("recvmsg", "recvfrom", "recvmmsg", "read", "readv", "poll", "ppoll", "select", "pselect6", "epoll_wait",
             "epoll_pwait")  # fmt: skip
SENDING = ("sendmsg", "sendto", "sendmmsg", "write", "writev")

Counts = dict[str, int | float]


def opened(link: str) -> AbstractContextManager[lockstep.Pair]:
    return lockstep.memory() if link == "memory" else lockstep.packet(link)


def per(total: int, things: int) -> int | float:
    """A whole number where it is one."""
    share = Fraction(total, things)
    return share.numerator if share.denominator == 1 else round(float(share), 4)


def counted(pair: lockstep.Pair, action: Callable[[], None], things: int) -> Counts:
    """The least of some rounds, for each of ``things``."""
    seen = [pair.counted(action) for _ in range(ROUNDS)]
    least = {name: min(row[name] for row in seen) for name in seen[0]}
    counts: Counts = {
        "frames": per(least["frames_out"], things),
        "bytes copied from frame to heap": per(least["buf_copied_bytes"], things),
        "sleeps": per(least["polls"], things),
        "wake-ups": per(least["kicks"], things),
    }
    if "link_syscalls" in least:
        sends = least["link_tx_frames"] + least["link_tx_errors"]
        counts["send calls"] = per(sends, things)
        counts["receive calls"] = per(least["link_syscalls"] - sends, things)
    return counts


def measure(link: str) -> Iterator[tuple[str, Counts]]:
    with opened(link) as pair:
        for proto, sizes in (("tcp", (1, 1448)), ("udp", (1, 1472))):
            a, b = pair.tcp() if proto == "tcp" else pair.udp()
            with a, b:
                lockstep.round_trips(a, b, 1, TRIPS)
                for size in sizes:

                    def trips(a: object = a, b: object = b, size: int = size) -> None:
                        lockstep.round_trips(a, b, size, TRIPS)

                    yield f"{link}: a {proto} message of {size} B", counted(pair, trips, 2 * TRIPS)
        a, b = pair.tcp()
        with a, b:
            lockstep.warm(pair, a, b)
            for lend in (False, True):

                def blocks(a: object = a, b: object = b, lend: bool = lend) -> None:
                    lockstep.blocks(pair, a, b, BLOCKS, lend=lend)

                how = "lent by recv_buffer" if lend else "copied by recv_into"
                yield f"{link}: {lockstep.BLOCK} B of tcp, {how}", counted(pair, blocks, BLOCKS)


def trips_only(link: str, proto: str, count: int) -> None:
    """What strace watches."""
    with opened(link) as pair:
        a, b = pair.tcp() if proto == "tcp" else pair.udp()
        with a, b:
            lockstep.round_trips(a, b, 1, count)


def strace(link: str, proto: str, count: int) -> dict[str, int]:
    """System calls of ``trips_only`` in a process of its own, by name."""
    with tempfile.NamedTemporaryFile("r", prefix="ulnet-counts-") as out:
        command = [sys.executable, "-m", "ci.counts", "--trips", link, proto, str(count)]
        run = subprocess.run(
            ["strace", "-f", "-c", "-o", out.name, *command],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=EXPECTED.parent.parent,
        )
        if run.returncode != 0:
            raise OSError((run.stderr.strip().splitlines() or ["no reason given"])[-1])
        calls = {}
        for line in out:
            # % time, seconds, usecs/call, calls, [errors], name
            if match := re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", line):
                calls[match[2]] = int(match[1])
        return calls


def traced(link: str, proto: str) -> Counts:
    """System calls a message as strace sees them; the least of some rounds."""
    rounds = []
    for _ in range(ROUNDS):
        # Not against none at all: the first trip changes what the end of the connection has to say.
        without, having = strace(link, proto, TRIPS), strace(link, proto, 2 * TRIPS)
        extra = {name: having.get(name, 0) - without.get(name, 0) for name in having.keys() | without.keys()}
        rounds.append(
            (
                max(0, sum(extra.get(name, 0) for name in SENDING)),
                max(0, sum(extra.get(name, 0) for name in RECEIVING)),
            )
        )
        if rounds[-1] == (2 * TRIPS, 0):
            break
    sends, receives = min(rounds)
    return {"send calls": per(sends, 2 * TRIPS), "receive calls": per(receives, 2 * TRIPS)}


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
    parser.add_argument("--trips", nargs=3, metavar=("LINK", "PROTO", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trips:
        link, proto, count = arguments.trips
        trips_only(link, proto, int(count))
        return 0
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
