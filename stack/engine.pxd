# The engine: one link, its sessions, their timers; run to completion inside the caller's own call.
#
# Locking: one mutex an engine. A thread that waits drives the link itself (polls the ring, then sleeps in
# poll(2)); others wait on their session's condition. A helper thread, asleep while callers are active,
# does acknowledgements and timers for a program that is elsewhere.

from ulnet.kernelshim.link cimport Link
from ulnet.stack.engine_core cimport engine
from ulnet.stack.metastate cimport Metastate
from ulnet.stack.session cimport Session
from ulnet.stack.statpage cimport StatPage

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
    cdef public object on_ends           # callable(), or None
    cdef public object on_shared         # callables about sessions placed in the server, or None (engine.pyi)
    cdef public object on_shared_end
    cdef public object on_shared_error
    cdef public object on_shared_option
    cdef object helper_thread
    cdef object __weakref__
    cdef void attend(self) noexcept
    cdef list take_strays(self)
    cdef void take_stat(self, Session session) noexcept
    cdef void settle_imported(self, Session session) noexcept
