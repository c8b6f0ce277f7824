"""Hand-over of a connection: the whole control block and all its data as bytes, and back.

Both ends run on one machine, so numbers are in native order. Times travel as time left or time passed,
because the importer's clock may be another. Nothing in the bytes is believed before it is checked.
"""
# Layout: frozen record | bytes to send (from snd_una) | bytes to read | ooo_count times (seq, length, bytes).
# A change of `frozen` needs a new FROZEN_VERSION.

from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from ulnet.stack.buf cimport rxq_append, rxq_push, rxseg, rxseg_new, txq_append_copy, txq_copy_out
from ulnet.stack.seqnum cimport seq_le, seq_lt
from ulnet.stack.tcp cimport tcp_env, tcp_remains, tcp_stat
from ulnet.stack.tcp_cb cimport *
from ulnet.stack.tcp_congestion cimport TCP_CC_NEWRENO, TCP_CWND_MAX_BYTES, tcp_cc_start, tcp_cc_table
from ulnet.stack.tcp_reass cimport OOO_MAX_PIECES
from ulnet.stack.tcp_recovery cimport REC_FAST, REC_LOSS, TCP_REC_NEWRENO, TCP_REC_SACK, tcp_rec_start, tcp_rec_table
from ulnet.stack.tcp_rtt cimport TCP_BACKOFF_MAX, TCP_RTO_MAX_NS, TCP_RTO_MIN_NS
from ulnet.stack.tcp_timer cimport TCP_TIME_WAIT_NS

cdef extern from *:                      # C literals: an enum would make int of them
    """
    #define TIME_MAX_NS 0x0FFFFFFFFFFFFFFFLL
    """
    const int64_t TIME_MAX_NS                # 36 years: sums of two cannot overflow

cdef enum:
    FROZEN_MAGIC = 0x43544C55                # "ULTC"
    FROZEN_VERSION = 1
    WINDOW_MAX_BYTES = 0x40000000            # RFC 7323 2.3
    BUFFER_MAX_BYTES = 0x40000000
    REMAINS_BUFFER_BYTES = 65536             # nothing is sent or received any more but a FIN
    DOUBT_SEGMENTS = 10                      # RFC 6928 2, an initial window: more in flight is a transfer cut off

ctypedef struct frozen:
    uint32_t magic
    uint16_t version
    uint16_t record_bytes
    uint64_t total_bytes
    uint32_t snd_bytes
    uint32_t rcv_bytes
    uint32_t ooo_count
    uint32_t flags
    uint8_t state
    uint8_t snd_wscale
    uint8_t rcv_wscale
    uint8_t keep_probes
    uint8_t cc_id
    uint8_t rec_id
    uint8_t rec_state
    uint8_t rec_dupacks
    uint8_t rec_resend
    uint8_t rec_partial_seen
    uint8_t rtt_timing
    uint8_t rtt_backoff
    uint16_t our_mss
    uint16_t snd_mss
    uint16_t eff_mss
    uint16_t rcv_mss
    uint32_t iss
    uint32_t snd_una
    uint32_t snd_nxt
    uint32_t snd_max
    uint32_t snd_wnd
    uint32_t snd_wl1
    uint32_t snd_wl2
    uint32_t max_sndwnd
    uint32_t snd_sml
    uint32_t irs
    uint32_t rcv_nxt
    uint32_t rcv_adv
    uint32_t rcv_fin
    uint32_t last_ack_sent
    uint32_t unacked_in_bytes
    uint32_t ts_recent
    uint32_t ts_now                          # our timestamp clock at the time of the export
    uint32_t sndbuf_bytes
    uint32_t rcvbuf_bytes
    uint32_t rec_recover
    uint32_t rec_resend_seq
    uint32_t rtt_timed_seq
    uint32_t cwnd_bytes
    uint32_t ssthresh_bytes
    uint32_t cc_acked_bytes
    uint32_t challenge_count
    uint32_t retry_shift
    uint32_t keepidle_s
    uint32_t keepintvl_s
    uint32_t keepcnt
    uint32_t user_timeout_ms
    int32_t so_error
    int32_t soft_error
    uint32_t retransmits
    uint32_t rto_count
    uint32_t reserved
    int64_t srtt_ns
    int64_t rttvar_ns
    int64_t rto_ns
    int64_t timed_ago_ns
    int64_t ts_recent_ago_ns
    int64_t progress_ago_ns
    int64_t last_recv_ago_ns
    int64_t last_send_ago_ns
    int64_t challenge_ago_ns
    int64_t changed_ago_ns
    int64_t timers_left_ns[TT_COUNT]         # -1: off
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t cc_priv[6]
    uint64_t rec_priv[4]


