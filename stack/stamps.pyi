"""Time stamps of the data path, for ``ulnet table --layers``. Off unless a process opens a file for them."""

from typing import Final

CALL_SEND: Final[int]
TRANSPORT_OUT: Final[int]
OUTPUT: Final[int]
IP_OUT: Final[int]
LINK_OUT: Final[int]
LINK_SENT: Final[int]
SEND_RETURN: Final[int]
WOKEN: Final[int]
FRAME: Final[int]
TRANSPORT_IN: Final[int]
DELIVERED: Final[int]
READY: Final[int]
RELAYED: Final[int]
RECV_RETURN: Final[int]
HEAD_BYTES: Final[int]
RECORD_BYTES: Final[int]
RECORDS: Final[int]

def create(path: str, records: int = ..., mode: int = 0o600) -> None:
    """Make a file for ``records`` stamps (a power of two), switched off. ValueError otherwise."""

def open(path: str) -> None:
    """This process stamps into ``path`` from now on, whenever it is switched on. ValueError: not such a file."""

def close() -> None:
    """This process stamps no more."""

def mark(point: int) -> None:
    """A stamp of the program's own."""

def switch(path: str, on: bool) -> None:
    """Turn stamping into ``path`` on, from an empty file, or off; the processes that have it open follow at once."""

def read(path: str) -> list[tuple[int, int]]:
    """The stamps there are, oldest first: (time in ns, point)."""
