# A session's two transitions: placed in the server, and home again.

from ulnet.stack.session cimport Session

cdef tuple shared_begin(Session session)
cdef Py_ssize_t shared_end(Session session, int o_fd, object state, object number) except -1
cdef int shared_adopt(Session session, int u_fd, bint listening, bint named) except -1
