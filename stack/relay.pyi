"""Relays: sessions of an engine whose user sits behind an AF_UNIX descriptor (SOSP 1993: placed in the server)."""

from typing import Final

from ulnet.stack.engine import Engine
from ulnet.stack.session import Session

STREAM: Final = 1
DATAGRAMS: Final = 2
LISTENER: Final = 3
NEWS_HUNG: Final = 1
NEWS_RESET: Final = 2
NEWS_ENDED: Final = 4
NEWS_ROOM: Final = 8

class Relays:
    """All relays of one engine, with one descriptor for the loop that runs them. News come as EV_RELAY events."""

    engine: Engine

    def __init__(self, engine: Engine) -> None: ...
    def fileno(self) -> int:
        """Readable when some relay's descriptor changed: call run()."""
    def run(self) -> int:
        """Move what can be moved, a bounded part of each; then milliseconds until it wants to be called again without
        a descriptor's word, -1 for never."""
    @property
    def pending(self) -> bool:
        """Some relay asked for a turn since."""
    def close(self) -> None:
        """Only after its relays. Closing twice is fine."""

class Relay:
    """One session and the manager's end of its pair, which belongs to the relay from now on."""

    relays: Relays
    session: Session

    def __init__(self, relays: Relays, session: Session, fd: int, kind: int = 1) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def eof(self) -> bool:
        """Nothing more will come from the peer."""
    @property
    def news(self) -> int:
        """NEWS_* so far."""
    def announce(self, number: int) -> bool:
        """LISTENER: tell the user of a connection. False: no room now, NEWS_ROOM will come."""
    def unread(self) -> int:
        """LISTENER: announcements that nobody has read yet."""
    def drain(self) -> None:
        """Everything the user has written goes into the session, whatever its buffer's limit."""
    def detach(self) -> int:
        """End of the relay; the descriptor is the caller's. ValueError when it has ended already."""
    def close(self) -> None:
        """End of the relay and of the descriptor. Closing twice is fine."""
    def counters(self) -> dict[str, int]: ...
