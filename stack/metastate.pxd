# Metastate (SOSP 1993 section 3.3): addresses, routes and neighbours in one page that the server writes and
# every application reads without asking.
#
# The tables stand twice (a sequence latch, as Linux has it for clocks that are read in an NMI): even generation:
# read tables[0]; odd: tables[0] changes, read tables[1]. So a reader always finds a whole state and never waits,
# not even for a server that was stopped in the middle of a change. A changed generation means: resolve again.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.types cimport ul_addr

cdef enum:
    META_ROUTES = 64
    META_NEIGHBOURS = 1024       # slots; a power of two
    META_NEIGHBOURS_MAX = 768    # entries: three quarters keep the probe chains short
    NEIGH_FREE = 0
    NEIGH_REACHABLE = 1
    NEIGH_FAILED = 2             # asked, no answer: EHOSTUNREACH until it expires

ctypedef struct meta_route:      # 40 bytes
    ul_addr dst
    ul_addr gateway              # zero: on the link
    uint8_t prefix_len           # of the 128-bit form: an IPv4 /24 is 120
    uint8_t used
    uint16_t mtu_bytes           # 0: the link's
    uint32_t metric

ctypedef struct meta_neighbour:  # 24 bytes
    ul_addr addr
    uint8_t mac[6]
    uint8_t state
    uint8_t pad

ctypedef struct meta_tables:
    meta_route routes[META_ROUTES]               # longest prefix first, then lowest metric; no gaps
    meta_neighbour neighbours[META_NEIGHBOURS]   # open addressing by address hash, linear probing

ctypedef struct meta_link:       # order in which entries of one state were set
    uint16_t older
    uint16_t newer

ctypedef struct meta_writer:     # the writer's own book-keeping; readers ignore it
    uint32_t count               # neighbours in the table
    uint16_t oldest[3]           # by state: slot, or META_NEIGHBOURS for none
    uint16_t newest[3]
    meta_link links[META_NEIGHBOURS]

ctypedef struct meta_page:
    uint32_t magic
    uint32_t version
    uint64_t generation
    uint64_t hash_seed
    uint32_t size_bytes
    uint32_t mtu_bytes           # of the link
    ul_addr addr                 # ours; addr, prefix_len, mac and mtu_bytes never change
    uint8_t prefix_len           # of the 128-bit form
    uint8_t mac[6]
    uint8_t ended                # the server left in good order and reset what applications held
    uint64_t evicted             # neighbours thrown out of a full table
    uint64_t shares              # how often some shared session was left with one holder (netserver/shared.py)
    meta_tables tables[2]
    meta_writer writer

cdef class Metastate:
    cdef meta_page *page
    cdef readonly bint writable
    cdef readonly int fd         # -1: private memory
    cdef meta_page *_open(self) except NULL
    cdef meta_page *_writable(self) except NULL
    cdef bint _on_link(self, const ul_addr *a)

# 0 and the MAC of the next hop (our own address: all zero, see link.pxd); -ENETUNREACH no route;
# -EAGAIN neighbour not known yet (next_hop says whom to ask; zero: the page keeps changing, try again);
# -EHOSTUNREACH it does not answer.
cdef int meta_resolve(const meta_page *m, const ul_addr *dst, uint8_t *mac, ul_addr *next_hop, uint32_t *mtu_bytes) noexcept nogil
# The generation a cached answer of meta_resolve() belongs to: read it before resolving.
cdef uint64_t meta_generation(const meta_page *m) noexcept nogil
# The counter `shares`: who holds shared sessions tries to take them home only when it has changed.
cdef uint64_t meta_shares(const meta_page *m) noexcept nogil

# For the one writer only.
# 0; -ENOBUFS when it is full and `evict` says not to throw out a reachable entry. evicted (may be NULL): who had
# to go, else zero. Changes no generation when nothing changes.
cdef int meta_neigh_set(meta_page *m, const ul_addr *addr, const uint8_t *mac, uint8_t state, bint evict,
                        ul_addr *evicted) noexcept nogil
cdef bint meta_neigh_remove(meta_page *m, const ul_addr *addr) noexcept nogil
# The writer's own look: NEIGH_FREE when unknown; mac may be NULL.
cdef uint8_t meta_neigh_get(const meta_page *m, const ul_addr *addr, uint8_t *mac) noexcept nogil
