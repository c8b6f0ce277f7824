"""The programs that decide which packets a channel sees: fanout selectors and per-channel filters.

Order in the kernel: PACKET_FANOUT reassembles IPv4 fragments, runs the selector (which member gets the
packet), then that member's own filter (whether it gets it at all). Member 0 rejects everything, the next are
the server's, so that an index beyond the group, taken modulo its size, never reaches a wrong reader unseen.
A channel with rings is two members, of small and of large packets; one without is the same member for both.

The extended programs look flows up in maps that the server edits: an array by local port says whose every packet to
the port is, which is all there is to know of most ports, and a hash map has the flows with a remote end. The classic
programs, for processes without CAP_BPF, carry the flows in their code and are replaced whenever a flow changes.
"""

import socket
import struct
import sys
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import NamedTuple

from ulnet.kernelshim.bpf import (
    AD_IFINDEX,
    AD_PKTTYPE,
    AD_PROTOCOL,
    AD_VLAN_TAG_PRESENT,
    SKF_NET_OFF,
    ClassicProgram,
    ExtendedProgram,
    Map,
)

REJECT_INDEX = 0  # fanout index of the socket whose filter drops everything
SERVER_CHANNEL = 0  # channel id of the server

_ACCEPT = 0x7FFFFFFF  # a socket filter returns how many bytes to keep
_HOST, _BROADCAST = 0, 1  # linux/if_packet.h: PACKET_HOST, PACKET_BROADCAST
_ETH_P_IP, _ETH_P_ARP = 0x0800, 0x0806
_ICMP, _TCP, _UDP = 1, 6, 17
# A probe: over the loopback device, this ethertype, then an index (native u32) and a nonce of 8 bytes. The
# selector sends it to that index; the channel there leaves its 12 bytes in the places map. It tells the server
# where a channel stands in the group, which the kernel does not.
PROBE_ETHERTYPE = 0x88B5  # IEEE 802: local experimental
PROBE_BYTES = 12
_ICMP_ERRORS = (3, 11, 12)  # RFC 792: destination unreachable, time exceeded, parameter problem
_NOT_WHOLE = 0x3FFF  # IPv4: more fragments, or an offset

# struct __sk_buff (linux/bpf.h)
_SKB_LEN, _SKB_PKT_TYPE, _SKB_PROTOCOL, _SKB_VLAN_PRESENT, _SKB_IFINDEX = 0, 4, 16, 20, 40
_MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _SKB_LOAD_BYTES_RELATIVE, _HDR_START_NET = 1, 2, 68, 1

# Key of the flow map: remote address, remote port, local port (big-endian), protocol, 3 zero bytes. The local address
# is always ours. It is hashed for each packet, so it holds no more than is needed.
KEY_BYTES = 12
_KEY = struct.Struct("!4sHHB3x")
# Entry of the port array, u32: the channel that has what comes to the port from any remote, and what else there is to
# know of the port. Its index: local port, UDP's after TCP's.
PORT_BYTES = 4
PORTS = 2 << 16
_HAS_CHANNEL = 1 << 16
_HAS_FLOWS = 1 << 17  # some with a remote end: the flow map knows better
_CHANNEL = 0xFFFF


class Indices(NamedTuple):
    """Where in the fanout group a channel's sockets stand: of small packets, and of large ones."""

    small: int
    large: int

    def pack(self) -> bytes:
        """The value in the map of places, by channel id."""
        return _INDICES.pack(*self)


_INDICES = struct.Struct("=II")
INDICES_BYTES = _INDICES.size


class Flow(NamedTuple):
    """What a packet is recognised by. ``raddr`` None and ``rport`` 0: any remote."""

    proto: int
    laddr: IPv4Address
    lport: int
    raddr: IPv4Address | None
    rport: int


class Place(NamedTuple):
    """Where packets for us come from and go to."""

    ifindex: int
    loopback_ifindex: int
    address: IPv4Address


class FlowMaps(NamedTuple):
    """Where the extended programs look a flow up."""

    flows: Map
    ports: Map


