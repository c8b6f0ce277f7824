"""What goes out: data as the windows allow, what recovery wants again, acknowledgements, resets.

``tcp_output_run`` is the only place that sends data. It runs once at the end of a burst, so that many
received segments share one acknowledgement and the acknowledgement rides on data where it can.
"""
# Read first: RFC 9293 3.8.6 (windows, SWS), RFC 5681 3.1, RFC 7323 2 and 3, RFC 1122 4.2.3.4 (Nagle).

from libc.errno cimport EAGAIN, ENOBUFS
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from ulnet.stack.buf cimport rxseg, txq_iov
from ulnet.stack.seqnum cimport seq_ge, seq_gt, seq_lt
from ulnet.stack.tcp cimport (
    TCP_ACK, TCP_FIN, TCP_OUT_IOV, TCP_PSH, TCP_RST, TCP_SYN, tcp_env, tcp_out, tcp_seg,
)
from ulnet.stack.tcp_cb cimport *
from ulnet.stack.tcp_recovery cimport REC_LOSS, tcp_rec_extra_segments, tcp_rec_hole, tcp_rec_resent
from ulnet.stack.tcp_timer cimport TCP_RETRY_NS, tcp_arm_persist, tcp_arm_rexmt, tcp_done

cdef enum:
    OPT_NOP = 1
    OPT_MSS = 2
    OPT_WSCALE = 3
    OPT_SACK_OK = 4
    OPT_SACK = 5
    OPT_TIMESTAMPS = 8
    DEFER_DIVISOR = 4                # see defer_for_more()


cdef inline void put32(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 24)
    p[1] = <uint8_t>(v >> 16)
    p[2] = <uint8_t>(v >> 8)
    p[3] = <uint8_t>v


cdef inline void put_timestamps(tcp_env *env, const tcp_pcb *pcb, tcp_out *out, bint ack) noexcept nogil:
    cdef uint8_t *o = out.opts + out.opt_len_bytes
    o[0] = OPT_NOP
    o[1] = OPT_NOP
    o[2] = OPT_TIMESTAMPS
    o[3] = 10
    put32(o + 4, tcp_ts_now(pcb, env.now_ns))
    put32(o + 8, pcb.ts_recent if ack else 0)      # RFC 7323 3.2: zero without ACK
    out.opt_len_bytes += TCP_TS_BYTES


cdef void put_sack(const tcp_pcb *pcb, tcp_out *out) noexcept nogil:
    """What came twice first (RFC 2883), then the block that came last (RFC 2018 4) and those before the end. On bare
    ACKs only."""
    cdef uint32_t most = (40 - 4 - out.opt_len_bytes) // 8, count = 0, total = 0, i
    cdef uint32_t[8] edges
    cdef uint32_t[8] last                # a ring of the newest runs
    cdef const rxseg *s = pcb.ooo.head
    cdef uint32_t left, right
    cdef uint8_t *o = out.opts + out.opt_len_bytes
    cdef bint newest = False
    if most > 4:
        most = 4
    if pcb.dup_left != pcb.dup_right:
        edges[0] = pcb.dup_left
        edges[1] = pcb.dup_right
        count = 1
    while s != NULL:
        left = s.seq
        right = s.seq + s.len_bytes
        s = s.next
        while s != NULL and s.seq == right:
            right += s.len_bytes
            s = s.next
        if not newest and seq_ge(pcb.ooo_newest, left) and seq_lt(pcb.ooo_newest, right):
            newest = True
            edges[2 * count] = left
            edges[2 * count + 1] = right
            count += 1
        else:
            last[2 * (total & 3)] = left
            last[2 * (total & 3) + 1] = right
            total += 1
    for i in range(4):
        if count == most or i >= total:
            break
        edges[2 * count] = last[2 * ((total - 1 - i) & 3)]
        edges[2 * count + 1] = last[2 * ((total - 1 - i) & 3) + 1]
        count += 1
    o[0] = OPT_NOP
    o[1] = OPT_NOP
    o[2] = OPT_SACK
    o[3] = <uint8_t>(2 + 8 * count)
    for i in range(2 * count):
        put32(o + 4 + 4 * i, edges[i])
    out.opt_len_bytes += <uint8_t>(4 + 8 * count)


