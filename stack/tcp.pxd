# The face of TCP (RFC 9293): what the engine and the simulator call. No I/O, no clock, no randomness here.
#
# Call order: frames -> tcp_input() for each segment of a burst -> tcp_output() once at the burst's end
# for each connection that tcp_wants_output(); tcp_timers() when tcp_deadline() has passed. A user's call
# (tcp_write, tcp_read, ...) is followed by tcp_output() when tcp_wants_output() says so.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport iovec, ul_rx
from ulnet.stack.buf cimport bufpool, rxseg
from ulnet.stack.tcp_cb cimport tcp_pcb       # the control block, defined by the TCP files

cdef enum:
    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_URG = 0x20
    TCP_OUT_IOV = 16

ctypedef struct tcp_seg:             # one received segment, options parsed (wire.pxd fills it in)
    uint32_t seq
    uint32_t ack
    uint32_t wnd                     # as on the wire, unscaled
    uint32_t ts_val
    uint32_t ts_ecr
    uint32_t len_bytes               # payload
    const uint8_t *data
    const ul_rx *frame               # whose slot the payload lies in, or NULL
    uint16_t mss                     # SYN: 0 if absent
    uint16_t gso_size_bytes          # a super-segment of pieces of this size, else 0
    uint8_t flags
    uint8_t wscale                   # SYN: 255 if absent
    uint8_t has_ts
    uint8_t sack_ok
    uint8_t sack_count
    uint8_t held                     # out: the frame's slot was kept; the caller must not release it
    uint32_t sack[8]                 # left, right edges

ctypedef struct tcp_out:             # one segment to send; a super-segment if len_bytes > mss
    uint32_t seq
    uint32_t ack
    uint16_t wnd
    uint8_t flags
    uint8_t opt_len_bytes            # multiple of 4
    uint8_t opts[40]
    uint32_t len_bytes
    uint16_t mss_bytes               # payload bytes of each piece
    int iov_count
    iovec iov[TCP_OUT_IOV]

ctypedef struct tcp_counters:        # of one stack; never reset
    uint64_t segs_in
    uint64_t segs_out
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t retransmits
    uint64_t rto_events
    uint64_t fast_retransmits
    uint64_t tail_probes             # RFC 8985 7
    uint64_t dup_acks_in
    uint64_t dsacks_in               # RFC 2883: of those that acknowledge nothing else
    uint64_t out_of_order_in
    uint64_t duplicate_in
    uint64_t out_of_window_in
    uint64_t bad_ack_in
    uint64_t challenge_acks
    uint64_t resets_in
    uint64_t resets_out
    uint64_t paws_dropped
    uint64_t nomem_dropped

ctypedef struct tcp_env:             # what the outside gives to every call
    int64_t now_ns
    bufpool *bufs
    void *ctx
    # 0; -EAGAIN/-ENOBUFS: the link is full, TCP keeps the data and tries again soon
    int (*emit)(void *ctx, void *owner, const tcp_out *out) noexcept nogil
    tcp_counters *counters
    uint32_t max_gso_bytes           # largest payload of a super-segment; 0: one MSS at a time
    uint32_t burst_bytes             # tcp_output() stops after so much and wants to be called again, so that
                                     # the answers it causes can be read meanwhile; 0: no bound

ctypedef struct tcp_config:          # of a new connection
    uint32_t sndbuf_bytes
    uint32_t rcvbuf_bytes
    uint16_t mss_bytes               # what we announce: link MTU - 40
    uint32_t ts_offset               # random
    uint8_t nodelay
    uint8_t keepalive
    uint8_t no_sack                  # neither offered nor accepted
    uint32_t keepidle_s
    uint32_t keepintvl_s
    uint32_t keepcnt
    uint32_t user_timeout_ms         # 0: default

ctypedef struct tcp_stat:            # for `ulnet sessions`, the status page and TCP_INFO; 96 bytes, no padding
    uint32_t state                   # TCP_* of tcp_cb.pxd, in RFC 9293's order
    uint32_t snd_una
    uint32_t snd_nxt
    uint32_t rcv_nxt
    uint32_t snd_wnd_bytes
    uint32_t cwnd_bytes
    uint32_t ssthresh_bytes
    uint32_t retransmits
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t srtt_ns
    uint64_t rttvar_ns
    uint64_t rto_ns
    uint64_t unsent_bytes
    uint64_t unread_bytes
    uint64_t changed_ns

ctypedef struct tcp_remains:         # what ends a connection in order when its process has died; 32 bytes, no padding
    uint32_t rcv_adv
    uint32_t ts_recent
    uint32_t ts_offset               # to CLOCK_MONOTONIC in ms
    uint32_t max_sndwnd_bytes
    uint16_t our_mss
    uint16_t snd_mss
    uint16_t eff_mss
    uint8_t snd_wscale
    uint8_t rcv_wscale
    uint8_t timestamps               # in use, these three
    uint8_t wscale
    uint8_t sack
    uint8_t fin_sent                 # our FIN has left, acknowledged or not
    uint32_t reserved

