"""A channel's packet socket: made, confined and described by the server, opened by the application.

Order that works: socket for no protocol yet, filter, PACKET_IGNORE_OUTGOING, SO_MARK, PACKET_VNET_HDR,
TPACKET_V2, buffers, ring, bind to all devices, fanout, SO_LOCK_FILTER. Nothing is received before the bind,
and the filter stands by then. Read first: packet(7), Documentation/networking/packet_mmap.rst.

The socket is bound to all devices so that one descriptor serves the network and the loopback device, by
which a stack talks to its own address; the filter says which devices count.

A channel with rings has two such sockets, one for small frames and one for large ones (packet.pyx says why).
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import NamedTuple

from ulnet.kernelshim import bpf, filters
from ulnet.kernelshim.packet import SLOT_OVERHEAD_BYTES, PacketLink

__all__ = [
    "DEFAULT_SLOTS",
    "ChannelGrant",
    "FanoutGroup",
    "Ring",
    "Rings",
    "link_on",
    "open_embedded",
    "packet_socket",
    "ring_for",
    "rings_for",
    "select_by",
]

# Of large frames. The kernel fills a ring all around, so its size is what the caches must take: with four times as many
# slots bulk data are 13 % slower, with half as many they come from a kernel sender at half the speed.
DEFAULT_SLOTS = 30
# With four times as many a round trip is some 8 % slower. A kernel socket's buffer holds about as many small datagrams.
SMALL_SLOTS = 256
_SMALL_MTU_MAX = 9216  # above it a frame is a large one; so is what offload has put together
ETH_BYTES = 14
_FRAME_MAX = 65535 + ETH_BYTES  # a whole IPv4 packet or super-segment behind its Ethernet header
_BLOCK_PAGES_MAX = 256  # the kernel allocates a block in one piece of a power of two pages

# linux/if_packet.h
PACKET_RX_RING, PACKET_VERSION, PACKET_VNET_HDR, PACKET_FANOUT = 5, 10, 15, 18
PACKET_FANOUT_DATA, PACKET_IGNORE_OUTGOING = 22, 23
FANOUT_CBPF, FANOUT_EBPF = 6, 7
FANOUT_FLAG_UNIQUEID, FANOUT_FLAG_IGNORE_OUTGOING, FANOUT_FLAG_DEFRAG = 0x2000, 0x4000, 0x8000
_TPACKET_V2 = 1
_ETH_P_ALL = 0x0003
# asm-generic/socket.h, what the socket module does not name
SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_LOCK_FILTER, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 26, 50, 44, 32, 33
SOL_PACKET = 263
_SIOCGIFMTU, _SIOCGIFHWADDR = 0x8921, 0x8927
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772

_SEND_BUFFER_BYTES = 4 << 20  # a 64 KiB super-segment wants 1 MiB; several may wait in a real device
_IPC_BUFFER_BYTES = 8 << 20  # without a ring the socket's queue is what takes a burst


class Ring(NamedTuple):
    """Size of a packet ring. No slots: no ring."""

    slots: int
    slot_bytes: int
    slots_per_block: int

    @property
    def total_bytes(self) -> int:
        return self.slots * self.slot_bytes


NO_RING = Ring(0, 0, 0)


class Rings(NamedTuple):
    """The rings of a channel; without any, one socket has all its packets."""

    small: Ring
    large: Ring

    @property
    def by_socket(self) -> tuple[Ring, ...]:
        """The ring of each socket of the channel: of small frames, of large ones."""
        return tuple(self) if self.large.slots else (NO_RING,)

    @property
    def small_packet_bytes(self) -> int:
        """Packets of up to so many bytes, from the network header on, are small."""
        return self.small.slot_bytes - SLOT_OVERHEAD_BYTES - ETH_BYTES


NO_RINGS = Rings(NO_RING, NO_RING)


def ring_for(slots: int = DEFAULT_SLOTS, frame_bytes: int = _FRAME_MAX) -> Ring:
    """A ring of at least ``slots`` slots, each holding a whole frame.

    A slot is whole pages, or one of several that fill a page. Blocks hold as many as fit into a power of two of
    pages with little waste, so the number of slots is rounded up (128 of 17 pages become 135: nine blocks of 15).
    """
    if slots < 4:
        raise ValueError(f"a ring of {slots} slots is too small: it needs at least 4")
    page = os.sysconf("SC_PAGESIZE")
    need = frame_bytes + SLOT_OVERHEAD_BYTES
    if need <= page // 2:
        size = 1 << (need - 1).bit_length()
        per_block = page // size
    else:
        pages = -(-need // page)
        size = pages * page
        per_block = max(1, min(slots, max(_BLOCK_PAGES_MAX * 4096 // page, pages) // pages))
    return Ring(-(-slots // per_block) * per_block, size, per_block)


def rings_for(interface: str, mtu: int, *, slots: int = DEFAULT_SLOTS, small_slots: int = SMALL_SLOTS) -> Rings:
    """``slots`` for large frames; ``small_slots`` for frames that were sent as such on a network with that MTU."""
    if interface == "ipc":
        return NO_RINGS
    return Rings(ring_for(small_slots, min(mtu, _SMALL_MTU_MAX) + ETH_BYTES), ring_for(slots))


class ChannelGrant(NamedTuple):
    """What the server hands an application: all it needs to open the channel.

    Every field but ``fds``, the descriptors, can be sent as data.
    """

    channel_id: int
    fds: tuple[int, ...]
    mark: int
    interface: str
    rings: Rings
    device: "Device"

    def open(self) -> PacketLink:
        """The channel as a link. Takes the descriptors over."""
        return link_on(self.device, self.fds, self.interface, self.rings)

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self.fds:
            os.close(fd)


class Device(NamedTuple):
    """What a stack must know of a network interface."""

    name: str
    ifindex: int
    loopback_ifindex: int
    mac: bytes
    mtu: int


def device(name: str) -> Device:
    """Look an interface up in this network namespace. Raises OSError(ENODEV) or ValueError."""
    try:
        ifindex = socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"no network interface {name!r} in this namespace (see `ip link`)") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("16s24x", name.encode())
        hardware = fcntl.ioctl(asking, _SIOCGIFHWADDR, request)
        (mtu,) = struct.unpack_from("=i", fcntl.ioctl(asking, _SIOCGIFMTU, request), 16)
    (kind,) = struct.unpack_from("=H", hardware, 16)
    if kind not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
        raise ValueError(f"interface {name!r} is not Ethernet (hardware type {kind}): use another one")
    return Device(name, ifindex, socket.if_nametoindex("lo"), hardware[18:24], mtu)


def link_on(where: Device, fds: Sequence[int], interface: str, rings: Rings) -> PacketLink:
    """A channel's sockets as a link. Takes the descriptors over."""
    return PacketLink(
        fds,
        ifindex=where.ifindex,
        loopback_ifindex=where.loopback_ifindex,
        mac=where.mac,
        mtu=where.mtu,
        interface=interface,
        small=rings.small[:2],
        large=rings.large[:2],
    )


