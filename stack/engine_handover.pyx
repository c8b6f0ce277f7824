"""Hand-over of sessions between address spaces (SOSP 1993, section 3.2).

The state is a head, then for TCP what tcp_migrate writes, for UDP each unread datagram: 16 bytes address, 2 port (big
endian), 4 length (little endian), payload.

The exporter remembers the flow as foreign, so that a frame that still comes here goes after its session;
the importer replays frames that were faster than it.
"""

from cpython.ref cimport PyObject
from libc.errno cimport EBADF, EINVAL, EISCONN, ENOMEM, ENOTCONN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ulnet.stack.buf cimport rxq_append, rxqueue, rxseg
from ulnet.stack.engine_core cimport (
    PHASE_EMBRYONIC, PHASE_OPEN, PHASE_QUEUED, ROLE_FOREIGN, ROLE_SHARED, ROLE_SHELL, ROLE_TCP, ROLE_UDP, clock_now, engine_tick,
    foreign_arm, session_end, session_fd_free, session_find, session_insert, session_new, session_ref, session_touch,
    session_unref,
)
from ulnet.stack.engine_wait cimport waiters_wake
from ulnet.stack.statpage cimport stat_record
from ulnet.stack.tcp cimport tcp_export, tcp_export_bytes, tcp_import, tcp_revive, tcp_state
from ulnet.stack.tcp_cb cimport TCP_SYN_RECEIVED
from ulnet.stack.types cimport UL_IPPROTO_TCP, UL_IPPROTO_UDP
from ulnet.stack.udp cimport udp_new, udp_pcb

cdef extern from "Python.h":
    PyObject *bytes_new "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t n) except NULL
    char *bytes_data "PyBytes_AS_STRING"(PyObject *o) nogil

cdef enum:
    STATE_MAGIC = 0x554C5332       # "ULS2"
    RECORD_BYTES = 22              # before each datagram's payload
    DATAGRAM_BYTES = 65507
    PIECE_BYTES = 65536
    RCVBUF_MAX_BYTES = 0x40000000

cdef int64_t FOREIGN_NS = 2000000000   # a library remembers what it gave back for so long

ctypedef struct state_head:
    uint32_t magic
    uint32_t head_bytes
    flow_key flow
    uint8_t ttl
    uint8_t tos
    uint8_t shut_rd                # UDP, these three
    uint8_t pad[5]
    uint32_t rcvbuf_bytes
    int32_t so_error


cdef PyObject *room_for(size_t n) noexcept with gil:
    # At once as what the program gets: a state of megabytes is worth no second copy, and no second lot of fresh pages.
    try:
        return bytes_new(NULL, <Py_ssize_t>n)
    except MemoryError:
        return NULL


cdef int handover_export(engine *e, ul_session *s, PyObject **out) noexcept nogil:
    cdef state_head head
    cdef size_t room
    cdef uint8_t *at
    if s.role != ROLE_TCP and s.role != ROLE_UDP:
        return -ENOTCONN
    engine_tick(e)
    room = tcp_export_bytes(s.tcp) if s.role == ROLE_TCP else datagrams_bytes(s.udp)
    out[0] = room_for(sizeof(head) + room)
    if out[0] == NULL:
        return -ENOMEM
    at = <uint8_t *>bytes_data(out[0])
    memset(&head, 0, sizeof(head))
    head.magic = STATE_MAGIC
    head.head_bytes = sizeof(head)
    head.flow = s.flow
    head.ttl = s.ttl
    head.tos = s.tos
    if s.role == ROLE_UDP:
        head.shut_rd = s.shut_rd
        head.rcvbuf_bytes = s.udp.rcvbuf_bytes
        head.so_error = s.udp.so_error
        datagrams_export(s.udp, at + sizeof(head))
    else:
        tcp_export(&e.env, s.tcp, at + sizeof(head))
    memcpy(at, &head, sizeof(head))
    session_ref(s)
    s.closing = 1
    waiters_wake(e, s, 0xFF)
    session_end(e, s, 0)
    session_fd_free(e, s)
    foreign_add(e, &head.flow, s.id)
    session_unref(e, s)
    return 0


