"""Wire formats: Ethernet, ARP (RFC 826), IPv4 (RFC 791), ICMP (RFC 792), UDP (RFC 768), TCP (RFC 9293 3.1, RFC 7323, RFC 2018).

Call order: ``ipv4_parse`` for a frame's payload, then ``tcp_parse``, ``udp_parse`` or ``icmp_parse``; on the way out
``eth_emit``, ``ipv4_emit`` and a transport's emit, each writing behind the one before. Every length is checked against
the bytes that are there before anything is read. The Python face comes last.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc cimport errno as e
from libc.stdint cimport int32_t
from libc.string cimport memset

from ulnet.stack.checksum cimport cksum_add, cksum_add_at, cksum_carry, cksum_copy, cksum_fold
from ulnet.stack.types cimport UL_IPPROTO_ICMP, UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_from_ipv4

from ulnet.stack.layers import Arp, Ethernet, Frame, Icmp, IcmpError, Ipv4, Tcp, Udp

cdef enum:
    TCP_HEADER_BYTES = 20
    UDP_HEADER_BYTES = 8
    ICMP_HEADER_BYTES = 8
    ARP_BYTES = 28
    IP_MF = 0x2000
    IP_DF = 0x4000
    IP_OFFSET_MASK = 0x1FFF
    OPT_END = 0
    OPT_NOP = 1
    OPT_MSS = 2
    OPT_WSCALE = 3
    OPT_SACK_OK = 4
    OPT_SACK = 5
    OPT_TS = 8
    TCP_F_SYN = 0x02
    WSCALE_MAX = 14                  # RFC 7323 2.3
    NO_WSCALE = 255
    ICMP_UNREACHABLE = 3
    ICMP_TIME_EXCEEDED = 11
    ICMP_PARAMETER = 12
    CODE_FRAG_NEEDED = 4
    MIN_MTU_BYTES = 68               # RFC 791 3.2: every module forwards this much


# ---- IPv4 ----

cdef int ipv4_parse(const uint8_t *p, uint32_t n, ipv4_pkt *out) noexcept nogil:
    cdef uint32_t hdr, total, frag
    if n < IPV4_HEADER_BYTES:
        return WIRE_SHORT
    if p[0] >> 4 != 4:
        return WIRE_VERSION
    hdr = (p[0] & 15) * 4
    total = load16(p + 2)
    if hdr < IPV4_HEADER_BYTES or total < hdr:
        return WIRE_LENGTH
    if total > n:
        return WIRE_SHORT
    if cksum_fold(cksum_add(p, hdr, 0)) != 0xFFFF:
        return WIRE_CHECKSUM
    if p[12] == 0 or p[12] >= 224 or p[16] == 0:      # sources 0/8, multicast, reserved, broadcast; destination 0/8
        return WIRE_ADDRESS
    if (p[12] == 127) != (p[16] == 127):              # RFC 1122 3.2.1.3 (g): never outside of a host
        return WIRE_ADDRESS
    frag = load16(p + 6)
    out.frag_off_bytes = <uint16_t>((frag & IP_OFFSET_MASK) << 3)
    out.more_fragments = (frag & IP_MF) != 0
    out.dont_fragment = (frag & IP_DF) != 0
    out.payload_bytes = total - hdr
    if frag & (IP_MF | IP_OFFSET_MASK):
        # Fragments but the last are multiples of 8 bytes; none is empty or reaches beyond 65,535 (the ping of death).
        if out.payload_bytes == 0 or (out.more_fragments and out.payload_bytes & 7) or \
                out.frag_off_bytes + out.payload_bytes + hdr > 65535:
            return WIRE_LENGTH
    addr_from_ipv4(&out.src, p + 12)
    addr_from_ipv4(&out.dst, p + 16)
    out.payload = p + hdr
    out.hdr_bytes = hdr
    out.ident = load16(p + 4)
    out.tos = p[1]
    out.ttl = p[8]
    out.proto = p[9]
    return WIRE_OK


cdef uint32_t ipv4_emit(uint8_t *p, const ul_addr *src, const ul_addr *dst, uint8_t proto, uint32_t total_bytes,
                        uint16_t ident, uint16_t flags_frag_be_host, uint8_t ttl, uint8_t tos) noexcept nogil:
    cdef uint16_t sum
    p[0] = 0x45
    p[1] = tos
    store16(p + 2, total_bytes)
    store16(p + 4, ident)
    store16(p + 6, flags_frag_be_host)
    p[8] = ttl
    p[9] = proto
    store16(p + 10, 0)
    memcpy(p + 12, src.b + 12, 4)
    memcpy(p + 16, dst.b + 12, 4)
    sum = <uint16_t>~cksum_fold(cksum_add(p, IPV4_HEADER_BYTES, 0))
    memcpy(p + 10, &sum, 2)
    return IPV4_HEADER_BYTES


cdef inline bint is_fragment(const ipv4_pkt *ip) noexcept nogil:
    return ip.frag_off_bytes != 0 or ip.more_fragments


cdef inline bint sum_is_bad(const ipv4_pkt *ip, uint32_t n) noexcept nogil:
    return cksum_fold(cksum_add(ip.payload, n, pseudo_sum(&ip.src, &ip.dst, ip.proto, n))) != 0xFFFF


# ---- TCP ----

cdef void parse_sack(const uint8_t *p, uint32_t n, tcp_seg *out) noexcept nogil:
    """RFC 2018 section 3: pairs of edges. A pair that holds nothing says nothing."""
    cdef uint32_t left, right
    while n >= 8 and out.sack_count < 4:
        left = load32(p)
        right = load32(p + 4)
        if <int32_t>(right - left) > 0:
            out.sack[2 * out.sack_count] = left
            out.sack[2 * out.sack_count + 1] = right
            out.sack_count += 1
        p += 8
        n -= 8


cdef int parse_options(const uint8_t *p, uint32_t n, tcp_seg *out) noexcept nogil:
    """RFC 9293 3.1, 3.2: unknown kinds are skipped (MUST-6); a length no option can have ends the segment (MUST-7)."""
    cdef bint syn = out.flags & TCP_F_SYN
    cdef uint32_t size
    if n == 12 and load32(p) == 0x0101080A and not syn:      # nop, nop, timestamps: what nearly every segment has
        out.has_ts = 1
        out.ts_val = load32(p + 4)
        out.ts_ecr = load32(p + 8)
        return WIRE_OK
    while n:
        if p[0] == OPT_END:
            return WIRE_OK
        if p[0] == OPT_NOP:
            p += 1
            n -= 1
            continue
        if n < 2:
            return WIRE_OPTION
        size = p[1]
        if size < 2 or size > n:
            return WIRE_OPTION
        # A known option of another size than its own is none we know: skipped. Those of the handshake count only there.
        if p[0] == OPT_MSS:
            if syn and size == 4:
                out.mss = load16(p + 2)
        elif p[0] == OPT_WSCALE:
            if syn and size == 3:
                out.wscale = p[2] if p[2] < WSCALE_MAX else WSCALE_MAX
        elif p[0] == OPT_SACK_OK:
            if syn and size == 2:
                out.sack_ok = 1
        elif p[0] == OPT_TS:
            if size == 10:
                out.has_ts = 1
                out.ts_val = load32(p + 2)
                out.ts_ecr = load32(p + 6)
        elif p[0] == OPT_SACK:
            if not syn and size >= 10 and (size - 2) & 7 == 0:
                parse_sack(p + 2, size - 2, out)
        p += size
        n -= size
    return WIRE_OK


cdef int tcp_parse(const ipv4_pkt *ip, bint verify, tcp_seg *out, uint16_t *sport, uint16_t *dport) noexcept nogil:
    cdef const uint8_t *p = ip.payload
    cdef uint32_t n = ip.payload_bytes
    cdef uint32_t hdr
    if n < TCP_HEADER_BYTES:
        return WIRE_SHORT
    hdr = (p[12] >> 4) * 4
    if hdr < TCP_HEADER_BYTES or hdr > n or is_fragment(ip):
        return WIRE_LENGTH
    if ip.dst.b[12] >= 224:                  # RFC 9293 3.9.2.3 (MUST-57): no connection with a group
        return WIRE_ADDRESS
    if verify and sum_is_bad(ip, n):
        return WIRE_CHECKSUM
    sport[0] = load16(p)
    dport[0] = load16(p + 2)
    out.seq = load32(p + 4)
    out.ack = load32(p + 8)
    out.flags = p[13]
    out.wnd = load16(p + 14)
    out.ts_val = 0
    out.ts_ecr = 0
    out.len_bytes = n - hdr
    out.data = p + hdr
    out.frame = NULL
    out.mss = 0
    out.gso_size_bytes = 0
    out.wscale = NO_WSCALE
    out.has_ts = 0
    out.sack_ok = 0
    out.sack_count = 0
    out.held = 0
    if hdr == TCP_HEADER_BYTES:
        return WIRE_OK
    return parse_options(p + TCP_HEADER_BYTES, hdr - TCP_HEADER_BYTES, out)


cdef uint64_t add_pieces(const iovec *iov, int count, uint64_t acc) noexcept nogil:
    cdef size_t at = 0
    cdef int i
    for i in range(count):
        acc = cksum_add_at(<const uint8_t *>iov[i].iov_base, iov[i].iov_len, acc, at)
        at += iov[i].iov_len
    return acc


cdef uint32_t tcp_emit(uint8_t *p, const flow_key *flow, const tcp_out *out, bint partial) noexcept nogil:
    cdef uint32_t hdr = TCP_HEADER_BYTES + out.opt_len_bytes
    cdef uint64_t acc = pseudo_sum(&flow.laddr, &flow.raddr, UL_IPPROTO_TCP, hdr + out.len_bytes)
    cdef uint16_t sum
    store16(p, flow.lport)
    store16(p + 2, flow.rport)
    store32(p + 4, out.seq)
    store32(p + 8, out.ack)
    p[12] = <uint8_t>(hdr << 2)
    p[13] = out.flags
    store16(p + 14, out.wnd)
    store32(p + 16, 0)                       # checksum, urgent pointer
    memcpy(p + TCP_HEADER_BYTES, out.opts, out.opt_len_bytes)
    if partial:
        sum = cksum_fold(acc)
    else:
        sum = <uint16_t>~cksum_fold(add_pieces(out.iov, out.iov_count, cksum_add(p, hdr, acc)))
    memcpy(p + 16, &sum, 2)
    return hdr


# ---- UDP ----

cdef int udp_parse(const ipv4_pkt *ip, bint verify, udp_pkt *out) noexcept nogil:
    cdef const uint8_t *p = ip.payload
    cdef uint32_t n
    if ip.payload_bytes < UDP_HEADER_BYTES:
        return WIRE_SHORT
    n = load16(p + 4)
    if n < UDP_HEADER_BYTES or n > ip.payload_bytes or is_fragment(ip):
        return WIRE_LENGTH
    if verify and load16(p + 6) != 0 and sum_is_bad(ip, n):      # RFC 768: zero says that there is none
        return WIRE_CHECKSUM
    out.sport = load16(p)
    out.dport = load16(p + 2)
    out.data = p + UDP_HEADER_BYTES
    out.len_bytes = n - UDP_HEADER_BYTES
    return WIRE_OK


cdef uint32_t udp_emit_iov(uint8_t *p, const flow_key *flow, const iovec *iov, int iov_count, uint32_t n,
                           bint partial) noexcept nogil:
    cdef uint64_t acc = pseudo_sum(&flow.laddr, &flow.raddr, UL_IPPROTO_UDP, UDP_HEADER_BYTES + n)
    cdef uint16_t sum
    store16(p, flow.lport)
    store16(p + 2, flow.rport)
    store16(p + 4, UDP_HEADER_BYTES + n)
    store16(p + 6, 0)
    if partial:
        sum = cksum_fold(acc)
    else:
        sum = <uint16_t>~cksum_fold(add_pieces(iov, iov_count, cksum_add(p, UDP_HEADER_BYTES, acc)))
        if sum == 0:
            sum = 0xFFFF                     # RFC 768: a computed zero is sent as all ones
    memcpy(p + 6, &sum, 2)
    return UDP_HEADER_BYTES


cdef uint32_t udp_emit(uint8_t *p, const flow_key *flow, const uint8_t *data, uint32_t n, bint partial) noexcept nogil:
    cdef iovec piece
    piece.iov_base = <void *>data
    piece.iov_len = n
    return udp_emit_iov(p, flow, &piece, 1, n, partial)


# ---- ICMP ----

cdef int icmp_parse(const ipv4_pkt *ip, icmp_pkt *out) noexcept nogil:
    cdef const uint8_t *p = ip.payload
    cdef uint32_t n = ip.payload_bytes
    if n < ICMP_HEADER_BYTES:
        return WIRE_SHORT
    if is_fragment(ip):
        return WIRE_LENGTH
    if cksum_fold(cksum_add(p, n, 0)) != 0xFFFF:
        return WIRE_CHECKSUM
    out.type = p[0]
    out.code = p[1]
    out.rest = load32(p + 4)
    out.payload = p + ICMP_HEADER_BYTES
    out.payload_bytes = n - ICMP_HEADER_BYTES
    return WIRE_OK


cdef uint32_t icmp_emit(uint8_t *p, uint8_t type, uint8_t code, uint32_t rest, const uint8_t *payload, uint32_t n) noexcept nogil:
    cdef uint64_t acc
    cdef uint16_t sum
    p[0] = type
    p[1] = code
    store16(p + 2, 0)
    store32(p + 4, rest)
    acc = cksum_add(p, ICMP_HEADER_BYTES, 0)
    if payload == p + ICMP_HEADER_BYTES:
        acc = cksum_add(payload, n, acc)
    else:
        acc = cksum_copy(p + ICMP_HEADER_BYTES, payload, n, acc)
    sum = <uint16_t>~cksum_fold(acc)
    memcpy(p + 2, &sum, 2)
    return ICMP_HEADER_BYTES + n


cdef int unreachable_error(uint8_t code, uint8_t *hard) noexcept nogil:
    """RFC 1122 4.2.3.9: codes 0, 1, 5 are soft, 2 to 4 hard; 4 is path MTU discovery's. The later codes (RFC 1122
    3.2.2.1, RFC 1812 5.2.7.1) are permanent but for the two that depend on the type of service, as in Linux."""
    hard[0] = code not in (0, 1, 4, 5, 11, 12)
    if code in (0, 6, 9, 11):
        return -e.ENETUNREACH
    if code == 2:
        return -e.ENOPROTOOPT
    if code == 3:
        return -e.ECONNREFUSED
    if code == CODE_FRAG_NEEDED:
        return -e.EMSGSIZE
    if code == 5:
        return -e.EOPNOTSUPP                 # source route failed
    if code == 7:
        return -e.EHOSTDOWN
    return -e.EHOSTUNREACH


cdef uint32_t plateau_below(uint32_t total_bytes) noexcept nogil:
    """RFC 1191 section 7: what a router that names no MTU may have meant."""
    if total_bytes > 32000:
        return 32000
    if total_bytes > 17914:
        return 17914
    if total_bytes > 8166:
        return 8166
    if total_bytes > 4352:
        return 4352
    if total_bytes > 2002:
        return 2002
    if total_bytes > 1492:
        return 1492
    if total_bytes > 1006:
        return 1006
    if total_bytes > 508:
        return 508
    if total_bytes > 296:
        return 296
    return MIN_MTU_BYTES


cdef int icmp_error_parse(const icmp_pkt *icmp, icmp_error *out) noexcept nogil:
    cdef const uint8_t *p = icmp.payload
    cdef uint32_t n = icmp.payload_bytes
    cdef uint32_t hdr, total
    # Source quench is dead (RFC 6633); redirects are routing's business.
    if icmp.type != ICMP_UNREACHABLE and icmp.type != ICMP_TIME_EXCEEDED and icmp.type != ICMP_PARAMETER:
        return WIRE_VERSION
    if icmp.type == ICMP_UNREACHABLE and icmp.code > 15:
        return WIRE_VERSION
    # The packet's own header and at least 8 bytes of its payload (RFC 792, RFC 1122 3.2.2). Its header checksum and
    # lengths are not judged: routers on the way may have changed them, and it is cut off anyway.
    if n < IPV4_HEADER_BYTES:
        return WIRE_SHORT
    if p[0] >> 4 != 4:
        return WIRE_VERSION
    hdr = (p[0] & 15) * 4
    total = load16(p + 2)
    if hdr < IPV4_HEADER_BYTES or total < hdr + 8:
        return WIRE_LENGTH
    if n < hdr + 8:
        return WIRE_SHORT
    if load16(p + 6) & IP_OFFSET_MASK:       # no ports in there
        return WIRE_LENGTH
    if p[9] != UL_IPPROTO_TCP and p[9] != UL_IPPROTO_UDP:
        return WIRE_VERSION
    memset(out, 0, sizeof(icmp_error))
    addr_from_ipv4(&out.flow.laddr, p + 12)
    addr_from_ipv4(&out.flow.raddr, p + 16)
    out.flow.proto = p[9]
    out.flow.lport = load16(p + hdr)
    out.flow.rport = load16(p + hdr + 2)
    if p[9] == UL_IPPROTO_TCP:
        out.tcp_seq = load32(p + hdr + 4)
    if icmp.type == ICMP_TIME_EXCEEDED:
        out.error = -e.EHOSTUNREACH          # soft: RFC 1122 4.2.3.9
    elif icmp.type == ICMP_PARAMETER:
        out.error = -e.EPROTO                # soft: RFC 1122 4.2.3.9
    else:
        out.error = unreachable_error(icmp.code, &out.hard)
        if icmp.code == CODE_FRAG_NEEDED:
            out.next_mtu_bytes = icmp.rest & 0xFFFF          # RFC 1191 section 4
            if out.next_mtu_bytes == 0:
                out.next_mtu_bytes = plateau_below(total)
            elif out.next_mtu_bytes < MIN_MTU_BYTES:
                out.next_mtu_bytes = MIN_MTU_BYTES
    return WIRE_OK


# ---- ARP ----

cdef int arp_parse(const uint8_t *p, uint32_t n, arp_pkt *out) noexcept nogil:
    if n < ARP_BYTES:
        return WIRE_SHORT
    if load32(p) != 0x00010800 or load16(p + 4) != 0x0604:       # Ethernet, IPv4, 6 and 4 bytes
        return WIRE_VERSION
    out.op = load16(p + 6)
    if out.op != 1 and out.op != 2:
        return WIRE_VERSION
    # A sender's hardware address that is a group's or nobody's would poison the table (RFC 1812 3.3.2).
    if p[8] & 1 or (load32(p + 8) == 0 and load16(p + 12) == 0):
        return WIRE_ADDRESS
    # Zero asks on behalf of nobody: a probe (RFC 5227 1.1). Nothing else odd can own a hardware address.
    if p[14] >= 224 or p[14] == 127 or (p[14] == 0 and load32(p + 14) != 0) or (load32(p + 14) == 0 and out.op != 1):
        return WIRE_ADDRESS
    memcpy(out.sha, p + 8, 6)
    memcpy(out.tha, p + 18, 6)
    addr_from_ipv4(&out.spa, p + 14)
    addr_from_ipv4(&out.tpa, p + 24)
    return WIRE_OK


cdef uint32_t arp_emit(uint8_t *p, const arp_pkt *arp) noexcept nogil:
    store32(p, 0x00010800)
    store16(p + 4, 0x0604)
    store16(p + 6, arp.op)
    memcpy(p + 8, arp.sha, 6)
    memcpy(p + 14, arp.spa.b + 12, 4)
    memcpy(p + 18, arp.tha, 6)
    memcpy(p + 24, arp.tpa.b + 12, 4)
    return ARP_BYTES


# ---- The Python face: whole frames as values, for tests, captures and demos ----

_REASONS = {
    WIRE_SHORT: "truncated",
    WIRE_VERSION: "not the protocol or version it is said to be",
    WIRE_LENGTH: "lengths contradict each other",
    WIRE_CHECKSUM: "wrong checksum",
    WIRE_OPTION: "malformed option list",
    WIRE_ADDRESS: "address that no such packet may have",
}


cdef str mac_text(const uint8_t *p):
    return (<bytes>(<const char *>p)[:6]).hex(":")


cdef str ip_text(const ul_addr *a):
    return f"{a.b[12]}.{a.b[13]}.{a.b[14]}.{a.b[15]}"


cdef bytes bytes_at(const uint8_t *p, uint32_t n):
    return (<const char *>p)[:n]


cdef object refused(str layer, int code):
    return ValueError(f"{layer}: {_REASONS[code]}")


cdef object tcp_value(const tcp_seg *s, uint16_t sport, uint16_t dport):
    cdef int i
    return Tcp(sport, dport, s.seq, s.ack, s.flags, s.wnd, s.mss or None, None if s.wscale == NO_WSCALE else s.wscale,
               (s.ts_val, s.ts_ecr) if s.has_ts else None, bool(s.sack_ok),
               tuple([(s.sack[2 * i], s.sack[2 * i + 1]) for i in range(s.sack_count)]))


cdef object icmp_value(const icmp_pkt *m):
    cdef icmp_error err
    error = None
    if icmp_error_parse(m, &err) == WIRE_OK:
        error = IcmpError(err.flow.proto, (ip_text(&err.flow.laddr), err.flow.lport), (ip_text(&err.flow.raddr), err.flow.rport),
                          -err.error, bool(err.hard), err.next_mtu_bytes, err.tcp_seq)
    return Icmp(m.type, m.code, m.rest, error)


cdef object frame_value(const uint8_t *p, size_t size, bint verify):
    cdef ipv4_pkt ip
    cdef arp_pkt arp
    cdef tcp_seg seg
    cdef udp_pkt udp
    cdef icmp_pkt icmp
    cdef uint16_t sport = 0, dport = 0
    cdef int code
    if size < ETH_HEADER_BYTES:
        raise refused("ethernet", WIRE_SHORT)
    cdef uint32_t n = <uint32_t>(size - ETH_HEADER_BYTES)
    eth = Ethernet(mac_text(p), mac_text(p + 6), load16(p + 12))
    p += ETH_HEADER_BYTES
    if eth.ethertype == ETHERTYPE_ARP:
        code = arp_parse(p, n, &arp)
        if code < 0:
            raise refused("arp", code)
        value = Arp(arp.op, mac_text(arp.sha), ip_text(&arp.spa), mac_text(arp.tha), ip_text(&arp.tpa))
        return Frame(eth, value, None, None, None, None, b"")
    if eth.ethertype != ETHERTYPE_IPV4:
        return Frame(eth, None, None, None, None, None, bytes_at(p, n))
    code = ipv4_parse(p, n, &ip)
    if code < 0:
        raise refused("ipv4", code)
    ip4 = Ipv4(ip_text(&ip.src), ip_text(&ip.dst), ip.proto, ip.ttl, ip.tos, ip.ident, ip.frag_off_bytes,
               bool(ip.more_fragments), bool(ip.dont_fragment), ip.hdr_bytes, ip.payload_bytes)
    if not is_fragment(&ip):
        if ip.proto == UL_IPPROTO_TCP:
            code = tcp_parse(&ip, verify, &seg, &sport, &dport)
            if code < 0:
                raise refused("tcp", code)
            return Frame(eth, None, ip4, tcp_value(&seg, sport, dport), None, None, bytes_at(seg.data, seg.len_bytes))
        if ip.proto == UL_IPPROTO_UDP:
            code = udp_parse(&ip, verify, &udp)
            if code < 0:
                raise refused("udp", code)
            return Frame(eth, None, ip4, None, Udp(udp.sport, udp.dport), None, bytes_at(udp.data, udp.len_bytes))
        if ip.proto == UL_IPPROTO_ICMP:
            code = icmp_parse(&ip, &icmp)
            if code < 0:
                raise refused("icmp", code)
            return Frame(eth, None, ip4, None, None, icmp_value(&icmp), bytes_at(icmp.payload, icmp.payload_bytes))
    return Frame(eth, None, ip4, None, None, None, bytes_at(ip.payload, ip.payload_bytes))


def parse_frame(data, verify: bool = True) -> Frame:
    """The layers of one Ethernet frame, from its first header byte; padding behind the IP packet is left out.

    ``verify=False`` does not check TCP's and UDP's checksums: for frames on which a link has still to complete them.
    Raises ValueError naming the layer and the reason when the stack would drop the frame. A fragment has no transport layer.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len > 0x7FFFFFFF:
            raise ValueError(f"a frame of {view.len} bytes is none: give one frame")
        return frame_value(<const uint8_t *>view.buf, <size_t>view.len, verify)
    finally:
        PyBuffer_Release(&view)