def flow_key(flow: Flow) -> bytes:
    """The key in the flow map of a flow with a remote end."""
    assert flow.raddr is not None
    return _KEY.pack(flow.raddr.packed, flow.rport, flow.lport, flow.proto)


def port_key(proto: int, lport: int) -> bytes:
    """Where the port array has the port."""
    return struct.pack("=I", lport | (proto == _UDP) << 16)


def port_entry(channel_id: int | None, has_flows: bool) -> bytes:
    """``channel_id``: who has what comes to the port from any remote. ``has_flows``: some have a remote end."""
    owner = 0 if channel_id is None else channel_id | _HAS_CHANNEL
    return struct.pack("=I", owner | (_HAS_FLOWS if has_flows else 0))


# ---- extended ----

# Stack, from the frame pointer down.
_AT_KEY, _AT_RADDR, _AT_RPORT, _AT_LPORT, _AT_PROTO = -16, -16, -12, -10, -8
_AT_IP = -48  # 20 bytes, and 4 more, which are the ports where the header has no options
_AT_INNER = -80  # 8 bytes of ICMP, 20 of the IP header it quotes
_AT_INDEX = -88  # of whatever array


def _load_bytes(p: ExtendedProgram, to: int, count: int, short: str = "unknown") -> None:
    """Copy packet bytes from network header + r2 to the stack; jumps to ``short`` when there are too few."""
    p.alu_reg("mov", 1, 6)
    p.alu_reg("mov", 3, p.fp)
    p.alu("add", 3, to)
    p.alu("mov", 4, count)
    p.alu("mov", 5, _HDR_START_NET)
    p.call(_SKB_LOAD_BYTES_RELATIVE)
    p.jump_if("ne", 0, 0, short)


def _header_length(p: ExtendedProgram, dst: int, at: int) -> None:
    """dst = bytes of the IPv4 header whose first byte is on the stack; else ``unknown``."""
    p.load(1, dst, p.fp, at)
    p.alu_reg("mov", 1, dst)
    p.alu("rsh", 1, 4)
    p.jump_if("ne", 1, 4, "unknown")
    p.alu("and", dst, 15)
    p.alu("lsh", dst, 2)
    p.jump_if("lt", dst, 20, "unknown")


