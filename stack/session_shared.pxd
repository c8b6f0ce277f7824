# A session placed in the server: calls on the user's end (U) of its descriptor pair.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ulnet.stack.buf cimport rxseg
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.session cimport Session
from ulnet.stack.types cimport ul_addr

cdef enum shared_what:
    SHARED_RECV = 0
    SHARED_RECVFROM = 1
    SHARED_RECV_SEG = 2
    SHARED_SEND = 3
    SHARED_SENDTO = 4

cdef enum:
    USER_MINE = 100010           # -USER_MINE: it is not shared (any more): make the normal call

ctypedef struct shared_call:
    int what
    int flags                    # MSG_PEEK, MSG_WAITALL, MSG_TRUNC
    uint8_t *data                # RECV...: where to; SEND...: what (not written to)
    size_t n                     # RECV_SEG: the largest segment
    bint all                     # SEND: until all is taken
    size_t done                  # bytes received or sent so far
    ul_addr addr                 # RECVFROM: the sender; SENDTO: the destination, if `to`
    uint16_t port
    bint to
    uint32_t full_bytes          # RECVFROM: the datagram's length
    rxseg *seg                   # RECV_SEG: lent, NULL at end of file

# One try without waiting; the engine's lock is held. As shared_run, but -EAGAIN when it would wait.
cdef Py_ssize_t shared_try(engine *e, ul_session *s, shared_call *c) noexcept nogil
cdef uint32_t shared_ready(const ul_session *s) noexcept nogil
# Whoever waits for it on U looks again (closed, promoted).
cdef void shared_wake(ul_session *s) noexcept nogil
# The call, with its waits: >= 0, a negative errno, or -USER_MINE.
cdef Py_ssize_t shared_run(Session session, shared_call *c, int64_t deadline_ns) except? -1
# A Session's calls, as session.pxd has them.
cdef Py_ssize_t shared_recv(Session session, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                            size_t *done) except? -1
cdef Py_ssize_t shared_recvfrom(Session session, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                                ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except? -1
cdef Py_ssize_t shared_send(Session session, const uint8_t *data, size_t n, bint all, int64_t deadline_ns,
                            size_t *done) except? -1
cdef Py_ssize_t shared_sendto(Session session, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                              int64_t deadline_ns) except? -1
# 0 and *seg, lent, or NULL at end of file.
cdef int shared_recv_seg(Session session, size_t max_bytes, int64_t deadline_ns, rxseg **seg) except? -1
# Ready bits of mask (or ERROR, HUP), 0 at the deadline, or -USER_MINE.
cdef int shared_wait(Session session, uint32_t mask, int64_t deadline_ns) except? -1
cdef int shared_shutdown(Session session, int how) except? -1
cdef bint shared_ours(Session session) except -1
cdef object shared_announced(Session session)
# Unread and unsent bytes in the pair.
cdef void shared_queues(ul_session *s, int *unread, int *unsent) noexcept nogil
