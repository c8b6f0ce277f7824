"""Buffers of one stack: received segments, bytes to send, and the pool that recycles both.

Blocks come in four sizes kept on freelists, so that the steady state allocates nothing. Who owns which
byte is written at the structs in buf.pxd.
"""
# Call order: bufpool_init; rxq_append / txq_append_* as data comes; rxq_read, rxq_take, txq_drop as it
# goes; bufpool_relieve once a burst; bufpool_reap whenever the GIL is held anyway; bufpool_destroy.

from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from ulnet.kernelshim.fastpaths cimport fast_from_bytes
from ulnet.kernelshim.link cimport UL_FRAME_GSO_UDP, UL_FRAME_IN_RING, UL_LINK_EVACUATE, UL_SLOT_NONE, iovec, ul_link, ul_rx

cdef extern from "ulnet/stack/lines.h" nogil:
    void take_lines "ul_take_lines" (const uint8_t *p, size_t n)
    void copy_taking "ul_copy_taking" (uint8_t *to, const uint8_t *data, size_t n)

cdef enum:
    # Payload room of each class; a header of HEADER_BYTES comes on top. The smallest holds a header and a
    # short message, 2 KiB an Ethernet frame, 64 KiB a super-segment.
    SMALL_BYTES = 256
    FRAME_BYTES = 2048
    BULK_BYTES = 16384
    SUPER_BYTES = 65536
    HEADER_BYTES = 128               # at least sizeof(rxseg) and sizeof(txchunk); checked at import
    QUEUE_IS_BUSY_BYTES = 4096       # behind this much unread or unsent data larger blocks pay off


cdef inline uint32_t class_room(int cls) noexcept nogil:
    if cls == 0:
        return SMALL_BYTES
    if cls == 1:
        return FRAME_BYTES
    return BULK_BYTES if cls == 2 else SUPER_BYTES


cdef inline uint32_t class_keep(int cls) noexcept nogil:
    # At most 192 KiB, 512 KiB, 1 MiB and 1 MiB rest on the freelists.
    if cls == 0:
        return 512
    if cls == 1:
        return 256
    return 64 if cls == 2 else 16


cdef inline int class_of(uint32_t n) noexcept nogil:
    if n <= SMALL_BYTES:
        return 0
    if n <= FRAME_BYTES:
        return 1
    if n <= BULK_BYTES:
        return 2
    return 3 if n <= SUPER_BYTES else BUF_CLASS_MALLOC


cdef uint8_t *block_get(bufpool *p, int cls, uint32_t n) noexcept nogil:
    """A block with header room and at least n payload bytes; NULL and counted when there is no memory."""
    cdef void *b
    if cls < BUF_CLASSES:
        b = p.free_blocks[cls]
        if b != NULL:
            p.free_blocks[cls] = (<void **>b)[0]
            p.free_count[cls] -= 1
            p.live_blocks += 1
            return <uint8_t *>b
        n = class_room(cls)
    b = malloc(<size_t>HEADER_BYTES + n)
    if b == NULL:
        p.nomem += 1
        return NULL
    p.live_blocks += 1
    return <uint8_t *>b


cdef void block_put(bufpool *p, int cls, void *b) noexcept nogil:
    p.live_blocks -= 1
    if cls < BUF_CLASSES and p.free_count[cls] < class_keep(cls):
        (<void **>b)[0] = p.free_blocks[cls]
        p.free_blocks[cls] = b
        p.free_count[cls] += 1
        return
    free(b)


cdef void bufpool_init(bufpool *p, ul_link *link) noexcept nogil:
    memset(p, 0, sizeof(bufpool))
    p.link = link
    p.last_slot = UL_SLOT_NONE


cdef void bufpool_destroy(bufpool *p) noexcept nogil:
    """Free the freelists. Queues must be cleared and lent segments be back before."""
    cdef void *b
    cdef int i
    if p.dead != NULL:
        with gil:
            bufpool_reap(p)
    for i in range(BUF_CLASSES):
        while p.free_blocks[i] != NULL:
            b = p.free_blocks[i]
            p.free_blocks[i] = (<void **>b)[0]
            free(b)
        p.free_count[i] = 0


