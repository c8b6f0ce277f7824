"""A channel's packet rings: frames taken in the order they came, lent where they lie, and given back.

Call order: ``rings_map``; ``ring_recv`` until it answers 0, ``ring_release`` or ``ring_evacuate`` for what it lent;
``rings_unmap``. Read first: Documentation/networking/packet_mmap.rst.

There are two rings, for the kernel fills all slots of one in turn, whatever lies in them. Small frames may come
in crowds: many slots, and what is in them is copied out at once. Large ones are worth lending, and each costs the
sender a copy into memory that nobody's cache holds, unless the ring is short. Between the rings the time stamps tell
which frame came first.

The ring of large frames is mapped twice. Status words are used through one mapping, frames are lent through the
other, so that a lent slot can be replaced by a private copy at the same address (``ring_evacuate``) while the kernel
goes on with the slot itself.
"""

from libc.errno cimport EINVAL, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_OK, UL_FRAME_CSUM_PARTIAL, UL_FRAME_IN_RING, UL_FRAME_NO_TOKEN, UL_SLOT_NONE, ul_rx,
)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *at, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *at, size_t length)
    int madvise(void *at, size_t length, int advice)
    void *mremap(void *at, size_t old_length, size_t new_length, int flags, void *to)
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MREMAP_MAYMOVE
        MREMAP_FIXED
        MADV_DONTFORK
    void *MAP_FAILED

cdef extern from "<linux/if_packet.h>" nogil:
    struct tpacket2_hdr:
        uint32_t tp_status
        uint32_t tp_len
        uint32_t tp_snaplen
        uint16_t tp_mac
        uint32_t tp_sec
        uint32_t tp_nsec
    enum:
        TP_STATUS_KERNEL
        TP_STATUS_USER
        TP_STATUS_CSUMNOTREADY
        TP_STATUS_CSUM_VALID

# The kernel writes the status word last and reads it first; so do we, from the other side.
cdef extern from *:
    """
    static inline unsigned pk_load(const unsigned *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void pk_store(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void pk_give(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int pk_swap(unsigned *p, unsigned from, unsigned to)
    { return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
    """
    unsigned pk_load(const unsigned *p) noexcept nogil
    void pk_store(unsigned *p, unsigned v) noexcept nogil
    void pk_give(unsigned *p, unsigned v) noexcept nogil       # reads of the frame come before; nothing waits for it
    bint pk_swap(unsigned *p, unsigned old, unsigned new) noexcept nogil

cdef enum:
    # pk_ctx.state[slot]
    PK_FREE = 0         # the kernel's, or filled and not yet seen
    PK_HELD = 1         # lent; the kernel waits for it
    PK_EVACUATED = 2    # lent as a private copy; the slot itself is the kernel's again
    PK_STALE = 3        # the copy is back, but still lies in `lend`: restore before lending
    PK_BARRIER = 0x08000000     # status word of a slot that only stops the kernel; a bit Linux does not use


# ---- slots ----

cdef inline tpacket2_hdr *slot_hdr(pk_ring *r, uint32_t slot) noexcept nogil:
    return <tpacket2_hdr *>(r.base + slot * r.slot_bytes)


cdef inline bint is_full(pk_ring *r) noexcept nogil:
    return pk_load(&slot_hdr(r, r.head).tp_status) & TP_STATUS_USER


cdef inline void go_on(pk_ring *r) noexcept nogil:
    r.head = r.head + 1 if r.head + 1 < r.slots else 0


cdef inline bint is_sound(const pk_ring *r, const tpacket2_hdr *hdr) noexcept nogil:
    return (hdr.tp_snaplen >= hdr.tp_len and hdr.tp_len >= ETH_BYTES and hdr.tp_mac >= VNET_BYTES
            and hdr.tp_mac + <size_t>hdr.tp_snaplen <= r.slot_bytes)


cdef inline bint is_older(const tpacket2_hdr *a, const tpacket2_hdr *b) noexcept nogil:
    return a.tp_sec < b.tp_sec or (a.tp_sec == b.tp_sec and a.tp_nsec < b.tp_nsec)


