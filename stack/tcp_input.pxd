# A segment or an ICMP message arrives: RFC 9293 3.10.7.

from libc.stdint cimport int64_t, uint32_t
from ulnet.stack.tcp cimport tcp_env, tcp_seg
from ulnet.stack.tcp_cb cimport tcp_pcb

cdef void tcp_segment_arrives(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil
cdef void tcp_syn_accepted(tcp_pcb *pcb, const tcp_seg *syn, int64_t now_ns) noexcept nogil
cdef void tcp_icmp_arrives(tcp_env *env, tcp_pcb *pcb, int error, uint32_t seq, uint32_t next_mtu_bytes) noexcept nogil
