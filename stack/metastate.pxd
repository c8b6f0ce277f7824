# Metastate (SOSP 1993 section 3.3): addresses, routes and neighbours in one page that the server writes and
# every application reads without asking. A sequence lock: generation is odd while the page changes.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.types cimport ul_addr

cdef enum:
    META_ROUTES = 64
    META_NEIGHBOURS = 1024
    NEIGH_FREE = 0
    NEIGH_REACHABLE = 1
    NEIGH_FAILED = 2             # asked, no answer: EHOSTUNREACH until it expires

ctypedef struct meta_route:
    ul_addr dst
    ul_addr gateway              # zero: on the link
    uint8_t prefix_len           # of the 128-bit form: an IPv4 /24 is 120
    uint8_t used
    uint16_t mtu_bytes           # 0: the link's
    uint32_t metric

ctypedef struct meta_neighbour:
    ul_addr addr
    uint8_t mac[6]
    uint8_t state
    uint8_t pad

ctypedef struct meta_page:
    uint32_t magic
    uint32_t version
    uint64_t generation
    ul_addr addr                 # ours
    uint8_t prefix_len
    uint8_t mac[6]
    uint8_t pad
    uint32_t mtu_bytes
    meta_route routes[META_ROUTES]           # longest prefix first
    meta_neighbour neighbours[META_NEIGHBOURS]   # open addressing by address hash

cdef class Metastate:
    cdef meta_page *page
    cdef readonly bint writable
    cdef int fd

# 0 and the MAC of the next hop (our own address: all zero, see link.pxd); -ENETUNREACH no route;
# -EAGAIN neighbour not known yet (next_hop says whom to ask); -EHOSTUNREACH it does not answer.
cdef int meta_resolve(const meta_page *m, const ul_addr *dst, uint8_t *mac, ul_addr *next_hop, uint32_t *mtu_bytes) noexcept nogil