cdef tcp_pcb *tcp_new(tcp_env *env, const tcp_config *cfg, void *owner) noexcept nogil
cdef void tcp_free(tcp_env *env, tcp_pcb *pcb) noexcept nogil
cdef int tcp_open(tcp_env *env, tcp_pcb *pcb, uint32_t iss) noexcept nogil              # active: sends SYN
cdef int tcp_passive(tcp_env *env, tcp_pcb *pcb, const tcp_seg *syn, uint32_t iss) noexcept nogil  # sends SYN,ACK
cdef void tcp_input(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil
cdef bint tcp_wants_output(const tcp_pcb *pcb) noexcept nogil
cdef void tcp_output(tcp_env *env, tcp_pcb *pcb) noexcept nogil
cdef int64_t tcp_deadline(const tcp_pcb *pcb) noexcept nogil                            # ns, INT64_MAX: none
cdef void tcp_timers(tcp_env *env, tcp_pcb *pcb) noexcept nogil

cdef int tcp_state(const tcp_pcb *pcb) noexcept nogil
cdef uint32_t tcp_ready(const tcp_pcb *pcb) noexcept nogil                              # UL_READABLE | ...
cdef int tcp_so_error(tcp_pcb *pcb, bint clear) noexcept nogil                          # 0 or -errno
# >= 1 bytes taken; -EAGAIN no room; -EPIPE our side is shut or the connection is gone; -ENOTCONN
cdef Py_ssize_t tcp_write(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n) noexcept nogil
cdef Py_ssize_t tcp_write_hold(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n, object owner)
# The first n bytes of a lent segment, which is the connection's from here on: all of them as soon as there is any
# room, so the send buffer may be passed by one segment. n, or as tcp_write: then it is still the caller's.
cdef Py_ssize_t tcp_write_seg(tcp_env *env, tcp_pcb *pcb, rxseg *seg, uint32_t n) noexcept nogil
# >= 1 bytes; 0 end of file; -EAGAIN nothing yet; pending error otherwise
cdef Py_ssize_t tcp_read(tcp_env *env, tcp_pcb *pcb, uint8_t *out, size_t n, bint peek) noexcept nogil
cdef rxseg *tcp_read_seg(tcp_env *env, tcp_pcb *pcb, size_t max_bytes, int *err) noexcept nogil  # zero copy; *err as tcp_read
# n bytes at the front of pcb.rcv were used where they lie.
cdef void tcp_took(tcp_env *env, tcp_pcb *pcb, size_t n) noexcept nogil
cdef int tcp_shutdown(tcp_env *env, tcp_pcb *pcb, int how) noexcept nogil               # SHUT_RD, SHUT_WR, SHUT_RDWR
cdef void tcp_close(tcp_env *env, tcp_pcb *pcb) noexcept nogil                          # user is gone: FIN, or RST if unread data
cdef void tcp_abort(tcp_env *env, tcp_pcb *pcb) noexcept nogil                          # RST, CLOSED
# ICMP told us: hard errors end a connection that is not yet established, else they are remembered
# (RFC 5927); next_mtu > 0: packet too big.
cdef void tcp_icmp(tcp_env *env, tcp_pcb *pcb, int error, uint32_t seq, uint32_t next_mtu_bytes) noexcept nogil
cdef int tcp_setopt(tcp_env *env, tcp_pcb *pcb, int level, int name, int value) noexcept nogil
cdef int tcp_getopt(const tcp_pcb *pcb, int level, int name, int *value) noexcept nogil
cdef void tcp_stat_get(const tcp_pcb *pcb, tcp_stat *out) noexcept nogil
cdef void tcp_remains_get(const tcp_pcb *pcb, tcp_remains *out) noexcept nogil
# Hand-over: everything, timers as time left. The importer's clock may differ.
cdef size_t tcp_export_bytes(const tcp_pcb *pcb) noexcept nogil
cdef size_t tcp_export(tcp_env *env, tcp_pcb *pcb, uint8_t *out) noexcept nogil
cdef tcp_pcb *tcp_import(tcp_env *env, const uint8_t *data, size_t n, void *owner, int *err) noexcept nogil  # checks every field
# A connection whose process has died and left these numbers, ready to be closed. NULL and -EINVAL: data was lost, or no
# honest library writes such numbers. *in_doubt: what was sent last may not have arrived, the answer to our FIN will tell.
cdef tcp_pcb *tcp_revive(tcp_env *env, const tcp_stat *last, const tcp_remains *r, void *owner, bint *in_doubt, int *err) noexcept nogil
# TIME-WAIT: may this SYN begin a new connection at once (RFC 9293 3.10.7.4, RFC 6191)? Then free the pcb and treat
# the SYN as new, with an initial sequence number not before *iss_least. Ask before tcp_input().
cdef bint tcp_reusable(const tcp_pcb *pcb, const tcp_seg *syn, uint32_t *iss_least) noexcept nogil
# The answer to a segment that belongs to no connection (RFC 9293 3.10.7.1); 0: none is due.
cdef bint tcp_refuse(const tcp_seg *seg, tcp_out *out) noexcept nogil
# RFC 6528: initial sequence number and timestamp offset of a flow from a 16-byte secret and the clock.
cdef uint32_t tcp_isn(const uint8_t *secret, const void *flow, size_t flow_bytes, int64_t now_ns) noexcept nogil
