# Socket options of a session, by Linux's numbers.

from ulnet.stack.engine_core cimport engine, ul_session

# Lock held. 0 or a negative errno.
cdef int option_set(engine *e, ul_session *s, int level, int name, int value) noexcept nogil
cdef int option_get(engine *e, ul_session *s, int level, int name, int *value) noexcept nogil
