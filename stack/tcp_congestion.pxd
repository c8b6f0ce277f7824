# How much to send: congestion control behind one table of functions (RFC 5681). What to resend is
# tcp_recovery's business; the two know nothing of each other, tcp_input.pyx carries events to both.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    TCP_CC_NEWRENO = 0
    TCP_CC_COUNT = 1
    TCP_CWND_MAX_BYTES = 0x3FFFFFFF      # the largest window of RFC 7323 2.3: more is never in flight

ctypedef struct tcp_cc:
    const tcp_cc_ops *ops
    uint32_t cwnd_bytes
    uint32_t ssthresh_bytes
    uint32_t mss_bytes                   # effective: without options
    uint32_t acked_bytes                 # congestion avoidance: counted towards the next increase (RFC 3465 2.1)
    uint64_t priv[6]                     # of the algorithm

ctypedef struct tcp_cc_ops:
    const char *name
    uint8_t id
    # A new connection, and again after a change of the MSS has been put in cc.mss_bytes.
    void (*init)(tcp_cc *cc) noexcept nogil
    # New data acknowledged outside fast recovery. limited: the window was what held the sender back;
    # after_loss: the ACK belongs to data resent after a timeout.
    void (*on_ack)(tcp_cc *cc, uint32_t acked_bytes, bint limited, bint after_loss, int64_t now_ns, int64_t srtt_ns) noexcept nogil
    void (*on_enter_recovery)(tcp_cc *cc, uint32_t flight_bytes, int64_t now_ns) noexcept nogil
    void (*on_dup_ack)(tcp_cc *cc) noexcept nogil                             # in recovery: a segment has left
    void (*on_partial_ack)(tcp_cc *cc, uint32_t acked_bytes) noexcept nogil
    void (*on_exit_recovery)(tcp_cc *cc, uint32_t flight_bytes) noexcept nogil
    void (*on_rto)(tcp_cc *cc, uint32_t flight_bytes, bint first, int64_t now_ns) noexcept nogil
    void (*on_idle)(tcp_cc *cc) noexcept nogil                                # nothing sent for an RTO

cdef const tcp_cc_ops *tcp_cc_table(int id) noexcept nogil                    # NULL: no such algorithm
cdef void tcp_cc_start(tcp_cc *cc, int id, uint32_t mss_bytes) noexcept nogil
# The MSS changed (handshake, path MTU) while windows are to be kept in segments.
cdef void tcp_cc_mss(tcp_cc *cc, uint32_t mss_bytes) noexcept nogil
cdef uint32_t tcp_initial_window(uint32_t mss_bytes) noexcept nogil           # RFC 6928 2
