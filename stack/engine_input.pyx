"""Input: what a received frame means, from the Ethernet header down to the session it belongs to.

A peer's garbage is counted and dropped here and nowhere else. Frames of flows that are on their way
between two holders are kept: an orphan waits for its session to arrive, a stray goes to the new holder.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from ulnet.kernelshim.link cimport UL_FRAME_CSUM_OK, UL_FRAME_CSUM_PARTIAL, UL_SLOT_NONE, ul_rx
from ulnet.stack.engine_core cimport (
    ATTN_STRAYS, EVENT_GONE, PHASE_EMBRYONIC, ROLE_FOREIGN, ROLE_LISTEN, ROLE_TCP, ROLE_UDP, engine, engine_leases,
    event_add, frame_rec, neighbours_changed, session_end, session_find, session_new, session_ref, session_tcp_start,
    session_touch, session_unref, time_of_day, ul_session,
)
from ulnet.stack.engine_output cimport emit_echo_reply, emit_icmp_unreachable, emit_refusal
from ulnet.stack.ip_reass cimport ip_reass_input
from ulnet.stack.neighbour cimport neigh_input
from ulnet.stack.stamps cimport STAMP_DELIVERED, STAMP_TRANSPORT_IN, stamp
from ulnet.stack.tcp cimport TCP_ACK, TCP_RST, TCP_SYN, tcp_icmp, tcp_input, tcp_isn, tcp_out, tcp_passive, tcp_refuse, tcp_reusable, tcp_seg
from ulnet.stack.types cimport UL_IPPROTO_ICMP, UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_equal, flow_equal, flow_key, ul_addr
from ulnet.stack.udp cimport udp_icmp, udp_input
from ulnet.stack.wire cimport (
    ETH_HEADER_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, WIRE_CHECKSUM, arp_parse, arp_pkt, icmp_error, icmp_error_parse,
    icmp_parse, icmp_pkt, ipv4_parse, ipv4_pkt, tcp_parse, udp_parse, udp_pkt,
)

cdef enum:
    ORPHANS_MAX = 512
    ORPHANS_MAX_BYTES = 8 << 20
    STRAYS_MAX = 512
    EMBRYOS_MAX = 1024               # of one listener; beyond it a SYN is dropped and the peer tries again

cdef int64_t ORPHAN_NS = 200000000   # how long a frame may be ahead of its session


cdef bint engine_frame(engine *e, ul_rx *frame) noexcept nogil:
    cdef const uint8_t *p = frame.data
    cdef uint32_t n = frame.len_bytes
    cdef uint16_t ethertype
    cdef arp_pkt arp
    cdef ipv4_pkt ip
    cdef ipv4_pkt whole
    cdef uint8_t *assembled
    cdef ul_rx copy
    if n < ETH_HEADER_BYTES:
        e.n.short_frames += 1
        return False
    ethertype = (p[12] << 8) | p[13]
    if ethertype == ETHERTYPE_IPV4:
        if ipv4_parse(p + ETH_HEADER_BYTES, n - ETH_HEADER_BYTES, &ip) < 0:
            e.n.bad_ip += 1
            return False
        if not addr_equal(&ip.dst, &e.meta.addr):
            e.n.not_ours += 1
            return False
        if ip.more_fragments or ip.frag_off_bytes:
            e.n.fragments_in += 1
            assembled = ip_reass_input(e.reass, &ip, e.now_ns, &whole)
            if assembled != NULL:
                # The pieces lived in several frames; what follows reads the assembled copy.
                copy = frame[0]
                copy.slot = UL_SLOT_NONE
                copy.gso_size_bytes = 0
                ipv4_input(e, &copy, &whole, 0, False)
                free(assembled)
            return False
        return ipv4_input(e, frame, &ip, frame.flags, True)
    if ethertype == ETHERTYPE_ARP and e.neigh != NULL:
        if arp_parse(p + ETH_HEADER_BYTES, n - ETH_HEADER_BYTES, &arp) < 0:
            e.n.bad_arp += 1
            return False
        neigh_input(e.neigh, &e.nenv, &arp)
        neighbours_changed(e)
        return False
    e.n.unknown_ethertype += 1
    return False


cdef bint ipv4_input(engine *e, ul_rx *frame, const ipv4_pkt *ip, uint16_t flags, bint holdable) noexcept nogil:
    # A frame of a local kernel carries only the pseudo-header sum: it is right by construction.
    cdef bint verify = not (flags & (UL_FRAME_CSUM_PARTIAL | UL_FRAME_CSUM_OK))
    if ip.proto == UL_IPPROTO_TCP:
        return tcp_frame(e, frame, ip, verify, holdable)
    if ip.proto == UL_IPPROTO_UDP:
        return udp_frame(e, frame, ip, verify, holdable)
    if ip.proto == UL_IPPROTO_ICMP:
        icmp_frame(e, ip)
        return False
    e.n.unknown_proto += 1
    if not e.library:
        emit_icmp_unreachable(e, ip, 2)    # RFC 1122 3.2.2.1: protocol unreachable
    return False


cdef bint tcp_frame(engine *e, ul_rx *frame, const ipv4_pkt *ip, bint verify, bint holdable) noexcept nogil:
    cdef tcp_seg seg
    cdef flow_key flow
    cdef ul_session *s
    cdef uint32_t iss_least = 0
    cdef int rc
    stamp(STAMP_TRANSPORT_IN)
    memset(&flow, 0, sizeof(flow))
    rc = tcp_parse(ip, verify, &seg, &flow.rport, &flow.lport)
    if rc < 0:
        e.n.bad_tcp += 1
        if rc == WIRE_CHECKSUM:
            e.n.bad_checksum += 1
        return False
    seg.gso_size_bytes = frame.gso_size_bytes
    seg.frame = frame if holdable else NULL
    seg.held = 0
    flow.laddr = ip.dst
    flow.raddr = ip.src
    flow.proto = UL_IPPROTO_TCP
    s = session_find(e, &flow)
    if s != NULL:
        if s.role == ROLE_TCP:
            if seg.flags & TCP_SYN and s.closing and tcp_reusable(s.tcp, &seg, &iss_least):
                # RFC 9293 3.10.7.4 (TIME-WAIT), RFC 6191: a new connection may take over the old one's names.
                event_add(e, EVENT_GONE, s, <int64_t>s.id)
                session_end(e, s, 0)
                # Its listener may be an application's by now: then the peer's next SYN finds the way there.
                if e.library or name_find(e, &flow) != NULL:
                    listen_input(e, &seg, &flow, iss_least)
                return False
            tcp_input(&e.env, s.tcp, &seg)
            session_touch(e, s)
            stamp(STAMP_DELIVERED)
            return seg.held
        if s.role == ROLE_FOREIGN:
            stray_add(e, frame)
            return False
    if not e.library or answers(e, frame, &seg, &flow):
        listen_input(e, &seg, &flow, 0)
    return False


cdef bint answers(engine *e, ul_rx *frame, const tcp_seg *seg, const flow_key *flow) noexcept nogil:
    """A library got a segment for no session of its own: is the answer its own matter, now? Else the frame is kept."""
    cdef ul_session *s = name_find(e, flow)
    if s == NULL:
        if engine_leases(e, flow.lport):
            return True
    elif s.role == ROLE_FOREIGN or (s.role == ROLE_LISTEN and s.shut_wr and seg.flags & TCP_SYN):
        stray_add(e, frame)                # the listener has moved into the server, or does so now
        return False
    elif s.role == ROLE_LISTEN and (e.last_call or (seg.flags & TCP_SYN and not seg.flags & TCP_ACK)):
        return True
    # Perhaps of a connection that the server is about to deliver; refused when it never comes.
    orphan_add(e, frame, flow)
    return False


cdef ul_session *name_find(engine *e, const flow_key *flow) noexcept nogil:
    """Who has the flow's local endpoint: a listener, or the memory of one."""
    cdef flow_key name
    memset(&name, 0, sizeof(name))
    name.laddr = flow.laddr
    name.lport = flow.lport
    name.proto = UL_IPPROTO_TCP
    return session_find(e, &name)


