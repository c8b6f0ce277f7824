"""What measures: exact counts of two stacks in one thread, lent buffers counted back, stored runs as a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ulnet.table import lockstep

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_message_is_one_frame(proto: str) -> None:
    with lockstep.memory() as pair:
        a, b = pair.tcp() if proto == "tcp" else pair.udp()
        with a, b:
            lockstep.round_trips(a, b, 1, 5)
            counted = pair.counted(lambda: lockstep.round_trips(a, b, 1, 50))
    assert (counted["frames_out"], counted["polls"], counted["kicks"]) == (100, 0, 0)


def test_lent_buffers_are_counted_back() -> None:
    with lockstep.memory() as pair:
        a, b = pair.tcp()
        with a, b:
            lockstep.warm(pair, a, b)
            a.sendall(bytes(lockstep.BLOCK))
            with b.recv_buffer(lockstep.BLOCK):
                assert pair.b.engine.counters()["buf_lent"] == 1
            assert pair.b.engine.counters()["buf_lent"] == 0
            counted = pair.counted(lambda: lockstep.blocks(pair, a, b, 10, lend=True))
    assert (counted["buf_lent"], counted["buf_copied_bytes"]) == (0, 0)


def history(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "history.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={"COLUMNS": "200"})


def test_history_shows_stored_runs(tmp_path: Path) -> None:
    folder = tmp_path / "Linux-CPython"
    folder.mkdir()
    for number, median in enumerate((2e-6, 3e-6), 1):
        row = {
            "fullname": "bench/test_x.py::test_y[z]",
            "stats": {"median": median},
            "extra_info": {"ratio_to_kernel": 0.5},
        }
        run = {
            "datetime": f"2026-01-0{number}T00:00:00",
            "machine_info": {},
            "commit_info": {"id": "0123456789abcdef"},
            "benchmarks": [row],
        }
        (folder / f"000{number}.json").write_text(json.dumps(run))
    (folder / "0003.json").write_text("{")
    shown = history("--storage", str(tmp_path))
    assert shown.returncode == 0
    assert "0003.json is not a stored run" in shown.stderr
    (line,) = (line for line in shown.stdout.splitlines() if "y[z]" in line)
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["x y[z]", "2 us", "3 us", "2 us", "0.50", "+50 %", "▁█"]


def test_history_without_runs(tmp_path: Path) -> None:
    shown = history("--storage", str(tmp_path))
    assert shown.returncode == 1
    assert "make bench" in shown.stderr
