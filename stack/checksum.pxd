# The Internet checksum (RFC 1071, 1141, 1624): a fast path, a portable one, incremental update, copy-and-checksum.
# Partial sums are 64-bit ones'-complement accumulators over native-order words; cksum_fold() gives the
# 16-bit value to store as it is (native order in memory).

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef uint64_t cksum_add(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil        # n odd: padded with zero, last piece only
cdef uint64_t cksum_add_portable(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil
cdef uint64_t cksum_copy(uint8_t *dst, const uint8_t *src, size_t n, uint64_t acc) noexcept nogil
# Piecewise over several buffers, right also when a piece before the last is odd.
cdef uint64_t cksum_add_at(const uint8_t *p, size_t n, uint64_t acc, size_t offset) noexcept nogil

# Add one more 64-bit word (or another accumulator) with its end-around carry.
cdef inline uint64_t cksum_carry(uint64_t acc, uint64_t word) noexcept nogil:
    acc += word
    return acc + (acc < word)

# Folded, not complemented.
cdef inline uint16_t cksum_fold(uint64_t acc) noexcept nogil:
    acc = <uint64_t><uint32_t>acc + (acc >> 32)  # <= 2^33 - 2
    acc = (acc & 0xFFFF) + (acc >> 16)          # <= 2^17 + 2^16
    acc = (acc & 0xFFFF) + (acc >> 16)
    return <uint16_t>((acc & 0xFFFF) + (acc >> 16))

# RFC 1624 eqn 3: HC' = ~(~HC + ~m + m'). All three as they stand in memory.
cdef inline uint16_t cksum_update(uint16_t sum, uint16_t old_word, uint16_t new_word) noexcept nogil:
    cdef uint32_t s = <uint32_t>(<uint16_t>~sum) + <uint32_t>(<uint16_t>~old_word) + new_word
    s = (s & 0xFFFF) + (s >> 16)
    return <uint16_t>~((s & 0xFFFF) + (s >> 16))
