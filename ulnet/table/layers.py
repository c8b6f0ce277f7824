"""``ulnet table --layers``: where the time of a 1-byte message goes (SOSP 1993 table 4), and what it costs.

Every process leaves time stamps (stack/stamps) while a few thousand messages pass; here the stamps of one message are
put together. The layers of a message add up to its whole way, from the program's call of send to the return of recv
at the other end.
"""

from __future__ import annotations

import bisect
import contextlib
import socket as kernel
import statistics
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped,unused-ignore]

from ulnet.kernelshim.channel import open_embedded
from ulnet.kernelshim.packet import PacketLink
from ulnet.kernelshim.testbed import Host
from ulnet.stack import stamps
from ulnet.table import counts, crossings, features
from ulnet.table.bed import Bed, MeasureError
from ulnet.table.measure import Budget


class Layer(NamedTuple):
    """1993: library SHM-IPF, kernel, server; us."""

    key: str
    name: str
    tcp_1993: tuple[int, int, int]
    udp_1993: tuple[int, int, int]


LAYERS = (
    Layer("entry", "entry, copy in", (19, 50, 254), (6, 65, 293)),
    Layer("transport-out", "transport output", (82, 65, 224), (18, 70, 229)),
    Layer("ip-out", "IP output", (26, 24, 31), (17, 22, 24)),
    Layer("link-out", "link output", (98, 75, 166), (105, 74, 188)),
    Layer("receive", "receive", (42, 77, 101), (39, 74, 99)),
    Layer("filter", "packet filter", (82, 79, 53), (58, 83, 76)),
    Layer("copy", "kernel copy out", (123, 0, 113), (107, 0, 124)),
    Layer("queue", "queue", (22, 0, 79), (20, 0, 68)),
    Layer("ip-in", "IP input", (37, 30, 127), (35, 30, 121)),
    Layer("transport-in", "transport input", (214, 76, 249), (103, 67, 61)),
    Layer("wake", "wake-up", (92, 54, 194), (73, 70, 262)),
    Layer("exit", "copy out, exit", (46, 32, 222), (21, 27, 208)),
)
ALL_1993 = ("934/613/1864", "653/633/1804")  # with the transit of the Ethernet
KERNEL_PARTS = ("link-out", "receive", "filter", "copy")

Event = tuple[int, int]  # ns, point
WAYS = (
    ("library SHM-IPF, TCP", "ulnet-ipf", "tcp"),
    ("library SHM-IPF, UDP", "ulnet-ipf", "udp"),
    ("library SHM, TCP", "ulnet-shm", "tcp"),
    ("library SHM, UDP", "ulnet-shm", "udp"),
    ("server, TCP", "ulnet-ipf-server", "tcp"),
    ("server, UDP", "ulnet-ipf-server", "udp"),
)