cdef ul_session *handover_embryo(engine *e, ul_session *listener) noexcept nogil:
    """One of the listener's sessions whose handshake is under way, with a reference; it leaves the listener."""
    cdef ul_session *s
    if not listener.embryonic:
        return NULL
    s = e.all
    while s != NULL:
        if s.listener == listener and s.phase == PHASE_EMBRYONIC:
            session_ref(s)
            s.listener = NULL
            s.phase = PHASE_OPEN
            listener.embryonic -= 1
            session_unref(e, listener)
            return s
        s = s.all_next
    return NULL


cdef size_t datagrams_bytes(const udp_pcb *u) noexcept nogil:
    return RECORD_BYTES * <size_t>u.rcv.count + <size_t>u.rcv.len_bytes


cdef void datagrams_export(const udp_pcb *u, uint8_t *out) noexcept nogil:
    cdef rxseg *seg = u.rcv.head
    while seg != NULL:
        memcpy(out, seg.raddr.b, 16)
        out[16] = <uint8_t>(seg.rport >> 8)
        out[17] = <uint8_t>(seg.rport & 0xFF)
        memcpy(out + 18, &seg.len_bytes, 4)
        memcpy(out + RECORD_BYTES, seg.data, seg.len_bytes)
        out += RECORD_BYTES + seg.len_bytes
        seg = seg.next


cdef int datagrams_import(engine *e, udp_pcb *u, const uint8_t *p, size_t left) noexcept nogil:
    """Appended whatever the buffer's limit: they had room where they came from."""
    cdef uint32_t n
    cdef bint held
    while left:
        if left < RECORD_BYTES:
            return -EINVAL
        memcpy(&n, p + 18, 4)
        if n > DATAGRAM_BYTES or n > left - RECORD_BYTES:
            return -EINVAL
        if rxq_append(&e.bufs, &u.rcv, p + RECORD_BYTES, n, 0, NULL, False, &held) < 0:
            return -ENOMEM
        memcpy(u.rcv.tail.raddr.b, p, 16)
        u.rcv.tail.rport = <uint16_t>((p[16] << 8) | p[17])
        p += RECORD_BYTES + n
        left -= RECORD_BYTES + n
    return 0


cdef int stream_prepend(engine *e, rxqueue *q, const uint8_t *p, size_t n) noexcept nogil:
    """Bytes that were received before those in the queue. What was announced to the peer stays announced."""
    cdef rxqueue front
    cdef uint32_t part
    cdef bint held
    cdef int rc = 0
    if n == 0:
        return 0
    memset(&front, 0, sizeof(front))
    while n and rc == 0:
        part = <uint32_t>n if n < PIECE_BYTES else PIECE_BYTES
        rc = rxq_append(&e.bufs, &front, p, part, 0, NULL, True, &held)
        p += part
        n -= part
    if front.head == NULL:
        return rc
    front.tail.next = q.head
    if q.head == NULL:
        q.tail = front.tail
    else:
        # Its free room lies in front of what follows now.
        front.tail.cap_bytes = 0
    q.head = front.head
    q.len_bytes += front.len_bytes
    q.mem_bytes += front.mem_bytes
    q.count += front.count
    return rc


