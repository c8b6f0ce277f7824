"""The targets, as data, and how each is measured: small functions with a bound on their time.

Kernel sockets and ulnet take turns within each measurement, and the figure is the median of the ratios of the turns.
The reference is Python with kernel sockets unless the target says otherwise.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ulnet.stack import checksum
from ulnet.stack.protocol import Call
from ulnet.stack.proxy import query
from ulnet.table import features, peers
from ulnet.table.bed import Bed, MeasureError
from ulnet.table.ends import page_bytes
from ulnet.table.measure import Budget, Table, bulk_bytes, paired_ratio, quartiles, twice
from ulnet.table.report import number
from ulnet.table.rows import BLOCKING, BUFFER_IPF, COLUMN, IPF, SERVER, SHM, SPINNING

REQUEST_CONNECTIONS, CHANNELS, SESSIONS = 1000, 2048, 10_000  # what the targets speak of
HOLD_AT_ONCE = 50
RECOVERY_S = 60.0
TURNS_MIN = 3


class Outcome(NamedTuple):
    """``value`` None: not measured, and ``how`` says why. ``whole`` False: of fewer things than the target is about."""

    value: float | None
    how: str
    samples: tuple[float, ...] = ()
    whole: bool = True


@dataclass
class Context:
    """``table`` holds at least TABLE_ROWS and TABLE_COLUMNS, measured."""

    bed: Bed
    budget: Budget
    table: Table
    crowd: Crowd | None = None


TABLE_ROWS = (BLOCKING, SPINNING, IPF, BUFFER_IPF)
TABLE_COLUMNS = tuple(COLUMN[key] for key in ("bulk", "tcp1", "tcp1460", "udp1", "udp1472"))


# -- taking turns ----------------------------------------------------------------------------------


def _turns(context: Context, sides: dict[str, Callable[[], float]], share: float = 1.0) -> dict[str, list[float]]:
    """Each side in turn until ``share`` of a target's time is over; its figures."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    rounds = TURNS_MIN if context.budget.least > 1 else 1
    start = time.monotonic()
    while True:
        for name, side in sides.items():
            found[name].append(twice(side))
        done = len(found[next(iter(sides))])
        spent = time.monotonic() - start
        if done >= rounds and spent + spent / done > context.budget.target_s * share:
            return found


