"""One session as Python holds it, and the buffers it lends. Times in nanoseconds, sizes in bytes."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, final

from ulnet.stack.engine import Engine

STATES: Final[tuple[str, ...]]

def session_of(number: int) -> Session | None:
    """The open session whose descriptor has this number (its fileno() or number() was asked), or None."""

@final
class Buffer:
    """Memory of the stack, by the buffer protocol: received bytes where they lie (read-only), or, from
    ``alloc_buffer()``, room to write into.

    Release what was received (``release()`` or ``with``) as soon as possible: its memory is the ring's.
    Reading or writing after release, or after it was sent, raises ValueError.
    """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def release(self) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def address(self) -> tuple[str, int] | None:
        """UDP: who sent it."""
    def __enter__(self) -> Buffer: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Session:
    """One session, or the shell of one that is not open yet. Not made directly: Engine.new_session()."""

    engine: Engine
    kind: int
    session_id: int  # the server's number for it; 0 while it has none
    file: Any  # openfile.File: what duplicates of a socket share

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
    def recv_buffers(self, count: int, timeout_ns: int = -1) -> list[Buffer]: ...
    def alloc_buffer(self, nbytes: int) -> Buffer: ...
    def send_buffer(self, b: Buffer, nbytes: int = -1, timeout_ns: int = -1) -> int: ...
    def take_error(self) -> int:
        """SO_ERROR: the pending errno (positive), cleared; 0 if none."""
    def setopt(self, level: int, name: int, value: int) -> None: ...
    def getopt(self, level: int, name: int) -> int: ...
    def shutdown(self, how: int) -> None: ...
    def fileno(self) -> int:
        """The truthful descriptor (made at first use)."""
    def number(self) -> int:
        """The number fileno() gives, without anybody steering the descriptor for it; -1 once closed."""
    def set_nonblocking(self, nonblocking: bool) -> None:
        """Let O_NONBLOCK of the descriptor say so."""
    @property
    def descriptor(self) -> int:
        """What fileno() gave; -1 if it was not called yet."""
    def stat(self) -> dict[str, int]:
        """state, snd_una, ..., retransmits, bytes_in, bytes_out, srtt_ns (see tcp_stat).

        Of a shared session only ``unread_bytes`` and ``unsent_bytes`` are known here: what its pair holds."""

    # Placed in the server ("shared"): the calls above go to the user's end of the descriptor pair, U, by plain kernel
    # calls. Before each the Engine's on_shared() is asked; it may bring the session back by share_end().

    @property
    def shared(self) -> bool:
        """True while it is placed in the server."""
    @property
    def shared_lock(self) -> AbstractContextManager[object]:
        """Re-entrant. Each kernel call on U is made with it held: hold it around share_begin() and the SHARE message,
        and around PROMOTE and share_end()."""
    def share_begin(self) -> tuple[int, int, bytes | None]:
        """Export it, keeping handle and descriptor: (U, O, state). The session is shared from now on: threads that
        wait go on on U. U stays the session's own; O is the caller's, to close when it was sent. ``state`` is None for
        a listener and for a shell (bound or not). Of a listener all delivered connections must have been accept()ed:
        BlockingIOError while some wait. OSError: EALREADY while it is being connected, EBADF closed, EINVAL shared
        already, ENOTCONN when it ended or failed (there is nothing to share: rebind() it)."""
    def share_end(self, o_fd: int, state: bytes | bytearray | memoryview | None, number: int) -> int:
        """It is ours again: what U holds goes in front of the state's unread data, the session lives on here, O (taken
        over) steers U. ``state`` None: a listener (numbers still in U are dropped) or a shell. Returns the bytes taken
        from U. On an exception (OSError EBADF: closed meanwhile, EADDRINUSE; ValueError: malformed) O is still the
        caller's, and what U held is lost with the state."""
    def adopt_fd(
        self,
        u_fd: int,
        *,
        local: tuple[str, int] | None = None,
        peer: tuple[str, int] | None = None,
        listening: bool = False,
        named: bool = False,
    ) -> None:
        """A fresh shell becomes a shared session around U, which comes from elsewhere and is taken over. ``named``:
        it is neither open nor listening. OSError EISCONN: no shell; ENOTSOCK, EPROTOTYPE: no pair of this kind."""
    def set_shared(
        self,
        *,
        local: tuple[str, int] | None = None,
        peer: tuple[str, int] | None = None,
        listening: bool | None = None,
    ) -> None:
        """What another process, or a call to the server, made of a shared session: its names, that it listens."""
    def leave(self) -> int:
        """Of a shared session: close it here, but not its descriptor, which is the caller's from now on. EINVAL."""
    def announced(self) -> int | None:
        """Of a shared listener: the number of the next connection that waits, or None. CLAIM it. OSError EINVAL when
        the server has ended it."""
    def rebind(self, owner: Engine) -> None:
        """Move to another engine, after a fork: a shared session, or one without protocol state (shell, ended)."""