cdef void bufpool_reap(bufpool *p):
    cdef txchunk *c = p.dead
    cdef txchunk *following
    cdef PyObject *owner
    p.dead = NULL                    # first: a decref may run Python code that comes back here
    while c != NULL:
        following = c.next
        owner = <PyObject *>c.owner
        block_put(p, c.block_class, c)
        Py_DECREF(<object>owner)
        c = following


cdef void chunks_free(bufpool *p, txchunk *c) noexcept nogil:
    cdef txchunk *following
    while c != NULL:
        following = c.next
        block_put(p, c.block_class, c)
        c = following


# ---- held slots ----

cdef uint32_t copy_below_bytes = fast_from_bytes(RX_COPY_BELOW_BYTES)


cdef inline bint held_is_worth_it(bufpool *p, const ul_rx *frame, uint32_t n) noexcept nogil:
    if frame == NULL or n < copy_below_bytes or frame.slot == UL_SLOT_NONE or p.link == NULL:
        return False
    if frame.flags & UL_FRAME_GSO_UDP:
        return False                 # many datagrams in one slot: none can own it
    if p.link.slots == 0 or p.held < p.link.slots // 2:
        return True
    p.slots_short += 1
    return False


cdef inline void held_add(bufpool *p, rxseg *s) noexcept nogil:
    s.held_next = NULL
    s.held_prev = p.held_tail
    if p.held_tail != NULL:
        p.held_tail.held_next = s
    else:
        p.held_head = s
    p.held_tail = s
    p.held += 1


cdef inline void held_remove(bufpool *p, rxseg *s) noexcept nogil:
    if s.held_prev != NULL:
        s.held_prev.held_next = s.held_next
    else:
        p.held_head = s.held_next
    if s.held_next != NULL:
        s.held_next.held_prev = s.held_prev
    else:
        p.held_tail = s.held_prev
    s.held_prev = s.held_next = NULL
    p.held -= 1


cdef inline void slot_release(bufpool *p, uint32_t slot) noexcept nogil:
    if p.link != NULL and p.link.release != NULL:
        p.link.release(p.link.ctx, slot)


cdef bint slot_to_heap(bufpool *p, rxseg *s) noexcept nogil:
    """Move a queued segment's payload out of its slot; its place in the queue stays."""
    cdef int cls = class_of(s.len_bytes)
    cdef uint8_t *b = block_get(p, cls, s.len_bytes)
    if b == NULL:
        return False
    copy_taking(b, s.data, s.len_bytes)
    p.copied_bytes += s.len_bytes
    s.block = b
    s.block_class = <uint8_t>cls
    s.data = b
    s.cap_bytes = 0
    s.origin = RXSEG_HEAP
    held_remove(p, s)
    slot_release(p, s.slot)
    s.slot = UL_SLOT_NONE
    return True


cdef void bufpool_relieve(bufpool *p) noexcept nogil:
    """Clear the quarter of the ring that is written next."""
    cdef rxseg *s = p.held_head
    cdef rxseg *following
    cdef uint32_t slots, ahead
    if s == NULL or p.link == NULL or p.link.slots == 0 or p.last_slot >= p.link.slots:
        return
    slots = p.link.slots
    while s != NULL:
        following = s.held_next
        ahead = (s.slot + slots - p.last_slot) % slots
        # 0: the newest frame itself is the oldest held one, a whole turn away
        if ahead == 0 or ahead >= slots // 4:
            return
        if not s.lent:
            if not slot_to_heap(p, s):
                return
        elif p.link.features & UL_LINK_EVACUATE and p.link.evacuate != NULL and \
                p.link.evacuate(p.link.ctx, s.slot) == 0:
            held_remove(p, s)
            s.origin = RXSEG_EVACUATED
            p.evacuated += 1
        # else: it stays where it is, the link must wait for it or drop
        s = following