cdef void listen_input(engine *e, tcp_seg *seg, const flow_key *flow, uint32_t iss_least) noexcept nogil:
    """RFC 9293 3.10.7.2: a segment for no connection: a listener's SYN, or refused."""
    cdef ul_session *listener = name_find(e, flow)
    cdef ul_session *s
    cdef tcp_out out
    cdef uint32_t iss
    if listener == NULL or listener.role != ROLE_LISTEN or seg.flags & (TCP_ACK | TCP_RST) or not seg.flags & TCP_SYN:
        if tcp_refuse(seg, &out):
            e.n.no_listener += 1
            emit_refusal(e, flow, &out)
        return
    if listener.accept_count > listener.backlog:   # as Linux: backlog + 1 may wait
        e.n.backlog_full += 1
        return
    if listener.embryonic >= EMBRYOS_MAX:
        e.n.embryonic_dropped += 1
        return
    s = session_new(e, UL_IPPROTO_TCP)
    if s == NULL:
        return
    s.flow = flow[0]
    s.cfg = listener.cfg
    s.cfg.ts_offset = tcp_isn(e.secret, &s.flow, sizeof(flow_key), 0)
    s.ttl = listener.ttl
    s.tos = listener.tos
    if session_tcp_start(e, s) < 0:
        session_unref(e, s)
        return
    s.phase = PHASE_EMBRYONIC
    s.listener = listener
    session_ref(listener)
    listener.embryonic += 1
    iss = tcp_isn(e.secret, &s.flow, sizeof(flow_key), e.now_ns)
    if iss_least and <int32_t>(iss - iss_least) < 0:
        iss = iss_least
    tcp_passive(&e.env, s.tcp, seg, iss)
    session_touch(e, s)
    session_unref(e, s)                    # the table and the listener's queue hold it from here


