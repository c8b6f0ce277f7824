# What to resend: loss recovery behind one table of functions (RFC 6582; RFC 6675 where both ends do SACK). It sees
# sequence numbers only, so it can be tested alone; how much may be sent is tcp_congestion's business.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    TCP_REC_NEWRENO = 0
    TCP_REC_SACK = 1
    TCP_REC_COUNT = 2
    SACK_RANGES_MAX = 64         # bounds the walk that a peer can make us do for each ACK
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
    REC_NEWS = 128               # the peer has more than we knew

ctypedef struct sack_range:      # bytes the peer has beyond snd_una, and what we did about the hole before them
    uint32_t left
    uint32_t right
    uint32_t sent_to             # the hole was sent again up to here
    uint32_t mark                # snd_max then: when much beyond it has arrived, what was sent again is lost, too

ctypedef struct sack_board:      # in order, apart from each other
    uint32_t count
    sack_range r[SACK_RANGES_MAX]

ctypedef struct tcp_rec:
    const tcp_rec_ops *ops
    uint32_t recover             # RFC 6582: highest sequence number sent when recovery began
    uint32_t resend_seq          # what is due again, when `resend`
    uint8_t state
    uint8_t dupacks
    uint8_t resend
    uint8_t partial_seen
    uint8_t blind                # SACK: recovery began by counted duplicates that carried no blocks
    uint8_t urgent               # SACK: one segment may go whatever the window
    uint8_t probed               # SACK: a probe of what ends at probe_end went, long after all before it
    sack_board *board            # SACK: made when first needed; freed by tcp_rec_end()
    uint32_t gone_bytes          # SACK: of what is in flight by the numbers, so much has left the network
    uint32_t lost_edge           # SACK: holes that begin before it are lost
    uint32_t mss_bytes           # SACK: as told last
    uint32_t probe_end
    uint64_t priv[4]             # of the algorithm

ctypedef struct tcp_rec_ops:
    const char *name
    uint8_t id
    void (*init)(tcp_rec *rec, uint32_t iss) noexcept nogil
    int (*on_dup_ack)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil      # REC_* bits
    int (*on_ack)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil          # snd_una: the new one
    void (*on_rto)(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil
    # `count` pairs of edges from an ACK; after on_ack or on_dup_ack. NULL: it does not look at them.
    int (*on_sack)(tcp_rec *rec, const uint32_t *blocks, uint32_t count, uint32_t snd_una, uint32_t snd_max,
                   uint32_t mss_bytes) noexcept nogil

cdef const tcp_rec_ops *tcp_rec_table(int id) noexcept nogil
cdef void tcp_rec_start(tcp_rec *rec, int id, uint32_t iss) noexcept nogil
cdef void tcp_rec_end(tcp_rec *rec) noexcept nogil
# The next lost hole not sent again: RFC 6675 NextSeg (1). False: none.
cdef bint tcp_rec_hole(const tcp_rec *rec, uint32_t snd_una, uint32_t *seq, uint32_t *n_bytes) noexcept nogil
cdef void tcp_rec_resent(tcp_rec *rec, uint32_t seq, uint32_t n_bytes, uint32_t snd_una, uint32_t snd_max) noexcept nogil
# Nothing came for a while: what is to be sent to hear from the peer (RFC 8985 7).
cdef void tcp_rec_probe(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max, uint32_t mss_bytes) noexcept nogil
cdef void tcp_rec_forget(tcp_rec *rec) noexcept nogil                 # the blocks
# Segments that may be sent beyond the window for each of the first two duplicate ACKs (RFC 3042).
cdef inline uint32_t tcp_rec_extra_segments(const tcp_rec *rec) noexcept nogil:
    return rec.dupacks if rec.state == REC_OPEN and rec.dupacks <= 2 and rec.gone_bytes == 0 else 0
