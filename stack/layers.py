"""What a frame says, layer by layer, as plain values: the results of ``ulnet.stack.wire.parse_frame``."""

from typing import NamedTuple


class Ethernet(NamedTuple):
    """MAC addresses as six hex pairs; ``ethertype`` 0x0800 is IPv4, 0x0806 ARP."""

    dst: str
    src: str
    ethertype: int


class Arp(NamedTuple):
    """``op`` 1 asks, 2 answers. MAC and dotted addresses of the sender and the target."""

    op: int
    sender_mac: str
    sender_ip: str
    target_mac: str
    target_ip: str


class Ipv4(NamedTuple):
    src: str
    dst: str
    proto: int
    ttl: int
    tos: int
    ident: int
    frag_offset: int
    more_fragments: bool
    dont_fragment: bool
    header_bytes: int
    payload_bytes: int


class Tcp(NamedTuple):
    """Options that are absent are None (False for ``sack_permitted``, empty for ``sack``)."""

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    mss: int | None
    wscale: int | None
    timestamps: tuple[int, int] | None
    sack_permitted: bool
    sack: tuple[tuple[int, int], ...]

    @property
    def flag_names(self) -> str:
        """The flags as tcpdump's letters: ``S``, ``S.``, ``.``, ``P.``, ``F.``, ``R`` and so on."""
        return "".join(
            c for bit, c in ((2, "S"), (1, "F"), (4, "R"), (8, "P"), (32, "U"), (16, ".")) if self.flags & bit
        )


class Udp(NamedTuple):
    sport: int
    dport: int


class IcmpError(NamedTuple):
    """What an ICMP error says about one of our packets: positive ``errno``, our address first."""

    proto: int
    local: tuple[str, int]
    remote: tuple[str, int]
    errno: int
    hard: bool
    next_mtu: int
    tcp_seq: int


class Icmp(NamedTuple):
    type: int
    code: int
    rest: int
    error: IcmpError | None


class Frame(NamedTuple):
    """One frame: the layers it has, the others None, and the bytes behind the last one."""

    eth: Ethernet
    arp: Arp | None
    ip: Ipv4 | None
    tcp: Tcp | None
    udp: Udp | None
    icmp: Icmp | None
    payload: bytes
