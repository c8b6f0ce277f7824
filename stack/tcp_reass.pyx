"""Reassembly of out-of-order TCP segments, with bounded memory and bounded work."""
# Read first: RFC 9293 3.10.7.4 (segments beyond RCV.NXT should be kept). Of bytes that come twice the first
# copy stays. The queue's len_bytes, mem_bytes and count are those of rxqueue; rxseg.seq says where each lies.

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from ulnet.stack.buf cimport RXSEG_HEAP, rxq_push, rxseg, rxseg_free, rxseg_new
from ulnet.stack.seqnum cimport seq_ge, seq_gt, seq_le, seq_lt


cdef inline uint32_t seg_end(const rxseg *s) noexcept nogil:
    return s.seq + s.len_bytes


cdef int insert_after(bufpool *p, rxqueue *q, rxseg *prev, const uint8_t *data, uint32_t n, uint32_t seq,
                      const ul_rx *frame, uint64_t limit_bytes, bint *held, rxseg **made) noexcept nogil:
    """Put a piece that overlaps nothing behind prev (NULL: at the head), or into prev's spare room."""
    cdef rxseg *s
    made[0] = prev
    if prev != NULL and seg_end(prev) == seq and prev.origin == RXSEG_HEAP and prev.cap_bytes >= n:
        memcpy(prev.data + prev.len_bytes, data, n)
        prev.len_bytes += n
        prev.cap_bytes -= n
        q.len_bytes += n
        p.copied_bytes += n
        return 0
    if q.count >= OOO_MAX_PIECES or q.mem_bytes + n > limit_bytes:
        return -ENOMEM
    # Room for the neighbours of a small piece: a run of small segments becomes a few blocks.
    s = rxseg_new(p, data, n, seq, frame, 2048 if q.count else 0, held)
    if s == NULL:
        return -ENOMEM
    if prev == NULL:
        s.next = q.head
        q.head = s
    else:
        s.next = prev.next
        prev.next = s
    if s.next == NULL:
        q.tail = s
    q.len_bytes += n
    q.mem_bytes += s.mem_bytes
    q.count += 1
    made[0] = s
    return 0


cdef int ooo_insert(bufpool *p, rxqueue *ooo, const uint8_t *data, uint32_t n, uint32_t seq,
                    const ul_rx *frame, uint64_t limit_bytes, bint *held) noexcept nogil:
    cdef rxseg *prev = NULL
    cdef rxseg *s = ooo.head
    cdef uint32_t end = seq + n, part
    cdef bint piece_held = False
    cdef int r
    held[0] = False
    if ooo.tail != NULL and seq_ge(seq, ooo.tail.seq):
        prev = ooo.tail              # the usual place
        s = NULL
    else:
        while s != NULL and seq_le(s.seq, seq):
            prev = s
            s = s.next
    if prev != NULL and seq_gt(seg_end(prev), seq):
        part = seg_end(prev) - seq   # the head is here already
        if part >= n:
            return 0
        data += part
        seq += part
    while seq_lt(seq, end):
        if s == NULL or seq_ge(s.seq, end):
            return insert_after(p, ooo, prev, data, end - seq, seq, frame, limit_bytes, held, &prev)
        part = s.seq - seq
        if part:
            # A gap before a neighbour: only one piece can own the slot, this one is copied.
            r = insert_after(p, ooo, prev, data, part, seq, NULL, limit_bytes, &piece_held, &prev)
            if r < 0:
                return r
        part += s.len_bytes
        if part >= end - seq:
            return 0
        data += part
        seq += part
        prev = s
        s = s.next
    return 0


cdef inline rxseg *ooo_pop(rxqueue *q) noexcept nogil:
    cdef rxseg *s = q.head
    q.head = s.next
    if q.head == NULL:
        q.tail = NULL
    q.len_bytes -= s.len_bytes
    q.mem_bytes -= s.mem_bytes
    q.count -= 1
    s.next = NULL
    return s


cdef uint32_t ooo_pull(bufpool *p, rxqueue *ooo, rxqueue *rcv, uint32_t rcv_nxt) noexcept nogil:
    cdef rxseg *s
    cdef uint32_t skip
    while ooo.head != NULL and seq_le(ooo.head.seq, rcv_nxt):
        s = ooo_pop(ooo)
        skip = rcv_nxt - s.seq
        if skip >= s.len_bytes:
            rxseg_free(p, s)
            continue
        s.data += skip
        s.len_bytes -= skip
        s.seq += skip
        rcv_nxt += s.len_bytes
        rxq_push(rcv, s)
    return rcv_nxt


cdef void ooo_cut(bufpool *p, rxqueue *ooo, uint32_t seq) noexcept nogil:
    cdef rxseg *prev = NULL
    cdef rxseg *s = ooo.head
    cdef rxseg *following
    while s != NULL and seq_lt(s.seq, seq):
        if seq_gt(seg_end(s), seq):
            ooo.len_bytes -= seg_end(s) - seq
            s.len_bytes = seq - s.seq
            s.cap_bytes = 0
        prev = s
        s = s.next
    if prev == NULL:
        ooo.head = NULL
    else:
        prev.next = NULL
    ooo.tail = prev
    while s != NULL:
        following = s.next
        ooo.len_bytes -= s.len_bytes
        ooo.mem_bytes -= s.mem_bytes
        ooo.count -= 1
        rxseg_free(p, s)
        s = following