cdef size_t tcp_frozen_bytes(const tcp_pcb *pcb) noexcept nogil:
    return sizeof(frozen) + pcb.snd.len_bytes + pcb.rcv.len_bytes + pcb.ooo.len_bytes + 8 * <size_t>pcb.ooo.count


cdef inline int64_t ago(int64_t now_ns, int64_t then_ns) noexcept nogil:
    if then_ns >= now_ns:
        return 0
    if now_ns - then_ns > TIME_MAX_NS:
        return TIME_MAX_NS
    return now_ns - then_ns


cdef size_t tcp_freeze(tcp_env *env, tcp_pcb *pcb, uint8_t *out) noexcept nogil:
    cdef frozen f
    cdef int i
    cdef rxseg *s
    cdef uint8_t *p = out + sizeof(frozen)
    cdef int64_t now = env.now_ns
    memset(&f, 0, sizeof(f))
    f.magic = FROZEN_MAGIC
    f.version = FROZEN_VERSION
    f.record_bytes = sizeof(frozen)
    f.total_bytes = tcp_frozen_bytes(pcb)
    f.snd_bytes = <uint32_t>pcb.snd.len_bytes
    f.rcv_bytes = <uint32_t>pcb.rcv.len_bytes
    f.ooo_count = pcb.ooo.count
    f.flags = pcb.flags
    f.state = pcb.state
    f.snd_wscale = pcb.snd_wscale
    f.rcv_wscale = pcb.rcv_wscale
    f.keep_probes = pcb.keep_probes
    f.cc_id = pcb.cc.ops.id
    f.rec_id = pcb.rec.ops.id
    f.rec_state = pcb.rec.state
    f.rec_dupacks = pcb.rec.dupacks
    f.rec_resend = pcb.rec.resend
    f.rec_partial_seen = pcb.rec.partial_seen
    f.rtt_timing = pcb.rtt.timing
    f.rtt_backoff = pcb.rtt.backoff
    f.our_mss = pcb.our_mss
    f.snd_mss = pcb.snd_mss
    f.eff_mss = pcb.eff_mss
    f.rcv_mss = pcb.rcv_mss
    f.iss = pcb.iss
    f.snd_una = pcb.snd_una
    f.snd_nxt = pcb.snd_nxt
    f.snd_max = pcb.snd_max
    f.snd_wnd = pcb.snd_wnd
    f.snd_wl1 = pcb.snd_wl1
    f.snd_wl2 = pcb.snd_wl2
    f.max_sndwnd = pcb.max_sndwnd
    f.snd_sml = pcb.snd_sml
    f.irs = pcb.irs
    f.rcv_nxt = pcb.rcv_nxt
    f.rcv_adv = pcb.rcv_adv
    f.rcv_fin = pcb.rcv_fin
    f.last_ack_sent = pcb.last_ack_sent
    f.unacked_in_bytes = pcb.unacked_in_bytes
    f.ts_recent = pcb.ts_recent
    f.ts_now = tcp_ts_now(pcb, now)
    f.sndbuf_bytes = pcb.sndbuf_bytes
    f.rcvbuf_bytes = pcb.rcvbuf_bytes
    f.rec_recover = pcb.rec.recover
    f.rec_resend_seq = pcb.rec.resend_seq
    f.rtt_timed_seq = pcb.rtt.timed_seq
    f.cwnd_bytes = pcb.cc.cwnd_bytes
    f.ssthresh_bytes = pcb.cc.ssthresh_bytes
    f.cc_acked_bytes = pcb.cc.acked_bytes
    f.challenge_count = pcb.challenge_count
    f.retry_shift = pcb.retry_shift
    f.keepidle_s = pcb.keepidle_s
    f.keepintvl_s = pcb.keepintvl_s
    f.keepcnt = pcb.keepcnt
    f.user_timeout_ms = pcb.user_timeout_ms
    f.so_error = pcb.so_error
    f.soft_error = pcb.soft_error
    f.retransmits = pcb.retransmits
    f.rto_count = pcb.rto_count
    f.srtt_ns = pcb.rtt.srtt_ns
    f.rttvar_ns = pcb.rtt.rttvar_ns
    f.rto_ns = pcb.rtt.rto_ns
    f.timed_ago_ns = ago(now, pcb.rtt.timed_ns)
    f.ts_recent_ago_ns = ago(now, pcb.ts_recent_ns)
    f.progress_ago_ns = ago(now, pcb.progress_ns)
    f.last_recv_ago_ns = ago(now, pcb.last_recv_ns)
    f.last_send_ago_ns = ago(now, pcb.last_send_ns)
    f.challenge_ago_ns = ago(now, pcb.challenge_ns)
    f.changed_ago_ns = ago(now, pcb.changed_ns)
    for i in range(TT_COUNT):
        if pcb.timers[i] == INT64_MAX:
            f.timers_left_ns[i] = -1
        else:
            f.timers_left_ns[i] = ago(pcb.timers[i], now)
    f.bytes_in = pcb.bytes_in
    f.bytes_out = pcb.bytes_out
    memcpy(f.cc_priv, pcb.cc.priv, sizeof(f.cc_priv))
    memcpy(f.rec_priv, pcb.rec.priv, sizeof(f.rec_priv))
    memcpy(out, &f, sizeof(f))
    txq_copy_out(&pcb.snd, 0, pcb.snd.len_bytes, p)
    p += pcb.snd.len_bytes
    s = pcb.rcv.head
    while s != NULL:
        memcpy(p, s.data, s.len_bytes)
        p += s.len_bytes
        s = s.next
    s = pcb.ooo.head
    while s != NULL:
        memcpy(p, &s.seq, 4)
        memcpy(p + 4, &s.len_bytes, 4)
        memcpy(p + 8, s.data, s.len_bytes)
        p += 8 + s.len_bytes
        s = s.next
    return <size_t>(p - out)


