"""The packet link itself: ring, lending, evacuation, offload both ways, the three packet interfaces."""

import os
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from channel_hosts import OURS, PEER, Wire, drain, ethernet, ipv4, payload, ports_of, pseudo, total, udp, wire_or_skip

from ulnet.kernelshim.channel import open_embedded, ring_for, rings_for
from ulnet.kernelshim.link import (
    FRAME_CSUM_PARTIAL,
    FRAME_GSO_TCP4,
    FRAME_GSO_UDP,
    FRAME_UFO,
    LINK_EVACUATE,
    LINK_UFO,
    Frame,
)
from ulnet.kernelshim.packet import PacketLink

SLOTS = 8
SMALL_SLOTS = 16
LARGE = 2500  # bytes of a datagram that does not fit a slot for small frames


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    made = wire_or_skip()
    with made.ours.inside():
        yield made
    made.close()


@pytest.fixture
def link(wire: Wire) -> Iterator[PacketLink]:
    made = open_embedded("ve0", OURS, slots=SLOTS, small_slots=SMALL_SLOTS)
    yield made
    made.close()


@pytest.fixture
def near(wire: Wire) -> Iterator[socket.socket]:
    with wire.peer.udp(port=777) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        yield sock


def held(link: PacketLink) -> tuple[int, memoryview]:
    """The next frame, held; it must get a token."""
    until = time.monotonic() + 1
    while (frame := link.hold_frame()) is None:
        assert time.monotonic() < until, "no frame came"
    slot, view = frame
    assert slot is not None
    return slot, view


def number(view: memoryview) -> int:
    return int(struct.unpack_from("!I", view, 42)[0])