cdef bint udp_frame(engine *e, ul_rx *frame, const ipv4_pkt *ip, bint verify, bint holdable) noexcept nogil:
    cdef udp_pkt pkt
    cdef flow_key flow
    cdef ul_session *s
    cdef bint held = False
    cdef int rc
    stamp(STAMP_TRANSPORT_IN)
    rc = udp_parse(ip, verify, &pkt)
    if rc < 0:
        e.n.bad_udp += 1
        if rc == WIRE_CHECKSUM:
            e.n.bad_checksum += 1
        return False
    memset(&flow, 0, sizeof(flow))
    flow.laddr = ip.dst
    flow.raddr = ip.src
    flow.lport = pkt.dport
    flow.rport = pkt.sport
    flow.proto = UL_IPPROTO_UDP
    s = session_find(e, &flow)
    if s == NULL:
        memset(&flow.raddr, 0, sizeof(ul_addr))
        flow.rport = 0
        s = session_find(e, &flow)
    if s != NULL and s.role == ROLE_UDP:
        s.udp.in_ttl = ip.ttl
        s.udp.in_tos = ip.tos
        if s.stamp:
            s.udp.in_stamp_ns = time_of_day()
        udp_input(&e.bufs, s.udp, &pkt, &ip.src, frame, &held)
        session_touch(e, s)
        stamp(STAMP_DELIVERED)
        return held and holdable
    if s != NULL and s.role == ROLE_FOREIGN:
        stray_add(e, frame)
    elif e.library:
        flow.raddr = ip.src
        flow.rport = pkt.sport
        orphan_add(e, frame, &flow)
    else:
        e.n.no_udp_port += 1
        emit_icmp_unreachable(e, ip, 3)
    return False


cdef void icmp_frame(engine *e, const ipv4_pkt *ip) noexcept nogil:
    cdef icmp_pkt icmp
    cdef icmp_error err
    cdef ul_session *s
    if icmp_parse(ip, &icmp) < 0:
        e.n.bad_icmp += 1
        return
    e.n.icmp_in += 1
    if icmp.type == 8:
        if not e.library:
            emit_echo_reply(e, ip, &icmp)
        return
    if icmp.type != 3 and icmp.type != 11 and icmp.type != 12:
        return
    if icmp_error_parse(&icmp, &err) < 0:
        e.n.bad_icmp += 1
        return
    s = session_find(e, &err.flow)
    if s == NULL and err.flow.proto == UL_IPPROTO_UDP:
        memset(&err.flow.raddr, 0, sizeof(ul_addr))
        err.flow.rport = 0
        s = session_find(e, &err.flow)
        if s != NULL and s.role == ROLE_UDP:
            # Unconnected: as BSD and Linux, only connected sockets are told (RFC 1122 4.1.3.3 leaves it open).
            return
    if s == NULL or not addr_equal(&err.flow.laddr, &e.meta.addr):
        e.n.icmp_unmatched += 1
        return
    if s.role == ROLE_TCP:
        tcp_icmp(&e.env, s.tcp, err.error, err.tcp_seq, err.next_mtu_bytes)
        session_touch(e, s)
    elif s.role == ROLE_UDP:
        if err.next_mtu_bytes >= 68:
            s.path_mtu_bytes = <uint16_t>err.next_mtu_bytes
        else:
            udp_icmp(s.udp, err.error)
        session_touch(e, s)
    else:
        e.n.icmp_unmatched += 1