cdef void bufpool_evacuate(bufpool *p) noexcept nogil:
    cdef rxseg *s = p.held_head
    cdef rxseg *following
    if p.link == NULL or not p.link.features & UL_LINK_EVACUATE or p.link.evacuate == NULL:
        return                       # frames lie in the process's own memory
    while s != NULL:
        following = s.held_next
        if not s.lent:
            slot_to_heap(p, s)
        elif p.link.evacuate(p.link.ctx, s.slot) == 0:
            held_remove(p, s)
            s.origin = RXSEG_EVACUATED
            p.evacuated += 1
        s = following


# ---- received segments ----

cdef inline void copy_in(bufpool *p, uint8_t *to, const uint8_t *data, uint32_t n, const ul_rx *frame) noexcept nogil:
    if frame != NULL and frame.flags & UL_FRAME_IN_RING:
        copy_taking(to, data, n)
    else:
        memcpy(to, data, n)
    p.copied_bytes += n


cdef rxseg *rxseg_new(bufpool *p, const uint8_t *data, uint32_t n, uint32_t seq, const ul_rx *frame,
                      uint32_t room_bytes, bint *held) noexcept nogil:
    cdef rxseg *s = <rxseg *>block_get(p, 0, SMALL_BYTES)
    cdef uint32_t want
    cdef int cls
    held[0] = False
    if s == NULL:
        return NULL
    memset(s, 0, sizeof(rxseg))
    s.len_bytes = n
    s.seq = seq
    s.slot = UL_SLOT_NONE
    s.block_class = BUF_CLASS_NONE
    s.mem_bytes = HEADER_BYTES + SMALL_BYTES
    if frame != NULL and frame.slot != UL_SLOT_NONE:
        p.last_slot = frame.slot
    if held_is_worth_it(p, frame, n):
        s.origin = RXSEG_SLOT
        s.slot = frame.slot
        s.data = <uint8_t *>data     # const in the link's contract: nobody writes through it
        s.mem_bytes += frame.len_bytes
        held_add(p, s)
        held[0] = True
        return s
    s.origin = RXSEG_HEAP
    want = n if n >= room_bytes else room_bytes
    if want <= SMALL_BYTES:
        s.data = <uint8_t *>s + HEADER_BYTES
        s.cap_bytes = SMALL_BYTES - n
    else:
        cls = class_of(want)
        s.block = block_get(p, cls, want)
        if s.block == NULL:
            block_put(p, 0, s)
            return NULL
        s.block_class = <uint8_t>cls
        s.data = s.block
        if cls < BUF_CLASSES:
            want = class_room(cls)
        s.cap_bytes = want - n
        s.mem_bytes += HEADER_BYTES + want
    if n and data != NULL:
        copy_in(p, s.data, data, n, frame)
    return s


cdef rxseg *rxseg_lend(bufpool *p, const uint8_t *data, uint32_t n) noexcept nogil:
    cdef bint held
    cdef rxseg *s = rxseg_new(p, data, n, 0, NULL, n, &held)
    if s != NULL:
        s.lent = 1
        p.lent += 1
    return s


cdef void rxseg_free(bufpool *p, rxseg *s) noexcept nogil:
    if s.lent:
        p.lent -= 1
    if s.origin == RXSEG_SLOT:
        held_remove(p, s)
        slot_release(p, s.slot)
    elif s.origin == RXSEG_EVACUATED:
        slot_release(p, s.slot)
    if s.block != NULL:
        block_put(p, s.block_class, s.block)
    block_put(p, 0, s)


cdef void rxq_push(rxqueue *q, rxseg *s) noexcept nogil:
    s.next = NULL
    if q.tail != NULL:
        q.tail.next = s
    else:
        q.head = s
    q.tail = s
    q.len_bytes += s.len_bytes
    q.mem_bytes += s.mem_bytes
    q.count += 1


cdef inline rxseg *rxq_pop(rxqueue *q) noexcept nogil:
    cdef rxseg *s = q.head
    q.head = s.next
    if q.head == NULL:
        q.tail = NULL
    q.len_bytes -= s.len_bytes
    q.mem_bytes -= s.mem_bytes
    q.count -= 1
    s.next = NULL
    return s


