"""What must be right before the server starts: one clear line for each thing that is not.

Call order as in ``NetServer.start``: ``check_privilege``, ``parse_address``, ``find_interface``, ``check_free``,
``claim_address``, ``check_socket_path``; ``probe_wire`` once a packet socket may be had.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import os
import re
import resource
import socket
import struct
import time
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]

from ulnet.kernelshim.marks import MARK_TAG

_CAP_NET_ADMIN: Final = 12
_CAP_NET_RAW: Final = 13
_ETH_P_ARP: Final = 0x0806
_ARPHRD_ETHER: Final = 1
_PATH_BYTES: Final = 107  # sun_path, less its end; the side channel appends to it
_SUFFIX: Final = ".fd"
TAGS: Final = 16  # netservers in one network namespace


class SetupError(Exception):
    """The user's mistake, in one line."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A served address with its network."""

    address: str
    prefix: int

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"{self.address}/{self.prefix}", strict=False)

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"


@dataclasses.dataclass(frozen=True)
class Interface:
    """A network interface as netlink tells it."""

    name: str
    index: int
    mac: bytes
    mtu: int
    up: bool
    addresses: frozenset[str]


def parse_address(text: str) -> Address:
    """``A/LEN``, a unicast IPv4 address that is neither the network's own nor its broadcast."""
    if not re.fullmatch(r"\d+\.\d+\.\d+\.\d+/\d+", text):
        raise SetupError(f"address {text!r} is not of the form A.B.C.D/LEN, as in 10.0.0.7/24")
    try:
        interface = ipaddress.IPv4Interface(text)
    except ValueError as error:
        raise SetupError(f"address {text!r}: {error}") from None
    address, network = interface.ip, interface.network
    if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_reserved:
        raise SetupError(f"address {text!r} is not one that a host may have; use a unicast address of the network")
    if network.prefixlen < 31 and address in (network.network_address, network.broadcast_address):
        raise SetupError(
            f"address {text!r} is the network's own or its broadcast address; use another one of {network}"
        )
    return Address(str(address), network.prefixlen)


def parse_gateway(text: str, address: Address) -> str:
    """A gateway must be a neighbour."""
    try:
        gateway = ipaddress.IPv4Address(text)
    except ValueError:
        raise SetupError(f"gateway {text!r} is not an IPv4 address") from None
    if gateway not in address.network:
        raise SetupError(f"gateway {gateway} is not on the network {address.network} of the address")
    if str(gateway) == address.address:
        raise SetupError(f"gateway {gateway} is the served address itself")
    return str(gateway)


def check_privilege() -> None:
    """CAP_NET_ADMIN and CAP_NET_RAW over this network namespace."""
    effective = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    need = "needs CAP_NET_ADMIN and CAP_NET_RAW: run it as root, or in a user namespace (unshare -rn)"
    if not (effective >> _CAP_NET_ADMIN & 1 and effective >> _CAP_NET_RAW & 1):
        raise SetupError(f"no privilege: {need}")
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:  # capable, but in a user namespace that does not own this network namespace
        raise SetupError(f"no privilege over this network namespace: {need}") from None


def raise_descriptor_limit() -> None:
    """Each shared session is a descriptor: as many as the system allows this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def find_interface(name: str) -> Interface:
    """An Ethernet interface of this network namespace, with the addresses the kernel has there."""
    with IPRoute() as ip:
        links = ip.link("dump")
        names = sorted(str(link.get("ifname") or link.get_attr("IFLA_IFNAME")) for link in links)
        for link in links:
            if link.get_attr("IFLA_IFNAME") != name:
                continue
            if link["ifi_type"] != _ARPHRD_ETHER:
                raise SetupError(f"interface {name} is not an Ethernet; use one of {', '.join(names)}")
            addresses = frozenset(
                str(a.get_attr("IFA_LOCAL") or a.get_attr("IFA_ADDRESS"))
                for a in ip.addr("dump", family=socket.AF_INET)
                if a["index"] == link["index"]
            )
            return Interface(
                name,
                link["index"],
                bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", "")),
                link.get_attr("IFLA_MTU"),
                bool(link["flags"] & 1),
                addresses,
            )
    raise SetupError(f"no interface {name!r}; this network namespace has {', '.join(names)}")


def check_free(address: Address) -> None:
    """The kernel must not have the address anywhere: it would answer beside us."""
    with IPRoute() as ip:
        for row in ip.addr("dump", family=socket.AF_INET):
            if row.get_attr("IFA_LOCAL") == address.address or row.get_attr("IFA_ADDRESS") == address.address:
                label = row.get_attr("IFA_LABEL") or f"interface {row['index']}"
                raise SetupError(
                    f"address {address.address} is the kernel's own, on {label}; "
                    "choose an address that nobody has, or remove it there (ip address del)"
                )


def claim_address(address: Address) -> socket.socket:
    """Hold the address for this server as long as the returned socket lives.

    Abstract socket names are per network namespace and vanish with their holder: exactly the scope of an address.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0ulnet/netserver/{address.address}")
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(f"address {address.address} is already served by another netserver here") from None
        raise
    return claim


def claim_tag() -> tuple[socket.socket, int]:
    """A mark tag that no other netserver of this network namespace uses, ours as long as the socket lives.

    Each server's guard drops what carries its tag and is not allowed; with one tag for all, two servers would
    drop each other's packets.
    """
    for number in range(TAGS):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0ulnet/tag/{number}")
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return claim, MARK_TAG + (number << 16)
    raise SetupError(f"{TAGS} netservers run in this network namespace already: stop one")


def check_socket_path(path: str) -> None:
    """The directory is there (made if only it is missing), writable, and nobody serves the path."""
    if len(os.fsencode(path)) + len(_SUFFIX) > _PATH_BYTES:
        raise SetupError(f"socket path {path!r} is too long: at most {_PATH_BYTES - len(_SUFFIX)} bytes")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    except OSError as error:
        raise SetupError(f"socket path {path}: cannot make {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"socket path {path}: {folder} is not writable; choose another one with --socket")
    if os.path.lexists(path) and not _is_socket(path):
        raise SetupError(f"socket path {path} exists and is not a socket; choose another one with --socket")


def _is_socket(path: str) -> bool:
    import stat

    return stat.S_ISSOCK(os.lstat(path).st_mode)


def probe_wire(interface: Interface, address: Address, wait_s: float = 0.25) -> None:
    """RFC 5227 (2.1.1): ask who has the address before using it; one probe only, for a person is waiting."""
    probe = struct.pack(
        ">6s6sHHHBBH6s4s6s4s",
        b"\xff" * 6,
        interface.mac,
        _ETH_P_ARP,
        1,
        0x0800,
        6,
        4,
        1,
        interface.mac,
        bytes(4),
        bytes(6),
        socket.inet_aton(address.address),
    )
    wanted = socket.inet_aton(address.address)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP)) as packet:
        packet.bind((interface.name, _ETH_P_ARP))
        packet.send(probe)
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0:
            packet.settimeout(left)
            try:
                frame, origin = packet.recvfrom(256)
            except TimeoutError:
                return
            outgoing = origin[2] == socket.PACKET_OUTGOING
            if not outgoing and len(frame) >= 42 and frame[28:32] == wanted and frame[22:28] != interface.mac:
                raise SetupError(
                    f"address {address.address} is in use on the wire by {frame[22:28].hex(':')}; choose another one"
                )
