# Every fast path forced off or on for tests: what each module asks once, at import. fastpaths.pyx lists them.

from libc.stdint cimport int64_t, uint32_t

# From how many bytes on something is held where it lies instead of copied: `usual`, 1 when forced on, never when off.
cdef uint32_t fast_from_bytes(uint32_t usual) noexcept nogil
# UL_LINK_* bits of a link that a stack may use.
cdef uint32_t fast_features(uint32_t usual) noexcept nogil
# How long a waiting call polls before it sleeps.
cdef int64_t fast_spin_ns(int64_t usual) noexcept nogil
cdef bint fast_always() noexcept nogil         # also where it does not pay
cdef bint fast_link_sums() noexcept nogil      # checksums are left to the link where it computes them
cdef bint fast_vector() noexcept nogil
