# An engine across fork(2). Python's hooks around it: Engine.before_fork(), after_fork_parent(), after_fork_child().

from ulnet.stack.engine_core cimport engine, ul_session

# Takes the lock and keeps it: no thread is inside while the process is copied.
cdef void fork_prepare(engine *e) noexcept nogil
cdef void fork_parent(engine *e) noexcept nogil
# Only shells and what is shared can be used from now on.
cdef void fork_child(engine *e) noexcept nogil
# Into another engine, with handle and descriptor; what stays behind says "shared", so that a thread which is inside
# looks at the handle again. NULL and *err: -EBUSY it has protocol state, -ENOMEM.
cdef ul_session *session_rebind(engine *e, ul_session *s, engine *into, int *err) noexcept nogil
