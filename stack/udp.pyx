"""UDP's receiving side (RFC 768): datagrams queued within a limit on the memory they really occupy.

Call order: udp_input for each parsed packet, udp_ready to learn what can be had, udp_read or udp_read_seg to take it.
Small datagrams are copied so that their slots return at once; a large one keeps its slot until it was read; the pieces
of a train share one slot and are copied apart.
"""

import os

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, ENOBUFS
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from ulnet.kernelshim.link cimport UL_FRAME_CSUM_OK, UL_FRAME_CSUM_PARTIAL, UL_FRAME_GSO_UDP, UL_SLOT_NONE
from ulnet.stack.buf cimport bufpool_destroy, bufpool_init, bufpool_relieve, rxq_append, rxq_clear, rxq_take, rxseg_free
from ulnet.stack.types cimport UL_ERROR, UL_IPPROTO_UDP, UL_READABLE, UL_WRITABLE
from ulnet.stack.wire cimport ETH_HEADER_BYTES, ETHERTYPE_IPV4, ipv4_parse, ipv4_pkt, load16, udp_parse

cdef enum:
    TAKE_WHOLE = 0x7FFFFFFF


cdef udp_pcb *udp_new(uint32_t rcvbuf_bytes) noexcept nogil:
    cdef udp_pcb *u = <udp_pcb *>calloc(1, sizeof(udp_pcb))
    if u != NULL:
        u.rcvbuf_bytes = rcvbuf_bytes
    return u


cdef void udp_free(bufpool *p, udp_pcb *u) noexcept nogil:
    rxq_clear(p, &u.rcv)
    free(u)


cdef int accept_one(bufpool *p, udp_pcb *u, const uint8_t *data, uint32_t n, uint16_t sport, const ul_addr *src,
                    const ul_rx *frame, bint *held) noexcept nogil:
    cdef int code
    # An empty queue takes one datagram of any size, or one larger than the limit could never arrive.
    if u.rcv.count and u.rcv.mem_bytes + n > u.rcvbuf_bytes:
        u.dropped_full += 1
        return -ENOBUFS
    code = rxq_append(p, &u.rcv, data, n, 0, frame, False, held)
    if code < 0:
        u.dropped_full += 1
        return code
    u.rcv.tail.raddr = src[0]
    u.rcv.tail.rport = sport
    u.rcv.tail.ttl = u.in_ttl
    u.rcv.tail.tos = u.in_tos
    u.rcv.tail.stamp_ns = u.in_stamp_ns
    u.datagrams_in += 1
    u.bytes_in += n
    return 0


cdef int udp_input(bufpool *p, udp_pcb *u, const udp_pkt *pkt, const ul_addr *src, const ul_rx *frame, bint *held) noexcept nogil:
    cdef uint32_t piece, at = 0, n
    cdef int code, result
    cdef bint kept = False
    held[0] = False
    if frame == NULL or not frame.flags & UL_FRAME_GSO_UDP or frame.gso_size_bytes == 0 or pkt.len_bytes <= frame.gso_size_bytes:
        return accept_one(p, u, pkt.data, pkt.len_bytes, pkt.sport, src, frame, held)
    piece = frame.gso_size_bytes
    result = -ENOBUFS
    while at < pkt.len_bytes:
        n = piece if pkt.len_bytes - at >= piece else pkt.len_bytes - at
        # No frame: its slot cannot belong to several datagrams, so each is a copy.
        code = accept_one(p, u, pkt.data + at, n, pkt.sport, src, NULL, &kept)
        if code == 0:
            result = 0
        elif result < 0:
            result = code
        at += n
    if frame.slot != UL_SLOT_NONE:
        p.last_slot = frame.slot             # where the ring is now; rxq_append did not see the frame
    return result


cdef uint32_t udp_ready(const udp_pcb *u) noexcept nogil:
    cdef uint32_t ready = UL_WRITABLE
    if u.rcv.count:
        ready |= UL_READABLE
    if u.so_error:
        ready |= UL_ERROR
    return ready


cdef void udp_icmp(udp_pcb *u, int error) noexcept nogil:
    u.so_error = error


cdef int udp_so_error(udp_pcb *u, bint clear) noexcept nogil:
    cdef int error = u.so_error
    if clear:
        u.so_error = 0
    return error