class Trail:
    """One end's stamps (its program's and its server's), by point and time."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._at: dict[int, list[int]] = defaultdict(list)
        for ns, point in sorted(events):
            self._at[point].append(ns)

    def all(self, point: int) -> list[int]:
        return self._at[point]

    def first(self, point: int, since: int) -> int | None:
        times = self._at[point]
        at = bisect.bisect_left(times, since)
        return times[at] if at < len(times) else None

    def last(self, point: int, since: int, until: int) -> int | None:
        times = self._at[point]
        at = bisect.bisect_right(times, until) - 1
        return times[at] if at >= 0 and times[at] >= since else None


def message(sender: Trail, receiver: Trail, start: int) -> dict[str, int] | None:
    """Nanoseconds by layer of the message that ``sender``'s program began to send at ``start``; "kernel" undivided.

    None when a stamp is missing or out of order (overwritten, or something else crossed the message's way).
    """
    end = receiver.first(stamps.RECV_RETURN, start)
    ip_out = sender.first(stamps.IP_OUT, start)
    if end is None or ip_out is None:
        return None
    # The last one before IP: a server may have looked at the session just before, for the message that came.
    passed = (sender.last(point, start, ip_out) for point in (stamps.TRANSPORT_OUT, stamps.OUTPUT))
    transport_out = next((at for at in passed if at is not None), None)
    if transport_out is None:
        return None
    marks = [ip_out]
    for trail, point in (
        (sender, stamps.LINK_OUT),
        (receiver, stamps.FRAME),
        (receiver, stamps.TRANSPORT_IN),
        (receiver, stamps.DELIVERED),
    ):
        at = trail.first(point, marks[-1])
        if at is None or at > end:
            return None
        marks.append(at)
    _, link_out, frame, transport_in, delivered = marks
    sent = sender.first(stamps.LINK_SENT, link_out) or frame
    woken = receiver.last(stamps.WOKEN, link_out, frame)
    seen = frame if woken is None else woken
    handed = min(sent, seen)  # the kernel has done its part when the sender's call returns, at the latest
    ready = next(
        (
            t
            for t in (receiver.first(p, delivered) for p in (stamps.RELAYED, stamps.READY))
            if t is not None and t <= end
        ),
        delivered,
    )
    return {
        "entry": transport_out - start,
        "transport-out": ip_out - transport_out,
        "ip-out": link_out - ip_out,
        "kernel": handed - link_out,
        "queue": frame - handed if woken is None else frame - woken,
        "ip-in": transport_in - frame,
        "transport-in": delivered - transport_in,
        "wake": ready - delivered + (0 if woken is None else woken - handed),
        "exit": end - ready,
    }


def average(messages: list[dict[str, int]]) -> dict[str, float]:
    """Mean by layer over the middle half of the messages, so that the layers still add up; microseconds."""
    ordered = sorted(messages, key=lambda layers: sum(layers.values()))
    middle = ordered[len(ordered) // 4 : max(len(ordered) * 3 // 4, len(ordered) // 4 + 1)]
    return {key: statistics.mean(layers[key] for layers in middle) / 1e3 for key in middle[0]}


def analyse(a: Trail, b: Trail) -> tuple[dict[str, float], float, int, int]:
    """Layers in us, half a round trip as the asking program saw it, messages used, messages left out."""
    messages, lost = [], 0
    for sender, receiver in ((a, b), (b, a)):
        for start in sender.all(stamps.CALL_SEND):
            layers = message(sender, receiver, start)
            if layers is None:
                lost += 1
            else:
                messages.append(layers)
    starts, ends = a.all(stamps.CALL_SEND), a.all(stamps.RECV_RETURN)
    trips = [end - start for start, end in zip(starts, ends, strict=False)]
    if not messages or not trips:
        raise MeasureError("no message left all its time stamps")
    return average(messages), statistics.median(trips) / 2e3, len(messages), lost


# -- the kernel's part -----------------------------------------------------------------------------

BATCH = 64  # fewer than a ring holds
BATCHES = 5
ROUNDS = 5
_C, _D = "10.79.0.3", "10.79.0.4"


def _arp(mac: bytes, target: str) -> bytes:
    """A request for ``target``; what the filters of this package tell apart without touching the kernel's IP."""
    body = struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, IPv4Address(_C).packed, bytes(6), IPv4Address(target).packed
    )
    return (b"\xff" * 6 + mac + b"\x08\x06" + body).ljust(60, b"\0")


def _send_us(host: Host, interface: str, frame: bytes, between: Callable[[], None] = lambda: None) -> float:
    """One send of ``frame`` from a packet socket, the least of some batches."""
    with host.socket(kernel.AF_PACKET, kernel.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        best = float("inf")
        for _ in range(BATCHES):
            start = time.perf_counter_ns()
            for _ in range(BATCH):
                sock.send(frame)
            best = min(best, (time.perf_counter_ns() - start) / BATCH / 1e3)
            between()
    return best


@contextlib.contextmanager
def _dummy(host: Host) -> Iterator[str]:
    with host.netlink() as ip:
        ip.link("add", ifname="nothing0", kind="dummy")
        index = ip.link_lookup(ifname="nothing0")[0]
        ip.link("set", index=index, state="up")
        try:
            yield "nothing0"
        finally:
            ip.link("del", index=index)


def kernel_parts(bed: Bed) -> dict[str, float]:
    """What one send costs more with each step behind it, in us.

    A device that drops everything (link output), the way to a host where nobody listens (receive), a filter that
    refuses (packet filter), one that takes it into a ring (copy). Without dummy devices link output includes receive.
    """
    c, d = bed.testbed.host("c"), bed.testbed.host("d")
    wire, _ = bed.testbed.wire(c, d)
    refused, taken = _arp(wire.mac, "10.79.0.99"), _arp(wire.mac, _D)
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):  # in turn, so that a slow moment hits all of them
        steps: dict[str, float] = {}
        with contextlib.suppress(NetlinkError), _dummy(c) as nothing:
            steps["link-out"] = _send_us(c, nothing, refused)
        steps["receive" if steps else "link-out"] = _send_us(c, wire.name, refused)
        with d:
            link = open_embedded(d.interface.name, IPv4Address(_D))
        try:
            steps["filter"] = _send_us(c, wire.name, refused)
            steps["copy"] = _send_us(c, wire.name, taken, partial(_drain, link))
        finally:
            link.close()
        rounds.append(steps)
    least = {key: min(steps[key] for steps in rounds) for key in rounds[0]}
    costs = [0.0, *least.values()]
    return {key: max(0.0, cost - costs[at]) for at, (key, cost) in enumerate(least.items())}


