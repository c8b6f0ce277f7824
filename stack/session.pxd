# One session as Python holds it, and the buffers it lends. Engine stands above: here it is only an object.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.types cimport ul_addr

# The one place where a code of the C level becomes an OSError.
cdef int fail(Py_ssize_t code) except -1
# Takes over one reference to s.
cdef Session session_wrap(object owner, engine *e, ul_session *s)

cdef class Session:
    cdef ul_session *s                   # NULL only while being made or unmade
    cdef engine *e
    cdef readonly object engine          # the Engine: keeps e alive
    cdef readonly int kind
    cdef object shared_rlock             # made when first used
    cdef object former                   # the Engine it belonged to before a fork: threads may be inside
    cdef public object file              # what duplicates of a socket share (openfile.File)
    cdef object __weakref__
    cdef bint numbered                   # it is known by its number
    cdef int descriptor(self, bint steered) except? -1
    # timeout_ns: -1 for ever, 0 never block (BlockingIOError), else TimeoutError after it.
    # Errors are raised as OSError with the BSD errno. flags: MSG_PEEK, MSG_DONTWAIT, MSG_WAITALL, MSG_TRUNC.
    # Called with the GIL; it is released inside while waiting or sending.
    cdef Py_ssize_t recv(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns) except -1
    cdef Py_ssize_t recvfrom(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns,
                             ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except -1
    # Sends what fits (at least one byte). `owner`: an immutable object that may be held instead of copied, or None.
    cdef Py_ssize_t send(self, const uint8_t *data, size_t n, object owner, int flags, int64_t timeout_ns) except -1
    # All of it, or an exception; *sent tells how far it came.
    cdef int sendall(self, const uint8_t *data, size_t n, object owner, int64_t timeout_ns, size_t *sent) except -1
    cdef Py_ssize_t send_some(self, const uint8_t *data, size_t n, object owner, bint all, int64_t timeout_ns,
                              size_t *done) except -1
    # dst NULL: the connected peer. UDP. -EAGAIN for an unknown neighbour is handled by Engine.resolver.
    cdef Py_ssize_t sendto(self, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport, int flags,
                           int64_t timeout_ns) except -1
