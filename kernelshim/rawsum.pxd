# The Internet checksum (RFC 1071) for links that must complete one themselves: simulated wires and captures.
# Small and inline, not fast: stacks have their own.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t htons(uint16_t value)
    uint16_t ntohs(uint16_t value)
    uint32_t htonl(uint32_t value)
    uint32_t ntohl(uint32_t value)


cdef inline uint16_t raw_fold(uint64_t total) noexcept nogil:
    """Ones' complement sum of the 16-bit words in ``total``. RFC 1071 (1), end-around carry"""
    total = (total & <uint64_t>0xFFFFFFFF) + (total >> 32)
    total = (total & <uint64_t>0xFFFFFFFF) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return <uint16_t>((total & 0xFFFF) + (total >> 16))


cdef inline uint64_t raw_add(const uint8_t *data, size_t size, uint64_t total) noexcept nogil:
    """Add the bytes to an unfolded sum, in memory order. RFC 1071 (2)(B): the byte order of the words is free"""
    cdef uint32_t word
    cdef uint16_t tail = 0
    while size >= 4:
        memcpy(&word, data, 4)
        total += word
        data += 4
        size -= 4
    if size >= 2:
        memcpy(&tail, data, 2)
        total += tail
        data += 2
        size -= 2
    if size:
        tail = 0
        memcpy(&tail, data, 1)
        total += tail
    return total


cdef inline void raw_store(uint8_t *at, uint64_t total) noexcept nogil:
    """Write the checksum of the unfolded sum. Zero is sent as all ones: for UDP it would mean "none" (RFC 768)."""
    cdef uint16_t value = <uint16_t>~raw_fold(total)
    if value == 0:
        value = 0xFFFF
    memcpy(at, &value, 2)