def _find_flow(p: ExtendedProgram, maps: FlowMaps, place: Place, elsewhere: str = "unknown") -> None:
    """Fall through with r1 = the channel id; jump to ``unknown`` when no flow matches.

    ``elsewhere``: where to go if the packet is not to our address. r6 must hold the context. Uses r7, r8.
    """
    p.alu("mov", 2, 0)
    _load_bytes(p, _AT_IP, 24)  # what has no 4 bytes behind its header has no ports either
    p.load(4, 1, p.fp, _AT_IP + 16)
    _jump_unless_address(p, 1, place, elsewhere)
    p.load(2, 1, p.fp, _AT_IP + 6)
    p.alu("and", 1, socket.htons(_NOT_WHOLE))
    p.jump_if("ne", 1, 0, "unknown")
    p.load(4, 1, p.fp, _AT_IP + 12)
    p.store(4, p.fp, _AT_RADDR, 1)
    p.load(1, 8, p.fp, _AT_IP + 9)
    p.jump_if("eq", 8, _ICMP, "icmp")
    p.jump_if("eq", 8, _TCP, "transport")
    p.jump_if("ne", 8, _UDP, "unknown")
    p.label("transport")
    p.load(4, 1, p.fp, _AT_IP + 20)
    p.store(4, p.fp, _AT_RPORT, 1)
    p.load(1, 1, p.fp, _AT_IP)
    p.jump_if("eq", 1, 0x45, "search")
    _header_length(p, 7, _AT_IP)
    p.alu_reg("mov", 2, 7)
    _load_bytes(p, _AT_RPORT, 4)
    p.jump("search")

    # RFC 792: an error quotes the header of the packet it is about, which we sent: source is local.
    p.label("icmp")
    _header_length(p, 7, _AT_IP)
    p.alu_reg("mov", 2, 7)
    _load_bytes(p, _AT_INNER, 28)
    p.load(1, 1, p.fp, _AT_INNER)
    for number in _ICMP_ERRORS[:-1]:
        p.jump_if("eq", 1, number, "quoted")
    p.jump_if("ne", 1, _ICMP_ERRORS[-1], "unknown")
    p.label("quoted")
    _header_length(p, 2, _AT_INNER + 8)
    p.alu_reg("add", 2, 7)
    p.alu("add", 2, 8)
    p.load(2, 1, p.fp, _AT_INNER + 8 + 6)
    p.alu("and", 1, socket.htons(0x1FFF))  # a later fragment has no ports
    p.jump_if("ne", 1, 0, "unknown")
    p.load(1, 8, p.fp, _AT_INNER + 8 + 9)
    p.jump_if("eq", 8, _TCP, "quoted transport")
    p.jump_if("ne", 8, _UDP, "unknown")
    p.label("quoted transport")
    p.load(4, 1, p.fp, _AT_INNER + 8 + 12)
    _jump_unless_address(p, 1, place, "unknown")
    p.load(4, 1, p.fp, _AT_INNER + 8 + 16)
    p.store(4, p.fp, _AT_RADDR, 1)
    _load_bytes(p, _AT_RPORT, 4)
    p.load(2, 1, p.fp, _AT_RPORT)
    p.load(2, 2, p.fp, _AT_LPORT)
    p.store(2, p.fp, _AT_RPORT, 2)
    p.store(2, p.fp, _AT_LPORT, 1)

    p.label("search")
    p.load(1, 1, p.fp, _AT_LPORT)  # big-endian
    p.load(1, 2, p.fp, _AT_LPORT + 1)
    p.alu("lsh", 1, 8)
    p.alu_reg("or", 1, 2)
    p.jump_if("ne", 8, _UDP, "port")
    p.alu("or", 1, 1 << 16)
    p.label("port")
    p.store(4, p.fp, _AT_INDEX, 1)
    _look_up(p, maps.ports, _AT_INDEX)
    p.jump_if("eq", 0, 0, "unknown")
    p.load(4, 7, 0, 0)
    p.jump_if("set", 7, _HAS_FLOWS, "flow")
    p.label("any remote")
    p.jump_if("set", 7, _HAS_CHANNEL, "channel")
    p.jump("unknown")
    p.label("flow")
    p.store_imm(4, p.fp, _AT_PROTO, 0)
    p.store(1, p.fp, _AT_PROTO, 8)
    _look_up(p, maps.flows, _AT_KEY)
    p.jump_if("eq", 0, 0, "any remote")
    p.load(4, 7, 0, 0)
    p.label("channel")
    p.alu("and", 7, _CHANNEL)
    p.alu_reg("mov", 1, 7)


def _look_up(p: ExtendedProgram, table: Map, key_at: int) -> None:
    p.load_map(1, table)
    p.alu_reg("mov", 2, p.fp)
    p.alu("add", 2, key_at)
    p.call(_MAP_LOOKUP_ELEM)


def _only_ours(p: ExtendedProgram, place: Place, broadcast: bool) -> None:
    """Jump to ``drop`` unless the packet came to this host on our device, or over the loopback device."""
    p.load(4, 1, 6, _SKB_VLAN_PRESENT)
    p.jump_if("ne", 1, 0, "drop")
    p.load(4, 1, 6, _SKB_IFINDEX)
    p.jump_if("eq", 1, place.loopback_ifindex, "ours")
    p.jump_if("ne", 1, place.ifindex, "drop")
    p.load(4, 1, 6, _SKB_PKT_TYPE)
    p.jump_if("gt", 1, _BROADCAST if broadcast else _HOST, "drop")
    p.label("ours")


