"""The server's demultiplexer: which channel gets the packets of which flow.

One PACKET_FANOUT group holds every channel of an address. Member 0 rejects, member 1 is the server, the
others are channels. With CAP_BPF the selector looks flows up in a map, so that its cost does not grow with
channels or flows; without, a classic program is replaced at each change of a flow.

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
    FANOUT_FLAG_DEFRAG,
    FANOUT_FLAG_IGNORE_OUTGOING,
    FANOUT_FLAG_UNIQUEID,
    NO_RING,
    PACKET_FANOUT,
    PACKET_FANOUT_DATA,
    SOL_PACKET,
    ChannelGrant,
    Ring,
    attach_classic,
    attach_extended,
    device,
    fanout_arguments,
    packet_socket,
    ring_for,
)
from ulnet.kernelshim.filters import Flow, Place
from ulnet.kernelshim.marks import CHANNEL_MASK, MARK_TAG, channel_mark
from ulnet.kernelshim.packet import PacketLink

__all__ = ["Demux", "Flow"]

DEFAULT_MAX_CHANNELS = 4096
_MAX_FLOWS = 1 << 20
_VNET_BYTES = 10  # struct virtio_net_hdr, before each frame that a PACKET_VNET_HDR socket sends
_PROBE_SECONDS = 0.05  # probes are answered within the send call, or after a little when the processor is busy
_SWEPT_AT_ONCE = 4
_PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)


class _Member:
    """One channel as the server sees it."""

    def __init__(self, channel_id: int, sock: socket.socket, ring: Ring) -> None:
        self.channel_id = channel_id
        self.sock: socket.socket | None = sock
        self.flows: set[Flow] = set()
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


def _living_inodes() -> set[int]:
    """Inodes of the packet sockets in this thread's network namespace."""
    with open("/proc/thread-self/net/packet") as table:
        next(table)
        return {int(line.rsplit(None, 1)[1]) for line in table}