def send_numbers(near: socket.socket, start: int, count: int, size: int = LARGE) -> None:
    for value in range(start, start + count):
        near.sendto(struct.pack("!I", value) + os.urandom(8) * (size // 8), (str(OURS), 1))


# ---- the ring ----


def test_default_rings_hold_what_comes_to_them() -> None:
    rings = rings_for("ipf", 1500)
    small, ring = rings
    page = os.sysconf("SC_PAGESIZE")
    assert 1500 <= rings.small_packet_bytes < small.slot_bytes - 114
    assert small.slots * small.slot_bytes % page == 0 and small.slots >= 256
    jumbo = rings_for("ipf", 9000)
    assert 9000 <= jumbo.small_packet_bytes < jumbo.small.slot_bytes - 114
    assert ring.slots >= 30
    assert ring.slot_bytes >= 65549 + 100 and ring.slot_bytes % page == 0
    assert ring.slots % ring.slots_per_block == 0
    with pytest.raises(ValueError, match="at least 4"):
        ring_for(3)


def test_the_ring_goes_round_without_loss(link: PacketLink, near: socket.socket) -> None:
    for turn in range(10):
        send_numbers(near, turn * 5, 5)
        assert [number(memoryview(f.data)) for f in drain(link, 5)] == list(range(turn * 5, turn * 5 + 5))
    counted = link.counters()
    assert (counted["rx_frames"], counted["rx_drops"], counted["bad_release"]) == (50, 0, 0)


def test_small_and_large_frames_come_in_the_order_they_were_sent(link: PacketLink, near: socket.socket) -> None:
    for turn in range(40):
        sizes = [(LARGE, 8)[value * value % 7 % 2] for value in range(turn, turn + SLOTS)]
        for at, size in enumerate(sizes):
            send_numbers(near, at, 1, size)
        frames = drain(link, SLOTS)
        assert [number(memoryview(f.data)) for f in frames] == list(range(SLOTS))
        assert [len(payload(f)) for f in frames] == [4 + size // 8 * 8 for size in sizes]
    assert link.counters()["rx_drops"] == 0


def test_a_crowd_of_small_frames_takes_no_room_from_large_ones(link: PacketLink, near: socket.socket) -> None:
    send_numbers(near, 0, SMALL_SLOTS + 5, 16)
    send_numbers(near, 100, SLOTS)
    got = [number(memoryview(f.data)) for f in drain(link, SMALL_SLOTS + SLOTS)]
    assert got == [*range(SMALL_SLOTS), *range(100, 100 + SLOTS)]
    assert link.counters()["rx_drops"] == 5


def test_a_small_frame_has_no_slot_and_is_there_until_the_next_is_asked_for(
    link: PacketLink, near: socket.socket
) -> None:
    send_numbers(near, 1, 1, 16)
    frame = None
    while frame is None:
        frame = link.hold_frame()
    assert frame[0] is None and number(frame[1]) == 1
    assert readable(link)
    assert link.hold_frame() is None
    assert not readable(link)


def test_slots_come_in_ring_order_and_go_back_in_any(link: PacketLink, near: socket.socket) -> None:
    send_numbers(near, 0, SLOTS)
    frames = [held(link) for _ in range(SLOTS)]
    assert [slot for slot, _ in frames] == list(range(SLOTS))
    for slot in (5, 0, 7, 2, 1, 6, 4, 3):
        link.release(slot)
    send_numbers(near, 100, SLOTS)
    assert [number(memoryview(f.data)) for f in drain(link, SLOTS)] == list(range(100, 100 + SLOTS))


def test_a_held_slot_stops_the_ring_and_is_never_overwritten(link: PacketLink, near: socket.socket) -> None:
    send_numbers(near, 0, 1)
    slot, view = held(link)
    before = bytes(view)
    send_numbers(near, 1, 3 * SLOTS)
    got = [number(memoryview(f.data)) for f in drain(link)]
    assert got == list(range(1, SLOTS))
    assert bytes(view) == before
    assert link.counters()["rx_drops"] == 3 * SLOTS - len(got)
    assert link.recv_frame() is None
    link.release(slot)
    send_numbers(near, 500, 2)
    assert [number(memoryview(f.data)) for f in drain(link, 2)] == [500, 501]


def test_a_second_release_is_counted_and_harmless(link: PacketLink, near: socket.socket) -> None:
    send_numbers(near, 0, 1)
    slot, _ = held(link)
    for token in (slot, slot, SLOTS, 12345):
        link.release(token)
    assert link.counters()["bad_release"] == 3


def readable(link: PacketLink) -> bool:
    poller = select.poll()
    for fd in link.filenos():
        poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def test_poll_tells_new_frames_also_while_the_newest_is_held(link: PacketLink, near: socket.socket) -> None:
    assert not readable(link)
    held_slots = []
    for value in range(3 * SLOTS):
        send_numbers(near, value, 1)
        assert readable(link)
        slot, view = held(link)
        assert number(view) == value
        assert link.hold_frame() is None
        assert not readable(link), f"frame {value} is held, and nothing new is there"
        held_slots.append((slot, view, value))
        if len(held_slots) == 4:  # the newest, the one before and others go back in turn
            gone, _, _ = held_slots.pop((value * 3) % 4)
            link.release(gone)
        assert [number(kept) for _, kept, _ in held_slots] == [want for _, _, want in held_slots]
        assert not readable(link)


def test_a_full_ring_does_not_run_over_the_held_newest(link: PacketLink, near: socket.socket) -> None:
    """While idle the newest held slot is shown to the kernel as free; a burst must not reach it."""
    send_numbers(near, 0, 3)
    for _ in range(2):
        link.release(held(link)[0])
    slot, view = held(link)
    before = bytes(view)
    assert link.hold_frame() is None
    send_numbers(near, 10, 4 * SLOTS)
    assert bytes(view) == before
    got = [number(memoryview(f.data)) for f in drain(link)]
    assert got == list(range(10, 10 + len(got))) and len(got) >= SLOTS - 2
    assert bytes(view) == before
    link.release(slot)
    send_numbers(near, 90, SLOTS)
    assert len(drain(link, SLOTS)) == SLOTS


# ---- evacuation ----


def test_an_evacuated_frame_stays_while_the_kernel_refills_its_slot(link: PacketLink, near: socket.socket) -> None:
    assert link.features & LINK_EVACUATE
    near.sendto(os.urandom(60_000), (str(OURS), 1))
    slot, view = held(link)
    before = bytes(view)
    link.evacuate(slot)
    for turn in range(4):
        send_numbers(near, turn * SLOTS, SLOTS, 8000)
        frames = drain(link)  # one call more than there are frames: it gives the copied one's slot back
        assert [number(memoryview(f.data)) for f in frames] == list(range(turn * SLOTS, turn * SLOTS + SLOTS))
        assert bytes(view) == before
    counted = link.counters()
    assert counted["rx_copied"] == 4 and counted["rx_drops"] == 0
    link.release(slot)
    send_numbers(near, 0, 2 * SLOTS // 2)
    assert len(drain(link, SLOTS)) == SLOTS
    counted = link.counters()
    assert (counted["evacuated"], counted["restored"], counted["rx_copied"]) == (1, 1, 4)


def test_evacuating_again_and_again_leaks_no_mapping(link: PacketLink, near: socket.socket) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    most = 0
    for turn in range(60):
        send_numbers(near, turn * 3, 3)
        frames = [held(link) for _ in range(3)]
        for slot, _ in frames[:2]:
            link.evacuate(slot)
        assert [number(view) for _, view in frames] == [turn * 3, turn * 3 + 1, turn * 3 + 2]
        for slot, _ in frames:
            link.release(slot)
        if turn == 20:
            most = mappings()
    assert mappings() <= most + 8
    counted = link.counters()
    assert counted["evacuated"] == 120 and counted["restored"] >= 60 and counted["rx_copied"] == 0


def test_evacuating_what_is_not_held_is_refused(link: PacketLink, near: socket.socket) -> None:
    for slot in (0, SLOTS, 99):
        with pytest.raises(OSError, match="cannot evacuate"):
            link.evacuate(slot)
    send_numbers(near, 0, 1)
    slot, _ = held(link)
    link.evacuate(slot)
    with pytest.raises(OSError, match="cannot evacuate"):
        link.evacuate(slot)
    link.release(slot)


def test_the_newest_slot_can_be_evacuated_while_idle(link: PacketLink, near: socket.socket) -> None:
    send_numbers(near, 7, 1)
    slot, view = held(link)
    assert link.hold_frame() is None
    link.evacuate(slot)
    assert not readable(link)
    send_numbers(near, 8, 3 * SLOTS)
    assert len(drain(link)) == SLOTS
    assert number(view) == 7
    link.release(slot)


# ---- the three packet interfaces ----


def test_ipf_shm_and_ipc_give_equal_frames(wire: Wire, near: socket.socket) -> None:
    seen = []
    near.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT
    data, train = os.urandom(30_000), os.urandom(5000)
    for kind in ("ipf", "shm", "ipc"):
        link = open_embedded("ve0", OURS, packet_interface=kind, slots=SLOTS)
        for number in range(3):
            near.sendto(bytes(number), (str(OURS), 1))
        with wire.peer.udp(port=778) as big:
            big.sendto(data, (str(OURS), 2))
        near.sendto(train, (str(OURS), 3))
        frames = drain(link, 5)
        assert payload(frames[3]) == data
        assert (frames[4].flags, frames[4].gso_size) == (FRAME_CSUM_PARTIAL | FRAME_GSO_UDP, 1000)
        assert payload(frames[4]) == train
        # All but what the sender counts up: IP identification, and with it the header's sum.
        seen.append([f._replace(data=f.data[:18] + f.data[20:24] + f.data[26:]) for f in frames])
        assert bool(link.features & LINK_EVACUATE) == (link.slots > 0) == (kind != "ipc")
        near.sendto(b"x", (str(OURS), 1))
        assert readable(link)
        link.close()
    assert seen[0] == seen[1] == seen[2]


# ---- sending ----


@pytest.mark.parametrize("partial", [False, True])
def test_a_datagram_in_pieces(wire: Wire, link: PacketLink, near: socket.socket, partial: bool) -> None:
    packet = udp((OURS, 1), (PEER, 777), b"hello there", partial=partial)
    pieces = [ethernet(wire.peer_mac, wire.mac) + packet[:28], packet[28:33], b"", packet[33:]]
    link.send_frame(pieces, FRAME_CSUM_PARTIAL if partial else 0, csum_start=34, csum_offset=6)
    assert near.recvfrom(100) == (b"hello there", (str(OURS), 1))


def test_a_train_of_datagrams_is_cut(wire: Wire, link: PacketLink, near: socket.socket) -> None:
    data = os.urandom(20_100)
    frame = ethernet(wire.peer_mac, wire.mac) + udp((OURS, 1), (PEER, 777), data, partial=True)
    link.send_frame(frame, FRAME_CSUM_PARTIAL | FRAME_GSO_UDP, 1000, 42, 34, 6)
    got = [near.recv(3000) for _ in range(21)]
    assert [len(piece) for piece in got] == [1000] * 20 + [100]
    assert b"".join(got) == data


def test_a_big_datagram_is_fragmented_by_the_link(wire: Wire, link: PacketLink, near: socket.socket) -> None:
    assert link.features & LINK_UFO
    for size in (3000, 20_001, 65_507):
        data = os.urandom(size)
        packet = udp((OURS, 1), (PEER, 777), data, partial=True)
        packet = packet[:6] + b"\0\0\0\0\0\0" + packet[12:]  # no DF; header sum follows
        packet = packet[:8] + struct.pack("!BB", 64, 17) + b"\0\0" + packet[12:]
        packet = packet[:10] + struct.pack("!H", 0xFFFF ^ total(packet[:20])) + packet[12:]
        link.send_frame(ethernet(wire.peer_mac, wire.mac) + packet, FRAME_CSUM_PARTIAL | FRAME_UFO, 1480, 42, 34, 6)
        assert near.recv(70_000) == data


def test_what_cannot_be_sent_is_an_error_and_counted(wire: Wire, link: PacketLink) -> None:
    too_long = ethernet(wire.peer_mac, wire.mac) + udp((OURS, 1), (PEER, 777), bytes(3000))
    with pytest.raises(OSError) as refused:
        link.send_frame(too_long)
    assert refused.value.errno == 90  # EMSGSIZE
    with pytest.raises(OSError):
        link.send_frame(b"short")
    wire.set_ours("down")
    with pytest.raises(OSError):
        link.send_frame(too_long[:60])
    wire.set_ours("up")
    counted = link.counters()
    assert counted["tx_errors"] == 3 and counted["tx_EMSGSIZE"] == counted["tx_ENETDOWN"] == counted["tx_EINVAL"] == 1
    assert counted["tx_frames"] == 0


def test_a_stack_talks_to_itself(wire: Wire, link: PacketLink, near: socket.socket) -> None:
    """An all-zero destination goes out by the loopback device and comes back, whole super-segments too."""
    link.send_frame(
        ethernet(bytes(6), wire.mac) + udp((OURS, 1), (OURS, 2), b"hello me", partial=True),
        FRAME_CSUM_PARTIAL,
        csum_start=34,
        csum_offset=6,
    )
    (frame,) = drain(link, 1)
    assert payload(frame) == b"hello me" and frame.flags == FRAME_CSUM_PARTIAL
    data = os.urandom(60_000)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 1000, pseudo(6, OURS, OURS, 20 + len(data)), 0)
    packet = ipv4(6, OURS, OURS, 20 + len(data)) + tcp + data
    link.send_frame(ethernet(bytes(6), wire.mac) + packet, FRAME_CSUM_PARTIAL | FRAME_GSO_TCP4, 1460, 54, 34, 16)
    (frame,) = drain(link, 1)
    assert frame == Frame(ethernet(bytes(6), wire.mac) + packet, FRAME_CSUM_PARTIAL | FRAME_GSO_TCP4, 1460)


# ---- TCP super-segments against the kernel ----


class HandTcp:
    """As much TCP as it takes to exchange super-segments with a kernel socket on a clean wire."""

    def __init__(self, wire: Wire, link: PacketLink, port: int) -> None:
        self.wire, self.link, self.port = wire, link, port
        self.seq, self.ack = 1000, 0
        self.send(0x02, options=struct.pack("!BBHBBBB", 2, 4, 1460, 3, 3, 7, 1))
        (reply,) = drain(link, 1)
        self.ack = self._sequence(reply) + 1
        self.seq += 1
        self.send(0x10)

    def _sequence(self, frame: Frame) -> int:
        return int(struct.unpack_from("!I", frame.data, 38)[0])

    def send(self, flags: int, data: bytes = b"", options: bytes = b"") -> None:
        length = 20 + len(options) + len(data)
        head = (
            struct.pack(
                "!HHIIBBHHH",
                4000,
                self.port,
                self.seq,
                self.ack,
                (20 + len(options)) * 4,
                flags,
                60_000,
                pseudo(6, OURS, PEER, length),
                0,
            )
            + options
        )
        frame = ethernet(self.wire.peer_mac, self.wire.mac) + ipv4(6, OURS, PEER, length) + head
        gso = FRAME_GSO_TCP4 if len(data) > 1460 else 0
        self.link.send_frame([frame, data], FRAME_CSUM_PARTIAL | gso, 1460, 54 + len(options), 34, 16)
        self.seq += len(data)

    def receive(self, want: int) -> tuple[bytes, int]:
        """That many bytes of payload, in order, and the longest frame they came in."""
        got, longest = b"", 0
        while len(got) < want:
            frames = drain(self.link, 1)
            assert frames, f"only {len(got)} of {want} bytes came"
            for frame in frames:
                data = frame.data[34 + (frame.data[46] >> 4) * 4 : 14 + struct.unpack_from("!H", frame.data, 16)[0]]
                if data and self._sequence(frame) == self.ack:
                    got += data
                    self.ack += len(data)
                    longest = max(longest, len(frame.data))
                    if len(data) > 1460:
                        assert frame.flags & FRAME_GSO_TCP4 and frame.gso_size == 1460
                    self.send(0x10)
        return got, longest


def test_super_segments_both_ways_with_a_kernel_socket(wire: Wire, link: PacketLink) -> None:
    with wire.peer.inside():
        listener = socket.create_server((str(PEER), 8000))
    with listener:
        hand = HandTcp(wire, link, 8000)
        listener.settimeout(2)
        kernel, _ = listener.accept()
    with kernel:
        kernel.settimeout(2)
        out = os.urandom(60_000)
        hand.send(0x18, out)
        got = b""
        while len(got) < len(out):
            piece = kernel.recv(1 << 17)
            assert piece
            got += piece
        assert got == out
        drain(link)
        back = os.urandom(400_000)
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        kernel.sendall(back)
        received, longest = hand.receive(len(back))
        assert received == back
        assert longest > 14_000
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# ---- mistakes ----

ARGUMENTS: dict[str, object] = {
    "ifindex": 1,
    "loopback_ifindex": 1,
    "mac": bytes(6),
    "mtu": 1500,
    "small": (8, 2048),
    "large": (8, 69632),
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"interface": "pigeon"}, "'pigeon'"),
        ({"mac": b"short"}, "6 bytes, not 5"),
        ({"large": (2, 69632)}, "at least 4 slots"),
        ({"small": (2, 2048)}, "at least 4 slots"),
        ({"large": (8, 5000)}, "whole pages"),
        ({"interface": "ipc"}, "1 descriptors, not 2"),
    ],
)
def test_impossible_arguments(change: dict[str, object], complaint: str) -> None:
    fds = [os.dup(0), os.dup(0)]
    with pytest.raises(ValueError, match=complaint):
        PacketLink(fds, **(ARGUMENTS | change))  # type: ignore[arg-type]
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)  # taken over, and closed


