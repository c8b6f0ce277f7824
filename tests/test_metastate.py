"""Metastate: what is written is what every reader resolves, at once, whole, and only the writer writes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import ipaddress
import mmap
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ulnet.stack.metastate import Metastate

OUR_MAC = bytes.fromhex("02000000000a")
MAC_B = bytes.fromhex("02000000000b")
MAC_GW = bytes.fromhex("0200000000fe")


@pytest.fixture(params=[True, False], ids=["shared", "private"])
def meta(request: pytest.FixtureRequest) -> Metastate:
    return Metastate.create("10.0.0.1", 24, OUR_MAC, 1500, "10.0.0.254", shared=request.param)


def test_fields(meta: Metastate) -> None:
    assert (meta.addr, meta.prefix_len, meta.mac, meta.mtu) == ("10.0.0.1", 24, OUR_MAC, 1500)
    assert meta.writable
    assert [(r.dst, r.prefix_len, r.gateway) for r in meta.routes()] == [
        ("10.0.0.0", 24, None),
        ("0.0.0.0", 0, "10.0.0.254"),
    ]


def test_resolution(meta: Metastate) -> None:
    assert meta.resolve("10.0.0.7") == (None, "10.0.0.7", 1500, errno.EAGAIN)
    meta.set_neighbour("10.0.0.7", MAC_B)
    assert meta.resolve("10.0.0.7") == (MAC_B, "10.0.0.7", 1500, 0)
    assert meta.resolve("192.0.2.1") == (None, "10.0.0.254", 1500, errno.EAGAIN)
    meta.set_neighbour("10.0.0.254", MAC_GW)
    assert meta.resolve("192.0.2.1") == (MAC_GW, "10.0.0.254", 1500, 0)
    meta.set_neighbour("10.0.0.254", None)
    assert meta.resolve("192.0.2.1") == (None, "10.0.0.254", 1500, errno.EHOSTUNREACH)
    assert meta.remove_neighbour("10.0.0.254")
    assert not meta.remove_neighbour("10.0.0.254")
    assert meta.resolve("192.0.2.1").errno == errno.EAGAIN


def test_special_destinations(meta: Metastate) -> None:
    assert meta.resolve("10.0.0.1") == (bytes(6), "10.0.0.1", 1500, 0)
    assert meta.resolve("10.0.0.255").mac == b"\xff" * 6
    for never in ("224.0.0.1", "255.255.255.255", "240.0.0.1", "127.0.0.1", "0.0.0.0", "0.1.2.3", "ff02::1", "::1"):
        assert meta.resolve(never) == (None, None, 1500, errno.ENETUNREACH), never


def test_point_to_point_prefix_has_no_broadcast() -> None:
    meta = Metastate.create("10.0.0.0", 31, OUR_MAC, 1500, shared=False)
    assert meta.resolve("10.0.0.1").errno == errno.EAGAIN


def test_broadcast_of_an_odd_prefix() -> None:
    meta = Metastate.create("10.1.2.3", 22, OUR_MAC, 1500, shared=False)
    assert meta.resolve("10.1.3.255").mac == b"\xff" * 6
    assert meta.resolve("10.1.2.255").errno == errno.EAGAIN
    assert meta.resolve("10.1.7.255").errno == errno.ENETUNREACH


def test_no_route_without_gateway() -> None:
    meta = Metastate.create("10.0.0.1", 24, OUR_MAC, 1500, shared=False)
    assert meta.resolve("192.0.2.1") == (None, None, 1500, errno.ENETUNREACH)


def test_route_search_agrees_with_a_model() -> None:
    rng = random.Random(7)
    meta = Metastate.create("10.0.0.1", 8, OUR_MAC, 1500, shared=False)
    model: dict[tuple[ipaddress.IPv4Network, int], tuple[str | None, int]] = {
        (ipaddress.IPv4Network("10.0.0.0/8"), 0): (None, 0)
    }
    for step in range(400):
        plen = rng.choice([0, 8, 12, 17, 24, 32])
        net = ipaddress.IPv4Network((0xC0000000 | rng.getrandbits(6) << 18, plen), strict=False)
        metric = rng.choice([0, 5])
        if rng.random() < 0.5 and len(model) < 60:
            gateway, mtu = f"10.0.{step % 200}.2", rng.choice([0, 1000, 9000])
            meta.set_route(str(net.network_address), plen, gateway, metric=metric, mtu=mtu)
            model[net, metric] = (gateway, mtu)
        else:
            known = model.pop((net, metric), None)
            assert meta.remove_route(str(net.network_address), plen, metric=metric) == (known is not None)
        assert len(meta.routes()) == len(model)
        probe = ipaddress.IPv4Address(0xC0000000 | rng.getrandbits(24))
        best = min(
            ((-n.prefixlen, m, hop) for (n, m), hop in model.items() if probe in n),
            default=None,
            key=lambda row: row[:2],
        )
        found = meta.resolve(str(probe))
        if best is None:
            assert found.errno == errno.ENETUNREACH
        else:
            gateway2, mtu2 = best[2]
            assert (found.next_hop, found.mtu) == (gateway2 or str(probe), min(mtu2 or 1500, 1500))


def test_neighbours_agree_with_a_model() -> None:
    """Inserts and removals in a dense table: the shifting of probe chains loses nobody."""
    rng = random.Random(3)
    meta = Metastate.create("10.0.0.1", 8, OUR_MAC, 1500, shared=False)
    model: dict[str, bytes | None] = {}
    for _ in range(6000):
        addr = f"10.0.{rng.randrange(2, 5)}.{rng.randrange(250)}"
        if rng.random() < 0.6:
            mac = None if rng.random() < 0.2 else bytes([2, *rng.randbytes(5)])
            meta.set_neighbour(addr, mac)
            model[addr] = mac
        else:
            assert meta.remove_neighbour(addr) == (addr in model)
            model.pop(addr, None)
        probe = f"10.0.{rng.randrange(2, 5)}.{rng.randrange(250)}"
        want = errno.EAGAIN if probe not in model else 0 if model[probe] else errno.EHOSTUNREACH
        assert meta.resolve(probe)[::3] == (model.get(probe), want)
    assert {n.addr: n.mac for n in meta.neighbours()} == model
    assert meta.evicted == 0


def test_full_table_evicts_failed_then_oldest() -> None:
    meta = Metastate.create("10.0.0.1", 8, OUR_MAC, 1500, shared=False)
    hosts = [f"10.1.{i // 250}.{i % 250}" for i in range(768)]
    for host in hosts:
        meta.set_neighbour(host, MAC_B)
    meta.set_neighbour(hosts[500], None)
    meta.set_neighbour(hosts[0], MAC_B)  # set again: no longer the oldest
    assert meta.evicted == 0
    meta.set_neighbour("10.2.0.1", MAC_B)
    assert meta.evicted == 1
    assert meta.resolve(hosts[500]).errno == errno.EAGAIN
    meta.set_neighbour("10.2.0.2", MAC_B)
    assert meta.evicted == 2
    assert meta.resolve(hosts[1]).errno == errno.EAGAIN
    assert len(meta.neighbours()) == 768
    assert all(meta.resolve(h).errno == 0 for h in hosts[2:] if h != hosts[500])
    assert meta.resolve(hosts[0]).errno == 0


def test_eviction_keeps_its_order_while_entries_move() -> None:
    """Removals shift entries in the table; who goes next is still the one that failed, or was set, longest ago."""
    rng = random.Random(11)
    meta = Metastate.create("10.0.0.1", 8, OUR_MAC, 1500, shared=False)
    order: dict[str, bytes | None] = {}
    for _ in range(6000):
        addr = f"10.1.{rng.randrange(4)}.{rng.randrange(250)}"
        if order and rng.random() < 0.1:
            gone = rng.choice(list(order))
            assert meta.remove_neighbour(gone)
            del order[gone]
        mac = None if rng.random() < 0.05 else MAC_B
        if addr not in order and len(order) == 768:
            failed = [a for a, m in order.items() if m is None]
            del order[failed[0] if failed else next(iter(order))]
        order.pop(addr, None)
        order[addr] = mac
        meta.set_neighbour(addr, mac)
    assert meta.evicted > 500
    assert {n.addr: n.mac for n in meta.neighbours()} == order


def test_generation_changes_with_content_only(meta: Metastate) -> None:
    before = meta.generation
    meta.set_neighbour("10.0.0.7", MAC_B)
    changed = meta.generation
    assert changed > before and changed % 2 == 0
    meta.set_neighbour("10.0.0.7", MAC_B)
    meta.set_route("10.0.0.0", 24)
    assert meta.generation == changed
    meta.set_route("192.0.2.0", 24, "10.0.0.9")
    assert meta.generation > changed


def test_mistakes_name_the_value(meta: Metastate) -> None:
    with pytest.raises(ValueError, match="'10.0.0'"):
        meta.resolve("10.0.0")
    with pytest.raises(ValueError, match="33.*0..32"):
        meta.set_route("10.0.0.0", 33)
    with pytest.raises(ValueError, match="did you mean 10.9.0.0/16"):
        meta.set_route("10.9.1.0", 16)
    with pytest.raises(ValueError, match="gateway 192.0.2.1 .* not on the link"):
        meta.set_route("10.9.0.0", 16, "192.0.2.1")
    with pytest.raises(ValueError, match="6 bytes"):
        meta.set_neighbour("10.0.0.7", b"123")
    with pytest.raises(ValueError, match="01:00:5e:00:00:01"):
        meta.set_neighbour("10.0.0.7", bytes.fromhex("01005e000001"))
    with pytest.raises(ValueError, match="no neighbour"):
        meta.set_neighbour("10.0.0.1", MAC_B)
    with pytest.raises(ValueError, match="MTU 60"):
        Metastate.create("10.0.0.1", 24, OUR_MAC, 60)
    with pytest.raises(ValueError, match="224.0.0.1"):
        Metastate.create("224.0.0.1", 24, OUR_MAC, 1500)
    with pytest.raises(TypeError, match="create"):
        Metastate()
    with pytest.raises(ValueError, match="create"):
        _ = Metastate.__new__(Metastate).addr
    for i in range(62):
        meta.set_route(f"192.0.{i}.0", 24, "10.0.0.9")
    with pytest.raises(OSError, match="all 64 places") as full:
        meta.set_route("198.51.100.0", 24, "10.0.0.9")
    assert full.value.errno == errno.ENOBUFS


# --- two mappings ------------------------------------------------------------------------------------------


def test_reader_sees_changes_at_once_and_cannot_write() -> None:
    meta = Metastate.create("10.0.0.1", 24, OUR_MAC, 1500)
    reader = Metastate.open(meta.fd)
    assert not reader.writable and (reader.addr, reader.mac, reader.mtu) == ("10.0.0.1", OUR_MAC, 1500)
    meta.set_neighbour("10.0.0.7", MAC_B)
    assert reader.resolve("10.0.0.7").mac == MAC_B
    assert reader.routes() == meta.routes() and reader.generation == meta.generation
    for change in (
        lambda: reader.set_neighbour("10.0.0.7", MAC_GW),
        lambda: reader.remove_neighbour("10.0.0.7"),
        lambda: reader.set_route("192.0.2.0", 24),
        lambda: reader.remove_route("10.0.0.0", 24),
    ):
        with pytest.raises(PermissionError, match="read-only"):
            change()
    # The descriptor itself gives no write access either, however it is used or opened again.
    again = os.open(f"/proc/self/fd/{meta.fd}", os.O_RDWR)
    for fd in (meta.fd, again):
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
    os.close(again)


def test_open_refuses_other_files() -> None:
    with open("/dev/null") as other, pytest.raises(ValueError, match="not a metastate page"):
        Metastate.open(other.fileno())
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="0 bytes"):
        Metastate.open(fd)
    meta = Metastate.create("10.0.0.1", 24, OUR_MAC, 1500)
    os.ftruncate(fd, os.fstat(meta.fd).st_size)
    with pytest.raises(ValueError, match="sealed"):
        Metastate.open(fd)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(ValueError, match="magic 0x0"):
        Metastate.open(fd)
    os.close(fd)


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        meta = Metastate.create("10.0.0.1", 24, OUR_MAC, 1500)
        Metastate.open(meta.fd)
    del meta
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_writer_stopped_in_the_middle_of_a_change_stops_no_reader() -> None:
    """The page as such a writer leaves it: generation odd, tables[0] in ruins. tables[1] is the last whole state."""
    meta = Metastate.create("10.0.0.1", 24, OUR_MAC, 1500, "10.0.0.254")
    reader = Metastate.open(meta.fd)
    meta.set_neighbour("10.0.0.7", MAC_B)
    meta.set_neighbour("10.0.0.254", MAC_GW)
    routes, neighbours = meta.routes(), meta.neighbours()
    inode = os.fstat(meta.fd).st_ino
    with open("/proc/self/maps") as maps:
        rows = [line.split() for line in maps]
    (start,) = (int(row[0].split("-")[0], 16) for row in rows if row[4] == str(inode) and row[1] == "rw-s")
    generation = ctypes.c_uint64.from_address(start + 8)
    generation.value += 1
    ctypes.memset(start + 64, 0xA5, 64 * 40 + 1024 * 24)
    assert reader.generation % 2 == 1
    assert reader.resolve("10.0.0.7") == (MAC_B, "10.0.0.7", 1500, 0)
    assert reader.resolve("192.0.2.1") == (MAC_GW, "10.0.0.254", 1500, 0)
    assert reader.routes() == routes and reader.neighbours() == neighbours


WRITER = """
import sys
from ulnet.stack.metastate import Metastate
meta = Metastate.create("10.0.0.1", 24, bytes.fromhex("02000000000a"), 1500)
meta.set_neighbour("10.0.0.7", bytes([2]) * 6)
print(meta.fd, flush=True)
i = 0
while True:
    # One MAC of six equal bytes after the other, and a table in motion around it.
    meta.set_neighbour("10.0.0.7", bytes([2 * (1 + i % 100)]) * 6)
    meta.set_neighbour(f"10.0.0.{10 + i % 200}", bytes([2]) * 6)
    meta.remove_neighbour(f"10.0.0.{10 + (i * 7) % 200}")
    i += 1
