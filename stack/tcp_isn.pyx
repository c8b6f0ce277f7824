"""Initial sequence numbers (RFC 6528): a clock plus a keyed hash (SipHash-2-4) of the flow."""
# An attacker off the path must not guess them; a new incarnation of a flow must begin after the old one.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint64_t rotl(uint64_t x, int b) noexcept nogil:
    return (x << b) | (x >> (64 - b))


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[1] = rotl(v[1], 13) ^ v[0]
    v[0] = rotl(v[0], 32)
    v[2] += v[3]
    v[3] = rotl(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = rotl(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = rotl(v[1], 17) ^ v[2]
    v[2] = rotl(v[2], 32)


cdef uint64_t siphash24(const uint8_t *key, const uint8_t *data, size_t n) noexcept nogil:
    """Aumasson and Bernstein, SipHash (2012), section 2; little-endian words."""
    cdef uint64_t k0, k1, m
    cdef uint64_t v[4]
    cdef size_t left = n
    cdef int i
    memcpy(&k0, key, 8)
    memcpy(&k1, key + 8, 8)
    v[0] = k0 ^ 0x736F6D6570736575ULL
    v[1] = k1 ^ 0x646F72616E646F6DULL
    v[2] = k0 ^ 0x6C7967656E657261ULL
    v[3] = k1 ^ 0x7465646279746573ULL
    while left >= 8:
        memcpy(&m, data, 8)
        v[3] ^= m
        sip_round(v)
        sip_round(v)
        v[0] ^= m
        data += 8
        left -= 8
    m = <uint64_t>n << 56
    for i in range(<int>left):
        m |= <uint64_t>data[i] << (8 * i)
    v[3] ^= m
    sip_round(v)
    sip_round(v)
    v[0] ^= m
    v[2] ^= 0xFF
    for i in range(4):
        sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef uint32_t tcp_isn_of(const uint8_t *secret, const void *flow, size_t flow_bytes, int64_t now_ns) noexcept nogil:
    # RFC 6528 3: ISN = M + F(flow, secret); M ticks every 4 microseconds (RFC 9293 3.4.1)
    return <uint32_t>(<uint64_t>now_ns // 4000) + <uint32_t>siphash24(secret, <const uint8_t *>flow, flow_bytes)


def siphash(key: bytes, data: bytes) -> int:
    """SipHash-2-4 of ``data`` under a 16-byte ``key``, as an unsigned 64-bit number."""
    if len(key) != 16:
        raise ValueError(f"key has {len(key)} bytes, SipHash needs 16")
    return siphash24(<const uint8_t *><const char *>key, <const uint8_t *><const char *>data, len(data))


def isn(secret: bytes, flow: bytes, now_ns: int) -> int:
    """Initial sequence number of ``flow`` at ``now_ns`` under a 16-byte ``secret`` (RFC 6528 3)."""
    if len(secret) != 16:
        raise ValueError(f"secret has {len(secret)} bytes, SipHash needs 16")
    return tcp_isn_of(<const uint8_t *><const char *>secret, <const char *>flow, len(flow), now_ns)
