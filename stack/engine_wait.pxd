# The engine's lock, who waits, who drives the link, and the helper thread.

from libc.stdint cimport int64_t, uint32_t
from ulnet.stack.engine_core cimport engine, ul_session, wait_side

cdef int engine_wait_init(engine *e) noexcept nogil
cdef void engine_wait_end(engine *e) noexcept nogil
cdef void engine_lock(engine *e) noexcept nogil
cdef void engine_unlock(engine *e) noexcept nogil
# Lock held. Until s shows one of want (or an error or hang-up): 0; deadline passed: -EAGAIN; -EINTR: the
# caller runs signal handlers and calls again; -EBADF: s was closed meanwhile. deadline_ns -1: for ever.
cdef int engine_wait(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns) noexcept nogil
# The same beside kernel descriptors: WAIT_SIDE says that side->fd should be looked at, or has something.
cdef enum:
    WAIT_SIDE = 1
cdef int engine_wait_beside(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, wait_side *side) noexcept nogil
cdef void waiters_wake(engine *e, ul_session *s, uint32_t ready) noexcept nogil
cdef void engine_kick(engine *e) noexcept nogil              # whoever sleeps in poll(2) looks again
cdef void helper_wake(engine *e) noexcept nogil
# The helper thread's life: returns when Python has to do something (attention), or to stop.
cdef void helper_run(engine *e) noexcept nogil
# A caller that will be back soon, as a loop is: the helper need not wake for each frame meanwhile.
cdef void engine_take_over(engine *e) noexcept nogil
# A caller leaves without having waited: see that somebody listens.
cdef void engine_left(engine *e) noexcept nogil