# ---------------------------------------------------------------- frames ahead of, or behind, their session

cdef frame_rec *frame_copy(engine *e, const ul_rx *frame) noexcept nogil:
    cdef frame_rec *f = <frame_rec *>calloc(1, sizeof(frame_rec))
    if f == NULL:
        e.n.nomem += 1
        return NULL
    f.data = <uint8_t *>malloc(frame.len_bytes)
    if f.data == NULL:
        e.n.nomem += 1
        free(f)
        return NULL
    memcpy(f.data, frame.data, frame.len_bytes)
    f.len_bytes = frame.len_bytes
    f.flags = frame.flags
    f.gso_size_bytes = frame.gso_size_bytes
    return f


cdef void stray_add(engine *e, const ul_rx *frame) noexcept nogil:
    cdef frame_rec *f
    if e.strays_count >= STRAYS_MAX:
        e.n.strays_dropped += 1
        return
    f = frame_copy(e, frame)
    if f == NULL:
        return
    e.n.strays += 1
    e.strays_count += 1
    if e.strays_tail != NULL:
        e.strays_tail.next = f
    else:
        e.strays = f
    e.strays_tail = f
    e.attention |= ATTN_STRAYS


cdef void orphan_add(engine *e, const ul_rx *frame, const flow_key *flow) noexcept nogil:
    cdef frame_rec *f
    cdef frame_rec **at = &e.orphans
    if e.last_call:
        return
    if e.orphans_count >= ORPHANS_MAX or e.orphans_bytes + frame.len_bytes > ORPHANS_MAX_BYTES:
        e.n.orphans_dropped += 1
        return
    f = frame_copy(e, frame)
    if f == NULL:
        return
    e.n.orphans_held += 1
    f.flow = flow[0]
    f.expires_ns = e.now_ns + ORPHAN_NS
    while at[0] != NULL:
        at = &at[0].next
    at[0] = f
    e.orphans_count += 1
    e.orphans_bytes += f.len_bytes


cdef void orphan_drop(engine *e, frame_rec *f) noexcept nogil:
    e.orphans_count -= 1
    e.orphans_bytes -= f.len_bytes
    free(f.data)
    free(f)


cdef void orphans_replay(engine *e, const flow_key *flow) noexcept nogil:
    cdef frame_rec **at = &e.orphans
    cdef frame_rec *f
    cdef frame_rec *mine = NULL
    cdef frame_rec **mine_tail = &mine
    while at[0] != NULL:                   # unlink first: a replayed frame may become an orphan again
        f = at[0]
        if flow_equal(&f.flow, flow) or (flow.rport == 0 and f.flow.lport == flow.lport and f.flow.proto == flow.proto):
            at[0] = f.next
            f.next = NULL
            mine_tail[0] = f
            mine_tail = &f.next
        else:
            at = &f.next
    while mine != NULL:
        f = mine
        mine = f.next
        orphan_input(e, f)
        orphan_drop(e, f)


cdef void orphan_input(engine *e, const frame_rec *f) noexcept nogil:
    cdef ul_rx frame
    memset(&frame, 0, sizeof(frame))
    frame.data = f.data
    frame.len_bytes = f.len_bytes
    frame.flags = f.flags
    frame.gso_size_bytes = f.gso_size_bytes
    frame.slot = UL_SLOT_NONE              # rxq_append copies what has no slot
    engine_frame(e, &frame)


cdef void orphans_expire(engine *e) noexcept nogil:
    cdef frame_rec *f
    while e.orphans != NULL and e.orphans.expires_ns <= e.now_ns:
        f = e.orphans
        e.orphans = f.next
        e.n.orphans_dropped += 1
        e.last_call = 1
        orphan_input(e, f)
        e.last_call = 0
        orphan_drop(e, f)
