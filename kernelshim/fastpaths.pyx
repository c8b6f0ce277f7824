"""Every fast path forced off or on: ``ULNET_FAST=off`` or ``ULNET_FAST=on`` in the environment, for tests.

A fast path that is only taken under load, or only for large data, is tested by luck. So the whole test suite runs with
each of them always taken and with none (``make test-fast-on``, ``make test-fast-off``). Read once, when imported: whoever
has a fast path asks at import or when a stack is made, and nothing is asked on the way of a packet.

======================  ==========================  =========================  ============================
fast path               as usual                    off                        on
======================  ==========================  =========================  ============================
polling before sleep    50 us, while it pays        never                      50 us at least, always
packet interface        as asked, "ipf"             "ipc": a call a packet     "ipf": the ring, polled
received data in slots  from 4 KiB                  copied at once             from 1 byte
sent data held          from 4 and 16 KiB           copied                     from 1 byte
relay's blocks          from 16 KiB                 copied                     as usual
segmentation, trains    as the link offers          frames of the MTU          as usual: a link must offer it
checksum by the link    as the link offers          computed here              as usual
checksum by vectors     where there is AVX2         64-bit words               as usual
======================  ==========================  =========================  ============================

Large datagrams stay whole up to the link where it can cut them: of pieces cut here the guard passes only the first.
"""

import os

from libc.stdint cimport int64_t, uint32_t

from ulnet.kernelshim.link cimport UL_LINK_TSO, UL_LINK_USO

cdef enum:
    SPIN_NS = 50000
    NEVER = 0xFFFFFFFF

VARIABLE = "ULNET_FAST"
MODE = os.environ.get(VARIABLE, "")
if MODE not in ("", "off", "on"):
    raise ValueError(f"{VARIABLE}={MODE!r}: use off or on, or leave it unset")

cdef int mode = {"off": -1, "": 0, "on": 1}[MODE]


cdef uint32_t fast_from_bytes(uint32_t usual) noexcept nogil:
    return usual if mode == 0 else 1 if mode > 0 else <uint32_t>NEVER


cdef uint32_t fast_features(uint32_t usual) noexcept nogil:
    return usual if mode >= 0 else usual & ~<uint32_t>(UL_LINK_TSO | UL_LINK_USO)


cdef int64_t fast_spin_ns(int64_t usual) noexcept nogil:
    if mode < 0:
        return 0
    return SPIN_NS if mode > 0 and usual < SPIN_NS else usual


cdef bint fast_always() noexcept nogil:
    return mode > 0


cdef bint fast_link_sums() noexcept nogil:
    return mode >= 0


cdef bint fast_vector() noexcept nogil:
    return mode >= 0


def interface(usual: str) -> str:
    """The packet interface to use where ``usual`` was asked for."""
    return usual if mode == 0 else "ipf" if mode > 0 else "ipc"
