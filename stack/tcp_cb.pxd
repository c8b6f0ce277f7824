# The TCP control block (RFC 9293 3.3.1) and the small helpers every TCP file uses on it.
#
# Ownership: the connection's owner (engine or simulator) owns the tcp_pcb and frees it with tcp_free();
# the pcb owns the chunks in snd and the segments in rcv and ooo (buf.pxd says what those own).
#
# Sequence space: snd holds bytes from snd_una on (once the SYN is acknowledged); a FIN takes the number
# after its last byte and exists from the moment state is FIN_WAIT_1, CLOSING or LAST_ACK.

from libc.stdint cimport INT64_MAX, UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_link
from ulnet.stack.buf cimport rxqueue, txqueue
from ulnet.stack.tcp_congestion cimport tcp_cc
from ulnet.stack.tcp_recovery cimport tcp_rec
from ulnet.stack.tcp_rtt cimport tcp_rtt

cdef enum:
    HEADERS_MAX_BYTES = 14 + 60 + 60    # Ethernet, IPv4, TCP

cdef enum:
    # RFC 9293 3.3.2, in its order (CLOSED, "no state at all", first)
    TCP_CLOSED = 0
    TCP_LISTEN = 1               # listeners live above TCP; tcp_passive() starts in SYN_RECEIVED
    TCP_SYN_SENT = 2
    TCP_SYN_RECEIVED = 3
    TCP_ESTABLISHED = 4
    TCP_FIN_WAIT_1 = 5
    TCP_FIN_WAIT_2 = 6
    TCP_CLOSE_WAIT = 7
    TCP_CLOSING = 8
    TCP_LAST_ACK = 9
    TCP_TIME_WAIT = 10
    TCP_STATES = 11

cdef enum:
    # tcp_pcb.timers
    TT_REXMT = 0                 # retransmission, or persist when TF_PERSIST
    TT_DELACK = 1
    TT_KEEP = 2
    TT_2MSL = 3                  # TIME-WAIT; FIN-WAIT-2 and other orphans
    TT_RETRY = 4                 # the link was full
    TT_COUNT = 5

cdef enum:
    # tcp_pcb.flags
    TF_OUTPUT = 0x1              # tcp_output has something to look at
    TF_ACK_NOW = 0x2
    TF_NODELAY = 0x4
    TF_CORK = 0x8
    TF_KEEPALIVE = 0x10
    TF_TS = 0x20                 # timestamps in use (or offered, in SYN_SENT)
    TF_WSCALE = 0x40             # window scaling in use (or offered)
    TF_SACK = 0x80               # SACK in use
    TF_PASSIVE = 0x100           # came from a listener
    TF_CLOSE_PENDING = 0x200     # closed before ESTABLISHED: send a FIN then
    TF_USER_GONE = 0x400         # no reader, no writer any more
    TF_SHUT_RD = 0x800
    TF_EOF = 0x1000              # the peer's FIN was reached
    TF_FIN_SEEN = 0x2000         # a FIN at rcv_fin is known, data before it may be missing
    TF_PERSIST = 0x4000          # TT_REXMT runs as persist timer
    TF_FORCE = 0x8000            # next output: send at least a probe
    TF_PROBED = 0x10000          # snd_max was moved by a window probe only
    TF_SYN_RESENT = 0x20000
    TF_LINGER0 = 0x40000         # SO_LINGER with 0 seconds: close aborts
    TF_CWND_LIMITED = 0x80000    # the last output stopped at the congestion window
    TF_QUICKACK = 0x100000       # TCP_QUICKACK: no delayed ACKs
    TF_OPENED = 0x200000         # was open once: a later CLOSED is an end, not a beginning
    TF_PTO = 0x400000            # TT_REXMT runs shorter than the RTO: then a probe goes, once (RFC 8985 7)
    TF_TLP = 0x800000            # that probe went since the last progress
    TF_ALL = 0xFFFFFF

cdef enum:
    TCP_MSS_DEFAULT = 536                # RFC 9293 3.7.1
    TCP_MSS_MIN = 88                     # smaller offers are raised: a peer must not make us send crumbs
    TCP_TS_BYTES = 12                    # NOP NOP timestamps
    TCP_PAYLOAD_MAX = 65495              # 65535 - IPv4 and TCP headers

