"""Wire formats: what is written is what the RFCs draw; what is read is checked; garbage is refused within bounds."""

import errno
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guarded import Guarded
from ulnet.stack.checksum import checksum, sum16
from ulnet.stack.frames import MAC_A, MAC_B, build_arp, build_icmp, build_ipv4, build_tcp, build_udp
from ulnet.stack.wire import Frame, Tcp, parse_frame

A, B = "10.0.0.1", "10.0.0.2"
Checker = Callable[[Frame], None]


# ---- checkers that read like sentences: check(frame, is_tcp(...), carries(...)) ----


def check(frame: bytes, *checkers: Checker, verify: bool = True) -> Frame:
    parsed = parse_frame(frame, verify)
    for checker in checkers:
        checker(parsed)
    return parsed


def is_from(address: str) -> Checker:
    def look(f: Frame) -> None:
        assert f.ip is not None and f.ip.src == address

    return look


def goes_to(address: str) -> Checker:
    def look(f: Frame) -> None:
        assert f.ip is not None and f.ip.dst == address

    return look


def is_tcp(flags: str, **fields: object) -> Checker:
    def look(f: Frame) -> None:
        assert f.tcp is not None and f.tcp.flag_names == flags
        assert {name: getattr(f.tcp, name) for name in fields} == fields

    return look


def is_udp(sport: int, dport: int) -> Checker:
    def look(f: Frame) -> None:
        assert f.udp is not None and f.udp == (sport, dport)

    return look


def carries(payload: bytes) -> Checker:
    def look(f: Frame) -> None:
        assert f.payload == payload

    return look


def refuses(frame: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_frame(frame)


def ip_header(frame: bytes | bytearray) -> bytes:
    return bytes(frame[14:34])


def with_ip(frame: bytes, at: int, new: bytes) -> bytes:
    """The frame with bytes of its IP header changed and the header's checksum right again."""
    raw = bytearray(frame)
    raw[14 + at : 14 + at + len(new)] = new
    raw[24:26] = b"\0\0"
    raw[24:26] = struct.pack("!H", checksum(raw[14 : 14 + (raw[14] & 15) * 4]))
    return bytes(raw)


def pseudo(src: bytes, dst: bytes, proto: int, n: int) -> int:
    return sum16(src + dst + struct.pack("!BBH", 0, proto, n))


# ---- Ethernet and IPv4 ----


def test_ethernet_and_ipv4_stand_as_drawn() -> None:
    frame = build_ipv4(A, B, 99, b"payload", ident=0x1234, flags_frag=0, ttl=7, tos=0x10)
    assert frame[:14] == bytes.fromhex("02000000000b02000000000a0800")
    want = struct.pack("!BBHHHBBH4s4s", 0x45, 0x10, 27, 0x1234, 0, 7, 99, 0, b"\n\0\0\1", b"\n\0\0\2")
    want = want[:10] + struct.pack("!H", checksum(want)) + want[12:]
    assert frame[14:] == want + b"payload"
    parsed = check(frame, is_from(A), goes_to(B), carries(b"payload"))
    assert parsed.eth == (MAC_B, MAC_A, 0x0800)
    assert parsed.ip == (A, B, 99, 7, 0x10, 0x1234, 0, False, False, 20, 7)


def test_padding_behind_the_packet_is_no_payload() -> None:
    check(build_udp(A, B, 1, 2, b"x") + b"\xee" * 17, is_udp(1, 2), carries(b"x"))


def test_options_of_ip_are_skipped() -> None:
    frame = build_tcp(A, B, 1, 2, payload=b"data")
    longer = frame[:34] + b"\x94\x04\0\0" + frame[34:]  # router alert, RFC 2113
    longer = with_ip(longer, 0, b"\x46\0" + struct.pack("!H", len(longer) - 14))
    parsed = check(longer, is_tcp("."), carries(b"data"))
    assert parsed.ip is not None and parsed.ip.header_bytes == 24


GOOD = build_tcp(A, B, 1, 2, payload=b"data")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "ethernet: truncated"),
        (GOOD[:13], "ethernet: truncated"),
        (GOOD[:33], "ipv4: truncated"),
        (GOOD[:-1], "ipv4: truncated"),
        (with_ip(GOOD, 0, b"\x65"), "ipv4: not the protocol or version"),
        (with_ip(GOOD, 0, b"\x44"), "ipv4: lengths"),
        (with_ip(GOOD, 0, b"\x4f"), "ipv4: lengths"),
        (with_ip(GOOD, 2, b"\0\x13"), "ipv4: lengths"),
        (GOOD[:24] + b"\0\0" + GOOD[26:], "ipv4: wrong checksum"),
        (build_ipv4(A, B, 6, bytes(23), flags_frag=0x2000), "ipv4: lengths"),  # more to come, yet no multiple of 8
        (build_ipv4(A, B, 6, b"", flags_frag=0x0001), "ipv4: lengths"),
        (build_ipv4(A, B, 6, bytes(8), flags_frag=0x1FFF), "ipv4: lengths"),  # ends beyond 65,535
    ],
)
def test_broken_headers_are_refused(frame: bytes, reason: str) -> None:
    refuses(frame, reason)


