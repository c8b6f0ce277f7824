# A connection as bytes, for its hand-over to another address space.

from libc.stdint cimport uint8_t
from ulnet.stack.tcp cimport tcp_env, tcp_remains, tcp_stat
from ulnet.stack.tcp_cb cimport tcp_pcb

cdef enum:
    FROZEN_BYTES_MAX = 512           # of a connection without data

cdef size_t tcp_frozen_bytes(const tcp_pcb *pcb) noexcept nogil
cdef size_t tcp_freeze(tcp_env *env, tcp_pcb *pcb, uint8_t *out) noexcept nogil
# Fills a zeroed pcb (owner set by the caller). 0, -EINVAL, -ENOMEM; what it allocated then is in pcb's queues.
cdef int tcp_thaw(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n) noexcept nogil
# The state of a connection of which a dead process left these numbers, for tcp_thaw; 0: it cannot end in order.
cdef size_t tcp_freeze_remains(const tcp_env *env, const tcp_stat *last, const tcp_remains *r, uint8_t *out, bint *in_doubt) noexcept nogil
