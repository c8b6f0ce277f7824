# Addresses, flow keys and readiness bits shared by every layer of the stack.
#
# Every address has 128 bits: IPv4 a.b.c.d stands as ::ffff:a.b.c.d (RFC 4291 2.5.5.2), so that
# IPv6 needs no second path. Ports are in host order everywhere but on the wire.
# C functions return 0 or more, or a negative errno value (the one error enum is Linux's).

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

cdef enum:
    UL_IPPROTO_ICMP = 1
    UL_IPPROTO_TCP = 6
    UL_IPPROTO_UDP = 17
    # readiness, as poll(2) has it
    UL_READABLE = 1          # data, a datagram, a connection to accept, or end of file
    UL_WRITABLE = 2          # room in the send buffer, or the connection was just established
    UL_ERROR = 4             # so_error is pending
    UL_HUP = 8               # both directions ended
    UL_RDHUP = 16            # the peer ended its direction

ctypedef struct ul_addr:
    uint8_t b[16]

ctypedef struct flow_key:    # seen from this host; unused parts and padding are zero
    ul_addr laddr
    ul_addr raddr
    uint16_t lport
    uint16_t rport
    uint8_t proto
    uint8_t pad[3]

cdef inline void addr_from_ipv4(ul_addr *a, const uint8_t *ip) noexcept nogil:
    memset(a.b, 0, 10)
    a.b[10] = 0xFF
    a.b[11] = 0xFF
    a.b[12] = ip[0]
    a.b[13] = ip[1]
    a.b[14] = ip[2]
    a.b[15] = ip[3]

cdef inline bint addr_equal(const ul_addr *a, const ul_addr *b) noexcept nogil:
    return (<const uint64_t *>a.b)[0] == (<const uint64_t *>b.b)[0] and \
        (<const uint64_t *>a.b)[1] == (<const uint64_t *>b.b)[1]

cdef inline bint addr_is_zero(const ul_addr *a) noexcept nogil:
    return (<const uint64_t *>a.b)[0] == 0 and (<const uint64_t *>a.b)[1] == 0

cdef inline bint flow_equal(const flow_key *a, const flow_key *b) noexcept nogil:
    return memcmp(a, b, sizeof(flow_key)) == 0

cdef inline uint64_t flow_hash(const flow_key *k) noexcept nogil:
    # Multiply-mix over the five words; keys are chosen by peers only in 48 bits, tables are bounded.
    cdef const uint64_t *w = <const uint64_t *>k
    cdef uint64_t h = 0x9E3779B97F4A7C15
    cdef int i
    for i in range(5):
        h = (h ^ w[i]) * <uint64_t>0xFF51AFD7ED558CCD
        h ^= h >> 32
    return h