def _only_to(p: ExtendedProgram, place: Place) -> None:
    """Jump to ``drop`` unless it is IPv4 to our address."""
    p.load(4, 1, 6, _SKB_PROTOCOL)
    p.jump_if("ne", 1, socket.htons(_ETH_P_IP), "drop")
    p.alu("mov", 2, 16)
    _load_bytes(p, _AT_IP, 4, "drop")
    p.load(4, 1, p.fp, _AT_IP)
    _jump_unless_address(p, 1, place)


def _jump_unless_address(p: ExtendedProgram, register: int, place: Place, to: str = "drop") -> None:
    # The jump's constant is sign-extended to 64 bits: compare halves, which are never negative.
    value = int.from_bytes(place.address.packed, sys.byteorder)
    p.alu_reg("mov", 3, register)
    p.alu("and", 3, 0xFFFF)
    p.jump_if("ne", 3, value & 0xFFFF, to)
    p.alu("rsh", register, 16)
    p.jump_if("ne", register, value >> 16, to)


def _load_probe(p: ExtendedProgram, place: Place) -> None:
    """Put a probe's bytes on the stack; jump to ``unknown`` when it is none."""
    p.load(4, 1, 6, _SKB_PROTOCOL)
    p.jump_if("ne", 1, socket.htons(PROBE_ETHERTYPE), "unknown")
    p.load(4, 1, 6, _SKB_IFINDEX)
    p.jump_if("ne", 1, place.loopback_ifindex, "unknown")
    p.alu("mov", 2, 0)
    _load_bytes(p, _AT_IP, PROBE_BYTES)


def extended_selector(place: Place, maps: FlowMaps, indices: Map, server: Indices, small_bytes: int) -> ExtendedProgram:
    """Fanout: the socket of the channel that owns the packet's flow; else the server's. ``indices``: by channel id.

    ``small_bytes``: packets of up to so many bytes, from the network header on, are small.
    """
    p = ExtendedProgram()
    p.alu_reg("mov", 6, 1)
    p.load(4, 1, 6, _SKB_IFINDEX)
    p.jump_if("eq", 1, place.loopback_ifindex, "device")
    p.jump_if("eq", 1, place.ifindex, "device")
    p.exit(REJECT_INDEX)
    p.label("device")
    p.load(4, 1, 6, _SKB_PROTOCOL)
    p.jump_if("ne", 1, socket.htons(_ETH_P_IP), "not IPv4")
    _find_flow(p, maps, place)
    p.store(4, p.fp, _AT_INDEX, 1)
    _look_up(p, indices, _AT_INDEX)
    p.jump_if("eq", 0, 0, "unknown")
    p.load(4, 1, 6, _SKB_LEN)
    p.jump_if("gt", 1, small_bytes, "large")
    p.load(4, 0, 0, 0)
    p.exit()
    p.label("large")
    p.load(4, 0, 0, 4)
    p.exit()
    p.label("not IPv4")
    _load_probe(p, place)
    p.load(4, 0, p.fp, _AT_IP)
    p.exit()
    p.label("unknown")
    p.load(4, 1, 6, _SKB_LEN)
    p.jump_if("gt", 1, small_bytes, "unknown and large")
    p.exit(server.small)
    p.label("unknown and large")
    p.exit(server.large)
    return p


def extended_channel_filter(place: Place, maps: FlowMaps, places: Map, channel_id: int, member: int) -> ExtendedProgram:
    """Whole packets of this channel's flows; nothing else. Answers probes as ``member``, then drops them."""
    p = ExtendedProgram()
    p.alu_reg("mov", 6, 1)
    _only_ours(p, place, broadcast=False)
    p.load(4, 1, 6, _SKB_PROTOCOL)
    p.jump_if("ne", 1, socket.htons(_ETH_P_IP), "not IPv4")
    _find_flow(p, maps, place, "drop")
    p.jump_if("ne", 1, channel_id, "drop")
    p.exit(_ACCEPT)
    p.label("not IPv4")
    _load_probe(p, place)
    p.store_imm(4, p.fp, _AT_INDEX, member)
    p.load_map(1, places)
    p.alu_reg("mov", 2, p.fp)
    p.alu("add", 2, _AT_INDEX)
    p.alu_reg("mov", 3, p.fp)
    p.alu("add", 3, _AT_IP)
    p.alu("mov", 4, 0)
    p.call(_MAP_UPDATE_ELEM)
    p.label("unknown")
    p.label("drop")
    p.exit(0)
    return p


