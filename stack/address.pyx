"""Addresses as people write them and as packets may have them. No table, no state.

Read first: RFC 4291 (2.5.5.2, IPv4 inside 128 bits), RFC 1122 (3.2.1.3) and RFC 6890 (addresses of no single host).
"""

import socket

from libc.string cimport memcmp, memcpy
from ulnet.stack.types cimport addr_from_ipv4

cdef enum:
    V4_PREFIX_BITS = 96          # ::ffff:0:0/96 holds IPv4


cdef bint addr_never_unicast(const ul_addr *a) noexcept nogil:
    """Destinations that no packet leaves this host for: RFC 1122 (3.2.1.3), RFC 6890; multicast has no path yet."""
    if addr_is_ipv4(a):
        return a.b[12] == 0 or a.b[12] == 127 or a.b[12] >= 224
    if a.b[0] == 0xFF:
        return True
    return addr_word(a, 0) == 0 and memcmp(&a.b[8], b"\0\0\0\0\0\0\0", 7) == 0 and a.b[15] <= 1


cdef int addr_from_text(object text, ul_addr *out) except -1:
    cdef bytes raw
    if not isinstance(text, str):
        raise TypeError(f"an address is a str such as '10.0.0.1', not {type(text).__name__}")
    try:
        if ":" in text:
            raw = socket.inet_pton(socket.AF_INET6, text)
            memcpy(out.b, <const uint8_t *>raw, 16)
        else:
            raw = socket.inet_pton(socket.AF_INET, text)
            addr_from_ipv4(out, <const uint8_t *>raw)
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is not an IP address: write it like 10.0.0.1") from None
    return 0


cdef str addr_to_text(const ul_addr *a):
    if addr_is_ipv4(a):
        return f"{a.b[12]}.{a.b[13]}.{a.b[14]}.{a.b[15]}"
    return socket.inet_ntop(socket.AF_INET6, (<const char *>a.b)[:16])


cdef int prefix_wide(const ul_addr *a, object prefix_len) except -1:
    """Prefix length of the 128-bit form; ValueError when it does not fit the family."""
    cdef bint v4 = addr_is_ipv4(a)
    cdef int limit = 32 if v4 else 128
    if not isinstance(prefix_len, int) or not 0 <= prefix_len <= limit:
        raise ValueError(f"prefix length {prefix_len!r} of {addr_to_text(a)} is not within 0..{limit}")
    return prefix_len + (V4_PREFIX_BITS if v4 else 0)


cdef int prefix_narrow(const ul_addr *a, int wide) noexcept nogil:
    return wide - V4_PREFIX_BITS if addr_is_ipv4(a) and wide >= V4_PREFIX_BITS else wide


cdef int mac_from_bytes(object mac, uint8_t *out, bint ours) except -1:
    cdef bytes raw
    if not isinstance(mac, (bytes, bytearray, memoryview)) or len(mac) != 6:
        raise ValueError(f"a MAC address is 6 bytes, not {mac!r}")
    raw = bytes(mac)
    if raw[0] & 1 or (not ours and not any(raw)):
        raise ValueError(f"MAC address {raw.hex(':')} is not that of one host")
    memcpy(out, <const uint8_t *>raw, 6)
    return 0


cdef str network_text(str addr, int host_bits):
    """``addr`` with its last ``host_bits`` bits cleared."""
    family = socket.AF_INET6 if ":" in addr else socket.AF_INET
    raw = socket.inet_pton(family, addr)
    value = int.from_bytes(raw, "big") >> host_bits << host_bits
    return socket.inet_ntop(family, value.to_bytes(len(raw), "big"))