cdef int rxq_append(bufpool *p, rxqueue *q, const uint8_t *data, uint32_t n, uint32_t seq,
                    const ul_rx *frame, bint stream, bint *held) noexcept nogil:
    cdef rxseg *t = q.tail
    cdef rxseg *s
    cdef uint32_t part = 0, room = 0
    held[0] = False
    if stream and not held_is_worth_it(p, frame, n):
        if frame != NULL and frame.slot != UL_SLOT_NONE:
            p.last_slot = frame.slot
        if t != NULL and t.origin == RXSEG_HEAP and t.cap_bytes:
            part = n if n <= t.cap_bytes else t.cap_bytes
        # A busy queue gets blocks with room for what follows; a quiet one the smallest that fits.
        if n > part:
            if q.len_bytes >= QUEUE_IS_BUSY_BYTES:
                room = BULK_BYTES
            elif q.len_bytes or n > SMALL_BYTES:
                room = FRAME_BYTES
            s = rxseg_new(p, NULL, n - part, seq + part, NULL, room, held)
            if s == NULL:
                return -ENOMEM       # nothing was taken
            copy_in(p, s.data, data + part, n - part, frame)
        else:
            s = NULL
        if part:
            copy_in(p, t.data + t.len_bytes, data, part, frame)
            t.len_bytes += part
            t.cap_bytes -= part
            q.len_bytes += part
        if s != NULL:
            rxq_push(q, s)
        return 0
    s = rxseg_new(p, data, n, seq, frame, 0, held)
    if s == NULL:
        return -ENOMEM
    rxq_push(q, s)
    return 0


cdef size_t rxq_read(bufpool *p, rxqueue *q, uint8_t *out, size_t n, bint peek) noexcept nogil:
    cdef rxseg *s = q.head
    cdef size_t done = 0, part
    while s != NULL and done < n:
        part = s.len_bytes if s.len_bytes <= n - done else n - done
        if s.origin == RXSEG_SLOT:
            copy_taking(out + done, s.data, part)
        else:
            memcpy(out + done, s.data, part)
        done += part
        if peek:
            s = s.next
            continue
        if part == s.len_bytes:
            rxseg_free(p, rxq_pop(q))
        else:
            s.data += part
            s.len_bytes -= <uint32_t>part
            s.seq += <uint32_t>part
            q.len_bytes -= part
        s = q.head
    return done


cdef void rxq_drop(bufpool *p, rxqueue *q, size_t n) noexcept nogil:
    cdef rxseg *s
    while n:
        s = q.head
        if n >= s.len_bytes:
            n -= s.len_bytes
            rxseg_free(p, rxq_pop(q))
        else:
            s.data += n
            s.len_bytes -= <uint32_t>n
            s.seq += <uint32_t>n
            q.len_bytes -= n
            return


cdef rxseg *rxq_take(bufpool *p, rxqueue *q, size_t max_bytes) noexcept nogil:
    cdef rxseg *s = q.head
    cdef rxseg *rest
    cdef uint32_t n
    cdef bint held
    if s == NULL:
        return NULL
    if s.len_bytes <= max_bytes:
        rxq_pop(q)
    else:
        # Copy the smaller part: a short front comes out as a copy, else the rest stays as one.
        n = <uint32_t>max_bytes
        if n <= s.len_bytes // 2:
            rest = s
            s = rxseg_new(p, rest.data, n, rest.seq, NULL, 0, &held)
            if s == NULL:
                return NULL
            s.rport = rest.rport
            s.raddr = rest.raddr
            rest.data += n
            rest.len_bytes -= n
            rest.seq += n
            q.len_bytes -= n
        else:
            rest = rxseg_new(p, s.data + n, s.len_bytes - n, s.seq + n, NULL, 0, &held)
            if rest == NULL:
                return NULL
            rest.rport = s.rport
            rest.raddr = s.raddr
            rxq_pop(q)
            s.len_bytes = n
            s.cap_bytes = 0
            rest.next = q.head       # back at the front
            q.head = rest
            if q.tail == NULL:
                q.tail = rest
            q.len_bytes += rest.len_bytes
            q.mem_bytes += rest.mem_bytes
            q.count += 1
    if s.origin == RXSEG_SLOT:
        take_lines(s.data, s.len_bytes)
    s.lent = 1
    p.lent += 1
    return s


