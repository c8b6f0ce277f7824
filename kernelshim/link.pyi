from collections.abc import Sequence
from typing import NamedTuple

from _typeshed import ReadableBuffer

FRAME_CSUM_PARTIAL: int
FRAME_CSUM_OK: int
FRAME_GSO_TCP4: int
FRAME_GSO_UDP: int
FRAME_UFO: int
LINK_CSUM: int
LINK_TSO: int
LINK_USO: int
LINK_UFO: int
LINK_EVACUATE: int
MAX_PIECES: int

class Frame(NamedTuple):
    data: bytes
    flags: int
    gso_size: int

class Link:
    @property
    def mtu(self) -> int: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def features(self) -> int: ...
    def fileno(self) -> int: ...
    def filenos(self) -> list[int]: ...
    def counters(self) -> dict[str, int]: ...
    def recv_frame(self) -> Frame | None: ...
    def send_frame(
        self,
        data: ReadableBuffer | Sequence[ReadableBuffer],
        flags: int = 0,
        gso_size: int = 0,
        hdr_len: int = 0,
        csum_start: int = 0,
        csum_offset: int = 0,
    ) -> None: ...
    def close_fd(self) -> None: ...
    def close(self) -> None: ...