class Demux:
    """Channels of one address on one interface, and the flows that lead to them.

    ``tag``: upper half of every channel's packet mark (the server's own channel carries none).
    ``ebpf``: None takes eBPF when this process may use it, else classic BPF (some 500 flows at most).
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
        if not 2 <= max_channels <= CHANNEL_MASK:
            raise ValueError(f"at most {max_channels} channels: it must be 2 to {CHANNEL_MASK}")
        self.device = device(interface)
        self.place = Place(self.device.ifindex, self.device.loopback_ifindex, IPv4Address(address))
        self.ebpf = bpf.available() if ebpf is None else ebpf
        self._max_channels = max_channels
        self._tag = tag
        self._flows: dict[Flow, int] = {}
        self._order: list[_Member] = []  # fanout order, from SERVER_INDEX + 1 on
        self._members: dict[int, _Member] = {}
        self._unsure = False  # somebody joined while a closed channel was still held
        self._next_id = 1
        self._group: int | None = None
        self._sockets: list[socket.socket] = []
        self._server_interface = server_interface
        self._remotes: Counter[tuple[int, int]] = Counter()  # by protocol and local port: flows with a remote end
        self._maps: filters.FlowMaps | None = None
        self._slot_map: bpf.Map | None = None
        self._place_map: bpf.Map | None = None
        try:
            self._open_maps()
            # With DEFRAG every member reassembles; the reject socket stands first and never leaves.
            self._reject = self._keep(packet_socket(self._reject_filter, join=self._join, lock=False))
            self._server_ring = NO_RING if server_interface == "ipc" else ring_for(server_slots)
            self._server = self._keep(
                packet_socket(
                    self._server_filter,
                    ring=self._server_ring,
                    join=self._join,
                    lock=False,
                )
            )
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
            self._slot_map = bpf.Array(4, self._max_channels + 1)
            self._place_map = bpf.Array(filters.PROBE_BYTES, self._max_channels + 1)
            self._slot_map.update(struct.pack("=I", filters.SERVER_CHANNEL), struct.pack("=I", filters.SERVER_INDEX))
            self._selector = bpf.load_socket_filter(filters.extended_selector(self.place, self._maps, self._slot_map))
        except PermissionError:
            raise PermissionError(errno.EPERM, "eBPF needs CAP_BPF: run as root, or pass ebpf=False") from None

    def _reject_filter(self, sock: socket.socket) -> None:
        attach_classic(sock, filters.classic_reject())

    def _server_filter(self, sock: socket.socket) -> None:
        if self._maps is None:
            attach_classic(sock, filters.classic_server_filter(self.place))
        else:
            attach_extended(sock, filters.extended_server_filter(self.place, self._maps))

    def _join(self, sock: socket.socket) -> None:
        kind = FANOUT_EBPF if self.ebpf else FANOUT_CBPF
        flags = FANOUT_FLAG_IGNORE_OUTGOING | FANOUT_FLAG_DEFRAG
        members = self._max_channels + 2
        if self._group is None:
            flags |= FANOUT_FLAG_UNIQUEID
            sock.setsockopt(SOL_PACKET, PACKET_FANOUT, fanout_arguments(0, kind, flags, members))
            self._group = sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF
            if self.ebpf:
                sock.setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, self._selector)
                os.close(self._selector)
        else:
            sock.setsockopt(SOL_PACKET, PACKET_FANOUT, fanout_arguments(self._group, kind, flags, members))

    # ---- channels ----

    def open_server_channel(self) -> PacketLink:
        """The channel that gets what no other channel's flow matches, and ARP. One at a time."""
        return self._link(self._server, self._server_interface, self._server_ring)

    def _link(self, sock: socket.socket, interface: str, ring: Ring) -> PacketLink:
        return PacketLink(
            os.dup(sock.fileno()),
            ifindex=self.device.ifindex,
            loopback_ifindex=self.device.loopback_ifindex,
            mac=self.device.mac,
            mtu=self.device.mtu,
            interface=interface,
            slots=ring.slots,
            slot_bytes=ring.slot_bytes,
        )

    def open_channel(self, interface: str = "ipf", *, slots: int = DEFAULT_SLOTS) -> ChannelGrant:
        """Make a channel without flows. The grant's ``fd`` belongs to the caller: pass it on, then close it.

        Raises OSError(ENOSPC) when all channels are in use.
        """
        if interface not in ("ipf", "shm", "ipc"):
            raise ValueError(f"packet interface {interface!r}: it must be one of 'ipf', 'shm', 'ipc'")
        self.sweep()
        leaving = self.leaving
        channel_id = self._free_id()
        ring = NO_RING if interface == "ipc" else ring_for(slots)

        def attach(sock: socket.socket) -> None:
            if self._maps is None or self._place_map is None:
                attach_classic(sock, filters.classic_channel_filter(self.place))
            else:
                program = filters.extended_channel_filter(self.place, self._maps, self._place_map, channel_id)
                attach_extended(sock, program)

        sock = packet_socket(attach, ring=ring, mark=channel_mark(channel_id, self._tag), join=self._join)
        try:
            member = _Member(channel_id, sock, ring)
        except BaseException:
            sock.close()
            raise
        self._members[channel_id] = member
        self._order.append(member)
        self._show(member, len(self._order) - 1)
        if leaving:  # the one who leaves may have gone before this one joined, or goes after: its place is another's
            self._unsure = True
            self.sweep()
        return ChannelGrant(
            channel_id=channel_id,
            fd=os.dup(sock.fileno()),
            mark=channel_mark(channel_id, self._tag),
            interface=interface,
            slots=ring.slots,
            slot_bytes=ring.slot_bytes,
            ifindex=self.device.ifindex,
            loopback_ifindex=self.device.loopback_ifindex,
            mac=self.device.mac,
            mtu=self.device.mtu,
        )

    def _free_id(self) -> int:
        if len(self._members) >= self._max_channels:
            raise OSError(errno.ENOSPC, f"all {self._max_channels} channels are in use")
        while self._next_id in self._members:
            self._next_id = self._next_id % self._max_channels + 1
        channel_id = self._next_id
        self._next_id = channel_id % self._max_channels + 1
        return channel_id

    def close_channel(self, channel_id: int) -> bool:
        """Remove a channel and its flows; their packets go to the server from now on.

        False when somebody still holds the descriptor: the channel then receives nothing, keeps its id and
        its mark, and leaves for good at a later ``sweep`` (each open and close does one). Sweep soon and often while
        ``leaving``: when the last holder goes, another channel takes the place, and its packets stray until then.
        """
        member = self._member(channel_id)
        self._drop_flows(list(member.flows))
        if member.sock is not None:
            # The kernel moves the last member into the leaver's place. Say so first: a packet that comes
            # between finds a dying channel, whose filter drops it, and not the server, which would reset it.
            self._show(self._order[-1], self._order.index(member))
            member.let_go()
        if sum(other.sock is None for other in self._order) <= _SWEPT_AT_ONCE:
            self.sweep()  # it looks at every socket of the namespace: when a crowd leaves, once for all of them
        return channel_id not in self._members

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
            del self._members[member.channel_id]
        if gone and (len(gone) > 1 or self._unsure):
            # Unseen, so nobody knows which left first, and whether before another joined: the places depend on it.
            self._find_places()
        self._unsure = self._unsure and len(leaving) > len(gone)
        # Also when none is gone: close_channel() has announced a move that did not happen.
        changed = [self._show(member, at, publish=False) for at, member in enumerate(self._order)]
        if any(changed) or gone:
            self._publish()
        return len(leaving) - len(gone)

    def _find_places(self) -> None:
        """Ask the channels themselves where they stand, with a probe to each place of the group.

        Without eBPF, or with the loopback device down, nobody answers, and the order assumed so far stays.
        """
        if self._place_map is None:
            return
        nonce = os.urandom(filters.PROBE_BYTES - 4)
        first = filters.SERVER_INDEX + 1
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
                if (answer := self._place_map.lookup(struct.pack("=I", member.channel_id))) is not None
                and answer[4:] == nonce
            }
            if len(answers) == len(self._order):
                self._order = [answers[at] for at in sorted(answers)]
                return
            if time.monotonic() > until:
                return
            time.sleep(0.001)

    def channels(self) -> list[int]:
        """Ids of the channels that exist, those that wait for a last holder included."""
        return sorted(self._members)

    def _member(self, channel_id: int) -> _Member:
        try:
            return self._members[channel_id]
        except KeyError:
            raise ValueError(f"there is no channel {channel_id}") from None

    def _show(self, member: _Member, at: int, *, publish: bool = True) -> bool:
        """Tell the selector at which place of ``_order`` a channel's socket stands; False when it knew."""
        index = at + filters.SERVER_INDEX + 1
        if member.index == index:
            return False
        member.index = index
        if self._slot_map is not None:
            self._slot_map.update(struct.pack("=I", member.channel_id), struct.pack("=I", index))
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
        if channel_id != filters.SERVER_CHANNEL and self._member(channel_id).sock is None:
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
            self._members[before].flows.discard(flow)
        if channel_id is not None:
            self._flows[flow] = channel_id
            if channel_id != filters.SERVER_CHANNEL:
                self._members[channel_id].flows.add(flow)

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
        program = filters.classic_selector(
            self.place, {flow: self._index_of(channel_id) for flow, channel_id in self._flows.items()}
        )
        argument, memory = bpf.attachable(program)
        # Through the reject socket: the kernel takes this only from a member whose filter is not locked.
        self._sockets[0].setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, argument)
        del memory

    def _index_of(self, channel_id: int) -> int:
        return filters.SERVER_INDEX if channel_id == filters.SERVER_CHANNEL else self._members[channel_id].index

    # ---- end ----

    def close(self) -> None:
        """Close every socket of the server's. Channels that applications hold stay open, but get nothing new."""
        for member in self._members.values():
            member.let_go()
        self._members.clear()
        self._order.clear()
        self._flows.clear()
        for sock in reversed(self._sockets):
            sock.close()
        self._sockets.clear()
        for table in (*(self._maps or ()), self._slot_map, self._place_map):
            if table is not None:
                table.close()
        self._maps = self._slot_map = self._place_map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
