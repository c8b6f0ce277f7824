"""The face of TCP: a connection's life and the user's calls. What they set off happens in the verb files
(tcp_input, tcp_output, tcp_timer, tcp_reass, tcp_migrate)."""
# Read first: RFC 9293 3.9.1 (user/TCP interface) and 3.10.1 to 3.10.6.

from libc.errno cimport EAGAIN, EINVAL, EISCONN, ENOMEM, ENOPROTOOPT, ENOTCONN, EPIPE
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from ulnet.kernelshim.fastpaths cimport fast_from_bytes
from ulnet.stack.buf cimport (
    rxq_clear, rxq_drop, rxq_read, rxq_take, rxseg, rxseg_free, txq_append_copy, txq_append_hold, txq_append_seg,
    txq_clear,
)
from ulnet.stack.seqnum cimport seq_gt, seq_lt
from ulnet.stack.tcp_cb cimport *
from ulnet.stack.tcp_congestion cimport TCP_CC_NEWRENO, tcp_cc_start
from ulnet.stack.tcp_input cimport tcp_icmp_arrives, tcp_segment_arrives, tcp_syn_accepted
from ulnet.stack.tcp_isn cimport tcp_isn_of
from ulnet.stack.tcp_migrate cimport FROZEN_BYTES_MAX, tcp_freeze, tcp_freeze_remains, tcp_frozen_bytes, tcp_thaw
from ulnet.stack.tcp_output cimport tcp_output_run, tcp_refuse_build, tcp_send_bare
from ulnet.stack.tcp_recovery cimport TCP_REC_NEWRENO, tcp_rec_end, tcp_rec_start
from ulnet.stack.tcp_rtt cimport tcp_rto, tcp_rtt_init
from ulnet.stack.tcp_timer cimport TCP_FIN_WAIT_2_NS, tcp_arm_keepalive, tcp_done, tcp_timers_run
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_RDHUP, UL_READABLE, UL_WRITABLE

cdef enum:
    HOLD_FROM_BYTES = 4096           # below it a copy is cheaper than a reference and a piece of its own
    BUFFER_MIN_BYTES = 2048
    BUFFER_MAX_BYTES = 0x3FFFFFFF
    SHUT_RD = 0
    SHUT_WR = 1
    SHUT_RDWR = 2
    # option names, as Linux numbers them
    SOL_SOCKET = 1
    SO_ERROR = 4
    SO_SNDBUF = 7
    SO_RCVBUF = 8
    SO_KEEPALIVE = 9
    SO_LINGER = 13                   # value: seconds, -1 off; only 0 (close aborts) means anything here
    IPPROTO_TCP = 6
    OPT_NODELAY = 1
    OPT_MAXSEG = 2
    OPT_CORK = 3
    OPT_KEEPIDLE = 4
    OPT_KEEPINTVL = 5
    OPT_KEEPCNT = 6
    OPT_QUICKACK = 12
    OPT_USER_TIMEOUT = 18

cdef uint32_t hold_from_bytes = fast_from_bytes(HOLD_FROM_BYTES)


# ---- life ----

cdef inline uint32_t clamp(uint32_t v, uint32_t low, uint32_t high) noexcept nogil:
    if v < low:
        return low
    return v if v < high else high


