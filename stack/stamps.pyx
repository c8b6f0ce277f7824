"""Where the time of a message goes: time stamps in a ring that this process shares with whoever measures.

Call order: the measuring side makes the file (``create``), each process ``open``s its own, ``switch`` turns stamping on
and off in all of them without asking anybody, ``read`` takes what they left. CLOCK_MONOTONIC is one clock for all
processes and processors, and costs some 25 ns a stamp. Never opened, a stamp costs one branch.

The file: a head of 64 bytes (on, records, the number of the next record), then the records (time, point), oldest
overwritten.
"""

import mmap as _mmap
import os
import struct

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    """
    static inline uint64_t ulstamp_next(uint64_t *p) { return __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
    static inline unsigned ulstamp_on(const unsigned *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    """
    uint64_t ulstamp_next(uint64_t *p) nogil
    bint ulstamp_on(const uint32_t *p) nogil

ctypedef struct stamp_head:
    uint32_t on
    uint32_t mask                # records - 1
    uint64_t next
    uint64_t unused[6]

ctypedef struct stamp_rec:
    int64_t ns
    uint64_t point

CALL_SEND = STAMP_CALL_SEND
TRANSPORT_OUT = STAMP_TRANSPORT_OUT
OUTPUT = STAMP_OUTPUT
IP_OUT = STAMP_IP_OUT
LINK_OUT = STAMP_LINK_OUT
LINK_SENT = STAMP_LINK_SENT
SEND_RETURN = STAMP_SEND_RETURN
WOKEN = STAMP_WOKEN
FRAME = STAMP_FRAME
TRANSPORT_IN = STAMP_TRANSPORT_IN
DELIVERED = STAMP_DELIVERED
READY = STAMP_READY
RELAYED = STAMP_RELAYED
RECV_RETURN = STAMP_RECV_RETURN

HEAD_BYTES = 64
RECORD_BYTES = 16
RECORDS = 1 << 16

stamps_at = NULL
cdef list _mapped = []               # never unmapped: a thread may be stamping


cdef void stamp_take(int point) noexcept nogil:
    cdef stamp_head *head = <stamp_head *>stamps_at
    cdef stamp_rec *rec
    cdef timespec ts
    if not ulstamp_on(&head.on):
        return
    clock_gettime(CLOCK_MONOTONIC, &ts)
    rec = <stamp_rec *>(<char *>head + sizeof(stamp_head)) + (ulstamp_next(&head.next) & head.mask)
    rec.ns = ts.tv_sec * 1000000000 + ts.tv_nsec
    rec.point = <uint64_t>point


def create(str path, int records=RECORDS, int mode=0o600):
    """Make a file for ``records`` stamps (a power of two), switched off."""
    if records < 1 or records & (records - 1):
        raise ValueError(f"{records} stamps: the number must be a power of two")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, mode)
        os.truncate(fd, HEAD_BYTES + records * RECORD_BYTES)
        os.pwrite(fd, struct.pack("=IIQ", 0, records - 1, 0), 0)
    finally:
        os.close(fd)


def open(str path):
    """This process stamps into ``path`` from now on, whenever it is switched on."""
    global stamps_at
    cdef Py_buffer view
    cdef stamp_head *head
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = _mmap.mmap(fd, 0)
    finally:
        os.close(fd)
    PyObject_GetBuffer(mapped, &view, PyBUF_WRITABLE)
    head = <stamp_head *>view.buf
    if view.len < HEAD_BYTES or <uint64_t>view.len != HEAD_BYTES + (<uint64_t>head.mask + 1) * RECORD_BYTES:
        PyBuffer_Release(&view)
        raise ValueError(f"{path} is no file made by ulnet.stack.stamps.create()")
    PyBuffer_Release(&view)
    _mapped.append(mapped)
    stamps_at = <void *>head


def close():
    """This process stamps no more."""
    global stamps_at
    stamps_at = NULL


def mark(int point):
    """A stamp of the program's own."""
    stamp(point)


def switch(str path, bint on):
    """Turn stamping into ``path`` on, from an empty file, or off; the processes that have it open follow at once."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if on:
            os.pwrite(fd, struct.pack("=Q", 0), 8)
        os.pwrite(fd, struct.pack("=I", on), 0)
    finally:
        os.close(fd)


def read(str path):
    """The stamps there are, oldest first: (time in ns, point)."""
    with _open_file(path) as source:
        data = source.read()
    _, mask, following = struct.unpack_from("=IIQ", data)
    first = max(0, following - mask - 1)
    return [struct.unpack_from("=qQ", data, HEAD_BYTES + (i & mask) * RECORD_BYTES) for i in range(first, following)]


def _open_file(path):
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb")
