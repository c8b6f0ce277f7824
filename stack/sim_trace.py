"""What the simulator saw on its wires: segments as named tuples, and sentences to check them by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """One segment as it left an endpoint. ``seq`` and ``ack`` count from the initial sequence numbers."""

    time_ns: int
    src: str
    flags: str  # letters of "SFRPUA" that are set, in this order
    seq: int
    ack: int
    length: int
    wnd: int  # bytes, scaled
    fate: str  # "sent", "lost", "corrupt", "queue", "filtered", "no peer"; "again" for the second copy of a duplicate
    mss: int
    wscale: int  # 255: absent
    ts_val: int | None
    ts_ecr: int | None
    raw_seq: int
    raw_ack: int
    sack: tuple[tuple[int, int], ...]  # counted as ``ack`` is

    def __str__(self) -> str:
        numbers = f"seq {self.seq} ack {self.ack} len {self.length} wnd {self.wnd}"
        return f"{self.time_ns / 1e6:12.6f} ms {self.src} {self.flags or '-':4} {numbers} {self.fate}"


class Trace(list[Segment]):
    """Segments in the order they left."""

    def of(self, src: str, flags: str | None = None) -> Trace:
        """Those that ``src`` sent; ``flags``: only those that carry all these letters."""
        return Trace(s for s in self if s.src == src and (flags is None or set(flags) <= set(s.flags)))

    def data(self, src: str) -> Trace:
        """Those of ``src`` with payload."""
        return Trace(s for s in self if s.src == src and s.length)

    def since(self, time_ns: int) -> Trace:
        return Trace(s for s in self if s.time_ns >= time_ns)

    def count(self, what: Segment | Callable[[Segment], bool]) -> int:
        return sum(1 for s in self if (what(s) if callable(what) else s == what))

    def resent(self, src: str) -> Trace:
        """Payload segments of ``src`` that begin before the end of what it had sent before."""
        found, top = Trace(), 0
        for s in self.data(src):
            if s.seq < top:
                found.append(s)
            top = max(top, s.seq + s.length)
        return found

    def __str__(self) -> str:
        return show(self)


def show(segments: Iterable[Segment]) -> str:
    """One line a segment, for messages of failing tests."""
    return "\n".join(map(str, segments))