def _trips(context: Context, api: str, proto: str, *, spin: bool, size: int = 1) -> Callable[[], float]:
    count = max(10, context.budget.trips // 4)
    command: dict[str, Any] = {
        "op": "rtt", "proto": proto, "sizes": [size], "count": count, "warm": count // 10, "spin": spin,
    }  # fmt: skip
    return lambda: float(context.bed.once(command, api)["us"])


def _bulk(context: Context, api: str, api_b: str | None = None, scale: float = 1.0) -> Callable[[], float]:
    known = context.table.cells[IPF.key]["bulk"].values
    size = bulk_bytes(context.budget, statistics.median(known) * scale if known else None)
    command = {"op": "bulk", "proto": "tcp", "bytes": size}
    return lambda: float(context.bed.once(command, api, api_b)["gbit"])


def _against(ours: list[float], kernel: list[float], unit: str) -> str:
    return f"{number(statistics.median(ours))} {unit} against {number(statistics.median(kernel))}"


# -- from the table --------------------------------------------------------------------------------


def _cells(context: Context, row: str, kernel: str, *columns: str) -> Outcome:
    """The worst ratio of these columns."""
    worst: Outcome | None = None
    for key in columns:
        skipped = context.table.skipped.get(row) or context.table.skipped.get(kernel)
        if skipped:
            return Outcome(None, skipped)
        mine, theirs = context.table.cells[row][key].values, context.table.cells[kernel][key].values
        if not mine or not theirs:
            return Outcome(None, "not in this table")
        ratio = paired_ratio(mine, theirs)
        ratios = tuple(v / k for v, k in zip(mine, theirs, strict=False))
        column = COLUMN[key]
        label = f"{column.proto.upper()} {_against(mine, theirs, column.unit)}"
        if worst is None or (worst.value is not None and (ratio > worst.value) == bool(column.size)):
            worst = Outcome(ratio, label, ratios)
    assert worst is not None
    return worst


def udp_trip(context: Context) -> Outcome:
    return _cells(context, IPF.key, SPINNING.key, "udp1")


def tcp_trip(context: Context) -> Outcome:
    return _cells(context, IPF.key, SPINNING.key, "tcp1")


def blocking_trip(context: Context) -> Outcome:
    return _cells(context, IPF.key, BLOCKING.key, "tcp1", "udp1")


def large_trip(context: Context) -> Outcome:
    return _cells(context, IPF.key, SPINNING.key, "tcp1460", "udp1472")


def bulk_buffers(context: Context) -> Outcome:
    found = _cells(context, BUFFER_IPF.key, BLOCKING.key, "bulk")
    return found._replace(how=f"{found.how}; {features.buffer_interface()}")


def bulk_plain(context: Context) -> Outcome:
    return _cells(context, IPF.key, BLOCKING.key, "bulk")


# -- measured by themselves ------------------------------------------------------------------------


def one_core(context: Context) -> Outcome:
    worst = Outcome(None, "")
    with context.bed.one_processor():
        for proto in ("tcp", "udp"):
            found = _turns(
                context,
                {
                    "kernel": _trips(context, "kernel", proto, spin=False),
                    "ulnet": _trips(context, "ulnet-ipf-still", proto, spin=False),
                },
                0.5,
            )
            ratio = paired_ratio(found["ulnet"], found["kernel"])
            if worst.value is None or ratio > worst.value:
                how = f"{proto.upper()} {_against(found['ulnet'], found['kernel'], 'us')}"
                worst = Outcome(ratio, how, _pairs(found["ulnet"], found["kernel"]))
    return worst


def _pairs(ours: list[float], kernel: list[float]) -> tuple[float, ...]:
    return tuple(u / k for u, k in zip(ours, kernel, strict=True))


def bulk_no_offload(context: Context) -> Outcome:
    with context.bed.no_offload():
        found = _turns(
            context, {"kernel": _bulk(context, "kernel", scale=0.1), "ulnet": _bulk(context, "ulnet-ipf", scale=0.1)}
        )
    how = _against(found["ulnet"], found["kernel"], "Gbit/s")
    return Outcome(paired_ratio(found["ulnet"], found["kernel"]), how, _pairs(found["ulnet"], found["kernel"]))


def bulk_mixed(context: Context) -> Outcome:
    found = _turns(
        context,
        {
            "kernel": _bulk(context, "kernel"),
            "from kernel": _bulk(context, "kernel", "ulnet-ipf"),
            "to kernel": _bulk(context, "ulnet-ipf", "kernel"),
        },
    )
    ways = {way: paired_ratio(found[way], found["kernel"]) for way in ("from kernel", "to kernel")}
    worst = min(ways, key=lambda way: ways[way])
    kernel = statistics.median(found["kernel"])
    how = (
        ", ".join(f"{way} {number(statistics.median(found[way]))}" for way in ways)
        + f" Gbit/s against {number(kernel)}"
    )
    return Outcome(ways[worst], how, _pairs(found[worst], found["kernel"]))


def datagram_batches(context: Context) -> Outcome:
    trains = max(2, context.budget.trips // 8)
    command = {"op": "train", "proto": "udp", "size": 64, "count": trains * 64, "length": 64, "ahead": 2, "batch": True}

    def rate(api: str, spin: bool = True) -> Callable[[], float]:
        return lambda: 1e6 / float(context.bed.once(command | {"spin": spin}, api)["us"])

    sides = {"blocking": rate("kernel", False), "spinning": rate("kernel"), "ulnet": rate("ulnet-ipf")}
    found = _turns(context, sides)
    kernel = max(found["blocking"], found["spinning"], key=statistics.median)  # the way that suits it better
    how = _against(found["ulnet"], kernel, "datagrams/s")
    if not features.BATCH:
        how += f"; {features.NO_BATCH}"
    return Outcome(paired_ratio(found["ulnet"], kernel), how, _pairs(found["ulnet"], kernel))


def requests(context: Context) -> Outcome:
    count = context.budget.connections
    command = {"op": "requests", "count": count, "seconds": max(0.1, context.budget.target_s / 4)}

    def rate(api: str) -> Callable[[], float]:
        return lambda: float(context.bed.once(command, api)["rate"])

    found = _turns(context, {"kernel": rate("kernel"), "ulnet": rate("ulnet-ipf")}, 2.0)
    theirs = "asyncio with uvloop" if features.UVLOOP else "asyncio (uvloop is not installed)"
    ours = "ulnet.stack.selectors" if features.SELECTORS else "epoll on descriptors"
    how = f"{count} connections: {_against(found['ulnet'], found['kernel'], 'answers/s')}; {ours} against {theirs}"
    pairs = _pairs(found["ulnet"], found["kernel"])
    return Outcome(paired_ratio(found["ulnet"], found["kernel"]), how, pairs, count >= REQUEST_CONNECTIONS)


def connections(context: Context) -> Outcome:
    command = {"op": "connect", "count": max(3, context.budget.trips // 20)}

    def rate(api: str) -> Callable[[], float]:
        return lambda: 1e6 / float(context.bed.once(command, api)["us"])

    found = _turns(context, {"kernel": rate("kernel"), "ulnet": rate("ulnet-ipf")})
    how = _against(found["ulnet"], found["kernel"], "connections/s")
    return Outcome(paired_ratio(found["ulnet"], found["kernel"]), how, _pairs(found["ulnet"], found["kernel"]))


def placement(context: Context) -> Outcome:
    if not features.PLACEMENT:
        return Outcome(None, features.NO_PLACEMENT)
    sides = {"library": IPF.api, "sleeping library": SHM.api, "server": SERVER.api}
    found = _turns(context, {name: _trips(context, api, "tcp", spin=True) for name, api in sides.items()})
    sleeping = number(statistics.median(found["sleeping library"]))
    how = (
        f"{_against(found['server'], found['library'], 'us')}, or {sleeping} where the library sleeps between packets, "
        "too; two more processes on the way (ulnet table --layers)"
    )
    return Outcome(paired_ratio(found["server"], found["library"]), how, _pairs(found["server"], found["library"]))


# -- other user-level stacks ------------------------------------------------------------------------


def _other(context: Context, other: peers.Other, what: str) -> Outcome:
    """The library from Python, sendall and recv_into, to another stack with its own interface at both ends."""
    budget = context.budget
    share = min(1.0, (budget.trips / 2000) if what == "rtt" else budget.bulk_s / 0.4)
    amount = max(10, int((other.trips if what == "rtt" else other.bulk_bytes) * share))
    ours = _trips(context, IPF.api, "tcp", spin=True) if what == "rtt" else _bulk(context, IPF.api)
    found = _turns(context, {"theirs": lambda: other.measure(context.bed, what, amount), "ours": ours})
    unit, scale = ("us", 1.0) if what == "rtt" else ("Mbit/s", 1000.0)
    mine, theirs = ([value * scale for value in found[side]] for side in ("ours", "theirs"))
    how = _against(mine, theirs, unit)
    return Outcome(paired_ratio(found["ours"], found["theirs"]), how, _pairs(found["ours"], found["theirs"]))


def lwip_trip(context: Context) -> Outcome:
    return _other(context, peers.LWIP, "rtt")


def lwip_bulk(context: Context) -> Outcome:
    return _other(context, peers.LWIP, "bulk")


def pytcp_trip(context: Context) -> Outcome:
    return _other(context, peers.PYTCP, "rtt")


def pytcp_bulk(context: Context) -> Outcome:
    return _other(context, peers.PYTCP, "bulk")


# -- many of something -----------------------------------------------------------------------------


def many_channels(context: Context) -> Outcome:
    """Round trips with many other channels at end a's server, and before and after them."""
    bed, budget = context.bed, context.budget
    trip = _trips(context, IPF.api, "udp", spin=True)
    before = [trip() for _ in range(TURNS_MIN)]
    seconds = max(2.0, budget.target_s * 5)
    arguments = [str(bed.paths["a"]), str(budget.channels - 1), str(seconds)]
    process = bed.a.popen(
        [sys.executable, "-m", "ulnet.table.channels", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        opened, _, reason = process.stdout.readline().strip().partition(" ")
        if not opened:
            raise MeasureError("the process with many channels ended")
        many = [trip() for _ in range(TURNS_MIN)]
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _await_server(bed.paths["a"])
    how = f"{int(opened) + 1} channels: {_against(many, before, 'us')} with one"
    if reason:
        how += f" ({reason})"
    ratio = statistics.median(many) / statistics.median(before)
    return Outcome(ratio, how, _pairs(many, before), int(opened) + 1 >= CHANNELS)


def _await_server(path: Path) -> None:
    """The kernel waits for a grace period at each packet socket that closes: a server that loses two thousand channels
    at once answers nobody for some seconds, and the next measurement should not pay for it."""
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            query(Call.COUNTERS, str(path))
            return


class Crowd(NamedTuple):
    """What many idle sessions do."""

    sessions: int
    bytes_each: float
    parts: str
    ratio: float
    us: tuple[float, float]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page_bytes()


def _crowd(context: Context) -> Crowd:
    """Idle sessions: memory of both libraries and servers before and with them, and round trips beside them."""
    if context.crowd is not None:
        return context.crowd
    bed, budget = context.bed, context.budget
    trip = _trips(context, IPF.api, "tcp", spin=True)

    def memory() -> dict[str, int]:
        ends = {
            f"library {name}": _resident(worker.process.pid) for name, worker in zip("ab", bed.workers, strict=True)
        }
        return ends | {f"server {name}": _resident(server.pid) for name, server in zip("ab", bed.servers, strict=True)}

    first = min(HOLD_AT_ONCE, budget.crowd)
    end = time.monotonic() + max(1.0, budget.target_s * 8)
    hold = {"op": "hold", "count": first}
    with _dropped(bed):
        bed.once(hold, IPF.api)  # pools and tables have grown a little by then
        few = [trip() for _ in range(TURNS_MIN)]
        before = memory()
        count = 0
        while count < budget.crowd and (count == 0 or time.monotonic() < end):
            bed.once(hold, IPF.api)
            count += first
        after = memory()
        many = [trip() for _ in range(2 * TURNS_MIN)]
    with _dropped(bed):  # again: the machine may have changed its pace meanwhile
        bed.once(hold, IPF.api)
        few += [trip() for _ in range(TURNS_MIN)]
    each = {name: (after[name] - before[name]) / count for name in before}
    parts = ", ".join(f"{name} {value / 1024:.2f}" for name, value in each.items())
    # A session has one end here and one there, each with a library and a server.
    # The two cannot alternate, and the machine's pace changes by more than what is looked for: the fastest of each.
    us = min(many), min(few)
    context.crowd = Crowd(count, sum(each.values()) / 2, parts, us[0] / us[1], us)
    return context.crowd


@contextlib.contextmanager
def _dropped(bed: Bed) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in bed.workers:
            worker.tell(op="drop")


def many_sessions(context: Context) -> Outcome:
    crowd = _crowd(context)
    many, few = (number(us) for us in crowd.us)
    how = f"{crowd.sessions + HOLD_AT_ONCE} sessions: {many} us against {few} with {HOLD_AT_ONCE}, fastest turn of each"
    return Outcome(crowd.ratio, how, whole=crowd.sessions >= SESSIONS)


def session_memory(context: Context) -> Outcome:
    crowd = _crowd(context)
    return Outcome(crowd.bytes_each / 1024, f"resident memory over {crowd.sessions} sessions, KiB each: {crowd.parts}")


def checksums(context: Context) -> Outcome:
    ratios: dict[int, float] = {}
    for size in (1460, 65536):
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        rounds = max(10, int(2e7 * min(1.0, context.budget.target_s) / size))

        def seconds(name: Literal["fast", "naive"], data: bytes = data, rounds: int = rounds) -> float:
            start = time.perf_counter()
            checksum.repeat(name, data, rounds)
            return time.perf_counter() - start

        found = _turns(context, {"naive": lambda f=seconds: f("naive"), "fast": lambda f=seconds: f("fast")}, 0.2)  # type: ignore[misc]
        ratios[size] = paired_ratio(found["naive"], found["fast"])
    how = ", ".join(f"{ratio:.1f}x at {size} B" for size, ratio in ratios.items())
    return Outcome(min(ratios.values()), how)


# -- with loss: on a bed of its own, through a host that loses frames (Bed(lossy=True)) ----------------

LOSE_ONE_IN = 100


def _lossy(context: Context, sides: dict[str, Callable[[], float]], share: float = 2.0) -> dict[str, list[float]]:
    context.bed.hop.lose(LOSE_ONE_IN)
    try:
        return _turns(context, sides, share)
    finally:
        context.bed.hop.lose(0)


def _compared(found: dict[str, list[float]], how: str) -> Outcome:
    return Outcome(paired_ratio(found["ulnet"], found["kernel"]), how, _pairs(found["ulnet"], found["kernel"]))


def loss_tcp_trip(context: Context) -> Outcome:
    command = {"op": "trips-for", "proto": "tcp", "seconds": context.budget.target_s / 3}

    def mean(api: str) -> Callable[[], float]:
        return lambda: float(context.bed.once(command, api)["mean_us"])

    found = _lossy(context, {"kernel": mean("kernel"), "ulnet": mean(IPF.api)})
    return _compared(found, f"mean {_against(found['ulnet'], found['kernel'], 'us')}, retransmissions included")


def loss_udp_trip(context: Context) -> Outcome:
    command = {"op": "trips-for", "proto": "udp", "seconds": context.budget.target_s / 6}
    gone = {"kernel": [0, 0], IPF.api: [0, 0]}

    def median(api: str) -> Callable[[], float]:
        def side() -> float:
            figures = context.bed.once(command, api)
            gone[api][0] += figures["lost"]
            gone[api][1] += figures["sent"]
            return float(figures["us"])

        return side

    found = _lossy(context, {"kernel": median("kernel"), "ulnet": median(IPF.api)}, 1.0)
    lost = [f"{100 * lost / max(1, sent):.1f} %" for lost, sent in (gone[IPF.api], gone["kernel"])]
    how = f"median of those answered {_against(found['ulnet'], found['kernel'], 'us')}; no answer: {lost[0]}, {lost[1]}"
    return _compared(found, how)


def _loss_bulk(context: Context) -> Outcome:
    size = max(4, round(64 * min(1.0, context.budget.bulk_s / 0.4))) << 20
    command = {"op": "bulk", "proto": "tcp", "bytes": size}

    def rate(api: str) -> Callable[[], float]:
        return lambda: float(context.bed.once(command, api)["gbit"])

    found = _lossy(context, {"kernel": rate("kernel"), "ulnet": rate(IPF.api)})
    return _compared(found, _against(found["ulnet"], found["kernel"], "Gbit/s"))


def loss_bulk(context: Context) -> Outcome:
    return _loss_bulk(context)


def loss_bulk_no_offload(context: Context) -> Outcome:
    with context.bed.no_offload():
        return _loss_bulk(context)


def loss_requests(context: Context) -> Outcome:
    count = min(100, context.budget.connections)
    command = {"op": "requests", "count": count, "seconds": max(0.1, context.budget.target_s / 4)}

    def rate(api: str) -> Callable[[], float]:
        return lambda: float(context.bed.once(command, api)["rate"])

    found = _lossy(context, {"kernel": rate("kernel"), "ulnet": rate(IPF.api)})
    return _compared(found, f"{count} connections: {_against(found['ulnet'], found['kernel'], 'answers/s')}")


# -- the targets -----------------------------------------------------------------------------------


class Target(NamedTuple):
    """``low``: smaller is better. ``target`` None: shown only."""

    key: str
    name: str
    year_1993: str
    target: float | None
    moonshot: float | None
    measure: Callable[[Context], Outcome]
    low: bool = True
    unit: str = "x"

    def meets(self, value: float | None, bound: float | None) -> bool | None:
        if value is None or bound is None:
            return None
        return value <= bound if self.low else value >= bound

    def shown(self, bound: float | None) -> str:
        return (
            "-"
            if bound is None
            else f"{'<=' if self.low else '>='} {bound:g}{'' if self.unit == 'x' else ' ' + self.unit}"
        )


TARGETS = (
    Target("udp1", "UDP 1 B round trip, to kernel sockets spinning", "0.85", 0.50, 0.40, udp_trip),
    Target("tcp1", "TCP 1 B round trip, the same", "1.23", 0.45, 0.36, tcp_trip),
    Target("blocking", "either, to kernel sockets blocking on two processors", "", 0.10, 0.05, blocking_trip),
    Target("one-core", "either, both ends blocking on one processor, no spinning", "", 0.85, 0.65, one_core),
    Target("large", "round trips of 1460 and 1472 B, spinning", "0.98 to 1.09", 0.55, 0.40, large_trip),
    Target(
        "bulk-buffers", "bulk TCP, buffer interface, to sendall/recv_into", "1.03", 1.3, 1.6, bulk_buffers, low=False
    ),
    Target("bulk", "bulk TCP, sendall/recv_into on both", "1.02", 1.0, 1.2, bulk_plain, low=False),
    Target("bulk-plain-wire", "bulk TCP, offloads off on both", "", 1.0, 1.2, bulk_no_offload, low=False),
    Target("bulk-mixed", "bulk, from a kernel sender and to a kernel receiver", "", 0.9, 1.2, bulk_mixed, low=False),
    Target("batches", "UDP 64 B datagrams a second, batch calls", "", 8, 20, datagram_batches, low=False),
    Target("requests", "1 KiB requests over many connections, one thread each end", "", 2, 4, requests, low=False),
    Target("connections", "connect, one exchange, close, a second", "", 0.7, 1.0, connections, low=False),
    Target("lwip", "TCP 1 B round trip, to lwIP (C, spinning) on the same link", "", 1.0, None, lwip_trip),
    Target("lwip-bulk", "bulk TCP, to lwIP", "", 1.0, None, lwip_bulk, low=False),
    Target("pytcp", "TCP 1 B round trip, to PyTCP on the same link", "", 1.0, None, pytcp_trip),
    Target("pytcp-bulk", "bulk TCP, to PyTCP", "", 1.0, None, pytcp_bulk, low=False),
    Target("placement", "server placement to library placement, 1 B round trip", "2.5", None, None, placement),
    Target("channels", "round trip with 2,048 channels, to one", "", 1.3, None, many_channels),
    Target("sessions", "round trip with 10,000 sessions in one channel", "", 1.1, None, many_sessions),
    Target("memory", "memory of an idle session, library and server", "", 6, 3, session_memory, unit="KiB"),
    Target("checksum", "Internet checksum, to a C loop over 16-bit words", "", 10, None, checksums, low=False),
)
LOSS_TARGETS = (
    Target("loss-tcp1", "1 % loss: TCP 1 B round trip", "", 1.2, 0.5, loss_tcp_trip),
    Target("loss-udp1", "1 % loss: UDP 1 B round trip", "", 0.85, 0.5, loss_udp_trip),
    Target("loss-bulk", "1 % loss of 64 KiB segments: bulk TCP", "", 0.5, 1.0, loss_bulk, low=False),
    Target(
        "loss-bulk-plain-wire",
        "1 % loss of frames: bulk TCP, offloads off",
        "",
        0.5,
        1.0,
        loss_bulk_no_offload,
        low=False,
    ),
    Target("loss-requests", "1 % loss: 1 KiB requests", "", 1.0, 2, loss_requests, low=False),
)


def measure(
    context: Context, step: Callable[[str, float], None], targets: tuple[Target, ...] = TARGETS
) -> list[dict[str, Any]]:
    """All of them; one that fails says why, and the others go on. ``step(name, share done)``."""
    document = []
    for place, target in enumerate(targets):
        step(target.name, place / len(targets))
        try:
            outcome = target.measure(context)
        except (MeasureError, OSError, subprocess.SubprocessError) as error:
            outcome = Outcome(None, str(error))
        spread = quartiles(outcome.samples) if outcome.samples else None
        document.append(
            {
                "key": target.key,
                "name": target.name,
                "year_1993": target.year_1993,
                "target": target.shown(target.target) if target.target is not None else "shown",
                "moonshot": target.shown(target.moonshot),
                "unit": target.unit,
                "value": outcome.value,
                "q1": spread[0] if spread else None,
                "q3": spread[2] if spread else None,
                "how": outcome.how,
                "reached": target.meets(outcome.value, target.target) if outcome.whole else None,
                "moonshot_reached": target.meets(outcome.value, target.moonshot) if outcome.whole else None,
            }
        )
    step("", 1.0)
    return document
