"""Base class of every link: owns the C table, shows it to Python."""

import os
from typing import NamedTuple

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport UINT32_MAX

# The UL_FRAME_* and UL_LINK_* bits under names that Python can see.
FRAME_CSUM_PARTIAL: int = UL_FRAME_CSUM_PARTIAL
FRAME_CSUM_OK: int = UL_FRAME_CSUM_OK
FRAME_GSO_TCP4: int = UL_FRAME_GSO_TCP4
FRAME_GSO_UDP: int = UL_FRAME_GSO_UDP
FRAME_UFO: int = UL_FRAME_UFO
LINK_CSUM: int = UL_LINK_CSUM
LINK_TSO: int = UL_LINK_TSO
LINK_USO: int = UL_LINK_USO
LINK_UFO: int = UL_LINK_UFO
LINK_EVACUATE: int = UL_LINK_EVACUATE
MAX_PIECES: int = 18  # struct ul_tx: most buffers in one frame

cdef enum:
    PIECES_MAX = 18
    FRAME_BITS = 31         # of the flags, those that say something of the frame itself


class Frame(NamedTuple):
    """A received frame, copied out of the link: Ethernet header first, FRAME_* bits, bytes a GSO piece."""

    data: bytes
    flags: int
    gso_size: int


cdef class Link:
    """Something that carries Ethernet frames. Subclasses fill in ``ops``.

    Attributes: ``mtu`` (bytes), ``mac`` (6 bytes), ``features`` (UL_LINK_* bits).
    """

    def __cinit__(self, *args, **kwargs):
        self.ops.fd = self.ops.large_fd = -1

    @property
    def mtu(self) -> int:
        return self.ops.mtu_bytes

    @property
    def mac(self) -> bytes:
        return bytes(self.ops.mac[:6])

    @property
    def features(self) -> int:
        return self.ops.features

    def fileno(self) -> int:
        """Descriptor that polls readable when frames arrive; -1 when the link has none."""
        return self.ops.fd

    def filenos(self) -> list[int]:
        """All of them: large frames may have one of their own."""
        return [fd for fd in (self.ops.fd, self.ops.large_fd) if fd >= 0]

    def counters(self) -> dict[str, int]:
        """Frames and bytes each way, and everything dropped, by reason."""
        return {}

    def recv_frame(self):
        """The next frame as a ``Frame``, copied and released at once; None when there is none now.

        For tests and tools: the stack uses the C table, which copies nothing.
        """
        cdef ul_rx rx
        cdef int got
        if self.ops.recv == NULL:
            raise OSError(9, "the link is closed")
        with nogil:
            got = self.ops.recv(self.ops.ctx, &rx)
        if got <= 0:
            return None
        try:
            return Frame((<const char *>rx.data)[:rx.len_bytes], rx.flags & FRAME_BITS, rx.gso_size_bytes)
        finally:
            if rx.slot != UL_SLOT_NONE:
                self.ops.release(self.ops.ctx, rx.slot)

    def send_frame(self, data, int flags=0, int gso_size=0, int hdr_len=0, int csum_start=0, int csum_offset=0) -> None:
        """Send one frame: a bytes-like object, or a list of at most 18 gathered into one frame.

        Raises OSError with the link's errno (EAGAIN: the link is full now, try again).
        """
        cdef iovec iov[PIECES_MAX]
        cdef Py_buffer views[PIECES_MAX]
        cdef ul_tx tx
        cdef int code, held = 0
        cdef size_t total = 0
        if self.ops.send == NULL:
            raise OSError(9, "the link is closed")
        pieces = data if isinstance(data, (list, tuple)) else [data]
        if not 1 <= len(pieces) <= PIECES_MAX:
            raise ValueError(f"a frame has 1 to {PIECES_MAX} pieces, not {len(pieces)}: join some of them")
        try:
            for piece in pieces:
                PyObject_GetBuffer(piece, &views[held], PyBUF_SIMPLE)
                iov[held].iov_base = views[held].buf
                iov[held].iov_len = <size_t>views[held].len
                total += <size_t>views[held].len
                held += 1
            if total > UINT32_MAX:
                raise ValueError(f"a frame of {total} bytes does not fit any link")
            tx.iov = iov
            tx.iov_count = held
            tx.len_bytes = <uint32_t>total
            tx.flags = flags
            tx.gso_size_bytes = gso_size
            tx.hdr_len_bytes = hdr_len
            tx.csum_start = csum_start
            tx.csum_offset = csum_offset
            with nogil:
                code = self.ops.send(self.ops.ctx, &tx)
        finally:
            while held:
                held -= 1
                PyBuffer_Release(&views[held])
        if code < 0:
            raise OSError(-code, os.strerror(-code))

    def close_fd(self) -> None:
        """In a forked child: give up what would keep the parent's link alive, and touch nothing that both share."""

    def close(self) -> None:
        """Give the link's resources back. Frames still held become invalid."""
