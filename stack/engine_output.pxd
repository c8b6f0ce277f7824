# How a segment, datagram or message of ours becomes a frame.

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.tcp cimport tcp_out
from ulnet.stack.types cimport flow_key, ul_addr
from ulnet.stack.wire cimport arp_pkt, icmp_pkt, ipv4_pkt

cdef int emit_tcp(void *ctx, void *owner, const tcp_out *out) noexcept nogil       # tcp_env.emit
cdef int emit_arp(void *ctx, const uint8_t *dst_mac, const arp_pkt *arp) noexcept nogil
cdef int emit_udp(engine *e, ul_session *s, const ul_addr *dst, uint16_t dport, const uint8_t *data, uint32_t n) noexcept nogil
# `count` datagrams of `piece` bytes (the last one may be shorter), n bytes together, in one frame: UL_LINK_USO.
cdef int emit_udp_train(engine *e, ul_session *s, const ul_addr *dst, uint16_t dport, const uint8_t *data,
                        uint32_t n, uint32_t piece, uint32_t count) noexcept nogil
# The largest IP packet that goes to the session's peer in one piece, as far as is known.
cdef uint32_t udp_mtu(engine *e, const ul_session *s) noexcept nogil
cdef int emit_refusal(engine *e, const flow_key *flow, const tcp_out *out) noexcept nogil   # an RST without a session
cdef void emit_icmp_unreachable(engine *e, const ipv4_pkt *about, uint8_t code) noexcept nogil
cdef void emit_reassembly_timeouts(engine *e) noexcept nogil
cdef void emit_echo_reply(engine *e, const ipv4_pkt *ip, const icmp_pkt *icmp) noexcept nogil
# MAC of the way to dst into the session's cache. 0, -EAGAIN (being asked for), -ENETUNREACH, -EHOSTUNREACH
cdef int session_route(engine *e, ul_session *s, const ul_addr *dst) noexcept nogil
