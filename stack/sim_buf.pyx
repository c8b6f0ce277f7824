"""Buffers over a pretended ring: what a slow reader does to the slots, seen from Python.

A slot's memory is poisoned the moment it is released, so that a use after release shows as wrong bytes.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EBUSY
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ulnet.kernelshim.link cimport UL_FRAME_GSO_UDP, UL_FRAME_IN_RING, UL_LINK_EVACUATE, UL_SLOT_NONE, iovec, ul_link, ul_rx
from ulnet.stack.buf cimport *


cdef void lab_release(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        (<RingLab>ctx).on_release(slot)


cdef int lab_evacuate(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        return (<RingLab>ctx).on_evacuate(slot)


cdef class LabSegment:
    """A segment taken out of the queue: lent until released."""
    cdef RingLab lab
    cdef rxseg *s

    cdef rxseg *live(self) except NULL:
        if self.s == NULL:
            raise ValueError("the segment was released")
        return self.s

    @property
    def data(self) -> bytes:
        self.live()
        return PyBytes_FromStringAndSize(<char *>self.s.data, self.s.len_bytes)

    @property
    def origin(self) -> str:
        return ("heap", "slot", "evacuated")[self.live().origin]

    @property
    def seq(self) -> int:
        return self.live().seq

    def release(self) -> None:
        rxseg_free(&self.lab.pool, self.live())
        self.s = NULL


cdef class RingLab:
    """One pool, one receive queue and one send queue over a ring of ``slots`` (0: frames are not scarce)."""
    cdef bufpool pool
    cdef ul_link link
    cdef rxqueue rx
    cdef txqueue tx
    cdef dict busy                   # slot -> memory, until released
    cdef set gone                    # evacuated
    cdef readonly list released
    cdef public bint can_evacuate
    cdef uint32_t at
    cdef uint32_t skew               # frames begin anywhere within a cache line

    def __cinit__(self, slots: int = 16):
        memset(&self.link, 0, sizeof(self.link))
        self.link.ctx = <void *>self
        self.link.release = lab_release
        self.link.evacuate = lab_evacuate
        self.link.features = UL_LINK_EVACUATE
        self.link.slots = slots
        self.busy = {}
        self.gone = set()
        self.released = []
        self.can_evacuate = True
        bufpool_init(&self.pool, &self.link)

    def __dealloc__(self):
        self.clear()
        bufpool_destroy(&self.pool)

    cdef void on_release(self, uint32_t slot):
        memory = self.busy.pop(slot, None)
        if memory is None:
            raise AssertionError(f"slot {slot} released but not held")
        memory[:] = b"\xee" * len(memory)
        self.gone.discard(slot)
        self.released.append(slot)

    cdef int on_evacuate(self, uint32_t slot):
        if not self.can_evacuate:
            return -EBUSY
        self.gone.add(slot)
        return 0

    def receive(self, data: bytes, *, stream: bool = True, seq: int = 0, train: bool = False) -> bool:
        """A frame arrives in the next slot and is appended; True when its slot was kept."""
        cdef ul_rx frame
        cdef bint held = False
        cdef uint32_t slot = self.at
        if slot in self.busy:
            raise BlockingIOError(f"the ring ran into slot {slot}, which is held")
        self.at = slot + 1
        if self.link.slots:
            self.at %= self.link.slots
        cdef uint32_t skew = self.skew % 64
        self.skew += 61
        memory = bytearray(skew) + data
        self.busy[slot] = memory
        memset(&frame, 0, sizeof(frame))
        frame.data = <const uint8_t *>PyByteArray_AS_STRING(memory) + skew
        frame.len_bytes = len(data)
        frame.slot = slot
        frame.flags = UL_FRAME_IN_RING | (UL_FRAME_GSO_UDP if train else 0)
        self.pool.last_slot = slot
        if rxq_append(&self.pool, &self.rx, frame.data, frame.len_bytes, seq, &frame, stream, &held) < 0:
            raise MemoryError("rxq_append")
        if not held:
            self.on_release(slot)
        return held

    def read(self, n: int, peek: bool = False) -> bytes:
        out = PyBytes_FromStringAndSize(NULL, n)
        return out[:rxq_read(&self.pool, &self.rx, <uint8_t *>PyBytes_AS_STRING(out), n, peek)]

    def take(self, n: int = 1 << 30) -> LabSegment | None:
        cdef LabSegment seg = LabSegment()
        seg.lab = self
        seg.s = rxq_take(&self.pool, &self.rx, n)
        return None if seg.s == NULL else seg

    def relieve(self) -> None:
        bufpool_relieve(&self.pool)

    def clear(self) -> None:
        rxq_clear(&self.pool, &self.rx)
        txq_clear(&self.pool, &self.tx)
        bufpool_reap(&self.pool)

    def reap(self) -> None:
        bufpool_reap(&self.pool)

    def write(self, data: bytes, *, hold: bool = False) -> None:
        cdef int r
        if hold:
            r = txq_append_hold(&self.pool, &self.tx, <const uint8_t *>PyBytes_AS_STRING(data), len(data), data)
        else:
            r = txq_append_copy(&self.pool, &self.tx, <const uint8_t *>PyBytes_AS_STRING(data), len(data))
        if r < 0:
            raise MemoryError("txq_append")

    def drop(self, n: int) -> None:
        txq_drop(&self.pool, &self.tx, n)

    def pieces(self, off: int, n: int, max_pieces: int = 16) -> list[bytes]:
        cdef iovec iov[64]
        cdef uint32_t filled = 0
        cdef int used = txq_iov(&self.tx, off, n, iov, min(max_pieces, 64), &filled)
        cdef int i
        out = [PyBytes_FromStringAndSize(<char *>iov[i].iov_base, iov[i].iov_len) for i in range(used)]
        if sum(map(len, out)) != filled:
            raise AssertionError(f"pieces cover {sum(map(len, out))} bytes, txq_iov says {filled}")
        return out

    def copy_out(self, off: int, n: int) -> bytes:
        out = PyBytes_FromStringAndSize(NULL, n)
        txq_copy_out(&self.tx, off, n, <uint8_t *>PyBytes_AS_STRING(out))
        return out

    @property
    def numbers(self) -> dict[str, int]:
        return {"unread": self.rx.len_bytes, "segments": self.rx.count, "memory": self.rx.mem_bytes,
                "unsent": self.tx.len_bytes, "held": self.pool.held, "lent": self.pool.lent,
                "blocks": self.pool.live_blocks, "copied": self.pool.copied_bytes, "evacuated": self.pool.evacuated,
                "busy": len(self.busy), "gone": len(self.gone)}