# ---- after a death ----

cdef size_t tcp_freeze_remains(const tcp_env *env, const tcp_stat *last, const tcp_remains *r, uint8_t *out,
                               bint *in_doubt) noexcept nogil:
    """What is missing is made up so that it does no harm to a connection that has but its FIN to send or to await.

    Of an honest library's numbers, that is; tcp_thaw judges them as it does any state.
    """
    cdef frozen f
    cdef int i
    cdef bint eof = last.state >= TCP_CLOSE_WAIT
    cdef uint8_t state = <uint8_t>last.state
    cdef uint32_t flight = last.snd_nxt - last.snd_una
    if sizeof(f) > FROZEN_BYTES_MAX or last.state < TCP_ESTABLISHED or last.state > TCP_TIME_WAIT:
        return 0
    if last.unsent_bytes or last.unread_bytes or r.fin_sent > 1:
        return 0
    memset(&f, 0, sizeof(f))
    f.snd_max = f.snd_nxt = f.snd_una = last.snd_nxt
    for i in range(TT_COUNT):
        f.timers_left_ns[i] = -1
    if state == TCP_FIN_WAIT_1 or state == TCP_CLOSING or state == TCP_LAST_ACK:
        if r.fin_sent:
            f.snd_una -= 1
            flight -= 1
            f.timers_left_ns[TT_REXMT] = TCP_RTO_MIN_NS
        else:
            state = TCP_CLOSE_WAIT if eof else TCP_ESTABLISHED        # the close to come sends it
    elif state == TCP_TIME_WAIT:
        f.timers_left_ns[TT_2MSL] = TCP_TIME_WAIT_NS
    # The acknowledgement may have died with the process, in its ring. Should data be missing, the peer's answer to the
    # FIN says so: it stays where it was.
    in_doubt[0] = flight != 0
    if flight > DOUBT_SEGMENTS * <uint32_t>r.eff_mss:
        return 0
    f.magic = FROZEN_MAGIC
    f.version = FROZEN_VERSION
    f.record_bytes = sizeof(frozen)
    f.total_bytes = sizeof(frozen)
    f.flags = TF_OPENED
    if r.timestamps:
        f.flags |= TF_TS
    if r.wscale:
        f.flags |= TF_WSCALE
    if r.sack:
        f.flags |= TF_SACK
    if eof:
        f.flags |= TF_EOF | TF_FIN_SEEN
        f.rcv_fin = last.rcv_nxt - 1
    f.state = state
    f.snd_wscale = r.snd_wscale
    f.rcv_wscale = r.rcv_wscale
    f.cc_id = TCP_CC_NEWRENO
    f.rec_id = TCP_REC_NEWRENO
    f.our_mss = f.rcv_mss = r.our_mss
    f.snd_mss = r.snd_mss
    f.eff_mss = r.eff_mss
    f.iss = f.snd_una - 1
    f.snd_sml = f.rec_recover = f.snd_una
    f.snd_wl1 = last.rcv_nxt
    f.snd_wl2 = f.snd_una
    f.snd_wnd = last.snd_wnd_bytes
    f.max_sndwnd = r.max_sndwnd_bytes
    f.irs = last.rcv_nxt - 1
    f.rcv_nxt = f.last_ack_sent = last.rcv_nxt
    f.rcv_adv = r.rcv_adv
    f.ts_recent = r.ts_recent
    f.ts_now = <uint32_t>(<uint64_t>env.now_ns // 1000000) + r.ts_offset
    f.sndbuf_bytes = f.rcvbuf_bytes = REMAINS_BUFFER_BYTES
    f.cwnd_bytes = last.cwnd_bytes
    f.ssthresh_bytes = last.ssthresh_bytes
    f.srtt_ns = <int64_t>last.srtt_ns
    f.rttvar_ns = <int64_t>last.rttvar_ns
    f.rto_ns = <int64_t>last.rto_ns
    f.keepidle_s = 7200                      # of no use, but in their range
    f.keepintvl_s = 75
    f.keepcnt = 9
    f.bytes_in = last.bytes_in
    f.bytes_out = last.bytes_out
    memcpy(out, &f, sizeof(f))
    return sizeof(f)


# ---- and back ----

cdef bint times_are_sane(const frozen *f) noexcept nogil:
    cdef int i
    cdef int64_t[7] t
    t[0] = f.timed_ago_ns
    t[1] = f.ts_recent_ago_ns
    t[2] = f.progress_ago_ns
    t[3] = f.last_recv_ago_ns
    t[4] = f.last_send_ago_ns
    t[5] = f.challenge_ago_ns
    t[6] = f.changed_ago_ns
    for i in range(7):
        if t[i] < 0 or t[i] > TIME_MAX_NS:
            return False
    for i in range(TT_COUNT):
        if f.timers_left_ns[i] < -1 or f.timers_left_ns[i] > TIME_MAX_NS:
            return False
        if f.state == TCP_CLOSED and f.timers_left_ns[i] != -1:
            return False
    return 0 <= f.srtt_ns <= TCP_RTO_MAX_NS and 0 <= f.rttvar_ns <= TCP_RTO_MAX_NS and \
        TCP_RTO_MIN_NS <= f.rto_ns <= TCP_RTO_MAX_NS and \
        f.rtt_backoff <= TCP_BACKOFF_MAX and f.rtt_timing <= 1


cdef bint values_are_sane(const frozen *f) noexcept nogil:
    if f.state >= TCP_STATES or f.state == TCP_LISTEN or f.flags & ~<uint32_t>TF_ALL:
        return False
    if f.snd_wscale > 14 or f.rcv_wscale > 14:
        return False
    if not TCP_MSS_MIN <= f.our_mss <= TCP_PAYLOAD_MAX or not TCP_MSS_MIN <= f.snd_mss <= f.our_mss:
        return False
    if f.eff_mss > f.snd_mss or f.eff_mss < TCP_MSS_MIN - TCP_TS_BYTES or not 1 <= f.rcv_mss <= f.our_mss:
        return False
    if f.snd_wnd > WINDOW_MAX_BYTES or f.max_sndwnd > WINDOW_MAX_BYTES:
        return False
    if not 1 <= f.sndbuf_bytes <= BUFFER_MAX_BYTES or not 1 <= f.rcvbuf_bytes <= BUFFER_MAX_BYTES:
        return False
    if f.snd_bytes > BUFFER_MAX_BYTES or f.rcv_bytes > BUFFER_MAX_BYTES + 65536 or f.ooo_count > 2 * OOO_MAX_PIECES:
        return False
    if tcp_cc_table(f.cc_id) == NULL or tcp_rec_table(f.rec_id) == NULL:
        return False
    if not 1 <= f.cwnd_bytes <= TCP_CWND_MAX_BYTES or not 1 <= f.ssthresh_bytes <= TCP_CWND_MAX_BYTES:
        return False
    if f.rec_state > REC_LOSS or f.rec_resend > 1 or f.rec_partial_seen > 1 or f.retry_shift > 6:
        return False
    if not 1 <= f.keepidle_s <= 0x7FFF or not 1 <= f.keepintvl_s <= 0x7FFF or not 1 <= f.keepcnt <= 127:
        return False
    return -4095 <= f.so_error <= 0 and -4095 <= f.soft_error <= 0 and f.user_timeout_ms <= 0x7FFFFFFF


cdef bint sequences_are_sane(const frozen *f) noexcept nogil:
    """Do the sequence numbers fit the state, the data and each other?"""
    cdef uint32_t sent = f.snd_max - f.snd_una, gone_back = f.snd_nxt - f.snd_una
    cdef uint32_t wnd = f.rcv_adv - f.rcv_nxt
    cdef bint eof = (f.flags & TF_EOF) != 0
    if f.state == TCP_CLOSED:
        return f.snd_bytes == 0 and f.ooo_count == 0
    if gone_back > sent or wnd > WINDOW_MAX_BYTES + 65536:
        return False
    if f.state == TCP_SYN_SENT or f.state == TCP_SYN_RECEIVED:
        return f.snd_una == f.iss and sent <= 1 and f.snd_bytes == 0 and f.rcv_bytes == 0 and f.ooo_count == 0 and \
            not f.flags & (TF_EOF | TF_FIN_SEEN)
    if f.state == TCP_FIN_WAIT_2 or f.state == TCP_TIME_WAIT:
        if f.snd_bytes or sent:
            return False
    elif f.state == TCP_ESTABLISHED or f.state == TCP_CLOSE_WAIT:
        if sent > f.snd_bytes:
            return False
    elif sent > f.snd_bytes + 1:
        return False
    if eof != (f.state >= TCP_CLOSE_WAIT):
        return False
    if eof:
        return f.flags & TF_FIN_SEEN and f.rcv_fin == f.rcv_nxt - 1 and f.ooo_count == 0
    return not f.flags & TF_FIN_SEEN or f.rcv_fin - f.rcv_nxt <= wnd


cdef int thaw_ooo(tcp_env *env, tcp_pcb *pcb, const uint8_t *p, size_t left, uint32_t count) noexcept nogil:
    cdef uint32_t seq, n, i, after = pcb.rcv_nxt
    cdef uint32_t edge = pcb.rcv_fin if pcb.flags & TF_FIN_SEEN else pcb.rcv_adv
    cdef bint held
    cdef rxseg *s
    for i in range(count):
        if left < 8:
            return -EINVAL
        memcpy(&seq, p, 4)
        memcpy(&n, p + 4, 4)
        p += 8
        left -= 8
        if n == 0 or n > left or seq_lt(seq, after) or (i == 0 and seq == after):
            return -EINVAL
        if n > edge - pcb.rcv_nxt or seq - pcb.rcv_nxt > edge - pcb.rcv_nxt - n:
            return -EINVAL
        s = rxseg_new(env.bufs, p, n, seq, NULL, 0, &held)
        if s == NULL:
            return -ENOMEM
        rxq_push(&pcb.ooo, s)
        p += n
        left -= n
        after = seq + n
    return 0 if left == 0 else -EINVAL


cdef int tcp_thaw(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n) noexcept nogil:
    cdef frozen f
    cdef int i
    cdef const uint8_t *p = data + sizeof(frozen)
    cdef size_t left
    cdef uint32_t part, todo
    cdef bint held
    cdef int64_t now = env.now_ns
    if n < sizeof(frozen):
        return -EINVAL
    memcpy(&f, data, sizeof(f))
    if f.magic != FROZEN_MAGIC or f.version != FROZEN_VERSION or f.record_bytes != sizeof(frozen) or f.total_bytes != n:
        return -EINVAL
    left = n - sizeof(frozen)
    if f.snd_bytes > left or f.rcv_bytes > left - f.snd_bytes:
        return -EINVAL
    if not values_are_sane(&f) or not times_are_sane(&f) or not sequences_are_sane(&f):
        return -EINVAL
    pcb.state = f.state
    pcb.flags = f.flags
    pcb.snd_wscale = f.snd_wscale
    pcb.rcv_wscale = f.rcv_wscale
    pcb.keep_probes = f.keep_probes
    pcb.our_mss = f.our_mss
    pcb.snd_mss = f.snd_mss
    pcb.eff_mss = f.eff_mss
    pcb.rcv_mss = f.rcv_mss
    pcb.iss = f.iss
    pcb.snd_una = f.snd_una
    pcb.snd_nxt = f.snd_nxt
    pcb.snd_max = f.snd_max
    pcb.snd_wnd = f.snd_wnd
    pcb.snd_wl1 = f.snd_wl1
    pcb.snd_wl2 = f.snd_wl2
    pcb.max_sndwnd = f.max_sndwnd
    pcb.snd_sml = f.snd_sml
    pcb.irs = f.irs
    pcb.rcv_nxt = f.rcv_nxt
    pcb.rcv_adv = f.rcv_adv
    pcb.rcv_fin = f.rcv_fin
    pcb.last_ack_sent = f.last_ack_sent
    pcb.unacked_in_bytes = f.unacked_in_bytes
    pcb.ts_recent = f.ts_recent
    pcb.ts_offset = 0
    pcb.ts_offset = f.ts_now - tcp_ts_now(pcb, now)      # the timestamp clock goes on where it stood
    pcb.sndbuf_bytes = f.sndbuf_bytes
    pcb.rcvbuf_bytes = f.rcvbuf_bytes
    tcp_cc_start(&pcb.cc, f.cc_id, f.eff_mss)
    pcb.cc.cwnd_bytes = f.cwnd_bytes
    pcb.cc.ssthresh_bytes = f.ssthresh_bytes
    pcb.cc.acked_bytes = f.cc_acked_bytes
    memcpy(pcb.cc.priv, f.cc_priv, sizeof(f.cc_priv))
    tcp_rec_start(&pcb.rec, f.rec_id, f.iss)
    pcb.rec.recover = f.rec_recover
    pcb.rec.resend_seq = f.rec_resend_seq
    pcb.rec.state = f.rec_state
    pcb.rec.dupacks = f.rec_dupacks
    pcb.rec.resend = f.rec_resend
    pcb.rec.partial_seen = f.rec_partial_seen
    memcpy(pcb.rec.priv, f.rec_priv, sizeof(f.rec_priv))
    if pcb.rec.state == REC_FAST and f.rec_id == TCP_REC_SACK:
        pcb.rec.resend = 1               # the peer's blocks stayed behind: it reports them again
        pcb.rec.resend_seq = f.snd_una
    pcb.rtt.srtt_ns = f.srtt_ns
    pcb.rtt.rttvar_ns = f.rttvar_ns
    pcb.rtt.rto_ns = f.rto_ns
    pcb.rtt.timed_ns = now - f.timed_ago_ns
    pcb.rtt.timed_seq = f.rtt_timed_seq
    pcb.rtt.timing = f.rtt_timing
    pcb.rtt.backoff = f.rtt_backoff
    pcb.ts_recent_ns = now - f.ts_recent_ago_ns
    pcb.progress_ns = now - f.progress_ago_ns
    pcb.last_recv_ns = now - f.last_recv_ago_ns
    pcb.last_send_ns = now - f.last_send_ago_ns
    pcb.challenge_ns = now - f.challenge_ago_ns
    pcb.changed_ns = now - f.changed_ago_ns
    for i in range(TT_COUNT):
        pcb.timers[i] = INT64_MAX if f.timers_left_ns[i] < 0 else now + f.timers_left_ns[i]
    pcb.challenge_count = f.challenge_count
    pcb.retry_shift = f.retry_shift
    pcb.keepidle_s = f.keepidle_s
    pcb.keepintvl_s = f.keepintvl_s
    pcb.keepcnt = f.keepcnt
    pcb.user_timeout_ms = f.user_timeout_ms
    pcb.so_error = f.so_error
    pcb.soft_error = f.soft_error
    pcb.retransmits = f.retransmits
    pcb.rto_count = f.rto_count
    pcb.bytes_in = f.bytes_in
    pcb.bytes_out = f.bytes_out
    if f.snd_bytes and txq_append_copy(env.bufs, &pcb.snd, p, f.snd_bytes) < 0:
        return -ENOMEM
    p += f.snd_bytes
    todo = f.rcv_bytes
    while todo:
        part = todo if todo < 65536 else 65536
        if rxq_append(env.bufs, &pcb.rcv, p, part, 0, NULL, True, &held) < 0:
            return -ENOMEM
        p += part
        todo -= part
    return thaw_ooo(env, pcb, p, left - f.snd_bytes - f.rcv_bytes, f.ooo_count)