def attach_classic(sock: socket.socket, program: bytes) -> None:
    """Set a socket's filter to a classic program."""
    argument, memory = bpf.attachable(program)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, argument)
    del memory


def attach_extended(sock: socket.socket, program: bpf.ExtendedProgram) -> None:
    """Load an extended program and set it as the socket's filter."""
    fd = bpf.load_socket_filter(program)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, fd)
    finally:
        os.close(fd)


def _grow(sock: socket.socket, forced: int, polite: int, size: int) -> None:
    """Buffer size; without CAP_NET_ADMIN over the whole machine, what sysctl net.core.*mem_max allows."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, polite, size)


def packet_socket(
    attach: Callable[[socket.socket], None],
    *,
    ring: Ring = NO_RING,
    mark: int | None = None,
    join: Callable[[socket.socket], None] | None = None,
    lock: bool = True,
) -> socket.socket:
    """A confined packet socket, in the order that leaves no gap (see the head of this file).

    ``attach`` sets its filter, ``join`` puts it into a fanout group. Raises PermissionError without
    CAP_NET_RAW, OSError when the kernel refuses a step (ENOMEM: no memory for the ring).
    """
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    except PermissionError:
        raise PermissionError(
            errno.EPERM,
            "a packet socket needs CAP_NET_RAW: run as root, or in a user and network namespace of your own "
            "(`unshare -Urn`)",
        ) from None
    try:
        attach(sock)
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        _grow(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if ring.slots:
            sock.setsockopt(SOL_PACKET, PACKET_VERSION, _TPACKET_V2)
            blocks = ring.slots // ring.slots_per_block
            request = struct.pack("=4I", ring.slot_bytes * ring.slots_per_block, blocks, ring.slot_bytes, ring.slots)
            sock.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        else:
            _grow(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, _IPC_BUFFER_BYTES)
        _bind_all_devices(sock)
        if join is not None:
            join(sock)
        if lock:
            sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_all_devices(sock: socket.socket) -> None:
    """bind(2) to ETH_P_ALL and interface index 0, which the socket module cannot say."""
    address = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_ALL), 0, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.bind(sock.fileno(), address, len(address)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot bind a packet socket to all devices: {os.strerror(code)}")


class FanoutGroup:
    """A PACKET_FANOUT group that reassembles IPv4 fragments, for at most ``members`` sockets."""

    def __init__(self, kind: int, members: int) -> None:
        self._kind = kind
        self._members = members
        self._id: int | None = None

    def join(self, sock: socket.socket) -> None:
        """Put a socket behind the last member. The first one makes the group."""
        flags = FANOUT_FLAG_IGNORE_OUTGOING | FANOUT_FLAG_DEFRAG | (FANOUT_FLAG_UNIQUEID if self._id is None else 0)
        arguments = struct.pack("=HHI", self._id or 0, self._kind | flags, self._members)
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT, arguments)
        if self._id is None:
            self._id = sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF


def select_by(sock: socket.socket, program: bytes) -> None:
    """Set the classic program that chooses a member, through one whose filter is not locked."""
    argument, memory = bpf.attachable(program)
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, argument)
    del memory


def open_embedded(
    interface: str,
    address: IPv4Address,
    *,
    packet_interface: str = "ipf",
    slots: int = DEFAULT_SLOTS,
    small_slots: int = SMALL_SLOTS,
) -> PacketLink:
    """One channel for a stack that is its own server: ARP for the address and every packet to it.

    Raises OSError (no such interface, no privilege) or ValueError.
    """
    where = device(interface)
    place = filters.Place(where.ifindex, where.loopback_ifindex, IPv4Address(address))
    program = filters.classic_server_filter(place)
    rings = rings_for(packet_interface, where.mtu, slots=slots, small_slots=small_slots)
    group = FanoutGroup(FANOUT_CBPF, members=2)
    made: list[socket.socket] = []
    try:
        for ring in rings.by_socket:
            made.append(
                packet_socket(lambda sock: attach_classic(sock, program), ring=ring, join=group.join, lock=False)
            )
        if len(made) > 1:
            select_by(made[0], filters.classic_by_size(rings.small_packet_bytes))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return link_on(where, [sock.detach() for sock in made], packet_interface, rings)
