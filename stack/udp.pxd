# UDP (RFC 768): a queue of received datagrams with a byte limit. Sending is building one packet: the engine does it.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport Link, ul_rx
from ulnet.stack.buf cimport bufpool, rxqueue, rxseg
from ulnet.stack.types cimport ul_addr
from ulnet.stack.wire cimport udp_pkt

ctypedef struct udp_pcb:
    rxqueue rcv
    uint32_t rcvbuf_bytes
    int so_error                   # negative errno from ICMP, reported once
    uint64_t datagrams_in
    uint64_t datagrams_out
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t dropped_full          # no room in the receive buffer
    # of the packet that udp_input is given next, copied to each of its datagrams
    uint8_t in_ttl
    uint8_t in_tos
    int64_t in_stamp_ns

cdef udp_pcb *udp_new(uint32_t rcvbuf_bytes) noexcept nogil
cdef void udp_free(bufpool *p, udp_pcb *u) noexcept nogil
# Splits trains (gso_size) into datagrams. *held as in rxq_append. 0; -ENOBUFS or -ENOMEM when none of it was
# taken (each datagram refused is counted in dropped_full; the queue holds at most one more than its limit).
cdef int udp_input(bufpool *p, udp_pcb *u, const udp_pkt *pkt, const ul_addr *src, const ul_rx *frame, bint *held) noexcept nogil
# UL_WRITABLE always; UL_READABLE also for an empty datagram; UL_ERROR while so_error is pending.
cdef uint32_t udp_ready(const udp_pcb *u) noexcept nogil
# ICMP told us (negative errno): the next udp_read, or udp_so_error, reports it.
cdef void udp_icmp(udp_pcb *u, int error) noexcept nogil
cdef int udp_so_error(udp_pcb *u, bint clear) noexcept nogil
# One datagram: bytes copied, *full_bytes its real length (MSG_TRUNC); a pending so_error first, and once;
# -EAGAIN none. src, sport and full_bytes may be NULL.
cdef Py_ssize_t udp_read(bufpool *p, udp_pcb *u, uint8_t *out, size_t n, bint peek, ul_addr *src, uint16_t *sport,
                         uint32_t *full_bytes) noexcept nogil
# The oldest datagram whole, without a copy; the caller frees it with rxseg_free. NULL: none.
cdef rxseg *udp_read_seg(bufpool *p, udp_pcb *u) noexcept nogil

# A receive queue fed by a link, by itself: for tests and tools.
cdef class DatagramQueue:
    cdef Link link
    cdef bufpool pool
    cdef udp_pcb *pcb
    cdef readonly int bad
