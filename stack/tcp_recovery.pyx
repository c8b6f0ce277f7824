"""What to resend: loss recovery as a table of C functions over ``tcp_rec``, in sequence numbers only.

NewReno without SACK (RFC 6582, limited transmit of RFC 3042), and with it (RFC 6675). ``Recovery`` drives them from
Python.
"""
# Read first: RFC 6582 3.2; RFC 6675 2, 4 and 5. The caller asks tcp_rec.resend after each event and sends one segment from
# resend_seq; the returned bits say what the window must do.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset
from ulnet.stack.seqnum cimport seq_ge, seq_gt, seq_le, seq_lt

cdef enum:
    DUPACKS_MEAN_LOSS = 3            # RFC 5681 3.2


cdef void newreno_init(tcp_rec *rec, uint32_t iss) noexcept nogil:
    # differs: RFC 6582 3.2 (1) says ISS, with which the loss of the very first segment (snd_una - 1 is ISS)
    # could never be repaired by fast retransmit.
    rec.recover = iss - 1


cdef int newreno_on_dup_ack(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    if rec.state == REC_FAST:
        return REC_INFLATE
    if rec.state == REC_LOSS:
        return 0
    if rec.dupacks < 255:
        rec.dupacks += 1
    if rec.dupacks != DUPACKS_MEAN_LOSS:
        return 0
    # RFC 6582 3.2 (2): only if the cumulative ACK covers more than `recover`, else these duplicates may be
    # answers to what was resent needlessly after a timeout.
    if not seq_gt(snd_una - 1, rec.recover):
        return 0
    rec.state = REC_FAST
    rec.recover = snd_max
    rec.partial_seen = 0
    rec.resend = 1
    rec.resend_seq = snd_una
    return REC_ENTER


cdef int newreno_on_ack(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    rec.dupacks = 0
    if rec.state == REC_OPEN:
        # Kept close behind snd_una: a value that is never renewed would turn into the future after 2 GiB.
        if seq_gt(snd_una - 1, rec.recover):
            rec.recover = snd_una - 2
        return REC_GROW
    if seq_ge(snd_una, rec.recover):
        rec.resend = 0
        if rec.state == REC_LOSS:
            rec.state = REC_OPEN
            return REC_GROW | REC_SLOW
        # differs: RFC 6582 keeps `recover`, so that a segment lost right behind it (sent during this recovery)
        # waits for the timer. Only proven holes were resent here, few duplicates can come from them; the guard
        # stays where it is needed, after a timeout.
        rec.state = REC_OPEN
        rec.recover = snd_una - 2
        return REC_EXIT
    if rec.state == REC_LOSS:
        return REC_GROW | REC_SLOW
    # Partial ACK: the next hole begins at snd_una
    rec.resend = 1
    rec.resend_seq = snd_una
    if not rec.partial_seen:
        rec.partial_seen = 1
        return REC_PARTIAL           # the timer restarts for the first one only ("impatient", RFC 6582 4)
    return REC_PARTIAL | REC_KEEP_TIMER


cdef void newreno_on_rto(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    rec.recover = snd_max            # RFC 6582 3.2 (4)
    rec.state = REC_LOSS
    rec.dupacks = 0
    rec.resend = 0                   # the sender goes back to snd_una by itself


# ---- with SACK ----
# The caller, after each event in recovery, sends the holes that tcp_rec_hole() gives while what is in flight, less
# gone_bytes, is below the congestion window; then new data by the same rule.

cdef inline uint32_t later(uint32_t a, uint32_t b) noexcept nogil:
    return a if seq_gt(a, b) else b


cdef bint sack_add(sack_board *b, uint32_t snd_una, uint32_t left, uint32_t right) noexcept nogil:
    """True: it says something new."""
    cdef uint32_t i = 0, j
    cdef sack_range *r
    while i < b.count and seq_lt(b.r[i].right, left):
        i += 1
    r = &b.r[i]
    if i == b.count or seq_lt(right, r.left):
        if b.count == SACK_RANGES_MAX:
            return False                 # then it counts as in flight
        memmove(r + 1, r, (b.count - i) * sizeof(sack_range))
        b.count += 1
        if i + 1 == b.count:
            r.sent_to = b.r[i - 1].right if i else snd_una
            r.mark = 0
        elif seq_gt(r.sent_to, left):
            r.sent_to = left             # the hole was split in two: r[1] is what stood here
        r.left = left
        r.right = right
        if i + 1 < b.count:
            r[1].sent_to = later(r[1].sent_to, right)
        return True
    if seq_ge(left, r.left) and seq_le(right, r.right):
        return False
    if seq_lt(left, r.left):
        r.left = left
        if seq_gt(r.sent_to, left):
            r.sent_to = left
    r.right = later(r.right, right)
    j = i + 1
    while j < b.count and seq_le(b.r[j].left, r.right):
        r.right = later(r.right, b.r[j].right)
        j += 1
    if j > i + 1:
        memmove(r + 1, &b.r[j], (b.count - j) * sizeof(sack_range))
        b.count -= j - i - 1
    if i + 1 < b.count:
        r[1].sent_to = later(r[1].sent_to, r.right)
    return True


cdef void sack_cut(sack_board *b, uint32_t snd_una) noexcept nogil:
    """What is acknowledged is no hole any more."""
    cdef uint32_t i = 0
    while i < b.count and seq_le(b.r[i].right, snd_una):
        i += 1
    if i:
        memmove(&b.r[0], &b.r[i], (b.count - i) * sizeof(sack_range))
        b.count -= i
    if b.count and seq_le(b.r[0].left, snd_una):
        b.count = 0                      # it acknowledges less than it has: it gave some back (RFC 2018 8)
    if b.count:
        b.r[0].sent_to = later(b.r[0].sent_to, snd_una)


cdef void sack_account(tcp_rec *rec, uint32_t snd_una) noexcept nogil:
    """RFC 6675 4: IsLost and SetPipe for all holes at once."""
    cdef sack_board *b = rec.board
    cdef uint32_t i, gone = 0, above = 0, hole = snd_una, top
    cdef sack_range *r
    rec.gone_bytes = 0
    rec.lost_edge = snd_una
    if b == NULL or b.count == 0:
        return
    i = b.count
    while i:
        i -= 1
        above += b.r[i].right - b.r[i].left
        if above > (DUPACKS_MEAN_LOSS - 1) * rec.mss_bytes or b.count - i >= DUPACKS_MEAN_LOSS:
            rec.lost_edge = b.r[i].left
            break
    top = b.r[b.count - 1].right
    if rec.probed and seq_ge(top, rec.probe_end):
        rec.lost_edge = b.r[b.count - 1].left                  # RFC 8985 7.4: the probe came, what went before did not
    for i in range(b.count):
        r = &b.r[i]
        if seq_le(r.left, rec.lost_edge):
            # differs: RFC 6675 leaves a loss of what was sent again to the timer. Paths keep the order, mostly: what was
            # sent after it has arrived, so it is lost (as RACK has it, RFC 8985).
            if seq_gt(r.sent_to, hole) and seq_gt(top, r.mark + (DUPACKS_MEAN_LOSS - 1) * rec.mss_bytes):
                r.sent_to = hole
            gone += r.left - later(r.sent_to, hole)
        gone += r.right - r.left
        hole = r.right
    rec.gone_bytes = gone


cdef int sack_on_dup_ack(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    """Blocks decide, where there are any."""
    cdef int todo
    if rec.state == REC_FAST:
        return REC_INFLATE if rec.blind else 0
    if rec.board != NULL and rec.board.count:
        return 0
    todo = newreno_on_dup_ack(rec, snd_una, snd_max)
    if todo & REC_ENTER:
        rec.blind = 1
    return todo


cdef int sack_on_ack(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    if rec.probed and seq_ge(snd_una, rec.probe_end):
        rec.probed = 0
    if rec.board != NULL and rec.board.count:
        sack_cut(rec.board, snd_una)
        sack_account(rec, snd_una)
    if rec.state != REC_FAST or rec.blind:
        return newreno_on_ack(rec, snd_una, snd_max)
    rec.dupacks = 0
    if seq_lt(snd_una, rec.recover):
        return 0
    rec.resend = 0
    rec.state = REC_OPEN
    rec.recover = snd_una - 2            # as for NewReno
    return REC_EXIT


cdef void sack_on_rto(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    tcp_rec_forget(rec)                  # RFC 2018 8: what was reported may have been given back
    newreno_on_rto(rec, snd_una, snd_max)


cdef int sack_on_sack(tcp_rec *rec, const uint32_t *blocks, uint32_t count, uint32_t snd_una, uint32_t snd_max,
                      uint32_t mss_bytes) noexcept nogil:
    cdef uint32_t i, left, right
    cdef bint news = False
    if rec.board == NULL:
        rec.board = <sack_board *>malloc(sizeof(sack_board))
        if rec.board == NULL:
            return 0
        rec.board.count = 0
    rec.mss_bytes = mss_bytes
    for i in range(count):
        left = blocks[2 * i]
        right = blocks[2 * i + 1]
        # Beyond snd_una, within what was sent; else old, a duplicate's report (RFC 2883), or a lie.
        if seq_gt(left, snd_una) and seq_lt(left, right) and seq_le(right, snd_max) and \
                sack_add(rec.board, snd_una, left, right):
            news = True
    if not news:
        return 0
    sack_account(rec, snd_una)
    if rec.state != REC_OPEN or not seq_gt(rec.lost_edge, snd_una) or not seq_gt(snd_una - 1, rec.recover):
        return REC_NEWS
    rec.state = REC_FAST
    rec.recover = snd_max
    rec.blind = 0
    rec.urgent = 1                       # RFC 6675 5 (4.3): the first one at once
    return REC_NEWS | REC_ENTER


cdef bint tcp_rec_hole(const tcp_rec *rec, uint32_t snd_una, uint32_t *seq, uint32_t *n_bytes) noexcept nogil:
    cdef uint32_t i, hole = snd_una
    cdef const sack_range *r
    if rec.board == NULL or rec.state != REC_FAST:
        return False
    for i in range(rec.board.count):
        r = &rec.board.r[i]
        if seq_gt(r.left, rec.lost_edge):
            return False
        seq[0] = later(r.sent_to, hole)
        if seq_lt(seq[0], r.left):
            n_bytes[0] = r.left - seq[0]
            return True
        hole = r.right
    return False


cdef void tcp_rec_resent(tcp_rec *rec, uint32_t seq, uint32_t n_bytes, uint32_t snd_una, uint32_t snd_max) noexcept nogil:
    cdef uint32_t i = 0
    while i < rec.board.count and seq_le(rec.board.r[i].left, seq):
        i += 1
    if i < rec.board.count:
        rec.board.r[i].sent_to = seq + n_bytes
        rec.board.r[i].mark = snd_max
        sack_account(rec, snd_una)


cdef void tcp_rec_probe(tcp_rec *rec, uint32_t snd_una, uint32_t snd_max, uint32_t mss_bytes) noexcept nogil:
    if rec.state == REC_FAST and rec.board != NULL and rec.board.count:
        rec.board.r[0].sent_to = snd_una                       # it did not arrive
        sack_account(rec, snd_una)
        if seq_gt(rec.lost_edge, snd_una):
            rec.urgent = 1
            return
    rec.probed = 1
    rec.probe_end = snd_max
    rec.resend = 1
    rec.resend_seq = snd_una if rec.state == REC_FAST or snd_max - snd_una < mss_bytes else snd_max - mss_bytes


cdef void tcp_rec_forget(tcp_rec *rec) noexcept nogil:
    if rec.board != NULL:
        rec.board.count = 0
    rec.gone_bytes = 0
    rec.blind = 0
    rec.urgent = 0
    rec.probed = 0


cdef void tcp_rec_end(tcp_rec *rec) noexcept nogil:
    free(rec.board)
    rec.board = NULL
    rec.gone_bytes = 0


cdef tcp_rec_ops[TCP_REC_COUNT] TABLE
TABLE[TCP_REC_NEWRENO] = tcp_rec_ops(
    name=b"newreno",
    id=TCP_REC_NEWRENO,
    init=newreno_init,
    on_dup_ack=newreno_on_dup_ack,
    on_ack=newreno_on_ack,
    on_rto=newreno_on_rto,
    on_sack=NULL,
)
TABLE[TCP_REC_SACK] = tcp_rec_ops(
    name=b"sack",
    id=TCP_REC_SACK,
    init=newreno_init,
    on_dup_ack=sack_on_dup_ack,
    on_ack=sack_on_ack,
    on_rto=sack_on_rto,
    on_sack=sack_on_sack,
)


cdef const tcp_rec_ops *tcp_rec_table(int id) noexcept nogil:
    if id < 0 or id >= TCP_REC_COUNT:
        return NULL
    return &TABLE[id]


cdef void tcp_rec_start(tcp_rec *rec, int id, uint32_t iss) noexcept nogil:
    memset(rec, 0, sizeof(tcp_rec))
    rec.ops = tcp_rec_table(id)
    rec.ops.init(rec, iss)


cdef class Recovery:
    """One recovery algorithm by itself: events in, names of what to do out.

    >>> r = Recovery(iss=0)
    >>> [r.on_dup_ack(1000, 9000) for _ in range(3)]
    [set(), set(), {'enter'}]
    >>> r.resend
    1000
    """
    cdef tcp_rec rec

    def __init__(self, name: str = "newreno", *, iss: int = 0) -> None:
        cdef int i
        for i in range(TCP_REC_COUNT):
            if TABLE[i].name == name.encode():
                tcp_rec_start(&self.rec, i, iss)
                return
        raise ValueError(f"no loss recovery {name!r}; there is {', '.join(TABLE[i].name.decode() for i in range(TCP_REC_COUNT))}")

    def __dealloc__(self):
        tcp_rec_end(&self.rec)

    def on_sack(self, blocks, snd_una: int, snd_max: int, mss: int = 1000) -> set[str]:
        cdef uint32_t[8] edges
        cdef uint32_t n = 0
        if self.rec.ops.on_sack == NULL:
            raise ValueError("newreno does not look at blocks")
        for left, right in blocks[:4]:
            edges[2 * n] = left & 0xFFFFFFFF
            edges[2 * n + 1] = right & 0xFFFFFFFF
            n += 1
        return _names(self.rec.ops.on_sack(&self.rec, edges, n, snd_una & 0xFFFFFFFF, snd_max & 0xFFFFFFFF, mss))

    def hole(self, snd_una: int) -> tuple[int, int] | None:
        """What is lost and not sent again, first sequence number and length."""
        cdef uint32_t seq, n
        return (seq, n) if tcp_rec_hole(&self.rec, snd_una & 0xFFFFFFFF, &seq, &n) else None

    def resent(self, seq: int, n: int, snd_una: int, snd_max: int) -> None:
        tcp_rec_resent(&self.rec, seq & 0xFFFFFFFF, n, snd_una & 0xFFFFFFFF, snd_max & 0xFFFFFFFF)

    @property
    def gone(self) -> int:
        """Bytes that are in flight by the numbers and have left the network."""
        return self.rec.gone_bytes

    @property
    def state(self) -> str:
        return ("open", "fast", "loss")[self.rec.state]

    @property
    def extra_segments(self) -> int:
        return tcp_rec_extra_segments(&self.rec)

    @property
    def resend(self) -> int | None:
        """Sequence number that is due again, or None; reading it counts as sending it."""
        if not self.rec.resend:
            return None
        self.rec.resend = 0
        return self.rec.resend_seq

    def on_dup_ack(self, snd_una: int, snd_max: int) -> set[str]:
        return _names(self.rec.ops.on_dup_ack(&self.rec, snd_una & 0xFFFFFFFF, snd_max & 0xFFFFFFFF))

    def on_ack(self, snd_una: int, snd_max: int) -> set[str]:
        return _names(self.rec.ops.on_ack(&self.rec, snd_una & 0xFFFFFFFF, snd_max & 0xFFFFFFFF))

    def on_rto(self, snd_una: int, snd_max: int) -> None:
        self.rec.ops.on_rto(&self.rec, snd_una & 0xFFFFFFFF, snd_max & 0xFFFFFFFF)


cdef set _names(int bits):
    words = ((REC_GROW, "grow"), (REC_ENTER, "enter"), (REC_INFLATE, "inflate"), (REC_PARTIAL, "partial"),
             (REC_EXIT, "exit"), (REC_KEEP_TIMER, "keep-timer"), (REC_SLOW, "slow"), (REC_NEWS, "news"))
    return {word for bit, word in words if bits & bit}