cdef void rxq_clear(bufpool *p, rxqueue *q) noexcept nogil:
    while q.head != NULL:
        rxseg_free(p, rxq_pop(q))


# ---- bytes to send ----

cdef inline void txq_push(txqueue *q, txchunk *c) noexcept nogil:
    c.next = NULL
    if q.tail != NULL:
        q.tail.next = c
    else:
        q.head = c
        q.head_off = 0
        q.cur = NULL
    q.tail = c


cdef void chunk_drop(bufpool *p, txchunk *c) noexcept nogil:
    if c.seg != NULL:
        rxseg_free(p, c.seg)
    if c.owner != NULL:
        c.next = p.dead              # decref needs the GIL: bufpool_reap
        p.dead = c
    else:
        block_put(p, c.block_class, c)


cdef int txq_append_copy(bufpool *p, txqueue *q, const uint8_t *data, size_t n) noexcept nogil:
    cdef txchunk *t = q.tail
    cdef txchunk *c
    cdef txchunk *first = NULL
    cdef txchunk *last = NULL
    cdef size_t part = 0, left, size
    cdef uint64_t queued = q.len_bytes
    cdef int cls
    if t != NULL and t.len_bytes < t.cap_bytes:
        part = t.cap_bytes - t.len_bytes
        if part > n:
            part = n
    left = n - part
    # All blocks first, so that -ENOMEM leaves the queue as it was.
    while left:
        size = left
        if queued >= QUEUE_IS_BUSY_BYTES and size < BULK_BYTES:
            size = BULK_BYTES
        elif queued and size < FRAME_BYTES:
            size = FRAME_BYTES
        if size > SUPER_BYTES:
            size = SUPER_BYTES
        cls = class_of(<uint32_t>size)
        c = <txchunk *>block_get(p, cls, <uint32_t>size)
        if c == NULL:
            while first != NULL:
                c = first.next
                block_put(p, first.block_class, first)
                first = c
            return -ENOMEM
        c.next = NULL
        c.owner = NULL
        c.seg = NULL
        c.block_class = <uint8_t>cls
        c.cap_bytes = class_room(cls)
        c.data = <uint8_t *>c + HEADER_BYTES
        size = c.cap_bytes if left > c.cap_bytes else left
        c.len_bytes = <uint32_t>size
        memcpy(<uint8_t *>c + HEADER_BYTES, data + (n - left), size)
        left -= size
        queued += size
        if last != NULL:
            last.next = c
        else:
            first = c
        last = c
    if part:
        memcpy(<uint8_t *>t.data + t.len_bytes, data, part)
        t.len_bytes += <uint32_t>part
    while first != NULL:
        c = first.next
        txq_push(q, first)
        first = c
    q.len_bytes += n
    return 0


cdef int txq_append_hold(bufpool *p, txqueue *q, const uint8_t *data, size_t n, object owner):
    cdef txchunk *c
    cdef size_t part
    while n:
        c = <txchunk *>block_get(p, 0, SMALL_BYTES)
        if c == NULL:
            return -ENOMEM           # n is below 4 GiB for every caller: only the first chunk can fail
        part = n if n <= 0x40000000 else 0x40000000
        c.owner = <void *>owner
        c.seg = NULL
        Py_INCREF(owner)
        c.block_class = 0
        c.cap_bytes = 0
        c.data = data
        c.len_bytes = <uint32_t>part
        txq_push(q, c)
        q.len_bytes += part
        data += part
        n -= part
    return 0


