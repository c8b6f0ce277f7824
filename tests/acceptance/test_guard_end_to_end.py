"""An unprivileged program that goes rogue with the descriptor of its own channel: what it sends and what it sees.

Sending: only its own local endpoints, whatever it writes into a frame and whichever way it takes. Receiving: only its
own flows, whatever it does to the socket.
"""

from __future__ import annotations

import socket as ksocket
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.beds import ADDRESS, PEER, App, Hosts
from tests.netserver_bed import wait_for

TARGET = 7777

# In the program: its channel as a plain kernel socket, and frames as it likes them (virtio_net_hdr first).
ROGUE = f"""
import socket as ksocket
u = udp_socket()
raw = ksocket.socket(fileno=os.dup(host.link.fileno()))
DEVICE = {{n: i for i, n in ksocket.if_nameindex()}}['eth0']

def total(data):
    s = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    s = (s & 0xffff) + (s >> 16)
    return ~((s & 0xffff) + (s >> 16)) & 0xffff

def frame(mac, payload, source='{ADDRESS}', sport=u.getsockname()[1], proto=17, ethertype=0x0800, fragment=0, tag=b''):
    udp = struct.pack('!HHHH', sport, {TARGET}, 8 + len(payload), 0) + payload
    if proto == 6:
        udp = struct.pack('!HHIIBBHHH', sport, {TARGET}, 1, 0, 0x50, 2, 1000, 0, 0) + payload
    ip = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(udp), 1, fragment, 64, proto, 0,
                     ksocket.inet_aton(source), ksocket.inet_aton('{PEER}'))
    ip = ip[:10] + struct.pack('!H', total(ip)) + ip[12:]
    return bytes(10) + bytes.fromhex(mac) + host.link.mac + tag + struct.pack('!H', ethertype) + ip + udp

def attempt(data, device=None, ethertype=0x0800):
    try:
        raw.sendto(data, (ksocket.if_indextoname(device or DEVICE), ethertype))
        return 0
    except OSError as e:
        return e.errno
"""

ENOBUFS = 105
EPERM = 1


class Tap:
    """Frames that reach host b's interface, marked ones only."""

    def __init__(self, hosts: Hosts) -> None:
        with hosts.b:
            self.sock = ksocket.socket(ksocket.AF_PACKET, ksocket.SOCK_RAW, ksocket.htons(3))
        self.sock.bind((hosts.b.interface.name, 3))
        self.sock.settimeout(0.1)  # frames are there when the send has returned
        self.sender = hosts.a.mac

    def marked(self, mark: bytes) -> int:
        """How many came that hold the mark."""
        count = 0
        while True:
            try:
                frame = self.sock.recv(70000)
                count += mark in frame and frame[6:12] == self.sender  # else an ICMP error that quotes it
            except TimeoutError:
                return count


@pytest.fixture
def rogue(hosts: Hosts) -> App:
    app = hosts.app()
    assert "capabilities 0x0" in app.who
    app.do(ROGUE)
    app.do(f"u.sendto(b'hello', ('{PEER}', {TARGET}))")
    return app


@pytest.fixture
def tap(hosts: Hosts) -> Iterator[Tap]:
    tap = Tap(hosts)
    yield tap
    tap.sock.close()


def refused(hosts: Hosts) -> int:
    return int(hosts.counters()["guard"]["refused"])


def mac(hosts: Hosts) -> str:
    return hosts.b.mac.hex()


def test_what_is_its_own_passes(hosts: Hosts, rogue: App, tap: Tap) -> None:
    before = refused(hosts)
    assert rogue.value(f"attempt(frame('{mac(hosts)}', b'lawful frame'))") == 0
    assert tap.marked(b"lawful frame") == 1
    assert refused(hosts) == before


FORBIDDEN = {
    "another port": "sport=5999",
    "another source address": "source='10.77.0.66'",
    "the peer's address": f"source='{PEER}'",
    "another protocol with its own port": "proto=6",
    "ICMP": "proto=1",
    "ARP": "ethertype=0x0806",
    "IPv6": "ethertype=0x86DD",
    "an unknown ethertype": "ethertype=0x88B5",
    "a VLAN tag before the lawful packet": "tag=bytes.fromhex('81000005')",
    "a first fragment with another port": "fragment=0x2000, sport=5999",
    "a later fragment with ports of its liking": "fragment=0x2010, source='10.77.0.66'",
}


def test_what_is_not_stays_here(hosts: Hosts, rogue: App, tap: Tap) -> None:
    for what, how in FORBIDDEN.items():
        before = refused(hosts)
        ethertype = 0x0800
        if "ethertype=" in how:
            ethertype = int(how.partition("ethertype=")[2], 16)
        make = f"frame('{mac(hosts)}', b'unlawful frame', {how})"
        # By its real ethertype, and by one that promises a lawful packet; past the queueing discipline, too.
        assert rogue.value(f"attempt({make}, ethertype={ethertype})") == ENOBUFS, what
        assert rogue.value(f"attempt({make})") == ENOBUFS, what
        rogue.do("raw.setsockopt(263, 20, 1)")  # PACKET_QDISC_BYPASS
        assert rogue.value(f"attempt({make})") == ENOBUFS, what
        rogue.do("raw.setsockopt(263, 20, 0)")
        assert tap.marked(b"unlawful frame") == 0, what
        assert refused(hosts) == before + 3, what


def test_the_port_of_another_program(hosts: Hosts, rogue: App, tap: Tap) -> None:
    other = hosts.app()
    other.do("u = udp_socket()")
    theirs = other.value("u.getsockname()[1]")
    assert rogue.value(f"attempt(frame('{mac(hosts)}', b'unlawful frame', sport={theirs}))") == ENOBUFS
    assert tap.marked(b"unlawful frame") == 0


