"""Hand-over of TCP sessions between address spaces (SOSP 1993, section 3.2).

The exporter remembers the flow as foreign, so that a frame that still comes here goes after its session;
the importer replays frames that were faster than it.
"""

from libc.errno cimport EBADF, EINVAL, EISCONN, ENOMEM, ENOTCONN
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from ulnet.stack.buf cimport rxq_clear, rxq_push, rxqueue, rxseg, rxseg_new
from ulnet.stack.engine_core cimport (
    PHASE_OPEN, PHASE_QUEUED, ROLE_FOREIGN, ROLE_SHARED, ROLE_SHELL, ROLE_TCP, ROLE_UDP, clock_now, engine_tick, foreign_arm,
    session_end, session_fd_free, session_find, session_insert, session_new, session_ref, session_touch, session_unref,
)
from ulnet.stack.engine_wait cimport waiters_wake
from ulnet.stack.tcp cimport tcp_export, tcp_export_bytes, tcp_import
from ulnet.stack.types cimport UL_IPPROTO_TCP

cdef enum:
    STATE_MAGIC = 0x554C5331       # "ULS1"
    DATAGRAM_HEAD_BYTES = 22       # address, port (big-endian), length
    PREFIX_PART_BYTES = 65536

cdef int64_t FOREIGN_NS = 2000000000   # a library remembers what it gave back for so long

ctypedef struct state_head:
    uint32_t magic
    uint32_t head_bytes
    flow_key flow
    uint8_t ttl
    uint8_t tos
    uint8_t pad[6]


cdef int handover_export(engine *e, ul_session *s, uint8_t **out, size_t *n) noexcept nogil:
    cdef state_head head
    cdef size_t room
    if s.role != ROLE_TCP:
        return -ENOTCONN
    engine_tick(e)
    room = tcp_export_bytes(s.tcp)
    out[0] = <uint8_t *>malloc(sizeof(head) + room)
    if out[0] == NULL:
        return -ENOMEM
    memset(&head, 0, sizeof(head))
    head.magic = STATE_MAGIC
    head.head_bytes = sizeof(head)
    head.flow = s.flow
    head.ttl = s.ttl
    head.tos = s.tos
    memcpy(out[0], &head, sizeof(head))
    n[0] = sizeof(head) + tcp_export(&e.env, s.tcp, out[0] + sizeof(head))
    session_ref(s)
    s.closing = 1
    waiters_wake(e, s, 0xFF)
    session_end(e, s, 0)
    session_fd_free(e, s)
    foreign_add(e, &head.flow, s.id)
    session_unref(e, s)
    return 0


cdef int handover_import(engine *e, ul_session *s, const uint8_t *p, size_t n, uint64_t session_id) noexcept nogil:
    # Sender and receiver are of one build: the head's size is its version.
    cdef state_head head
    cdef int err = 0
    cdef int rc
    if n < sizeof(head):
        return -EINVAL
    memcpy(&head, p, sizeof(head))
    if head.magic != STATE_MAGIC or head.head_bytes != sizeof(head) or head.flow.proto != UL_IPPROTO_TCP:
        return -EINVAL
    if s.role != ROLE_SHELL and s.role != ROLE_SHARED:      # shared: it comes home
        return -EISCONN
    if s.closing:
        return -EBADF
    engine_tick(e)
    s.tcp = tcp_import(&e.env, p + sizeof(head), n - sizeof(head), s, &err)
    if s.tcp == NULL:
        return err if err else -EINVAL
    s.flow = head.flow
    s.ttl = head.ttl
    s.tos = head.tos
    s.id = session_id
    s.phase = PHASE_OPEN
    s.shut_rd = 0
    s.shared_shut_wr = 0
    s.role = ROLE_TCP
    rc = session_insert(e, s)
    if rc < 0:
        session_end(e, s, rc)
    return rc


cdef int handover_prefix(engine *e, ul_session *s, const uint8_t *p, size_t n) noexcept nogil:
    cdef bint udp = s.role == ROLE_UDP
    cdef rxqueue front
    cdef rxqueue *q
    cdef rxseg *seg
    cdef uint32_t part
    cdef bint held
    if n == 0:
        return 0
    if not udp and s.role != ROLE_TCP:
        return -EINVAL
    memset(&front, 0, sizeof(front))
    q = &s.udp.rcv if udp else &s.tcp.rcv
    while n:
        part = <uint32_t>n if n < PREFIX_PART_BYTES else PREFIX_PART_BYTES
        if udp:
            if n < DATAGRAM_HEAD_BYTES:
                return -EINVAL
            memcpy(&part, p + 18, 4)
            if part > n - DATAGRAM_HEAD_BYTES:
                return -EINVAL
        seg = rxseg_new(&e.bufs, p + DATAGRAM_HEAD_BYTES if udp else p, part, 0, NULL, 0, &held)
        if seg == NULL:
            rxq_clear(&e.bufs, &front)
            return -ENOMEM
        if udp:
            memcpy(seg.raddr.b, p, 16)
            seg.rport = <uint16_t>((p[16] << 8) | p[17])
            part += DATAGRAM_HEAD_BYTES
        else:
            seg.seq = s.tcp.rcv_nxt - <uint32_t>q.len_bytes - <uint32_t>n
        rxq_push(&front, seg)
        p += part
        n -= part
    front.tail.next = q.head
    if q.tail == NULL:
        q.tail = front.tail
    q.head = front.head
    q.len_bytes += front.len_bytes
    q.mem_bytes += front.mem_bytes
    q.count += front.count
    return 0


cdef void handover_enqueue(engine *e, ul_session *listener, ul_session *s) noexcept nogil:
    s.phase = PHASE_QUEUED
    s.listener = listener
    session_ref(listener)
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
