# Arming of TCP's timers (inline, for the hot path) and what happens when they fire.

from libc.stdint cimport int64_t
from ulnet.stack.tcp cimport tcp_env
from ulnet.stack.tcp_cb cimport (
    TF_PERSIST, TF_PTO, TF_SACK, TF_TLP, TF_USER_GONE, TT_REXMT, tcp_pcb, tcp_timer_is_off,
)
from ulnet.stack.tcp_recovery cimport REC_LOSS
from ulnet.stack.tcp_rtt cimport tcp_rto

cdef extern from *:                      # C literals: an enum would make int of them
    """
    #define TCP_DELACK_NS 40000000LL
    #define TCP_PERSIST_MIN_NS 200000000LL
    #define TCP_PERSIST_MAX_NS 60000000000LL
    #define TCP_TIME_WAIT_NS 60000000000LL
    #define TCP_FIN_WAIT_2_NS 60000000000LL
    #define TCP_ORPHAN_NS 100000000000LL
    #define TCP_GIVE_UP_NS 900000000000LL
    #define TCP_RETRY_NS 100000LL
    #define TCP_PTO_MIN_NS 4000000LL
    #define TCP_PTO_ALONE_NS 60000000LL
    """
    const int64_t TCP_DELACK_NS              # RFC 9293 3.8.6.3 allows 500 ms; 40 as Linux
    const int64_t TCP_PERSIST_MIN_NS
    const int64_t TCP_PERSIST_MAX_NS
    const int64_t TCP_TIME_WAIT_NS           # 2 MSL with the 30 s everybody uses
    const int64_t TCP_FIN_WAIT_2_NS          # of a connection without a user, as Linux and BSD
    const int64_t TCP_ORPHAN_NS              # without a user and without progress: RFC 9293 3.8.3 (R2 >= 100 s)
    const int64_t TCP_GIVE_UP_NS             # R2 of data: about Linux's 15 retransmissions
    const int64_t TCP_RETRY_NS               # the link was full: doubled up to 6 times
    const int64_t TCP_PTO_MIN_NS             # differs: RFC 8985 has none; a peer that does not run answers late, and a probe
                                             # would be in vain. Between Linux's 2 and 8 ms.
    const int64_t TCP_PTO_ALONE_NS           # of a single segment, whose ACK may be delayed. differs: RFC 8985 allows for 200 ms;
                                             # the usual delay is 40. A probe in vain costs one segment.

cdef enum:
    TCP_SYN_TRIES = 6                    # differs: 127 s as Linux; RFC 9293 3.8.3 asks for 3 minutes
    TCP_SYN_ACK_TRIES = 5

cdef inline int64_t tcp_give_up_after(const tcp_pcb *pcb) noexcept nogil:
    if pcb.user_timeout_ms:
        return <int64_t>pcb.user_timeout_ms * 1000000      # RFC 5482
    return TCP_ORPHAN_NS if pcb.flags & TF_USER_GONE else TCP_GIVE_UP_NS

cdef inline void clip_to_user_timeout(tcp_pcb *pcb) noexcept nogil:
    cdef int64_t last
    if pcb.user_timeout_ms and not tcp_timer_is_off(pcb, TT_REXMT):
        last = pcb.progress_ns + tcp_give_up_after(pcb)
        if last < pcb.timers[TT_REXMT]:
            pcb.timers[TT_REXMT] = last

cdef inline void tcp_arm_rexmt(tcp_pcb *pcb, int64_t now_ns) noexcept nogil:
    cdef int64_t pto, least
    if pcb.flags & TF_PERSIST:
        pcb.flags &= ~<unsigned int>TF_PERSIST
        pcb.rtt.backoff = 0          # it counted probes
    pcb.flags &= ~<unsigned int>TF_PTO
    pcb.timers[TT_REXMT] = now_ns + tcp_rto(&pcb.rtt)
    # RFC 8985 7.2
    if pcb.flags & TF_SACK and not pcb.flags & TF_TLP and pcb.rtt.backoff == 0 and pcb.rtt.srtt_ns and \
            pcb.rec.state != REC_LOSS:
        pto = 2 * pcb.rtt.srtt_ns + 4 * pcb.rtt.rttvar_ns
        least = TCP_PTO_MIN_NS if pcb.snd_max - pcb.snd_una > pcb.eff_mss else TCP_PTO_ALONE_NS
        if pto < least:
            pto = least
        if pto < tcp_rto(&pcb.rtt):
            pcb.flags |= TF_PTO
            pcb.timers[TT_REXMT] = now_ns + pto
    clip_to_user_timeout(pcb)

cdef inline void tcp_arm_persist(tcp_pcb *pcb, int64_t now_ns) noexcept nogil:
    cdef int64_t wait
    if not pcb.flags & TF_PERSIST:
        pcb.flags |= TF_PERSIST
        pcb.rtt.backoff = 0
        pcb.progress_ns = now_ns
    wait = tcp_rto(&pcb.rtt)
    if wait < TCP_PERSIST_MIN_NS:
        wait = TCP_PERSIST_MIN_NS
    if wait > TCP_PERSIST_MAX_NS:
        wait = TCP_PERSIST_MAX_NS
    pcb.timers[TT_REXMT] = now_ns + wait
    clip_to_user_timeout(pcb)

cdef void tcp_timers_run(tcp_env *env, tcp_pcb *pcb) noexcept nogil
cdef void tcp_arm_keepalive(tcp_pcb *pcb, int64_t now_ns) noexcept nogil
# The connection is over: queues of what we send and of pieces go, unread data stays for the user.
cdef void tcp_done(tcp_env *env, tcp_pcb *pcb, int so_error) noexcept nogil