def extended_server_filter(place: Place, maps: FlowMaps) -> ExtendedProgram:
    """ARP for our address, and IPv4 to it unless a channel owns the flow.

    A flow's packet that goes astray while channels come and go is dropped here: the server would reset it.
    """
    p = ExtendedProgram()
    p.alu_reg("mov", 6, 1)
    _only_ours(p, place, broadcast=True)
    p.load(4, 1, 6, _SKB_PROTOCOL)
    p.jump_if("ne", 1, socket.htons(_ETH_P_ARP), "not ARP")
    p.alu("mov", 2, 24)  # RFC 826: target protocol address
    _load_bytes(p, _AT_IP, 4, "drop")
    p.load(4, 1, p.fp, _AT_IP)
    _jump_unless_address(p, 1, place)
    p.exit(_ACCEPT)
    p.label("not ARP")
    p.load(4, 1, 6, _SKB_PKT_TYPE)  # RFC 1122 (3.3.6): no unicast address in a broadcast frame
    p.jump_if("ne", 1, _HOST, "drop")
    _only_to(p, place)
    _find_flow(p, maps, place)
    p.jump_if("ne", 1, SERVER_CHANNEL, "drop")
    p.label("unknown")
    p.exit(_ACCEPT)
    p.label("drop")
    p.exit(0)
    return p


# ---- classic ----

_M_PORT, _M_RADDR, _M_RPORT = 0, 1, 2  # scratch: protocol << 16 | local port, remote address, remote port
_M_SHIFT = 3  # 16 for a large packet, 0 for a small one: by how much a pair of indices is shifted


def classic_reject() -> bytes:
    """Nothing at all."""
    p = ClassicProgram()
    p.ret(0)
    return p.assemble()


def _classic_ours(p: ClassicProgram, place: Place, broadcast: bool) -> None:
    p.load(1, AD_VLAN_TAG_PRESENT)
    p.jump_if("eq", 1, yes="drop")
    p.load(4, AD_IFINDEX)
    p.jump_if("eq", place.loopback_ifindex, yes="ours")
    p.jump_if("eq", place.ifindex, no="drop")
    p.load(4, AD_PKTTYPE)
    p.jump_if("gt", _BROADCAST if broadcast else _HOST, yes="drop")
    p.label("ours")
    p.load(4, AD_PROTOCOL)


def classic_channel_filter(place: Place) -> bytes:
    """TCP, UDP and ICMP to our address. Which flows is decided by the selector alone."""
    p = ClassicProgram()
    _classic_ours(p, place, broadcast=False)
    p.jump_if("eq", _ETH_P_IP, no="drop")
    p.load(4, SKF_NET_OFF + 16)
    p.jump_if("eq", int(place.address), no="drop")
    p.load(1, SKF_NET_OFF + 9)
    for proto in (_ICMP, _TCP):
        p.jump_if("eq", proto, yes="accept")
    p.jump_if("eq", _UDP, no="drop")
    p.label("accept")
    p.ret(_ACCEPT)
    p.label("drop")
    p.ret(0)
    return p.assemble()


def classic_server_filter(place: Place) -> bytes:
    """ARP for our address, and IPv4 to it. Also the whole filter of an embedded stack."""
    p = ClassicProgram()
    _classic_ours(p, place, broadcast=True)
    p.jump_if("eq", _ETH_P_ARP, no="not ARP")
    p.load(4, SKF_NET_OFF + 24)
    p.jump_if("eq", int(place.address), yes="accept", no="drop")
    p.label("not ARP")
    p.jump_if("eq", _ETH_P_IP, no="drop")
    p.load(4, AD_PKTTYPE)  # RFC 1122 (3.3.6): no unicast address in a broadcast frame
    p.jump_if("eq", _HOST, no="drop")
    p.load(4, SKF_NET_OFF + 16)
    p.jump_if("eq", int(place.address), no="drop")
    p.label("accept")
    p.ret(_ACCEPT)
    p.label("drop")
    p.ret(0)
    return p.assemble()


