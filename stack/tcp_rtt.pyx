"""Round-trip time and retransmission timeout (RFC 6298), in integer nanoseconds."""
# differs: the clock is the caller's nanosecond clock, not a coarse tick; round trips here are 5 to 100
# microseconds, which 1 ms timestamps cannot see. Hence Karn's rule: one segment timed, none that was resent.

from libc.stdint cimport int64_t


cdef void tcp_rtt_init(tcp_rtt *r) noexcept nogil:
    r.srtt_ns = 0
    r.least_ns = 0
    r.rttvar_ns = 0
    r.rto_ns = TCP_RTO_INITIAL_NS
    r.timed_ns = 0
    r.timed_seq = 0
    r.timing = 0
    r.backoff = 0


cdef void tcp_rtt_sample(tcp_rtt *r, int64_t sample_ns) noexcept nogil:
    cdef int64_t err
    if sample_ns < 1:
        sample_ns = 1                # virtual time may stand still; 0 means "no sample"
    if sample_ns > TCP_RTO_MAX_NS:
        sample_ns = TCP_RTO_MAX_NS
    if r.least_ns == 0 or sample_ns < r.least_ns:
        r.least_ns = sample_ns
    if r.srtt_ns == 0:
        r.srtt_ns = sample_ns                                      # (2.2)
        r.rttvar_ns = sample_ns // 2
    else:
        err = sample_ns - r.srtt_ns                                # (2.3), alpha 1/8, beta 1/4
        r.rttvar_ns += ((err if err >= 0 else -err) - r.rttvar_ns) // 4
        r.srtt_ns += err // 8
        if r.srtt_ns < 1:
            r.srtt_ns = 1
    r.rto_ns = r.srtt_ns + 4 * r.rttvar_ns
    if r.rto_ns < TCP_RTO_MIN_NS:
        r.rto_ns = TCP_RTO_MIN_NS
    elif r.rto_ns > TCP_RTO_MAX_NS:
        r.rto_ns = TCP_RTO_MAX_NS
    r.backoff = 0                                                  # Karn: a valid sample ends the backoff
