"""Fixtures of the benchmarks: two served hosts with a measuring process each, and a clock for what they measure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.kernelshim.testbed import can_testbed
from ulnet.table.bed import Bed


class Measured:
    """A clock that the measured figures turn: pytest-benchmark then keeps the figures themselves, not how long it took
    to make connections and to talk to the measuring processes."""

    now_s = 0.0

    @classmethod
    def clock(cls) -> float:
        return cls.now_s

    @classmethod
    def turn(cls, seconds: float) -> None:
        cls.now_s += seconds


class Ends:
    """The measuring processes of two hosts. Kernel sockets and ulnet take turns within each round."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def compare(
        self,
        benchmark: BenchmarkFixture,
        api: str,
        command: dict[str, Any],
        figure: str,
        *,
        rounds: int,
        per_second: float = 0.0,
    ) -> None:
        """Benchmark ``figure`` ("us" or "seconds") of ``api``; kernel sockets' figure and the ratio go to extra_info.

        ``per_second``: what one figure's worth of time moves (MiB, datagrams), for a rate in extra_info.
        """
        scale = 1e-6 if figure == "us" else 1.0
        kernel: list[float] = []
        ours: list[float] = []

        def kernel_turn() -> None:
            kernel.append(self.bed.once(command, "kernel")[figure] * scale)

        def our_turn() -> None:
            ours.append(self.bed.once(command, api)[figure] * scale)
            Measured.turn(ours[-1])

        benchmark.pedantic(our_turn, setup=kernel_turn, rounds=rounds)  # type: ignore[no-untyped-call]
        # A slow moment of the machine hits both turns of a round: so the median of ratios, not the ratio of medians.
        benchmark.extra_info["kernel_s"] = statistics.median(kernel)
        benchmark.extra_info["ratio_to_kernel"] = round(
            statistics.median(u / k for u, k in zip(ours, kernel, strict=True)), 3
        )
        if per_second:
            benchmark.extra_info["per_second"] = round(per_second / statistics.median(ours), 1)
            benchmark.extra_info["kernel_per_second"] = round(per_second / statistics.median(kernel), 1)


@pytest.fixture(scope="session")
def ends() -> Iterator[Ends]:
    """Skips with the reason where no test hosts can be made."""
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    with Bed() as bed:
        yield Ends(bed)
