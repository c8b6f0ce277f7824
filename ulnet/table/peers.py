"""Other user-level stacks, both ends alike, on the same cable: lwIP (C, compiled here) and PyTCP (Python).

Neither is needed by ulnet. ``LWIP`` and ``PYTCP`` know how to get theirs; ``missing`` says how, where there is none.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ulnet.kernelshim.testbed import Host
from ulnet.table.bed import MeasureError, Pair

LIMIT_S = 10  # of one measurement: whoever takes longer is given up
HEADERS = "/usr/include/lwip"  # Debian's place; others are asked for by the compiler's own means (CPATH)
NO_LWIP = "lwIP's library or headers are not installed (Debian: apt install liblwip-dev)"
NO_COMPILER = "no C compiler for the lwIP end"
NO_PYTCP = "PyTCP is not installed (pip install 'ulnet[compare]')"


class Other(NamedTuple):
    """``command``: of one end, or MeasureError with the way to get it. ``address``: of end a and end b."""

    name: str
    command: Callable[[], list[str]]
    address: tuple[str, str]
    trips: int  # at most
    bulk_bytes: int

    def measure(self, bed: Pair, what: str, amount: int) -> float:
        """ "rtt": us, the median of ``amount``; "bulk": Gbit/s of ``amount`` bytes."""
        command = self.command()

        def end(host: Host, cpu: int, address: str, *peer: str) -> subprocess.Popen[str]:
            words = [host.interface.name, address, what, str(amount), str(LIMIT_S), *peer]
            started: subprocess.Popen[str] = host.popen(
                ["taskset", "-c", str(cpu), *command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            return started

        b = end(bed.b, bed.cpus[1][0], self.address[1])
        try:
            assert b.stdout is not None
            if b.stdout.readline() != "ready\n":
                raise MeasureError(f"{self.name}: {last_words(b)}")
            a = end(bed.a, bed.cpus[0][0], self.address[0], self.address[1])
            try:
                out, _ = a.communicate(timeout=2 * LIMIT_S)
            finally:
                a.kill()
            if a.returncode != 0 or not out:
                raise MeasureError(f"{self.name}: {last_words(a)}")
            return float(out)
        finally:
            b.kill()
            b.wait()


def last_words(process: subprocess.Popen[str]) -> str:
    if process.poll() == 3:
        return f"not done within {LIMIT_S} s"
    process.kill()
    assert process.stderr is not None
    lines = [] if process.stderr.closed else process.stderr.read().split("\n")
    return next((line for line in reversed(lines) if line), f"ended with status {process.wait()}")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ulnet-peers-")


@functools.cache
def lwip_command() -> list[str]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MeasureError(NO_COMPILER)
    program = Path(_folder().name) / "peer_lwip"
    source = Path(__file__).with_name("peer_lwip.c")
    made = subprocess.run(
        [compiler, "-O2", "-I", HEADERS, "-o", program, source, "-llwip"], capture_output=True, text=True, timeout=60
    )
    if made.returncode != 0:
        raise MeasureError(NO_LWIP)
    return [str(program)]


def pytcp_command() -> list[str]:
    if importlib.util.find_spec("pytcp") is None:
        raise MeasureError(NO_PYTCP)
    return [sys.executable, "-O", str(Path(__file__).with_name("peer_pytcp.py"))]  # -O: without its logging


LWIP = Other("lwIP", lwip_command, ("10.77.0.31", "10.77.0.32"), 2000, 32 << 20)
PYTCP = Other("PyTCP", pytcp_command, ("10.77.0.33", "10.77.0.34"), 100, 300_000)
