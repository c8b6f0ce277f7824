# One session as Python holds it, and the buffers it lends. Engine stands above: here it is only an object.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ulnet.stack.buf cimport rxseg
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.engine_user cimport user_dgram, user_meta
from ulnet.stack.types cimport ul_addr

# The one place where a code of the C level becomes an OSError.
cdef int fail(Py_ssize_t code) except -1
# Takes over one reference to s.
cdef Session session_wrap(object owner, engine *e, ul_session *s)
cdef int64_t length_to_send(Buffer b, Py_ssize_t nbytes) except -1

cdef class Buffer:
    cdef object engine                   # keeps e alive
    cdef engine *e
    cdef rxseg *seg                      # NULL: the end of a stream, or given back
    cdef int exports
    cdef bint released
    cdef bint sending                    # a send call looks at it: neither read nor released meanwhile
    cdef bint writable
    cdef readonly object address
    cdef int check(self) except -1
    cdef int pin(self) except -1         # for sending: ValueError, BufferError
    cdef void unpin(self, bint sent) noexcept
    cdef void give_back(self) noexcept

cdef class Session:
    cdef ul_session *s                   # NULL only while being made or unmade
    cdef engine *e
    cdef readonly object engine          # the Engine: keeps e alive
    cdef readonly int kind
    cdef object shared_rlock             # made when first used
    cdef object former                   # the Engine it belonged to before a fork: threads may be inside
    cdef public object file              # what duplicates of a socket share (openfile.File)
    cdef bint nonblocking                # what O_NONBLOCK of the descriptor shows
    cdef object __weakref__
    cdef bint numbered                   # it is known by its number
    cdef int numbered_as(self, bint steered) except? -1
    cdef object src_tuple                # sender of the last buffer
    cdef ul_addr src
    cdef uint16_t src_port
    # timeout_ns: -1 for ever, 0 never block (BlockingIOError), else TimeoutError after it.
    # Errors are raised as OSError with the BSD errno. flags: MSG_PEEK, MSG_DONTWAIT, MSG_WAITALL, MSG_TRUNC.
    # Called with the GIL; it is released inside while waiting or sending.
    cdef Py_ssize_t recv(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns) except -1
    cdef Py_ssize_t recvfrom(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns,
                             ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except -1
    # recvfrom and sendto with what comes and goes beside the datagram; meta may be NULL.
    cdef Py_ssize_t recv_datagram(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns, ul_addr *src,
                                  uint16_t *sport, uint32_t *full_bytes, user_meta *meta) except -1
    cdef Py_ssize_t send_datagram(self, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport, int flags,
                                  const user_meta *meta, int64_t timeout_ns) except -1
    # Sends what fits (at least one byte). `owner`: an immutable object that may be held instead of copied, or None.
    cdef Py_ssize_t send(self, const uint8_t *data, size_t n, object owner, int flags, int64_t timeout_ns) except -1
    # All of it, or an exception; *sent tells how far it came.
    cdef int sendall(self, const uint8_t *data, size_t n, object owner, int64_t timeout_ns, size_t *sent) except -1
    cdef Py_ssize_t send_some(self, const uint8_t *data, size_t n, object owner, bint all, int64_t timeout_ns,
                              size_t *done) except -1
    # dst NULL: the connected peer. UDP. -EAGAIN for an unknown neighbour is handled by Engine.resolver.
    cdef Py_ssize_t sendto(self, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport, int flags,
                           int64_t timeout_ns) except -1
    # Datagrams in order; returns how many are out: fewer than count, and at least one, when an error stopped it.
    cdef uint32_t send_dgrams(self, const user_dgram *items, uint32_t count, int64_t timeout_ns, uint32_t *done) except? 0
    # TCP: the buffer is the connection's when this returns, and still the caller's when it raises.
    cdef int send_seg(self, Buffer b, uint32_t n, int64_t timeout_ns) except -1
    cdef Buffer lend(self, rxseg *seg)
    cdef list lend_all(self, rxseg *seg)
    cdef uint32_t send_singly(self, const user_dgram *items, uint32_t count, int64_t timeout_ns, uint32_t *done) except? 0
    cdef void give_back(self, rxseg *seg) noexcept
