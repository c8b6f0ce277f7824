"""Whole frames built from Python by the stack's own emit functions: for tests, fault tools and demos."""

import ipaddress

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from ulnet.kernelshim.link cimport iovec
from ulnet.stack.tcp cimport TCP_OUT_IOV, tcp_out
from ulnet.stack.types cimport UL_IPPROTO_ICMP, UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_from_ipv4, flow_key, ul_addr
from ulnet.stack.wire cimport (
    ETH_HEADER_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, IPV4_HEADER_BYTES,
    arp_emit, arp_pkt, eth_emit, icmp_emit, ipv4_emit, tcp_emit, udp_emit_iov,
)

cdef enum:
    IP_TOTAL_MAX = 65535

MAC_A: str = "02:00:00:00:00:0a"      # locally administered: what frames are from when nobody says otherwise
MAC_B: str = "02:00:00:00:00:0b"
FLAG_LETTERS: dict[str, int] = {"F": 0x01, "S": 0x02, "R": 0x04, "P": 0x08, ".": 0x10, "U": 0x20}


cdef int put_mac(str text, uint8_t *out) except -1:
    try:
        raw = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        raw = b""
    if len(raw) != 6:
        raise ValueError(f"{text!r} is no MAC address: write six hex pairs, as in {MAC_A}")
    memcpy(out, PyBytes_AS_STRING(raw), 6)
    return 0


cdef int put_ip(str text, ul_addr *out) except -1:
    cdef bytes raw = ipaddress.IPv4Address(text).packed
    addr_from_ipv4(out, <const uint8_t *>PyBytes_AS_STRING(raw))
    return 0


cdef bytes headers(uint32_t ip_bytes, str src, str dst, uint8_t proto, str eth_src, str eth_dst, dict ip):
    """A frame with Ethernet and IPv4 headers in place and room for ip_bytes of IP payload."""
    cdef ul_addr s, d
    cdef uint8_t mac_s[6]
    cdef uint8_t mac_d[6]
    cdef uint32_t total = IPV4_HEADER_BYTES + ip_bytes
    cdef bytes frame
    cdef uint8_t *p
    if total > IP_TOTAL_MAX:
        raise ValueError(f"an IPv4 packet of {total} bytes: at most {IP_TOTAL_MAX}")
    put_ip(src, &s)
    put_ip(dst, &d)
    put_mac(eth_src, mac_s)
    put_mac(eth_dst, mac_d)
    frame = PyBytes_FromStringAndSize(NULL, ETH_HEADER_BYTES + total)
    p = <uint8_t *>PyBytes_AS_STRING(frame)
    eth_emit(p, mac_d, mac_s, ETHERTYPE_IPV4)
    ipv4_emit(p + ETH_HEADER_BYTES, &s, &d, proto, total, ip.pop("ident", 0), ip.pop("flags_frag", 0x4000),
              ip.pop("ttl", 64), ip.pop("tos", 0))
    if ip:
        raise TypeError(f"unknown argument {next(iter(ip))!r}: IPv4 takes ident, flags_frag, ttl and tos")
    return frame


cdef int put_flow(str src, str dst, int sport, int dport, uint8_t proto, flow_key *out) except -1:
    memset(out, 0, sizeof(flow_key))
    put_ip(src, &out.laddr)
    put_ip(dst, &out.raddr)
    if not (0 <= sport <= 65535 and 0 <= dport <= 65535):
        raise ValueError(f"ports {sport} and {dport}: a port is 0 to 65535")
    out.lport = sport
    out.rport = dport
    out.proto = proto
    return 0


def build_arp(op: int, sender_mac: str, sender_ip: str, target_mac: str, target_ip: str, eth_dst: str = "ff:ff:ff:ff:ff:ff") -> bytes:
    """An ARP frame: ``op`` 1 asks, 2 answers (RFC 826)."""
    cdef arp_pkt arp
    cdef uint8_t buf[64]
    cdef uint8_t mac[6]
    cdef uint32_t n
    arp.op = op
    put_mac(sender_mac, arp.sha)
    put_mac(target_mac, arp.tha)
    put_ip(sender_ip, &arp.spa)
    put_ip(target_ip, &arp.tpa)
    put_mac(eth_dst, mac)
    n = eth_emit(buf, mac, arp.sha, ETHERTYPE_ARP)
    n += arp_emit(buf + n, &arp)
    return (<const char *>buf)[:n]


def build_ipv4(src: str, dst: str, proto: int, payload: bytes, *, eth_src: str = MAC_A, eth_dst: str = MAC_B, **ip) -> bytes:
    """An IPv4 frame with any payload; ``ident``, ``flags_frag`` (host order, default DF), ``ttl`` and ``tos`` by keyword."""
    frame = headers(len(payload), src, dst, proto, eth_src, eth_dst, ip)
    return frame[: ETH_HEADER_BYTES + IPV4_HEADER_BYTES] + payload


