"""One session as Python holds it, and the buffers it lends. Times in nanoseconds, sizes in bytes."""

from types import TracebackType
from typing import Final

from ulnet.stack.engine import Engine

STATES: Final[tuple[str, ...]]

class Buffer:
    """Bytes received, by the buffer protocol, in the stack's own memory; read-only.

    Release it (``release()`` or ``with``) as soon as possible: its memory is the ring's.
    Reading after release raises ValueError.
    """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def release(self) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> tuple[str, int] | None: ...
    def __enter__(self) -> Buffer: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Session:
    """One session, or the shell of one that is not open yet. Not made directly: Engine.new_session()."""

    engine: Engine
    kind: int
    session_id: int  # the server's number for it; 0 while it has none

    @property
    def local(self) -> tuple[str, int]: ...
    @property
    def peer(self) -> tuple[str, int] | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def listening(self) -> bool: ...
    def set_local(self, address: str, port: int) -> None:
        """Note the local endpoint of a shell that is bound but not open."""
    def begin_connect(self) -> None:
        """A shell whose connection is made elsewhere: not ready until import_session() or fail()."""
    @property
    def live(self) -> bool:
        """True while the engine holds protocol state for it."""
    @property
    def state(self) -> str:
        """RFC 9293 state name; UDP: "OPEN"; "CLOSED" when not live."""
    @property
    def ready(self) -> int:
        """READABLE | WRITABLE | ... now."""
    def wait(self, mask: int, timeout_ns: int = -1) -> int:
        """Drive the engine until one of mask (or ERROR, HUP) is ready; returns ready bits, 0 on time-out."""
    def recv_buffer(self, max_bytes: int, timeout_ns: int = -1) -> Buffer: ...
    def take_error(self) -> int:
        """SO_ERROR: the pending errno (positive), cleared; 0 if none."""
    def setopt(self, level: int, name: int, value: int) -> None: ...
    def getopt(self, level: int, name: int) -> int: ...
    def shutdown(self, how: int) -> None: ...
    def fileno(self) -> int:
        """The truthful descriptor (made at first use)."""
    def set_nonblocking(self, nonblocking: bool) -> None:
        """Let O_NONBLOCK of the descriptor say so."""
    @property
    def descriptor(self) -> int:
        """What fileno() gave; -1 if it was not called yet."""
    def stat(self) -> dict[str, int]:
        """state, snd_una, ..., retransmits, bytes_in, bytes_out, srtt_ns (see tcp_stat)."""
