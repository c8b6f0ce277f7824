# Initial sequence numbers (RFC 6528) from SipHash-2-4.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef uint64_t siphash24(const uint8_t *key, const uint8_t *data, size_t n) noexcept nogil     # key: 16 bytes
cdef uint32_t tcp_isn_of(const uint8_t *secret, const void *flow, size_t flow_bytes, int64_t now_ns) noexcept nogil
