"""Fixtures of the benchmarks: two served hosts with a measuring process each, and a clock for what they measure."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.demo import measure, run
from ulnet.kernelshim.testbed import Testbed, can_testbed


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

    def __init__(self, a: measure.Worker, b: measure.Worker) -> None:
        self.a = a
        self.b = b

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
            kernel.append(measure.once(self.a, self.b, "kernel", command)[figure] * scale)

        def our_turn() -> None:
            ours.append(measure.once(self.a, self.b, api, command)[figure] * scale)
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
    with tempfile.TemporaryDirectory(prefix="ulnet-bench-") as name, Testbed() as bed:
        folder = Path(name)
        folder.chmod(0o755)  # the measuring processes give root up and must reach the sockets
        a, b = bed.host("bench_a"), bed.host("bench_b")
        bed.wire(a, b, a_addr=f"{run.A_KERNEL}/24", b_addr=f"{run.B_KERNEL}/24")
        paths = folder / "a.sock", folder / "b.sock"
        servers = [run.start_server(a, run.A_USER, paths[0]), run.start_server(b, run.B_USER, paths[1])]
        cpus = measure.cpu_plan()
        workers = [
            measure.Worker(a, str(paths[0]), {"kernel": run.A_KERNEL, "ulnet": run.A_USER}, cpus[0]),
            measure.Worker(b, str(paths[1]), {"kernel": run.B_KERNEL, "ulnet": run.B_USER}, cpus[1]),
        ]
        yield Ends(*workers)
        for worker in workers:
            worker.close()
        for server in servers:
            server.terminate()
            server.wait(10)