cdef uint32_t window_to_announce(const tcp_pcb *pcb) noexcept nogil:
    """The window field in bytes before scaling (RFC 9293 3.8.6.2.2); the right edge never moves back."""
    cdef uint32_t old = pcb.rcv_adv - pcb.rcv_nxt
    cdef uint32_t space = tcp_rcv_space(pcb)
    cdef uint32_t step = tcp_rcv_room(pcb) // 2
    if step > pcb.our_mss:
        step = pcb.our_mss
    if space > <uint32_t>0xFFFF << pcb.rcv_wscale:
        space = <uint32_t>0xFFFF << pcb.rcv_wscale
    if space < old + step:
        return old                   # silly window avoidance: less than a segment more is nothing
    return space


cdef int emit(tcp_env *env, tcp_pcb *pcb, tcp_out *out, bint same_window) noexcept nogil:
    """Hand a segment to the link. What the link refuses for now is tried again by a short timer."""
    cdef uint32_t wnd, field, pieces = 1
    cdef int r
    if out.flags & TCP_ACK and not out.flags & TCP_RST:
        wnd = pcb.rcv_adv - pcb.rcv_nxt if same_window else window_to_announce(pcb)
        if out.flags & TCP_SYN:
            field = wnd if wnd < 0xFFFF else 0xFFFF            # RFC 7323 2.2: never scaled
            wnd = field
        else:
            # Rounded down, as RFC 7323 2.4 allows: rcv_adv keeps what was announced, and we honour it.
            field = wnd >> pcb.rcv_wscale
            if field > 0xFFFF:
                field = 0xFFFF
            wnd = field << pcb.rcv_wscale
        out.wnd = <uint16_t>field
    elif out.flags & TCP_SYN:
        wnd = pcb.rcvbuf_bytes if pcb.rcvbuf_bytes < 0xFFFF else 0xFFFF
        out.wnd = <uint16_t>wnd
    else:
        wnd = 0
        out.wnd = 0
    r = env.emit(env.ctx, pcb.owner, out)
    if r == -EAGAIN or r == -ENOBUFS:
        pcb.timers[TT_RETRY] = env.now_ns + (TCP_RETRY_NS << pcb.retry_shift)
        if pcb.retry_shift < 6:
            pcb.retry_shift += 1
        return r                     # TF_ACK_NOW and snd_nxt stay: the retry starts from the same state
    if r < 0:
        if pcb.state == TCP_SYN_SENT:
            tcp_done(env, pcb, r)    # no route, no neighbour: connect() is told at once
            return r
        pcb.soft_error = r           # later: as if lost on the way, told on a time-out
    pcb.retry_shift = 0
    pcb.timers[TT_RETRY] = INT64_MAX
    pcb.last_send_ns = env.now_ns
    if out.len_bytes > out.mss_bytes:
        pieces = (out.len_bytes + out.mss_bytes - 1) // out.mss_bytes
    env.counters.segs_out += pieces
    if out.flags & TCP_ACK and not out.flags & TCP_RST:
        pcb.last_ack_sent = pcb.rcv_nxt
        pcb.dup_left = pcb.dup_right
        pcb.unacked_in_bytes = 0
        pcb.timers[TT_DELACK] = INT64_MAX
        pcb.flags &= ~<uint32_t>TF_ACK_NOW
        if seq_gt(pcb.rcv_nxt + wnd, pcb.rcv_adv):
            pcb.rcv_adv = pcb.rcv_nxt + wnd
    return 0


cdef inline void bare(tcp_env *env, tcp_pcb *pcb, tcp_out *out, uint32_t seq, uint32_t ack, int flags) noexcept nogil:
    out.seq = seq
    out.ack = ack
    out.flags = <uint8_t>flags
    out.opt_len_bytes = 0
    out.len_bytes = 0
    out.mss_bytes = pcb.eff_mss
    out.iov_count = 0
    if pcb.flags & TF_TS and not flags & TCP_SYN and pcb.state != TCP_SYN_SENT:
        put_timestamps(env, pcb, out, (flags & TCP_ACK) != 0)
    if pcb.flags & TF_SACK and flags == TCP_ACK and (pcb.ooo.head != NULL or pcb.dup_left != pcb.dup_right):
        put_sack(pcb, out)


