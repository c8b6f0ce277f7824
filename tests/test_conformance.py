"""A quick part of ``make conformance``: CPython's own tests, on our stack, over a real link."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ci.conformance import ARRANGEMENTS, missing

_ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_quick_part(tmp_path: Path) -> None:
    report = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "ci.conformance", "--quick", "--json", str(report)]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    outcomes = json.loads(report.read_text())
    assert set(outcomes) == set(ARRANGEMENTS)
    passed = {arrangement: sum(o["outcome"] == "passed" for o in rows) for arrangement, rows in outcomes.items()}
    assert min(passed.values()) > 60, passed


def test_every_exclusion_has_a_reason() -> None:
    from ci import conformance_table as table

    assert all(len(reason) > 6 for reason in [*table.CLASSES.values(), *table.TESTS.values()])
