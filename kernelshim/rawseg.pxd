# Cutting super-segments into the packets a wire would carry, and completing partial checksums:
# what a network card does for a stack, done for captures and simulated wires.
# Read first: RFC 9293 (3.1), RFC 768, RFC 791 (3.1), RFC 8200 (3).

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ulnet.kernelshim.rawsum cimport htonl, htons, ntohl, ntohs, raw_add, raw_store

cdef enum:
    RAW_ETHER_BYTES = 14
    RAW_TCP = 6
    RAW_UDP = 17

ctypedef struct raw_layout:
    uint32_t l4_bytes_at        # offset of the transport header
    uint32_t payload_at         # offset of the transport payload
    uint32_t end_at             # end of the IP packet; what follows is Ethernet padding
    uint32_t check_at           # offset of the transport checksum
    uint8_t proto
    bint v6


cdef inline uint16_t raw_get16(const uint8_t *at) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, at, 2)
    return ntohs(value)


cdef inline void raw_put16(uint8_t *at, uint32_t value) noexcept nogil:
    cdef uint16_t wire = htons(<uint16_t>value)
    memcpy(at, &wire, 2)


cdef inline bint raw_parse(const uint8_t *frame, uint32_t size, raw_layout *out) noexcept nogil:
    """Find the headers of a TCP or UDP packet in IPv4 or IPv6. False for anything else, fragments included."""
    cdef uint32_t ihl
    if size < RAW_ETHER_BYTES + 20:
        return False
    if frame[12] == 0x08 and frame[13] == 0x00:
        ihl = (frame[14] & 15) * 4
        if frame[14] >> 4 != 4 or ihl < 20 or raw_get16(frame + 20) & 0x3FFF:
            return False
        out.v6 = False
        out.proto = frame[23]
        out.l4_bytes_at = RAW_ETHER_BYTES + ihl
        out.end_at = RAW_ETHER_BYTES + raw_get16(frame + 16)
    elif frame[12] == 0x86 and frame[13] == 0xDD and size >= RAW_ETHER_BYTES + 40:
        out.v6 = True
        out.proto = frame[20]
        out.l4_bytes_at = RAW_ETHER_BYTES + 40
        out.end_at = out.l4_bytes_at + raw_get16(frame + 18)
    else:
        return False
    if out.end_at > size:
        return False
    if out.proto == RAW_TCP and out.l4_bytes_at + 20 <= out.end_at:
        out.payload_at = out.l4_bytes_at + (frame[out.l4_bytes_at + 12] >> 4) * 4
        out.check_at = out.l4_bytes_at + 16
    elif out.proto == RAW_UDP and out.l4_bytes_at + 8 <= out.end_at:
        out.payload_at = out.l4_bytes_at + 8
        out.check_at = out.l4_bytes_at + 6
    else:
        return False
    return out.l4_bytes_at + 8 <= out.payload_at <= out.end_at


cdef inline uint64_t raw_pseudo(const uint8_t *frame, const raw_layout *at, uint32_t l4_len) noexcept nogil:
    """Sum of the pseudo-header (RFC 9293 (3.1), RFC 8200 (8.1)), unfolded."""
    cdef uint64_t total = <uint64_t>htons(at.proto) + htons(<uint16_t>l4_len)
    if at.v6:
        return raw_add(frame + RAW_ETHER_BYTES + 8, 32, total)
    return raw_add(frame + RAW_ETHER_BYTES + 12, 8, total)


cdef inline void raw_complete(uint8_t *frame, const raw_layout *at) noexcept nogil:
    """Complete a partial checksum in place: the field holds the sum to start from, right or wrong."""
    cdef uint64_t total = raw_add(frame + at.l4_bytes_at, at.end_at - at.l4_bytes_at, 0)
    raw_store(frame + at.check_at, total)


cdef inline uint32_t raw_pieces(const raw_layout *at, uint32_t gso_size) noexcept nogil:
    """Packets that the super-segment makes."""
    cdef uint32_t payload = at.end_at - at.payload_at
    if gso_size == 0 or payload <= gso_size:
        return 1
    return (payload + gso_size - 1) // gso_size