def test_descriptors_without_rings() -> None:
    with pytest.raises(OSError, match="cannot map packet rings of 8 slots"):
        PacketLink([os.dup(0), os.dup(0)], **ARGUMENTS)  # type: ignore[arg-type]


def test_a_closed_link(wire: Wire) -> None:
    link = open_embedded("ve0", OURS, slots=SLOTS)
    link.close()
    link.close()
    assert link.recv_frame() is None and link.fileno() == -1
    link.release(0)
    with pytest.raises(OSError):
        link.send_frame(bytes(60))
    assert link.counters()["rx_frames"] == 0


def test_a_busy_ring_asks_the_kernel_nothing(link: PacketLink, near: socket.socket) -> None:
    before = link.counters()["syscalls"]
    for turn in range(5):
        send_numbers(near, turn * 5, 5)
        assert [ports_of(f)[1] for f in drain(link, 5)] == [1] * 5
    assert link.counters()["syscalls"] == before + 2  # which read the kernel's drop counts


# ---- fork ----


def packet_sockets() -> int:
    with open("/proc/thread-self/net/packet") as sockets:
        return len(sockets.readlines()) - 1


def test_a_childs_copy_keeps_evacuated_frames_and_nothing_else(wire: Wire, near: socket.socket) -> None:
    before = packet_sockets()
    link = open_embedded("ve0", OURS, slots=SLOTS)
    near.sendto(os.urandom(60_000), (str(OURS), 1))
    slot, view = held(link)
    content = bytes(view)
    link.evacuate(slot)
    result_in, result_out = os.pipe()
    go_in, go_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        link.close_fd()
        with open("/proc/self/maps") as maps:
            mapped = any("socket:" in line for line in maps)
        good = bytes(view) == content and not mapped and link.fileno() == -1 and link.recv_frame() is None
        link.close()  # unmaps the copy, and nothing that came to lie where the ring was
        os.write(result_out, b"+" if good else b"-")
        os.read(go_in, 1)
        os._exit(0)
    try:
        assert os.read(result_in, 1) == b"+"
        send_numbers(near, 0, 3)
        assert len(drain(link, 3)) == 3 and bytes(view) == content
        assert packet_sockets() == before + 2
        link.close()
        assert packet_sockets() == before  # the child does not keep it alive
    finally:
        os.write(go_out, b"x")
        os.waitpid(pid, 0)
        for fd in (result_in, result_out, go_in, go_out):
            os.close(fd)
