"""IPv4 reassembly (RFC 791 section 3.2, RFC 815): fragments in an ordered list for each datagram, bounded in time and memory.

Call order: ip_reass_input for each fragment; ip_reass_timers when ip_reass_deadline has passed, then ip_reass_expired
until it answers 0.
Overlaps end the datagram and whatever else comes of it (RFC 5722 section 4, RFC 1858: they only serve to slip something
past a filter); a true duplicate is ignored, as RFC 8200 section 4.5 allows. The oldest datagrams make room for new ones.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport INT64_MAX
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from ulnet.stack.types cimport addr_equal, ul_addr
from ulnet.stack.wire cimport IPV4_HEADER_BYTES, WIRE_OK, ipv4_emit, ipv4_parse

cdef enum:
    MEMORY_MAX_BYTES = 4194304       # all fragments and their bookkeeping; Linux's ipfrag_high_thresh
    DATAGRAMS_MAX = 256
    PIECES_MAX = 512                 # of one datagram; 65,535 bytes at the usual smallest MTU of 576 take 119
    IP_TOTAL_MAX = 65535
    EXPIRED_MAX = 8                  # complaints remembered; their rate is limited by whoever sends them
    QUOTE_BYTES = 28
    IP_MF = 0x2000
    IP_DF = 0x4000

cdef int64_t TIMEOUT_NS = 30 * <int64_t>1000000000     # Linux's ipfrag_time; differs: RFC 1122 3.3.2 says 60 to 120 s


ctypedef struct piece:               # its payload follows it in memory
    piece *next
    uint32_t off
    uint32_t n

ctypedef struct datagram:
    datagram *next
    ul_addr src
    ul_addr dst
    int64_t deadline_ns
    piece *first                     # ordered, without overlaps
    piece *last
    uint32_t count
    uint32_t have_bytes
    uint32_t end_bytes               # payload length; 0 until the last fragment is here
    uint32_t hdr_bytes               # of the first fragment's header, and so of the whole packet
    uint16_t ident
    uint8_t proto
    uint8_t refused                  # overlapped: swallows what still comes, until its time is over
    uint8_t ttl
    uint8_t tos
    uint8_t dont_fragment

ctypedef struct expired:
    ul_addr src
    ul_addr dst
    uint8_t quote[QUOTE_BYTES]

ctypedef struct datagrams:           # in order of arrival, which is also that of the deadlines
    datagram *head
    datagram *tail
    uint32_t count
    uint32_t expired_count
    expired late[EXPIRED_MAX]


cdef ip_reass *ip_reass_new() noexcept nogil:
    cdef ip_reass *r = <ip_reass *>calloc(1, sizeof(ip_reass))
    if r == NULL:
        return NULL
    r.table = calloc(1, sizeof(datagrams))
    if r.table == NULL:
        free(r)
        return NULL
    return r


cdef void drop_pieces(ip_reass *r, datagram *d) noexcept nogil:
    cdef piece *f = d.first
    cdef piece *following
    while f != NULL:
        following = f.next
        r.held_bytes -= sizeof(piece) + f.n
        free(f)
        f = following
    d.first = d.last = NULL
    d.count = 0


cdef void drop_datagram(ip_reass *r, datagram *d, datagram *before) noexcept nogil:
    cdef datagrams *t = <datagrams *>r.table
    if before != NULL:
        before.next = d.next
    else:
        t.head = d.next
    if t.tail == d:
        t.tail = before
    t.count -= 1
    drop_pieces(r, d)
    r.held_bytes -= sizeof(datagram)
    free(d)


cdef void ip_reass_free(ip_reass *r) noexcept nogil:
    cdef datagrams *t = <datagrams *>r.table
    while t.head != NULL:
        drop_datagram(r, t.head, NULL)
    free(t)
    free(r)


cdef void refuse(ip_reass *r, datagram *d) noexcept nogil:
    r.overlaps += 1
    drop_pieces(r, d)
    d.refused = 1


cdef bint make_room(ip_reass *r, const datagram *keep, size_t need) noexcept nogil:
    """Drop the oldest datagrams but `keep` until `need` more bytes fit."""
    cdef datagrams *t = <datagrams *>r.table
    while r.held_bytes + need > MEMORY_MAX_BYTES:
        if t.head == NULL:
            return False
        r.overflow += 1
        if t.head != keep:
            drop_datagram(r, t.head, NULL)
        elif t.head.next != NULL:
            drop_datagram(r, t.head.next, t.head)
        else:
            return False
    return True


cdef datagram *find(ip_reass *r, const ipv4_pkt *frag, datagram **before) noexcept nogil:
    cdef datagram *d = (<datagrams *>r.table).head
    before[0] = NULL
    while d != NULL:
        if d.ident == frag.ident and d.proto == frag.proto and addr_equal(&d.src, &frag.src) and addr_equal(&d.dst, &frag.dst):
            return d
        before[0] = d
        d = d.next
    return NULL


cdef datagram *start(ip_reass *r, const ipv4_pkt *frag, int64_t now_ns, datagram **before) noexcept nogil:
    cdef datagrams *t = <datagrams *>r.table
    cdef datagram *d
    if t.count >= DATAGRAMS_MAX:
        r.overflow += 1
        drop_datagram(r, t.head, NULL)
    if not make_room(r, NULL, sizeof(datagram)):
        return NULL
    d = <datagram *>calloc(1, sizeof(datagram))
    if d == NULL:
        r.overflow += 1
        return NULL
    d.src = frag.src
    d.dst = frag.dst
    d.ident = frag.ident
    d.proto = frag.proto
    d.deadline_ns = now_ns + TIMEOUT_NS
    before[0] = t.tail
    if t.tail != NULL:
        t.tail.next = d
    else:
        t.head = d
    t.tail = d
    t.count += 1
    r.held_bytes += sizeof(datagram)
    return d


cdef bint insert(ip_reass *r, datagram *d, const ipv4_pkt *frag) noexcept nogil:
    """Put the fragment in its place. False: it was not taken (refused, doubled, no room), all of it counted but doubles."""
    cdef uint32_t off = frag.frag_off_bytes
    cdef uint32_t n = frag.payload_bytes
    cdef piece *prev = NULL
    cdef piece *at = d.first
    cdef piece *f
    if d.last != NULL and off >= d.last.off + d.last.n:          # in order: the usual case
        prev = d.last
        at = NULL
    else:
        while at != NULL and at.off < off:
            prev = at
            at = at.next
    if at != NULL and at.off == off and at.n == n and memcmp(at + 1, frag.payload, n) == 0 and \
            (frag.more_fragments or d.end_bytes == off + n):
        return False
    if (prev != NULL and prev.off + prev.n > off) or (at != NULL and off + n > at.off):
        refuse(r, d)
        return False
    # The last fragment says where the datagram ends, once; nothing may lie behind.
    if d.end_bytes and (off + n > d.end_bytes or not frag.more_fragments):
        refuse(r, d)
        return False
    if not frag.more_fragments and at != NULL:
        refuse(r, d)
        return False
    if d.count >= PIECES_MAX:
        r.overflow += 1
        drop_pieces(r, d)
        d.refused = 1
        return False
    if not make_room(r, d, sizeof(piece) + n):
        return False
    f = <piece *>malloc(sizeof(piece) + n)
    if f == NULL:
        r.overflow += 1
        return False
    f.off = off
    f.n = n
    memcpy(f + 1, frag.payload, n)
    f.next = at
    if prev != NULL:
        prev.next = f
    else:
        d.first = f
    if at == NULL:
        d.last = f
    d.count += 1
    d.have_bytes += n
    r.held_bytes += sizeof(piece) + n
    if not frag.more_fragments:
        d.end_bytes = off + n
    if off == 0:                                                 # RFC 791: the first fragment's header counts
        d.hdr_bytes = frag.hdr_bytes
        d.ttl = frag.ttl
        d.tos = frag.tos
        d.dont_fragment = frag.dont_fragment
    return True


cdef uint8_t *join(const datagram *d, ipv4_pkt *out) noexcept nogil:
    cdef uint8_t *data = <uint8_t *>malloc(d.end_bytes)
    cdef const piece *f = d.first
    if data == NULL:
        return NULL
    while f != NULL:
        memcpy(data + f.off, f + 1, f.n)
        f = f.next
    out.src = d.src
    out.dst = d.dst
    out.payload = data
    out.payload_bytes = d.end_bytes
    out.hdr_bytes = d.hdr_bytes
    out.ident = d.ident
    out.frag_off_bytes = 0
    out.more_fragments = 0
    out.dont_fragment = d.dont_fragment
    out.proto = d.proto
    out.ttl = d.ttl
    out.tos = d.tos
    return data


cdef uint8_t *ip_reass_input(ip_reass *r, const ipv4_pkt *frag, int64_t now_ns, ipv4_pkt *out) noexcept nogil:
    cdef datagram *before
    cdef datagram *d
    cdef uint8_t *data
    if frag.payload_bytes == 0:
        return NULL                          # ipv4_parse lets no empty fragment through
    ip_reass_timers(r, now_ns)
    d = find(r, frag, &before)
    if d == NULL:
        d = start(r, frag, now_ns, &before)
        if d == NULL:
            return NULL
    if d.refused or not insert(r, d, frag) or d.end_bytes == 0 or d.have_bytes != d.end_bytes:
        return NULL
    # No overlaps and nothing behind the end, so as many bytes as it has are all of them.
    data = NULL
    if d.hdr_bytes + d.end_bytes <= IP_TOTAL_MAX:
        data = join(d, out)
    if data != NULL:
        r.done += 1
    else:
        r.overflow += 1
    # insert may have made room: what stood before d may be gone.
    find(r, frag, &before)
    drop_datagram(r, d, before)
    return data


cdef int64_t ip_reass_deadline(const ip_reass *r) noexcept nogil:
    cdef const datagrams *t = <const datagrams *>r.table
    return t.head.deadline_ns if t.head != NULL else INT64_MAX


cdef void ip_reass_timers(ip_reass *r, int64_t now_ns) noexcept nogil:
    cdef datagrams *t = <datagrams *>r.table
    while t.head != NULL and t.head.deadline_ns <= now_ns:
        if not t.head.refused:
            r.timeouts += 1
            remember_expired(t, t.head)
        drop_datagram(r, t.head, NULL)


cdef void remember_expired(datagrams *t, const datagram *d) noexcept nogil:
    cdef expired *x
    # Nobody is told about a datagram whose first fragment, with the ports, is not here.
    if d.first == NULL or d.first.off or d.first.n < 8 or t.expired_count == EXPIRED_MAX:
        return
    x = &t.late[t.expired_count]
    t.expired_count += 1
    x.src = d.src
    x.dst = d.dst
    # The header as it came but for its options, which nobody needs to find the sender's session.
    ipv4_emit(x.quote, &d.src, &d.dst, d.proto, IPV4_HEADER_BYTES + d.first.n, d.ident,
              IP_MF | (IP_DF if d.dont_fragment else 0), d.ttl, d.tos)
    memcpy(x.quote + IPV4_HEADER_BYTES, d.first + 1, 8)


cdef uint32_t ip_reass_expired(ip_reass *r, uint8_t *quote28, ul_addr *src, ul_addr *dst) noexcept nogil:
    cdef datagrams *t = <datagrams *>r.table
    if t.expired_count == 0:
        return 0
    t.expired_count -= 1
    src[0] = t.late[t.expired_count].src
    dst[0] = t.late[t.expired_count].dst
    memcpy(quote28, t.late[t.expired_count].quote, QUOTE_BYTES)
    return QUOTE_BYTES


# ---- The Python face ----

cdef class Reassembler:
    """Reassembles IPv4 packets given as bytes (from the IP header on) at times of the caller's own choice."""

    cdef ip_reass *r

    def __cinit__(self):
        self.r = ip_reass_new()
        if self.r == NULL:
            raise MemoryError("no memory for a reassembly table")

    def __dealloc__(self):
        if self.r != NULL:
            ip_reass_free(self.r)

    def input(self, packet, int64_t now_ns) -> bytes | None:
        """The whole IP payload once ``packet`` completes it, else None. Raises ValueError for what is no IPv4 packet."""
        cdef Py_buffer view
        cdef ipv4_pkt frag, whole
        cdef uint8_t *data
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            if ipv4_parse(<const uint8_t *>view.buf, <uint32_t>view.len, &frag) != WIRE_OK:
                raise ValueError(f"{view.len} bytes that are no IPv4 packet")
            data = ip_reass_input(self.r, &frag, now_ns, &whole)
        finally:
            PyBuffer_Release(&view)
        if data == NULL:
            return None
        try:
            return (<const char *>data)[:whole.payload_bytes]
        finally:
            free(data)

    def timers(self, int64_t now_ns) -> None:
        ip_reass_timers(self.r, now_ns)

    def expired(self) -> bytes | None:
        """The IP header and 8 bytes to send back as ICMP Time Exceeded (code 1) for a datagram that timed out, or None."""
        cdef uint8_t quote[QUOTE_BYTES]
        cdef ul_addr src, dst
        return quote[:QUOTE_BYTES] if ip_reass_expired(self.r, quote, &src, &dst) else None

    @property
    def deadline(self) -> int | None:
        """When ``timers`` has something to do, or None."""
        cdef int64_t t = ip_reass_deadline(self.r)
        return None if t == INT64_MAX else t

    def counters(self) -> dict[str, int]:
        return {
            "held_bytes": self.r.held_bytes,
            "timeouts": self.r.timeouts,
            "overlaps": self.r.overlaps,
            "overflow": self.r.overflow,
            "done": self.r.done,
        }
