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

# What comes and goes beside a datagram (ip(7), sendmsg(2)).
ctypedef struct user_meta:
    int ttl                  # to send: -1 the socket's own
    int tos
    int64_t stamp_ns         # received: time of day, 0 without SO_TIMESTAMP

ctypedef struct user_dgram:
    const uint8_t *data
    size_t len_bytes
    ul_addr dst
    uint16_t dport
    bint named               # False: to the connected peer
    const user_meta *meta    # or NULL

# deadline_ns: -1 for ever, 0 do not wait, else clock_now() scale. *done: bytes already received (MSG_WAITALL, -EINTR)
cdef Py_ssize_t user_recv(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                          size_t *done) noexcept nogil
cdef Py_ssize_t user_recvfrom(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                              ul_addr *src, uint16_t *sport, uint32_t *full_bytes, user_meta *meta) noexcept nogil
cdef rxseg *user_recv_seg(engine *e, ul_session *s, size_t max_bytes, int64_t deadline_ns, int *err) noexcept nogil
# Up to `count` segments, linked by `next`, each of at most max_bytes; waits for the first only.
cdef rxseg *user_recv_segs(engine *e, ul_session *s, size_t max_bytes, uint32_t count, int64_t deadline_ns,
                           int *err) noexcept nogil
# owner: PyObject* that may be held, or NULL. all: until everything is taken (*done counts), else once.
cdef Py_ssize_t user_send(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner, bint all,
                          int64_t deadline_ns, size_t *done) noexcept nogil
# The first n bytes of a lent segment. n: the connection owns it now; an error: the caller still does.
cdef Py_ssize_t user_send_seg(engine *e, ul_session *s, rxseg *seg, uint32_t n, int64_t deadline_ns) noexcept nogil
cdef Py_ssize_t user_sendto(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                            const user_meta *meta, int64_t deadline_ns) noexcept nogil
# Datagrams in order, *done of them are out: none twice when called again. 0, or why not all of them.
cdef int user_send_dgrams(engine *e, ul_session *s, const user_dgram *items, uint32_t count, int64_t deadline_ns,
                          uint32_t *done) noexcept nogil
# The same for little data, with the GIL held, which costs more to give away and take back than to keep for so short:
# True if *rc is the answer. They never wait; False (the lock is another's, or there is something to wait for): call the
# one above, which goes on from *done.
cdef enum:
    USER_LITTLE_BYTES = 4096
cdef bint user_send_at_once(engine *e, ul_session *s, const uint8_t *data, size_t n, bint all, size_t *done,
                            Py_ssize_t *rc) noexcept nogil
cdef bint user_sendto_at_once(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst,
                              uint16_t dport, const user_meta *meta, Py_ssize_t *rc) noexcept nogil
cdef int user_wait(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, uint32_t *ready) noexcept nogil
cdef int user_shutdown(engine *e, ul_session *s, int how) noexcept nogil
