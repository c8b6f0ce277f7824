"""The capturing link: wraps any link and writes what passes to a pcap file, both directions.

Format: pcap with nanoseconds, little or big endian as the machine, Ethernet (draft-ietf-opsawg-pcap).
Frames are written as a wire would carry them: partial checksums completed, super-segments cut into packets,
so that a reader finds neither bad checksums nor packets above the MTU. ``raw=True`` leaves them as they are.
The file is written in blocks; ``flush()`` and ``close()`` write the rest, an idle ``recv`` does it ten times a second.
When closed, frames pass as if there were no capture.
"""

import errno
import os

from libc.errno cimport EINTR, EIO, errno as c_errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport write as c_write

from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_PARTIAL,
    UL_FRAME_GSO_TCP4,
    UL_FRAME_GSO_UDP,
    UL_FRAME_UFO,
    Link,
    ul_link,
    ul_rx,
    ul_tx,
)
from ulnet.kernelshim.rawseg cimport (
    raw_complete,
    raw_fragment,
    raw_fragments,
    raw_layout,
    raw_parse,
    raw_piece,
    raw_pieces,
)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    PCAP_NANOSECONDS = 0xA1B23C4D
    LINKTYPE_ETHERNET = 1
    FRAME_MAX_BYTES = 65535 + 14 + 64
    BUFFER_BYTES = 256 * 1024
    FLUSH_NS = 100000000


# -- the file ------------------------------------------------------------------------------------------

