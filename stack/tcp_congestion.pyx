"""How much to send: congestion control algorithms, each a table of C functions over ``tcp_cc``.

NewReno's window arithmetic (RFC 5681, with RFC 6928's initial window and RFC 3465's byte counting).
``Congestion`` drives an algorithm from Python, for tests and for looking at it alone.
"""
# Read first: RFC 5681 3.1 and 3.2, RFC 6582 3.2 (the window part of fast recovery), RFC 3465 2.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset


cdef uint32_t tcp_initial_window(uint32_t mss_bytes) noexcept nogil:
    # RFC 6928 (1)
    cdef uint32_t upper = 2 * mss_bytes if 2 * mss_bytes > 14600 else 14600
    return 10 * mss_bytes if 10 * mss_bytes < upper else upper


cdef inline uint32_t half_of(uint32_t flight, uint32_t mss) noexcept nogil:
    # RFC 5681 (4)
    return flight // 2 if flight // 2 > 2 * mss else 2 * mss


cdef inline void grow(tcp_cc *cc, uint32_t by) noexcept nogil:
    if cc.cwnd_bytes < TCP_CWND_MAX_BYTES - by:
        cc.cwnd_bytes += by
    else:
        cc.cwnd_bytes = TCP_CWND_MAX_BYTES


cdef void reno_init(tcp_cc *cc) noexcept nogil:
    cc.cwnd_bytes = tcp_initial_window(cc.mss_bytes)
    cc.ssthresh_bytes = TCP_CWND_MAX_BYTES
    cc.acked_bytes = 0


cdef void reno_on_ack(tcp_cc *cc, uint32_t acked, bint limited, bint after_loss, int64_t now_ns, int64_t srtt_ns) noexcept nogil:
    cdef uint32_t room
    if acked > TCP_CWND_MAX_BYTES:
        acked = TCP_CWND_MAX_BYTES
    if cc.cwnd_bytes < cc.ssthresh_bytes:
        if not limited:
            return               # RFC 7661 3: an unused window says nothing about the path
        if after_loss and acked > cc.mss_bytes:
            acked = cc.mss_bytes     # RFC 3465 2.3: such an ACK may cover what never was lost
        # differs: RFC 3465 2.2 counts at most 2 MSS an ACK. Receivers with segmentation offload acknowledge
        # 64 KiB at a time, which would make slow start linear; as Linux, every byte counts.
        room = cc.ssthresh_bytes - cc.cwnd_bytes
        if acked <= room:
            grow(cc, acked)
            return
        grow(cc, room)
        acked -= room
    elif not limited:
        return
    # Congestion avoidance: one MSS a window (RFC 3465 2.1)
    cc.acked_bytes += acked
    if cc.acked_bytes >= cc.cwnd_bytes:
        cc.acked_bytes -= cc.cwnd_bytes
        if cc.acked_bytes > cc.cwnd_bytes:
            cc.acked_bytes = 0
        grow(cc, cc.mss_bytes)


cdef void reno_on_enter_recovery(tcp_cc *cc, uint32_t flight, int64_t now_ns) noexcept nogil:
    cc.ssthresh_bytes = half_of(flight, cc.mss_bytes)          # RFC 5681 3.2 (2)
    cc.cwnd_bytes = cc.ssthresh_bytes + 3 * cc.mss_bytes       # RFC 5681 3.2 (3)
    cc.acked_bytes = 0


cdef void reno_on_dup_ack(tcp_cc *cc) noexcept nogil:
    grow(cc, cc.mss_bytes)                                     # RFC 5681 3.2 (4)


cdef void reno_on_partial_ack(tcp_cc *cc, uint32_t acked) noexcept nogil:
    # RFC 6582 3.2 (3), partial acknowledgements
    cc.cwnd_bytes = cc.cwnd_bytes - acked if cc.cwnd_bytes > acked + cc.mss_bytes else cc.mss_bytes
    if acked >= cc.mss_bytes:
        grow(cc, cc.mss_bytes)


cdef void reno_on_exit_recovery(tcp_cc *cc, uint32_t flight) noexcept nogil:
    # RFC 6582 3.2 (3), full acknowledgements, option 1: no burst
    cdef uint32_t w = (flight if flight > cc.mss_bytes else cc.mss_bytes) + cc.mss_bytes
    cc.cwnd_bytes = w if w < cc.ssthresh_bytes else cc.ssthresh_bytes
    cc.acked_bytes = 0