cdef int handover_import(engine *e, ul_session *s, const uint8_t *p, size_t n, uint64_t session_id, const uint8_t *prefix,
                         size_t prefix_bytes) noexcept nogil:
    # Sender and receiver are of one build: the head's size is its version.
    cdef state_head head
    cdef int err = 0
    cdef int rc
    if n < sizeof(head):
        return -EINVAL
    memcpy(&head, p, sizeof(head))
    if head.magic != STATE_MAGIC or head.head_bytes != sizeof(head) or head.flow.proto != s.flow.proto:
        return -EINVAL
    if s.role != ROLE_SHELL and s.role != ROLE_SHARED:      # shared: it comes home
        return -EISCONN
    if s.closing:
        return -EBADF
    engine_tick(e)
    if head.flow.proto == UL_IPPROTO_UDP:
        if head.shut_rd > 1 or head.so_error > 0 or head.so_error < -4095 or head.rcvbuf_bytes > RCVBUF_MAX_BYTES:
            return -EINVAL
        s.udp = udp_new(head.rcvbuf_bytes)
        if s.udp == NULL:
            return -ENOMEM
        s.role = ROLE_UDP
        s.shut_rd = head.shut_rd
        s.udp.so_error = head.so_error
        s.cfg.rcvbuf_bytes = head.rcvbuf_bytes
        err = datagrams_import(e, s.udp, prefix, prefix_bytes)
        if err == 0:
            err = datagrams_import(e, s.udp, p + sizeof(head), n - sizeof(head))
    else:
        s.tcp = tcp_import(&e.env, p + sizeof(head), n - sizeof(head), s, &err)
        if s.tcp == NULL:
            return err if err else -EINVAL
        s.role = ROLE_TCP
        s.shut_rd = 0
        err = stream_prepend(e, &s.tcp.rcv, prefix, prefix_bytes)
    if err < 0:
        session_end(e, s, err)
        return err
    s.flow = head.flow
    s.ttl = head.ttl
    s.tos = head.tos
    s.id = session_id
    s.phase = PHASE_OPEN
    s.shared_shut_wr = 0
    rc = session_insert(e, s)
    if rc < 0:
        session_end(e, s, rc)
    return rc


cdef int handover_revive(engine *e, ul_session *s, const flow_key *flow, const stat_record *last, uint64_t session_id,
                         bint *in_doubt) noexcept nogil:
    cdef int err = 0
    if s.role != ROLE_SHELL or s.closing:
        return -EISCONN
    if last.unsettled:
        return -EINVAL
    engine_tick(e)
    s.tcp = tcp_revive(&e.env, &last.tcp, &last.remains, s, in_doubt, &err)
    if s.tcp == NULL:
        return err if err else -EINVAL
    s.role = ROLE_TCP
    s.flow = flow[0]                       # as the caller knows it, not as the record says
    s.id = session_id
    s.phase = PHASE_OPEN
    err = session_insert(e, s)
    if err < 0:
        session_end(e, s, err)
    return err


cdef void handover_enqueue(engine *e, ul_session *listener, ul_session *s) noexcept nogil:
    """Into the listener's queue, or, with its handshake under way, among those that come there by themselves."""
    s.listener = listener
    session_ref(listener)
    if tcp_state(s.tcp) == TCP_SYN_RECEIVED:
        s.phase = PHASE_EMBRYONIC
        listener.embryonic += 1
        session_touch(e, s)
        return
    s.phase = PHASE_QUEUED
    session_ref(s)                         # the queue's
    if listener.accept_tail != NULL:
        listener.accept_tail.accept_next = s
    else:
        listener.accept_head = s
    listener.accept_tail = s
    listener.accept_count += 1
    session_touch(e, listener)


cdef void foreign_add(engine *e, const flow_key *flow, uint64_t session_id) noexcept nogil:
    cdef ul_session *mark
    if session_find(e, flow) != NULL:
        return
    mark = session_new(e, flow.proto)
    if mark == NULL:
        return
    mark.flow = flow[0]
    mark.role = ROLE_FOREIGN
    mark.id = session_id
    session_insert(e, mark)
    if e.library:
        foreign_arm(e, mark, clock_now() + FOREIGN_NS)
    session_unref(e, mark)


cdef void foreign_forget(engine *e, const flow_key *flow) noexcept nogil:
    cdef ul_session *mark = session_find(e, flow)
    if mark != NULL and mark.role == ROLE_FOREIGN:
        session_end(e, mark, 0)
