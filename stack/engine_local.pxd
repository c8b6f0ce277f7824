# What a library needs to set connections up by itself: numbers, ports of its own, and the states of what must move.
# The engine's lock is not held by the caller.

from ulnet.stack.engine_core cimport engine, ul_session

cdef object local_number(engine *e)
cdef int local_lease(engine *e, ports, bint on) except -1
cdef list local_embryos(engine *e, ul_session *listener)
cdef int local_recycle(engine *e, int most)
cdef list local_closing(object owner, engine *e)
