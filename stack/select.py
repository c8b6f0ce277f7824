"""The drop-in for the standard ``select`` module: our sockets, their numbers and ordinary files in any mix.

``from ulnet.stack import select`` in place of ``import select``. Sockets of ours are looked at in their engine: while
one of them is ready, waiting makes no system call. Ordinary descriptors are the kernel's matter and shown as it shows
them. The network server is never asked: each session has one descriptor that whoever manages it keeps truthful, so the
kernel's poll joins the two sides (in 1993 the server's select was the common one).

differs from select(2): sockets of ours have no limit FD_SETSIZE; nothing of theirs is exceptional (no urgent data).
"""

from __future__ import annotations

import fcntl
import math
import select as _std
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from ulnet.stack.openfile import session_behind
from ulnet.stack.pollset import PollSet
from ulnet.stack.session import Session, session_of

if TYPE_CHECKING:  # at run time every public name of the standard module is taken over, below
    # fmt: off
    from select import (  # noqa: I001
        EPOLL_CLOEXEC as EPOLL_CLOEXEC, EPOLLERR as EPOLLERR, EPOLLET as EPOLLET, EPOLLEXCLUSIVE as EPOLLEXCLUSIVE,
        EPOLLHUP as EPOLLHUP, EPOLLIN as EPOLLIN, EPOLLMSG as EPOLLMSG, EPOLLONESHOT as EPOLLONESHOT,
        EPOLLOUT as EPOLLOUT, EPOLLPRI as EPOLLPRI, EPOLLRDBAND as EPOLLRDBAND, EPOLLRDHUP as EPOLLRDHUP,
        EPOLLRDNORM as EPOLLRDNORM, EPOLLWRBAND as EPOLLWRBAND, EPOLLWRNORM as EPOLLWRNORM, PIPE_BUF as PIPE_BUF,
        POLLERR as POLLERR, POLLHUP as POLLHUP, POLLIN as POLLIN, POLLMSG as POLLMSG, POLLNVAL as POLLNVAL,
        POLLOUT as POLLOUT, POLLPRI as POLLPRI, POLLRDBAND as POLLRDBAND, POLLRDHUP as POLLRDHUP,
        POLLRDNORM as POLLRDNORM, POLLWRBAND as POLLWRBAND, POLLWRNORM as POLLWRNORM,
    )
    # fmt: on

error = OSError
_ALWAYS: Final = _std.POLLERR | _std.POLLHUP
_READ: Final = _std.POLLIN | _ALWAYS  # what makes a member of select's lists ready (select(2), "Correspondence")
_WRITE: Final = _std.POLLOUT | _std.POLLERR
_MAX_EVENTS: Final = 1023  # FD_SETSIZE - 1, as the standard module's epoll.poll()
_INT_MAX: Final = 2**31 - 1


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


_FileLike = int | _HasFileno
_Found = tuple[list[Any], list[Any], list[Any]]
_T = TypeVar("_T")


def _resolve(file: Any) -> tuple[Session | None, int]:
    """The session of ours behind a file object or number (None: it is not ours), and the number.

    A socket of ours without a number so far gets none: -1.
    """
    session = session_behind(file)
    if session is not None:
        return session, -1
    if isinstance(file, int):
        number = int(file)
    else:
        try:
            fileno = file.fileno
        except AttributeError:
            raise TypeError("argument must be an int, or have a fileno() method.") from None
        number = fileno()
        if not isinstance(number, int):
            raise TypeError("fileno() returned a non-integer")
    if number < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({number})")
    if number > _INT_MAX:
        raise OverflowError(f"descriptor {number} is too large")
    return session_of(number), number


def _watch(events: PollSet, what: Session | int, mask: int, data: object) -> None:
    """Add it, unless epoll does not take it: what is closed, or a plain file, the kernel has an answer for at once."""
    try:
        events.register(what, mask, data)
    except FileExistsError:
        pass  # a number and its socket
    except OSError:
        if isinstance(what, Session):
            raise


def _wait(
    sessions: dict[Session, int],
    numbers: dict[int, int],
    look: Callable[[dict[Session, int]], tuple[bool, _T]],
    deadline_ns: int | None,
    meaning: Callable[[int], int],
) -> _T:
    """Until ``look(ready sessions)`` answers (True, result), or (whatever, result) at the deadline.

    ``meaning``: the events that make a file with these events ready; epoll tells of hang-ups unasked.
    """
    with PollSet() as events:
        for session, mask in sessions.items():
            _watch(events, session, mask, session)
        ready = dict(events.wait(0)) if sessions else {}
        done, result = look(ready)
        if done:
            return result
        for number, mask in numbers.items():
            _watch(events, number, mask, number)
        while True:
            left = -1 if deadline_ns is None else max(0, deadline_ns - time.monotonic_ns())
            ready = dict(events.wait(left))
            done, result = look({what: bits for what, bits in ready.items() if isinstance(what, Session)})
            if done or (deadline_ns is not None and time.monotonic_ns() >= deadline_ns):
                return result
            for what, bits in ready.items():
                wanted = numbers[what] if isinstance(what, int) else sessions[what]
                if not bits & meaning(wanted):
                    events.unregister(what)  # it would stay so, and wake us again and again


