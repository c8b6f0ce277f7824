# Relays: sessions of this engine whose user sits behind a descriptor (SOSP 1993: sessions placed in the server).

from libc.stdint cimport uint8_t
from ulnet.stack.buf cimport txchunk
from ulnet.stack.engine cimport Engine
from ulnet.stack.engine_core cimport engine
from ulnet.stack.relay_pump cimport relay
from ulnet.stack.session cimport Session

cdef class Relays:
    cdef readonly Engine engine
    cdef engine *e
    cdef int epoll_fd
    cdef txchunk *spare
    cdef uint8_t *scratch

cdef class Relay:
    cdef readonly Relays relays
    cdef readonly Session session
    cdef relay *r
    cdef relay *_open(self) except NULL
