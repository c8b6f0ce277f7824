# What to resend: loss recovery behind one table of functions (RFC 6582 now). It sees sequence numbers
# only, so it can be tested alone; how much may be sent is tcp_congestion's business.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    TCP_REC_NEWRENO = 0
    TCP_REC_COUNT = 1
    # tcp_rec.state
    REC_OPEN = 0                 # nothing known to be lost
    REC_FAST = 1                 # fast recovery (RFC 6582 3.2)
    REC_LOSS = 2                 # after a retransmission timeout, until `recover` is acknowledged
    # what the caller has to do; a set of bits
    REC_GROW = 1                 # ordinary new ACK: the window may grow
    REC_ENTER = 2                # fast recovery begins: halve the window
    REC_INFLATE = 4              # a segment left the network: one more may enter
    REC_PARTIAL = 8              # partial ACK: deflate by what it covers
    REC_EXIT = 16                # recovery is over
    REC_KEEP_TIMER = 32          # do not restart the retransmission timer (later partial ACKs)
    REC_SLOW = 64                # grow, but the ACK is of data resent after a timeout

ctypedef struct tcp_rec:
    const tcp_rec_ops *ops
    uint32_t recover             # RFC 6582: highest sequence number sent when recovery began
    uint32_t resend_seq          # what is due again, when `resend`
    uint8_t state
    uint8_t dupacks
    uint8_t resend
    uint8_t partial_seen
    uint32_t reserved
    uint64_t priv[4]             # of the algorithm

ctypedef struct tcp_rec_ops:
    const char *name
    uint8_t id
    void (*init)(tcp_rec *rec, uint32_t iss) noexcept nogil
    int (*on_dup_ack)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil      # REC_* bits
    int (*on_ack)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil          # snd_una: the new one
    void (*on_rto)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil

cdef const tcp_rec_ops *tcp_rec_table(int id) noexcept nogil
cdef void tcp_rec_start(tcp_rec *rec, int id, uint32_t iss) noexcept nogil
# Segments that may be sent beyond the window for each of the first two duplicate ACKs (RFC 3042).
cdef inline uint32_t tcp_rec_extra_segments(const tcp_rec *rec) noexcept nogil:
    return rec.dupacks if rec.state == REC_OPEN and rec.dupacks <= 2 else 0