def build_udp(src: str, dst: str, sport: int, dport: int, payload=b"", *, partial: bool = False,
              eth_src: str = MAC_A, eth_dst: str = MAC_B, **ip) -> bytes:
    """A UDP frame. ``partial`` leaves the checksum to the link: only the pseudo-header's sum."""
    return transport(UL_IPPROTO_UDP, src, dst, sport, dport, payload, partial, eth_src, eth_dst, ip, None)


def build_tcp(src: str, dst: str, sport: int, dport: int, flags: int | str = ".", *, seq: int = 0, ack: int = 0,
              window: int = 65535, options: bytes = b"", payload=b"", partial: bool = False,
              eth_src: str = MAC_A, eth_dst: str = MAC_B, **ip) -> bytes:
    """A TCP frame. ``flags`` as bits or as tcpdump's letters; ``options`` as they stand on the wire, a multiple of 4 bytes.

    ``payload`` is bytes or a list of at most 16 pieces, summed piece by piece as the stack does it.
    """
    cdef bytes opts = bytes(options)
    if len(opts) > 40 or len(opts) % 4:
        raise ValueError(f"options of {len(opts)} bytes: at most 40 and a multiple of 4, pad with zeros")
    bits = sum(FLAG_LETTERS[c] for c in flags) if isinstance(flags, str) else flags
    return transport(UL_IPPROTO_TCP, src, dst, sport, dport, payload, partial, eth_src, eth_dst, ip,
                     (seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, window, bits, opts))


cdef bytes transport(uint8_t proto, str src, str dst, int sport, int dport, object payload, bint partial,
                     str eth_src, str eth_dst, dict ip, tuple tcp):
    cdef Py_buffer views[TCP_OUT_IOV]
    cdef tcp_out out
    cdef flow_key flow
    cdef int held = 0, i
    cdef uint32_t n, hdr
    cdef size_t total = 0
    cdef bytes frame
    cdef bytes opts
    cdef uint8_t *p
    pieces = payload if isinstance(payload, (list, tuple)) else [payload]
    if len(pieces) > TCP_OUT_IOV:
        raise ValueError(f"{len(pieces)} pieces: at most {TCP_OUT_IOV}, join some of them")
    memset(&out, 0, sizeof(out))
    try:
        for piece in pieces:
            PyObject_GetBuffer(piece, &views[held], PyBUF_SIMPLE)
            out.iov[held].iov_base = views[held].buf
            out.iov[held].iov_len = <size_t>views[held].len
            total += <size_t>views[held].len
            held += 1
        out.iov_count = held
        if total > IP_TOTAL_MAX:
            raise ValueError(f"a payload of {total} bytes does not fit an IPv4 packet of {IP_TOTAL_MAX}")
        n = <uint32_t>total
        put_flow(src, dst, sport, dport, proto, &flow)
        hdr = 8
        if tcp is not None:
            out.seq, out.ack, out.wnd, out.flags, opts = tcp
            out.opt_len_bytes = <uint8_t>len(opts)
            memcpy(out.opts, PyBytes_AS_STRING(opts), len(opts))
            out.len_bytes = n
            hdr = 20 + out.opt_len_bytes
        frame = headers(hdr + n, src, dst, proto, eth_src, eth_dst, ip)
        p = <uint8_t *>PyBytes_AS_STRING(frame) + ETH_HEADER_BYTES + IPV4_HEADER_BYTES
        if tcp is not None:
            p += tcp_emit(p, &flow, &out, partial)
        else:
            p += udp_emit_iov(p, &flow, out.iov, held, n, partial)
        for i in range(held):
            memcpy(p, out.iov[i].iov_base, out.iov[i].iov_len)
            p += out.iov[i].iov_len
        return frame
    finally:
        while held:
            held -= 1
            PyBuffer_Release(&views[held])


def build_icmp(src: str, dst: str, type: int, code: int, rest: int = 0, payload: bytes = b"", *,
               eth_src: str = MAC_A, eth_dst: str = MAC_B, **ip) -> bytes:
    """An ICMP frame; ``rest`` is bytes 4 to 7 (identifier and sequence number, or the next MTU)."""
    cdef bytes data = bytes(payload)
    cdef bytes frame = headers(8 + len(data), src, dst, UL_IPPROTO_ICMP, eth_src, eth_dst, ip)
    icmp_emit(<uint8_t *>PyBytes_AS_STRING(frame) + ETH_HEADER_BYTES + IPV4_HEADER_BYTES, type, code, rest,
              <const uint8_t *>PyBytes_AS_STRING(data), <uint32_t>len(data))
    return frame
