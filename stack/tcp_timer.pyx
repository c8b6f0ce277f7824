"""What happens when TCP's timers fire: retransmission, persist, delayed ACK, keep-alive, TIME-WAIT, retry."""
# Read first: RFC 6298 5, RFC 9293 3.8.3 to 3.8.6 and 3.10.8. Deadlines lie in tcp_pcb.timers; hot paths move
# them lazily (keep-alive looks at last_recv_ns only when it fires).

from libc.errno cimport ETIMEDOUT
from libc.stdint cimport INT64_MAX, int64_t, uint32_t
from ulnet.stack.buf cimport rxq_clear, txq_clear
from ulnet.stack.tcp cimport TCP_ACK, TCP_RST, tcp_env
from ulnet.stack.tcp_cb cimport *
from ulnet.stack.tcp_output cimport tcp_output_run, tcp_send_bare
from ulnet.stack.tcp_recovery cimport tcp_rec_end, tcp_rec_probe
from ulnet.stack.tcp_rtt cimport TCP_BACKOFF_MAX


cdef void tcp_done(tcp_env *env, tcp_pcb *pcb, int so_error) noexcept nogil:
    cdef int i
    tcp_set_state(pcb, TCP_CLOSED, env.now_ns)
    for i in range(TT_COUNT):
        pcb.timers[i] = INT64_MAX
    pcb.flags &= ~<uint32_t>(TF_OUTPUT | TF_ACK_NOW | TF_FORCE | TF_PERSIST)
    if so_error:
        pcb.so_error = so_error
    txq_clear(env.bufs, &pcb.snd)
    rxq_clear(env.bufs, &pcb.ooo)
    tcp_rec_end(&pcb.rec)
    if pcb.flags & TF_USER_GONE:
        rxq_clear(env.bufs, &pcb.rcv)


cdef inline int timeout_error(const tcp_pcb *pcb) noexcept nogil:
    return pcb.soft_error if pcb.soft_error else -ETIMEDOUT


cdef void give_up(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    # differs: RFC 9293 says nothing of a reset here; if the peer lives after all, it need not wait for ever
    tcp_send_bare(env, pcb, pcb.snd_max, pcb.rcv_nxt, TCP_RST | TCP_ACK)
    tcp_done(env, pcb, timeout_error(pcb))


cdef void tcp_arm_keepalive(tcp_pcb *pcb, int64_t now_ns) noexcept nogil:
    pcb.keep_probes = 0
    if pcb.flags & TF_KEEPALIVE and TCP_ESTABLISHED <= pcb.state <= TCP_CLOSE_WAIT:
        pcb.timers[TT_KEEP] = now_ns + <int64_t>pcb.keepidle_s * 1000000000
    else:
        pcb.timers[TT_KEEP] = INT64_MAX


cdef void on_retransmit(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef bint handshake = pcb.state == TCP_SYN_SENT or pcb.state == TCP_SYN_RECEIVED
    cdef int tries
    if pcb.snd_max == pcb.snd_una:
        return
    if handshake:
        tries = TCP_SYN_ACK_TRIES if pcb.state == TCP_SYN_RECEIVED else TCP_SYN_TRIES
        if pcb.rtt.backoff >= tries or (pcb.user_timeout_ms and env.now_ns - pcb.progress_ns >= tcp_give_up_after(pcb)):
            tcp_done(env, pcb, timeout_error(pcb))
            return
        pcb.snd_nxt = pcb.iss
    else:
        if env.now_ns - pcb.progress_ns >= tcp_give_up_after(pcb):
            give_up(env, pcb)                                  # RFC 9293 3.10.8, user timeout
            return
        if pcb.flags & TF_PTO:
            # differs: RFC 8985 7.3 prefers new data, and 7.4 halves the window if the probe itself repaired a loss.
            pcb.flags = (pcb.flags & ~<uint32_t>TF_PTO) | TF_TLP | TF_OUTPUT
            env.counters.tail_probes += 1
            tcp_rec_probe(&pcb.rec, pcb.snd_una, pcb.snd_max, pcb.eff_mss)
            tcp_arm_rexmt(pcb, env.now_ns)
            return
        pcb.cc.ops.on_rto(&pcb.cc, pcb.snd_max - pcb.snd_una, pcb.rtt.backoff == 0, env.now_ns)
        pcb.rec.ops.on_rto(&pcb.rec, pcb.snd_una, pcb.snd_max)
        pcb.snd_nxt = pcb.snd_una                              # go back: all that is unacknowledged may be lost
        pcb.flags &= ~<uint32_t>TF_PROBED
    pcb.rtt.timing = 0
    if pcb.rtt.backoff < TCP_BACKOFF_MAX:
        pcb.rtt.backoff += 1                                   # RFC 6298 (5.5)
    pcb.rto_count += 1
    env.counters.rto_events += 1
    pcb.flags |= TF_OUTPUT                                     # output sends (5.4) and starts the timer (5.6)


cdef void on_persist(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    if env.now_ns - pcb.progress_ns >= tcp_give_up_after(pcb):
        give_up(env, pcb)
        return
    if pcb.rtt.backoff < TCP_BACKOFF_MAX:
        pcb.rtt.backoff += 1
    pcb.flags |= TF_FORCE | TF_OUTPUT


cdef void on_keepalive(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef int64_t idle = env.now_ns - pcb.last_recv_ns
    cdef int64_t limit = <int64_t>pcb.keepidle_s * 1000000000
    if not pcb.flags & TF_KEEPALIVE or pcb.state < TCP_ESTABLISHED or pcb.state > TCP_CLOSE_WAIT:
        return
    if idle < limit:
        pcb.keep_probes = 0
        pcb.timers[TT_KEEP] = pcb.last_recv_ns + limit
        return
    if pcb.snd.len_bytes:            # retransmission or persist asks the peer already
        pcb.timers[TT_KEEP] = env.now_ns + limit
        return
    if pcb.keep_probes >= pcb.keepcnt or \
            (pcb.user_timeout_ms and pcb.keep_probes and idle >= tcp_give_up_after(pcb)):
        give_up(env, pcb)
        return
    # An old sequence number makes the peer answer (RFC 9293 3.8.4)
    if tcp_send_bare(env, pcb, pcb.snd_una - 1, pcb.rcv_nxt, TCP_ACK) == 0:
        pcb.keep_probes += 1
    pcb.timers[TT_KEEP] = env.now_ns + <int64_t>pcb.keepintvl_s * 1000000000


cdef void tcp_timers_run(tcp_env *env, tcp_pcb *pcb) noexcept nogil:
    cdef int64_t now = env.now_ns
    if pcb.timers[TT_RETRY] <= now:
        pcb.timers[TT_RETRY] = INT64_MAX
        pcb.flags |= TF_OUTPUT
    if pcb.timers[TT_DELACK] <= now:
        pcb.timers[TT_DELACK] = INT64_MAX
        pcb.flags |= TF_OUTPUT | TF_ACK_NOW
    if pcb.timers[TT_REXMT] <= now:
        pcb.timers[TT_REXMT] = INT64_MAX
        if pcb.flags & TF_PERSIST:
            on_persist(env, pcb)
        else:
            on_retransmit(env, pcb)
    if pcb.timers[TT_2MSL] <= now:
        tcp_done(env, pcb, 0)
    if pcb.timers[TT_KEEP] <= now:
        pcb.timers[TT_KEEP] = INT64_MAX
        on_keepalive(env, pcb)
    if pcb.flags & TF_OUTPUT:
        tcp_output_run(env, pcb)
