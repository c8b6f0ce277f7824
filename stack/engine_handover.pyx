"""Hand-over of TCP sessions between address spaces (SOSP 1993, section 3.2).

The exporter remembers the flow as foreign, so that a frame that still comes here goes after its session;
the importer replays frames that were faster than it.
"""

from libc.errno cimport EINVAL, EISCONN, ENOMEM, ENOTCONN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from ulnet.stack.engine_core cimport (
    PHASE_OPEN, PHASE_QUEUED, ROLE_FOREIGN, ROLE_SHELL, ROLE_TCP, clock_now, engine_tick, foreign_arm, session_end, session_find,
    session_insert, session_new, session_ref, session_touch, session_unref, session_fd_free,
)
from ulnet.stack.engine_wait cimport waiters_wake
from ulnet.stack.tcp cimport tcp_export, tcp_export_bytes, tcp_import
from ulnet.stack.types cimport UL_IPPROTO_TCP

cdef enum:
    STATE_MAGIC = 0x554C5331       # "ULS1"

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
    if s.role != ROLE_SHELL:
        return -EISCONN
    engine_tick(e)
    s.tcp = tcp_import(&e.env, p + sizeof(head), n - sizeof(head), s, &err)
    if s.tcp == NULL:
        return err if err else -EINVAL
    s.flow = head.flow
    s.ttl = head.ttl
    s.tos = head.tos
    s.id = session_id
    s.phase = PHASE_OPEN
    s.role = ROLE_TCP
    rc = session_insert(e, s)
    if rc < 0:
        session_end(e, s, rc)
    return rc


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
