# Addresses as people write them and as packets may have them: what metastate, ARP and the Python faces share.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from ulnet.stack.types cimport ul_addr

cdef inline uint64_t addr_word(const ul_addr *a, int i) noexcept nogil:
    # an address may stand anywhere: no aligned load
    cdef uint64_t w
    memcpy(&w, &a.b[8 * i], 8)
    return w

cdef inline bint addr_is_ipv4(const ul_addr *a) noexcept nogil:
    return addr_word(a, 0) == 0 and a.b[8] == 0 and a.b[9] == 0 and a.b[10] == 0xFF and a.b[11] == 0xFF

cdef inline bint prefix_covers(const ul_addr *net, int bits, const ul_addr *a) noexcept nogil:
    cdef uint32_t whole
    if bits > 128:
        bits = 128
    whole = bits >> 3
    if memcmp(net.b, a.b, whole) != 0:
        return False
    return not bits & 7 or (net.b[whole] ^ a.b[whole]) >> (8 - (bits & 7)) == 0

# Whether no packet leaves this host for it.
cdef bint addr_never_unicast(const ul_addr *a) noexcept nogil
# ValueError names the bad text.
cdef int addr_from_text(object text, ul_addr *out) except -1
cdef str addr_to_text(const ul_addr *a)
# `addr` with its last host_bits bits cleared.
cdef str network_text(str addr, int host_bits)
# Prefix lengths of the 128-bit form and of the address's own family.
cdef int prefix_wide(const ul_addr *a, object prefix_len) except -1
cdef int prefix_narrow(const ul_addr *a, int wide) noexcept nogil
# Six bytes of one host; all zero only if it is our own. ValueError otherwise.
cdef int mac_from_bytes(object mac, uint8_t *out, bint ours) except -1
