"""Exact counts of the hot path: two stacks in one thread (lockstep), so that no count depends on time.

``measure`` gives system calls, frames and copied bytes of a message and of bulk data, over memory and over each packet
interface; ``traced`` and ``allocations`` count the same work from outside, by strace and by glibc's mtrace(3), in a
process of its own: ``python -m ulnet.table.counts LINK KIND COUNT``.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction

from ulnet.table import lockstep

TRIPS = 200
BLOCKS = 64
# A pause of the machine may add a frame (a delayed acknowledgement, a retransmission); nothing takes one away.
ROUNDS = 3
RECEIVING = ("recvmsg", "recvfrom", "recvmmsg", "read", "readv", "poll", "ppoll", "select", "pselect6", "epoll_wait",
             "epoll_pwait")  # fmt: skip
SENDING = ("sendmsg", "sendto", "sendmmsg", "write", "writev")
KINDS = ("tcp", "udp", "copied", "lent")
MARK_BYTES = 0x7A691  # an allocation of a size that nobody else makes
MALLOC_DEBUG = "libc_malloc_debug.so.0"  # where glibc has mtrace since 2.34
RUN_S = 100.0
MIB = 1 << 20

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
    """``("ipf: a tcp message of 1 B", counts)`` and so on."""
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


# -- from outside ----------------------------------------------------------------------------------


def work(link: str, kind: str, count: int) -> None:
    """What strace watches: ``count`` round trips of "tcp" or "udp"."""
    with opened(link) as pair:
        a, b = pair.udp() if kind == "udp" else pair.tcp()
        with a, b:
            lockstep.round_trips(a, b, 1, count)


def marked_work(link: str) -> None:
    """What mtrace watches: for each of KINDS some messages or blocks and then twice as many, with marks around them."""
    with opened(link) as pair, _mtrace() as mark:
        for kind in KINDS:
            a, b = pair.udp() if kind == "udp" else pair.tcp()
            with a, b:
                if kind in ("tcp", "udp"):
                    lockstep.round_trips(a, b, 1, 10)
                else:
                    lockstep.warm(pair, a, b)
                for times in (1, 2):
                    mark()
                    if kind in ("tcp", "udp"):
                        lockstep.round_trips(a, b, 1, times * TRIPS)
                    else:
                        lockstep.blocks(pair, a, b, times * BLOCKS, lend=kind == "lent")
                    mark()


def _run(before: list[str], *what: str, **environment: str) -> None:
    """``work`` or ``marked_work`` in a process of its own; OSError with its last words."""
    command = [*before, sys.executable, "-m", "ulnet.table.counts", *what]
    run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, env=os.environ | environment)
    if run.returncode != 0:
        raise OSError((run.stderr.strip().splitlines() or ["no reason given"])[-1])


def strace(link: str, kind: str, count: int) -> dict[str, int]:
    """System calls of ``work`` by name, start and end of the process included."""
    with tempfile.NamedTemporaryFile("r", prefix="ulnet-counts-") as out:
        _run(["strace", "-f", "-c", "-o", out.name], link, kind, str(count))
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


def allocations(link: str) -> dict[str, int | float]:
    """For each of KINDS, calls of malloc and its like for each message or block. OSError where glibc cannot trace them.

    Python takes small objects from arenas of its own: those are not counted.
    """
    with tempfile.NamedTemporaryFile("r", prefix="ulnet-counts-") as out:
        _run([], link, LD_PRELOAD=MALLOC_DEBUG, MALLOC_TRACE=out.name)
        between = marked(out)
    if len(between) != 2 * len(KINDS):
        raise OSError(f"glibc's mtrace(3) left no trace ({MALLOC_DEBUG} is part of glibc since 2.34)")
    found = {}
    for number, kind in enumerate(KINDS):
        once, twice = between[2 * number : 2 * number + 2]  # less what a mark itself costs
        found[kind] = per(max(0, twice - once), 2 * TRIPS if kind in ("tcp", "udp") else BLOCKS)
    return found


def marked(lines: Iterable[str]) -> list[int]:
    """Allocations between each mark and the next but one, of lines as mtrace(3) writes them."""
    found: list[int] = []
    inside = False
    for line in lines:
        # "@ caller + address size", "@ caller > address size" (realloc), "- address"
        words = line.split()
        if "+" not in words and ">" not in words:
            continue
        if int(words[-1], 16) == MARK_BYTES:
            inside = not inside
            if inside:
                found.append(0)
        elif inside:
            found[-1] += 1
    return found


@contextmanager
def _mtrace() -> Iterator[Callable[[], None]]:
    """Glibc's trace, if it was asked for; gives what leaves a mark in it."""
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype, dlvsym.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)

    def find(name: bytes) -> int | None:
        # By version, as it finds the preloaded ones; without, libc's own come, of which mtrace does nothing.
        return next((at for version in (b"GLIBC_2.2.5", b"GLIBC_2.17") if (at := dlvsym(None, name, version))), None)

    mtrace, muntrace, malloc, free = (find(name) for name in (b"mtrace", b"muntrace", b"malloc", b"free"))
    if mtrace is None or muntrace is None or malloc is None or free is None:
        raise OSError("this C library has no mtrace(3)")
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(malloc)
    release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free)
    ctypes.CFUNCTYPE(None)(mtrace)()
    yield lambda: release(allocate(MARK_BYTES))
    ctypes.CFUNCTYPE(None)(muntrace)()


# -- for the table ---------------------------------------------------------------------------------


def overview(link: str, with_allocations: bool = True) -> tuple[dict[str, Counts], list[str]]:
    """Of a message and of a MiB: kernel crossings, copies, allocations; and what could not be counted."""
    rows: dict[str, Counts] = {}
    allocated: dict[str, int | float] = {}
    notes: list[str] = []
    try:
        allocated = allocations(link) if with_allocations else {}
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"Allocations are not counted: {error}.")
    texts = {"a tcp message of 1 B": "tcp", "a udp message of 1 B": "udp", "copied by": "copied", "lent by": "lent"}
    for what, counts in measure(link):
        kind = next((value for text, value in texts.items() if text in what), None)
        if kind is None:
            continue
        message = kind in ("tcp", "udp")
        scale = 1.0 if message else MIB / lockstep.BLOCK
        name = f"{kind.upper()} message of 1 B" if message else f"1 MiB of TCP, {what.partition(', ')[2]}"
        calls = counts.get("send calls", 0) + counts.get("receive calls", 0) + counts["sleeps"] + counts["wake-ups"]
        rows[name] = {
            "kernel crossings": round(calls * scale, 2),
            "send calls": round(counts.get("send calls", 0) * scale, 2),
            "receive calls": round(counts.get("receive calls", 0) * scale, 2),
            "sleeps and wake-ups": round((counts["sleeps"] + counts["wake-ups"]) * scale, 2),
            "bytes copied, frame to heap": round(counts["bytes copied from frame to heap"] * scale, 1),
            # By construction: send copies what is small, recv_into everything; bytes of 16 KiB and more are held.
            "bytes copied, from and to the program": 2 if message else MIB if kind == "copied" else 0,
        }
        if allocated:
            rows[name]["allocations"] = round(allocated[kind] * scale, 2)
    return rows, notes


if __name__ == "__main__":
    if len(sys.argv) == 2:
        marked_work(sys.argv[1])
    else:
        work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