cdef void reno_on_rto(tcp_cc *cc, uint32_t flight, bint first, int64_t now_ns) noexcept nogil:
    if first:
        cc.ssthresh_bytes = half_of(flight, cc.mss_bytes)      # RFC 5681 3.1: only for the first timeout
    cc.cwnd_bytes = cc.mss_bytes                               # the loss window
    cc.acked_bytes = 0


cdef void reno_on_idle(tcp_cc *cc) noexcept nogil:
    # RFC 5681 4.1: restart window
    cdef uint32_t w = tcp_initial_window(cc.mss_bytes)
    if cc.cwnd_bytes > w:
        cc.cwnd_bytes = w


cdef tcp_cc_ops[TCP_CC_COUNT] TABLE
TABLE[TCP_CC_NEWRENO] = tcp_cc_ops(
    name=b"newreno",
    id=TCP_CC_NEWRENO,
    init=reno_init,
    on_ack=reno_on_ack,
    on_enter_recovery=reno_on_enter_recovery,
    on_dup_ack=reno_on_dup_ack,
    on_partial_ack=reno_on_partial_ack,
    on_exit_recovery=reno_on_exit_recovery,
    on_rto=reno_on_rto,
    on_idle=reno_on_idle,
)


cdef const tcp_cc_ops *tcp_cc_table(int id) noexcept nogil:
    if id < 0 or id >= TCP_CC_COUNT:
        return NULL
    return &TABLE[id]


cdef void tcp_cc_start(tcp_cc *cc, int id, uint32_t mss_bytes) noexcept nogil:
    memset(cc, 0, sizeof(tcp_cc))
    cc.ops = tcp_cc_table(id)
    cc.mss_bytes = mss_bytes
    cc.ops.init(cc)


cdef void tcp_cc_mss(tcp_cc *cc, uint32_t mss_bytes) noexcept nogil:
    cc.mss_bytes = mss_bytes
    if cc.cwnd_bytes < mss_bytes:
        cc.cwnd_bytes = mss_bytes


cdef class Congestion:
    """One congestion controller by itself. Sizes in bytes, times in nanoseconds.

    >>> cc = Congestion("newreno", mss=1000)
    >>> cc.on_ack(2000); cc.cwnd
    12000
    """
    cdef tcp_cc cc

    def __init__(self, name: str = "newreno", mss: int = 1460) -> None:
        cdef int i
        for i in range(TCP_CC_COUNT):
            if TABLE[i].name == name.encode():
                tcp_cc_start(&self.cc, i, mss)
                return
        raise ValueError(f"no congestion control {name!r}; there are {', '.join(congestion_names())}")

    @property
    def cwnd(self) -> int:
        return self.cc.cwnd_bytes

    @property
    def ssthresh(self) -> int:
        return self.cc.ssthresh_bytes

    def on_ack(self, acked: int, *, limited: bool = True, after_loss: bool = False, now_ns: int = 0, srtt_ns: int = 0) -> None:
        self.cc.ops.on_ack(&self.cc, acked, limited, after_loss, now_ns, srtt_ns)

    def on_enter_recovery(self, flight: int, now_ns: int = 0) -> None:
        self.cc.ops.on_enter_recovery(&self.cc, flight, now_ns)

    def on_dup_ack(self) -> None:
        self.cc.ops.on_dup_ack(&self.cc)

    def on_partial_ack(self, acked: int) -> None:
        self.cc.ops.on_partial_ack(&self.cc, acked)

    def on_exit_recovery(self, flight: int) -> None:
        self.cc.ops.on_exit_recovery(&self.cc, flight)

    def on_rto(self, flight: int, first: bool = True, now_ns: int = 0) -> None:
        self.cc.ops.on_rto(&self.cc, flight, first, now_ns)

    def on_idle(self) -> None:
        self.cc.ops.on_idle(&self.cc)


def congestion_names() -> list[str]:
    """Names that ``Congestion`` accepts."""
    cdef int i
    return [TABLE[i].name.decode() for i in range(TCP_CC_COUNT)]
