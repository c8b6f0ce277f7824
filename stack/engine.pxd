# The engine: one link, its sessions, their timers; run to completion inside the caller's own call.
#
# Locking: one mutex an engine. A thread that waits drives the link itself (polls the ring, then sleeps in
# poll(2)); others wait on their session's condition. A helper thread, asleep while callers are active,
# does acknowledgements and timers for a program that is elsewhere.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport Link
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.metastate cimport Metastate
from ulnet.stack.statpage cimport StatPage
from ulnet.stack.types cimport ul_addr

cdef enum:
    SESSION_TCP = 6              # IPPROTO numbers; a listener is a TCP session in LISTEN
    SESSION_UDP = 17


cdef class Engine:
    cdef engine *e
    cdef readonly Link link
    cdef readonly Metastate meta
    cdef readonly StatPage stats
    cdef public object resolver          # callable(next hop), or None
    cdef public object on_strays         # callable(list of frames), or None
    cdef object helper_thread
    cdef object __weakref__
    cdef void attend(self) noexcept
    cdef int resolve_pending(self) except -1
    cdef void reap(self) noexcept
    cdef list take_strays(self)
    cdef Session wrap(self, ul_session *s)
    cdef void take_stat(self, Session session) noexcept
    cdef void settle_imported(self, Session session) noexcept

cdef class Session:
    cdef ul_session *s           # NULL once handed over, closed or failed to open
    cdef readonly Engine engine
    cdef readonly int kind
    cdef object __weakref__
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
