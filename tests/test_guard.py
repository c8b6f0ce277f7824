"""The outgoing guard: what a marked packet socket may send, and what the kernel's own stack gets to see."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import pytest
from linkframes import TCP, UDP, frame

from ulnet.kernelshim.guard import Guard
from ulnet.kernelshim.marks import MARK_MASK, MARK_TAG, channel_mark
from ulnet.kernelshim.testbed import Host, Testbed, can_testbed

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

OURS = "10.77.0.1"  # the user-level address, on no kernel
KERNEL_A = "10.77.0.9"
PEER = "10.77.0.2"
PORT = 4000
PACKET_QDISC_BYPASS = 20
PACKET_VNET_HDR = 15
SOL_PACKET = 263
ETH_P_ALL = 3


class World:
    """Host a with a guard on the wire to b, and a third device on a that is not served."""

    def __init__(self, bed: Testbed) -> None:
        self.a, self.b, self.c = bed.host("a"), bed.host("b"), bed.host("c")
        self.wire_a, self.wire_b = bed.wire(self.a, self.b, a_addr=KERNEL_A + "/24", b_addr=PEER + "/24")
        self.side_a, self.side_c = bed.wire(self.a, self.c)
        with self.a:
            self.guard = Guard(self.wire_a.name, OURS)
        self.guard.allow(7, TCP, OURS, PORT)
        self.guard.allow(7, UDP, OURS, PORT)

    def channel(self, device: str | None = None, number: int = 7, bypass: bool = False, vnet: bool = False) -> Sender:
        return Sender(self.a, device or self.wire_a.name, channel_mark(number), bypass, vnet)

    def frame(self, **changes: object) -> bytes:
        return frame(self.wire_a.mac, self.wire_b.mac, **changes)  # type: ignore[arg-type]


class Sender:
    """A packet socket as an application's channel has it: marked by somebody with the privilege."""

    def __init__(self, host: Host, device: str, mark: int, bypass: bool, vnet: bool) -> None:
        self.sock = host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        self.sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, int(bypass))
        if vnet:
            self.sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.sock.bind((device, 0))
        self.device = device
        self.bypass = bypass

    def sends(self, data: bytes, protocol: int | None = None) -> bool:
        """True when the frame left, False when it was refused as the guard refuses."""
        try:
            if protocol is None:
                self.sock.send(data)
            else:
                self.sock.sendto(data, (self.device, protocol))
        except OSError as error:
            assert error.errno == errno.ENOBUFS
            return False
        return True

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Testbed() as bed:
        world = World(bed)
        yield world
        world.guard.close()


@pytest.fixture(params=[False, True], ids=["queued", "bypass"])
def channel(world: World, request: pytest.FixtureRequest) -> Iterator[Sender]:
    sender = world.channel(bypass=request.param)
    yield sender
    sender.close()


def test_allowed_endpoints_pass_and_arrive(world: World, channel: Sender) -> None:
    with world.b.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((PEER, 9))
        receiver.settimeout(2)
        assert channel.sends(world.frame())
        assert receiver.recvfrom(100) == (b"payload", (OURS, PORT))
    assert channel.sends(world.frame(proto=TCP))


