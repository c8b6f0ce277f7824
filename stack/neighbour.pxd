# ARP (RFC 826, RFC 5227) as a state machine over the metastate page: who is asked, how often, what waits.
#
# Call order: [neigh_probe(), then neigh_input() and neigh_timers() until neigh_address() is not NEIGH_ADDR_PROBING];
# neigh_announce(); then neigh_ask(), neigh_input() and neigh_timers() as things happen. One thread at a time.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.metastate cimport Metastate, meta_page
from ulnet.stack.types cimport ul_addr
from ulnet.stack.wire cimport arp_pkt

cdef enum:
    NEIGH_ADDR_CLAIMED = 0       # ours: in use, defended
    NEIGH_ADDR_PROBING = 1       # not used yet: is it somebody else's?
    NEIGH_ADDR_CONFLICT = 2      # it is: never used

ctypedef struct neigh_counters:  # never reset
    uint64_t requests_out        # who has ...? broadcast
    uint64_t probes_out          # are you still there? unicast
    uint64_t replies_out
    uint64_t announcements_out   # and probes for a conflict
    uint64_t requests_in         # for our address
    uint64_t replies_in
    uint64_t learned
    uint64_t moved               # a known neighbour has another MAC now
    uint64_t failed              # did not answer
    uint64_t lost                # answered once, does not any more
    uint64_t refused_full        # no room to ask or to learn
    uint64_t refused_locked      # a second MAC for an address within a second
    uint64_t bad_in              # senders that cannot be: group or zero MAC, no host's address, unknown operation
    uint64_t conflicts           # somebody else uses our address
    uint64_t emit_failed         # the link did not take it; tried again by the next timer

ctypedef struct neigh_entry:
    ul_addr addr
    int64_t due_ns
    int64_t updated_ns           # when its MAC was set
    uint8_t mac[6]
    uint8_t state
    uint8_t tries
    uint16_t next                # in its hash chain or in the free list

ctypedef struct neigh_table:
    neigh_counters n
    meta_page *page
    neigh_entry *entries
    uint16_t *chains
    uint16_t free
    uint16_t count
    uint16_t asking
    uint8_t addr_state
    uint8_t addr_left            # probes or announcements still to send
    int64_t addr_due_ns
    int64_t addr_interval_ns
    int64_t defended_ns
    int64_t next_ns              # nothing is due before
    uint8_t conflict_mac[6]      # of the last conflict

ctypedef struct neigh_env:
    int64_t now_ns
    void *ctx
    int (*emit)(void *ctx, const uint8_t *dst_mac, const arp_pkt *arp) noexcept nogil

cdef neigh_table *neigh_new(meta_page *writable_page) noexcept nogil
cdef void neigh_free(neigh_table *t) noexcept nogil
# Ask for next_hop unless already asking. Result shows in the page (reachable or failed). 0 or -errno:
# -EHOSTUNREACH asked a moment ago in vain, -ENETUNREACH not on the link, -ENOBUFS too many questions open,
# -EAGAIN our address is not ours yet, -EADDRNOTAVAIL it is somebody else's.
cdef int neigh_ask(neigh_table *t, neigh_env *env, const ul_addr *next_hop) noexcept nogil
cdef void neigh_input(neigh_table *t, neigh_env *env, const arp_pkt *arp) noexcept nogil
cdef int64_t neigh_deadline(const neigh_table *t) noexcept nogil                        # ns, INT64_MAX: none
cdef void neigh_timers(neigh_table *t, neigh_env *env) noexcept nogil
# Gratuitous announcement (RFC 5227 2.3), repeated once.
cdef int neigh_announce(neigh_table *t, neigh_env *env) noexcept nogil
# The conflict probe before using the address (RFC 5227 2.1.1): `count` questions, `interval_ns` apart, the first one
# now; ends as NEIGH_ADDR_CLAIMED (and announces) or as NEIGH_ADDR_CONFLICT with conflict_mac.
cdef void neigh_probe(neigh_table *t, neigh_env *env, uint8_t count, int64_t interval_ns) noexcept nogil
cdef int neigh_address(const neigh_table *t) noexcept nogil
# Forget everything learned (the link was down).
cdef void neigh_flush(neigh_table *t) noexcept nogil
