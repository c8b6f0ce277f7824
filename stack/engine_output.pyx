"""Output: how a segment, datagram or message of ours becomes a frame, and which way it goes.

Headers are built on the C stack and sent with the payload where it lies: one send call a (super-)segment.
"""

from libc.errno cimport EAGAIN, EHOSTUNREACH, EMSGSIZE, ENETUNREACH, ENOBUFS
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ulnet.kernelshim.fastpaths cimport fast_link_sums
from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_PARTIAL, UL_FRAME_GSO_TCP4, UL_FRAME_GSO_UDP, UL_FRAME_UFO, UL_LINK_CSUM, UL_LINK_UFO, iovec, ul_tx,
)
from ulnet.stack.engine_core cimport ATTN_RESOLVE, engine, ul_session
from ulnet.stack.engine_wait cimport engine_kick, helper_wake
from ulnet.stack.ip_reass cimport ip_reass_expired
from ulnet.stack.metastate cimport meta_generation, meta_resolve
from ulnet.stack.neighbour cimport neigh_ask, neigh_deadline
from ulnet.stack.stamps cimport STAMP_IP_OUT, STAMP_LINK_OUT, STAMP_LINK_SENT, STAMP_TRANSPORT_OUT, stamp
from ulnet.stack.tcp cimport TCP_OUT_IOV, TCP_RST, tcp_out
from ulnet.stack.types cimport UL_IPPROTO_ICMP, UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_equal, flow_key, ul_addr
from ulnet.stack.wire cimport (
    ETH_HEADER_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, IPV4_HEADER_BYTES, arp_emit, arp_pkt, eth_emit, icmp_emit,
    icmp_pkt, ipv4_emit, ipv4_pkt, tcp_emit, udp_emit,
)

cdef enum:
    IP_DF = 0x4000
    IP_MF = 0x2000
    UDP_HEADER_BYTES = 8
    UDP_MAX_PAYLOAD = 65507
    ICMP_BURST = 50                  # RFC 1812 4.3.2.8: at most so many errors at once,
    ICMP_PER_SECOND = 1000           # and so many a second

cdef bint link_sums = fast_link_sums()


cdef int resolve(engine *e, const ul_addr *dst, uint8_t *mac, uint32_t *mtu) noexcept nogil:
    cdef ul_addr hop
    cdef int rc = meta_resolve(e.meta, dst, mac, &hop, mtu)
    if rc == -EAGAIN:
        if e.neigh != NULL:
            neigh_ask(e.neigh, &e.nenv, &hop)
            if neigh_deadline(e.neigh) < e.sleep_until_ns:
                engine_kick(e)             # whoever sleeps in poll(2) has to ask again in time
        else:
            e.resolve_addr = hop
            e.attention |= ATTN_RESOLVE
            helper_wake(e)
    elif rc < 0:
        e.n.no_route += 1
    return rc


cdef int session_route(engine *e, ul_session *s, const ul_addr *dst) noexcept nogil:
    cdef uint64_t generation = meta_generation(e.meta)
    cdef uint32_t mtu = 0
    cdef int rc
    if s.meta_generation == generation and addr_equal(&s.meta_dst, dst):
        return 0
    rc = resolve(e, dst, s.mac, &mtu)
    if rc == 0:
        s.meta_generation = generation
        s.meta_dst = dst[0]
    else:
        s.meta_generation = <uint64_t>-1
        if rc == -EAGAIN:
            s.wait_neigh = 1
    return rc


cdef int send_frame(engine *e, ul_tx *tx) noexcept nogil:
    cdef int rc
    stamp(STAMP_LINK_OUT)
    rc = e.link.send(e.link.ctx, tx)
    stamp(STAMP_LINK_SENT)
    if rc < 0:
        e.n.link_refused += 1
    else:
        e.n.frames_out += 1
        e.n.bytes_out += tx.len_bytes
    return rc


cdef int emit_tcp(void *ctx, void *owner, const tcp_out *out) noexcept nogil:
    cdef engine *e = <engine *>ctx
    cdef ul_session *s = <ul_session *>owner
    cdef int rc
    stamp(STAMP_IP_OUT)
    rc = session_route(e, s, &s.flow.raddr)
    if rc < 0:
        return rc                          # -EAGAIN: ARP asks; else nobody answers there, or no route
    return send_tcp(e, &s.flow, s.mac, out, s.ttl, s.tos)