REFUSED: dict[str, Callable[[World], bytes]] = {
    "wrong source port": lambda w: w.frame(sport=PORT + 1),
    "wrong source port, TCP": lambda w: w.frame(sport=PORT + 1, proto=TCP),
    "wrong source address": lambda w: w.frame(saddr=KERNEL_A),
    "wrong protocol": lambda w: w.frame(proto=132),
    "ICMP": lambda w: w.frame(proto=1),
    "ARP type over IPv4 bytes": lambda w: w.frame(ethertype=b"\x08\x06"),
    "IPv6 type over IPv4 bytes": lambda w: w.frame(ethertype=b"\x86\xdd"),
    "VLAN tag": lambda w: w.frame(ethertype=b"\x81\x00\x00\x05\x08\x00"),
    "service VLAN tag": lambda w: w.frame(ethertype=b"\x88\xa8\x00\x05\x08\x00"),
    "version 6 in the first byte": lambda w: w.frame(first=0x65),
    "header too short": lambda w: w.frame(first=0x44),
    "IP options": lambda w: w.frame(first=0x46, options=b"\x01\x01\x01\x00"),
    "second fragment": lambda w: w.frame(fragment=1),
    "last fragment": lambda w: w.frame(fragment=0x2000 | 100),
    "truncated before the ports": lambda w: w.frame()[:34],
    "truncated IP header": lambda w: w.frame()[:25],
    "longer IP length than frame": lambda w: w.frame()[:-3],
    "ARP request": lambda w: (
        b"\xff" * 6
        + w.wire_a.mac
        + b"\x08\x06"
        + struct.pack("!HHBBH", 1, 0x800, 6, 4, 1)
        + w.wire_a.mac
        + socket.inet_aton(KERNEL_A)
        + bytes(6)
        + socket.inet_aton(PEER)
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("claimed", [None, 0x0800, 0x8100], ids=["plain", "as IPv4", "as VLAN"])
def test_everything_else_is_refused(world: World, channel: Sender, what: str, claimed: int | None) -> None:
    """Whatever type the sender claims in its socket address, the bytes decide."""
    before = world.guard.refused()
    with world.b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        assert not channel.sends(REFUSED[what](world), claimed)
        tap.setblocking(False)
        with pytest.raises(BlockingIOError):
            tap.recv(100)
    assert world.guard.refused() == before + 1


def test_type_claimed_must_fit_the_bytes(world: World, channel: Sender) -> None:
    """Claimed as VLAN, the kernel would look for the IP header elsewhere."""
    assert not channel.sends(world.frame(), 0x8100)
    assert not channel.sends(world.frame(), 0x86DD)
    # Past the qdisc a claimed type leaves the kernel without the frame's own: refused to be safe.
    assert channel.sends(world.frame(), 0x0800) == (not channel.bypass)


def test_endpoint_belongs_to_one_channel(world: World) -> None:
    other = world.channel(number=8)
    try:
        assert not other.sends(world.frame())
        world.guard.allow(8, UDP, OURS, 4100)
        assert other.sends(world.frame(sport=4100))
        world.guard.revoke(8, UDP, OURS, 4100)
        assert not other.sends(world.frame(sport=4100))
    finally:
        other.close()


def test_other_devices_refuse_every_tagged_packet(world: World) -> None:
    side = world.channel(device=world.side_a.name)
    loopback = world.channel(device="lo")
    try:
        assert not side.sends(world.frame())
        assert loopback.sends(world.frame())
        assert not loopback.sends(world.frame(saddr="127.0.0.1"))
        # The descriptor's holder may also name another device per packet.
        here = world.channel()
        with pytest.raises(OSError, match="No buffer space"):
            here.sock.sendto(world.frame(), (world.side_a.name, 0x0800))
        here.close()
    finally:
        side.close()
        loopback.close()


def test_device_added_later_is_watched(world: World) -> None:
    with world.a.netlink() as ip:
        ip.link("add", ifname="late0", kind="veth", peer="late1", state="up")
        try:
            with world.a:
                world.guard.add_device("late0")
                world.guard.add_device("late0")
            late = world.channel(device="late0")
            assert not late.sends(world.frame())
            late.close()
        finally:
            ip.link("del", ifname="late0")
        # A namesake after it is another device.
        ip.link("add", ifname="late0", kind="veth", peer="late1", state="up")
        with world.a:
            world.guard.add_device("late0")
        late = world.channel(device="late0")
        assert not late.sends(world.frame())
        late.close()
        ip.link("del", ifname="late0")
    assert "late0" in world.guard.devices()
    with world.a, pytest.raises(OSError, match="no interface 'nonsuch'"):
        world.guard.add_device("nonsuch")


def test_super_segments_are_judged_by_their_first_header(world: World) -> None:
    """64 KiB with a virtio_net_hdr: flags NEEDS_CSUM, gso TCPv4, as a stack with offload sends them."""
    sender = world.channel(vnet=True)
    sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    header = struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16)
    try:
        good = world.frame(proto=TCP, payload=bytes(60_000))
        bad = world.frame(proto=TCP, payload=bytes(60_000), sport=PORT + 1)
        before = world.guard.refused()
        with world.b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
            tap.settimeout(1)
            assert sender.sends(header + good)
            assert tap.recv(70_000)[34:36] == struct.pack("!H", PORT)
            # What the peer answers is no concern here.
            assert not sender.sends(header + bad)
        assert world.guard.refused() == before + 1
    finally:
        sender.close()


def test_unmarked_and_alien_marks_are_untouched(world: World) -> None:
    before = world.guard.refused()
    for mark in (0, 1, MARK_TAG ^ 0x00010000, 0x7FFF0000):
        assert mark & MARK_MASK != MARK_TAG
        sender = Sender(world.a, world.wire_a.name, mark, False, False)
        assert sender.sends(world.frame(saddr=KERNEL_A, sport=1))
        sender.close()
    assert world.guard.refused() == before


def test_kernel_neither_answers_nor_routes(world: World) -> None:
    """The kernel of a would answer a SYN to its own address with RST; to ours it must stay silent, ARP included."""
    with world.a, open("/proc/sys/net/ipv4/ip_forward", "w") as switch:
        switch.write("1")
    with world.b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.bind((world.wire_b.name, ETH_P_ALL))
        tap.settimeout(0.2)
        syn = frame(world.wire_b.mac, world.wire_a.mac, saddr=PEER, daddr=OURS, proto=TCP, payload=b"")
        control = frame(world.wire_b.mac, world.wire_a.mac, saddr=PEER, daddr=KERNEL_A, proto=TCP, payload=b"")
        arp = REFUSED["ARP request"](world)
        ask = arp[:6] + world.wire_b.mac + arp[12:22] + world.wire_b.mac + socket.inet_aton(PEER) + arp[32:38]

        def answers(data: bytes) -> list[bytes]:
            tap.send(data)
            found = []
            try:
                while True:
                    got = tap.recv(2000)
                    if got[6:12] != world.wire_b.mac:
                        found.append(got)
            except TimeoutError:
                return found

        with world.a.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as seen:
            seen.bind((world.wire_a.name, ETH_P_ALL))
            seen.settimeout(1)
            before = world.guard.hidden()
            assert answers(syn) == []
            assert seen.recv(2000) == syn  # the packet socket still gets it
        assert answers(ask + socket.inet_aton(OURS)) == []
        assert world.guard.hidden() == before + 2
        # Controls: the same kernel answers for its own address.
        assert any(got[12:14] == b"\x08\x06" for got in answers(ask + socket.inet_aton(KERNEL_A)))
        assert any(got[47] & 4 for got in answers(control) if got[23] == TCP)
        # On loopback, too: a frame for ours that the kernel would route out to the wire.
        loopback = world.channel(device="lo")
        world.guard.allow(7, UDP, OURS, PORT)
        before = world.guard.hidden()
        assert loopback.sends(bytes(12) + world.frame(daddr=OURS)[12:])
        assert world.guard.hidden() == before + 1
        loopback.close()


def test_device_below_lets_accepted_packets_through(world: World) -> None:
    """Served interface on top of another device: the tag must not follow the packet down."""
    with world.a.netlink() as ip:
        ip.link("add", ifname="v5", kind="macvlan", link=world.wire_a.index, macvlan_mode="private", state="up")
        try:
            with world.a, Guard("v5", "10.78.0.1", tag=0x756D0000) as upper:
                upper.allow(1, UDP, "10.78.0.1", 5)
                sender = Sender(world.a, "v5", channel_mark(1, 0x756D0000), False, False)
                assert sender.sends(world.frame(saddr="10.78.0.1", sport=5))
                assert not sender.sends(world.frame(saddr="10.78.0.1", sport=6))
                sender.close()
        finally:
            ip.link("del", ifname="v5")


def test_batch_and_large_sets(world: World) -> None:
    many = [(9, TCP, OURS, port) for port in range(1, 2501)]
    world.guard.update(allow=many)
    assert set(many) <= set(world.guard.allowed())
    sender = world.channel(number=9)
    assert sender.sends(world.frame(proto=TCP, sport=1))
    assert sender.sends(world.frame(proto=TCP, sport=2500))
    world.guard.update(allow=[(9, TCP, OURS, 3000), (9, TCP, OURS, 1)], revoke=many)
    assert sender.sends(world.frame(proto=TCP, sport=1))  # named in both: allowed
    assert not sender.sends(world.frame(proto=TCP, sport=2500))
    assert sender.sends(world.frame(proto=TCP, sport=3000))
    world.guard.revoke(9, TCP, OURS, 3000)
    world.guard.revoke(9, TCP, OURS, 1)
    world.guard.revoke(9, TCP, OURS, 1)  # twice is once
    sender.close()


def test_crash_leaves_the_table_in_force_and_a_new_guard_replaces_it(world: World) -> None:
    address = "10.77.0.33"
    with world.a:
        dead = Guard(world.wire_a.name, address, tag=0x75700000)
        dead.allow(1, UDP, address, 1)
        dead.abandon()
        sender = Sender(world.a, world.wire_a.name, channel_mark(1, 0x75700000), False, False)
        assert sender.sends(world.frame(saddr=address, sport=1))
        assert not sender.sends(world.frame(saddr=address, sport=2))
        with Guard(world.wire_a.name, address, allow=[(1, UDP, address, 2)], tag=0x75700000) as fresh:
            assert fresh.refused() == 0
            assert not sender.sends(world.frame(saddr=address, sport=1))
            assert sender.sends(world.frame(saddr=address, sport=2))
            assert fresh.refused() == 1
        assert sender.sends(world.frame(saddr=address, sport=1))  # closed: nothing is left
        fresh.close()
        sender.close()


def test_mistakes_are_named(world: World) -> None:
    with world.a:
        with pytest.raises(OSError, match="no interface 'eth7'") as caught:
            Guard("eth7", OURS)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(ValueError, match="'10.77.0' is not an IPv4"):
            Guard(world.wire_a.name, "10.77.0")
    for endpoint, text in [
        ((7, 1, OURS, 5), "protocol 1"),
        ((7, UDP, OURS, 0), "port 0"),
        ((7, UDP, OURS, 70000), "port 70000"),
        ((7, UDP, PEER, 5), "not the guarded address"),
        ((70000, UDP, OURS, 5), "channel id 70000"),
    ]:
        with pytest.raises(ValueError, match=text):
            world.guard.allow(*endpoint)


def test_no_privilege_is_said() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become an ordinary user first")
    code = textwrap.dedent("""
        import os
        from ulnet.kernelshim.guard import Guard
        os.setresuid(65534, 65534, 65534)
        try:
            Guard("lo", "10.0.0.1")
        except PermissionError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    if "Invalid argument" in done.stderr:
        pytest.skip("this user namespace has one user only")
    assert "CAP_NET_ADMIN" in done.stdout, done.stderr


def test_works_in_a_user_namespace() -> None:
    code = textwrap.dedent("""
        import socket
        from ulnet.kernelshim.guard import Guard
        from ulnet.kernelshim.testbed import Testbed, enter_user_namespace
        try:
            enter_user_namespace()
        except PermissionError as error:
            print("skip", error)
            raise SystemExit
        from test_guard import World
        with Testbed() as bed:
            world = World(bed)
            sender = world.channel()
            print(sender.sends(world.frame()), sender.sends(world.frame(sport=1)), world.guard.refused())
    """)
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, env=os.environ | {"PYTHONPATH": paths}
    )
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.split() == ["True", "False", "1"], done.stderr


def test_cost_does_not_grow_with_the_endpoints(world: World) -> None:
    """20,000 endpoints may not make a send noticeably dearer: linear rules would cost milliseconds."""
    sender = world.channel()
    data = world.frame()

    def per_send_us() -> float:
        best = 1e9
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(200):
                sender.sock.send(data)
            best = min(best, (time.perf_counter() - begin) / 200 * 1e6)
        return best

    few = per_send_us()
    many = [(11, UDP, OURS, port) for port in range(1, 20_001)]
    world.guard.update(allow=many)
    try:
        assert per_send_us() < 2 * few + 5
    finally:
        world.guard.update(revoke=many)
        sender.close()
