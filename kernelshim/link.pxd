# The link table: how a stack exchanges frames with whatever carries them (packet socket,
# memory, fault injector, capture, simulator). One table of C functions; every link fills it in.
#
# Call order of a receiver: recv() until it answers 0; each frame stays valid until release(slot).
# Frames may be released in any order. All functions run without the GIL and never block.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    # ul_rx.flags and ul_tx.flags
    UL_FRAME_CSUM_PARTIAL = 1   # transport checksum holds only the pseudo-header sum.
                                # rx: from a local kernel, never verify. tx: the link completes it.
    UL_FRAME_CSUM_OK = 2        # rx: already verified by the kernel or the device
    UL_FRAME_GSO_TCP4 = 4       # a TCP/IPv4 super-segment of gso_size payload bytes a piece
    UL_FRAME_GSO_UDP = 8        # a train of UDP datagrams of gso_size bytes (UDP_SEGMENT)
    UL_FRAME_UFO = 16           # tx: one UDP datagram that the link cuts into IP fragments
    UL_FRAME_IN_RING = 32       # rx: it lies where its writer will write again (stack/lines.h)
    UL_FRAME_NO_TOKEN = 64      # rx: it is in a ring slot, although `slot` does not say which
    # ul_link.features
    UL_LINK_CSUM = 1            # completes UL_FRAME_CSUM_PARTIAL on tx
    UL_LINK_TSO = 2             # takes UL_FRAME_GSO_TCP4 on tx
    UL_LINK_USO = 4             # takes UL_FRAME_GSO_UDP on tx
    UL_LINK_UFO = 8             # takes UL_FRAME_UFO on tx
    UL_LINK_EVACUATE = 16       # evacuate() works (slots are scarce and ring-ordered)
    # slot number of a frame that needs no release: valid until the next recv()
    UL_SLOT_NONE = 0xFFFFFFFF

ctypedef struct ul_rx:
    const uint8_t *data         # first byte of the Ethernet header
    uint32_t len_bytes          # whole frame, Ethernet header included
    uint32_t slot               # token for release(); rings count slots 0..slots-1 in ring order
    uint16_t flags
    uint16_t gso_size_bytes     # 0 unless a GSO flag is set

ctypedef struct ul_tx:
    const iovec *iov            # iov[0] starts with the Ethernet header; at most 18 pieces
    int iov_count
    uint32_t len_bytes          # sum of the pieces
    uint16_t flags
    uint16_t gso_size_bytes
    uint16_t hdr_len_bytes      # Ethernet + IP + transport header
    uint16_t csum_start         # as in virtio_net_hdr, from the Ethernet header
    uint16_t csum_offset

# An all-zero destination MAC means "this very host": the link brings the frame back to the
# channels of its own address (packet link: by the loopback device; memory link: own queue).
ctypedef struct ul_link:
    void *ctx
    int (*send)(void *ctx, const ul_tx *frame) noexcept nogil      # 0 or -errno (-EAGAIN: try again)
    int (*recv)(void *ctx, ul_rx *frame) noexcept nogil            # 1: frame filled in, 0: none now
    void (*release)(void *ctx, uint32_t slot) noexcept nogil
    # Give the slot back to the ring while its memory stays readable at the same address, until
    # release(slot) is called for good. 0 or -errno. NULL without UL_LINK_EVACUATE.
    int (*evacuate)(void *ctx, uint32_t slot) noexcept nogil
    int (*deferred_ns)(void *ctx, int64_t now_ns, int64_t *due_ns) noexcept nogil  # NULL, or: when recv() will next
                                                                   # have a frame by itself (simulated delay); 0 if never
    int fd                      # becomes readable when frames arrive; -1 if there is none
    int large_fd                # the same, for frames that have a ring of their own because they are large
    uint32_t slots              # ring slots of frames with a token, 0 when they are not scarce
    uint32_t small_slots        # ring slots of frames of at most small_bytes, which never have a token; 0: no such ring
    uint32_t small_bytes
    uint32_t mtu_bytes          # largest IP packet
    uint32_t features
    uint8_t mac[6]

cdef class Link:
    cdef ul_link ops
