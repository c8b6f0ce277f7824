# Out-of-order segments of one connection: a list ordered by sequence number, without overlaps, bounded.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_rx
from ulnet.stack.buf cimport bufpool, rxqueue

cdef enum:
    OOO_MAX_PIECES = 1024            # bounds the walk that a peer can make us do for each segment

# Keep what is new of [seq, seq+n). *held as in rxq_append. 0, or -ENOMEM when over the limits (counted by the caller).
cdef int ooo_insert(bufpool *p, rxqueue *ooo, const uint8_t *data, uint32_t n, uint32_t seq,
                    const ul_rx *frame, uint64_t limit_bytes, bint *held) noexcept nogil
# Move what has become contiguous at rcv_nxt to rcv (NULL: throw it away); returns the new rcv_nxt.
cdef uint32_t ooo_pull(bufpool *p, rxqueue *ooo, rxqueue *rcv, uint32_t rcv_nxt) noexcept nogil
# Forget everything from seq on (data beyond a FIN).
cdef void ooo_cut(bufpool *p, rxqueue *ooo, uint32_t seq) noexcept nogil
