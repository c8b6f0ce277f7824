"""TCP endpoints on virtual wires at virtual time."""

from collections.abc import Callable
from random import Random
from types import TracebackType

from ulnet.stack.sim_trace import Segment, Trace

class Wire:
    """One direction between two endpoints. Every attribute may be changed while it runs."""

    delay_ns: int
    jitter_ns: int
    reorder_ns: int
    rate_bps: int
    queue_bytes: int
    loss: float
    duplicate: float
    reorder: float
    corrupt: float
    gso: bool
    down: bool
    full: bool
    drop: Callable[[Segment], bool] | None
    @property
    def counts(self) -> dict[str, int]: ...
    def __init__(
        self,
        *,
        delay_ns: int = 10_000,
        jitter_ns: int = 0,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        reorder_ns: int = 0,
        corrupt: float = 0.0,
        rate_bps: int = 0,
        queue_bytes: int = ...,
        gso: bool = False,
    ) -> None: ...

class Lent:
    """A received segment taken out without a copy. ``release`` (or ``with``) gives it back."""

    def __bytes__(self) -> bytes: ...
    def release(self) -> None: ...
    def __enter__(self) -> Lent: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None: ...

class Endpoint:
    """One end of one TCP connection. Made by Sim.pair() or Sim.endpoint()."""

    wire: Wire
    clock_offset_ns: int
    next_iss: int
    @property
    def sim(self) -> Sim: ...
    @property
    def name(self) -> str: ...
    @property
    def peer(self) -> Endpoint | None: ...
    @property
    def received(self) -> bytearray: ...
    @property
    def finished(self) -> str | OSError | None: ...
    def listen(self) -> None:
        """Accept the next SYN (again after each connection's end)."""
    def connect(self, peer: Endpoint | None = None) -> None: ...
    def write(self, data: bytes, *, hold: bool = False) -> int:
        """Bytes taken. BlockingIOError when there is no room; OSError when it cannot be."""
    def read(self, n: int = 65536, *, peek: bool = False) -> bytes:
        """Up to n bytes; b"" at the end of file. BlockingIOError when there is nothing yet."""
    def lend(self, n: int = ...) -> Lent: ...
    def pour(self, data: bytes, *, close: bool = False) -> None:
        """Write all of data as room appears, then shut down or close."""
    def drain(self, *, close: bool = False) -> None:
        """Read everything into ``received`` until the end of file; then close, when nothing is left to pour."""
    def stop_draining(self) -> None: ...
    def shutdown(self, how: int = 1) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def setopt(self, level: int, name: int, value: int) -> None: ...
    def getopt(self, level: int, name: int) -> int: ...
    def icmp(self, error: int, *, seq: int | None = None, mtu: int = 0) -> None: ...
    def inject(
        self,
        flags: str = "A",
        *,
        seq: int | None = None,
        ack: int | None = None,
        payload: bytes = b"",
        wnd: int | None = None,
        mss: int = 0,
        wscale: int = 255,
        ts: tuple[int, int] | None = None,
        no_ts: bool = False,
        sack: tuple[tuple[int, int], ...] = (),
    ) -> list[Segment]:
        """Let a hand-made segment arrive; returns the Segments sent in answer."""
    def migrate(self, clock_offset_ns: int | None = None) -> int: ...
    def export(self) -> bytes: ...
    def import_(self, data: bytes, clock_offset_ns: int | None = None) -> None: ...
    @property
    def state(self) -> str: ...
    @property
    def ready(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def numbers(self) -> dict[str, int]: ...
    @property
    def stat(self) -> dict[str, int]: ...
    @property
    def timers(self) -> dict[str, int]: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def memory(self) -> dict[str, int]: ...
    def forget(self) -> None: ...

class Sim:
    """A seeded world of endpoints and wires; time is ``now_ns`` and stands still unless ``run`` moves it."""

    capture: bool
    @property
    def seed(self) -> object: ...
    @property
    def rng(self) -> Random: ...
    @property
    def now_ns(self) -> int: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def events(self) -> int: ...
    @property
    def ring_drops(self) -> int: ...
    def __init__(self, seed: object = 0, *, capture: bool = True, start_ns: int = 1_000_000_000) -> None: ...
    def endpoint(self, name: str = "a", **options: int) -> Endpoint: ...
    def pair(
        self,
        *,
        names: tuple[str, str] = ("a", "b"),
        options: dict[str, int] | None = None,
        options_b: dict[str, int] | None = None,
        delay_ns: int = 10_000,
        jitter_ns: int = 0,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        reorder_ns: int = 0,
        corrupt: float = 0.0,
        rate_bps: int = 0,
        queue_bytes: int = ...,
        gso: bool = False,
    ) -> tuple[Endpoint, Endpoint]: ...
    def run(self, until_ns: int | None = None, *, for_ns: int | None = None, max_events: int = ...) -> None: ...
    def step(self) -> bool: ...
    def advance(self, ns: int) -> None: ...