cdef int tcp_send_bare(tcp_env *env, tcp_pcb *pcb, uint32_t seq, uint32_t ack, int flags) noexcept nogil:
    cdef tcp_out out
    bare(env, pcb, &out, seq, ack, flags)
    if flags & TCP_RST:
        env.counters.resets_out += 1
    return emit(env, pcb, &out, False)


cdef inline uint32_t ack_seq(const tcp_pcb *pcb) noexcept nogil:
    # snd_max: after a timeout snd_nxt may lie before what the peer has, and it would ignore our ACK.
    # A window probe's byte, though, it probably refused.
    return pcb.snd_nxt if pcb.flags & TF_PROBED else pcb.snd_max


cdef void tcp_send_dup_ack(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """One for each out-of-order segment (RFC 5681 4.2): the sender counts them, so they are not coalesced, and
    their window stays the same, or they would not count as duplicates."""
    cdef tcp_out out
    bare(env, pcb, &out, ack_seq(pcb), pcb.rcv_nxt, TCP_ACK)
    if emit(env, pcb, &out, True) < 0:
        tcp_want_ack(pcb)


cdef bint tcp_refuse_build(const tcp_seg *seg, tcp_out *out) noexcept nogil:
    # RFC 9293 3.10.7.1
    if seg.flags & TCP_RST:
        return False
    memset(out, 0, sizeof(tcp_out))
    out.mss_bytes = TCP_MSS_DEFAULT
    if seg.flags & TCP_ACK:
        out.seq = seg.ack
        out.flags = TCP_RST
    else:
        out.ack = seg.seq + seg.len_bytes + ((seg.flags & TCP_SYN) != 0) + ((seg.flags & TCP_FIN) != 0)
        out.flags = TCP_RST | TCP_ACK
    return True


# ---- handshake ----

cdef void output_syn(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """SYN or SYN,ACK when snd_nxt stands at iss; a bare ACK in SYN-RECEIVED otherwise."""
    cdef tcp_out out
    cdef uint8_t *o
    if pcb.snd_nxt != pcb.iss:
        if pcb.state == TCP_SYN_RECEIVED and pcb.flags & TF_ACK_NOW:
            tcp_send_bare(env, pcb, pcb.snd_max, pcb.rcv_nxt, TCP_ACK)
        return
    memset(&out, 0, sizeof(out))
    out.seq = pcb.iss
    out.flags = TCP_SYN
    if pcb.state == TCP_SYN_RECEIVED:
        out.flags = TCP_SYN | TCP_ACK
        out.ack = pcb.rcv_nxt
    out.mss_bytes = pcb.eff_mss
    o = out.opts
    o[0] = OPT_MSS
    o[1] = 4
    o[2] = <uint8_t>(pcb.our_mss >> 8)
    o[3] = <uint8_t>(pcb.our_mss & 0xFF)
    out.opt_len_bytes = 4
    if pcb.flags & TF_TS:
        put_timestamps(env, pcb, &out, (out.flags & TCP_ACK) != 0)
    if pcb.flags & TF_SACK:
        o = out.opts + 4
        if not pcb.flags & TF_TS:
            o[0] = OPT_NOP
            o[1] = OPT_NOP
            o += 2
            out.opt_len_bytes += 4
        o[0] = OPT_SACK_OK               # with timestamps: in place of the two that fill up
        o[1] = 2
    if pcb.flags & TF_WSCALE:
        o = out.opts + out.opt_len_bytes
        o[0] = OPT_NOP
        o[1] = OPT_WSCALE
        o[2] = 3
        o[3] = pcb.rcv_wscale
        out.opt_len_bytes += 4
    if emit(env, pcb, &out, False) < 0:
        return
    pcb.snd_nxt = pcb.iss + 1
    if seq_ge(pcb.iss, pcb.snd_max):
        pcb.rtt.timing = 1
        pcb.rtt.timed_seq = pcb.iss
        pcb.rtt.timed_ns = env.now_ns
        pcb.progress_ns = env.now_ns
        pcb.snd_max = pcb.snd_nxt
    else:
        pcb.rtt.timing = 0
        pcb.flags |= TF_SYN_RESENT
        pcb.retransmits += 1
        env.counters.retransmits += 1
    if tcp_timer_is_off(pcb, TT_REXMT):
        tcp_arm_rexmt(pcb, env.now_ns)


# ---- data ----

cdef int send_data(tcp_env *env, tcp_pcb *pcb, uint32_t seq, uint32_t n, int flags, uint32_t *sent) noexcept nogil:
    """One segment or super-segment of n bytes from seq on. *sent: bytes, fewer if they lie in many pieces."""
    cdef tcp_out out
    cdef uint32_t filled = 0
    cdef int r
    out.seq = seq
    out.ack = pcb.rcv_nxt
    out.flags = TCP_ACK
    out.opt_len_bytes = 0
    out.iov_count = 0
    if n:
        out.iov_count = txq_iov(&pcb.snd, seq - pcb.snd_una, n, out.iov, TCP_OUT_IOV, &filled)
        if filled < n:
            # Cut at a segment's end, not at a buffer's: the last piece first, then its tail.
            if filled > pcb.eff_mss:
                filled -= filled % pcb.eff_mss
                out.iov_count = txq_iov(&pcb.snd, seq - pcb.snd_una, filled, out.iov, TCP_OUT_IOV, &filled)
            flags &= ~(TCP_FIN | TCP_PSH)
            n = filled
    out.flags |= <uint8_t>flags
    out.len_bytes = n
    out.mss_bytes = pcb.eff_mss
    if pcb.flags & TF_TS:
        put_timestamps(env, pcb, &out, True)
    r = emit(env, pcb, &out, False)
    sent[0] = n + (1 if out.flags & TCP_FIN else 0)
    if r == 0 and n:
        env.counters.bytes_out += n
    return r


cdef void count_resent(tcp_env *env, tcp_pcb *pcb, uint32_t n) noexcept nogil:
    cdef uint32_t pieces = (n + pcb.eff_mss - 1) // pcb.eff_mss if n else 1
    pcb.retransmits += pieces
    env.counters.retransmits += pieces
    pcb.rtt.timing = 0               # Karn: an ACK would not tell which copy it answers


cdef bint resend_one(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """What recovery asked for: one segment from rec.resend_seq. False when the link is full."""
    cdef uint32_t end = pcb.snd_una + <uint32_t>pcb.snd.len_bytes
    cdef uint32_t seq = pcb.rec.resend_seq, n, sent = 0
    cdef int flags = 0
    if seq_lt(seq, pcb.snd_una) or seq_ge(seq, pcb.snd_max):
        pcb.rec.resend = 0
        return True
    n = end - seq if seq_lt(seq, end) else 0
    if n > pcb.eff_mss:
        n = pcb.eff_mss
    if seq_gt(seq + n, pcb.snd_max):
        n = pcb.snd_max - seq
    if tcp_has_sent_fin_state(pcb) and seq + n == end and seq_gt(pcb.snd_max, end):
        flags = TCP_FIN
    if n == 0 and not flags:
        pcb.rec.resend = 0
        return True
    if send_data(env, pcb, seq, n, flags, &sent) < 0:
        return False
    pcb.rec.resend = 0
    count_resent(env, pcb, n)
    if tcp_timer_is_off(pcb, TT_REXMT) or pcb.flags & TF_PERSIST:
        tcp_arm_rexmt(pcb, env.now_ns)
    return True


cdef bint resend_holes(tcp_env *env, tcp_pcb *pcb, uint32_t largest) noexcept nogil:
    """What the peer's blocks say is lost, as the congestion window allows (RFC 6675 5 C). False: the link is full."""
    cdef uint32_t seq = 0, n = 0, pipe, room, sent = 0
    while tcp_rec_hole(&pcb.rec, pcb.snd_una, &seq, &n):
        pipe = pcb.snd_max - pcb.snd_una - pcb.rec.gone_bytes
        room = pcb.cc.cwnd_bytes - pipe if pcb.cc.cwnd_bytes > pipe else 0
        if pcb.rec.urgent and room < pcb.eff_mss:
            room = pcb.eff_mss
        if room < pcb.eff_mss and room < n:
            break
        if room > largest:
            room = largest
        if n > room:
            n = room - room % pcb.eff_mss if room > pcb.eff_mss else room
        if send_data(env, pcb, seq, n, 0, &sent) < 0:
            return False
        pcb.rec.urgent = 0
        tcp_rec_resent(&pcb.rec, seq, sent, pcb.snd_una, pcb.snd_max)
        count_resent(env, pcb, sent)
        if tcp_timer_is_off(pcb, TT_REXMT) or pcb.flags & TF_PERSIST:
            tcp_arm_rexmt(pcb, env.now_ns)
    return True


cdef inline bint small_may_go(const tcp_pcb *pcb) noexcept nogil:
    """May a segment below the MSS leave that ends what was written? Nagle as Minshall has it: one
    unacknowledged small segment at a time, whatever else is in flight."""
    if pcb.flags & TF_CORK and not tcp_has_sent_fin_state(pcb):
        return False
    if pcb.flags & TF_NODELAY or pcb.snd_nxt == pcb.snd_una or tcp_has_sent_fin_state(pcb):
        return True
    return not (seq_gt(pcb.snd_sml, pcb.snd_una) and not seq_gt(pcb.snd_sml, pcb.snd_nxt))


cdef inline bint defer_for_more(const tcp_pcb *pcb, uint32_t n, uint32_t flight, uint32_t win, uint32_t largest) noexcept nogil:
    """Wait for another ACK so that a larger super-segment can leave? Only while at least three quarters of
    the window, and so more than the two segments that make a receiver answer at once, are in flight."""
    return n < largest and flight and win >= 8 * <uint32_t>pcb.eff_mss and n < win // DEFER_DIVISOR


cdef void output_data(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef uint32_t end, unsent, flight, win, cwin, avail, n, tail, largest, sent
    cdef uint32_t burst = 0
    cdef uint32_t mss = pcb.eff_mss
    cdef int flags
    cdef bint resent, probe, cwnd_limited = False
    largest = mss
    if env.max_gso_bytes > mss:
        largest = TCP_PAYLOAD_MAX - (TCP_TS_BYTES if pcb.flags & TF_TS else 0)
        if largest > env.max_gso_bytes:
            largest = env.max_gso_bytes
        largest -= largest % mss
    if pcb.rec.resend and not resend_one(env, pcb):
        return
    if pcb.rec.gone_bytes and not resend_holes(env, pcb, largest):
        return
    if pcb.snd_nxt == pcb.snd_una and env.now_ns - pcb.last_send_ns > pcb.rtt.rto_ns and pcb.snd_max == pcb.snd_una:
        pcb.cc.ops.on_idle(&pcb.cc)
    end = pcb.snd_una + <uint32_t>pcb.snd.len_bytes
    while True:
        if seq_gt(pcb.snd_nxt, end):
            break                    # the FIN is out
        flight = pcb.snd_nxt - pcb.snd_una
        unsent = end - pcb.snd_nxt
        cwin = pcb.cc.cwnd_bytes + tcp_rec_extra_segments(&pcb.rec) * mss      # RFC 3042
        if pcb.rec.state != REC_LOSS:
            cwin += pcb.rec.gone_bytes
        win = pcb.snd_wnd if pcb.snd_wnd < cwin else cwin
        avail = win - flight if win > flight else 0
        resent = seq_lt(pcb.snd_nxt, pcb.snd_max) and not pcb.flags & TF_PROBED
        probe = False
        n = unsent if unsent < avail else avail
        if n > largest:
            n = largest
        if n > mss:
            tail = n % mss
            if tail and (n < unsent or not small_may_go(pcb)):
                n -= tail
        if n >= mss:
            if n < unsent and not resent and defer_for_more(pcb, n, flight, win, largest):
                cwnd_limited = cwin < pcb.snd_wnd
                break
        elif n == unsent and n:
            if not (resent or pcb.flags & TF_FORCE or small_may_go(pcb)):
                break
        elif n:
            # Less than a segment because of the window: SWS avoidance (RFC 9293 3.8.6.2.1)
            if avail == cwin - flight and cwin < pcb.snd_wnd:
                cwnd_limited = True
                if not resent and flight:
                    break
            elif not (resent or pcb.flags & TF_FORCE or n >= pcb.max_sndwnd // 2):
                break
        elif unsent:
            if cwin <= flight:
                cwnd_limited = cwin < pcb.snd_wnd
                if not (pcb.flags & TF_FORCE and flight == 0):
                    break
            elif not (pcb.flags & TF_FORCE and flight == 0):
                break
            n = 1                    # zero-window probe (RFC 9293 3.8.6.1)
            probe = True
        elif not tcp_has_sent_fin_state(pcb):
            break
        flags = 0
        if n == unsent and not probe:
            if n:
                flags = TCP_PSH
            if tcp_has_sent_fin_state(pcb):
                flags |= TCP_FIN     # needs no window: it takes no buffer
        if env.burst_bytes and burst >= env.burst_bytes:
            pcb.flags |= TF_OUTPUT
            break
        if send_data(env, pcb, pcb.snd_nxt, n, flags, &sent) < 0:
            return
        burst += sent
        pcb.flags &= ~<uint32_t>TF_FORCE
        if sent == 0:
            break
        if probe:
            # Not counted as sent: the next segment begins with this byte again.
            if pcb.snd_max == pcb.snd_una:
                pcb.snd_max = pcb.snd_una + 1
                pcb.flags |= TF_PROBED
            break
        if resent:
            count_resent(env, pcb, sent)
        elif not pcb.rtt.timing and not pcb.flags & TF_PROBED:
            pcb.rtt.timing = 1
            pcb.rtt.timed_seq = pcb.snd_nxt
            pcb.rtt.timed_ns = env.now_ns
        pcb.flags &= ~<uint32_t>TF_PROBED
        if pcb.snd_max == pcb.snd_una:
            pcb.progress_ns = env.now_ns       # the wait begins
        if sent % mss:
            pcb.snd_sml = pcb.snd_nxt + sent
        pcb.snd_nxt += sent
        if seq_gt(pcb.snd_nxt, pcb.snd_max):
            pcb.bytes_out += pcb.snd_nxt - pcb.snd_max - (1 if seq_gt(pcb.snd_nxt, end) else 0)
            pcb.snd_max = pcb.snd_nxt
        # With the second segment the answer is due sooner (tcp_timer.pxd).
        if tcp_timer_is_off(pcb, TT_REXMT) or pcb.flags & TF_PERSIST or flight <= mss < flight + sent:
            tcp_arm_rexmt(pcb, env.now_ns)
    if cwnd_limited:
        pcb.flags |= TF_CWND_LIMITED
    else:
        pcb.flags &= ~<uint32_t>TF_CWND_LIMITED
    if pcb.snd_nxt == pcb.snd_una and end != pcb.snd_nxt and tcp_timer_is_off(pcb, TT_REXMT):
        tcp_arm_persist(pcb, env.now_ns)


cdef void tcp_output_run(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    pcb.flags &= ~<uint32_t>TF_OUTPUT
    if pcb.state == TCP_SYN_SENT or pcb.state == TCP_SYN_RECEIVED:
        output_syn(env, pcb)
        return
    if pcb.state == TCP_CLOSED:
        return
    if pcb.state != TCP_FIN_WAIT_2 and pcb.state != TCP_TIME_WAIT:
        output_data(env, pcb)
    if pcb.flags & TF_ACK_NOW:
        tcp_send_bare(env, pcb, ack_seq(pcb), pcb.rcv_nxt, TCP_ACK)
