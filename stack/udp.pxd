# UDP (RFC 768): a queue of received datagrams with a byte limit. Sending is building one packet: the engine does it.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_rx
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

cdef udp_pcb *udp_new(uint32_t rcvbuf_bytes) noexcept nogil
cdef void udp_free(bufpool *p, udp_pcb *u) noexcept nogil
# Splits trains (gso_size) into datagrams. *held as in rxq_append.
cdef int udp_input(bufpool *p, udp_pcb *u, const udp_pkt *pkt, const ul_addr *src, const ul_rx *frame, bint *held) noexcept nogil
cdef uint32_t udp_ready(const udp_pcb *u) noexcept nogil
# One datagram: bytes copied, *full_bytes its real length (MSG_TRUNC); -EAGAIN none
cdef Py_ssize_t udp_read(bufpool *p, udp_pcb *u, uint8_t *out, size_t n, bint peek, ul_addr *src, uint16_t *sport,
                         uint32_t *full_bytes) noexcept nogil
cdef rxseg *udp_read_seg(bufpool *p, udp_pcb *u) noexcept nogil