cdef txchunk *txchunk_new(bufpool *p) noexcept nogil:
    cdef int cls = class_of(SUPER_BYTES)
    cdef txchunk *c = <txchunk *>block_get(p, cls, SUPER_BYTES)
    if c != NULL:
        memset(c, 0, sizeof(txchunk))
        c.block_class = <uint8_t>cls
        c.cap_bytes = class_room(cls)
        c.data = <uint8_t *>c + HEADER_BYTES
    return c


cdef void txq_append_chunk(txqueue *q, txchunk *c) noexcept nogil:
    txq_push(q, c)
    q.len_bytes += c.len_bytes


cdef void txchunk_free(bufpool *p, txchunk *c) noexcept nogil:
    block_put(p, c.block_class, c)


cdef int txq_append_seg(bufpool *p, txqueue *q, rxseg *s, uint32_t n) noexcept nogil:
    cdef txchunk *c = <txchunk *>block_get(p, 0, SMALL_BYTES)
    if c == NULL:
        return -ENOMEM
    c.owner = NULL
    c.seg = s
    c.block_class = 0
    c.cap_bytes = 0
    c.data = s.data
    c.len_bytes = n
    txq_push(q, c)
    q.len_bytes += n
    return 0


cdef void txq_drop(bufpool *p, txqueue *q, uint64_t n) noexcept nogil:
    cdef txchunk *c
    cdef uint64_t left
    if n > q.len_bytes:
        n = q.len_bytes
    q.len_bytes -= n
    while n:
        c = q.head
        left = c.len_bytes - q.head_off
        if n < left:
            q.head_off += <uint32_t>n
            return
        n -= left
        q.head = c.next
        q.head_off = 0
        if q.cur == c:
            q.cur = NULL
        else:
            q.cur_at -= c.len_bytes
        if q.head == NULL:
            q.tail = NULL
        chunk_drop(p, c)


cdef inline txchunk *txq_seek(txqueue *q, uint64_t at) noexcept nogil:
    """The chunk that holds byte `at`, counted from the first byte of head; moves the cursor there."""
    if q.cur == NULL or q.cur_at > at:
        q.cur = q.head
        q.cur_at = 0
    while q.cur != NULL and at - q.cur_at >= q.cur.len_bytes:
        if q.cur.next == NULL:
            return NULL              # the cursor stays on the tail
        q.cur_at += q.cur.len_bytes
        q.cur = q.cur.next
    return q.cur


cdef int txq_iov(txqueue *q, uint64_t off, uint32_t n, iovec *iov, int max_iov, uint32_t *filled_bytes) noexcept nogil:
    cdef uint64_t at = off + q.head_off
    cdef txchunk *c
    cdef uint32_t skip, part, done = 0
    cdef int used = 0
    filled_bytes[0] = 0
    c = txq_seek(q, at)
    if c == NULL:
        return 0
    skip = <uint32_t>(at - q.cur_at)
    while c != NULL and done < n and used < max_iov:
        part = c.len_bytes - skip
        if part > n - done:
            part = n - done
        iov[used].iov_base = <void *>(c.data + skip)
        iov[used].iov_len = part
        used += 1
        done += part
        skip = 0
        c = c.next
    filled_bytes[0] = done
    return used


cdef void txq_copy_out(txqueue *q, uint64_t off, uint64_t n, uint8_t *out) noexcept nogil:
    cdef uint64_t at = off + q.head_off
    cdef txchunk *c = txq_seek(q, at)
    cdef uint64_t skip, part
    if c == NULL:
        return
    skip = at - q.cur_at
    while c != NULL and n:
        part = c.len_bytes - skip
        if part > n:
            part = n
        memcpy(out, c.data + skip, part)
        out += part
        n -= part
        skip = 0
        c = c.next


cdef void txq_clear(bufpool *p, txqueue *q) noexcept nogil:
    cdef txchunk *c
    while q.head != NULL:
        c = q.head
        q.head = c.next
        chunk_drop(p, c)
    memset(q, 0, sizeof(txqueue))


if sizeof(rxseg) > HEADER_BYTES or sizeof(txchunk) > HEADER_BYTES:
    raise ImportError("ulnet.stack.buf: HEADER_BYTES is too small for this compiler's struct layout")
