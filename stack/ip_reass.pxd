# IPv4 reassembly (RFC 791 3.2, RFC 815, RFC 5722's refusal of overlaps) for links whose kernel does not do it.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.types cimport ul_addr
from ulnet.stack.wire cimport ipv4_pkt

ctypedef struct ip_reass:
    void *table
    uint64_t held_bytes
    uint64_t timeouts
    uint64_t overlaps
    uint64_t overflow
    uint64_t done

cdef ip_reass *ip_reass_new() noexcept nogil
cdef void ip_reass_free(ip_reass *r) noexcept nogil
# NULL: not complete yet (or dropped and counted). Else a malloc'ed IP payload the caller frees; out describes the whole packet.
cdef uint8_t *ip_reass_input(ip_reass *r, const ipv4_pkt *frag, int64_t now_ns, ipv4_pkt *out) noexcept nogil
cdef int64_t ip_reass_deadline(const ip_reass *r) noexcept nogil
cdef void ip_reass_timers(ip_reass *r, int64_t now_ns) noexcept nogil
# A datagram timed out with its first fragment here: 28 bytes for the ICMP Time Exceeded, code 1, that is due to
# *src (RFC 1122 3.3.2 MUST): its IP header and 8 bytes of payload. 0: none (any more). At most 8 are remembered.
cdef uint32_t ip_reass_expired(ip_reass *r, uint8_t *quote28, ul_addr *src, ul_addr *dst) noexcept nogil