cdef Py_ssize_t udp_read(bufpool *p, udp_pcb *u, uint8_t *out, size_t n, bint peek, ul_addr *src, uint16_t *sport,
                         uint32_t *full_bytes) noexcept nogil:
    cdef rxseg *s
    if u.so_error:
        return udp_so_error(u, True)
    s = u.rcv.head
    if s == NULL:
        return -EAGAIN
    if src != NULL:
        src[0] = s.raddr
    if sport != NULL:
        sport[0] = s.rport
    if full_bytes != NULL:
        full_bytes[0] = s.len_bytes
    if n > s.len_bytes:
        n = s.len_bytes
    if n:
        memcpy(out, s.data, n)
    if not peek:
        rxseg_free(p, rxq_take(p, &u.rcv, TAKE_WHOLE))
    return <Py_ssize_t>n


cdef rxseg *udp_read_seg(bufpool *p, udp_pcb *u) noexcept nogil:
    return rxq_take(p, &u.rcv, TAKE_WHOLE)


# ---- The Python face ----

cdef class DatagramQueue:
    """A UDP receive queue over a link, without an engine: for tests and tools.

    ``rcvbuf`` is the limit in bytes of memory. Frames that are not a good UDP packet are dropped and counted in ``bad``.
    """

    def __cinit__(self, Link link not None, int rcvbuf=212992):
        self.link = link
        bufpool_init(&self.pool, &link.ops)
        self.pcb = udp_new(rcvbuf)
        if self.pcb == NULL:
            raise MemoryError("no memory for a UDP control block")

    def __dealloc__(self):
        if self.pcb != NULL:
            udp_free(&self.pool, self.pcb)
            bufpool_destroy(&self.pool)

    def poll(self) -> int:
        """Take in every frame the link has now; returns how many there were."""
        cdef ul_rx rx
        cdef ipv4_pkt ip
        cdef udp_pkt pkt
        cdef bint held
        cdef int frames = 0
        while self.link.ops.recv(self.link.ops.ctx, &rx) == 1:
            frames += 1
            held = False
            if rx.len_bytes < ETH_HEADER_BYTES or load16(rx.data + 12) != ETHERTYPE_IPV4 or \
                    ipv4_parse(rx.data + ETH_HEADER_BYTES, rx.len_bytes - ETH_HEADER_BYTES, &ip) < 0 or \
                    ip.proto != UL_IPPROTO_UDP or \
                    udp_parse(&ip, not rx.flags & (UL_FRAME_CSUM_PARTIAL | UL_FRAME_CSUM_OK), &pkt) < 0:
                self.bad += 1
            else:
                udp_input(&self.pool, self.pcb, &pkt, &ip.src, &rx, &held)
            if not held and rx.slot != UL_SLOT_NONE:
                self.link.ops.release(self.link.ops.ctx, rx.slot)
        bufpool_relieve(&self.pool)
        return frames

    def read_into(self, buffer, peek: bool = False) -> tuple[int, int, tuple[str, int]]:
        """One datagram into a writable buffer: bytes copied, its real length, its sender.

        Raises BlockingIOError when there is none, or the OSError that an ICMP message brought.
        """
        cdef Py_buffer view
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef uint32_t full = 0
        cdef Py_ssize_t n
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            n = udp_read(&self.pool, self.pcb, <uint8_t *>view.buf, <size_t>view.len, peek, &src, &sport, &full)
        finally:
            PyBuffer_Release(&view)
        if n < 0:
            raise OSError(-n, os.strerror(-n))
        return n, full, (f"{src.b[12]}.{src.b[13]}.{src.b[14]}.{src.b[15]}", sport)

    def read(self) -> bytes:
        """The oldest datagram, taken whole from where it lies. Raises BlockingIOError when there is none."""
        cdef rxseg *s = udp_read_seg(&self.pool, self.pcb)
        if s == NULL:
            raise BlockingIOError(EAGAIN, os.strerror(EAGAIN))
        try:
            return (<const char *>s.data)[:s.len_bytes]
        finally:
            rxseg_free(&self.pool, s)

    def icmp(self, error: int) -> None:
        """As if an ICMP error with this (positive) errno had arrived."""
        udp_icmp(self.pcb, -error)

    @property
    def ready(self) -> int:
        """UL_READABLE 1, UL_WRITABLE 2, UL_ERROR 4."""
        return udp_ready(self.pcb)

    def counters(self) -> dict[str, int]:
        return {
            "datagrams_in": self.pcb.datagrams_in,
            "bytes_in": self.pcb.bytes_in,
            "dropped_full": self.pcb.dropped_full,
            "queued": self.pcb.rcv.count,
            "queued_bytes": self.pcb.rcv.len_bytes,
            "memory_bytes": self.pcb.rcv.mem_bytes,
            "slots_held": self.pool.held,
            "copied_bytes": self.pool.copied_bytes,
            "live_blocks": self.pool.live_blocks,
        }