# -- select --------------------------------------------------------------------------------------


def select(rlist: Sequence[Any], wlist: Sequence[Any], xlist: Sequence[Any], timeout: float | None = None, /) -> _Found:
    """Wait until a member of rlist is readable, of wlist writable, or of xlist exceptional; those that are.

    ``timeout``: seconds; None: for ever; 0: only look. As the standard function, errors included.
    """
    resolved = []
    for files in (rlist, wlist, xlist):
        try:
            members = iter(files)
        except TypeError:
            raise TypeError("arguments 1-3 must be sequences") from None
        resolved.append([(file, *_resolve(file)) for file in members])
    ordinary = [[number for _, session, number in members if session is None] for members in resolved]

    def found(kernel: tuple[list[int], list[int], list[int]], ready: dict[Session, int]) -> _Found:
        result = [
            [
                file
                for file, session, number in members
                if (number in there if session is None else ready.get(session, 0) & bits)
            ]
            for members, there, bits in zip(resolved, map(set, kernel), (_READ, _WRITE, 0), strict=True)
        ]
        return result[0], result[1], result[2]

    if not any(session is not None for members in resolved for _, session, _ in members):
        return found(_std.select(ordinary[0], ordinary[1], ordinary[2], timeout), {})
    deadline_ns = _deadline(timeout)
    sessions: dict[Session, int] = {}
    numbers: dict[int, int] = {}
    for group, mask in zip(resolved, (_std.POLLIN, _std.POLLOUT, _std.POLLPRI), strict=True):
        for _, session, number in group:
            if session is None:
                numbers[number] = numbers.get(number, 0) | mask
            else:
                sessions[session] = sessions.get(session, 0) | mask

    def look(ready: dict[Session, int]) -> tuple[bool, _Found]:
        kernel = _std.select(ordinary[0], ordinary[1], ordinary[2], 0) if numbers else ([], [], [])
        result = found(kernel, ready)
        return any(result), result

    return _wait(sessions, numbers, look, deadline_ns, _select_meaning)


def _select_meaning(mask: int) -> int:
    read, write = (_READ if mask & _std.POLLIN else 0), (_WRITE if mask & _std.POLLOUT else 0)
    return read | write | (mask & _std.POLLPRI)


def _deadline(timeout: float | None) -> int | None:
    if timeout is None:
        return None
    if isinstance(timeout, str | bytes) or not hasattr(timeout, "__float__") and not hasattr(timeout, "__index__"):
        raise TypeError("timeout must be a float or None")
    seconds = float(timeout)
    if math.isnan(seconds):
        raise ValueError("Invalid value NaN (not a number)")
    if seconds < 0:
        raise ValueError("timeout must be non-negative")
    if seconds > 9.2e9:
        raise OverflowError("timestamp out of range for platform time_t")
    return time.monotonic_ns() + math.ceil(seconds * 1e9)


# -- poll ----------------------------------------------------------------------------------------


class poll:
    """As ``select.poll()``: ``register``, ``modify``, ``unregister``, ``poll``; members are told by their numbers."""

    def __init__(self) -> None:
        self._masks = _std.poll()  # checks arguments as the standard object does
        self._wanted: dict[int, int] = {}
        self._polling = False

    def register(self, fd: _FileLike, eventmask: int = _std.POLLIN | _std.POLLPRI | _std.POLLOUT, /) -> None:
        """Add a file, or change its events."""
        number = _number(fd)
        self._masks.register(number, eventmask)
        self._wanted[number] = eventmask

    def modify(self, fd: _FileLike, eventmask: int, /) -> None:
        """Change the events. FileNotFoundError: it is not registered."""
        number = _number(fd)
        self._masks.modify(number, eventmask)
        self._wanted[number] = eventmask

    def unregister(self, fd: _FileLike, /) -> None:
        """Take a file out. KeyError: it is not registered."""
        number = _number(fd)
        self._masks.unregister(number)
        del self._wanted[number]

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """[(number, events), ...] of the files that are ready; ``timeout`` in ms, None or negative: for ever."""
        if self._polling:
            raise RuntimeError("concurrent poll() invocation")
        sessions: dict[Session, int] = {}
        numbers: dict[Session, int] = {}
        kernel = _std.poll()
        ordinary: dict[int, int] = {}
        for number, mask in self._wanted.items():
            session = session_of(number)
            if session is None:
                kernel.register(number, mask)
                ordinary[number] = mask
            else:
                sessions[session] = mask
                numbers[session] = number
        self._polling = True
        try:
            if not sessions:
                return self._masks.poll(timeout)
            deadline_ns = _deadline_ms(timeout)

            def look(ready: dict[Session, int]) -> tuple[bool, list[tuple[int, int]]]:
                found = kernel.poll(0) if ordinary else []
                found += [(numbers[session], bits) for session, bits in ready.items()]
                return bool(found), found

            return _wait(sessions, ordinary, look, deadline_ns, lambda mask: mask | _ALWAYS)
        finally:
            self._polling = False


