"""The server's demultiplexer: which channel gets the packets of which flow.

One PACKET_FANOUT group holds every channel of an address, with a socket for small packets and one for large ones.
Member 0 rejects, the next two are the server's, the others the channels'. With CAP_BPF the selector looks flows up in
maps, so that its cost does not grow with channels or flows; without, a classic program is replaced at each change of a
flow.

Two rules of the kernel shape this file (net/packet/af_packet.c): a leaving member's place is taken by the
last one; and a member that changes its ring leaves and joins again, which would shift the others. The
server therefore keeps every ring mapped, and the kernel then refuses such a change.

The group reassembles IPv4 fragments before it selects. Linux does that once for all groups of a network
namespace, so that only one of several groups there gets a fragmented datagram: one Demux (or embedded
stack) a namespace, if large datagrams matter.
"""

import contextlib
import errno
import mmap
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping
from ipaddress import IPv4Address
from types import MappingProxyType, TracebackType
from typing import Self

from ulnet.kernelshim import bpf, filters
from ulnet.kernelshim.channel import (
    DEFAULT_SLOTS,
    FANOUT_CBPF,
    FANOUT_EBPF,
    PACKET_FANOUT_DATA,
    SOL_PACKET,
    ChannelGrant,
    FanoutGroup,
    Ring,
    attach_classic,
    attach_extended,
    device,
    link_on,
    packet_socket,
    rings_for,
    select_by,
)
from ulnet.kernelshim.filters import Flow, Indices, Place
from ulnet.kernelshim.marks import CHANNEL_MASK, MARK_TAG, channel_mark
from ulnet.kernelshim.packet import PacketLink

__all__ = ["Demux", "Flow"]

DEFAULT_MAX_CHANNELS = 4096
_CHANNELS_MAX = CHANNEL_MASK // 2 - 1  # a fanout group has at most 65,536 members
_MAX_FLOWS = 1 << 20
_VNET_BYTES = 10  # struct virtio_net_hdr, before each frame that a PACKET_VNET_HDR socket sends
_PROBE_SECONDS = 0.05  # probes are answered within the send call, or after a little when the processor is busy
_SWEPT_AT_ONCE = 8
_PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)


class _Member:
    """One socket of a channel as the server sees it."""

    def __init__(self, key: int, sock: socket.socket, ring: Ring) -> None:
        self.key = key  # in the map of places; half of it is the channel's id
        self.sock: socket.socket | None = sock
        self.index = -1  # where the selector believes it stands; -1: nowhere yet
        self.inode = os.fstat(sock.fileno()).st_ino
        # Never touched: it only keeps the application from replacing the ring.
        self.pin = mmap.mmap(sock.fileno(), ring.total_bytes, mmap.MAP_SHARED, mmap.PROT_READ) if ring.slots else None

    def let_go(self) -> None:
        if self.pin is not None:
            self.pin.close()
            self.pin = None
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class _Channel:
    def __init__(self) -> None:
        self.members: list[_Member] = []  # of small packets and of large ones, or of both
        self.flows: set[Flow] = set()

    @property
    def indices(self) -> Indices:
        return Indices(self.members[0].index, self.members[-1].index)

    @property
    def is_open(self) -> bool:
        return self.members[0].sock is not None

    def let_go(self) -> None:
        for member in self.members:
            member.let_go()


def _living_inodes() -> set[int]:
    """Inodes of the packet sockets in this thread's network namespace."""
    with open("/proc/thread-self/net/packet") as table:
        next(table)
        return {int(line.rsplit(None, 1)[1]) for line in table}