cdef inline uint32_t raw_piece(
    const uint8_t *frame, const raw_layout *at, uint32_t gso_size, uint32_t number, bint partial, uint8_t *out
) noexcept nogil:
    """Write packet ``number`` of the super-segment to ``out``; its length. ``partial``: the checksum field holds
    the pseudo-header sum of the whole, from which each piece's is made, so that a wrong one shows."""
    cdef uint32_t skip = number * gso_size
    cdef uint32_t left = at.end_at - at.payload_at - skip
    cdef uint32_t body = left if left < gso_size else gso_size
    cdef uint32_t l4_len = at.payload_at - at.l4_bytes_at + body
    cdef uint32_t sequence
    cdef uint64_t total
    cdef uint16_t seed
    cdef uint8_t *ip = out + RAW_ETHER_BYTES
    cdef uint8_t *l4 = out + at.l4_bytes_at
    memcpy(out, frame, at.payload_at)
    memcpy(out + at.payload_at, frame + at.payload_at + skip, body)
    if at.v6:
        raw_put16(ip + 4, l4_len)
    else:
        raw_put16(ip + 2, at.l4_bytes_at - RAW_ETHER_BYTES + l4_len)
        raw_put16(ip + 4, raw_get16(ip + 4) + number)
        ip[10] = 0
        ip[11] = 0
        raw_store(ip + 10, raw_add(ip, at.l4_bytes_at - RAW_ETHER_BYTES, 0))
    if at.proto == RAW_TCP:
        memcpy(&sequence, l4 + 4, 4)
        sequence = htonl(ntohl(sequence) + skip)
        memcpy(l4 + 4, &sequence, 4)
        if left > gso_size:
            l4[13] &= 0xF6          # FIN and PSH belong to the last piece
        if number:
            l4[13] &= 0x7F          # CWR to the first, RFC 3168 (6.1.2)
    else:
        raw_put16(l4 + 4, l4_len)
    if partial:
        # RFC 1624: take the whole's length out of the sum, put the piece's in.
        memcpy(&seed, out + at.check_at, 2)
        total = <uint64_t>seed + <uint16_t>~htons(<uint16_t>(at.end_at - at.l4_bytes_at)) + htons(<uint16_t>l4_len)
    else:
        total = raw_pseudo(out, at, l4_len)
    out[at.check_at] = 0
    out[at.check_at + 1] = 0
    raw_store(out + at.check_at, raw_add(l4, l4_len, total))
    return at.payload_at + body


cdef inline uint32_t raw_fragments(const raw_layout *at, uint32_t gso_size) noexcept nogil:
    """IPv4 fragments that the datagram makes, with ``gso_size`` bytes of IP payload each, rounded down to 8."""
    cdef uint32_t body = gso_size & ~<uint32_t>7
    return (at.end_at - at.l4_bytes_at + body - 1) // body


cdef inline uint32_t raw_fragment(
    const uint8_t *frame, const raw_layout *at, uint32_t gso_size, uint32_t number, uint8_t *out
) noexcept nogil:
    """Write fragment ``number`` of the IPv4 datagram to ``out``; its length. RFC 791 (3.2)"""
    cdef uint32_t most = gso_size & ~<uint32_t>7
    cdef uint32_t skip = number * most
    cdef uint32_t left = at.end_at - at.l4_bytes_at - skip
    cdef uint32_t body = left if left < most else most
    cdef uint8_t *ip = out + RAW_ETHER_BYTES
    memcpy(out, frame, at.l4_bytes_at)
    memcpy(out + at.l4_bytes_at, frame + at.l4_bytes_at + skip, body)
    raw_put16(ip + 2, at.l4_bytes_at - RAW_ETHER_BYTES + body)
    raw_put16(ip + 6, skip // 8 | (0x2000 if left > body else 0))
    ip[10] = 0
    ip[11] = 0
    raw_store(ip + 10, raw_add(ip, at.l4_bytes_at - RAW_ETHER_BYTES, 0))
    return at.l4_bytes_at + body
