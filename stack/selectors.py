"""The drop-in for the standard ``selectors`` module: ``DefaultSelector`` waits in the engine of our sockets.

``from ulnet.stack import selectors`` in place of ``import selectors``. Any mix of our sockets, their numbers and
ordinary files may be registered, as in ``ulnet.stack.select``.
"""

from __future__ import annotations

import contextlib
import selectors as _std
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ulnet.stack import select
from ulnet.stack.openfile import session_behind
from ulnet.stack.pollset import PollSet
from ulnet.stack.session import Session, session_of

EVENT_READ: Final = _std.EVENT_READ
EVENT_WRITE: Final = _std.EVENT_WRITE
BaseSelector = _std.BaseSelector
SelectorKey = _std.SelectorKey

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT


def _number_of(file: Any) -> int:
    """The number of a file object or of itself. ValueError: it has none."""
    if isinstance(file, int):
        number = int(file)
    elif (session := session_behind(file)) is not None:
        number = session.number()
    else:
        try:
            number = int(file.fileno())
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"Invalid file object: {file!r}") from None
    if number < 0:
        raise ValueError(f"Invalid file descriptor: {number}")
    return number


class UlnetSelector(_std.BaseSelector):
    """Sockets of ours in their engine, everything else in an inner epoll (``pollset.PollSet``).

    ``relaxed``: with time-out 0 ordinary files are looked at every 100 us only, for loops that come round often.
    """

    def __init__(self, *, relaxed: bool = False) -> None:
        self._events = PollSet()
        self._events.as_selector = True
        self._relaxed = relaxed
        self._keys: dict[int, SelectorKey] = {}
        self._sessions: dict[int, Session] = {}
        self._map = _Map(self)

    def _find(self, file: Any) -> int:
        try:
            return _number_of(file)
        except ValueError:
            for key in self._keys.values():  # closed meanwhile: known by itself
                if key.fileobj is file:
                    return key.fd
            raise

    def _open(self) -> PollSet:
        if self._events.closed:
            raise RuntimeError("Selector is closed")
        return self._events

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """Watch a file for EVENT_READ, EVENT_WRITE or both. KeyError: it is registered; ValueError: wrong arguments."""
        if not events or events & ~(EVENT_READ | EVENT_WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        number = self._find(fileobj)
        if number in self._keys:
            raise KeyError(f"{fileobj!r} (FD {number}) is already registered")
        key = SelectorKey(fileobj, number, events, data)
        session = session_of(number)
        self._open().register(number if session is None else session, _mask(events), key)
        self._keys[number] = key
        if session is not None:
            self._sessions[number] = session
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        """Stop watching it. KeyError: it is not registered."""
        try:
            key = self._keys.pop(self._find(fileobj))
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            self._events.unregister(self._sessions.pop(key.fd, key.fd))
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """Other events or other data."""
        try:
            key = self._keys[self._find(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        if events == key.events and data == key.data:
            return key
        if not events or events & ~(EVENT_READ | EVENT_WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        changed = SelectorKey(key.fileobj, key.fd, events, data)
        try:
            self._events.modify(self._sessions.get(key.fd, key.fd), _mask(events), changed)
        except BaseException:
            self.unregister(fileobj)
            raise
        self._keys[key.fd] = changed
        return changed

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """[(key, events), ...] of the files that are ready; None: wait for ever; 0 or less: only look."""
        if timeout is None:
            timeout_ns = -1
        elif timeout <= 0:
            timeout_ns = 0
        else:
            timeout_ns = int(timeout * 1e9) + 1
        return self._open().wait(timeout_ns, -1, self._relaxed)

    def close(self) -> None:
        """Forget everything. Twice is fine."""
        self._events.close()
        self._keys.clear()
        self._sessions.clear()

    def fileno(self) -> int:
        """A descriptor that is readable while something registered is ready."""
        return self._open().fileno()

    def get_key(self, fileobj: Any) -> SelectorKey:
        """The key of a registered file. KeyError: it is not."""
        self._open()
        try:
            return self._keys[self._find(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None

    def get_map(self) -> Mapping[Any, SelectorKey]:
        """Files to keys. None once closed, as with the standard selectors."""
        return None if self._events.closed else self._map  # type: ignore[return-value]


class _Map(Mapping[Any, SelectorKey]):
    """A selector's files and keys, as they are now."""

    def __init__(self, selector: UlnetSelector) -> None:
        self._selector = selector

    def __len__(self) -> int:
        return len(self._selector._keys)

    def __getitem__(self, file: Any) -> SelectorKey:
        try:
            return self._selector._keys[self._selector._find(file)]
        except KeyError:
            raise KeyError(f"{file!r} is not registered") from None

    def get(self, file: Any, default: Any = None) -> Any:
        """The key of a file, or default."""
        return self._selector._keys.get(self._selector._find(file), default)

    def __iter__(self) -> Iterator[int]:
        return iter(self._selector._keys)


def _mask(events: int) -> int:
    return (_IN if events & EVENT_READ else 0) | (_OUT if events & EVENT_WRITE else 0)


class EpollSelector(UlnetSelector):
    """The standard name."""


class PollSelector(UlnetSelector):
    """The standard name."""


class SelectSelector(UlnetSelector):
    """The standard name."""


DefaultSelector = UlnetSelector

__all__ = [
    "EVENT_READ",
    "EVENT_WRITE",
    "BaseSelector",
    "DefaultSelector",
    "EpollSelector",
    "PollSelector",
    "SelectSelector",
    "SelectorKey",
    "UlnetSelector",
]