def classic_by_size(small_bytes: int) -> bytes:
    """Fanout of two members: the first for packets of up to ``small_bytes``, from the network header on."""
    p = ClassicProgram()
    p.load_length()
    p.jump_if("gt", small_bytes, no="small")
    p.ret(1)
    p.label("small")
    p.ret(0)
    return p.assemble()


def classic_selector(place: Place, flows: Mapping[Flow, Indices], server: Indices, small_bytes: int) -> bytes:
    """Fanout: ``flows`` maps each flow to its fanout indices; binary search on protocol and local port.

    Raises OSError(ENOSPC) when the flows do not fit into 4096 instructions (some 400 flows).
    """
    p = ClassicProgram()
    p.load_length()
    p.jump_if("gt", small_bytes, yes="large", no="small")
    p.label("large")
    p.load_value(16)
    p.jump("shift")
    p.label("small")
    p.load_value(0)
    p.label("shift")
    p.store_scratch(_M_SHIFT)
    p.load(4, AD_IFINDEX)
    p.jump_if("eq", place.loopback_ifindex, yes="device")
    p.jump_if("eq", place.ifindex, yes="device")
    p.ret(REJECT_INDEX)
    p.label("device")
    p.load(4, AD_PROTOCOL)
    p.jump_if("eq", _ETH_P_IP, no="unknown")
    p.load(4, SKF_NET_OFF + 16)
    p.jump_if("eq", int(place.address), no="unknown")
    p.load(2, SKF_NET_OFF + 6)
    p.jump_if("set", _NOT_WHOLE, yes="unknown")
    p.load(1, SKF_NET_OFF)
    p.jump_if("ge", 0x45, no="unknown")  # version 4, at least 20 bytes
    p.jump_if("gt", 0x4F, yes="unknown")
    p.alu("and", 15)
    p.alu("lsh", 2)
    p.a_to_x()
    p.load(1, SKF_NET_OFF + 9)
    p.jump_if("eq", _ICMP, yes="icmp")
    p.jump_if("eq", _TCP, yes="transport")
    p.jump_if("eq", _UDP, no="unknown")
    p.label("transport")
    p.alu("lsh", 16)
    p.store_scratch(_M_PORT)
    p.load(4, SKF_NET_OFF + 12)
    p.store_scratch(_M_RADDR)
    p.load_at_x(2, SKF_NET_OFF)
    p.store_scratch(_M_RPORT)
    p.load_at_x(2, SKF_NET_OFF + 2)
    p.jump("search")
    p.label("unknown")
    p.scratch_to_x(_M_SHIFT)
    _choose(p, server)

    p.label("icmp")
    p.load_at_x(1, SKF_NET_OFF)
    for number in _ICMP_ERRORS[:-1]:
        p.jump_if("eq", number, yes="quoted")
    p.jump_if("eq", _ICMP_ERRORS[-1], no="foreign")
    p.label("quoted")
    p.load_at_x(4, SKF_NET_OFF + 8 + 12)
    p.jump_if("eq", int(place.address), no="foreign")
    p.load_at_x(2, SKF_NET_OFF + 8 + 6)
    p.jump_if("set", 0x1FFF, yes="foreign")
    p.load_at_x(4, SKF_NET_OFF + 8 + 16)
    p.store_scratch(_M_RADDR)
    p.load_at_x(1, SKF_NET_OFF + 8 + 9)
    p.jump_if("eq", _TCP, yes="quoted transport")
    p.jump_if("eq", _UDP, no="foreign")
    p.label("quoted transport")
    p.alu("lsh", 16)
    p.store_scratch(_M_PORT)
    p.load_at_x(1, SKF_NET_OFF + 8)
    p.jump_if("ge", 0x45, no="foreign")
    p.jump_if("gt", 0x4F, yes="foreign")
    p.alu("and", 15)
    p.alu("lsh", 2)
    p.alu_x("add")
    p.a_to_x()
    p.load_at_x(2, SKF_NET_OFF + 8 + 2)
    p.store_scratch(_M_RPORT)
    p.load_at_x(2, SKF_NET_OFF + 8)
    p.jump("search")
    p.label("foreign")
    # The kernel's checker believes that what follows a return is reached from it, with these cells unset.
    for cell in (_M_PORT, _M_RADDR, _M_RPORT):
        p.store_scratch(cell)
    p.scratch_to_x(_M_SHIFT)
    _choose(p, server)

    p.label("search")
    p.scratch_to_x(_M_PORT)
    p.alu_x("or")
    p.scratch_to_x(_M_SHIFT)
    ports: dict[int, list[tuple[Flow, Indices]]] = {}
    for flow, indices in flows.items():
        ports.setdefault(flow.proto << 16 | flow.lport, []).append((flow, indices))
    _search(p, sorted(ports.items(), key=lambda item: item[0]), server)
    p.label("chosen")
    p.alu_x("rsh")
    p.alu("and", 0xFFFF)
    p.ret_a()
    return p.assemble()