cdef inline void to_kernel(pk_ctx *c, uint32_t slot) noexcept nogil:
    """Give a slot of a large frame back, respecting what it does for the idle state below."""
    if slot == c.soft:
        clear_soft(c)                   # its status word says free already
    elif slot == c.barrier:
        pk_store(&slot_hdr(&c.large, slot).tp_status, PK_BARRIER)
        c.barrier_own = 1
    else:
        # Not the ordered store: that one waits until the line has come back from the processor that fills the ring.
        pk_give(&slot_hdr(&c.large, slot).tp_status, TP_STATUS_KERNEL)


cdef inline void clear_soft(pk_ctx *c) noexcept nogil:
    if c.barrier_own:
        pk_swap(&slot_hdr(&c.large, c.barrier).tp_status, PK_BARRIER, TP_STATUS_KERNEL)
    c.soft = UL_SLOT_NONE
    c.barrier = UL_SLOT_NONE
    c.barrier_own = 0


cdef void soften(pk_ctx *c) noexcept nogil:
    """Let poll() sleep although the newest frame is held.

    packet_poll() says readable while the slot before the kernel's position is not free. So, when there is
    nothing new, the newest slot is shown as free although it is held, and the slot before it is made a
    barrier, so that the kernel cannot come round to it. The next frame undoes both.
    """
    cdef uint32_t newest = (c.large.head if c.large.head else c.large.slots) - 1
    cdef uint32_t before = (newest if newest else c.large.slots) - 1
    cdef uint32_t after = c.large.head + 1 if c.large.head + 1 < c.large.slots else 0
    if c.state[before] != PK_HELD:
        if not pk_swap(&slot_hdr(&c.large, before).tp_status, TP_STATUS_KERNEL, PK_BARRIER):
            return                      # the kernel has come round: there are frames to read
        c.barrier_own = 1
    # Only after the barrier stands: had the kernel passed it before, it would have filled these two.
    # (Two, because one processor may be copying into the first while others go on.)
    if (c.state[c.large.head] != PK_HELD and pk_load(&slot_hdr(&c.large, c.large.head).tp_status) != TP_STATUS_KERNEL) or (
            c.state[after] != PK_HELD and pk_load(&slot_hdr(&c.large, after).tp_status) != TP_STATUS_KERNEL):
        if c.barrier_own:
            pk_swap(&slot_hdr(&c.large, before).tp_status, PK_BARRIER, TP_STATUS_KERNEL)
            c.barrier_own = 0
        return
    c.soft = newest
    c.barrier = before
    pk_store(&slot_hdr(&c.large, newest).tp_status, TP_STATUS_KERNEL)


cdef int map_ring(pk_ctx *c, const pk_ring *r, uint8_t **where) noexcept nogil:
    cdef void *at = mmap(NULL, r.slots * r.slot_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, 0)
    c.syscalls += 1
    if at == MAP_FAILED:
        return -errno
    # A child's copy of the mapping would keep the socket open, and could disturb the ring.
    madvise(at, r.slots * r.slot_bytes, MADV_DONTFORK)
    c.syscalls += 1
    where[0] = <uint8_t *>at
    return 0


cdef void drop_spare(pk_ctx *c) noexcept nogil:
    """Unmap what is left of `spare`. Never its holes: another thread's mapping may lie there by now."""
    cdef uint32_t first = 0, last
    while c.spare != NULL and first < c.large.slots:
        if c.spare_used[first]:
            first += 1
            continue
        last = first
        while last < c.large.slots and not c.spare_used[last]:
            last += 1
        munmap(c.spare + first * c.large.slot_bytes, (last - first) * c.large.slot_bytes)
        c.syscalls += 1
        first = last
    c.spare = NULL
    if c.spare_used != NULL:
        memset(c.spare_used, 0, c.large.slots)


