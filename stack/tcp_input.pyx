"""A segment arrives: checks, acknowledgement, data, FIN (RFC 9293 3.10.7 in its order), and ICMP errors.

Nothing is sent from here but resets and duplicate ACKs, which must not be coalesced: input changes state and sets flags, ``tcp_output`` acts at
the end of the burst.
"""
# Read first: RFC 9293 3.10.7.3 (SYN-SENT), 3.10.7.4 (the rest); RFC 5961 3 to 5; RFC 7323 3 to 5; RFC 5681 3.2.
# Call order: tcp_segment_arrives -> in_syn_sent | in_other_states -> on_ack -> on_data -> on_fin.

from libc.errno cimport ECONNREFUSED, ECONNRESET, EPIPE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_link
from ulnet.stack.buf cimport rxq_append, txq_drop
from ulnet.stack.seqnum cimport seq_ge, seq_gt, seq_le, seq_lt
from ulnet.stack.tcp cimport TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, tcp_env, tcp_seg
from ulnet.stack.tcp_cb cimport *
from ulnet.stack.tcp_congestion cimport tcp_cc_mss, tcp_cc_start
from ulnet.stack.tcp_output cimport tcp_send_bare, tcp_send_dup_ack
from ulnet.stack.tcp_reass cimport ooo_cut, ooo_insert, ooo_pull
from ulnet.stack.tcp_recovery cimport (
    REC_ENTER, REC_EXIT, REC_GROW, REC_INFLATE, REC_KEEP_TIMER, REC_LOSS, REC_NEWS, REC_PARTIAL, REC_SLOW,
    TCP_REC_NEWRENO, TCP_REC_SACK, tcp_rec_forget, tcp_rec_start,
)
from ulnet.stack.tcp_rtt cimport TCP_RTO_AFTER_SYN_LOSS_NS, tcp_rtt_sample
from ulnet.stack.tcp_timer cimport (
    TCP_DELACK_NS, TCP_FIN_WAIT_2_NS, TCP_TIME_WAIT_NS, tcp_arm_keepalive, tcp_arm_rexmt, tcp_done,
)

cdef extern from *:                      # C literals: an enum would make int of them
    """
    #define CHALLENGE_WINDOW_NS 5000000000LL
    #define PAWS_IDLE_NS 2073600000000000LL
    """
    const int64_t CHALLENGE_WINDOW_NS
    const int64_t PAWS_IDLE_NS               # 24 days: RFC 7323 5.5

cdef enum:
    CHALLENGES_A_WINDOW = 10             # RFC 5961 7: 10 challenge ACKs in 5 s, here for each connection
    PMTU_MIN_BYTES = 552                 # RFC 5927 7.2: a forged "too big" must not make us send crumbs