def _choose(p: ClassicProgram, indices: Indices) -> None:
    """Return one of the two, by the shift in X."""
    p.load_value(indices.large << 16 | indices.small)
    p.jump("chosen")


_Port = tuple[int, list[tuple[Flow, Indices]]]


def _is_near(flows: int, groups: int) -> bool:
    """Whether the code for so many flows in so many groups can be jumped over by a conditional jump."""
    return 9 * flows + 7 * groups < 250


def _search(p: ClassicProgram, ports: list[_Port], server: Indices) -> None:
    """A holds protocol << 16 | local port, X the shift: branch to one port's flows."""
    if not ports:
        _choose(p, server)
    elif len(ports) == 1:
        _port_flows(p, *ports[0], server)
    else:
        middle = len(ports) // 2
        port, lower = ports[middle][0], ports[:middle]
        if _is_near(sum(len(flows) for _, flows in lower), middle):
            p.jump_if("ge", port, yes=f"from {port}")
        else:
            p.jump_if("ge", port, no=f"below {port}")
            p.jump(f"from {port}")
            p.label(f"below {port}")
        _search(p, lower, server)
        p.label(f"from {port}")
        _search(p, ports[middle:], server)


def _port_flows(p: ClassicProgram, port: int, flows: list[tuple[Flow, Indices]], server: Indices) -> None:
    """Choose the flow with the packet's remote; else the one for any remote."""
    hosts: dict[int, list[tuple[int, Indices]]] = {}
    anyone = server
    for flow, indices in flows:
        if flow.raddr is None:
            anyone = indices
        else:
            hosts.setdefault(int(flow.raddr), []).append((flow.rport, indices))
    if anyone == server and _is_near(len(flows), len(hosts)):
        p.jump_if("eq", port, no=f"not {port}")
    else:
        p.jump_if("eq", port, yes=f"is {port}")
        _choose(p, server)
        p.label(f"is {port}")
    if hosts:
        p.load_scratch(_M_RADDR)
    for host, remotes in sorted(hosts.items()):
        elsewhere = f"{port} not {host}"
        if _is_near(len(remotes), 1):
            p.jump_if("eq", host, no=elsewhere)
        else:
            p.jump_if("eq", host, yes=f"{port} at {host}")
            p.jump(elsewhere)
            p.label(f"{port} at {host}")
        p.load_scratch(_M_RPORT)
        for rport, indices in sorted(remotes):
            p.jump_if("eq", rport, no=f"{port} not {host} {rport}")
            _choose(p, indices)
            p.label(f"{port} not {host} {rport}")
        if len(hosts) > 1:
            _choose(p, anyone)
        p.label(elsewhere)
    p.label(f"not {port}")
    _choose(p, anyone)