def _number(file: _FileLike) -> int:
    session, number = _resolve(file)
    return session.number() if number < 0 and session is not None else number


def _deadline_ms(timeout: float | None) -> int | None:
    if timeout is None:
        return None
    if not isinstance(timeout, int | float):
        raise TypeError("timeout must be an integer or None")
    if timeout < 0:
        return None
    if timeout > _INT_MAX:
        raise OverflowError("timeout is too large")
    return time.monotonic_ns() + math.ceil(timeout * 1e6)


# -- epoll ---------------------------------------------------------------------------------------


class epoll:
    """As ``select.epoll``. Level-triggered sockets of ours are kept ready by their engine: a poll costs what is ready,
    not what is registered. Edge-triggered and one-shot ones, and all other files, are in a kernel epoll below.
    """

    def __init__(self, sizehint: int = -1, flags: int = 0) -> None:
        if sizehint != -1 and sizehint <= 0:
            raise ValueError("negative sizehint")
        if flags not in (0, _std.EPOLL_CLOEXEC):
            raise OSError("invalid flags")
        self._events = PollSet()
        self._events.as_epoll = True

    @classmethod
    def fromfd(cls, fd: int, /) -> _std.epoll:
        """The kernel's epoll with this number (the standard object: it knows what is in it)."""
        return _std.epoll.fromfd(fd)

    @property
    def closed(self) -> bool:
        """True if the epoll object is closed."""
        return self._events.closed

    def _open(self) -> PollSet:
        if self._events.closed:
            raise ValueError("I/O operation on closed epoll object")
        return self._events

    def fileno(self) -> int:
        """A descriptor for a poll around this one."""
        return self._open().fileno()

    def close(self) -> None:
        """Forget everything. Twice is fine."""
        self._events.close()

    def register(self, fd: _FileLike, eventmask: int = _std.EPOLLIN | _std.EPOLLPRI | _std.EPOLLOUT) -> None:
        """Add a file. FileExistsError, OSError EBADF, PermissionError (a plain file)."""
        events = self._open()
        session, number = _member(fd)
        events.register(number if session is None else session, eventmask & 0xFFFFFFFF, number)

    def modify(self, fd: _FileLike, eventmask: int) -> None:
        """Change the events. FileNotFoundError: it is not registered."""
        events = self._open()
        session, number = _member(fd)
        try:
            events.modify(number if session is None else session, eventmask & 0xFFFFFFFF, number)
        except FileNotFoundError:
            _check_number(number)
            raise

    def unregister(self, fd: _FileLike) -> None:
        """Take a file out. FileNotFoundError: it is not registered."""
        events = self._open()
        session, number = _member(fd)
        try:
            events.unregister(number if session is None else session)
        except FileNotFoundError:
            _check_number(number)
            raise

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
        """[(number, events), ...] of the files that are ready; ``timeout`` in seconds, None or negative: for ever."""
        events = self._open()
        if maxevents == -1:
            maxevents = _MAX_EVENTS
        elif maxevents < 1:
            raise ValueError(f"maxevents must be greater than 0, got {maxevents}")
        deadline_ns = -1
        if timeout is not None:
            if not isinstance(timeout, int | float):
                raise TypeError("timeout must be an integer or None")
            if timeout * 1000 > _INT_MAX:
                raise OverflowError("timeout is too large")
            if timeout >= 0:
                deadline_ns = math.ceil(timeout * 1e9)
        return events.wait(deadline_ns, maxevents)

    def __enter__(self) -> epoll:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _member(file: _FileLike) -> tuple[Session | None, int]:
    session, number = _resolve(file)
    if session is not None and number < 0:
        number = session.number()
    return session, number


def _check_number(number: int) -> None:
    """As the kernel: what is closed is no member (EBADF), whatever it was before."""
    fcntl.fcntl(number, fcntl.F_GETFD)


if not TYPE_CHECKING:
    globals().update((name, value) for name, value in vars(_std).items() if name not in globals())

__all__ = sorted(name for name in vars(_std) if not name.startswith("_"))
