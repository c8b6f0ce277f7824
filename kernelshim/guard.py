"""The outgoing guard: nf_tables rules that bind what channels send to their endpoints, and keep the kernel away.

Read first: https://docs.kernel.org/networking/netlink_spec/nftables.html, nft(8) "netdev family".

One table of family netdev per served address, in the network namespace it is made in:

- *egress*, on every device: a packet with the channel tag in its mark passes only from the served interface
  or loopback, and only as plain IPv4 whose (mark, source address, protocol, source port) is in the set
  ``allowed``. What else carries the tag is dropped, and its sender gets ENOBUFS. This holds under
  PACKET_QDISC_BYPASS, too, which skips tc. The tag is taken off what passes, so that a device below the
  served one (the parent of a VLAN, a bridge port) lets it through.
- *ingress*, on the served interface and loopback: IPv4 to the address and ARP about it end here, after the
  packet sockets and before the kernel's own stack, which would answer with RST or route the packet on.

Devices that appear later are told to ``add_device``. (Linux 6.18 could match every name with one chain, but
nft(8) 1.0 then never ends listing the rules.)

What nf_tables cannot see is the virtio_net_hdr beside the packet: its csum_start and csum_offset let a sender have
16 bits of a single frame overwritten by a checksum after the guard has looked, on devices that compute checksums
themselves. A channel whose application must be held against that, too, is made without PACKET_VNET_HDR.

The table outlives its maker: if the server dies its channels keep their endpoints and gain none. The next
``Guard`` of the same address replaces it in one transaction.

Messages are written here rather than by pyroute2's NFTSocket: that one sends through an event loop, half a
millisecond a transaction, and gives the kernel's errors to nobody. The constants are pyroute2's.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from types import TracebackType

from pyroute2.netlink import (  # type: ignore[import-untyped,unused-ignore]
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_REQUEST,
)
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES  # type: ignore[import-untyped,unused-ignore]
from pyroute2.netlink.nfnetlink.nftsocket import (  # type: ignore[import-untyped,unused-ignore]
    NFPROTO_NETDEV,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETOBJ,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWOBJ,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    Cmp,
    Meta,
)

from .marks import MARK_MASK, MARK_TAG, channel_mark

#: A local endpoint of a channel: channel id, protocol (6 TCP, 17 UDP), local address, local port.
Endpoint = tuple[int, int, str, int]

_SET = "allowed"
_REFUSED = "refused"  # counter of tagged packets dropped on egress
_HIDDEN = "hidden"  # counter of packets kept from the kernel's stack on ingress
_SET_ID = 1

# linux/netlink.h, linux/netfilter/nfnetlink.h
_NLMSG_ERROR = 2
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
# linux/netfilter/nf_tables.h
_NFT_REG_VERDICT = 0
_NFT_REG32_00 = 8
_PAYLOAD_LL, _PAYLOAD_NETWORK, _PAYLOAD_TRANSPORT = 0, 1, 2
_NF_DROP, _NF_ACCEPT = 0, 1
_OBJECT_COUNTER = 1
_HOOK_INGRESS, _HOOK_EGRESS = 0, 1
_PRIORITY = -300  # before whatever else filters here: cheapest for what is dropped
# How nft(8) names the key when it lists the set: mark . ipv4_addr . inet_proto . inet_service, 6 bits each.
_KEY_TYPE = 19 << 18 | 7 << 12 | 12 << 6 | 13
_KEY_BYTES = 16
# With a bound the kernel takes a table of fixed size, which is looked up faster than one that grows. As many as TCP and
# UDP have ports: an endpoint of several channels (SO_REUSEPORT) counts for each. 2 MiB.
_SET_MAX = 1 << 17
# One transaction must fit the socket's send buffer, one element list an attribute (64 KiB).
_ELEMENTS_PER_BATCH = 1000

_ETH_P_IP = b"\x08\x00"
_ETH_P_ARP = b"\x08\x06"


# -- netlink encoding (netlink(7): attributes are length, type, payload, padding to 4) -------------------


def _attr(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def _nest(kind: int, *attrs: bytes) -> bytes:
    return _attr(kind | 0x8000, b"".join(attrs))  # NLA_F_NESTED


def _text(kind: int, value: str) -> bytes:
    return _attr(kind, value.encode() + b"\0")


def _be32(kind: int, value: int) -> bytes:
    return _attr(kind, struct.pack(">I", value & 0xFFFFFFFF))


def _message(kind: int, flags: int, body: bytes, family: int = NFPROTO_NETDEV, resource: int = 0) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, flags, 0, 0, family, 0, socket.htons(resource)) + body


def _nft(message: int, *attrs: bytes, flags: int = NLM_F_REQUEST | NLM_F_CREATE) -> bytes:
    return _message(NFNL_SUBSYS_NFTABLES << 8 | message, flags, b"".join(attrs))


_BEGIN = _message(_BATCH_BEGIN, NLM_F_REQUEST, b"", 0, NFNL_SUBSYS_NFTABLES)
_END = _message(_BATCH_END, NLM_F_REQUEST, b"", 0, NFNL_SUBSYS_NFTABLES)


# -- expressions: what nft(8) --debug=netlink prints -----------------------------------------------------


def _expression(name: str, *attrs: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *attrs))


def _meta(key: int, register: int = 0) -> bytes:
    return _expression("meta", _be32(1, _NFT_REG32_00 + register), _be32(2, key))


def _payload(base: int, offset: int, length: int, register: int = 0) -> bytes:
    return _expression(
        "payload", _be32(1, _NFT_REG32_00 + register), _be32(2, base), _be32(3, offset), _be32(4, length)
    )


def _masked(mask: bytes) -> bytes:
    register = _NFT_REG32_00
    zero = bytes(len(mask))
    return _expression(
        "bitwise",
        _be32(1, register),
        _be32(2, register),
        _be32(3, len(mask)),
        _nest(4, _attr(1, mask)),
        _nest(5, _attr(1, zero)),
    )


def _compare(value: bytes, operation: int = Cmp.NFT_CMP_EQ) -> bytes:
    return _expression("cmp", _be32(1, _NFT_REG32_00), _be32(2, operation), _nest(3, _attr(1, value)))


def _lookup(name: str) -> bytes:
    return _expression("lookup", _text(1, name), _be32(2, _NFT_REG32_00), _be32(4, _SET_ID))


def _count(name: str) -> bytes:
    return _expression("objref", _be32(1, _OBJECT_COUNTER), _text(2, name))


def _verdict(code: int) -> bytes:
    return _expression("immediate", _be32(1, _NFT_REG_VERDICT), _nest(2, _nest(2, _be32(1, code))))


def _clear_mark() -> bytes:
    return _expression("immediate", _be32(1, _NFT_REG32_00), _nest(2, _attr(1, bytes(4)))) + _expression(
        "meta", _be32(3, _NFT_REG32_00), _be32(2, Meta.NFT_META_MARK)
    )


def _host32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def _element(channel_mark_value: int, proto: int, address: bytes, port: int) -> bytes:
    key = struct.pack("=I4sB3x", channel_mark_value, address, proto) + struct.pack(">H2x", port)
    # As _nest(1, _nest(1, _attr(1, key))), without the calls: this is done at every connection.
    return b"\x1c\x00\x01\x80\x18\x00\x01\x80\x14\x00\x01\x00" + key if _LITTLE else _nest(1, _nest(1, _attr(1, key)))


_LITTLE = sys.byteorder == "little"


class Guard:
    """The guard of one served address, in the current network namespace.

    ``interface``: device the address is served on. ``address``: the user-level IPv4 address.
    ``devices``: names of every device where tagged packets must be watched; None for all there are now
    (``add_device`` for later ones). ``allow``: endpoints allowed from the start, for a server that takes
    over sessions. ``tag``: upper half of the marks guarded; two guards that share a device need two tags.

    Raises ValueError for a bad address, OSError (ENODEV) for an unknown interface, PermissionError without
    CAP_NET_ADMIN, OSError (EOPNOTSUPP) when the kernel has no netdev egress hook (Linux < 5.16).
    """

    def __init__(
        self,
        interface: str,
        address: str,
        *,
        devices: Iterable[str] | None = None,
        allow: Iterable[Endpoint] = (),
        tag: int = MARK_TAG,
    ) -> None:
        try:
            self._address = IPv4Address(address).packed
        except ValueError:
            raise ValueError(f"guard: {address!r} is not an IPv4 address") from None
        if tag & ~MARK_MASK or not tag:
            raise ValueError(f"guard: tag {tag:#x} must lie within {MARK_MASK:#x} and not be 0")
        self.interface = interface
        self.address = address
        self.table = f"ulnet_{address.replace('.', '_')}"
        self._tag = tag
        self._devices: dict[str, int] = {}
        self._allowed: dict[Endpoint, bytes] = {}
        self._lock = threading.Lock()
        self._put_head = self._element_list_head(NFT_MSG_NEWSETELEM)
        self._take_head = self._element_list_head(NFT_MSG_DELSETELEM)
        index = _interface_index(interface)
        if devices is None:
            # Devices without Ethernet headers (tunnels) cannot be spoofed at this layer, but are watched alike.
            devices = [name for _, name in socket.if_nameindex()]
        watched = {interface: index, "lo": _interface_index("lo")}
        watched |= {name: _interface_index(name) for name in devices}

        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 0))
            first = {endpoint: self._encode(endpoint) for endpoint in allow}
            now, later = list(first.items())[:_ELEMENTS_PER_BATCH], list(first)[_ELEMENTS_PER_BATCH:]
            batch = [
                # Creating what may exist makes deleting it always right: one transaction replaces a stale table.
                _nft(NFT_MSG_NEWTABLE, _text(1, self.table)),
                _nft(NFT_MSG_DELTABLE, _text(1, self.table)),
                _nft(NFT_MSG_NEWTABLE, _text(1, self.table)),
                self._counter(_REFUSED),
                self._counter(_HIDDEN),
                self._set(),
            ]
            for name, number in watched.items():
                batch += self._chains(name, number)
            if now:
                batch.append(self._elements(NFT_MSG_NEWSETELEM, [key for _, key in now]))
            self._commit(batch, f"guard of {address} on {interface}")
            self._devices = watched
            self._allowed.update(now)
            self.update(allow=later)
        except BaseException:
            self._socket.close()
            raise

    # -- endpoints -----------------------------------------------------------------------------------

    def allow(self, channel_id: int, proto: int, laddr: str, lport: int) -> None:
        """Let the channel send from the endpoint. Allowing it twice is the same as once."""
        self.update(allow=((channel_id, proto, laddr, lport),))

    def revoke(self, channel_id: int, proto: int, laddr: str, lport: int) -> None:
        """Take the endpoint from the channel; when this returns, nothing more leaves from it."""
        self.update(revoke=((channel_id, proto, laddr, lport),))

    def update(self, allow: Iterable[Endpoint] = (), revoke: Iterable[Endpoint] = ()) -> None:
        """Allow and revoke many endpoints; up to 1000 of them in one transaction (revoked ones first)."""
        with self._lock:
            allowed = self._allowed
            out = {e: allowed[e] for e in revoke if e in allowed}
            into = {e: self._encode(e) for e in allow if e not in allowed or e in out}
            changes = [(NFT_MSG_DELSETELEM, e, key) for e, key in out.items()]
            changes += [(NFT_MSG_NEWSETELEM, e, key) for e, key in into.items()]
            for start in range(0, len(changes), _ELEMENTS_PER_BATCH):
                part = changes[start : start + _ELEMENTS_PER_BATCH]
                taken = [key for what, _, key in part if what == NFT_MSG_DELSETELEM]
                put = [key for what, _, key in part if what == NFT_MSG_NEWSETELEM]
                messages = [self._elements(NFT_MSG_DELSETELEM, taken)] if taken else []
                if put:
                    messages.append(self._elements(NFT_MSG_NEWSETELEM, put))
                self._commit(messages, f"guard of {self.address}")
                for what, endpoint, key in part:
                    if what == NFT_MSG_DELSETELEM:
                        del allowed[endpoint]
                    else:
                        allowed[endpoint] = key

    def allowed(self) -> list[Endpoint]:
        """Every endpoint allowed now."""
        with self._lock:
            return list(self._allowed)

    # -- devices -------------------------------------------------------------------------------------

    def add_device(self, name: str) -> None:
        """Watch a device that appeared after the guard was made. Raises OSError (ENODEV) if there is none."""
        index = _interface_index(name)
        with self._lock:
            if self._devices.get(name) == index:
                return
            self._commit(self._chains(name, index), f"guard of {self.address}: device {name}")
            self._devices[name] = index

    def devices(self) -> list[str]:
        """Names of the devices watched."""
        with self._lock:
            return list(self._devices)

    # -- what it saw ---------------------------------------------------------------------------------

    def refused(self) -> int:
        """Packets of channels that were dropped because they came from no endpoint of theirs."""
        return self._read_counter(_REFUSED)

    def hidden(self) -> int:
        """Packets that were kept from the kernel's own stack."""
        return self._read_counter(_HIDDEN)

    def close(self) -> None:
        """Remove the table, and with it every restriction: close the channels first. Safe to call twice."""
        with self._lock:
            if self._socket.fileno() < 0:
                return
            try:
                self._commit([_nft(NFT_MSG_DELTABLE, _text(1, self.table))], f"guard of {self.address}")
            except FileNotFoundError:
                pass  # removed by somebody else
            finally:
                self._socket.close()

    def abandon(self) -> None:
        """Forget the guard and leave its table in force, as the death of the process would."""
        with self._lock:
            self._socket.close()

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the table's parts ---------------------------------------------------------------------------

    def _counter(self, name: str) -> bytes:
        return _nft(NFT_MSG_NEWOBJ, _text(1, self.table), _text(2, name), _be32(3, _OBJECT_COUNTER), _nest(4))

    def _set(self) -> bytes:
        return _nft(
            NFT_MSG_NEWSET,
            _text(1, self.table),
            _text(2, _SET),
            _be32(3, 0),
            _be32(4, _KEY_TYPE),
            _be32(5, _KEY_BYTES),
            _nest(9, _be32(1, _SET_MAX)),
            _be32(10, _SET_ID),
        )

    def _chains(self, device: str, index: int) -> list[bytes]:
        """The chains of one device. The index in their names tells a device from its namesake before it."""
        served = device in (self.interface, "lo")
        egress = f"out_{index}_{device}"
        messages = [self._chain(egress, device, _HOOK_EGRESS)]
        if served:
            # The tag first: what the kernel itself sends pays for two comparisons and no more.
            messages.append(self._rule(egress, *self._tagged(Cmp.NFT_CMP_NEQ), _verdict(_NF_ACCEPT)))
            messages.append(self._rule(egress, *self._own_endpoint(), _clear_mark(), _verdict(_NF_ACCEPT)))
            messages.append(self._rule(egress, _count(_REFUSED), _verdict(_NF_DROP)))
        else:
            messages.append(self._rule(egress, *self._tagged(Cmp.NFT_CMP_EQ), _count(_REFUSED), _verdict(_NF_DROP)))
        if served:
            ingress = f"in_{index}_{device}"
            messages.append(self._chain(ingress, device, _HOOK_INGRESS))
            hide = (_compare(self._address), _count(_HIDDEN), _verdict(_NF_DROP))
            is_ip = (_meta(Meta.NFT_META_PROTOCOL), _compare(_ETH_P_IP))
            is_arp = (_meta(Meta.NFT_META_PROTOCOL), _compare(_ETH_P_ARP))
            messages.append(self._rule(ingress, *is_ip, _payload(_PAYLOAD_NETWORK, 16, 4), *hide))
            # ARP about the address: asked for, answered to (target), announced or probed (sender). RFC 826
            messages.append(self._rule(ingress, *is_arp, _payload(_PAYLOAD_NETWORK, 24, 4), *hide))
            messages.append(self._rule(ingress, *is_arp, _payload(_PAYLOAD_NETWORK, 14, 4), *hide))
        return messages

    def _chain(self, name: str, device: str, hook: int) -> bytes:
        return _nft(
            NFT_MSG_NEWCHAIN,
            _text(1, self.table),
            _text(3, name),
            _nest(4, _be32(1, hook), _be32(2, _PRIORITY), _text(3, device)),
            _be32(5, _NF_ACCEPT),
            _text(7, "filter"),
        )

    def _rule(self, chain: str, *expressions: bytes) -> bytes:
        flags = NLM_F_REQUEST | NLM_F_CREATE | 0x800  # NLM_F_APPEND
        return _nft(NFT_MSG_NEWRULE, _text(1, self.table), _text(2, chain), _nest(4, *expressions), flags=flags)

    def _tagged(self, operation: int) -> Sequence[bytes]:
        return _meta(Meta.NFT_META_MARK), _masked(_host32(MARK_MASK)), _compare(_host32(self._tag), operation)

    def _own_endpoint(self) -> Sequence[bytes]:
        return (
            # The sender chooses skb->protocol (sll_protocol of sendto), and with it where the kernel takes the
            # network header to be. So the type in the frame must be IPv4, and the kernel must think so, too.
            # (Under QDISC_BYPASS a claimed type leaves the kernel without the frame's: no match, so refused.)
            # Version 4, no options: source routing is not for channels, and ports stand at a fixed place. (That byte
            # follows the type, and the kernel reads link-layer bytes the slow way, so they are read together.)
            _payload(_PAYLOAD_LL, 12, 3),
            _compare(_ETH_P_IP + b"\x45"),
            _meta(Meta.NFT_META_PROTOCOL),
            _compare(_ETH_P_IP),
            # Fragments but the first have no ports to check. (Four bytes: the kernel has no short way to mask two.)
            _payload(_PAYLOAD_NETWORK, 4, 4),
            _masked(b"\0\0\x1f\xff"),
            _compare(bytes(4)),
            _meta(Meta.NFT_META_MARK, 0),
            _payload(_PAYLOAD_NETWORK, 12, 4, 1),
            _payload(_PAYLOAD_NETWORK, 9, 1, 2),
            _payload(_PAYLOAD_TRANSPORT, 0, 2, 3),
            _lookup(_SET),
        )

    def _encode(self, endpoint: Endpoint) -> bytes:
        channel_id, proto, laddr, lport = endpoint
        if proto not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            raise ValueError(f"guard: protocol {proto} cannot be allowed, only TCP (6) and UDP (17)")
        if not 0 < lport < 65536:
            raise ValueError(f"guard: local port {lport} is not within 1 to 65535")
        if laddr == self.address:
            address = self._address
        else:
            raise ValueError(f"guard: {laddr} is not the guarded address {self.address}")
        return _element(channel_mark(channel_id, self._tag), proto, address, lport)

    def _element_list_head(self, message: int) -> tuple[int, bytes]:
        return NFNL_SUBSYS_NFTABLES << 8 | message, _text(1, self.table) + _text(2, _SET)

    def _elements(self, message: int, keys: Sequence[bytes]) -> bytes:
        kind, head = self._put_head if message == NFT_MSG_NEWSETELEM else self._take_head
        return _message(kind, NLM_F_REQUEST | NLM_F_CREATE, head + _nest(3, *keys))

    # -- talking to the kernel -----------------------------------------------------------------------

    def _commit(self, messages: Sequence[bytes], what: str) -> None:
        """One transaction. The kernel works it off inside send(); an answer comes only when something failed."""
        self._socket.send(b"".join((_BEGIN, *messages, _END)))
        failure = 0
        while True:
            try:
                answer = self._socket.recv(65536)
            except BlockingIOError:
                break
            for kind, body in _split(answer):
                if kind == _NLMSG_ERROR:
                    failure = failure or -struct.unpack_from("=i", body)[0]
        if failure:
            raise _error(failure, what)

    def _read_counter(self, name: str) -> int:
        request = _nft(
            NFT_MSG_GETOBJ,
            _text(1, self.table),
            _text(2, name),
            _be32(3, _OBJECT_COUNTER),
            flags=NLM_F_REQUEST,
        )
        with self._lock:
            self._socket.send(request)
            answer = self._socket.recv(65536)  # made by the kernel inside send()
        for kind, body in _split(answer):
            if kind == _NLMSG_ERROR:
                raise _error(-struct.unpack_from("=i", body)[0], f"guard of {self.address}")
            data = _attributes(_attributes(body[4:])[4])
            return int(struct.unpack(">Q", data[2])[0])
        raise OSError(errno.EBADMSG, f"guard of {self.address}: no answer about counter {name!r}")


def _split(answer: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    offset = 0
    while offset + 16 <= len(answer):
        length, kind = struct.unpack_from("=IH", answer, offset)
        if length < 16:
            break
        found.append((kind, answer[offset + 16 : offset + length]))
        offset += (length + 3) & ~3
    return found


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _error(code: int, what: str) -> OSError:
    hint = {
        errno.EPERM: "needs root or CAP_NET_ADMIN in this network namespace",
        errno.EOPNOTSUPP: "the kernel lacks nf_tables on netdev egress (Linux >= 5.16, CONFIG_NETFILTER_EGRESS)",
        errno.ENOENT: "the table is gone; somebody flushed the rule set",
    }.get(code, os.strerror(code))
    return OSError(code, f"{what}: {hint}")


def _interface_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"no interface {name!r} in this network namespace") from None
