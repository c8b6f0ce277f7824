"""What to resend: loss recovery as a table of C functions over ``tcp_rec``, in sequence numbers only.

NewReno without SACK (RFC 6582, limited transmit of RFC 3042). ``Recovery`` drives it from Python.
"""
# Read first: RFC 6582 3.2. The caller asks tcp_rec.resend after each event and sends one segment from
# resend_seq; the returned bits say what the window must do.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ulnet.stack.seqnum cimport seq_ge, seq_gt

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


cdef tcp_rec_ops[TCP_REC_COUNT] TABLE
TABLE[TCP_REC_NEWRENO] = tcp_rec_ops(
    name=b"newreno",
    id=TCP_REC_NEWRENO,
    init=newreno_init,
    on_dup_ack=newreno_on_dup_ack,
    on_ack=newreno_on_ack,
    on_rto=newreno_on_rto,
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
             (REC_EXIT, "exit"), (REC_KEEP_TIMER, "keep-timer"), (REC_SLOW, "slow"))
    return {word for bit, word in words if bits & bit}
