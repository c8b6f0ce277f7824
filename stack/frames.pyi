from collections.abc import Sequence

from _typeshed import ReadableBuffer

MAC_A: str
MAC_B: str
FLAG_LETTERS: dict[str, int]

def build_arp(
    op: int, sender_mac: str, sender_ip: str, target_mac: str, target_ip: str, eth_dst: str = "ff:ff:ff:ff:ff:ff"
) -> bytes: ...
def build_ipv4(
    src: str,
    dst: str,
    proto: int,
    payload: bytes,
    *,
    eth_src: str = ...,
    eth_dst: str = ...,
    ident: int = 0,
    flags_frag: int = 0x4000,
    ttl: int = 64,
    tos: int = 0,
) -> bytes: ...
def build_udp(
    src: str,
    dst: str,
    sport: int,
    dport: int,
    payload: ReadableBuffer | Sequence[ReadableBuffer] = b"",
    *,
    partial: bool = False,
    eth_src: str = ...,
    eth_dst: str = ...,
    ident: int = 0,
    flags_frag: int = 0x4000,
    ttl: int = 64,
    tos: int = 0,
) -> bytes: ...
def build_tcp(
    src: str,
    dst: str,
    sport: int,
    dport: int,
    flags: int | str = ".",
    *,
    seq: int = 0,
    ack: int = 0,
    window: int = 65535,
    options: bytes = b"",
    payload: ReadableBuffer | Sequence[ReadableBuffer] = b"",
    partial: bool = False,
    eth_src: str = ...,
    eth_dst: str = ...,
    ident: int = 0,
    flags_frag: int = 0x4000,
    ttl: int = 64,
    tos: int = 0,
) -> bytes: ...
def build_icmp(
    src: str,
    dst: str,
    type: int,
    code: int,
    rest: int = 0,
    payload: bytes = b"",
    *,
    eth_src: str = ...,
    eth_dst: str = ...,
    ident: int = 0,
    flags_frag: int = 0x4000,
    ttl: int = 64,
    tos: int = 0,
) -> bytes: ...
