# Sending segments: data within the windows, retransmissions, acknowledgements, resets.

from libc.stdint cimport uint32_t
from ulnet.stack.tcp cimport tcp_env, tcp_out, tcp_seg
from ulnet.stack.tcp_cb cimport tcp_pcb

cdef void tcp_output_run(tcp_env *env, tcp_pcb *pcb) noexcept nogil
# One segment without data; flags with TCP_RST, TCP_ACK, ... 0 or -errno.
cdef int tcp_send_bare(tcp_env *env, tcp_pcb *pcb, uint32_t seq, uint32_t ack, int flags) noexcept nogil
cdef void tcp_send_dup_ack(tcp_env *env, tcp_pcb *pcb) noexcept nogil
cdef bint tcp_refuse_build(const tcp_seg *seg, tcp_out *out) noexcept nogil