class Demux:
    """Channels of one address on one interface, and the flows that lead to them.

    ``tag``: upper half of every channel's packet mark (the server's own channel carries none).
    ``ebpf``: None takes eBPF when this process may use it, else classic BPF (some 400 flows at most).
    Raises OSError when the interface does not exist or privilege is missing, ValueError for a bad argument.
    Not thread-safe: one thread of the server owns it.
    """

    def __init__(
        self,
        interface: str,
        address: IPv4Address,
        *,
        ebpf: bool | None = None,
        server_interface: str = "ipf",
        server_slots: int = DEFAULT_SLOTS,
        max_channels: int = DEFAULT_MAX_CHANNELS,
        tag: int = MARK_TAG,
    ) -> None:
        if not 2 <= max_channels <= _CHANNELS_MAX:
            raise ValueError(f"at most {max_channels} channels: it must be 2 to {_CHANNELS_MAX}")
        self.device = device(interface)
        self.place = Place(self.device.ifindex, self.device.loopback_ifindex, IPv4Address(address))
        self.ebpf = bpf.available() if ebpf is None else ebpf
        self._max_channels = max_channels
        self._tag = tag
        self._flows: dict[Flow, int] = {}
        self._order: list[_Member] = []  # fanout order, from the first channel's on
        self._channels: dict[int, _Channel] = {}
        self._unsure = False  # somebody joined while a closed channel was still held
        self._next_id = 1
        self._group = FanoutGroup(FANOUT_EBPF if self.ebpf else FANOUT_CBPF, 2 * max_channels + 3)
        self._sockets: list[socket.socket] = []
        self._server_interface = server_interface
        self._server_rings = rings_for(server_interface, self.device.mtu, slots=server_slots)
        self._server_indices = Indices(1, len(self._server_rings.by_socket))
        self._small_bytes = rings_for("ipf", self.device.mtu).small_packet_bytes
        self._remotes: Counter[tuple[int, int]] = Counter()  # by protocol and local port: flows with a remote end
        self._maps: filters.FlowMaps | None = None
        self._indices_map: bpf.Map | None = None
        self._place_map: bpf.Map | None = None
        try:
            self._open_maps()
            # With DEFRAG every member reassembles; the reject socket stands first and never leaves.
            self._reject = self._keep(packet_socket(self._reject_filter, join=self._group.join, lock=False))
            if self.ebpf:
                self._reject.setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, self._selector)
                os.close(self._selector)
            self._servers = [
                self._keep(packet_socket(self._server_filter, ring=ring, join=self._group.join, lock=False))
                for ring in self._server_rings.by_socket
            ]
            self._publish()
        except BaseException:
            self.close()
            raise

    # ---- set-up ----

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock

    def _open_maps(self) -> None:
        if not self.ebpf:
            return
        try:
            flows = bpf.Hash(filters.KEY_BYTES, 4, _MAX_FLOWS)
            self._maps = filters.FlowMaps(flows, bpf.Array(filters.PORT_BYTES, filters.PORTS))
            self._indices_map = bpf.Array(filters.INDICES_BYTES, self._max_channels + 1)
            self._place_map = bpf.Array(filters.PROBE_BYTES, 2 * (self._max_channels + 1))
            self._indices_map.update(struct.pack("=I", filters.SERVER_CHANNEL), self._server_indices.pack())
            selector = filters.extended_selector(
                self.place, self._maps, self._indices_map, self._server_indices, self._small_bytes
            )
            self._selector = bpf.load_socket_filter(selector)
        except PermissionError:
            raise PermissionError(errno.EPERM, "eBPF needs CAP_BPF: run as root, or pass ebpf=False") from None

    def _reject_filter(self, sock: socket.socket) -> None:
        attach_classic(sock, filters.classic_reject())

    def _server_filter(self, sock: socket.socket) -> None:
        if self._maps is None:
            attach_classic(sock, filters.classic_server_filter(self.place))
        else:
            attach_extended(sock, filters.extended_server_filter(self.place, self._maps))

    # ---- channels ----

    def open_server_channel(self) -> PacketLink:
        """The channel that gets what no other channel's flow matches, and ARP. One at a time."""
        fds = [os.dup(sock.fileno()) for sock in self._servers]
        return link_on(self.device, fds, self._server_interface, self._server_rings)

    def open_channel(self, interface: str = "ipf", *, slots: int = DEFAULT_SLOTS) -> ChannelGrant:
        """Make a channel without flows. The grant's ``fds`` belong to the caller: pass them on, then close them.

        ``slots``: of the ring of large frames. Raises OSError(ENOSPC) when all channels are in use.
        """
        if interface not in ("ipf", "shm", "ipc"):
            raise ValueError(f"packet interface {interface!r}: it must be one of 'ipf', 'shm', 'ipc'")
        self.sweep()
        leaving = self.leaving
        channel_id = self._free_id()
        rings = rings_for(interface, self.device.mtu, slots=slots)
        channel = self._channels[channel_id] = _Channel()
        try:
            for ring in rings.by_socket:
                self._add_member(channel, channel_id, ring)
        except BaseException:
            self._give_up(channel_id)
            raise
        for member in channel.members:
            self._show(member, self._order.index(member))
        if leaving:  # the one who leaves may have gone before this one joined, or goes after: its place is another's
            self._unsure = True
            self.sweep()
        return ChannelGrant(
            channel_id=channel_id,
            fds=tuple(os.dup(member.sock.fileno()) for member in channel.members if member.sock is not None),
            mark=channel_mark(channel_id, self._tag),
            interface=interface,
            rings=rings,
            device=self.device,
        )

    def _add_member(self, channel: _Channel, channel_id: int, ring: Ring) -> None:
        key = 2 * channel_id + len(channel.members)

        def attach(sock: socket.socket) -> None:
            if self._maps is None or self._place_map is None:
                attach_classic(sock, filters.classic_channel_filter(self.place))
            else:
                program = filters.extended_channel_filter(self.place, self._maps, self._place_map, channel_id, key)
                attach_extended(sock, program)

        sock = packet_socket(attach, ring=ring, mark=channel_mark(channel_id, self._tag), join=self._group.join)
        try:
            member = _Member(key, sock, ring)
        except BaseException:
            sock.close()
            raise
        channel.members.append(member)
        self._order.append(member)

    def _give_up(self, channel_id: int) -> None:
        """A channel that was not finished: nobody else holds its sockets, and they joined last."""
        channel = self._channels.pop(channel_id)
        for member in reversed(channel.members):
            self._order.remove(member)
            member.let_go()

    def _free_id(self) -> int:
        if len(self._channels) >= self._max_channels:
            raise OSError(errno.ENOSPC, f"all {self._max_channels} channels are in use")
        while self._next_id in self._channels:
            self._next_id = self._next_id % self._max_channels + 1
        channel_id = self._next_id
        self._next_id = channel_id % self._max_channels + 1
        return channel_id

    def close_channel(self, channel_id: int) -> bool:
        """Remove a channel and its flows; their packets go to the server from now on.

        False when somebody still holds a descriptor: the channel then receives nothing, keeps its id and
        its mark, and leaves for good at a later ``sweep`` (each open and close does one). Sweep soon and often while
        ``leaving``: when the last holder goes, another channel takes the place, and its packets stray until then.
        """
        channel = self._channel(channel_id)
        self._drop_flows(list(channel.flows))
        for member in list(channel.members):
            if member.sock is None:
                continue
            # The kernel moves the last member into the leaver's place. Say so first: a packet that comes
            # between finds a dying channel, whose filter drops it, and not the server, which would reset it.
            self._show(self._order[-1], self._order.index(member))
            member.let_go()
            # After each, so that it is known which left first. A look at every socket of the namespace: when a
            # crowd leaves, once for all of them.
            if sum(other.sock is None for other in self._order) <= _SWEPT_AT_ONCE:
                self.sweep()
        return channel_id not in self._channels

    @property
    def leaving(self) -> bool:
        """Some closed channel's descriptor was still held at the last look."""
        return any(member.sock is None for member in self._order)

    def sweep(self) -> int:
        """Take note of closed channels whose descriptors are gone by now; returns how many are still there."""
        leaving = [member for member in self._order if member.sock is None]
        if not leaving:
            return 0
        living = _living_inodes()
        gone = [member for member in leaving if member.inode not in living]
        for member in gone:
            at = self._order.index(member)
            last = self._order.pop()
            if last is not member:
                self._order[at] = last
            channel_id = member.key // 2
            self._channels[channel_id].members.remove(member)
            if not self._channels[channel_id].members:
                del self._channels[channel_id]
        if gone and (len(gone) > 1 or self._unsure):
            # Unseen, so nobody knows which left first, and whether before another joined: the places depend on it.
            self._find_places()
        self._unsure = self._unsure and len(leaving) > len(gone)
        # Also when none is gone: close_channel() has announced a move that did not happen.
        changed = [self._show(member, at, publish=False) for at, member in enumerate(self._order)]
        if any(changed) or gone:
            self._publish()
        return len({member.key // 2 for member in set(leaving) - set(gone)})

    def _find_places(self) -> None:
        """Ask the channels themselves where they stand, with a probe to each place of the group.

        Without eBPF, or with the loopback device down, nobody answers, and the order assumed so far stays.
        """
        if self._place_map is None:
            return
        nonce = os.urandom(filters.PROBE_BYTES - 4)
        first = self._server_indices.large + 1
        head = bytes(_VNET_BYTES + 12) + struct.pack("!H", filters.PROBE_ETHERTYPE)
        for index in range(first, first + len(self._order)):
            frame = head + struct.pack("=I", index) + nonce
            with contextlib.suppress(OSError):
                self._reject.sendto(frame.ljust(_VNET_BYTES + 60, b"\0"), ("lo", filters.PROBE_ETHERTYPE))
        until = time.monotonic() + _PROBE_SECONDS
        while True:
            answers = {
                struct.unpack_from("=I", answer)[0] - first: member
                for member in self._order
                if (answer := self._place_map.lookup(struct.pack("=I", member.key))) is not None and answer[4:] == nonce
            }
            if len(answers) == len(self._order):
                self._order = [answers[at] for at in sorted(answers)]
                return
            if time.monotonic() > until:
                return
            time.sleep(0.001)

    def channels(self) -> list[int]:
        """Ids of the channels that exist, those that wait for a last holder included."""
        return sorted(self._channels)

    def _channel(self, channel_id: int) -> _Channel:
        try:
            return self._channels[channel_id]
        except KeyError:
            raise ValueError(f"there is no channel {channel_id}") from None

    def _show(self, member: _Member, at: int, *, publish: bool = True) -> bool:
        """Tell the selector at which place of ``_order`` a channel's socket stands; False when it knew."""
        index = at + self._server_indices.large + 1
        if member.index == index:
            return False
        member.index = index
        channel_id = member.key // 2
        channel = self._channels[channel_id]
        if self._indices_map is not None:
            if min(channel.indices) >= 0:
                self._indices_map.update(struct.pack("=I", channel_id), channel.indices.pack())
        elif publish:
            self._publish()
        return True

    # ---- flows ----

    def add_flow(
        self, proto: int, laddr: IPv4Address, lport: int, raddr: IPv4Address | None, rport: int, channel_id: int
    ) -> None:
        """Lead a flow to a channel (0: to the server). ``raddr`` None and ``rport`` 0: from any remote.

        Raises ValueError for an impossible flow, OSError(EADDRINUSE) when it leads somewhere already.
        """
        flow = self._flow(proto, laddr, lport, raddr, rport)
        if flow in self._flows:
            raise OSError(errno.EADDRINUSE, f"{flow} leads to channel {self._flows[flow]} already")
        self._lead(flow, channel_id)

    def move_flow(
        self, proto: int, laddr: IPv4Address, lport: int, raddr: IPv4Address | None, rport: int, channel_id: int
    ) -> None:
        """Lead a known flow to another channel (0: to the server), from one packet to the next. Raises KeyError."""
        flow = self._flow(proto, laddr, lport, raddr, rport)
        if flow not in self._flows:
            raise KeyError(flow)
        self._lead(flow, channel_id)

    def remove_flow(self, proto: int, laddr: IPv4Address, lport: int, raddr: IPv4Address | None, rport: int) -> None:
        """Forget a flow: its packets go to the server, or to a wildcard that matches. Raises KeyError."""
        self._drop_flows([self._flow(proto, laddr, lport, raddr, rport)])

    def flows(self) -> Mapping[Flow, int]:
        """Every flow and the channel it leads to; a read-only view."""
        return MappingProxyType(self._flows)

    def _flow(self, proto: int, laddr: IPv4Address, lport: int, raddr: IPv4Address | None, rport: int) -> Flow:
        if proto not in _PROTOCOLS:
            raise ValueError(f"protocol {proto}: a flow is TCP (6) or UDP (17)")
        if laddr != self.place.address:
            raise ValueError(f"local address {laddr}: this demultiplexer serves {self.place.address}")
        if not 1 <= lport <= 65535:
            raise ValueError(f"local port {lport}: it must be 1 to 65535")
        if (raddr is None) != (rport == 0) or not 0 <= rport <= 65535:
            raise ValueError(f"remote {raddr} port {rport}: give both (port 1 to 65535), or None and 0 for any")
        return Flow(proto, laddr, lport, raddr, rport)

    def _lead(self, flow: Flow, channel_id: int) -> None:
        if channel_id != filters.SERVER_CHANNEL and not self._channel(channel_id).is_open:
            raise ValueError(f"channel {channel_id} is closed")
        before = self._flows.get(flow)
        self._note(flow, channel_id)
        try:
            self._map(flow, channel_id)
            self._publish()
        except OSError:
            self._note(flow, before)
            raise

    def _map(self, flow: Flow, channel_id: int | None) -> None:
        """Tell the extended programs, if it is them. None: it leads nowhere."""
        if self._maps is None:
            return
        if flow.raddr is not None:
            if channel_id is None:
                self._maps.flows.delete(filters.flow_key(flow))
            else:
                self._maps.flows.update(filters.flow_key(flow), struct.pack("=I", channel_id))
            if self._remotes[flow.proto, flow.lport] > 1:
                return  # the port has such flows, and had some before
        any_remote = self._flows.get(flow._replace(raddr=None, rport=0))
        entry = filters.port_entry(any_remote, (flow.proto, flow.lport) in self._remotes)
        self._maps.ports.update(filters.port_key(flow.proto, flow.lport), entry)

    def _note(self, flow: Flow, channel_id: int | None) -> None:
        """Keep the records of flows: where each leads (None: nowhere), which lead to a channel, which have a remote."""
        before = self._flows.pop(flow, None)
        if flow.raddr is not None and (before is None) != (channel_id is None):
            port = flow.proto, flow.lport
            self._remotes[port] += 1 if before is None else -1
            if not self._remotes[port]:
                del self._remotes[port]
        if before is not None and before != filters.SERVER_CHANNEL:
            self._channels[before].flows.discard(flow)
        if channel_id is not None:
            self._flows[flow] = channel_id
            if channel_id != filters.SERVER_CHANNEL:
                self._channels[channel_id].flows.add(flow)

    def _drop_flows(self, flows: list[Flow]) -> None:
        for flow in flows:
            if flow not in self._flows:
                raise KeyError(flow)
            self._note(flow, None)
            self._map(flow, None)
        if flows:
            self._publish()

    def _publish(self) -> None:
        """Replace the classic selector; nothing to do with maps."""
        if self._maps is not None:
            return
        flows = {flow: self._indices_of(channel_id) for flow, channel_id in self._flows.items()}
        program = filters.classic_selector(self.place, flows, self._server_indices, self._small_bytes)
        select_by(self._reject, program)

    def _indices_of(self, channel_id: int) -> Indices:
        if channel_id == filters.SERVER_CHANNEL:
            return self._server_indices
        return self._channels[channel_id].indices

    # ---- end ----

    def close(self) -> None:
        """Close every socket of the server's. Channels that applications hold stay open, but get nothing new."""
        for channel in self._channels.values():
            channel.let_go()
        self._channels.clear()
        self._order.clear()
        self._flows.clear()
        for sock in reversed(self._sockets):
            sock.close()
        self._sockets.clear()
        for table in (*(self._maps or ()), self._indices_map, self._place_map):
            if table is not None:
                table.close()
        self._maps = self._indices_map = self._place_map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