cdef void challenge(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """A rate-limited ACK that a real peer corrects us by (RFC 5961 7). The limit is the connection's own: a
    limit shared by all would tell an attacker about other connections (CVE-2016-5696)."""
    if env.now_ns - pcb.challenge_ns >= CHALLENGE_WINDOW_NS:
        pcb.challenge_ns = env.now_ns
        pcb.challenge_count = 0
    if pcb.challenge_count >= CHALLENGES_A_WINDOW:
        return
    pcb.challenge_count += 1
    env.counters.challenge_acks += 1
    tcp_want_ack(pcb)


cdef inline void answer_unacceptable(tcp_env *env, tcp_pcb *pcb, const tcp_seg *seg) noexcept nogil:
    # An ACK for each, but bare ACKs are answered at a limited rate: two confused ends must not play tennis.
    if seg.len_bytes or seg.flags & (TCP_FIN | TCP_SYN):
        tcp_want_ack(pcb)
    else:
        challenge(env, pcb)


# ---- handshake ----

cdef void tcp_syn_accepted(tcp_pcb *pcb, const tcp_seg *syn, int64_t now_ns) noexcept nogil:
    """The peer's SYN: its sequence number, window and options."""
    cdef uint32_t mss = syn.mss if syn.mss else TCP_MSS_DEFAULT
    if mss < TCP_MSS_MIN:
        mss = TCP_MSS_MIN
    pcb.snd_mss = <uint16_t>(mss if mss < pcb.our_mss else pcb.our_mss)
    pcb.eff_mss = pcb.snd_mss
    if pcb.flags & TF_WSCALE and syn.wscale != 255:
        pcb.snd_wscale = syn.wscale if syn.wscale < 14 else 14     # RFC 7323 2.3
    else:
        pcb.flags &= ~<uint32_t>TF_WSCALE
        pcb.snd_wscale = 0
        pcb.rcv_wscale = 0
    if not syn.sack_ok:
        pcb.flags &= ~<uint32_t>TF_SACK
    if pcb.flags & TF_TS and syn.has_ts:
        pcb.ts_recent = syn.ts_val
        pcb.ts_recent_ns = now_ns
        pcb.eff_mss -= TCP_TS_BYTES
    else:
        pcb.flags &= ~<uint32_t>TF_TS
    pcb.irs = syn.seq
    pcb.rcv_nxt = syn.seq + 1
    pcb.rcv_adv = pcb.rcv_nxt
    if pcb.state == TCP_SYN_SENT:        # our SYN announced a window
        pcb.rcv_adv += pcb.rcvbuf_bytes if pcb.rcvbuf_bytes < 0xFFFF else 0xFFFF
    pcb.last_ack_sent = pcb.rcv_nxt
    pcb.snd_wnd = syn.wnd                # never scaled in a SYN
    pcb.max_sndwnd = syn.wnd
    pcb.snd_wl1 = syn.seq
    pcb.snd_wl2 = syn.ack
    pcb.rcv_mss = TCP_MSS_DEFAULT if TCP_MSS_DEFAULT < pcb.our_mss else pcb.our_mss
    pcb.last_recv_ns = now_ns


cdef void establish(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    tcp_set_state(pcb, TCP_ESTABLISHED, env.now_ns)
    pcb.snd_una = pcb.iss + 1
    pcb.snd_nxt = pcb.snd_una
    pcb.snd_max = pcb.snd_una
    pcb.snd_sml = pcb.snd_una
    tcp_timer_off(pcb, TT_REXMT)
    if pcb.rtt.timing:
        tcp_rtt_sample(&pcb.rtt, env.now_ns - pcb.rtt.timed_ns)
        pcb.rtt.timing = 0
    pcb.rtt.backoff = 0
    tcp_cc_start(&pcb.cc, pcb.cc.ops.id, pcb.eff_mss)
    tcp_rec_start(&pcb.rec, TCP_REC_SACK if pcb.flags & TF_SACK else TCP_REC_NEWRENO, pcb.iss)
    if pcb.flags & TF_SYN_RESENT:
        pcb.cc.cwnd_bytes = pcb.eff_mss                        # RFC 5681 3.1
        if pcb.rtt.srtt_ns == 0:
            pcb.rtt.rto_ns = TCP_RTO_AFTER_SYN_LOSS_NS         # RFC 6298 (5.7)
    pcb.progress_ns = env.now_ns
    pcb.soft_error = 0
    tcp_arm_keepalive(pcb, env.now_ns)
    if pcb.flags & TF_CLOSE_PENDING:
        tcp_set_state(pcb, TCP_FIN_WAIT_1, env.now_ns)
        pcb.flags |= TF_OUTPUT


cdef void in_syn_sent(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil:
    # RFC 9293 3.10.7.3. Data or FIN in a SYN is left to be sent again.
    cdef bint acked = (seg.flags & TCP_ACK) != 0
    if acked and seg.ack != pcb.iss + 1:
        env.counters.bad_ack_in += 1
        if not seg.flags & TCP_RST:
            tcp_send_bare(env, pcb, seg.ack, 0, TCP_RST)
        return
    if seg.flags & TCP_RST:
        if acked:
            env.counters.resets_in += 1
            tcp_done(env, pcb, -ECONNREFUSED)
        return
    if not seg.flags & TCP_SYN:
        return
    tcp_syn_accepted(pcb, seg, env.now_ns)
    if acked:
        establish(env, pcb)
        tcp_want_ack(pcb)
        return
    # Simultaneous open: our SYN again, now with an ACK
    tcp_set_state(pcb, TCP_SYN_RECEIVED, env.now_ns)
    pcb.snd_nxt = pcb.iss
    pcb.snd_max = pcb.iss
    pcb.flags |= TF_OUTPUT


# ---- reset ----

cdef void on_reset(tcp_env *env, tcp_pcb *pcb, const tcp_seg *seg) noexcept nogil:
    cdef uint32_t wnd = tcp_rcv_wnd(pcb)
    if pcb.state == TCP_TIME_WAIT:
        return                           # RFC 1337: a reset must not end TIME-WAIT
    if seg.seq != pcb.rcv_nxt:
        # RFC 5961 3.2: only the exact number resets; within the window, ask
        if seq_gt(seg.seq, pcb.rcv_nxt) and seq_lt(seg.seq, pcb.rcv_nxt + wnd):
            challenge(env, pcb)
        else:
            env.counters.out_of_window_in += 1
        return
    env.counters.resets_in += 1
    if pcb.state == TCP_SYN_RECEIVED:
        tcp_done(env, pcb, -ECONNRESET if pcb.flags & TF_PASSIVE else -ECONNREFUSED)
    elif pcb.state == TCP_CLOSING or pcb.state == TCP_LAST_ACK:
        tcp_done(env, pcb, 0)            # RFC 9293 3.10.7.4: both sides had closed
    elif pcb.state == TCP_CLOSE_WAIT:
        tcp_done(env, pcb, -EPIPE)       # as Linux: the stream had its end, it is writing that fails
    else:
        tcp_done(env, pcb, -ECONNRESET)


# ---- acknowledgement ----

cdef void enter_recovery(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    env.counters.fast_retransmits += 1
    pcb.cc.ops.on_enter_recovery(&pcb.cc, pcb.snd_max - pcb.snd_una, env.now_ns)


cdef void on_sack(tcp_env *env, tcp_pcb *pcb, const tcp_seg *seg) noexcept nogil:
    cdef int todo = pcb.rec.ops.on_sack(&pcb.rec, seg.sack, seg.sack_count, pcb.snd_una, pcb.snd_max, pcb.eff_mss)
    if todo & REC_ENTER:
        enter_recovery(env, pcb)
        pcb.cc.cwnd_bytes = pcb.cc.ssthresh_bytes              # RFC 6675 5 (4.2): no inflation, blocks say what left
    if todo & REC_NEWS and not pcb.flags & TF_PERSIST and not tcp_timer_is_off(pcb, TT_REXMT):
        # As RFC 8985 7.2: the path works, so what is lost next may be asked after by another probe.
        pcb.flags &= ~<uint32_t>TF_TLP
        tcp_arm_rexmt(pcb, env.now_ns)
    pcb.flags |= TF_OUTPUT


cdef void on_dup_ack(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef int todo
    env.counters.dup_acks_in += 1
    todo = pcb.rec.ops.on_dup_ack(&pcb.rec, pcb.snd_una, pcb.snd_max)
    if todo & REC_ENTER:
        enter_recovery(env, pcb)
    if todo & REC_INFLATE:
        pcb.cc.ops.on_dup_ack(&pcb.cc)
    pcb.flags |= TF_OUTPUT


cdef bint on_new_ack(tcp_env *env, tcp_pcb *pcb, uint32_t ack) noexcept nogil:
    """snd_una moves. True when the acknowledgement covers our FIN."""
    cdef uint32_t acked = ack - pcb.snd_una
    cdef bint fin_acked = acked > pcb.snd.len_bytes
    cdef bint inflated = pcb.rec.ops.on_sack == NULL or pcb.rec.blind
    cdef int todo
    if pcb.rtt.timing and seq_gt(ack, pcb.rtt.timed_seq):
        tcp_rtt_sample(&pcb.rtt, env.now_ns - pcb.rtt.timed_ns)
        pcb.rtt.timing = 0
    # differs: RFC 6298 (5.7) keeps the backoff until a new sample; as BSD and Linux, progress ends it.
    pcb.rtt.backoff = 0
    txq_drop(env.bufs, &pcb.snd, acked)
    pcb.snd_una = ack
    if seq_lt(pcb.snd_nxt, ack):
        pcb.snd_nxt = ack
    pcb.flags &= ~<uint32_t>(TF_PROBED | TF_TLP)
    pcb.flags |= TF_OUTPUT
    pcb.progress_ns = env.now_ns
    pcb.soft_error = 0
    todo = pcb.rec.ops.on_ack(&pcb.rec, ack, pcb.snd_max)
    if todo & REC_GROW:
        pcb.cc.ops.on_ack(&pcb.cc, acked, (pcb.flags & TF_CWND_LIMITED) != 0 or (todo & REC_SLOW) != 0,
                          (todo & REC_SLOW) != 0, env.now_ns, pcb.rtt.srtt_ns)
    elif todo & REC_PARTIAL:
        pcb.cc.ops.on_partial_ack(&pcb.cc, acked)
    elif todo & REC_EXIT and inflated:
        pcb.cc.ops.on_exit_recovery(&pcb.cc, pcb.snd_max - ack)
    if ack == pcb.snd_max:
        tcp_timer_off(pcb, TT_REXMT)                           # RFC 6298 (5.2)
        pcb.flags &= ~<uint32_t>TF_PERSIST
    elif not todo & REC_KEEP_TIMER:
        tcp_arm_rexmt(pcb, env.now_ns)                         # RFC 6298 (5.3)
    return fin_acked


cdef bint on_ack(tcp_env *env, tcp_pcb *pcb, const tcp_seg *seg, uint32_t seq, uint32_t n) noexcept nogil:
    """The ACK and window fields. False: the segment is to be dropped, or the connection is gone."""
    cdef uint32_t ack = seg.ack
    cdef uint32_t wnd = seg.wnd << pcb.snd_wscale
    cdef bint fin_acked = False
    cdef bint news = seq_gt(ack, pcb.snd_una)
    if seq_gt(ack, pcb.snd_max) or seq_lt(ack, pcb.snd_una - pcb.max_sndwnd):
        env.counters.bad_ack_in += 1                           # RFC 5961 5.2
        challenge(env, pcb)
        return False
    if news:
        fin_acked = on_new_ack(env, pcb, ack)
    elif ack == pcb.snd_una and pcb.snd_max != pcb.snd_una and not pcb.flags & TF_PROBED:
        # RFC 5681 2: what makes a duplicate ACK. One that opens the window, or comes with data, is none; nor is one
        # that answers what we sent twice (RFC 2883), a tail probe maybe.
        if seg.sack_count and seq_le(seg.sack[1], ack):
            env.counters.dsacks_in += 1
        elif n == 0 and wnd == pcb.snd_wnd and wnd and not seg.flags & TCP_FIN:
            on_dup_ack(env, pcb)
    if seg.sack_count and pcb.rec.ops.on_sack != NULL and pcb.snd_max != pcb.snd_una:
        on_sack(env, pcb, seg)
    if pcb.flags & TF_PERSIST and not pcb.flags & TF_USER_GONE:
        pcb.progress_ns = env.now_ns                           # RFC 9293 3.8.6.1: it answers, so we go on asking
    # differs: RFC 9293 (3.10.7.4) looks at SND.WL1 and WL2 alone. As Linux, what acknowledges more is newer, also when
    # it comes with data sent again: with the old window kept, snd_una would push the edge beyond what was offered.
    if news or (ack == pcb.snd_una and (seq_lt(pcb.snd_wl1, seq) or (pcb.snd_wl1 == seq and seq_le(pcb.snd_wl2, ack)))):
        if wnd > pcb.snd_wnd:
            pcb.flags |= TF_OUTPUT
            if pcb.flags & TF_PERSIST:
                pcb.flags &= ~<uint32_t>TF_PERSIST
                pcb.rtt.backoff = 0
                tcp_timer_off(pcb, TT_REXMT)
        pcb.snd_wnd = wnd
        pcb.snd_wl1 = seq
        pcb.snd_wl2 = ack
        if wnd > pcb.max_sndwnd:
            pcb.max_sndwnd = wnd
    if not fin_acked:
        return True
    if pcb.state == TCP_FIN_WAIT_1:
        tcp_set_state(pcb, TCP_FIN_WAIT_2, env.now_ns)
        if pcb.flags & TF_USER_GONE:
            pcb.timers[TT_2MSL] = env.now_ns + TCP_FIN_WAIT_2_NS
    elif pcb.state == TCP_CLOSING:
        enter_time_wait(env, pcb)
    elif pcb.state == TCP_LAST_ACK:
        tcp_done(env, pcb, 0)
        return False
    return True


cdef void enter_time_wait(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    tcp_set_state(pcb, TCP_TIME_WAIT, env.now_ns)
    tcp_timer_off(pcb, TT_REXMT)
    tcp_timer_off(pcb, TT_KEEP)
    pcb.timers[TT_2MSL] = env.now_ns + TCP_TIME_WAIT_NS


# ---- data and FIN ----

cdef void frame_limit(tcp_pcb *pcb, uint32_t n, const ul_link *link) noexcept nogil:
    """Bound the window by ring slots. A frame takes a whole slot, however much of it it fills: a window of short frames
    that fills the receive buffer would overrun the ring whenever its reader is late."""
    if n > pcb.rcv_frame_bytes:
        pcb.rcv_frame_bytes = n
    else:
        pcb.rcv_frame_bytes -= (pcb.rcv_frame_bytes - n) >> 5
    pcb.rcv_limit_bytes = tcp_ring_limit(link, max(pcb.rcv_frame_bytes, <uint32_t>pcb.our_mss), pcb.rtt.least_ns)


cdef bint on_data(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg, const uint8_t *data, uint32_t n, uint32_t seq) noexcept nogil:
    """Payload within the window. False: the connection was ended."""
    cdef bint held = False
    cdef uint32_t size
    if pcb.state != TCP_ESTABLISHED and pcb.state != TCP_FIN_WAIT_1 and pcb.state != TCP_FIN_WAIT_2:
        return True                      # behind a FIN there is nothing (RFC 9293 3.10.7.4)
    if pcb.flags & TF_USER_GONE or (pcb.flags & TF_SHUT_RD and pcb.state != TCP_ESTABLISHED):
        # Nobody will read it: tell the peer so (RFC 2525 2.17, RFC 9293 3.6.1); Linux: also after SHUT_RDWR
        tcp_send_bare(env, pcb, pcb.snd_max, pcb.rcv_nxt, TCP_RST | TCP_ACK)
        tcp_done(env, pcb, -ECONNRESET)
        return False
    if pcb.flags & TF_FIN_SEEN:
        if seq_ge(seq, pcb.rcv_fin):
            return True
        if seq_gt(seq + n, pcb.rcv_fin):
            n = pcb.rcv_fin - seq
    size = seg.gso_size_bytes if seg.gso_size_bytes else n
    if size > pcb.rcv_mss:
        pcb.rcv_mss = <uint16_t>(size if size < pcb.our_mss else pcb.our_mss)
    if seg.frame != NULL and env.bufs.link != NULL and env.bufs.link.slots:
        frame_limit(pcb, n, env.bufs.link)
    if seq != pcb.rcv_nxt:
        env.counters.out_of_order_in += 1
        if ooo_insert(env.bufs, &pcb.ooo, data, n, seq, seg.frame, 2 * <uint64_t>pcb.rcvbuf_bytes + 65536, &held) < 0:
            env.counters.nomem_dropped += 1
        seg.held = held
        pcb.ooo_newest = seq
        tcp_send_dup_ack(env, pcb)       # RFC 5681 4.2: at once
        return True
    # As Linux, also after shutdown(SHUT_RD): what comes all the same can be read.
    if rxq_append(env.bufs, &pcb.rcv, data, n, seq, seg.frame, True, &held) < 0:
        env.counters.nomem_dropped += 1
        tcp_want_ack(pcb)
        return True
    seg.held = held
    pcb.rcv_nxt += n
    if pcb.ooo.head != NULL:
        pcb.rcv_nxt = ooo_pull(env.bufs, &pcb.ooo, &pcb.rcv, pcb.rcv_nxt)
        tcp_want_ack(pcb)                # RFC 5681 4.2: a filled gap, at once
    pcb.unacked_in_bytes += n
    if pcb.unacked_in_bytes >= 2 * <uint32_t>pcb.rcv_mss or pcb.flags & TF_QUICKACK:
        tcp_want_ack(pcb)
    elif tcp_timer_is_off(pcb, TT_DELACK):
        pcb.timers[TT_DELACK] = env.now_ns + TCP_DELACK_NS
    if seq_lt(pcb.rcv_adv, pcb.rcv_nxt):
        pcb.rcv_adv = pcb.rcv_nxt
    return True


cdef void on_fin(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    pcb.rcv_nxt += 1
    if seq_lt(pcb.rcv_adv, pcb.rcv_nxt):
        pcb.rcv_adv = pcb.rcv_nxt
    pcb.flags |= TF_EOF
    tcp_want_ack(pcb)
    if pcb.state == TCP_ESTABLISHED:
        tcp_set_state(pcb, TCP_CLOSE_WAIT, env.now_ns)
    elif pcb.state == TCP_FIN_WAIT_1:
        tcp_set_state(pcb, TCP_CLOSING, env.now_ns)
    elif pcb.state == TCP_FIN_WAIT_2:
        enter_time_wait(env, pcb)


cdef void in_other_states(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil:
    cdef uint32_t seq = seg.seq, n = seg.len_bytes, before, old, edge
    cdef const uint8_t *data = seg.data
    cdef bint fin = (seg.flags & TCP_FIN) != 0
    cdef bint syn = (seg.flags & TCP_SYN) != 0
    cdef bint stale = False
    # PAWS (RFC 7323 5.3); resets are exempt
    if pcb.flags & TF_TS and not seg.flags & TCP_RST:
        if not seg.has_ts:
            env.counters.paws_dropped += 1                     # RFC 7323 3.2
            return
        if <int32_t>(seg.ts_val - pcb.ts_recent) < 0 and env.now_ns - pcb.ts_recent_ns < PAWS_IDLE_NS:
            env.counters.paws_dropped += 1
            answer_unacceptable(env, pcb, seg)
            return
    if seg.flags & TCP_RST:
        on_reset(env, pcb, seg)
        return
    if syn:
        if pcb.state == TCP_SYN_RECEIVED and seq == pcb.irs:
            if not seg.flags & TCP_ACK:
                pcb.snd_nxt = pcb.iss                          # our SYN,ACK was lost: again
                pcb.flags |= TF_OUTPUT
                return
            seq += 1                                           # simultaneous open: the peer's SYN,ACK
        else:
            # RFC 5961 4.2. differs: also in SYN-RECEIVED, where RFC 9293 would go back to LISTEN; a peer that
            # really began anew answers our ACK with an exact reset.
            challenge(env, pcb)
            return
    # Sequence numbers (RFC 9293 3.10.7.4, first)
    before = pcb.rcv_nxt
    edge = pcb.rcv_adv
    if seq_lt(seq, pcb.rcv_nxt):
        old = pcb.rcv_nxt - seq
        if old >= n + fin:
            env.counters.duplicate_in += 1
            pcb.dup_left = seq
            pcb.dup_right = seq + n
            answer_unacceptable(env, pcb, seg)
            if fin and pcb.state == TCP_TIME_WAIT:
                pcb.timers[TT_2MSL] = env.now_ns + TCP_TIME_WAIT_NS
            if n == 0:
                return                   # keep-alive, or an old FIN
            # All data known, but the ACK may be new: two ends that both resend would else wait for each other.
            stale = True
            n = 0
            fin = False
        else:
            pcb.dup_left = seq
            pcb.dup_right = pcb.rcv_nxt
            data += old
            n -= old
        seq = pcb.rcv_nxt
    elif seq_gt(seq, edge) or (seq == edge and seq != pcb.rcv_nxt and n):
        # differs: a bare ACK right at the edge is taken, as the peer that filled our window sends it
        env.counters.out_of_window_in += 1
        answer_unacceptable(env, pcb, seg)
        return
    if seq_gt(seq + n, edge):
        env.counters.out_of_window_in += 1
        n = edge - seq
        fin = False
        tcp_want_ack(pcb)
    pcb.last_recv_ns = env.now_ns
    pcb.keep_probes = 0
    if pcb.flags & TF_TS and seq_le(seg.seq, pcb.last_ack_sent) and not stale:
        pcb.ts_recent = seg.ts_val       # RFC 7323 4.3
        pcb.ts_recent_ns = env.now_ns
    if not seg.flags & TCP_ACK:
        return
    if pcb.state == TCP_SYN_RECEIVED:
        if seg.ack != pcb.iss + 1:
            env.counters.bad_ack_in += 1
            tcp_send_bare(env, pcb, seg.ack, 0, TCP_RST)
            return
        establish(env, pcb)
        pcb.snd_wnd = seg.wnd if syn else seg.wnd << pcb.snd_wscale
        pcb.max_sndwnd = pcb.snd_wnd
        pcb.snd_wl1 = seq
        pcb.snd_wl2 = seg.ack
        if syn:
            tcp_want_ack(pcb)
    elif not on_ack(env, pcb, seg, seq, n):
        return
    if fin and not pcb.flags & TF_FIN_SEEN:
        # Before the data: pieces that a lying peer sent beyond its FIN must not be delivered with it.
        pcb.flags |= TF_FIN_SEEN
        pcb.rcv_fin = seq + n
        ooo_cut(env.bufs, &pcb.ooo, pcb.rcv_fin)
        tcp_want_ack(pcb)
    if n and not on_data(env, pcb, seg, data, n, seq):
        return
    pcb.bytes_in += pcb.rcv_nxt - before
    env.counters.bytes_in += pcb.rcv_nxt - before
    if pcb.flags & TF_FIN_SEEN and not pcb.flags & TF_EOF and pcb.rcv_nxt == pcb.rcv_fin:
        on_fin(env, pcb)


cdef void tcp_segment_arrives(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil:
    seg.held = 0
    env.counters.segs_in += 1
    if pcb.state == TCP_SYN_SENT:
        in_syn_sent(env, pcb, seg)
    elif pcb.state != TCP_CLOSED:
        in_other_states(env, pcb, seg)


# ---- ICMP ----

cdef void tcp_icmp_arrives(tcp_env *env, tcp_pcb *pcb, int error, uint32_t seq, uint32_t next_mtu_bytes) noexcept nogil:
    cdef uint32_t mss
    # RFC 5927 4.1: it must speak of something we sent and that is not yet acknowledged
    if pcb.state == TCP_CLOSED or seq_lt(seq, pcb.snd_una) or seq_ge(seq, pcb.snd_max):
        return
    if next_mtu_bytes:
        if pcb.state < TCP_ESTABLISHED:
            return
        mss = (next_mtu_bytes if next_mtu_bytes > PMTU_MIN_BYTES else PMTU_MIN_BYTES) - 40
        if mss >= pcb.snd_mss:
            return
        pcb.snd_mss = <uint16_t>mss
        pcb.eff_mss = <uint16_t>(mss - (TCP_TS_BYTES if pcb.flags & TF_TS else 0))
        tcp_cc_mss(&pcb.cc, pcb.eff_mss)
        # RFC 1191 6.5: send again in smaller pieces, which is no sign of congestion
        pcb.snd_nxt = pcb.snd_una
        tcp_rec_forget(&pcb.rec)
        pcb.rtt.timing = 0
        pcb.flags |= TF_OUTPUT
        return
    if pcb.state == TCP_SYN_SENT or pcb.state == TCP_SYN_RECEIVED:
        tcp_done(env, pcb, error)
        return
    pcb.soft_error = error               # RFC 5927 5.2, RFC 1122 4.2.3.9: a hint, not an end