@pytest.mark.parametrize(
    "src", ["0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "127.0.0.1"]
)
def test_no_packet_comes_from_such_an_address(src: str) -> None:
    refuses(build_udp(src, B, 1, 2), "ipv4: address")


@pytest.mark.parametrize("dst", ["0.0.0.0", "0.255.0.0", "127.0.0.1"])
def test_no_packet_goes_to_such_an_address(dst: str) -> None:
    refuses(build_udp(A, dst, 1, 2), "ipv4: address")


def test_loopback_speaks_to_loopback() -> None:
    check(build_udp("127.0.0.1", "127.1.2.3", 1, 2), is_from("127.0.0.1"), goes_to("127.1.2.3"))


def test_fragments_have_no_transport() -> None:
    for flags_frag, offset, more in ((0x2000, 0, True), (0x2003, 24, True), (0x0003, 24, False)):
        parsed = check(build_ipv4(A, B, 6, b"f" * 24, flags_frag=flags_frag), carries(b"f" * 24))
        assert parsed.ip is not None and parsed.tcp is None
        assert (parsed.ip.frag_offset, parsed.ip.more_fragments) == (offset, more)


def test_other_ethertypes_and_protocols_pass_undescribed() -> None:
    assert parse_frame(GOOD[:12] + b"\x86\xdd" + b"six").payload == b"six"
    assert parse_frame(build_ipv4(A, B, 132, b"sctp")).payload == b"sctp"


# ---- ARP ----


def test_arp_stands_as_drawn_and_comes_back() -> None:
    frame = build_arp(1, MAC_A, A, "00:00:00:00:00:00", B)
    assert frame == bytes.fromhex(
        "ffffffffffff02000000000a0806 0001080006040001 02000000000a0a000001 0000000000000a000002"
    )
    assert parse_frame(frame).arp == (1, MAC_A, A, "00:00:00:00:00:00", B)
    assert parse_frame(build_arp(1, MAC_A, "0.0.0.0", "00:00:00:00:00:00", B)).arp is not None, "a probe, RFC 5227"


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (14, "0006", "not the protocol"),
        (16, "86dd", "not the protocol"),
        (18, "0804", "not the protocol"),
        (20, "0003", "not the protocol"),
        (22, "ffffffffffff", "address"),
        (22, "010000000001", "address"),
        (22, "000000000000", "address"),
        (28, "ffffffff", "address"),
        (28, "e0000001", "address"),
        (28, "7f000001", "address"),
    ],
)
def test_odd_arp_is_refused(at: int, new: str, reason: str) -> None:
    raw = bytearray(build_arp(2, MAC_A, A, MAC_B, B))
    raw[at : at + len(new) // 2] = bytes.fromhex(new)
    refuses(bytes(raw), f"arp: {reason}")
    refuses(bytes(raw[:41]), "arp: truncated")


# ---- UDP ----


def test_udp_stands_as_drawn() -> None:
    frame = build_udp(A, B, 0x1122, 0x3344, b"abc")
    segment = struct.pack("!HHHH", 0x1122, 0x3344, 11, 0) + b"abc"
    want = 0xFFFF ^ sum16(segment, pseudo(b"\n\0\0\1", b"\n\0\0\2", 17, 11))
    assert frame[34:] == segment[:6] + struct.pack("!H", want) + b"abc"
    check(frame, is_udp(0x1122, 0x3344), carries(b"abc"))


def test_a_udp_checksum_that_computes_to_zero_is_sent_as_ones() -> None:
    plain = build_udp(A, B, 1, 2, b"\0\0")
    frame = build_udp(A, B, 1, 2, plain[40:42])  # this payload makes the sum 0xffff
    assert frame[40:42] == b"\xff\xff"
    check(frame, is_udp(1, 2))


def test_udp_without_a_checksum_is_taken() -> None:
    frame = build_udp(A, B, 1, 2, b"abc")
    check(frame[:40] + b"\0\0" + frame[42:], carries(b"abc"))


def test_udp_lengths() -> None:
    frame = build_udp(A, B, 1, 2, b"abcd")
    refuses(frame[:38] + b"\0\x07" + frame[40:], "udp: lengths")
    refuses(frame[:38] + b"\0\x0d" + frame[40:], "udp: lengths")
    refuses(build_ipv4(A, B, 17, b"1234567"), "udp: truncated")
    # shorter than IP says: the rest is no data, and not in the sum
    assert check(frame[:38] + b"\0\x0a\0\0" + frame[42:]).payload == b"ab"


# ---- TCP ----


def test_tcp_stands_as_drawn() -> None:
    frame = build_tcp(A, B, 0x1122, 0x3344, "P.", seq=0x01020304, ack=0x05060708, window=0x1000, payload=b"hello")
    segment = struct.pack("!HHIIBBHHH", 0x1122, 0x3344, 0x01020304, 0x05060708, 0x50, 0x18, 0x1000, 0, 0) + b"hello"
    want = 0xFFFF ^ sum16(segment, pseudo(b"\n\0\0\1", b"\n\0\0\2", 6, 25))
    assert frame[34:] == segment[:16] + struct.pack("!H", want) + segment[18:]
    check(frame, is_tcp("P.", seq=0x01020304, ack=0x05060708, window=0x1000, mss=None, wscale=None), carries(b"hello"))


def test_a_partial_checksum_is_the_sum_of_the_pseudo_header_of_the_whole_super_segment() -> None:
    frame = build_tcp(A, B, 1, 2, options=b"\1\1\x08\x0a" + b"\0" * 8, payload=b"x" * 60000, partial=True)
    assert frame[50:52] == struct.pack("!H", pseudo(b"\n\0\0\1", b"\n\0\0\2", 6, 60032))
    refuses(frame, "tcp: wrong checksum")
    check(frame, is_tcp(".", timestamps=(0, 0)), carries(b"x" * 60000), verify=False)
    datagram = build_udp(A, B, 1, 2, b"x" * 3000, partial=True)
    assert datagram[40:42] == struct.pack("!H", pseudo(b"\n\0\0\1", b"\n\0\0\2", 17, 3008))


@given(st.lists(st.binary(max_size=90), max_size=16))
@settings(max_examples=100, deadline=None)
def test_pieces_odd_or_empty_sum_as_their_whole(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert build_tcp(A, B, 1, 2, payload=pieces) == build_tcp(A, B, 1, 2, payload=whole)
    assert build_udp(A, B, 1, 2, payload=pieces) == build_udp(A, B, 1, 2, payload=whole)
    check(build_tcp(A, B, 1, 2, payload=pieces), carries(whole))


def options_of(hex_text: str, flags: str = "S") -> Tcp:
    raw = bytes.fromhex(hex_text)
    tcp = parse_frame(build_tcp(A, B, 1, 2, flags, options=raw + b"\0" * (-len(raw) % 4))).tcp
    assert tcp is not None
    return tcp


def test_the_options_of_a_linux_syn() -> None:
    tcp = options_of("020405b40402080a11223344000000000103030a")
    assert (tcp.mss, tcp.sack_permitted, tcp.timestamps, tcp.wscale) == (1460, True, (0x11223344, 0), 10)


def test_options_of_the_handshake_count_only_there() -> None:
    tcp = options_of("020405b40402080a11223344000000000103030a", ".")
    assert (tcp.mss, tcp.sack_permitted, tcp.timestamps, tcp.wscale) == (None, False, (0x11223344, 0), None)
    assert options_of("0101050a0000000100000002", "S").sack == ()


def test_window_scale_beyond_14_is_14() -> None:
    assert options_of("030315").wscale == 14  # RFC 7323 2.3


def test_timestamps_in_any_place() -> None:
    assert options_of("0101080a0000000700000008", ".").timestamps == (7, 8)
    assert options_of("080a0000000700000008", ".").timestamps == (7, 8)
    assert options_of("0101080a00000007000000080101050a0000000100000002", ".").timestamps == (7, 8)


def test_sack_blocks_of_every_count() -> None:
    blocks = [(100 * i + 1, 100 * i + 50) for i in range(4)]
    for n in range(1, 5):
        raw = bytes([1, 1, 5, 2 + 8 * n]) + b"".join(struct.pack("!II", *b) for b in blocks[:n])
        assert options_of(raw.hex(), ".").sack == tuple(blocks[:n])
    wrapped = (0xFFFFFFF0, 0x10)
    assert options_of("0101050a" + struct.pack("!II", *wrapped).hex(), ".").sack == (wrapped,)


def test_sack_blocks_that_hold_nothing_are_left_out() -> None:
    raw = "01010512" + struct.pack("!IIII", 50, 50, 60, 70).hex()
    assert options_of(raw, ".").sack == ((60, 70),)
    assert options_of("0101050a" + struct.pack("!II", 70, 60).hex(), ".").sack == ()


def test_unknown_options_are_skipped_and_the_end_ends_the_list() -> None:
    assert options_of("fd0612345678" + "020405b4").mss == 1460
    assert options_of("00" + "020405b4").mss is None
    assert options_of("020405b4" + "00" + "ff").mss == 1460


def test_known_options_of_a_wrong_size_are_skipped() -> None:
    tcp = options_of("020305" + "0304aabb" + "040300" + "080611223344" + "020405b4")
    assert (tcp.mss, tcp.wscale, tcp.sack_permitted, tcp.timestamps) == (1460, None, False, None)
    assert options_of("0101050900000001000000", ".").sack == ()


@pytest.mark.parametrize("raw", ["02000000", "02010000", "01010103", "010102ff", "08ff0101", "fd060000", "01010102"])
def test_lengths_no_option_can_have_end_the_segment(raw: str) -> None:
    refuses(build_tcp(A, B, 1, 2, "S", options=bytes.fromhex(raw)), "tcp: malformed option list")


def test_tcp_header_lengths() -> None:
    for offset in (0, 4, 6, 15):
        segment = bytearray(20)
        segment[12] = offset << 4
        refuses(build_ipv4(A, B, 6, bytes(segment)), "tcp: lengths")
    refuses(build_ipv4(A, B, 6, bytes(19)), "tcp: truncated")


@pytest.mark.parametrize("dst", ["224.0.0.1", "239.1.1.1", "255.255.255.255"])
def test_no_connection_with_a_group(dst: str) -> None:
    refuses(build_tcp(A, dst, 1, 2, "S"), "tcp: address")


@given(st.integers(0, 8 * (len(GOOD) - 14) - 1))
@settings(max_examples=200, deadline=None)
def test_every_flipped_bit_behind_the_ethernet_header_is_noticed(bit: int) -> None:
    raw = bytearray(GOOD)
    raw[14 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError):
        parse_frame(raw)


# ---- ICMP ----


def test_icmp_stands_as_drawn() -> None:
    frame = build_icmp(A, B, 8, 0, 0x12340001, b"ping data")
    message = struct.pack("!BBHI", 8, 0, 0, 0x12340001) + b"ping data"
    assert frame[34:] == message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    assert check(frame, carries(b"ping data")).icmp == (8, 0, 0x12340001, None)
    refuses(frame[:36] + b"\0\0" + frame[38:], "icmp: wrong checksum")
    refuses(build_ipv4(A, B, 1, b"1234567"), "icmp: truncated")


def error_about(sent: bytes, type: int, code: int, rest: int = 0, quoted: int = 28) -> object:
    icmp = parse_frame(build_icmp("192.0.2.1", A, type, code, rest, sent[14 : 14 + quoted])).icmp
    assert icmp is not None
    return icmp.error


SENT = build_tcp(A, B, 40000, 80, "S", seq=0xDEADBEEF)

# type, code -> errno, whether it ends a connection attempt; as in Linux's table (ip(7), RFC 1122 4.2.3.9)
ERRORS = {
    (3, 0): (errno.ENETUNREACH, False),
    (3, 1): (errno.EHOSTUNREACH, False),
    (3, 2): (errno.ENOPROTOOPT, True),
    (3, 3): (errno.ECONNREFUSED, True),
    (3, 4): (errno.EMSGSIZE, False),
    (3, 5): (errno.EOPNOTSUPP, False),
    (3, 6): (errno.ENETUNREACH, True),
    (3, 7): (errno.EHOSTDOWN, True),
    (3, 9): (errno.ENETUNREACH, True),
    (3, 10): (errno.EHOSTUNREACH, True),
    (3, 11): (errno.ENETUNREACH, False),
    (3, 12): (errno.EHOSTUNREACH, False),
    (3, 13): (errno.EHOSTUNREACH, True),
    (11, 0): (errno.EHOSTUNREACH, False),
    (12, 0): (errno.EPROTO, False),
}


@pytest.mark.parametrize("kind", ERRORS, ids=str)
def test_an_icmp_error_names_the_session_and_the_errno(kind: tuple[int, int]) -> None:
    number, hard = ERRORS[kind]
    mtu = 1400 if kind == (3, 4) else 0
    assert error_about(SENT, *kind, rest=mtu) == (6, (A, 40000), (B, 80), number, hard, mtu, 0xDEADBEEF)
    datagram = build_udp(A, B, 5353, 53, b"query")
    assert error_about(datagram, *kind, rest=mtu) == (17, (A, 5353), (B, 53), number, hard, mtu, 0)


def test_a_router_that_names_no_mtu_means_the_next_plateau() -> None:
    big = build_udp(A, B, 1, 2, bytes(1472))
    assert error_about(big, 3, 4).next_mtu == 1492  # type: ignore[attr-defined]
    assert error_about(build_udp(A, B, 1, 2, bytes(1464)), 3, 4).next_mtu == 1006  # type: ignore[attr-defined]
    assert error_about(big, 3, 4, rest=20).next_mtu == 68  # type: ignore[attr-defined]


def test_what_is_no_error_about_a_session() -> None:
    assert error_about(SENT, 0, 0) is None
    assert error_about(SENT, 4, 0) is None, "source quench is dead (RFC 6633)"
    assert error_about(SENT, 5, 1) is None, "redirects are not a session's"
    assert error_about(SENT, 3, 16) is None
    assert error_about(SENT, 3, 3, quoted=27) is None
    assert error_about(build_icmp(A, B, 8, 0), 3, 1) is None
    assert error_about(build_ipv4(A, B, 6, bytes(24), flags_frag=3), 3, 1) is None, "a later fragment has no ports"


# ---- garbage ----


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with Guarded() as memory:
        yield memory


def survive(guarded: Guarded, frame: bytes) -> None:
    """Parse between inaccessible pages: nothing but a value or ValueError, and no byte from elsewhere."""
    for place in (guarded.at_end, guarded.at_start):
        for verify in (True, False):
            try:
                parsed = parse_frame(place(frame), verify)
            except ValueError:
                continue
            assert parsed.payload in frame


def mended(frame: bytearray) -> bytes:
    """Right checksums, so that garbage reaches the deeper layers."""
    if len(frame) < 34:
        return bytes(frame)
    header = min((frame[14] & 15) * 4, len(frame) - 14)
    frame[24:26] = b"\0\0"
    frame[24:26] = struct.pack("!H", checksum(frame[14 : 14 + header]))
    if frame[23] == 1 and len(frame) >= 14 + header + 4:
        total = min(struct.unpack_from("!H", frame, 16)[0], len(frame) - 14)
        frame[14 + header + 2 : 14 + header + 4] = b"\0\0"
        frame[14 + header + 2 : 14 + header + 4] = struct.pack("!H", checksum(frame[14 + header : 14 + total]))
    return bytes(frame)


SAMPLES = [
    SENT,
    build_tcp(A, B, 1, 2, "S", options=bytes.fromhex("020405b40402080a11223344000000000103030a")),
    build_tcp(A, B, 1, 2, options=bytes.fromhex("0101080a00000007000000080101050a0000000100000002"), payload=b"d" * 40),
    build_udp(A, B, 1, 2, b"d" * 40),
    build_icmp(B, A, 3, 4, 1400, SENT[14:]),
    build_icmp(B, A, 8, 0, 1, b"echo"),
    build_arp(2, MAC_A, A, MAC_B, B),
    build_ipv4(A, B, 17, b"f" * 64, flags_frag=0x2001),
]


def test_every_truncation_stays_within_bounds(guarded: Guarded) -> None:
    for sample in SAMPLES:
        for n in range(len(sample) + 1):
            survive(guarded, sample[:n])
            short = bytearray(sample[:n])
            if n >= 34 and sample[12:14] == b"\x08\0":
                short[16:18] = struct.pack("!H", n - 14)  # IP agrees with the cut
            survive(guarded, mended(short))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_stay_within_bounds(guarded: Guarded, data: bytes) -> None:
    survive(guarded, data)
    for head in (b"\x08\0", b"\x08\x06"):
        survive(guarded, GOOD[:12] + head + data)


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(14, 120), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 60),
)
@settings(max_examples=600, deadline=None)
def test_mutated_frames_stay_within_bounds(
    guarded: Guarded, sample: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(sample[: max(34, len(sample) - cut)])
    for at, value in changes:
        raw[min(at, len(raw) - 1)] = value
    survive(guarded, mended(raw))


def test_every_option_list_of_four_bytes_from_a_hard_alphabet(guarded: Guarded) -> None:
    alphabet = (0, 1, 2, 3, 4, 5, 8, 10, 0xFF)
    for a in alphabet:
        for b in alphabet:
            for c in alphabet:
                for d in alphabet:
                    frame = build_tcp(A, B, 1, 2, "S" if a & 1 else ".", options=bytes((a, b, c, d)))
                    try:
                        parse_frame(guarded.at_end(frame))
                    except ValueError as error:
                        assert "malformed option list" in str(error)


def test_mistakes_name_the_value() -> None:
    with pytest.raises(ValueError, match="'zz' is no MAC address"):
        build_udp(A, B, 1, 2, eth_src="zz")
    with pytest.raises(ValueError, match="port"):
        build_udp(A, B, 70000, 2)
    with pytest.raises(ValueError, match="options of 3 bytes"):
        build_tcp(A, B, 1, 2, options=b"123")
    with pytest.raises(ValueError, match="at most 65535"):
        build_udp(A, B, 1, 2, b"x" * 65510)
    with pytest.raises(TypeError, match="unknown argument 'hops'"):
        build_udp(A, B, 1, 2, hops=3)  # type: ignore[call-arg]
