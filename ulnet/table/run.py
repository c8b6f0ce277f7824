"""``ulnet table``: make the hosts, measure, remove them, show and store what was found."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import ulnet
from ulnet.kernelshim.testbed import can_testbed, ensure_privilege
from ulnet.table import features, report, targets
from ulnet.table.bed import Bed, MeasureError
from ulnet.table.measure import Budget, Table

WIDTH = 120
TINY = "ULNET_TABLE_TINY"  # for tests: everything once


def budget_for(quick: bool) -> Budget:
    if os.environ.get(TINY):
        return Budget.tiny()
    return Budget.quick() if quick else Budget.full()


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "uvloop": getattr(features.UVLOOP, "__version__", None),
        "load": os.getloadavg()[0],
    }


def notes(bed: Bed) -> list[str]:
    a, b = bed.cpus
    where = (
        f"End a runs on processor {a[0]}, end b on processor {b[0]}; the network servers wherever the system puts them."
        if a != b
        else "Only one processor: both ends run on it, and round trips include the kernel's switching between them."
    )
    return [
        where,
        "Both ends are the same program without privilege; packet filters and the outgoing guard are on. "
        f"Buffer interface: {features.buffer_interface()}. Congestion control of the kernel's bulk TCP: "
        f"{bed.workers[0].tell(op='congestion')['congestion']}.",
    ]


def measure(
    budget: Budget, step: Callable[[str, float], None], *, table: bool, with_targets: bool, layers: bool, loss: bool
) -> dict[str, Any]:
    """The document. ``step(what, share done)``."""
    document: dict[str, Any] = {
        "ulnet": ulnet.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if table or with_targets:
        step("making two hosts", 0.0)
        with Bed() as bed:
            document["notes"] = notes(bed)
            part = 1.0 if not with_targets else 0.45
            grid = Table() if table else Table(targets.TABLE_ROWS, targets.TABLE_COLUMNS)
            grid.measure(bed, budget, lambda share: step("table", share * part))
            if table:
                document["table"] = grid.document()
            if with_targets:
                context = targets.Context(bed, budget, grid)
                document["targets"] = targets.measure(
                    context, lambda name, share: step(name, part + share * (1 - part))
                )
            for row in grid.rows:
                if row.key in grid.skipped and not row.missing():
                    document["notes"].append(f"{row.name}: gave up: {grid.skipped[row.key]}.")
    if loss:
        with Bed(lossy=True) as bed:
            document.setdefault("notes", notes(bed))
            context = targets.Context(bed, budget, Table((), ()))
            found = targets.measure(context, step, targets.LOSS_TARGETS)
            document["targets"] = document.get("targets", []) + found
    if layers:
        from ulnet.table import layers as layering

        with Bed(stamps=True) as bed:
            document.setdefault("notes", notes(bed))
            document["layers"] = layering.measure(bed, budget, lambda name, share: step(name, share))
    return document


def show(document: dict[str, Any], console: Console) -> None:
    console.print(report.machine_view(document))
    if "table" in document:
        console.print(report.table_view(document["table"]))
    if "targets" in document:
        console.print(report.targets_view(document["targets"]))
    if "layers" in document:
        console.print(report.layers_view(document["layers"]))


def main(
    *, quick: bool, only_targets: bool, layers: bool, loss: bool, json_path: str | None, html_path: str | None
) -> int:
    for path in (json_path, html_path):
        folder = Path(path).resolve().parent if path else None
        if folder is not None and not os.access(folder, os.W_OK):  # before minutes of measuring, not after
            raise MeasureError(f"cannot write {path}: no folder {folder} that may be written to")
    try:
        ensure_privilege()
    except (PermissionError, RuntimeError) as refused:
        raise MeasureError(getattr(refused, "strerror", None) or str(refused)) from None
    reason = can_testbed()
    if reason is not None:
        raise MeasureError(reason)
    console = Console(highlight=False)
    if not console.is_terminal or console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)  # folded cells would be unreadable
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
    with bar:
        task = bar.add_task("", total=1.0)
        document = measure(
            budget_for(quick),
            lambda name, share: bar.update(task, description=name, completed=share),
            table=not (only_targets or layers or loss),
            with_targets=only_targets or not (layers or loss),
            layers=layers,
            loss=loss or not layers,
        )
    document["quick"] = quick
    show(document, console)
    if json_path:
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n")
    if html_path:
        from ulnet.table import page

        Path(html_path).write_text(page.render(document))
    for path in (json_path, html_path):
        if path:
            print(f"ulnet table: wrote {path}", file=sys.stderr)
    return 0
