# A packet socket as a link: the ring it shares with the kernel, and what it counted.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport Link

cdef extern from "<linux/if_packet.h>" nogil:
    struct sockaddr_ll:
        unsigned short sll_family
        uint16_t sll_protocol       # big-endian
        int sll_ifindex
        unsigned char sll_halen
        unsigned char sll_addr[8]

cdef enum:
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

cdef class PacketLink(Link):
    cdef pk_ctx c
    cdef readonly str interface
    cdef void _shut(self) noexcept
