# ARP (RFC 826, RFC 5227) as a state machine over the metastate page: who is asked, how often, what waits.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.metastate cimport Metastate, meta_page
from ulnet.stack.types cimport ul_addr
from ulnet.stack.wire cimport arp_pkt

ctypedef struct neigh_table:     # grows in neighbour.pyx's own entries; others only hold a pointer
    void *impl

ctypedef struct neigh_env:
    int64_t now_ns
    void *ctx
    int (*emit)(void *ctx, const uint8_t *dst_mac, const arp_pkt *arp) noexcept nogil

cdef neigh_table *neigh_new(meta_page *writable_page) noexcept nogil
cdef void neigh_free(neigh_table *t) noexcept nogil
# Ask for next_hop unless already asking. Result shows in the page (reachable or failed). 0 or -errno.
cdef int neigh_ask(neigh_table *t, neigh_env *env, const ul_addr *next_hop) noexcept nogil
cdef void neigh_input(neigh_table *t, neigh_env *env, const arp_pkt *arp) noexcept nogil
cdef int64_t neigh_deadline(const neigh_table *t) noexcept nogil
cdef void neigh_timers(neigh_table *t, neigh_env *env) noexcept nogil
# Gratuitous announcement (RFC 5227 2.3) and the conflict probe before using the address (2.1.1).
cdef int neigh_announce(neigh_table *t, neigh_env *env) noexcept nogil
