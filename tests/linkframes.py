"""Ethernet frames for the tests of links: built and checked byte by byte, with nothing of ours in it."""

from __future__ import annotations

import socket
import struct

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(saddr: str, daddr: str, proto: int, size: int) -> bytes:
    """The pseudo-header of RFC 9293 (3.1)."""
    return socket.inet_aton(saddr) + socket.inet_aton(daddr) + struct.pack("!HH", proto, size)


def frame(
    src_mac: bytes,
    dst_mac: bytes,
    *,
    saddr: str = "10.77.0.1",
    daddr: str = "10.77.0.2",
    proto: int = UDP,
    sport: int = 4000,
    dport: int = 9,
    ethertype: bytes = b"\x08\x00",
    first: int = 0x45,
    options: bytes = b"",
    fragment: int = 0,
    sequence: int = 1,
    tcp_flags: int = 0x10,
    payload: bytes = b"payload",
    partial: bool = False,
) -> bytes:
    """An Ethernet frame; ``partial`` leaves the pseudo-header sum in the transport checksum."""
    if proto == UDP:
        l4 = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
        at = 6
    else:
        l4 = struct.pack("!HHIIBBHHH", sport, dport, sequence, 1, 0x50, tcp_flags, 1000, 0, 0) + payload
        at = 16
    head = pseudo(saddr, daddr, proto, len(l4))
    value = ~checksum(head) & 0xFFFF if partial else checksum(head + l4)
    l4 = l4[:at] + struct.pack("!H", value) + l4[at + 2 :]
    length = (first & 15) * 4 + len(l4)
    ip = struct.pack(
        "!BBHHHBBH4s4s", first, 0, length, 1, fragment, 64, proto, 0, socket.inet_aton(saddr), socket.inet_aton(daddr)
    )
    ip += options
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return dst_mac + src_mac + ethertype + ip + l4


def is_sound(data: bytes) -> bool:
    """Whether an IPv4 frame's length and both its checksums are right."""
    ihl = (data[14] & 15) * 4
    total = int.from_bytes(data[16:18])
    ip, l4 = data[14 : 14 + ihl], data[14 + ihl : 14 + total]
    if len(data) < 14 + total or checksum(ip):
        return False
    saddr, daddr = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20])
    return checksum(pseudo(saddr, daddr, ip[9], len(l4)) + l4) == 0
