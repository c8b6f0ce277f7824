"""A packet socket as a link: receive from the ring the kernel fills, send with one call.

Call order: the server makes and confines the socket (channel.py, demux.py), hands its descriptor over,
``PacketLink`` maps the ring. Read first: Documentation/networking/packet_mmap.rst, linux/virtio_net.h.

There are two rings, for the kernel fills all slots of one in turn, whatever lies in them. Small frames may come
in crowds: many slots, and what is in them is copied out at once. Large ones are worth lending, and each costs the
sender a copy into memory that nobody's cache holds, unless the ring is short. Between the rings the time stamps tell
which frame came first.

The ring of large frames is mapped twice. Status words are used through one mapping, frames are lent through the
other, so that a lent slot can be replaced by a private copy at the same address (``evacuate``) while the kernel goes
on with the slot itself.
"""

import errno as _errno
import os

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EBADF, EINVAL, ENOMEM, EAGAIN, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_OK, UL_FRAME_CSUM_PARTIAL, UL_FRAME_GSO_TCP4, UL_FRAME_GSO_UDP, UL_FRAME_IN_RING,
    UL_FRAME_NO_TOKEN, UL_FRAME_UFO,
    UL_LINK_CSUM, UL_LINK_EVACUATE, UL_LINK_TSO, UL_LINK_UFO, UL_LINK_USO, UL_SLOT_NONE, iovec, ul_rx, ul_tx,
)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    struct sockaddr:
        pass
    ssize_t sendto(int fd, const void *data, size_t length, int flags, const sockaddr *to, unsigned int to_bytes)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int getsockopt(int fd, int level, int name, void *value, unsigned int *length)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SOL_PACKET
        AF_PACKET

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

cdef extern from "<unistd.h>" nogil:
    int c_close "close" (int fd)

cdef extern from "<linux/if_packet.h>" nogil:
    struct tpacket2_hdr:
        uint32_t tp_status
        uint32_t tp_len
        uint32_t tp_snaplen
        uint16_t tp_mac
        uint32_t tp_sec
        uint32_t tp_nsec
    struct tpacket_stats:
        unsigned int tp_packets
        unsigned int tp_drops
    enum:
        TP_STATUS_KERNEL
        TP_STATUS_USER
        TP_STATUS_CSUMNOTREADY
        TP_STATUS_CSUM_VALID
        PACKET_STATISTICS

cdef extern from "<linux/virtio_net.h>" nogil:
    struct virtio_net_hdr:
        uint8_t flags
        uint8_t gso_type
        uint16_t hdr_len
        uint16_t gso_size
        uint16_t csum_start
        uint16_t csum_offset
    enum:
        VIRTIO_NET_HDR_F_NEEDS_CSUM
        VIRTIO_NET_HDR_F_DATA_VALID
        VIRTIO_NET_HDR_GSO_TCPV4
        VIRTIO_NET_HDR_GSO_UDP
        VIRTIO_NET_HDR_GSO_ECN

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
    VIRTIO_NET_HDR_GSO_UDP_L4 = 5   # Linux 6.2; older headers do not name it
    VNET_BYTES = 10             # sizeof(struct virtio_net_hdr), what PACKET_VNET_HDR puts before a frame
    ETH_BYTES = 14
    PIECES_MAX = 18
    JOIN_BYTES = 2048   # frames up to this are put together here: the kernel takes one piece faster than several
    IPC_BUFFER_BYTES = 65536 + 64
    FEATURES = UL_LINK_CSUM | UL_LINK_TSO | UL_LINK_USO | UL_LINK_UFO


# ---- receive: rings ----

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


cdef inline void fill_rx(ul_rx *f, const virtio_net_hdr *vnet) noexcept nogil:
    cdef uint8_t gso = vnet.gso_type & ~VIRTIO_NET_HDR_GSO_ECN
    f.flags = 0
    f.gso_size_bytes = 0
    if vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        f.flags |= UL_FRAME_CSUM_PARTIAL
    elif vnet.flags & VIRTIO_NET_HDR_F_DATA_VALID:
        f.flags |= UL_FRAME_CSUM_OK
    if gso == VIRTIO_NET_HDR_GSO_TCPV4:
        f.flags |= UL_FRAME_GSO_TCP4
        f.gso_size_bytes = vnet.gso_size
    elif gso == VIRTIO_NET_HDR_GSO_UDP_L4:
        f.flags |= UL_FRAME_GSO_UDP
        f.gso_size_bytes = vnet.gso_size


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