cdef int restore(pk_ctx *c, uint32_t slot) noexcept nogil:
    """Put the ring's own pages back into `lend` where evacuate() had put a copy."""
    cdef int code
    if c.spare == NULL or c.spare_used[slot]:
        drop_spare(c)
        code = map_ring(c, &c.large, &c.spare)
        if code < 0:
            c.spare = NULL
            return code
    c.syscalls += 1
    if mremap(c.spare + slot * c.large.slot_bytes, c.large.slot_bytes, c.large.slot_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
              c.lend + slot * c.large.slot_bytes) == MAP_FAILED:
        return -errno
    c.spare_used[slot] = 1
    c.state[slot] = PK_FREE
    c.restored += 1
    return 0


# ---- receive ----

cdef inline void fill_from(pk_ctx *c, ul_rx *f, const tpacket2_hdr *hdr, const uint8_t *frame) noexcept nogil:
    """What the slot says of a frame; `frame`: where the receiver is to find it."""
    cdef uint32_t status = hdr.tp_status
    fill_rx(f, <const virtio_net_hdr *>(<const uint8_t *>hdr + hdr.tp_mac - VNET_BYTES))
    if status & TP_STATUS_CSUMNOTREADY:
        f.flags = (f.flags | UL_FRAME_CSUM_PARTIAL) & ~UL_FRAME_CSUM_OK
    elif status & TP_STATUS_CSUM_VALID and not f.flags & UL_FRAME_CSUM_PARTIAL:
        f.flags |= UL_FRAME_CSUM_OK
    f.flags |= UL_FRAME_IN_RING
    f.data = frame
    f.len_bytes = hdr.tp_snaplen
    c.rx_frames += 1
    c.rx_bytes += f.len_bytes


cdef bint take_small(pk_ctx *c, ul_rx *f) noexcept nogil:
    """The frame at the small ring's head. False: it is none."""
    cdef pk_ring *r = &c.small
    cdef tpacket2_hdr *hdr = slot_hdr(r, r.head)
    r.pending = r.head
    go_on(r)
    if not is_sound(r, hdr):
        c.rx_truncated += 1
        give_back(c)
        return False
    fill_from(c, f, hdr, <uint8_t *>hdr + hdr.tp_mac)
    f.slot = UL_SLOT_NONE
    return True


cdef bint take_large(pk_ctx *c, ul_rx *f) noexcept nogil:
    cdef pk_ring *r = &c.large
    cdef uint32_t slot = r.head
    cdef tpacket2_hdr *hdr = slot_hdr(r, slot)
    if c.soft != UL_SLOT_NONE:
        pk_store(&slot_hdr(r, c.soft).tp_status, TP_STATUS_USER)
        clear_soft(c)
    go_on(r)
    if not is_sound(r, hdr):
        c.rx_truncated += 1
        to_kernel(c, slot)
        return False
    if c.state[slot] == PK_STALE:
        restore(c, slot)
    if c.state[slot] == PK_FREE:
        c.state[slot] = PK_HELD
        fill_from(c, f, hdr, c.lend + slot * r.slot_bytes + hdr.tp_mac)
        f.slot = slot
    else:
        # The address where this slot is lent still shows an earlier frame: no token for this one.
        r.pending = slot
        c.rx_copied += 1
        fill_from(c, f, hdr, <uint8_t *>hdr + hdr.tp_mac)
        f.flags |= UL_FRAME_NO_TOKEN
        f.slot = UL_SLOT_NONE
    return True


cdef inline void give_back(pk_ctx *c) noexcept nogil:
    if c.small.pending != UL_SLOT_NONE:
        pk_give(&slot_hdr(&c.small, c.small.pending).tp_status, TP_STATUS_KERNEL)
        c.small.pending = UL_SLOT_NONE
    if c.large.pending != UL_SLOT_NONE:
        to_kernel(c, c.large.pending)
        c.large.pending = UL_SLOT_NONE


