# The memory of a channel's packet sockets: rings shared with the kernel, and what was counted.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_OK, UL_FRAME_CSUM_PARTIAL, UL_FRAME_GSO_TCP4, UL_FRAME_GSO_UDP, ul_rx,
)

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

cdef extern from "<linux/if_packet.h>" nogil:
    struct sockaddr_ll:
        unsigned short sll_family
        uint16_t sll_protocol       # big-endian
        int sll_ifindex
        unsigned char sll_halen
        unsigned char sll_addr[8]

cdef enum:
    VIRTIO_NET_HDR_GSO_UDP_L4 = 5   # Linux 6.2; older headers do not name it
    VNET_BYTES = 10                 # sizeof(struct virtio_net_hdr), what PACKET_VNET_HDR puts before a frame
    ETH_BYTES = 14
    SLOT_OVERHEAD = 128             # of a slot: tpacket2_hdr, sockaddr_ll, virtio_net_hdr and their alignment; 92 used
    PK_ERRNO_MAX = 134              # EHWPOISON + 1: every errno Linux returns is below

# A ring as mapped. Slot i lies at slots[i * slot_bytes].
ctypedef struct pk_ring:
    int fd
    uint32_t slots
    size_t slot_bytes
    uint8_t *base                   # status words are read and written here
    uint32_t head                   # slot that the kernel fills next, as far as we know
    uint32_t pending                # slot served without a token; given back at the next recv

# Owner of the memory: this struct, from map to unmap. Slot i of the large ring is seen at the same offset of each
# mapping.
ctypedef struct pk_ctx:
    pk_ring small                   # its descriptor sends, too; without rings (ipc) it is the only one
    pk_ring large
    uint8_t *lend                   # large frames are lent here; evacuate() swaps single slots of it
    uint8_t *spare                  # whole mapping from which swapped slots of `lend` are restored
    uint8_t *spare_used             # slots: 1 where `spare` has a hole
    uint8_t *state                  # slots: PK_FREE, ...
    uint8_t *buf                    # ipc: the one frame buffer
    size_t buf_bytes
    uint32_t soft                   # held slot shown to the kernel as free while we are idle
    uint32_t barrier                # slot that keeps the kernel from reaching `soft`
    uint8_t forked                  # 1: a child's copy; of the mappings only evacuated frames are there
    uint8_t barrier_own             # 1: the barrier slot is held by nobody else
    sockaddr_ll to_device
    sockaddr_ll to_loopback
    uint64_t rx_frames, rx_bytes, rx_truncated, rx_copied, rx_errors, rx_drops
    uint64_t tx_frames, tx_bytes
    uint64_t tx_errno[PK_ERRNO_MAX]
    uint64_t evacuated, restored, bad_release, syscalls

# Of ul_link.
cdef int ring_recv(void *ctx, ul_rx *f) noexcept nogil
cdef void ring_release(void *ctx, uint32_t slot) noexcept nogil
cdef int ring_evacuate(void *ctx, uint32_t slot) noexcept nogil
cdef int rings_map(pk_ctx *c) noexcept nogil
cdef void rings_leave(pk_ctx *c) noexcept nogil
cdef void rings_unmap(pk_ctx *c) noexcept nogil


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
