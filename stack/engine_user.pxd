# A user's calls on a session, without the GIL: lock, act, settle, wait where it must, unlock.
# All return >= 0 or a negative errno; -EINTR: run signal handlers and call again with the same deadline.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ulnet.stack.buf cimport rxseg
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.types cimport ul_addr

cdef enum:
    USER_PEEK = 0x02
    USER_TRUNC = 0x20
    USER_DONTWAIT = 0x40
    USER_WAITALL = 0x100
    USER_RESOLVE = 100000    # -USER_RESOLVE: a next hop (engine.resolve_addr) must be resolved first
                             # -USER_SHARED, -USER_STAYED (engine_core): the session is elsewhere

# deadline_ns: -1 for ever, 0 do not wait, else clock_now() scale. *done: bytes already received (MSG_WAITALL, -EINTR)
cdef Py_ssize_t user_recv(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                          size_t *done) noexcept nogil
cdef Py_ssize_t user_recvfrom(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                              ul_addr *src, uint16_t *sport, uint32_t *full_bytes) noexcept nogil
cdef rxseg *user_recv_seg(engine *e, ul_session *s, size_t max_bytes, int64_t deadline_ns, int *err) noexcept nogil
# owner: PyObject* that may be held, or NULL. all: until everything is taken (*done counts), else once.
cdef Py_ssize_t user_send(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner, bint all,
                          int64_t deadline_ns, size_t *done) noexcept nogil
cdef Py_ssize_t user_sendto(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                            int64_t deadline_ns) noexcept nogil
cdef int user_wait(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, uint32_t *ready) noexcept nogil
cdef int user_shutdown(engine *e, ul_session *s, int how) noexcept nogil