ctypedef struct tcp_pcb:
    void *owner
    uint8_t state
    uint8_t snd_wscale               # to apply to windows we receive
    uint8_t rcv_wscale               # to apply to windows we announce
    uint8_t keep_probes              # unanswered
    uint32_t flags
    # what we send
    uint32_t iss
    uint32_t snd_una
    uint32_t snd_nxt
    uint32_t snd_max                 # highest number sent (snd_nxt goes back after a timeout)
    uint32_t snd_wnd                 # scaled
    uint32_t snd_wl1
    uint32_t snd_wl2
    uint32_t max_sndwnd              # largest window the peer ever offered (RFC 5961 5, SWS)
    uint32_t snd_sml                 # end of the last segment smaller than the MSS (Minshall's Nagle)
    uint16_t our_mss                 # announced
    uint16_t snd_mss                 # of the path and peer, options included
    uint16_t eff_mss                 # payload of a full segment
    uint16_t rcv_mss                 # largest segment seen: what "a full segment" is for delayed ACKs
    # what we receive
    uint32_t irs
    uint32_t rcv_nxt
    uint32_t rcv_adv                 # right edge announced; never goes back
    uint32_t rcv_fin                 # when TF_FIN_SEEN
    uint32_t last_ack_sent           # RFC 7323 4.3
    uint32_t ooo_newest              # sequence number of the newest piece in ooo (RFC 2018 4)
    uint32_t dup_left                # what came once more since our last ACK (RFC 2883); nothing if both are the same
    uint32_t dup_right
    uint32_t unacked_in_bytes        # received since our last ACK
    uint32_t ts_recent
    uint32_t ts_offset
    int64_t ts_recent_ns             # when ts_recent was set (RFC 7323 5.5)
    # queues
    txqueue snd
    rxqueue rcv
    rxqueue ooo                      # ordered by sequence number, no overlaps
    uint32_t sndbuf_bytes
    uint32_t rcvbuf_bytes
    uint32_t rcv_frame_bytes         # payload of the frames that come, lately: a ring slot takes one frame
    uint32_t rcv_limit_bytes         # window that so many frames' slots can hold; 0: the ring sets no limit
    # algorithms
    tcp_rtt rtt
    tcp_cc cc
    tcp_rec rec
    # timers, absolute; INT64_MAX: off
    int64_t timers[TT_COUNT]
    int64_t progress_ns              # when the peer last took something, or the wait for it began
    int64_t last_recv_ns
    int64_t last_send_ns
    int64_t challenge_ns             # start of the current rate window
    uint32_t challenge_count
    uint32_t retry_shift
    uint32_t keepidle_s
    uint32_t keepintvl_s
    uint32_t keepcnt
    uint32_t user_timeout_ms         # 0: default
    int so_error                     # negative errno, reported once
    int soft_error                   # what ICMP said (RFC 5927): reported if the connection times out
    # for tcp_stat
    uint32_t retransmits
    uint32_t rto_count
    uint64_t bytes_in
    uint64_t bytes_out
    int64_t changed_ns               # last change of state

cdef inline bint tcp_has_sent_fin_state(const tcp_pcb *pcb) noexcept nogil:
    # a FIN is queued or in flight
    return pcb.state == TCP_FIN_WAIT_1 or pcb.state == TCP_CLOSING or pcb.state == TCP_LAST_ACK

cdef inline void tcp_set_state(tcp_pcb *pcb, uint8_t state, int64_t now_ns) noexcept nogil:
    pcb.state = state
    pcb.changed_ns = now_ns

cdef inline void tcp_timer_off(tcp_pcb *pcb, int which) noexcept nogil:
    pcb.timers[which] = INT64_MAX

cdef inline bint tcp_timer_is_off(const tcp_pcb *pcb, int which) noexcept nogil:
    return pcb.timers[which] == INT64_MAX

cdef inline uint32_t tcp_ts_now(const tcp_pcb *pcb, int64_t now_ns) noexcept nogil:
    # RFC 7323 5.4: between 1 ms and 1 s a tick
    return <uint32_t>(<uint64_t>now_ns // 1000000) + pcb.ts_offset

cdef inline void tcp_want_ack(tcp_pcb *pcb) noexcept nogil:
    pcb.flags |= TF_ACK_NOW | TF_OUTPUT

cdef inline uint32_t tcp_ring_limit(const ul_link *link, uint32_t payload_bytes, int64_t rtt_ns) noexcept nogil:
    # The window that three quarters of a ring's slots can take in frames of that size, if all of it may come while the
    # reader is away for 1 ms; 0: no limit. On a longer way, only a part of the window comes in that time.
    cdef uint32_t slots = link.slots
    cdef uint64_t limit
    if link.small_slots and payload_bytes + HEADERS_MAX_BYTES <= link.small_bytes:
        slots = link.small_slots
    limit = <uint64_t>(slots // 4 * 3) * payload_bytes * <uint64_t>(1 + rtt_ns // 1000000)
    return <uint32_t>limit if limit < UINT32_MAX else UINT32_MAX

cdef inline uint32_t tcp_rcv_room(const tcp_pcb *pcb) noexcept nogil:
    # the receive buffer, or what the ring's slots can take of it
    if pcb.rcv_limit_bytes and pcb.rcv_limit_bytes < pcb.rcvbuf_bytes:
        return pcb.rcv_limit_bytes
    return pcb.rcvbuf_bytes

cdef inline uint32_t tcp_rcv_space(const tcp_pcb *pcb) noexcept nogil:
    # what is free of it
    cdef uint32_t room = tcp_rcv_room(pcb)
    return room - <uint32_t>pcb.rcv.len_bytes if pcb.rcv.len_bytes < room else 0

cdef inline uint32_t tcp_rcv_wnd(const tcp_pcb *pcb) noexcept nogil:
    return pcb.rcv_adv - pcb.rcv_nxt
