"""What a message costs at run time, beside its time: system calls and switches between threads, for every placement.

The library counts its own system calls. Those of kernel sockets and of programs whose sessions the server manages are
counted by strace, where it is installed. Switches are the kernel's own counts (proc_pid_status(5)) of all processes
that the message meets, the servers included.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ulnet.table.bed import Bed, MeasureError
from ulnet.table.rows import BLOCKING, IPC, IPF, SERVER, SHM, SPINNING, Row

ROWS = (BLOCKING, SPINNING, SERVER, IPC, SHM, IPF)
TRACED = (BLOCKING.key, SERVER.key)  # a polling end under strace would count its own slowness
ATTACH_S = 5.0
TRACED_TRIPS = 100


def _pids(bed: Bed) -> list[int]:
    return [worker.process.pid for worker in bed.workers] + [server.pid for server in bed.servers]


def switches(pids: list[int]) -> int:
    """How often the threads of these processes have given a processor up, or lost it."""
    total = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # a thread that just ended
                total += sum(
                    int(n) for n in re.findall(r"^(?:non)?voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.M)
                )
    return total


def _trips(count: int, row: Row, proto: str) -> dict[str, Any]:
    return {"op": "rtt", "proto": proto, "sizes": [1], "count": count, "warm": 5, "spin": row.spin}


def parsed(summary: str) -> int:
    """Calls that strace -c lists, without those that failed."""
    calls = 0
    for line in summary.splitlines():
        # % time, seconds, usecs/call, calls, [errors], name
        match = re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:(\d+)\s+)?(\w+)$", line)
        if match is not None and match[3] != "total":
            calls += int(match[1]) - int(match[2] or 0)
    return calls


@contextlib.contextmanager
def _strace(pids: list[int], out: str) -> Iterator[None]:
    arguments = [part for pid in pids for part in ("-p", str(pid))]
    process = subprocess.Popen(["strace", "-f", "-c", "-o", out, *arguments], stderr=subprocess.PIPE, bufsize=0)
    try:
        assert process.stderr is not None
        said, deadline = b"", time.monotonic() + ATTACH_S
        while said.count(b"attached") < len(pids):
            if not select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise MeasureError("strace did not attach in time")
            data = os.read(process.stderr.fileno(), 65536)
            if not data:
                raise MeasureError(f"strace: {said.decode(errors='replace').strip() or 'ended'}")
            said += data
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=ATTACH_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def traced_calls(bed: Bed, row: Row, proto: str) -> float:
    """System calls a message, both programs and both servers: twice as many round trips against once as many."""
    found = []
    for count in (TRACED_TRIPS, 2 * TRACED_TRIPS):
        with tempfile.NamedTemporaryFile("r", prefix="ulnet-strace-") as out:
            with _strace(_pids(bed), out.name):
                bed.once(_trips(count, row, proto), row.api)
            found.append(parsed(out.read()))
    return max(0.0, (found[1] - found[0]) / (2 * TRACED_TRIPS))


def measure(bed: Bed, count: int, *, trace: bool = True) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By row and protocol: system calls, switches, half a round trip in us; and what could not be counted."""
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    if not trace or shutil.which("strace") is None:
        trace = False
        notes.append("System calls of kernel sockets and of server placement are not counted: that takes strace.")
    for row in ROWS:
        if row.missing():
            continue
        for proto in ("tcp", "udp"):
            try:
                before = switches(_pids(bed))
                found = bed.once(_trips(count, row, proto), row.api)
                switched = switches(_pids(bed)) - before
                calls: float | None = None
                if row.key in TRACED:
                    calls = traced_calls(bed, row, proto) if trace else None
                elif found["counters"]:
                    n = found["counters"]
                    # Looking at the counters is a system call, too; a wake-up is written and read.
                    calls = (n["link_syscalls"] - 1 + n["polls"] + 2 * n["kicks"]) / count
            except (MeasureError, OSError) as error:
                notes.append(f"{row.name}, {proto.upper()}: {error}.")
                continue
            rows[f"{row.name}, {proto.upper()}"] = {
                "system calls": None if calls is None else round(calls, 2),
                "switches": round(switched / (2 * (count + 5)), 2),
                "half a round trip, us": round(found["us"] / 2, 2),
            }
    return rows, notes