# ---- receive: one call a packet ----

cdef int ipc_recv(void *ctx, ul_rx *f) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef virtio_net_hdr vnet
    cdef iovec iov[2]
    cdef msghdr message
    cdef ssize_t got
    if c.small.fd < 0:
        return 0
    memset(&message, 0, sizeof(message))
    iov[0].iov_base = &vnet
    iov[0].iov_len = VNET_BYTES
    iov[1].iov_base = c.buf
    iov[1].iov_len = c.buf_bytes
    message.msg_iov = iov
    message.msg_iovlen = 2
    while True:
        c.syscalls += 1
        got = recvmsg(c.small.fd, &message, MSG_DONTWAIT | MSG_TRUNC)
        if got < 0:
            if errno != EAGAIN:
                c.rx_errors += 1
            return 0
        got -= VNET_BYTES
        if got < ETH_BYTES or <size_t>got > c.buf_bytes:
            c.rx_truncated += 1
            continue
        fill_rx(f, &vnet)
        f.data = c.buf
        f.len_bytes = <uint32_t>got
        f.slot = UL_SLOT_NONE
        c.rx_frames += 1
        c.rx_bytes += f.len_bytes
        return 1


cdef void ipc_release(void *ctx, uint32_t slot) noexcept nogil:
    if slot != UL_SLOT_NONE:
        (<pk_ctx *>ctx).bad_release += 1


# ---- send ----

cdef int pk_send(void *ctx, const ul_tx *t) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef virtio_net_hdr vnet
    cdef uint8_t joined[JOIN_BYTES + 16]
    cdef iovec iov[PIECES_MAX + 1]
    cdef msghdr message
    cdef sockaddr_ll *to
    cdef const uint8_t *eth
    cdef size_t at
    cdef ssize_t sent
    cdef int i, code
    if c.small.fd < 0:
        return -EBADF
    if t.iov_count < 1 or t.iov_count > PIECES_MAX or t.iov[0].iov_len < ETH_BYTES:
        c.tx_errno[EINVAL] += 1
        return -EINVAL
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM if t.flags & UL_FRAME_CSUM_PARTIAL else 0
    vnet.gso_type = 0
    if t.flags & UL_FRAME_GSO_TCP4:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
    elif t.flags & UL_FRAME_GSO_UDP:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
    elif t.flags & UL_FRAME_UFO:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP
    vnet.hdr_len = t.hdr_len_bytes
    vnet.gso_size = t.gso_size_bytes if vnet.gso_type else 0
    vnet.csum_start = t.csum_start if vnet.flags else 0
    vnet.csum_offset = t.csum_offset if vnet.flags else 0
    eth = <const uint8_t *>t.iov[0].iov_base
    # An all-zero destination means this very host (link.pxd).
    to = &c.to_device if eth[0] | eth[1] | eth[2] | eth[3] | eth[4] | eth[5] else &c.to_loopback
    memcpy(&to.sll_protocol, eth + 12, 2)
    c.syscalls += 1
    if t.len_bytes <= JOIN_BYTES:
        memcpy(joined, &vnet, VNET_BYTES)
        at = VNET_BYTES
        for i in range(t.iov_count):
            if at + t.iov[i].iov_len > sizeof(joined):
                c.tx_errno[EINVAL] += 1
                return -EINVAL              # len_bytes is not the sum of the pieces
            memcpy(joined + at, t.iov[i].iov_base, t.iov[i].iov_len)
            at += t.iov[i].iov_len
        sent = sendto(c.small.fd, joined, at, MSG_DONTWAIT | MSG_NOSIGNAL, <const sockaddr *>to, sizeof(sockaddr_ll))
    else:
        iov[0].iov_base = &vnet
        iov[0].iov_len = VNET_BYTES
        memcpy(&iov[1], t.iov, t.iov_count * sizeof(iovec))
        message.msg_name = to
        message.msg_namelen = sizeof(sockaddr_ll)
        message.msg_iov = iov
        message.msg_iovlen = t.iov_count + 1
        message.msg_control = NULL
        message.msg_controllen = 0
        message.msg_flags = 0
        sent = sendmsg(c.small.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        code = errno
        c.tx_errno[code if 0 < code < PK_ERRNO_MAX else 0] += 1
        return -code
    c.tx_frames += 1
    c.tx_bytes += t.len_bytes
    return 0


# ---- Python face ----

cdef void count_drops(pk_ctx *c, int fd) noexcept nogil:
    cdef tpacket_stats stats
    cdef unsigned int length = sizeof(stats)
    # Reading resets the kernel's counters.
    if fd >= 0 and getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &stats, &length) == 0:
        c.rx_drops += stats.tp_drops
        c.syscalls += 1