cdef inline void bound_by_ring(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """Until frames show how large they come, expect the smallest: a window once announced cannot be taken back."""
    if env.bufs.link != NULL:
        pcb.rcv_limit_bytes = tcp_ring_limit(env.bufs.link, pcb.our_mss, pcb.rtt.least_ns)


cdef tcp_pcb *tcp_new(tcp_env *env, const tcp_config *cfg, void *owner) noexcept nogil:
    cdef tcp_pcb *pcb = <tcp_pcb *>calloc(1, sizeof(tcp_pcb))
    cdef int i
    if pcb == NULL:
        return NULL
    pcb.owner = owner
    for i in range(TT_COUNT):
        pcb.timers[i] = INT64_MAX
    pcb.our_mss = <uint16_t>clamp(cfg.mss_bytes, TCP_MSS_MIN, TCP_PAYLOAD_MAX)
    pcb.snd_mss = pcb.our_mss
    pcb.eff_mss = pcb.our_mss
    pcb.rcv_mss = pcb.our_mss
    pcb.sndbuf_bytes = clamp(cfg.sndbuf_bytes, BUFFER_MIN_BYTES, BUFFER_MAX_BYTES)
    pcb.rcvbuf_bytes = clamp(cfg.rcvbuf_bytes, BUFFER_MIN_BYTES, BUFFER_MAX_BYTES)
    while pcb.rcv_wscale < 14 and <uint32_t>0xFFFF << pcb.rcv_wscale < pcb.rcvbuf_bytes:
        pcb.rcv_wscale += 1
    bound_by_ring(env, pcb)
    pcb.ts_offset = cfg.ts_offset
    pcb.flags = TF_TS | TF_WSCALE
    if not cfg.no_sack:
        pcb.flags |= TF_SACK
    if cfg.nodelay:
        pcb.flags |= TF_NODELAY
    if cfg.keepalive:
        pcb.flags |= TF_KEEPALIVE
    pcb.keepidle_s = clamp(cfg.keepidle_s, 1, 0x7FFF) if cfg.keepidle_s else 7200      # RFC 9293 3.8.4
    pcb.keepintvl_s = clamp(cfg.keepintvl_s, 1, 0x7FFF) if cfg.keepintvl_s else 75
    pcb.keepcnt = clamp(cfg.keepcnt, 1, 127) if cfg.keepcnt else 9
    pcb.user_timeout_ms = clamp(cfg.user_timeout_ms, 0, 0x7FFFFFFF)
    pcb.last_send_ns = env.now_ns
    pcb.last_recv_ns = env.now_ns
    pcb.progress_ns = env.now_ns
    pcb.changed_ns = env.now_ns
    pcb.challenge_ns = env.now_ns
    tcp_rtt_init(&pcb.rtt)
    tcp_cc_start(&pcb.cc, TCP_CC_NEWRENO, pcb.eff_mss)
    tcp_rec_start(&pcb.rec, TCP_REC_NEWRENO, 0)
    return pcb


cdef void tcp_free(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    """Forget the connection; nothing is sent."""
    txq_clear(env.bufs, &pcb.snd)
    rxq_clear(env.bufs, &pcb.rcv)
    rxq_clear(env.bufs, &pcb.ooo)
    tcp_rec_end(&pcb.rec)
    free(pcb)


cdef void start_at(tcp_pcb *pcb, uint32_t iss) noexcept nogil:
    pcb.iss = iss
    pcb.snd_una = iss
    pcb.snd_nxt = iss
    pcb.snd_max = iss
    pcb.snd_sml = iss
    pcb.flags |= TF_OPENED


cdef int tcp_open(tcp_env *env, tcp_pcb *pcb, uint32_t iss) noexcept nogil:
    if pcb.state != TCP_CLOSED or pcb.flags & TF_OPENED:
        return -EISCONN
    start_at(pcb, iss)
    tcp_set_state(pcb, TCP_SYN_SENT, env.now_ns)
    tcp_output_run(env, pcb)
    return 0


cdef int tcp_passive(tcp_env *env, tcp_pcb *pcb, const tcp_seg *syn, uint32_t iss) noexcept nogil:
    if pcb.state != TCP_CLOSED or pcb.flags & TF_OPENED:
        return -EISCONN
    start_at(pcb, iss)
    pcb.flags |= TF_PASSIVE
    tcp_syn_accepted(pcb, syn, env.now_ns)
    tcp_set_state(pcb, TCP_SYN_RECEIVED, env.now_ns)
    tcp_output_run(env, pcb)
    return 0


cdef void tcp_input(tcp_env *env, tcp_pcb *pcb, tcp_seg *seg) noexcept nogil:
    tcp_segment_arrives(env, pcb, seg)


cdef bint tcp_wants_output(const tcp_pcb *pcb) noexcept nogil:
    return (pcb.flags & TF_OUTPUT) != 0


cdef void tcp_output(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    tcp_output_run(env, pcb)


cdef int64_t tcp_deadline(const tcp_pcb *pcb) noexcept nogil:
    cdef int64_t first = pcb.timers[0]
    cdef int i
    for i in range(1, TT_COUNT):
        if pcb.timers[i] < first:
            first = pcb.timers[i]
    return first


cdef void tcp_timers(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    tcp_timers_run(env, pcb)


cdef bint tcp_reusable(const tcp_pcb *pcb, const tcp_seg *syn, uint32_t *iss_least) noexcept nogil:
    iss_least[0] = pcb.snd_max + 65537       # beyond anything of the old connection that may still float
    if pcb.state != TCP_TIME_WAIT or not syn.flags & TCP_SYN or syn.flags & (TCP_RST | TCP_ACK):
        return False
    # RFC 6191 2: a later timestamp decides; without one, a later sequence number
    if pcb.flags & TF_TS and syn.has_ts and syn.ts_val != pcb.ts_recent:
        return <int32_t>(syn.ts_val - pcb.ts_recent) > 0
    return seq_gt(syn.seq, pcb.rcv_nxt)


cdef bint tcp_refuse(const tcp_seg *seg, tcp_out *out) noexcept nogil:
    return tcp_refuse_build(seg, out)


cdef uint32_t tcp_isn(const uint8_t *secret, const void *flow, size_t flow_bytes, int64_t now_ns) noexcept nogil:
    return tcp_isn_of(secret, flow, flow_bytes, now_ns)


cdef void tcp_icmp(tcp_env *env, tcp_pcb *pcb, int error, uint32_t seq, uint32_t next_mtu_bytes) noexcept nogil:
    tcp_icmp_arrives(env, pcb, error, seq, next_mtu_bytes)


# ---- what the user sees ----

cdef int tcp_state(const tcp_pcb *pcb) noexcept nogil:
    return pcb.state


cdef uint32_t tcp_ready(const tcp_pcb *pcb) noexcept nogil:
    cdef uint32_t r = 0
    cdef bint gone = pcb.state == TCP_CLOSED
    if pcb.rcv.len_bytes or gone or pcb.so_error or pcb.flags & (TF_EOF | TF_SHUT_RD):
        r |= UL_READABLE
    if pcb.state == TCP_ESTABLISHED or pcb.state == TCP_CLOSE_WAIT:
        # A quarter of the buffer, so that a writer is not woken for every segment
        if pcb.snd.len_bytes <= pcb.sndbuf_bytes - pcb.sndbuf_bytes // 4:
            r |= UL_WRITABLE
    elif pcb.state > TCP_SYN_RECEIVED or gone or pcb.so_error:
        r |= UL_WRITABLE             # a write would not wait, it would fail
    if pcb.so_error:
        r |= UL_ERROR
    if pcb.flags & (TF_EOF | TF_SHUT_RD) or gone:
        r |= UL_RDHUP
    # Both directions are over, the peer's because it said so or because shutdown() did.
    if gone or pcb.state >= TCP_CLOSING or (
            pcb.flags & TF_SHUT_RD and (pcb.state == TCP_FIN_WAIT_1 or pcb.state == TCP_FIN_WAIT_2)):
        r |= UL_HUP
    return r


cdef int tcp_so_error(tcp_pcb *pcb, bint clear) noexcept nogil:
    cdef int e = pcb.so_error
    if clear:
        pcb.so_error = 0
    return e


cdef Py_ssize_t room_to_write(tcp_pcb *pcb) noexcept nogil:
    """Bytes that may be written now, or why none."""
    if pcb.so_error:
        return tcp_so_error(pcb, True)
    if pcb.state == TCP_SYN_SENT or pcb.state == TCP_SYN_RECEIVED:
        return -EPIPE if pcb.flags & TF_CLOSE_PENDING else -EAGAIN
    if pcb.state != TCP_ESTABLISHED and pcb.state != TCP_CLOSE_WAIT:
        return -EPIPE if pcb.flags & TF_OPENED else -ENOTCONN
    if pcb.snd.len_bytes >= pcb.sndbuf_bytes:
        return -EAGAIN
    return <Py_ssize_t>(pcb.sndbuf_bytes - pcb.snd.len_bytes)


cdef Py_ssize_t tcp_write(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n) noexcept nogil:
    cdef Py_ssize_t room = room_to_write(pcb)
    if room < 0 or n == 0:
        return room if room < 0 else 0
    if n > <size_t>room:
        n = <size_t>room
    if txq_append_copy(env.bufs, &pcb.snd, data, n) < 0:
        return -ENOMEM
    pcb.flags |= TF_OUTPUT
    return <Py_ssize_t>n


cdef Py_ssize_t tcp_write_hold(tcp_env *env, tcp_pcb *pcb, const uint8_t *data, size_t n, object owner):
    cdef Py_ssize_t room
    if n < hold_from_bytes:
        return tcp_write(env, pcb, data, n)
    room = room_to_write(pcb)
    if room < 0:
        return room
    if n > <size_t>room:
        n = <size_t>room
    if n < hold_from_bytes:
        return tcp_write(env, pcb, data, n)
    if txq_append_hold(env.bufs, &pcb.snd, data, n, owner) < 0:
        return -ENOMEM
    pcb.flags |= TF_OUTPUT
    return <Py_ssize_t>n


cdef Py_ssize_t tcp_write_seg(tcp_env *env, tcp_pcb *pcb, rxseg *seg, uint32_t n) noexcept nogil:
    cdef Py_ssize_t room = room_to_write(pcb)
    if room < 0:
        return room
    if n < hold_from_bytes:
        if n and txq_append_copy(env.bufs, &pcb.snd, seg.data, n) < 0:
            return -ENOMEM
        rxseg_free(env.bufs, seg)
    elif txq_append_seg(env.bufs, &pcb.snd, seg, n) < 0:
        return -ENOMEM
    pcb.flags |= TF_OUTPUT
    return <Py_ssize_t>n


cdef void after_read(tcp_pcb *pcb) noexcept nogil:
    """Announce the window when it opened enough. Rarely: acknowledgements of arriving data carry it anyway.
    Surely: whenever little of it is left to the peer, so that it never waits for us in vain."""
    cdef uint32_t space = tcp_rcv_space(pcb), left = tcp_rcv_wnd(pcb), step, room = tcp_rcv_room(pcb)
    if pcb.state < TCP_ESTABLISHED or pcb.state > TCP_FIN_WAIT_2:
        return
    if space > <uint32_t>0xFFFF << pcb.rcv_wscale:
        space = <uint32_t>0xFFFF << pcb.rcv_wscale
    if space <= left:
        return
    step = 2 * <uint32_t>pcb.rcv_mss if 2 * <uint32_t>pcb.rcv_mss > room // 8 else room // 8
    if step > room // 2:
        step = room // 2
    if space - left >= room // 2 or (space - left >= step and left < room // 4):
        tcp_want_ack(pcb)


cdef inline Py_ssize_t nothing_to_read(tcp_pcb *pcb) noexcept nogil:
    if pcb.flags & TF_EOF:
        return 0                     # for good, whatever happened since
    if pcb.so_error:
        return tcp_so_error(pcb, True)
    if pcb.flags & TF_SHUT_RD:
        return 0
    if pcb.state == TCP_CLOSED:
        return 0 if pcb.flags & TF_OPENED else -ENOTCONN
    return -EAGAIN


cdef Py_ssize_t tcp_read(tcp_env *env, tcp_pcb *pcb, uint8_t *out, size_t n, bint peek) noexcept nogil:
    cdef size_t done
    if pcb.rcv.len_bytes == 0:
        return nothing_to_read(pcb)
    done = rxq_read(env.bufs, &pcb.rcv, out, n, peek)
    if not peek:
        after_read(pcb)
    return <Py_ssize_t>done


cdef rxseg *tcp_read_seg(tcp_env *env, tcp_pcb *pcb, size_t max_bytes, int *err) noexcept nogil:
    cdef rxseg *s
    err[0] = 0
    if pcb.rcv.len_bytes == 0:
        err[0] = <int>nothing_to_read(pcb)
        return NULL
    if max_bytes == 0:
        err[0] = -EINVAL
        return NULL
    s = rxq_take(env.bufs, &pcb.rcv, max_bytes)
    if s == NULL:
        err[0] = -ENOMEM
        return NULL
    after_read(pcb)
    return s


cdef void tcp_took(tcp_env *env, tcp_pcb *pcb, size_t n) noexcept nogil:
    rxq_drop(env.bufs, &pcb.rcv, n)
    after_read(pcb)


cdef void shut_write(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    if pcb.state == TCP_ESTABLISHED:
        tcp_set_state(pcb, TCP_FIN_WAIT_1, env.now_ns)
        pcb.flags |= TF_OUTPUT
    elif pcb.state == TCP_CLOSE_WAIT:
        tcp_set_state(pcb, TCP_LAST_ACK, env.now_ns)
        pcb.flags |= TF_OUTPUT
    elif pcb.state == TCP_SYN_RECEIVED:
        pcb.flags |= TF_CLOSE_PENDING


cdef int tcp_shutdown(tcp_env *env, tcp_pcb *pcb, int how) noexcept nogil:
    if how != SHUT_RD and how != SHUT_WR and how != SHUT_RDWR:
        return -EINVAL
    if pcb.state == TCP_CLOSED or pcb.state == TCP_SYN_SENT or pcb.state == TCP_TIME_WAIT:
        return -ENOTCONN
    if how != SHUT_WR:
        pcb.flags |= TF_SHUT_RD
    if how != SHUT_RD:
        shut_write(env, pcb)
    return 0


cdef void tcp_close(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef bint unread = pcb.rcv.len_bytes != 0
    pcb.flags |= TF_USER_GONE | TF_SHUT_RD
    if pcb.state == TCP_CLOSED or pcb.state == TCP_SYN_SENT:
        tcp_done(env, pcb, 0)
        return
    if pcb.state != TCP_TIME_WAIT and (pcb.flags & TF_LINGER0 or
                                       (unread and pcb.state != TCP_CLOSING and pcb.state != TCP_LAST_ACK)):
        tcp_abort(env, pcb)          # RFC 2525 2.17: the peer must learn that data was lost
        return
    rxq_clear(env.bufs, &pcb.rcv)
    rxq_clear(env.bufs, &pcb.ooo)    # data that comes now is answered with a reset anyway
    pcb.progress_ns = env.now_ns     # an orphan has its time from now on
    if pcb.state == TCP_FIN_WAIT_2:
        pcb.timers[TT_2MSL] = env.now_ns + TCP_FIN_WAIT_2_NS
    shut_write(env, pcb)


cdef void tcp_abort(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    # RFC 9293 3.10.5. differs: also in CLOSING and LAST-ACK, where data may still wait to be acknowledged.
    if TCP_SYN_RECEIVED <= pcb.state <= TCP_LAST_ACK:
        tcp_send_bare(env, pcb, pcb.snd_max, pcb.rcv_nxt, TCP_RST | TCP_ACK)
    tcp_done(env, pcb, 0)
    rxq_clear(env.bufs, &pcb.rcv)


# ---- options and state ----

cdef inline void set_flag(tcp_pcb *pcb, uint32_t flag, bint on) noexcept nogil:
    if on:
        pcb.flags |= flag
    else:
        pcb.flags &= ~flag


cdef int tcp_setopt(tcp_env *env, tcp_pcb *pcb, int level, int name, int value) noexcept nogil:
    if level == SOL_SOCKET:
        if name == SO_KEEPALIVE:
            set_flag(pcb, TF_KEEPALIVE, value != 0)
            tcp_arm_keepalive(pcb, env.now_ns)
        elif name == SO_LINGER:
            set_flag(pcb, TF_LINGER0, value == 0)
        elif name == SO_SNDBUF or name == SO_RCVBUF:
            if value < 0:
                return -EINVAL
            if name == SO_SNDBUF:
                pcb.sndbuf_bytes = clamp(<uint32_t>value, BUFFER_MIN_BYTES, BUFFER_MAX_BYTES)
            else:
                pcb.rcvbuf_bytes = clamp(<uint32_t>value, BUFFER_MIN_BYTES, BUFFER_MAX_BYTES)
                while not pcb.flags & TF_OPENED and pcb.rcv_wscale < 14 and \
                        <uint32_t>0xFFFF << pcb.rcv_wscale < pcb.rcvbuf_bytes:
                    pcb.rcv_wscale += 1
                after_read(pcb)
        else:
            return -ENOPROTOOPT
        return 0
    if level != IPPROTO_TCP:
        return -ENOPROTOOPT
    if name == OPT_NODELAY or name == OPT_CORK:
        set_flag(pcb, TF_NODELAY if name == OPT_NODELAY else TF_CORK, value != 0)
        pcb.flags |= TF_OUTPUT       # what was held back may go
    elif name == OPT_QUICKACK:
        set_flag(pcb, TF_QUICKACK, value != 0)
        if value and not tcp_timer_is_off(pcb, TT_DELACK):
            tcp_want_ack(pcb)
    elif name == OPT_MAXSEG:
        if value < TCP_MSS_MIN or value > TCP_PAYLOAD_MAX:
            return -EINVAL
        if pcb.flags & TF_OPENED:
            return -EISCONN          # it was announced in the SYN
        if value < pcb.our_mss:
            pcb.our_mss = <uint16_t>value
            pcb.snd_mss = pcb.eff_mss = pcb.rcv_mss = pcb.our_mss
    elif name == OPT_KEEPIDLE or name == OPT_KEEPINTVL:
        if value < 1 or value > 0x7FFF:
            return -EINVAL
        if name == OPT_KEEPIDLE:
            pcb.keepidle_s = <uint32_t>value
            tcp_arm_keepalive(pcb, env.now_ns)
        else:
            pcb.keepintvl_s = <uint32_t>value
    elif name == OPT_KEEPCNT:
        if value < 1 or value > 127:
            return -EINVAL
        pcb.keepcnt = <uint32_t>value
    elif name == OPT_USER_TIMEOUT:
        if value < 0:
            return -EINVAL
        pcb.user_timeout_ms = <uint32_t>value
    else:
        return -ENOPROTOOPT
    return 0


cdef int tcp_getopt(const tcp_pcb *pcb, int level, int name, int *value) noexcept nogil:
    if level == SOL_SOCKET:
        if name == SO_ERROR:
            value[0] = -pcb.so_error
        elif name == SO_KEEPALIVE:
            value[0] = (pcb.flags & TF_KEEPALIVE) != 0
        elif name == SO_LINGER:
            value[0] = 0 if pcb.flags & TF_LINGER0 else -1
        elif name == SO_SNDBUF:
            value[0] = <int>pcb.sndbuf_bytes
        elif name == SO_RCVBUF:
            value[0] = <int>pcb.rcvbuf_bytes
        else:
            return -ENOPROTOOPT
        return 0
    if level != IPPROTO_TCP:
        return -ENOPROTOOPT
    if name == OPT_NODELAY:
        value[0] = (pcb.flags & TF_NODELAY) != 0
    elif name == OPT_CORK:
        value[0] = (pcb.flags & TF_CORK) != 0
    elif name == OPT_QUICKACK:
        value[0] = (pcb.flags & TF_QUICKACK) != 0
    elif name == OPT_MAXSEG:
        value[0] = pcb.eff_mss
    elif name == OPT_KEEPIDLE:
        value[0] = <int>pcb.keepidle_s
    elif name == OPT_KEEPINTVL:
        value[0] = <int>pcb.keepintvl_s
    elif name == OPT_KEEPCNT:
        value[0] = <int>pcb.keepcnt
    elif name == OPT_USER_TIMEOUT:
        value[0] = <int>pcb.user_timeout_ms
    else:
        return -ENOPROTOOPT
    return 0


cdef void tcp_stat_get(const tcp_pcb *pcb, tcp_stat *out) noexcept nogil:
    cdef uint32_t end = pcb.snd_una + <uint32_t>pcb.snd.len_bytes
    out.state = pcb.state
    out.snd_una = pcb.snd_una
    out.snd_nxt = pcb.snd_max                # what a reset must carry
    out.rcv_nxt = pcb.rcv_nxt
    out.snd_wnd_bytes = pcb.snd_wnd
    out.cwnd_bytes = pcb.cc.cwnd_bytes
    out.ssthresh_bytes = pcb.cc.ssthresh_bytes
    out.retransmits = pcb.retransmits
    out.bytes_in = pcb.bytes_in
    out.bytes_out = pcb.bytes_out
    out.srtt_ns = <uint64_t>pcb.rtt.srtt_ns
    out.rttvar_ns = <uint64_t>pcb.rtt.rttvar_ns
    out.rto_ns = <uint64_t>tcp_rto(&pcb.rtt)
    out.unsent_bytes = end - pcb.snd_max if pcb.snd.len_bytes and seq_lt(pcb.snd_max, end) else 0
    out.unread_bytes = pcb.rcv.len_bytes
    out.changed_ns = <uint64_t>pcb.changed_ns


cdef void tcp_remains_get(const tcp_pcb *pcb, tcp_remains *out) noexcept nogil:
    out.rcv_adv = pcb.rcv_adv
    out.ts_recent = pcb.ts_recent
    out.ts_offset = pcb.ts_offset
    out.max_sndwnd_bytes = pcb.max_sndwnd
    out.our_mss = pcb.our_mss
    out.snd_mss = pcb.snd_mss
    out.eff_mss = pcb.eff_mss
    out.snd_wscale = pcb.snd_wscale
    out.rcv_wscale = pcb.rcv_wscale
    out.timestamps = (pcb.flags & TF_TS) != 0
    out.wscale = (pcb.flags & TF_WSCALE) != 0
    out.sack = (pcb.flags & TF_SACK) != 0
    out.fin_sent = pcb.state == TCP_FIN_WAIT_2 or pcb.state == TCP_TIME_WAIT or (
        tcp_has_sent_fin_state(pcb) and pcb.snd_max == pcb.snd_una + <uint32_t>pcb.snd.len_bytes + 1)


# ---- hand-over ----

cdef size_t tcp_export_bytes(const tcp_pcb *pcb) noexcept nogil:
    return tcp_frozen_bytes(pcb)


cdef size_t tcp_export(tcp_env *env, tcp_pcb *pcb, uint8_t *out) noexcept nogil:
    return tcp_freeze(env, pcb, out)


cdef tcp_pcb *tcp_import(tcp_env *env, const uint8_t *data, size_t n, void *owner, int *err) noexcept nogil:
    cdef tcp_pcb *pcb = <tcp_pcb *>calloc(1, sizeof(tcp_pcb))
    if pcb == NULL:
        err[0] = -ENOMEM
        return NULL
    pcb.owner = owner
    err[0] = tcp_thaw(env, pcb, data, n)
    bound_by_ring(env, pcb)
    if err[0] < 0:
        tcp_free(env, pcb)
        return NULL
    if pcb.state != TCP_CLOSED:
        pcb.flags |= TF_OUTPUT       # look at once whether anything may go from here
    return pcb


cdef tcp_pcb *tcp_revive(tcp_env *env, const tcp_stat *last, const tcp_remains *r, void *owner, bint *in_doubt, int *err) noexcept nogil:
    cdef uint8_t[FROZEN_BYTES_MAX] state
    cdef size_t n = tcp_freeze_remains(env, last, r, state, in_doubt)
    if n == 0:
        err[0] = -EINVAL
        return NULL
    return tcp_import(env, state, n, owner, err)
