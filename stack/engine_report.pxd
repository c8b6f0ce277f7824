# What an engine has and has counted, as Python objects.

from ulnet.stack.engine_core cimport engine

cdef list report_sessions(engine *e)
cdef dict report_counters(engine *e)
