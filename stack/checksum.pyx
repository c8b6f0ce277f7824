"""The Internet checksum (RFC 1071): fast and portable sums, copy-and-checksum, incremental update (RFC 1624).

Call order: an accumulator starts at 0 (or at a pseudo-header's sum), ``cksum_add`` or ``cksum_copy`` for each piece,
``cksum_fold`` at the end, and a complement. The Python functions below give and take numbers in network order,
so that ``struct.pack("!H", checksum(header))`` is what stands on the wire.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.string cimport memcpy
from ulnet.kernelshim.fastpaths cimport fast_vector


cdef extern from "ulnet/stack/checksum_fast.h" nogil:
    int ulck_vector_on
    int ulck_has_avx2()
    uint64_t ulck_add(const uint8_t *p, size_t n, uint64_t acc)
    uint64_t ulck_copy(uint8_t *dst, const uint8_t *src, size_t n, uint64_t acc)
    uint64_t ulck_naive(const uint8_t *p, size_t n, uint64_t acc)


cdef extern from "<arpa/inet.h>" nogil:
    uint16_t ntohs(uint16_t v)
    uint16_t htons(uint16_t v)


ctypedef uint64_t (*add_fn)(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil

cdef enum:
    NOGIL_FROM_BYTES = 65536      # below, giving the GIL up costs more than the sum

ulck_vector_on = fast_vector() and ulck_has_avx2()


cdef uint64_t cksum_add(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil:
    return ulck_add(p, n, acc)


cdef uint64_t cksum_copy(uint8_t *dst, const uint8_t *src, size_t n, uint64_t acc) noexcept nogil:
    return ulck_copy(dst, src, n, acc)


cdef uint64_t cksum_add_portable(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil:
    """Plain Cython, any processor, any alignment: 32-bit words into a 64-bit sum."""
    cdef uint32_t w0, w1, last = 0
    cdef uint64_t s0 = 0, s1 = 0          # 2^32 words of 32 bits before either could overflow: 32 GiB
    while n >= 8:
        memcpy(&w0, p, 4)
        memcpy(&w1, p + 4, 4)
        s0 += w0
        s1 += w1
        p += 8
        n -= 8
    if n >= 4:
        memcpy(&w0, p, 4)
        s0 += w0
        p += 4
        n -= 4
    if n:
        memcpy(&last, p, n)               # the missing bytes are zero (RFC 1071 section 1)
        s1 += last
    return cksum_carry(cksum_carry(acc, s0), s1)


cdef uint64_t cksum_naive(const uint8_t *p, size_t n, uint64_t acc) noexcept nogil:
    return ulck_naive(p, n, acc)


cdef inline uint16_t cksum_swap(uint16_t s) noexcept nogil:
    return <uint16_t>((s << 8) | (s >> 8))


cdef uint64_t cksum_add_at(const uint8_t *p, size_t n, uint64_t acc, size_t offset) noexcept nogil:
    if offset & 1 == 0:
        return cksum_add(p, n, acc)
    # RFC 1071 section 2 (B): a sum over swapped bytes is the swapped sum.
    return cksum_carry(acc, cksum_swap(cksum_fold(cksum_add(p, n, 0))))


cdef uint16_t check_word(str name, object value) except? 0xFFFF:
    if not 0 <= value <= 0xFFFF:
        raise ValueError(f"{name}={value} is not a 16-bit value (0 to 65535)")
    return htons(<uint16_t>value)


cdef uint16_t sum_of(object data, object initial, bint odd, add_fn add) except? 0xFFFF:
    cdef Py_buffer view
    cdef uint64_t acc = 0
    cdef uint16_t first = check_word("initial", initial)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len >= NOGIL_FROM_BYTES:
            with nogil:
                acc = add(<const uint8_t *>view.buf, <size_t>view.len, 0)
        else:
            acc = add(<const uint8_t *>view.buf, <size_t>view.len, 0)
    finally:
        PyBuffer_Release(&view)
    if odd:
        acc = cksum_swap(cksum_fold(acc))
    return ntohs(cksum_fold(cksum_carry(acc, first)))


def checksum(data, initial: int = 0) -> int:
    """Internet checksum of a bytes-like object: the complement of its ones'-complement sum (RFC 1071), 0 to 65535.

    ``initial`` is a sum (not complemented) to go on from, as ``sum16`` gives it. Data with a right checksum in it give 0.
    """
    return sum_of(data, initial, False, cksum_add) ^ 0xFFFF


def checksum_portable(data, initial: int = 0) -> int:
    """``checksum`` without special instructions, whatever the processor has."""
    return sum_of(data, initial, False, cksum_add_portable) ^ 0xFFFF


def checksum_naive(data, initial: int = 0) -> int:
    """``checksum`` by a C loop over 16-bit words: the yardstick of the benchmark."""
    return sum_of(data, initial, False, cksum_naive) ^ 0xFFFF


def sum16(data, initial: int = 0, offset: int = 0) -> int:
    """The ones'-complement sum itself, for data in pieces: ``offset`` is how many bytes came before this piece."""
    return sum_of(data, initial, bool(offset & 1), cksum_add)


def copy_checksum(dst, src) -> int:
    """Copy ``src`` to the start of ``dst`` and return its checksum, in one pass over the bytes.

    Raises ValueError when ``dst`` is shorter than ``src``, BufferError when it is read-only.
    """
    cdef Py_buffer to, from_
    cdef uint64_t acc
    PyObject_GetBuffer(src, &from_, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(dst, &to, PyBUF_WRITABLE)
        try:
            if to.len < from_.len:
                raise ValueError(f"dst has {to.len} bytes, src {from_.len}: give a dst at least as long as src")
            acc = cksum_copy(<uint8_t *>to.buf, <const uint8_t *>from_.buf, <size_t>from_.len, 0)
        finally:
            PyBuffer_Release(&to)
    finally:
        PyBuffer_Release(&from_)
    return ntohs(cksum_fold(acc)) ^ 0xFFFF


def update(checksum: int, old_word: int, new_word: int) -> int:
    """The checksum after one aligned 16-bit word changed from ``old_word`` to ``new_word`` (RFC 1624 equation 3)."""
    return ntohs(cksum_update(check_word("checksum", checksum), check_word("old_word", old_word),
                              check_word("new_word", new_word)))


def use_fast_path(on: bool = True) -> bool:
    """Turn the vector path on (if this processor has AVX2) or off; returns whether it is on now. For tests and benchmarks."""
    global ulck_vector_on
    ulck_vector_on = on and ulck_has_avx2()
    return bool(ulck_vector_on)


def repeat(name: str, data, int rounds) -> int:
    """Run the sum ``name`` (fast, portable or naive) ``rounds`` times inside C, so that a benchmark measures no calls."""
    cdef add_fn add = cksum_add
    cdef Py_buffer view
    cdef uint64_t acc = 0
    cdef int i
    if name == "portable":
        add = cksum_add_portable
    elif name == "naive":
        add = cksum_naive
    elif name != "fast":
        raise ValueError(f"no sum named {name!r}: take fast, portable or naive")
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            for i in range(rounds):
                acc = add(<const uint8_t *>view.buf, <size_t>view.len, acc)
    finally:
        PyBuffer_Release(&view)
    return ntohs(cksum_fold(acc))