def test_other_devices_and_ways(hosts: Hosts, rogue: App, tap: Tap) -> None:
    """Through the loopback device to its host's own kernel, and with the socket bound elsewhere."""
    with hosts.a.socket(type=ksocket.SOCK_DGRAM) as local:
        local.bind(("127.0.0.1", TARGET))
        local.settimeout(0.3)
        make = "frame('000000000000', b'unlawful frame', sport=5999)"
        assert rogue.value(f"attempt({make}, device=1)") == ENOBUFS
        with pytest.raises(TimeoutError):
            local.recv(100)
    rogue.do("import contextlib")
    rogue.do("with contextlib.suppress(OSError): raw.bind(('lo', 3))")
    assert rogue.value(f"attempt(frame('{mac(hosts)}', b'unlawful frame', sport=5999))") == ENOBUFS
    # Announced as a super-segment, so that the kernel cuts it: the guard sees the whole.
    head = "struct.pack('<BBHHHH', 1, 3, 42, 100, 34, 6)"  # NEEDS_CSUM, GSO_UDP
    assert rogue.value(f"attempt({head} + frame('{mac(hosts)}', b'unlawful frame' * 50, sport=5999)[10:])") != 0
    assert tap.marked(b"unlawful frame") == 0


def test_the_locks_hold(rogue: App) -> None:
    """Filter, mark, fan-out and ring are as the server made them."""
    rogue.do(
        """
import ctypes
def option(level, name, value):
    try:
        raw.setsockopt(level, name, value)
        return 0
    except OSError as e:
        return e.errno
accept_all = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffffffff))
program = struct.pack('HP', 1, ctypes.addressof(accept_all))
"""
    )
    assert rogue.value("option(1, 26, program)") == EPERM  # SO_ATTACH_FILTER
    assert rogue.value("option(1, 27, 0)") == EPERM  # SO_DETACH_FILTER
    assert rogue.value("option(1, 44, 0)") == EPERM  # SO_LOCK_FILTER
    assert rogue.value("option(1, 36, 0)") == EPERM  # SO_MARK
    assert rogue.value("option(263, 22, program)") == EPERM  # PACKET_FANOUT_DATA
    assert rogue.value("option(263, 10, 0)") != 0  # PACKET_VERSION
    assert rogue.value("option(263, 15, 0)") != 0  # PACKET_VNET_HDR
    assert rogue.value("option(263, 5, struct.pack('4I', 4096, 4, 2048, 8))") != 0  # PACKET_RX_RING
    assert rogue.value("option(263, 5, bytes(16))") != 0
    rogue.do(
        "refusals = []\n"
        "for kind in (3, 2):\n"
        "    try: ksocket.socket(17, kind, 0)\n"
        "    except OSError as e: refusals.append(e.errno)\n"
        "try: ksocket.socket(2, 3, 17)\n"
        "except OSError as e: refusals.append(e.errno)\n"
    )
    assert rogue.value("refusals") == [EPERM] * 3


def test_it_sees_nothing_of_others(hosts: Hosts, rogue: App) -> None:
    """Promiscuous, outgoing frames asked for, bound to everything: another program's traffic does not show."""
    other = hosts.app()
    other.do("u = udp_socket()")
    theirs = other.value("u.getsockname()[1]")
    rogue.do(
        """
import contextlib
for mode in (1, 2):  # promiscuous, all multicast
    with contextlib.suppress(OSError): raw.setsockopt(263, 1, struct.pack('iHH8s', DEVICE, mode, 0, b''))
with contextlib.suppress(OSError): raw.setsockopt(263, 23, 0)  # PACKET_IGNORE_OUTGOING
with contextlib.suppress(OSError): raw.bind(('eth0', 3))
"""
    )
    with hosts.datagrams(TARGET) as sock:
        # Its own traffic shows, so the counter tells the truth.
        before = rogue.value("host.link.counters()")["rx_frames"]
        sock.sendto(b"mine", (ADDRESS, rogue.value("u.getsockname()[1]")))
        assert rogue.value("u.recv(100).decode()") == "mine"
        seen = rogue.value("host.link.counters()")["rx_frames"]
        assert seen == before + 1
        for number in range(200):
            sock.sendto(b"secret %d" % number, (ADDRESS, theirs))
            other.do(f"assert u.recv(100) == b'secret {number}'; u.sendto(b'answer', ('{PEER}', {TARGET}))")
            assert sock.recv(100) == b"answer"
    with hosts.listener() as listener:
        other.do(f"s = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout=10)")
        peer, _ = listener.accept()
        peer.sendall(b"secret" * 1000)
        assert other.value("len(receive_exactly(s, 6000))") == 6000
        peer.close()
    time.sleep(0.1)
    counters = rogue.value("host.link.counters()")
    assert counters["rx_frames"] == seen and counters["rx_drops"] == 0
    rogue.do("raw.setblocking(False)\ntry: late = len(raw.recv(70000))\nexcept OSError: late = 0")
    assert rogue.value("late") == 0


def test_after_its_sessions_end_it_may_send_no_more(hosts: Hosts, rogue: App, tap: Tap) -> None:
    rogue.do(f"late = frame('{mac(hosts)}', b'late frame'); u.close()")
    wait_for(lambda: hosts.tables()["guarded"] == 0, "the endpoint taken back")
    tap.marked(b"")
    assert rogue.value("attempt(late)") == ENOBUFS
    rogue.do("keep = os.dup(raw.fileno()); host.shutdown()")
    wait_for(lambda: hosts.tables()["applications"] == 0, "no application")
    assert rogue.value("attempt(late)") != 0
    assert tap.marked(b"late frame") == 0