"""


def test_a_running_or_stopped_writer_never_shows_half_a_change() -> None:
    """A hundred stops at random moments: the reader always resolves, always a whole entry."""
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            remote = int(writer.stdout.readline())
            fd = os.open(f"/proc/{writer.pid}/fd/{remote}", os.O_RDONLY)
            reader = Metastate.open(fd)
            os.close(fd)
            seen, odd = set(), 0
            deadline = time.monotonic() + 5
            rounds = 0
            while rounds < 100 and time.monotonic() < deadline:
                rounds += 1
                for _ in range(200):
                    found = reader.resolve("10.0.0.7")
                    if found.errno == errno.EAGAIN and found.next_hop is None:
                        continue  # the page changed on every try: told so, not a wrong answer
                    assert found.errno == 0 and found.mac is not None and len(set(found.mac)) == 1, found
                    seen.add(found.mac)
                writer.send_signal(signal.SIGSTOP)
                os.waitpid(writer.pid, os.WUNTRACED)
                odd += reader.generation & 1
                found = reader.resolve("10.0.0.7")
                assert found.errno == 0 and found.mac is not None and len(set(found.mac)) == 1, found
                assert reader.neighbours()
                writer.send_signal(signal.SIGCONT)
            assert len(seen) > 1
        finally:
            writer.kill()


@pytest.mark.parametrize("block", ["10.1.{}.{}", "10.{}.1.{}", "2001:db8::{}:{}"])
def test_look_ups_in_a_full_table_stay_short(block: str) -> None:
    """Addresses of one subnet differ in their last bytes only: they must not share one probe chain."""
    meta = Metastate.create("10.0.0.1", 8, OUR_MAC, 1500, shared=False)
    hosts = [block.format(i // 250, i % 250) for i in range(768)]
    for host in hosts:
        meta.set_neighbour(host, MAC_B)
    assert sum(map(meta.probe_length, hosts)) / 768 < 5  # Knuth 6.4: 2.5 at three quarters
    strangers = [block.format(9, i) for i in range(250)]
    assert sum(map(meta.probe_length, strangers)) / 250 < 20  # 8.5


def test_shares_are_counted_for_every_reader(meta: Metastate) -> None:
    assert meta.shares == 0
    generation = meta.generation
    meta.bump_shares()
    meta.bump_shares()
    assert meta.shares == 2 and meta.generation == generation
    if meta.fd >= 0:
        reader = Metastate.open(meta.fd)
        assert reader.shares == 2
        meta.bump_shares()
        assert reader.shares == 3
        with pytest.raises((ValueError, OSError, PermissionError)):
            reader.bump_shares()
