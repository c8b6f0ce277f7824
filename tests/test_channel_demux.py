"""Which packets reach which channel: flows, filters, and channels that come and go."""

import functools
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from channel_hosts import (
    OTHER,
    OURS,
    PEER,
    Wire,
    drain,
    ethernet,
    ipv4,
    kinds,
    payload,
    ports_of,
    total,
    udp,
    wire_or_skip,
)

from ulnet.kernelshim import bpf, filters
from ulnet.kernelshim.channel import (
    attach_extended,
    open_embedded,
    packet_socket,
)
from ulnet.kernelshim.demux import Demux
from ulnet.kernelshim.marks import MARK_MASK, MARK_TAG
from ulnet.kernelshim.packet import PacketLink

UDP, TCP = socket.IPPROTO_UDP, socket.IPPROTO_TCP
SLOTS = 8


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    made = wire_or_skip()
    with made.ours.inside():
        yield made
    made.close()


@pytest.fixture(params=kinds())
def demux(wire: Wire, request: pytest.FixtureRequest) -> Iterator[Demux]:
    with Demux("ve0", OURS, ebpf=request.param, server_slots=SLOTS) as made:
        yield made


@pytest.fixture
def server(demux: Demux) -> Iterator[PacketLink]:
    link = demux.open_server_channel()
    yield link
    link.close()


class Channel:
    def __init__(self, demux: Demux, interface: str = "ipf") -> None:
        self.grant = demux.open_channel(interface, slots=SLOTS)
        self.id = self.grant.channel_id
        self.link = self.grant.open()

    def ports(self, want: int = 0) -> list[int]:
        return [ports_of(frame)[1] for frame in drain(self.link, want)]


def send_both(near: socket.socket, port: int) -> None:
    """A small packet and a large one, which go to different sockets of a channel."""
    near.sendto(b"x", (str(OURS), port))
    near.sendto(bytes(3000), (str(OURS), port))


def raw_sender(wire: Wire) -> socket.socket:
    """A packet socket on the peer's side, to send any frame."""
    with wire.peer.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind(("ve1", 0))
    return sock