def _drain(link: PacketLink) -> None:
    while (held := link.hold_frame()) is not None:
        if held[0] is not None:
            link.release(held[0])


# -- together --------------------------------------------------------------------------------------


def _one_way(bed: Bed, api: str, proto: str, count: int) -> dict[str, Any]:
    plain = bed.once({"op": "rtt", "proto": proto, "sizes": [1], "count": count, "warm": count // 10 + 5}, api)["us"]
    for path in bed.stamps.values():
        stamps.switch(path, True)
    try:
        bed.once({"op": "stamped", "proto": proto, "count": count}, api)
    finally:
        for path in bed.stamps.values():
            stamps.switch(path, False)
    a, b = (Trail(stamps.read(bed.stamps[end]) + stamps.read(bed.stamps[f"server-{end}"])) for end in "ab")
    layers, half, used, lost = analyse(a, b)
    return {"us": layers, "half_us": half, "plain_half_us": plain / 2, "messages": used, "incomplete": lost}


def split(layers: dict[str, float], parts: dict[str, float]) -> dict[str, float | None]:
    """The kernel's part divided as ``parts``; without them it all stands under link output."""
    whole = layers.pop("kernel")
    total = sum(parts.values())
    shown: dict[str, float | None] = {layer.key: layers.get(layer.key) for layer in LAYERS}
    if total:
        return shown | {key: whole * part / total for key, part in parts.items()}
    return shown | {"link-out": whole}


def measure(bed: Bed, budget: Budget, step: Callable[[str, float], None]) -> dict[str, Any]:
    """The document of ``--layers``."""
    notes = []
    step("the kernel's part", 0.0)
    parts: dict[str, float] = {}
    try:
        parts = kernel_parts(bed)
        shares = ", ".join(f"{key} {value:.2f}" for key, value in parts.items())
        notes.append(
            "Link output to kernel copy out are one system call of the sender, divided in proportion to sends of their "
            "own: into a dummy device, to no socket, to a filter that refuses, into a ring; each adds, in us: "
            f"{shares}."
        )
        if "receive" not in parts:
            notes.append("Link output includes receive: this kernel has no dummy devices to tell them apart.")
    except (OSError, NetlinkError) as error:
        notes.append(
            f"Link output stands for all the kernel does in the sender's call; it could not be divided: {error}."
        )
    ways = []
    for number, (name, api, proto) in enumerate(WAYS):
        step(name, 0.1 + 0.6 * number / len(WAYS))
        if api.endswith("-server") and not features.PLACEMENT:
            notes.append(f"{name}: {features.NO_PLACEMENT}.")
            continue
        try:
            found = _one_way(bed, api, proto, min(budget.trips, 2000))
        except MeasureError as error:
            notes.append(f"{name}: {error}.")
            continue
        found["sum_us"] = sum(found["us"].values())
        found["us"] = split(found["us"], parts)
        ways.append({"name": name, "api": api, "proto": proto} | found)
    step("system calls and switches", 0.65)
    live, uncounted = crossings.measure(bed, min(budget.trips, 500), trace=budget.least > 1)
    step("counts", 0.8)
    counted, more = counts.overview("ipf", with_allocations=budget.least > 1)
    notes.append(
        "queue: in the ring, until noticed. wake-up: of the sleeping thread, and from the delivered data to the "
        "program's thread. Server placement: entry and exit hold the hop between program and server, with its wake-up."
    )
    notes.append(
        "Counted: two stacks in one thread, over packet sockets. Allocations: calls of malloc; Python's own arenas are "
        "not seen."
    )
    return {
        "layers": [
            {"key": layer.key, "name": layer.name}
            | {f"{proto}_1993": "/".join(str(us) for us in getattr(layer, f"{proto}_1993")) for proto in ("tcp", "udp")}
            for layer in LAYERS
        ],
        "all_1993": list(ALL_1993),
        "ways": ways,
        "kernel_parts_us": parts,
        "crossings": live,
        "counts": counted,
        "notes": notes + uncounted + more,
    }