cdef int64_t cap_now(const cap_state *state) noexcept nogil:
    cdef timespec now
    if state.is_virtual:
        return state.now_ns
    clock_gettime(CLOCK_REALTIME, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef int cap_write_python(cap_state *state) noexcept with gil:
    try:
        (<CaptureLink>state.owner).write_out(state.buffer, state.used_bytes)
        return 0
    except BaseException as error:
        return getattr(error, "errno", None) or EIO


cdef void cap_flush(cap_state *state) noexcept nogil:
    """Hand the buffer to the file. What the file does not take is counted and lost; frames never wait for it."""
    cdef uint32_t done = 0
    cdef ssize_t got
    cdef int failure = 0
    if state.used_bytes == 0:
        return
    if state.fd < 0:
        failure = cap_write_python(state)
    else:
        while done < state.used_bytes:
            got = c_write(state.fd, state.buffer + done, state.used_bytes - done)
            if got < 0:
                if c_errno == EINTR:
                    continue
                failure = c_errno
                break
            done += <uint32_t>got
    if failure:
        # A file with a hole in the middle cannot be read: end the capture.
        state.failed += 1
        state.last_error = failure
        state.open = False
    state.used_bytes = 0


cdef void cap_record(cap_state *state, const uint8_t *data, uint32_t size, int64_t at_ns) noexcept nogil:
    cdef uint32_t kept = size if size < state.snaplen_bytes else state.snaplen_bytes
    cdef uint32_t head[4]
    if state.used_bytes + sizeof(head) + kept > state.room_bytes:
        cap_flush(state)
        if not state.open:
            return
    head[0] = <uint32_t>(at_ns // 1000000000)
    head[1] = <uint32_t>(at_ns % 1000000000)
    head[2] = kept
    head[3] = size
    memcpy(state.buffer + state.used_bytes, head, sizeof(head))
    memcpy(state.buffer + state.used_bytes + sizeof(head), data, kept)
    state.used_bytes += <uint32_t>sizeof(head) + kept
    state.packets += 1
    state.bytes += size


cdef void cap_frame(cap_state *state, uint8_t *data, uint32_t size, uint16_t flags, uint32_t gso) noexcept nogil:
    """Record a frame as a wire would carry it. ``data`` is a copy of ours, except when nothing is to be changed."""
    cdef raw_layout at
    cdef uint32_t number, length
    cdef int64_t now = cap_now(state)
    state.frames += 1
    if (
        state.raw
        or not flags & (UL_FRAME_CSUM_PARTIAL | UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP | UL_FRAME_UFO)
        or not raw_parse(data, size, &at)
    ):
        cap_record(state, data, size, now)
        return
    if not flags & (UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP) or gso == 0:
        if flags & UL_FRAME_CSUM_PARTIAL:
            raw_complete(data, &at)
        if not flags & UL_FRAME_UFO or at.v6 or gso < 8:
            cap_record(state, data, size, now)
            return
        for number in range(raw_fragments(&at, gso)):
            length = raw_fragment(data, &at, gso, number, state.piece)
            cap_record(state, state.piece, length, now)
        return
    for number in range(raw_pieces(&at, gso)):
        length = raw_piece(data, &at, gso, number, flags & UL_FRAME_CSUM_PARTIAL, state.piece)
        cap_record(state, state.piece, length, now)
        if not state.open:
            return


# -- the link table ------------------------------------------------------------------------------------

cdef int cap_send(void *ctx, const ul_tx *tx) noexcept nogil:
    cdef cap_state *state = <cap_state *>ctx
    cdef uint32_t at = 0
    cdef size_t part
    cdef int i, code
    if not state.open:
        return state.inner.send(state.inner.ctx, tx)
    # Recorded after the link took it, since what is refused was never on the wire; under the lock as a whole,
    # so that an answer, received by another thread, does not come before it in the file.
    pthread_mutex_lock(&state.lock)
    code = state.inner.send(state.inner.ctx, tx)
    if code == 0 and state.open:
        for i in range(tx.iov_count):
            part = tx.iov[i].iov_len
            if at + part > FRAME_MAX_BYTES:
                part = FRAME_MAX_BYTES - at
            memcpy(state.whole + at, tx.iov[i].iov_base, part)
            at += <uint32_t>part
        cap_frame(state, state.whole, at, tx.flags, tx.gso_size_bytes)
    pthread_mutex_unlock(&state.lock)
    return code


cdef int cap_recv(void *ctx, ul_rx *rx) noexcept nogil:
    cdef cap_state *state = <cap_state *>ctx
    cdef uint32_t size
    cdef int64_t now
    cdef int got = state.inner.recv(state.inner.ctx, rx)
    if not state.open:
        return got
    pthread_mutex_lock(&state.lock)
    if not state.open:
        pass
    elif got == 1:
        size = rx.len_bytes if rx.len_bytes < FRAME_MAX_BYTES else FRAME_MAX_BYTES
        if rx.flags & UL_FRAME_CSUM_PARTIAL and not state.raw:
            memcpy(state.whole, rx.data, size)
            cap_frame(state, state.whole, size, rx.flags, rx.gso_size_bytes)
        else:
            cap_frame(state, <uint8_t *>rx.data, size, rx.flags, rx.gso_size_bytes)
    elif state.used_bytes:
        now = cap_now(state)
        if now - state.flushed_ns > FLUSH_NS:
            state.flushed_ns = now
            cap_flush(state)
    pthread_mutex_unlock(&state.lock)
    return got


cdef void cap_release(void *ctx, uint32_t slot) noexcept nogil:
    cdef cap_state *state = <cap_state *>ctx
    state.inner.release(state.inner.ctx, slot)


cdef int cap_evacuate(void *ctx, uint32_t slot) noexcept nogil:
    cdef cap_state *state = <cap_state *>ctx
    return state.inner.evacuate(state.inner.ctx, slot)


cdef int cap_deferred(void *ctx, int64_t now_ns, int64_t *due_ns) noexcept nogil:
    cdef cap_state *state = <cap_state *>ctx
    state.now_ns = now_ns
    if state.inner.deferred_ns == NULL:
        return 0
    return state.inner.deferred_ns(state.inner.ctx, now_ns, due_ns)


# -- the Python face -----------------------------------------------------------------------------------

cdef class CaptureLink(Link):
    """``inner`` with a capture. ``path_or_file``: a path, or a binary file object that stays the caller's.

    ``snaplen``: bytes kept of each packet. ``raw``: leave partial checksums and super-segments as they are.
    ``virtual``: time stamps are the times the stack runs at (``deferred_ns``), not the machine's.
    Raises OSError when the file cannot be made.
    """

    def __cinit__(self):
        self.state = <cap_state *>calloc(1, sizeof(cap_state))
        if self.state == NULL:
            raise MemoryError
        pthread_mutex_init(&self.state.lock, NULL)
        self.state.fd = -1

    def __init__(self, Link inner, path_or_file, *, snaplen: int = 262144, raw: bool = False, virtual: bool = False):
        cdef cap_state *state = self.state
        cdef uint32_t head[6]
        if state.inner != NULL:
            raise ValueError("a CaptureLink is made once: make another")
        if not 34 <= snaplen <= 262144:
            raise ValueError(f"snaplen {snaplen} is not within 34 to 262144")
        self.inner = inner
        state.buffer = <uint8_t *>malloc(BUFFER_BYTES)
        state.whole = <uint8_t *>malloc(FRAME_MAX_BYTES)
        state.piece = <uint8_t *>malloc(FRAME_MAX_BYTES)
        if state.buffer == NULL or state.whole == NULL or state.piece == NULL:
            raise MemoryError
        state.room_bytes = BUFFER_BYTES
        if isinstance(path_or_file, (str, bytes, os.PathLike)):
            state.fd = os.open(path_or_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self.owns_fd = True
        else:
            self.file = path_or_file  # its own buffer may hold bytes already: always through its write()
        state.inner = &inner.ops
        state.owner = <void *>self
        state.raw = raw
        state.is_virtual = virtual
        state.snaplen_bytes = snaplen
        self.ops = inner.ops
        self.ops.ctx = state
        self.ops.send = cap_send
        self.ops.recv = cap_recv
        self.ops.release = cap_release
        if inner.ops.evacuate != NULL:
            self.ops.evacuate = cap_evacuate
        if inner.ops.deferred_ns != NULL or virtual:
            self.ops.deferred_ns = cap_deferred
        memset(head, 0, sizeof(head))
        head[0] = PCAP_NANOSECONDS
        (<uint16_t *>&head[1])[0] = 2  # version 2.4
        (<uint16_t *>&head[1])[1] = 4
        head[4] = state.snaplen_bytes
        head[5] = LINKTYPE_ETHERNET
        memcpy(state.buffer, head, sizeof(head))
        state.used_bytes = sizeof(head)
        state.open = True

    cdef int write_out(self, const uint8_t *data, uint32_t size) except -1:
        view = memoryview((<const char *>data)[:size])
        while view:
            done = self.file.write(view)
            if done is None:
                raise BlockingIOError(errno.EAGAIN, "the file does not take the capture")
            view = view[done:]
        return 0

    def flush(self) -> None:
        """Write everything captured so far. Raises OSError once the file has failed."""
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            cap_flush(self.state)
            pthread_mutex_unlock(&self.state.lock)
        if self.state.last_error:
            raise OSError(self.state.last_error, f"capture ended: {os.strerror(self.state.last_error)}")

    def stop(self) -> None:
        """End the capture and leave the link at work, from now on at its own speed."""
        cdef bint failed = self.state.last_error != 0
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            if self.state.open:
                cap_flush(self.state)
            self.state.open = False
            pthread_mutex_unlock(&self.state.lock)
        if self.owns_fd:
            self.owns_fd = False
            os.close(self.state.fd)
        if self.file is not None:
            if hasattr(self.file, "flush"):
                self.file.flush()
            self.file = None
        if self.state.last_error and not failed:
            raise OSError(self.state.last_error, f"capture: {os.strerror(self.state.last_error)}")

    def counters(self) -> dict[str, int]:
        """The inner link's counters, and ``captured_frames``, ``captured_packets`` (after cutting),
        ``captured_bytes``, ``capture_failed``."""
        return self.inner.counters() | {
            "captured_frames": self.state.frames,
            "captured_packets": self.state.packets,
            "captured_bytes": self.state.bytes,
            "capture_failed": self.state.failed,
        }

    def close_fd(self) -> None:
        self.inner.close_fd()

    def close(self) -> None:
        """End the capture and close the inner link."""
        try:
            self.stop()
        finally:
            self.inner.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __dealloc__(self):
        if self.state != NULL:
            if self.state.fd >= 0 and self.owns_fd:
                if self.state.open:
                    cap_flush(self.state)
                os.close(self.state.fd)
            pthread_mutex_destroy(&self.state.lock)
            free(self.state.buffer)
            free(self.state.whole)
            free(self.state.piece)
            free(self.state)
