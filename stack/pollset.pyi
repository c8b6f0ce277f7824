"""Wait for many sessions and descriptors at once. Times in nanoseconds, events as ``select.epoll`` has them."""

from types import TracebackType
from typing import Any

from ulnet.stack.session import Session

class PollSet:
    """Like epoll, inside the engine: no system call while a session of the driven engine is ready.

    Sessions are level-triggered. With EPOLLET, EPOLLONESHOT or EPOLLEXCLUSIVE one is watched through its
    descriptor in the set's inner epoll; so are ordinary descriptors and the sessions of further engines.
    """

    closed: bool
    as_epoll: bool  # what others put into fileno(), an epoll, is told of by its number
    as_selector: bool  # wait() tells EVENT_READ and EVENT_WRITE
    side_looks: int  # system calls made to look at the inner epoll

    def __init__(self) -> None: ...
    def register(self, what: Session | int, events: int, data: Any = None) -> None:
        """Add a session or a descriptor. FileExistsError, OSError EBADF, PermissionError (epoll does not take it)."""
    def modify(self, what: Session | int, events: int, data: Any = None) -> None:
        """Other events and data. FileNotFoundError: it is not there."""
    def unregister(self, what: Session | int) -> None:
        """Take it out. FileNotFoundError: it is not there; a closed session never is."""
    def wait(self, timeout_ns: int = -1, max_events: int = -1, relaxed: bool = False) -> list[tuple[Any, int]]:
        """What is ready: (data, events). -1: wait for ever, 0: only look, ``relaxed``: at descriptors each 100 us."""
    def fileno(self) -> int:
        """A descriptor, readable while something here is ready."""
    def close(self) -> None: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> PollSet: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

def session_moved(session: Session, outside: bool) -> bool:
    """For tests: a shell was placed in the server, or came back. False: the session is no shell."""
