# Round-trip time and retransmission timeout (RFC 6298) from segments timed in nanoseconds (Karn's rule).

from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef extern from *:                      # C literals: an enum would make int of them
    """
    #define TCP_RTO_INITIAL_NS 1000000000LL
    #define TCP_RTO_MIN_NS 200000000LL
    #define TCP_RTO_MAX_NS 120000000000LL
    #define TCP_RTO_AFTER_SYN_LOSS_NS 3000000000LL
    """
    const int64_t TCP_RTO_INITIAL_NS         # RFC 6298 (2.1)
    const int64_t TCP_RTO_MIN_NS             # differs: RFC 6298 (2.4) says 1 s; 200 ms as Linux
    const int64_t TCP_RTO_MAX_NS             # RFC 6298 (2.5): at least 60 s; as Linux
    const int64_t TCP_RTO_AFTER_SYN_LOSS_NS  # RFC 6298 (5.7)

cdef enum:
    TCP_BACKOFF_MAX = 12

ctypedef struct tcp_rtt:
    int64_t srtt_ns                  # 0: no sample yet
    int64_t least_ns                 # shortest sample; 0: none yet
    int64_t rttvar_ns
    int64_t rto_ns                   # before backoff
    int64_t timed_ns                 # when the timed segment left
    uint32_t timed_seq               # acknowledged once snd_una is beyond it
    uint8_t timing
    uint8_t backoff                  # RTO doublings in force (5.5)

cdef void tcp_rtt_init(tcp_rtt *r) noexcept nogil
cdef void tcp_rtt_sample(tcp_rtt *r, int64_t sample_ns) noexcept nogil

cdef inline int64_t tcp_rto(const tcp_rtt *r) noexcept nogil:
    cdef int64_t t = r.rto_ns << r.backoff
    return t if t < TCP_RTO_MAX_NS else TCP_RTO_MAX_NS