cdef int ring_recv(void *ctx, ul_rx *f) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef bint small, large
    cdef uint32_t newest
    if c.small.fd < 0:
        return 0
    give_back(c)
    while True:
        small = is_full(&c.small)
        # A held slot still has its old status word: the ring has come round to it.
        large = c.state[c.large.head] != PK_HELD and is_full(&c.large)
        if large and not small:
            small = is_full(&c.small)       # it may have come before the large one, after the first look
        if small and not (large and is_older(slot_hdr(&c.large, c.large.head), slot_hdr(&c.small, c.small.head))):
            if take_small(c, f):
                return 1
        elif large:
            if take_large(c, f):
                return 1
        else:
            newest = (c.large.head if c.large.head else c.large.slots) - 1
            if c.soft == UL_SLOT_NONE and c.state[newest] == PK_HELD:
                soften(c)
            return 0


cdef void ring_release(void *ctx, uint32_t slot) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    if c.large.fd < 0 or slot == UL_SLOT_NONE:
        return
    if slot < c.large.slots and c.state[slot] == PK_HELD:
        c.state[slot] = PK_FREE
        to_kernel(c, slot)
    elif slot < c.large.slots and c.state[slot] == PK_EVACUATED:
        c.state[slot] = PK_STALE
    else:
        c.bad_release += 1


cdef int ring_evacuate(void *ctx, uint32_t slot) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef tpacket2_hdr *hdr
    cdef size_t first
    cdef void *copy
    cdef int code
    if c.large.fd < 0 or slot >= c.large.slots or c.state[slot] != PK_HELD:
        return -EINVAL
    hdr = slot_hdr(&c.large, slot)
    copy = mmap(NULL, c.large.slot_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    c.syscalls += 2
    if copy == MAP_FAILED:
        return -ENOMEM
    first = hdr.tp_mac
    memcpy(<uint8_t *>copy + first, <uint8_t *>hdr + first, hdr.tp_snaplen)
    # One call swaps the pages: whoever reads the frame meanwhile waits for it, and then reads the copy.
    if mremap(copy, c.large.slot_bytes, c.large.slot_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
              c.lend + slot * c.large.slot_bytes) == MAP_FAILED:
        code = -errno
        munmap(copy, c.large.slot_bytes)
        return code
    c.state[slot] = PK_EVACUATED
    c.evacuated += 1
    to_kernel(c, slot)
    return 0


# ---- life ----

cdef int rings_map(pk_ctx *c) noexcept nogil:
    """Map what the descriptors stand for: 0, or -errno, and then ``rings_unmap`` takes back what there is."""
    cdef int code
    c.state = <uint8_t *>calloc(c.large.slots, 1)
    c.spare_used = <uint8_t *>calloc(c.large.slots, 1)
    if c.state == NULL or c.spare_used == NULL:
        return -ENOMEM
    code = map_ring(c, &c.small, &c.small.base)
    if code == 0:
        code = map_ring(c, &c.large, &c.large.base)
    if code == 0:
        code = map_ring(c, &c.large, &c.lend)
    return code


cdef void rings_leave(pk_ctx *c) noexcept nogil:
    """In a forked child, where no ring is mapped: only frames evacuated before are there."""
    c.forked = 1
    c.small.base = c.large.base = c.spare = NULL


cdef void rings_unmap(pk_ctx *c) noexcept nogil:
    cdef uint32_t slot
    if c.forked and c.lend != NULL:
        # Elsewhere in its range other mappings may lie by now.
        for slot in range(c.large.slots):
            if c.state[slot] == PK_EVACUATED or c.state[slot] == PK_STALE:
                munmap(c.lend + slot * c.large.slot_bytes, c.large.slot_bytes)
        c.lend = NULL
    drop_spare(c)
    if c.lend != NULL:
        munmap(c.lend, c.large.slots * c.large.slot_bytes)
    if c.large.base != NULL:
        munmap(c.large.base, c.large.slots * c.large.slot_bytes)
    if c.small.base != NULL:
        munmap(c.small.base, c.small.slots * c.small.slot_bytes)
    c.small.base = c.large.base = c.lend = NULL
    free(c.state)
    free(c.spare_used)
    c.state = c.spare_used = NULL