cdef int send_tcp(engine *e, const flow_key *flow, const uint8_t *mac, const tcp_out *out, uint8_t ttl, uint8_t tos) noexcept nogil:
    cdef uint8_t head[128]
    cdef iovec iov[TCP_OUT_IOV + 1]
    cdef ul_tx tx
    cdef uint32_t tcp_bytes
    cdef bint partial = link_sums and (e.link.features & UL_LINK_CSUM) != 0
    cdef int i
    tcp_bytes = tcp_emit(head + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, flow, out, partial)
    eth_emit(head, mac, e.link.mac, ETHERTYPE_IPV4)
    e.ip_ident += 1
    ipv4_emit(head + ETH_HEADER_BYTES, &flow.laddr, &flow.raddr, UL_IPPROTO_TCP,
              IPV4_HEADER_BYTES + tcp_bytes + out.len_bytes, e.ip_ident, IP_DF, ttl, tos)
    tx.hdr_len_bytes = <uint16_t>(ETH_HEADER_BYTES + IPV4_HEADER_BYTES + tcp_bytes)
    iov[0].iov_base = head
    iov[0].iov_len = tx.hdr_len_bytes
    for i in range(out.iov_count):
        iov[i + 1] = out.iov[i]
    tx.iov = iov
    tx.iov_count = out.iov_count + 1
    tx.len_bytes = tx.hdr_len_bytes + out.len_bytes
    tx.flags = UL_FRAME_CSUM_PARTIAL if partial else 0
    tx.gso_size_bytes = 0
    if out.len_bytes > out.mss_bytes:
        tx.flags |= UL_FRAME_GSO_TCP4
        tx.gso_size_bytes = out.mss_bytes
        e.ip_ident += <uint16_t>(out.len_bytes // out.mss_bytes)   # each piece takes a number
    tx.csum_start = ETH_HEADER_BYTES + IPV4_HEADER_BYTES
    tx.csum_offset = 16
    return send_frame(e, &tx)


cdef int emit_refusal(engine *e, const flow_key *flow, const tcp_out *out) noexcept nogil:
    cdef uint8_t mac[6]
    cdef uint32_t mtu
    cdef int rc = resolve(e, &flow.raddr, mac, &mtu)
    if rc == 0:
        rc = send_tcp(e, flow, mac, out, 64, 0)
        if out.flags & TCP_RST:
            e.tcp.resets_out += 1
    return rc


cdef int emit_arp(void *ctx, const uint8_t *dst_mac, const arp_pkt *arp) noexcept nogil:
    cdef engine *e = <engine *>ctx
    cdef uint8_t head[64]
    cdef iovec iov
    cdef ul_tx tx
    cdef uint32_t n
    memset(head, 0, sizeof(head))          # padded to Ethernet's 60 bytes
    n = eth_emit(head, dst_mac, e.link.mac, ETHERTYPE_ARP)
    n += arp_emit(head + n, arp)
    iov.iov_base = head
    iov.iov_len = 60
    memset(&tx, 0, sizeof(tx))
    tx.iov = &iov
    tx.iov_count = 1
    tx.len_bytes = 60
    return send_frame(e, &tx)


cdef int send_ip(engine *e, const uint8_t *mac, const ul_addr *dst, uint8_t proto, uint8_t *head, uint32_t transport_bytes,
                 const uint8_t *data, uint32_t n, uint8_t ttl, uint8_t tos, bint partial, uint16_t csum_offset,
                 uint32_t mtu) noexcept nogil:
    """One IP packet: head holds room for Ethernet and IP, then transport_bytes; data follows. Cut into fragments above mtu."""
    cdef iovec iov[2]
    cdef ul_tx tx
    cdef uint32_t total = IPV4_HEADER_BYTES + transport_bytes + n
    memset(&tx, 0, sizeof(tx))
    tx.iov = iov
    tx.iov_count = 2 if n else 1
    iov[0].iov_base = head
    iov[0].iov_len = ETH_HEADER_BYTES + IPV4_HEADER_BYTES + transport_bytes
    iov[1].iov_base = <void *>data
    iov[1].iov_len = n
    eth_emit(head, mac, e.link.mac, ETHERTYPE_IPV4)
    e.ip_ident += 1
    tx.hdr_len_bytes = <uint16_t>iov[0].iov_len
    tx.len_bytes = tx.hdr_len_bytes + n
    tx.csum_start = ETH_HEADER_BYTES + IPV4_HEADER_BYTES
    tx.csum_offset = csum_offset
    if partial:
        tx.flags = UL_FRAME_CSUM_PARTIAL
    if total > mtu:
        # The receiver puts it together again, so the packet may be cut: no DF (RFC 1191 is for TCP here).
        if not (partial and e.link.features & UL_LINK_UFO):
            return send_fragments(e, head, iov, total, dst, proto, ttl, tos, mtu)
        tx.flags |= UL_FRAME_UFO
        tx.gso_size_bytes = <uint16_t>((mtu - IPV4_HEADER_BYTES) & ~<uint32_t>7)
        e.n.fragments_out += 1
    ipv4_emit(head + ETH_HEADER_BYTES, &e.meta.addr, dst, proto, total, e.ip_ident, 0, ttl, tos)
    return send_frame(e, &tx)


cdef int send_fragments(engine *e, const uint8_t *head, const iovec *pieces, uint32_t total, const ul_addr *dst, uint8_t proto,
                        uint8_t ttl, uint8_t tos, uint32_t mtu) noexcept nogil:
    """RFC 791 3.2, from a flat copy of the packet: only datagrams above the MTU on links without offload come here."""
    cdef uint32_t body = total - IPV4_HEADER_BYTES
    cdef uint32_t step = (mtu - IPV4_HEADER_BYTES) & ~<uint32_t>7
    cdef uint32_t first = <uint32_t>pieces[0].iov_len - ETH_HEADER_BYTES - IPV4_HEADER_BYTES
    cdef uint8_t *flat = <uint8_t *>malloc(body)
    cdef uint8_t h[64]
    cdef iovec iov[2]
    cdef ul_tx tx
    cdef uint32_t off = 0
    cdef uint32_t n
    cdef int rc = 0
    if flat == NULL:
        e.n.nomem += 1
        return -ENOBUFS
    memcpy(flat, head + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, first)
    memcpy(flat + first, pieces[1].iov_base, body - first)
    memcpy(h, head, ETH_HEADER_BYTES)
    memset(&tx, 0, sizeof(tx))
    tx.iov = iov
    tx.iov_count = 2
    tx.hdr_len_bytes = ETH_HEADER_BYTES + IPV4_HEADER_BYTES
    while off < body and rc == 0:
        n = body - off if body - off < step else step
        ipv4_emit(h + ETH_HEADER_BYTES, &e.meta.addr, dst, proto, IPV4_HEADER_BYTES + n, e.ip_ident,
                  <uint16_t>((off >> 3) | (IP_MF if off + n < body else 0)), ttl, tos)
        iov[0].iov_base = h
        iov[0].iov_len = tx.hdr_len_bytes
        iov[1].iov_base = flat + off
        iov[1].iov_len = n
        tx.len_bytes = tx.hdr_len_bytes + n
        rc = send_frame(e, &tx)
        e.n.fragments_out += 1
        off += n
    free(flat)
    return rc


cdef int emit_udp(engine *e, ul_session *s, const ul_addr *dst, uint16_t dport, const uint8_t *data, uint32_t n) noexcept nogil:
    cdef uint8_t head[64]
    cdef flow_key flow
    cdef uint32_t mtu
    cdef bint partial
    cdef int rc
    if n > UDP_MAX_PAYLOAD:
        return -EMSGSIZE
    stamp(STAMP_TRANSPORT_OUT)
    rc = session_route(e, s, dst)
    if rc < 0:
        return rc
    mtu = udp_mtu(e, s)
    if 2 <= s.mtu_discover <= 3 and IPV4_HEADER_BYTES + UDP_HEADER_BYTES + n > mtu:
        return -EMSGSIZE                   # ip(7), IP_PMTUDISC_DO and PROBE: never in fragments
    partial = (e.link.features & UL_LINK_CSUM) != 0
    if IPV4_HEADER_BYTES + UDP_HEADER_BYTES + n <= mtu:
        partial = partial and link_sums
    elif not e.link.features & UL_LINK_UFO:
        partial = False
    flow = s.flow
    flow.raddr = dst[0]
    flow.rport = dport
    udp_emit(head + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, &flow, data, n, partial)
    stamp(STAMP_IP_OUT)
    rc = send_ip(e, s.mac, dst, UL_IPPROTO_UDP, head, UDP_HEADER_BYTES, data, n, s.ttl, s.tos, partial, 6, mtu)
    if rc == 0:
        s.udp.datagrams_out += 1
        s.udp.bytes_out += n
    return rc


cdef uint32_t udp_mtu(engine *e, const ul_session *s) noexcept nogil:
    return s.path_mtu_bytes if s.path_mtu_bytes and s.path_mtu_bytes < e.link.mtu_bytes else e.link.mtu_bytes


cdef int emit_udp_train(engine *e, ul_session *s, const ul_addr *dst, uint16_t dport, const uint8_t *data,
                        uint32_t n, uint32_t piece, uint32_t count) noexcept nogil:
    """The headers stand once: the device, or the receiver's stack, writes them before each piece (UDP_SEGMENT, udp(7))."""
    cdef uint8_t head[ETH_HEADER_BYTES + IPV4_HEADER_BYTES + UDP_HEADER_BYTES]
    cdef flow_key flow = s.flow
    cdef iovec iov[2]
    cdef ul_tx tx
    cdef int rc = session_route(e, s, dst)
    if rc < 0:
        return rc
    flow.raddr = dst[0]
    flow.rport = dport
    eth_emit(head, s.mac, e.link.mac, ETHERTYPE_IPV4)
    ipv4_emit(head + ETH_HEADER_BYTES, &e.meta.addr, dst, UL_IPPROTO_UDP, IPV4_HEADER_BYTES + UDP_HEADER_BYTES + n,
              e.ip_ident + 1, 0, s.ttl, s.tos)
    udp_emit(head + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, &flow, data, n, True)
    iov[0].iov_base = head
    iov[0].iov_len = sizeof(head)
    iov[1].iov_base = <void *>data
    iov[1].iov_len = n
    memset(&tx, 0, sizeof(tx))
    tx.iov = iov
    tx.iov_count = 2
    tx.len_bytes = sizeof(head) + n
    tx.hdr_len_bytes = sizeof(head)
    tx.flags = UL_FRAME_CSUM_PARTIAL | UL_FRAME_GSO_UDP
    tx.gso_size_bytes = <uint16_t>piece
    tx.csum_start = ETH_HEADER_BYTES + IPV4_HEADER_BYTES
    tx.csum_offset = 6
    rc = send_frame(e, &tx)
    if rc == 0:
        e.ip_ident += <uint16_t>count          # each piece takes a number
        e.n.udp_trains += 1
        s.udp.datagrams_out += count
        s.udp.bytes_out += n
    return rc


cdef bint icmp_allowed(engine *e) noexcept nogil:
    cdef int64_t fresh = (e.now_ns - e.icmp_refill_ns) // (1000000000 // ICMP_PER_SECOND)
    if fresh > 0:
        e.icmp_tokens = <uint32_t>(ICMP_BURST if e.icmp_tokens + fresh > ICMP_BURST else e.icmp_tokens + fresh)
        e.icmp_refill_ns = e.now_ns
    if e.icmp_tokens == 0:
        e.n.icmp_limited += 1
        return False
    e.icmp_tokens -= 1
    return True


cdef void send_icmp(engine *e, const ul_addr *dst, uint8_t type, uint8_t code, uint32_t rest, const uint8_t *payload,
                    uint32_t n) noexcept nogil:
    cdef uint8_t *head
    cdef uint8_t mac[6]
    cdef uint32_t mtu = 0
    if n > 65000 or resolve(e, dst, mac, &mtu) < 0:
        return
    head = <uint8_t *>malloc(ETH_HEADER_BYTES + IPV4_HEADER_BYTES + 8 + n)
    if head == NULL:
        e.n.nomem += 1
        return
    icmp_emit(head + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, type, code, rest, payload, n)
    send_ip(e, mac, dst, UL_IPPROTO_ICMP, head, 8 + n, NULL, 0, 64, 0, False, 0, e.link.mtu_bytes)
    e.n.icmp_out += 1
    free(head)


cdef void emit_icmp_unreachable(engine *e, const ipv4_pkt *about, uint8_t code) noexcept nogil:
    """RFC 792, RFC 1122 3.2.2: the offending header and 8 bytes of its payload."""
    cdef uint8_t packet[IPV4_HEADER_BYTES + 8]
    cdef uint32_t n = about.payload_bytes if about.payload_bytes < 8 else 8
    if about.frag_off_bytes or not icmp_allowed(e):
        return
    # The header is written anew: of a reassembled packet there is none to copy.
    ipv4_emit(packet, &about.src, &about.dst, about.proto, IPV4_HEADER_BYTES + about.payload_bytes, about.ident, 0,
              about.ttl, about.tos)
    memcpy(packet + IPV4_HEADER_BYTES, about.payload, n)
    send_icmp(e, &about.src, 3, code, 0, packet, IPV4_HEADER_BYTES + n)


cdef void emit_reassembly_timeouts(engine *e) noexcept nogil:
    """RFC 1122 3.3.2: whose datagram came in part only is told."""
    cdef uint8_t quote[IPV4_HEADER_BYTES + 8]
    cdef ul_addr src
    cdef ul_addr dst
    cdef uint32_t n
    while True:
        n = ip_reass_expired(e.reass, quote, &src, &dst)
        if n == 0:
            return
        if not e.library and icmp_allowed(e):
            send_icmp(e, &src, 11, 1, 0, quote, n)


cdef void emit_echo_reply(engine *e, const ipv4_pkt *ip, const icmp_pkt *icmp) noexcept nogil:
    send_icmp(e, &ip.src, 0, 0, icmp.rest, icmp.payload, icmp.payload_bytes)
    e.n.echo_replies += 1
