"""The table itself: rows in turn, pass after pass, as long as the budget lasts.

Within a pass every row measures every column before the next pass begins, so that a slow minute of the machine falls on
all rows. A ratio is the median over the passes of the ratios within a pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ulnet.table.bed import MeasureError, Pair
from ulnet.table.rows import COLUMNS, ROWS, Column, Row, ratio_1993, reference

MIB = 1 << 20
_T = TypeVar("_T")


@dataclass(frozen=True)
class Budget:
    """How much time there is, and how it is cut. Times in seconds."""

    table_s: float
    target_s: float  # for one target
    cell_s: float  # what one round-trip cell should take
    bulk_s: float
    passes: int  # at most
    least: int = 2  # passes, even when they take too long
    trips: int = 2000  # at most, for one cell of a pass
    crowd: int = 10_000  # sessions
    channels: int = 2048
    connections: int = 1000

    @classmethod
    def quick(cls, seconds: float = 45.0) -> Budget:
        """``seconds``: of all that is measured, table and targets."""
        return cls(
            table_s=seconds * 0.45,
            target_s=seconds * 0.02,
            cell_s=0.02,
            bulk_s=0.1,
            passes=5,
            crowd=500,
            channels=48,
            connections=200,
        )

    @classmethod
    def tiny(cls) -> Budget:
        """For tests: everything once, nothing precise."""
        return cls(
            table_s=0.1,
            target_s=0.02,
            cell_s=0.002,
            bulk_s=0.01,
            passes=1,
            least=1,
            trips=20,
            crowd=10,
            channels=4,
            connections=10,
        )

    @classmethod
    def full(cls) -> Budget:
        return cls(table_s=240.0, target_s=6.0, cell_s=0.08, bulk_s=0.4, passes=15)


@dataclass
class Cell:
    """One row's samples in one column: one figure a pass (round trips: the median of that pass)."""

    values: list[float] = field(default_factory=list)
    within: list[tuple[float, float]] = field(default_factory=list)  # quartiles of the single round trips

    def add(self, value: float, within: tuple[float, float] | None = None) -> None:
        self.values.append(value)
        if within is not None:
            self.within.append(within)

    def quartiles(self) -> tuple[float, float, float]:
        """Of the passes."""
        return quartiles(self.values)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def twice(measurement: Callable[[], _T]) -> _T:
    """Once more if it fails: a busy machine loses a datagram now and then."""
    try:
        return measurement()
    except MeasureError:
        return measurement()


def paired_ratio(values: Sequence[float], kernel: Sequence[float]) -> float:
    """Median of the ratios pass by pass."""
    return statistics.median(v / k for v, k in zip(values, kernel, strict=False))


class Table:
    """Rows against columns. ``measure`` fills it; ``document`` is what JSON and the reports are made of."""

    def __init__(self, rows: Sequence[Row] = ROWS, columns: Sequence[Column] = COLUMNS) -> None:
        self.rows = list(rows)
        self.columns = list(columns)
        self.cells = {row.key: {column.key: Cell() for column in columns} for row in rows}
        self.skipped = {row.key: row.missing() for row in rows if row.missing()}
        self.passes = 0

    @property
    def live(self) -> list[Row]:
        return [row for row in self.rows if row.key not in self.skipped]

    def measure(self, bed: Pair, budget: Budget, step: Callable[[float], None] = lambda share: None) -> None:
        """Passes until the budget is used up. ``step`` is told how much of the work is done (0 to 1)."""
        start = time.monotonic()
        guess = budget.table_s / 2  # of a pass, before there was one
        while self.passes < budget.passes:
            spent = time.monotonic() - start
            if self.passes >= budget.least and spent + guess > budget.table_s:
                break
            total = max(budget.table_s, guess * budget.least)
            self._pass(bed, budget, partial(_share, step, spent / total, guess / total))
            self.passes += 1
            guess = time.monotonic() - start - spent
        step(1.0)

    def _pass(self, bed: Pair, budget: Budget, step: Callable[[float], None]) -> None:
        jobs = list(dict.fromkeys((column.proto, column.size == 0) for column in self.columns))
        done = 0
        for proto, bulk in jobs:
            columns = [c for c in self.columns if (c.proto, c.size == 0) == (proto, bulk)]
            for row in self.live:
                visit = partial(self._bulk, bed, budget, row, columns[0])
                if not bulk:
                    visit = partial(self._trips, bed, budget, row, columns)
                try:
                    twice(visit)
                except MeasureError as error:
                    self.skipped[row.key] = str(error)
                done += 1
                step(done / (len(jobs) * len(self.rows)))

    def _trips(self, bed: Pair, budget: Budget, row: Row, columns: list[Column]) -> None:
        known = [c.values[-1] for c in (self.cells[row.key][column.key] for column in columns) if c.values]
        count = min(budget.trips, 100)
        if known:
            count = round(min(max(budget.cell_s * 1e6 / statistics.median(known), count), budget.trips))
        command: dict[str, Any] = {
            "op": "rtt", "proto": columns[0].proto, "sizes": [c.size for c in columns], "count": count,
            "warm": max(count // 10, 5), "spin": row.spin, "lend": row.lend,
        }  # fmt: skip
        found = {figure["size"]: figure for figure in bed.once(command, row.api)["sizes"]}
        for column in columns:
            figure = found[column.size]
            self.cells[row.key][column.key].add(figure["us"], (figure["q1"], figure["q3"]))

    def _bulk(self, bed: Pair, budget: Budget, row: Row, column: Column) -> None:
        cell = self.cells[row.key][column.key]
        command = {"op": "bulk", "proto": "tcp", "spin": row.spin, "lend": row.lend}
        command["bytes"] = bulk_bytes(budget, cell.values[-1] if cell.values else None)
        cell.add(bed.once(command, row.api)["gbit"])

    def ratio(self, row: Row, column: Column) -> float | None:
        """To the kernel row; None without samples on both sides."""
        kernel = self.cells.get(reference(column).key, {}).get(column.key)
        mine = self.cells[row.key][column.key]
        if kernel is None or not kernel.values or not mine.values:
            return None
        return paired_ratio(mine.values, kernel.values)

    def document(self) -> dict[str, Any]:
        cells: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            if row.key in self.skipped:
                continue
            cells[row.key] = {}
            for column in self.columns:
                cell = self.cells[row.key][column.key]
                q1, median, q3 = cell.quartiles()
                cells[row.key][column.key] = {
                    "median": median,
                    "q1": q1,
                    "q3": q3,
                    "samples": cell.values,
                    "within": [list(pair) for pair in cell.within],
                    "ratio": self.ratio(row, column),
                    "ratio_1993": ratio_1993(row, column),
                }
        return {
            "passes": self.passes,
            "columns": [{"key": c.key, "proto": c.proto, "size": c.size, "unit": c.unit} for c in self.columns],
            "rows": [{"key": r.key, "name": r.name, "skipped": self.skipped.get(r.key, "")} for r in self.rows],
            "cells": cells,
        }


def _share(step: Callable[[float], None], done: float, part: float, share: float) -> None:
    step(min(1.0, done + part * share))


def bulk_bytes(budget: Budget, gbit: float | None) -> int:
    """How much moves in about ``bulk_s``, in whole MiB; little when nothing is known yet."""
    if gbit is None:
        return 32 * MIB if budget.bulk_s >= 0.1 else 4 * MIB
    return max(4, min(round(gbit * 1e9 / 8 * budget.bulk_s / MIB), 2048)) * MIB
