"""``ulnet table``: what it measures, what it says of it, and that time stamps cost nothing when off."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import stamps
from ulnet.table import counts, layers, lockstep, page, peers, report, targets
from ulnet.table.bed import MeasureError
from ulnet.table.ends import Api
from ulnet.table.measure import Budget, Table, bulk_bytes, paired_ratio
from ulnet.table.rows import BLOCKING, BUFFER_IPC, COLUMN, IPF, ROWS, SERVER, SPINNING, ratio_1993

needs_hosts = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


def shown(view: Any) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


# -- what 1993 measured, ratios --------------------------------------------------------------------


def test_ratios_of_1993() -> None:
    assert ratio_1993(SERVER, COLUMN["bulk"]) == pytest.approx(740 / 1070)
    assert ratio_1993(IPF, COLUMN["udp1"]) == pytest.approx(1.23 / 1.45)
    assert ratio_1993(BUFFER_IPC, COLUMN["tcp1"]) is None  # the paper's table has it not


def test_a_ratio_is_of_the_same_pass() -> None:
    # A slow second pass hits both sides: the ratio stays.
    assert paired_ratio([1.0, 10.0, 1.1], [2.0, 20.0, 2.2]) == pytest.approx(0.5)


def test_ways_to_open_sockets() -> None:
    assert Api.parse("kernel").kernel
    assert Api.parse("ulnet-shm") == Api(False, "shm")
    assert Api.parse("ulnet-ipf-server").server
    assert Api.parse("ulnet-ipf-still").still
    for wrong in ("ulnet-xyz", "kernel-ipf", "lwip"):
        with pytest.raises(ValueError, match=wrong):
            Api.parse(wrong)


def test_bulk_is_sized_by_what_is_known() -> None:
    budget = Budget.full()
    assert bulk_bytes(budget, None) == 32 << 20
    assert bulk_bytes(budget, 20.0) == pytest.approx(20e9 / 8 * budget.bulk_s, rel=0.01)


# -- showing what is stored ------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    """A finished run: kernel and library in two columns, the server skipped."""
    table = Table((BLOCKING, SPINNING, SERVER, IPF), (COLUMN["bulk"], COLUMN["tcp1"]))
    table.passes = 2
    table.skipped = {SERVER.key: "no <server> here"}
    for row, bulk, trip in ((BLOCKING, 10.0, 100.0), (SPINNING, 11.0, 20.0), (IPF, 15.0, 8.0)):
        for factor in (1.0, 2.0):
            table.cells[row.key]["bulk"].add(bulk * factor)
            table.cells[row.key]["tcp1"].add(trip * factor, (trip, trip * 3))
    return {
        "ulnet": "0", "date": "2026-01-01T00:00:00+00:00", "quick": True, "notes": ["a note"],
        "machine": {"cpu": "some", "processors": 2, "kernel": "6", "python": "CPython 3"},
        "table": table.document(),
        "targets": [
            {"key": "x", "name": "a target", "year_1993": "1.2", "target": "<= 0.5", "moonshot": "<= 0.4", "unit": "x",
             "value": 0.45, "q1": 0.44, "q3": 0.46, "how": "9 us", "reached": True, "moonshot_reached": False},
            {"key": "y", "name": "another", "year_1993": "", "target": ">= 2", "moonshot": "-", "unit": "x",
             "value": None, "q1": None, "q3": None, "how": "why not", "reached": None, "moonshot_reached": None},
        ],
    }  # fmt: skip


def test_terminal() -> None:
    document = json.loads(json.dumps(stored()))  # as it comes back from a file
    text = shown(report.table_view(document["table"]))
    line = next(line for line in text.splitlines() if "Library-SHM-IPF" in line)
    assert "22.5 x1.50" in line  # bulk: to the blocking row, median of two passes
    assert "12.0 x0.40" in line  # round trip: to the spinning row
    assert "'93 x1.23" in text
    assert "server placement: skipped: no <server> here" in text
    text = shown(report.targets_view(document["targets"]))
    assert "reached" in next(line for line in text.splitlines() if "a target" in line)
    assert "not measured" in next(line for line in text.splitlines() if "another" in line)
    assert "why not" in text


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    document = stored()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html = page.render(document)
    assert page.NO_PLOTS.split(":")[0] in html
    assert "<svg" not in html
    assert "skipped: no &lt;server&gt; here" in html
    assert "src=" not in html
    assert "href=" not in html
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    html = page.render(document)
    assert html.count("<svg") == 2  # TCP round trips, bulk


def test_verdicts() -> None:
    low = targets.Target("k", "n", "", 0.5, 0.4, targets.tcp_trip)
    high = low._replace(low=False, target=2.0, moonshot=4.0)
    assert (low.meets(0.5, low.target), low.meets(0.51, low.target)) == (True, False)
    assert (high.meets(2.0, high.target), high.meets(1.9, high.target)) == (True, False)
    assert low.meets(None, 0.5) is None
    every = targets.TARGETS + targets.LOSS_TARGETS
    assert len({target.key for target in every}) == len(every) == 26


# -- stamps ----------------------------------------------------------------------------------------


@pytest.fixture
def stamped(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "stamps")
    stamps.create(path)
    stamps.open(path)
    yield path
    stamps.close()


def exchange(switched: str | None = None) -> dict[str, int]:
    """20 round trips between two stacks in this thread; what they counted."""
    with lockstep.memory() as pair:
        a, b = pair.tcp()
        with a, b:
            lockstep.round_trips(a, b, 1, 5)
            if switched:
                stamps.switch(switched, True)
            counted = pair.counted(lambda: lockstep.round_trips(a, b, 1, 20))
            if switched:
                stamps.switch(switched, False)
    return counted


def test_stamps_are_taken_only_when_switched_on(stamped: str) -> None:
    without = exchange()
    assert stamps.read(stamped) == []
    counted = exchange(stamped)
    assert counted["frames_out"] == without["frames_out"] == 40
    found = stamps.read(stamped)
    passed = [point for _, point in found if point != stamps.OUTPUT]  # TCP also looks when there is nothing to send
    assert stamps.OUTPUT in (point for _, point in found)
    sending = [stamps.TRANSPORT_OUT, stamps.IP_OUT, stamps.LINK_OUT, stamps.LINK_SENT]
    receiving = [stamps.FRAME, stamps.TRANSPORT_IN, stamps.DELIVERED, stamps.READY]
    assert passed == (sending + receiving) * 40
    times = [ns for ns, _ in found]
    assert times == sorted(times)
    stamps.close()
    stamps.switch(stamped, True)
    exchange()
    assert stamps.read(stamped) == []


def test_stamps_keep_the_newest(tmp_path: Path) -> None:
    path = str(tmp_path / "few")
    with pytest.raises(ValueError, match="power of two"):
        stamps.create(path, 12)
    stamps.create(path, 8)
    stamps.open(path)
    try:
        stamps.switch(path, True)
        for point in range(1, 13):
            stamps.mark(point)
    finally:
        stamps.close()
    assert [point for _, point in stamps.read(path)] == list(range(5, 13))
    (tmp_path / "other").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="is no file made by"):
        stamps.open(str(tmp_path / "other"))


# -- layers ----------------------------------------------------------------------------------------

ONE_MESSAGE = (
    (100, "a", stamps.CALL_SEND), (110, "a", stamps.TRANSPORT_OUT), (130, "a", stamps.OUTPUT),
    (140, "a", stamps.IP_OUT), (150, "a", stamps.LINK_OUT), (450, "a", stamps.LINK_SENT),
    (470, "a", stamps.SEND_RETURN), (400, "b", stamps.WOKEN), (500, "b", stamps.FRAME),
    (520, "b", stamps.TRANSPORT_IN), (560, "b", stamps.DELIVERED), (600, "b", stamps.READY),
    (680, "b", stamps.RECV_RETURN),
)  # fmt: skip


def trails(*left_out: int) -> tuple[layers.Trail, layers.Trail]:
    a, b = ([(ns, p) for ns, end, p in ONE_MESSAGE if end == e and p not in left_out] for e in "ab")
    return layers.Trail(a), layers.Trail(b)


def test_layers_of_one_message() -> None:
    found = layers.message(*trails(), 100)
    assert found is not None
    assert found == {
        "entry": 10, "transport-out": 30, "ip-out": 10, "kernel": 250, "queue": 100, "ip-in": 20, "transport-in": 40,
        "wake": 40, "exit": 80,
    }  # fmt: skip
    assert sum(found.values()) == 580
    slept = layers.message(*trails(stamps.WOKEN), 100)
    assert slept is not None
    assert (slept["kernel"], slept["queue"], sum(slept.values())) == (300, 50, 580)
    assert layers.message(*trails(stamps.FRAME), 100) is None


def test_the_kernels_part_is_divided() -> None:
    whole = {"kernel": 4.0, "entry": 1.0}
    found = layers.split(dict(whole), {"link-out": 6.0, "filter": 1.0, "copy": 1.0})
    assert (found["link-out"], found["filter"], found["copy"], found["receive"]) == (3.0, 0.5, 0.5, None)
    found = layers.split(dict(whole), {})
    assert (found["link-out"], found["copy"]) == (4.0, None)


def test_allocations_are_counted() -> None:
    mark = f"@ x + 0x1 {counts.MARK_BYTES:#x}"
    log = [
        "= Start",
        "@ x + 0x5 0x10",
        mark,
        "@ x + 0x2 0x10",
        "@ x - 0x2",
        "@ x > 0x3 0x20",
        mark,
        "@ x + 0x1 0x9",
        mark,
        mark,
    ]
    assert counts.marked(log) == [2, 0]
    try:
        found = counts.allocations("memory")
    except OSError as error:
        pytest.skip(str(error))
    assert found == dict.fromkeys(counts.KINDS, 0)


# -- other stacks ----------------------------------------------------------------------------------


def test_a_stack_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeasureError, match=r"ulnet\[compare\]"):
        peers.pytcp_command()
    peers.lwip_command.cache_clear()
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(MeasureError, match="liblwip-dev"):
        peers.lwip_command()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MeasureError, match="no C compiler"):
        peers.lwip_command()


# -- the command -----------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ulnet", "table", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return set(os.listdir(folder)) if folder.exists() else set()


def leftovers(pid_names: set[str]) -> set[str]:
    """Namespaces of processes that are gone."""
    return {
        n for n in namespaces() - pid_names if n.startswith("ulnet-") and not Path(f"/proc/{n.split('-')[1]}").exists()
    }


@needs_hosts
def test_command(tmp_path: Path) -> None:
    before = namespaces()
    stored_json, stored_html = tmp_path / "t.json", tmp_path / "t.html"
    run = command("--quick", "--json", str(stored_json), "--html", str(stored_html), ULNET_TABLE_TINY="1")
    assert run.returncode == 0, run.stderr
    assert not leftovers(before)
    document = json.loads(stored_json.read_text())
    assert {"ulnet", "date", "machine", "notes", "quick", "table", "targets"} == set(document)
    assert {"cpu", "processors", "kernel", "python"} <= set(document["machine"])
    assert any("processor" in note for note in document["notes"])
    table = document["table"]
    assert [row["key"] for row in table["rows"]] == [row.key for row in ROWS]
    measured = [row["key"] for row in table["rows"] if not row["skipped"]]
    assert {"kernel-blocking", "kernel-spinning", "ipc", "shm", "ipf", "buffer-ipf"} <= set(measured), table["rows"]
    for key in measured:
        for column in table["columns"]:
            cell = table["cells"][key][column["key"]]
            assert 0 < cell["q1"] <= cell["median"] <= cell["q3"]
            assert len(cell["samples"]) == table["passes"] >= 1
            assert cell["ratio"] > 0
    assert table["cells"]["kernel-spinning"]["tcp1"]["ratio"] == 1
    assert table["cells"]["kernel-blocking"]["bulk"]["ratio"] == 1
    found = {target["key"]: target for target in document["targets"]}
    assert list(found) == [target.key for target in targets.TARGETS + targets.LOSS_TARGETS]
    for target in found.values():
        assert target["value"] is None or target["value"] > 0 or target["key"] == "memory", target
        assert target["how"], target
    missing = {key for key, target in found.items() if "not installed" in target["how"]}  # other stacks
    assert missing <= {"lwip", "lwip-bulk", "pytcp", "pytcp-bulk"}
    failed = {key for key, target in found.items() if target["value"] is None} - {"placement"} - missing
    assert not failed, [found[key] for key in failed]
    assert found["sessions"]["reached"] is None  # a handful is not 10,000
    assert "Library-SHM-IPF" in run.stdout
    assert stored_html.read_text().startswith("<!DOCTYPE html>")


@needs_hosts
def test_layers_add_up_to_the_round_trip(tmp_path: Path) -> None:
    stored_json = tmp_path / "l.json"
    run = command("--layers", "--json", str(stored_json), ULNET_TABLE_TINY="1")
    assert run.returncode == 0, run.stderr
    found = json.loads(stored_json.read_text())["layers"]
    assert {"library SHM-IPF, TCP", "library SHM-IPF, UDP"} <= {way["name"] for way in found["ways"]}, found["notes"]
    for way in found["ways"]:
        assert way["incomplete"] <= way["messages"] // 4
        # The mean of the middle half against the median of all: of so few messages, on a busy machine, some slept for.
        assert way["sum_us"] == pytest.approx(sum(us for us in way["us"].values() if us is not None))
        assert 0.4 < way["sum_us"] / way["half_us"] < 4.0, way
    assert found["counts"]["TCP message of 1 B"]["kernel crossings"] == 1
    assert "transport output" in run.stdout


def test_a_file_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    run = command("--json", str(tmp_path / "none" / "t.json"))
    assert run.returncode == 1
    assert run.stderr.startswith("ulnet table: cannot write ")
    assert len(run.stderr.splitlines()) == 1
