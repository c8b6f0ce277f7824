# Wire formats: legal values of Ethernet, ARP, IPv4, ICMP, UDP and TCP headers; parse judges, emit writes.
# Parse functions return 0 or a negative WIRE_* reason (counted by the caller, never raised); what they fill in
# points into the bytes given. Emit functions write headers; payloads are gathered by the caller, except ICMP's.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from ulnet.kernelshim.link cimport iovec, ul_rx
from ulnet.stack.types cimport flow_key, ul_addr
from ulnet.stack.tcp cimport tcp_out, tcp_seg

cdef enum:
    WIRE_OK = 0
    WIRE_SHORT = -1              # truncated
    WIRE_VERSION = -2            # not what it says it is
    WIRE_LENGTH = -3             # lengths contradict each other
    WIRE_CHECKSUM = -4
    WIRE_OPTION = -5             # malformed option list
    WIRE_ADDRESS = -6            # source or destination that no packet may have
    ETH_HEADER_BYTES = 14
    IPV4_HEADER_BYTES = 20
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_ARP = 0x0806

ctypedef struct ipv4_pkt:
    ul_addr src
    ul_addr dst
    const uint8_t *payload
    uint32_t payload_bytes       # by the total length, not by the frame
    uint32_t hdr_bytes
    uint16_t ident
    uint16_t frag_off_bytes
    uint8_t more_fragments
    uint8_t dont_fragment
    uint8_t proto
    uint8_t ttl
    uint8_t tos

ctypedef struct arp_pkt:         # Ethernet/IPv4 only
    uint16_t op                  # 1 request, 2 reply
    uint8_t sha[6]
    uint8_t tha[6]
    ul_addr spa
    ul_addr tpa

ctypedef struct udp_pkt:
    uint16_t sport
    uint16_t dport
    const uint8_t *data
    uint32_t len_bytes

ctypedef struct icmp_pkt:
    uint8_t type
    uint8_t code
    uint32_t rest                # bytes 4..7, host order (id/seq, unused/mtu)
    const uint8_t *payload
    uint32_t payload_bytes

ctypedef struct icmp_error:      # an ICMP error about a packet of ours
    flow_key flow                # of the session it concerns
    int error                    # negative errno as a socket reports it (RFC 1122 4.2.3.9, 4.1.3.3)
    uint32_t next_mtu_bytes      # packet too big: the MTU, else 0
    uint32_t tcp_seq
    uint8_t hard                 # ends a connection attempt

# Big-endian fields at any alignment; compilers turn each into one load or store with a byte swap.
cdef inline uint16_t load16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((<uint32_t>p[0] << 8) | p[1])

cdef inline uint32_t load32(const uint8_t *p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]

cdef inline void store16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 8)
    p[1] = <uint8_t>v

cdef inline void store32(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 24)
    p[1] = <uint8_t>(v >> 16)
    p[2] = <uint8_t>(v >> 8)
    p[3] = <uint8_t>v

# Sum of the pseudo-header (RFC 9293 3.1, RFC 768), a checksum accumulator. n: transport header and payload.
cdef inline uint64_t pseudo_sum(const ul_addr *src, const ul_addr *dst, uint8_t proto, uint32_t n) noexcept nogil:
    cdef uint32_t s, d, last
    store32(<uint8_t *>&last, n + proto)      # one 32-bit word: zero, protocol and length add up to it
    memcpy(&s, src.b + 12, 4)
    memcpy(&d, dst.b + 12, 4)
    return <uint64_t>s + d + last

# Source may be neither multicast nor broadcast nor {0, host} (RFC 1122 3.2.1.3); loopback only to loopback.
# Whether an address is a subnet's broadcast only the caller knows.
cdef int ipv4_parse(const uint8_t *p, uint32_t n, ipv4_pkt *out) noexcept nogil
# verify: check the transport checksum (0 for frames marked UL_FRAME_CSUM_PARTIAL or _OK).
# Fragments are refused: reassemble first. out.frame, gso_size_bytes and held are cleared: set them afterwards.
cdef int tcp_parse(const ipv4_pkt *ip, bint verify, tcp_seg *out, uint16_t *sport, uint16_t *dport) noexcept nogil
cdef int udp_parse(const ipv4_pkt *ip, bint verify, udp_pkt *out) noexcept nogil
cdef int icmp_parse(const ipv4_pkt *ip, icmp_pkt *out) noexcept nogil
# WIRE_VERSION: no error, or not about a TCP or UDP packet. The caller checks that flow.laddr is its own.
cdef int icmp_error_parse(const icmp_pkt *icmp, icmp_error *out) noexcept nogil
cdef int arp_parse(const uint8_t *p, uint32_t n, arp_pkt *out) noexcept nogil

# Emit: write at p, return the bytes written.
cdef inline uint32_t eth_emit(uint8_t *p, const uint8_t *dst, const uint8_t *src, uint16_t ethertype) noexcept nogil:
    memcpy(p, dst, 6)
    memcpy(p + 6, src, 6)
    store16(p + 12, ethertype)
    return ETH_HEADER_BYTES

# header checksum included; total_bytes counts from the IP header
cdef uint32_t ipv4_emit(uint8_t *p, const ul_addr *src, const ul_addr *dst, uint8_t proto, uint32_t total_bytes,
                        uint16_t ident, uint16_t flags_frag_be_host, uint8_t ttl, uint8_t tos) noexcept nogil
# The header with its options (its length is returned); out's pieces follow it on the wire. The checksum field is
# filled with the folded pseudo-header sum over the whole (super-)segment, not complemented (partial), or completed
# over the payload pieces of out (full).
cdef uint32_t tcp_emit(uint8_t *p, const flow_key *flow, const tcp_out *out, bint partial) noexcept nogil
# The 8-byte header only; data (n bytes, in one piece) follow it on the wire.
cdef uint32_t udp_emit(uint8_t *p, const flow_key *flow, const uint8_t *data, uint32_t n, bint partial) noexcept nogil
# The same for data in pieces that sum to n bytes.
cdef uint32_t udp_emit_iov(uint8_t *p, const flow_key *flow, const iovec *iov, int iov_count, uint32_t n, bint partial) noexcept nogil
# Header and payload: the payload is copied behind the header (payload may be p + 8: then it is there already).
cdef uint32_t icmp_emit(uint8_t *p, uint8_t type, uint8_t code, uint32_t rest, const uint8_t *payload, uint32_t n) noexcept nogil
cdef uint32_t arp_emit(uint8_t *p, const arp_pkt *arp) noexcept nogil