cdef void close_sockets(pk_ctx *c) noexcept nogil:
    if c.small.fd >= 0:
        c_close(c.small.fd)
    if c.large.fd >= 0:
        c_close(c.large.fd)
    c.small.fd = c.large.fd = -1


cdef class PacketLink(Link):
    """A channel's packet sockets, made elsewhere, as a link. Takes the descriptors over, also when it raises.

    ``fds`` come from ``Demux.open_channel`` or ``open_embedded``: SOCK_RAW, all devices, PACKET_VNET_HDR. For
    ``ipf`` and ``shm`` they are two, of small frames and of large ones, each with a TPACKET_V2 ring; ``small`` and
    ``large`` are the rings' slots and bytes a slot, ``small_bytes`` the largest frame that comes to the first.
    ``interface``: ``ipf`` (rings, polled), ``shm`` (rings, the engine sleeps between frames), ``ipc`` (one
    descriptor, one receive call a packet). ``features`` masks the LINK_* bits on offer.

    Raises ValueError for an impossible argument, OSError when a ring cannot be mapped.
    """

    def __cinit__(self, *args, **kwargs):
        self.c.small.fd = self.c.large.fd = -1

    def __init__(self, fds, *, int ifindex, int loopback_ifindex, bytes mac, int mtu, str interface="ipf",
                 small=(0, 0), large=(0, 0), unsigned int small_bytes=0, features=None):
        cdef pk_ctx *c = &self.c
        cdef int code
        if c.small.fd >= 0:
            raise ValueError("this link is open already: make a new one")
        memset(c, 0, sizeof(pk_ctx))
        c.small.fd = c.large.fd = -1
        c.small.pending = c.large.pending = c.soft = c.barrier = UL_SLOT_NONE
        try:
            if interface not in ("ipf", "shm", "ipc"):
                raise ValueError(f"packet interface {interface!r}: it must be one of 'ipf', 'shm', 'ipc'")
            wanted = 1 if interface == "ipc" else 2
            if len(fds) != wanted:
                raise ValueError(f"interface {interface!r} needs {wanted} descriptors, not {len(fds)}")
            if len(mac) != 6:
                raise ValueError(f"a MAC address has 6 bytes, not {len(mac)}")
            if interface == "ipc" and (small[0] or large[0]):
                raise ValueError("interface 'ipc' uses no ring: the channel must be opened for 'ipc'")
            c.small.fd = fds[0]
            if interface == "ipc":
                c.buf_bytes = IPC_BUFFER_BYTES
                c.buf = <uint8_t *>calloc(1, c.buf_bytes)
                if c.buf == NULL:
                    raise MemoryError()
            else:
                c.large.fd = fds[1]
                page = os.sysconf("SC_PAGESIZE")
                for slots, slot_bytes, unit in ((*small, 64), (*large, page)):
                    if slots < 4 or slot_bytes == 0 or slot_bytes % unit or slots * slot_bytes % page:
                        raise ValueError(f"interface {interface!r} needs rings of at least 4 slots, large ones of "
                                         f"whole pages, not {slots} of {slot_bytes} bytes")
                c.small.slots, c.small.slot_bytes = small
                c.large.slots, c.large.slot_bytes = large
                c.state = <uint8_t *>calloc(c.large.slots, 1)
                c.spare_used = <uint8_t *>calloc(c.large.slots, 1)
                if c.state == NULL or c.spare_used == NULL:
                    raise MemoryError()
                code = map_ring(c, &c.small, &c.small.base)
                if code == 0:
                    code = map_ring(c, &c.large, &c.large.base)
                if code == 0:
                    code = map_ring(c, &c.large, &c.lend)
                if code < 0:
                    raise OSError(-code, f"cannot map packet rings of {small[0]} slots of {small[1]} bytes and "
                                         f"{large[0]} of {large[1]}: {os.strerror(-code)}")
        except BaseException:
            for fd in fds:
                if fd != c.small.fd and fd != c.large.fd:
                    c_close(fd)
            self._shut()
            raise
        c.to_device.sll_family = c.to_loopback.sll_family = AF_PACKET
        c.to_device.sll_halen = c.to_loopback.sll_halen = 6
        c.to_device.sll_ifindex = ifindex
        c.to_loopback.sll_ifindex = loopback_ifindex
        self.interface = interface
        self.ops.ctx = c
        self.ops.send = pk_send
        if interface == "ipc":
            self.ops.recv = ipc_recv
            self.ops.release = ipc_release
            self.ops.evacuate = NULL
            self.ops.features = FEATURES
        else:
            self.ops.recv = ring_recv
            self.ops.release = ring_release
            self.ops.evacuate = ring_evacuate
            self.ops.features = FEATURES | UL_LINK_EVACUATE
        if features is not None:
            self.ops.features &= <uint32_t>features
        self.ops.deferred_ns = NULL
        self.ops.fd = c.small.fd
        self.ops.large_fd = c.large.fd
        self.ops.slots = c.large.slots
        self.ops.small_slots = c.small.slots
        self.ops.small_bytes = small_bytes
        self.ops.mtu_bytes = mtu
        memcpy(self.ops.mac, <const char *>mac, 6)

    def __dealloc__(self):
        self._shut()

    @property
    def slots(self) -> int:
        """Slots of the ring of large frames; 0 for ``ipc``."""
        return self.c.large.slots

    def hold_frame(self):
        """The next frame as (slot, memoryview onto the ring), or None. ``release`` it; a small one has no slot, and
        is there until the next is asked for.

        For tests and tools. The view must not be used after the release or after ``close``.
        """
        cdef ul_rx rx
        if self.c.large.base == NULL:
            raise ValueError("interface 'ipc' lends no frames")
        if not ring_recv(&self.c, &rx):
            return None
        return (None if rx.slot == UL_SLOT_NONE else rx.slot), PyMemoryView_FromMemory(<char *>rx.data, rx.len_bytes, PyBUF_READ)

    def release(self, uint32_t slot) -> None:
        """Give a held slot back."""
        self.ops.release(&self.c, slot)

    def evacuate(self, uint32_t slot) -> None:
        """Give the slot to the kernel, keep its frame readable at the same address. Raises OSError."""
        cdef int code = ring_evacuate(&self.c, slot) if self.c.large.base != NULL else -EINVAL
        if code < 0:
            raise OSError(-code, f"cannot evacuate slot {slot}: {os.strerror(-code)}")

    def counters(self) -> dict[str, int]:
        """Frames, bytes, system calls and everything dropped, since the link was made.

        ``rx_drops``: no free slot; ``rx_copied``: frames without a token, because a copy of an earlier one
        is still held; ``tx_E...``: sends refused with that errno (ENOBUFS: by the guard or a full queue).
        """
        cdef pk_ctx *c = &self.c
        count_drops(c, c.small.fd)
        count_drops(c, c.large.fd)
        counted = {
            "rx_frames": c.rx_frames, "rx_bytes": c.rx_bytes, "rx_drops": c.rx_drops,
            "rx_truncated": c.rx_truncated, "rx_copied": c.rx_copied, "rx_errors": c.rx_errors,
            "tx_frames": c.tx_frames, "tx_bytes": c.tx_bytes,
            "tx_errors": 0, "evacuated": c.evacuated, "restored": c.restored,
            "bad_release": c.bad_release, "syscalls": c.syscalls,
        }
        for number in range(PK_ERRNO_MAX):
            if c.tx_errno[number]:
                counted["tx_errors"] += c.tx_errno[number]
                counted["tx_" + _errno.errorcode.get(number, str(number))] = c.tx_errno[number]
        return counted

    def close_fd(self) -> None:
        """In a forked child: let go of the sockets. The rings were not copied; frames evacuated before stay readable."""
        cdef pk_ctx *c = &self.c
        close_sockets(c)
        self.ops.fd = self.ops.large_fd = -1
        c.forked = 1
        c.small.base = c.large.base = c.spare = NULL

    cdef void _shut(self) noexcept:
        cdef pk_ctx *c = &self.c
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
        free(c.buf)
        c.state = c.spare_used = c.buf = NULL
        close_sockets(c)
        self.ops.fd = self.ops.large_fd = -1

    def close(self) -> None:
        """Unmap the rings and close the descriptors. Frames still held become invalid."""
        self.counters()
        self._shut()
