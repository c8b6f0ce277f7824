"""Two network namespaces joined by a veth pair, and hand-made frames, for the channel tests."""

import contextlib
import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from pyroute2 import IPRoute

from ulnet.kernelshim import bpf
from ulnet.kernelshim.link import Frame, Link

CLONE_NEWNET = 0x40000000
_NETNS = "/proc/thread-self/ns/net"
OURS = IPv4Address("10.9.0.9")
PEER = IPv4Address("10.9.0.2")
OTHER = IPv4Address("10.9.0.3")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Host:
    """A network namespace without a name: it goes when its last descriptor and socket go."""

    def __init__(self) -> None:
        here = os.open(_NETNS, os.O_RDONLY)
        try:
            _check(_libc.unshare(CLONE_NEWNET))
            self.fd = os.open(_NETNS, os.O_RDONLY)
            _check(_libc.setns(here, CLONE_NEWNET))
        finally:
            os.close(here)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        here = os.open(_NETNS, os.O_RDONLY)
        try:
            _check(_libc.setns(self.fd, CLONE_NEWNET))
            yield
        finally:
            _check(_libc.setns(here, CLONE_NEWNET))
            os.close(here)

    def udp(self, address: IPv4Address = PEER, port: int = 0) -> socket.socket:
        with self.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(2)
        sock.bind((str(address), port))
        return sock

    def close(self) -> None:
        os.close(self.fd)


class Wire:
    """``ours`` has device ve0 without an address; ``peer`` has ve1 with 10.9.0.2, 10.9.0.3 and knows our MAC."""

    def __init__(self) -> None:
        self.ours = Host()
        self.peer = Host()
        with self.ours.inside(), IPRoute() as route:
            route.link("add", ifname="ve0", kind="veth", peer={"ifname": "ve1", "net_ns_fd": self.peer.fd})
            self.ve0 = route.link_lookup(ifname="ve0")[0]
            self.mac = bytes.fromhex(route.link("get", index=self.ve0)[0].get("address").replace(":", ""))
            route.link("set", index=self.ve0, state="up")
            route.link("set", index=1, state="up")
        with self.peer.inside(), IPRoute() as route:
            ve1 = route.link_lookup(ifname="ve1")[0]
            self.peer_mac = bytes.fromhex(route.link("get", index=ve1)[0].get("address").replace(":", ""))
            route.link("set", index=ve1, state="up")
            for address in (PEER, OTHER):
                route.addr("add", index=ve1, address=str(address), prefixlen=24)
            route.neigh("replace", dst=str(OURS), lladdr=self.mac.hex(":"), ifindex=ve1, state=0x80)

    def set_ours(self, state: str) -> None:
        with self.ours.inside(), IPRoute() as route:
            route.link("set", index=self.ve0, state=state)

    def close(self) -> None:
        with self.ours.inside(), IPRoute() as route:
            route.link("del", index=self.ve0)
        self.ours.close()
        self.peer.close()


def wire_or_skip() -> Wire:
    try:
        return Wire()
    except OSError as refused:
        pytest.skip(f"needs network namespaces (root or `unshare -Urn`): {refused}")


def kinds() -> list[object]:
    """Parameters: eBPF and classic BPF; the first skipped where it may not be used."""
    able = bpf.available()
    return [
        pytest.param(True, id="ebpf", marks=pytest.mark.skipif(not able, reason="eBPF needs CAP_BPF")),
        pytest.param(False, id="classic"),
    ]


# ---- frames ----


def total(data: bytes) -> int:
    """RFC 1071, not complemented."""
    data += b"\0" * (len(data) % 2)
    value = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def pseudo(proto: int, source: IPv4Address, target: IPv4Address, length: int) -> int:
    return total(source.packed + target.packed + struct.pack("!BBH", 0, proto, length))


def ipv4(proto: int, source: IPv4Address, target: IPv4Address, length: int, flags: int = 0x4000) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length & 0xFFFF, 7, flags, 64, proto, 0)
    head += source.packed + target.packed
    return head[:10] + struct.pack("!H", 0xFFFF ^ total(head)) + head[12:]


def ethernet(target: bytes, source: bytes, kind: int = 0x0800) -> bytes:
    return target + source + struct.pack("!H", kind)


def udp(
    source: tuple[IPv4Address, int], target: tuple[IPv4Address, int], data: bytes, *, partial: bool = False
) -> bytes:
    """IPv4 packet with a UDP datagram; ``partial``: only the pseudo-header sum, for the link to complete."""
    length = 8 + len(data)
    head = struct.pack("!HHHH", source[1], target[1], length, 0)
    value = pseudo(17, source[0], target[0], length)
    if not partial:
        value = 0xFFFF ^ total(struct.pack("!H", value) + head + data)
    return ipv4(17, source[0], target[0], length) + head[:6] + struct.pack("!H", value or 0xFFFF) + data


def ports_of(frame: Frame) -> tuple[int, int]:
    """Source and destination port of an IPv4 frame without options."""
    source, target = struct.unpack_from("!HH", frame.data, 34)
    return source, target


def payload(frame: Frame) -> bytes:
    """What a UDP frame carries."""
    return frame.data[42:]


def drain(link: Link, want: int = 0, seconds: float = 1.0) -> list[Frame]:
    """Frames there are: until ``want`` have come, else a moment after the last."""
    found: list[Frame] = []
    until = time.monotonic() + seconds
    quiet = time.monotonic() + 0.03
    while time.monotonic() < until and (len(found) < want if want else time.monotonic() < quiet):
        frame = link.recv_frame()
        if frame is None:
            time.sleep(0.0005)
            continue
        found.append(frame)
    return found