def test_only_the_owner_sees_its_flow(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one, two = Channel(demux), Channel(demux)
    with wire.peer.udp(port=777) as near, wire.peer.udp(OTHER, 777) as far:
        demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
        demux.add_flow(UDP, OURS, 5002, PEER, 777, two.id)
        for port in (5001, 5002, 5003):
            near.sendto(b"near", (str(OURS), port))
            far.sendto(b"far", (str(OURS), port))
        assert [payload(f) for f in drain(one.link, 2)] == [b"near", b"far"]
        assert [payload(f) for f in drain(two.link, 1)] == [b"near"]
        assert [(ports_of(f)[1], payload(f)) for f in drain(server, 3)] == [
            (5002, b"far"),
            (5003, b"near"),
            (5003, b"far"),
        ]
        assert not drain(one.link) + drain(two.link) + drain(server)


def test_a_connected_flow_goes_before_a_wildcard(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one, two = Channel(demux), Channel(demux)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    demux.add_flow(UDP, OURS, 5001, PEER, 777, two.id)
    demux.add_flow(UDP, OURS, 5001, PEER, 779, 0)
    for port in (777, 778, 779):
        with wire.peer.udp(port=port) as near:
            near.sendto(b"x", (str(OURS), 5001))
    assert [ports_of(f)[0] for f in drain(two.link, 1)] == [777]
    assert [ports_of(f)[0] for f in drain(one.link, 1)] == [778]
    assert [ports_of(f)[0] for f in drain(server, 1)] == [779]


def test_flows_come_and_go_beside_a_wildcard(wire: Wire, demux: Demux, server: PacketLink) -> None:
    """Whoever of a port's flows is forgotten, the others lead where they led."""
    first, second, any_remote = Channel(demux), Channel(demux), Channel(demux)
    with wire.peer.udp() as one, wire.peer.udp() as two:
        ports = one.getsockname()[1], two.getsockname()[1]

        def seen() -> list[list[int]]:
            for near in (one, two):
                near.sendto(b"x", (str(OURS), 5001))
            links = first.link, second.link, any_remote.link, server
            return [[ports.index(ports_of(f)[0]) for f in drain(link)] for link in links]

        demux.add_flow(UDP, OURS, 5001, PEER, ports[0], first.id)
        assert seen() == [[0], [], [], [1]]
        demux.add_flow(UDP, OURS, 5001, None, 0, any_remote.id)
        assert seen() == [[0], [], [1], []]
        demux.add_flow(UDP, OURS, 5001, PEER, ports[1], second.id)
        assert seen() == [[0], [1], [], []]
        demux.remove_flow(UDP, OURS, 5001, PEER, ports[0])
        assert seen() == [[], [1], [0], []]
        demux.remove_flow(UDP, OURS, 5001, None, 0)
        assert seen() == [[], [1], [], [0]]
        demux.move_flow(UDP, OURS, 5001, PEER, ports[1], first.id)
        assert seen() == [[1], [], [], [0]]
        demux.remove_flow(UDP, OURS, 5001, PEER, ports[1])
        assert seen() == [[], [], [], [0, 1]]


def test_tcp_and_udp_ports_are_apart(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one = Channel(demux)
    demux.add_flow(TCP, OURS, 5001, PEER, 777, one.id)
    with wire.peer.udp(port=777) as near:
        near.sendto(b"x", (str(OURS), 5001))
    with wire.peer.inside():
        knocking = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with knocking:
        knocking.setblocking(False)
        knocking.bind((str(PEER), 777))
        knocking.connect_ex((str(OURS), 5001))
        (syn,) = drain(one.link, 1)
    assert syn.data[23] == TCP
    assert [f.data[23] for f in drain(server, 1)] == [UDP]


def test_moving_and_removing_a_flow(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one, two = Channel(demux), Channel(demux)
    with wire.peer.udp(port=777) as near:
        demux.add_flow(UDP, OURS, 5001, PEER, 777, one.id)
        near.sendto(b"1", (str(OURS), 5001))
        demux.move_flow(UDP, OURS, 5001, PEER, 777, two.id)
        near.sendto(b"2", (str(OURS), 5001))
        demux.remove_flow(UDP, OURS, 5001, PEER, 777)
        near.sendto(b"3", (str(OURS), 5001))
    assert [payload(f)[:1] for link in (one.link, two.link, server) for f in drain(link, 1)] == [b"1", b"2", b"3"]
    assert not demux.flows()


def test_what_is_not_ours_is_dropped(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one = Channel(demux)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    good = udp((PEER, 777), (OURS, 5001), b"good")
    alien_address = udp((PEER, 777), (IPv4Address("10.9.0.8"), 5001), b"alien")
    to, source = wire.mac, wire.peer_mac
    with raw_sender(wire) as sender:
        for frame in (
            ethernet(to, source) + alien_address,
            ethernet(bytes.fromhex("020000000001"), source) + good,  # another host's MAC
            ethernet(b"\xff" * 6, source) + good,  # broadcast: no unicast address belongs in it
            ethernet(to, source, 0x86DD) + good,
            ethernet(to, source, 0x88B5) + good,
            ethernet(to, source, 0x8100) + b"\0\5\x08\0" + good,  # tagged: another network
            ethernet(to, source) + good[:16],
        ):
            sender.send(frame)
        sender.send(ethernet(to, source) + good)
    assert [payload(f)[:4] for f in drain(one.link, 1)] == [b"good"]
    assert not drain(one.link)
    assert not drain(server)


def test_garbage_headers_do_not_reach_a_channel(wire: Wire, demux: Demux) -> None:
    one = Channel(demux)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    good = udp((PEER, 777), (OURS, 5001), b"good")
    with raw_sender(wire) as sender:
        for packet in (b"\x65" + good[1:], b"\x44" + good[1:], good[:20], good[:22], b"\x4f" + good[1:24]):
            sender.send(ethernet(wire.mac, wire.peer_mac) + packet)
    assert not drain(one.link)


def test_ip_options_move_the_ports(wire: Wire, demux: Demux) -> None:
    one = Channel(demux)
    demux.add_flow(UDP, OURS, 5001, PEER, 777, one.id)
    plain = udp((PEER, 777), (OURS, 5001), b"good")
    head = b"\x47" + plain[1:10] + b"\0\0" + plain[12:20] + b"\1" * 8
    head = head[:2] + struct.pack("!H", len(plain) + 8) + head[4:]
    head = head[:10] + struct.pack("!H", 0xFFFF ^ total(head)) + head[12:]
    with raw_sender(wire) as sender:
        sender.send(ethernet(wire.mac, wire.peer_mac) + head + plain[20:])
    (frame,) = drain(one.link, 1)
    assert frame.data.endswith(b"good")


def test_another_device_is_dropped(wire: Wire, demux: Demux, server: PacketLink) -> None:
    """The group hears every device of the namespace; only ours and the loopback one count."""
    from pyroute2 import IPRoute

    one = Channel(demux)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    with IPRoute() as route:
        route.link("add", ifname="vx0", kind="veth", peer={"ifname": "vx1", "net_ns_fd": wire.peer.fd})
        index = route.link_lookup(ifname="vx0")[0]
        mac = bytes.fromhex(route.link("get", index=index)[0].get("address").replace(":", ""))
        route.link("set", index=index, state="up")
        try:
            with wire.peer.inside(), IPRoute() as there:
                there.link("set", index=there.link_lookup(ifname="vx1")[0], state="up")
                sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                sender.bind(("vx1", 0))
            with sender:
                for port in (5001, 5002):
                    sender.send(ethernet(mac, wire.peer_mac) + udp((PEER, 777), (OURS, port), b"good"))
            assert not drain(one.link) + drain(server)
        finally:
            route.link("del", index=index)


def test_icmp_errors_reach_the_channel_concerned(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one = Channel(demux)
    demux.add_flow(UDP, OURS, 5001, PEER, 777, one.id)
    ours = udp((OURS, 5001), (PEER, 777), b"undeliverable")
    foreign = udp((OURS, 5002), (PEER, 777), b"undeliverable")

    def error(kind: int, quoted: bytes) -> bytes:
        body = struct.pack("!BBHI", kind, 3, 0, 0) + quoted[:28]
        body = body[:2] + struct.pack("!H", 0xFFFF ^ total(body)) + body[4:]
        return ethernet(wire.mac, wire.peer_mac) + ipv4(1, PEER, OURS, len(body)) + body

    with raw_sender(wire) as sender:
        for kind in (3, 11, 12):
            sender.send(error(kind, ours))
        sender.send(error(3, foreign))
        sender.send(error(8, ours))  # an echo request is the server's
        sender.send(error(3, udp((PEER, 5001), (PEER, 777), b"not from us")))
        sender.send(error(3, ours[:6] + b"\0\x10" + ours[8:]))  # quotes a later fragment: no ports in it
    assert [f.data[34] for f in drain(one.link, 3)] == [3, 11, 12]
    assert not drain(one.link)
    assert [f.data[34] for f in drain(server, 4)] == [3, 8, 3, 3]


def test_arp_is_the_servers(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one = Channel(demux)
    ask = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + wire.peer_mac + PEER.packed + b"\0" * 6
    with raw_sender(wire) as sender:
        for target in (OURS, IPv4Address("10.9.0.77")):
            sender.send(ethernet(b"\xff" * 6, wire.peer_mac, 0x0806) + ask + target.packed)
    assert [f.data[38:42] for f in drain(server, 1)] == [OURS.packed]
    assert not drain(one.link) + drain(server)


def test_the_filters_hold_by_themselves(wire: Wire) -> None:
    """Should the selector ever send a packet to the wrong member, that member's own filter drops it."""
    if not bpf.available():
        pytest.skip("eBPF needs CAP_BPF")
    place = filters.Place(wire.ve0, 1, OURS)
    flows, places = bpf.Hash(filters.KEY_BYTES, 4, 8), bpf.Array(filters.PROBE_BYTES, 8)
    maps = filters.FlowMaps(flows, bpf.Array(filters.PORT_BYTES, filters.PORTS))
    for port, owner in ((5001, 1), (5002, 2), (5003, filters.SERVER_CHANNEL)):
        maps.ports.update(filters.port_key(UDP, port), filters.port_entry(owner, False))
    programs = [filters.extended_channel_filter(place, maps, places, channel, 2 * channel) for channel in (1, 2)]
    programs.append(filters.extended_server_filter(place, maps))
    links = []
    for program in programs:
        sock = packet_socket(functools.partial(attach_extended, program=program))
        links.append(
            PacketLink([sock.detach()], ifindex=wire.ve0, loopback_ifindex=1, mac=wire.mac, mtu=1500, interface="ipc")
        )
    with wire.peer.udp() as near:
        for port in (5001, 5002, 5003, 5004):
            near.sendto(b"x", (str(OURS), port))
    assert [[ports_of(f)[1] for f in drain(link)] for link in links] == [[5001], [5002], [5003, 5004]]
    for made in (*links, *maps, places):
        made.close()


@pytest.mark.parametrize("interface", ["ipf", "shm", "ipc"])
def test_fragments_arrive_as_one_datagram(wire: Wire, demux: Demux, interface: str) -> None:
    one = Channel(demux, interface)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    data = os.urandom(20_000)
    with wire.peer.udp() as near:
        near.sendto(data, (str(OURS), 5001))
    (frame,) = drain(one.link, 1)
    assert payload(frame) == data


def test_large_and_small_packets_of_a_flow_keep_their_order(wire: Wire, demux: Demux, server: PacketLink) -> None:
    one, two = Channel(demux), Channel(demux, "ipc")  # a channel without rings has one socket for both
    for port, channel in ((5001, one), (5002, two)):
        demux.add_flow(UDP, OURS, port, None, 0, channel.id)
    sizes = [(4, 3000, 8, 12, 5000)[at % 5] for at in range(SLOTS)]
    with wire.peer.udp() as near:
        for port, link in ((5001, one.link), (5002, two.link), (5003, server)):
            for size in sizes:
                near.sendto(bytes(size), (str(OURS), port))
            assert [len(payload(f)) for f in drain(link, SLOTS)] == sizes
    assert not any(drain(link) for link in (one.link, two.link, server))


def test_closing_the_middle_channel_keeps_routing_right(wire: Wire, demux: Demux, server: PacketLink) -> None:
    channels = {port: Channel(demux) for port in range(5001, 5006)}
    for port, channel in channels.items():
        demux.add_flow(UDP, OURS, port, None, 0, channel.id)
    with wire.peer.udp() as near:
        for leaver in (5002, 5005, 5001):
            gone = channels.pop(leaver)
            gone.link.close()
            assert demux.close_channel(gone.id)
            for port in range(5001, 5006):
                send_both(near, port)
            for port, channel in channels.items():
                assert channel.ports(2) == [port] * 2
            lost = 2 * (5 - len(channels))
            assert len(drain(server, lost)) == lost
        late = Channel(demux)
        demux.add_flow(UDP, OURS, 5001, None, 0, late.id)
        send_both(near, 5001)
        assert late.ports(2) == [5001] * 2
    assert not any(drain(c.link) for c in channels.values())


def test_a_kept_descriptor_gets_nothing_after_the_close(wire: Wire, demux: Demux, server: PacketLink) -> None:
    stays, keeps, last = Channel(demux), Channel(demux), Channel(demux)
    for port, channel in ((5001, stays), (5002, keeps), (5003, last)):
        demux.add_flow(UDP, OURS, port, None, 0, channel.id)
    assert not demux.close_channel(keeps.id)
    assert demux.sweep() == 1
    assert Channel(demux).id != keeps.id  # the descriptor still carries its mark
    with wire.peer.udp() as near:
        for port in (5001, 5002, 5003):
            send_both(near, port)
        assert stays.ports(2) == [5001] * 2
        assert last.ports(2) == [5003] * 2
        assert [ports_of(f)[1] for f in drain(server, 2)] == [5002] * 2
        assert not drain(keeps.link)
        keeps.link.close()
        assert demux.sweep() == 0
        assert keeps.id not in demux.channels()
        for port in (5001, 5003):
            send_both(near, port)
        assert stays.ports(2) == [5001] * 2
        assert last.ports(2) == [5003] * 2


@pytest.mark.parametrize("backwards", [False, True])
def test_descriptors_that_vanish_unseen_leave_routing_right(
    wire: Wire, demux: Demux, server: PacketLink, backwards: bool
) -> None:
    """Two kept descriptors go at once: where the kernel put the others depends on which went first."""
    if not demux.ebpf:
        pytest.skip("only eBPF can ask the channels where they stand")
    channels = [Channel(demux) for _ in range(5)]
    for at, channel in enumerate(channels):
        demux.add_flow(UDP, OURS, 5001 + at, None, 0, channel.id)
    kept = channels[:2]
    assert not any(demux.close_channel(channel.id) for channel in kept)
    assert demux.sweep() == 2
    for channel in reversed(kept) if backwards else kept:
        channel.link.close()
    assert demux.sweep() == 0
    with wire.peer.udp() as near:
        for at, channel in enumerate(channels[2:], 2):
            send_both(near, 5001 + at)
            assert channel.ports(2) == [5001 + at] * 2
    assert not drain(server)


def test_a_link_flap_changes_nothing(wire: Wire, demux: Demux) -> None:
    channels = {port: Channel(demux) for port in (5001, 5002, 5003)}
    for port, channel in channels.items():
        demux.add_flow(UDP, OURS, port, None, 0, channel.id)
    wire.set_ours("down")
    wire.set_ours("up")
    for channel in channels.values():
        drain(channel.link)
    with wire.peer.udp() as near:
        for port in channels:
            send_both(near, port)
    assert {port: channel.ports(2) for port, channel in channels.items()} == {p: [p] * 2 for p in channels}


def test_many_flows_and_channels(wire: Wire, demux: Demux, server: PacketLink) -> None:
    """Far jumps in the classic program; every flow still finds its channel."""
    channels = [Channel(demux) for _ in range(4)]
    per_channel = 400 if demux.ebpf else 20
    routes = {}
    for number in range(per_channel * len(channels)):
        channel = channels[number % len(channels)]
        wild = number % 3 == 0
        where = (UDP, OURS, 6000 + number // 2, None if wild else PEER, 0 if wild else 700 + number % 2)
        demux.add_flow(*where, channel.id)
        routes[where] = channel
    assert len(demux.flows()) == len(routes)
    for (_, _, lport, raddr, rport), channel in list(routes.items())[:: len(routes) // 40]:
        with wire.peer.udp(port=rport if raddr else 699) as near:
            near.sendto(b"x", (str(OURS), lport))
            assert channel.ports(1) == [lport]
    assert not drain(server)


def test_the_application_cannot_widen_its_channel(wire: Wire, demux: Demux) -> None:
    one, two = Channel(demux), Channel(demux)
    demux.add_flow(UDP, OURS, 5001, None, 0, one.id)
    demux.add_flow(UDP, OURS, 5002, None, 0, two.id)
    held = socket.socket(fileno=os.dup(one.link.fileno()))
    with held:
        assert held.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & MARK_MASK == MARK_TAG
        anything = struct.pack("HHI", 0x06, 0, 0xFFFF)
        argument, memory = bpf.attachable(anything)
        for level, option, value in (
            (socket.SOL_SOCKET, 26, argument),  # SO_ATTACH_FILTER
            (socket.SOL_SOCKET, 27, 0),  # SO_DETACH_FILTER
            (socket.SOL_SOCKET, 44, 0),  # SO_LOCK_FILTER
            (263, 22, argument),  # PACKET_FANOUT_DATA
            (263, 18, 0),  # PACKET_FANOUT
            (263, 5, struct.pack("4I", 0, 0, 0, 0)),  # PACKET_RX_RING: would leave and join, shifting the others
        ):
            one_link_closed = option == 5
            if one_link_closed:
                one.link.close()
            with pytest.raises(OSError):
                held.setsockopt(level, option, value)
        del memory
        with pytest.raises(OSError):
            held.bind(("ve0", 0x0003))
        with wire.peer.udp() as near:
            near.sendto(b"x", (str(OURS), 5002))
        assert two.ports(1) == [5002]


def test_an_embedded_stack_gets_everything_to_its_address(wire: Wire) -> None:
    for interface in ("ipf", "ipc"):
        link = open_embedded("ve0", OURS, packet_interface=interface, slots=SLOTS)
        data = os.urandom(9000)
        with wire.peer.udp() as near:
            near.sendto(b"x", (str(OURS), 1))
            near.sendto(data, (str(OURS), 2))
            near.sendto(b"x", (str(OURS), 3))
        frames = drain(link, 3)
        assert [ports_of(f)[1] for f in frames] == [1, 2, 3]
        assert payload(frames[1]) == data
        link.close()


def test_mistakes_get_one_clear_line(wire: Wire, demux: Demux) -> None:
    with pytest.raises(OSError, match="no network interface 'nosuch0'"):
        Demux("nosuch0", OURS)
    with pytest.raises(ValueError, match="there is no channel 99"):
        demux.close_channel(99)
    with pytest.raises(ValueError, match="there is no channel 99"):
        demux.add_flow(UDP, OURS, 5001, None, 0, 99)
    with pytest.raises(ValueError, match="serves 10.9.0.9"):
        demux.add_flow(UDP, PEER, 5001, None, 0, 0)
    with pytest.raises(ValueError, match="protocol 1"):
        demux.add_flow(1, OURS, 5001, None, 0, 0)
    with pytest.raises(ValueError, match="local port 0"):
        demux.add_flow(UDP, OURS, 0, None, 0, 0)
    with pytest.raises(ValueError, match="give both"):
        demux.add_flow(UDP, OURS, 5001, PEER, 0, 0)
    with pytest.raises(ValueError, match="'udp'"):
        demux.open_channel("udp")
    demux.add_flow(UDP, OURS, 5001, None, 0, 0)
    with pytest.raises(OSError, match="already"):
        demux.add_flow(UDP, OURS, 5001, None, 0, 0)


def test_too_many_flows_without_ebpf_are_refused_and_harmless(wire: Wire) -> None:
    place = filters.Place(2, 1, OURS)
    server = filters.Indices(1, 2)
    flows = {filters.Flow(TCP, OURS, 1000 + n, PEER, 80): filters.Indices(3, 4) for n in range(400)}
    assert filters.classic_selector(place, flows, server, 1900)
    flows |= {filters.Flow(TCP, OURS, 9000 + n, PEER, 80): filters.Indices(3, 4) for n in range(450)}
    with pytest.raises(OSError, match="4096"):
        filters.classic_selector(place, flows, server, 1900)


def test_nothing_is_left_open(wire: Wire, demux: Demux) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        channel = Channel(demux)
        demux.add_flow(UDP, OURS, 5001, None, 0, channel.id)
        channel.link.close()
        assert demux.close_channel(channel.id)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not demux.flows() and not demux.channels()
