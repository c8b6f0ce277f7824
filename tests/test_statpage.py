"""Status page: what a library writes is what the server reads, and nothing it writes can hurt the server."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import threading

import pytest

from ulnet.stack.statpage import RECORDS, StatPage, give, take

TCP, UDP = 6, 17
RECORD_BYTES = 192
TCP_STAT_AT = 64  # session id 8, flow 40, two words of the writer
UNSETTLED_AT = TCP_STAT_AT - 8
REMAINS_AT = TCP_STAT_AT + 96
STATE_AT = TCP_STAT_AT
HEADER = struct.Struct("<IIII")


@pytest.fixture
def pages() -> tuple[StatPage, StatPage, mmap.mmap]:
    """The application's page, the server's read-only view, and the application's bare access."""
    page = StatPage.create()
    view = StatPage.open(page.fd, writable=False)
    return page, view, mmap.mmap(page.fd, os.fstat(page.fd).st_size)


def test_server_sees_what_is_taken_and_written(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, raw = pages
    assert view.records() == [] and len(view) == 0 and not view.writable and page.writable
    at = take(page, 77, TCP, 5000, 80)
    take(page, 78, UDP, 5001, 53)
    assert at is not None
    fields = (4, 1, 2, 0xFFFFFFFF, 4, 5, 6, 7)
    wide = (10, 11, 12, 13, 14, 15, 16, (1 << 63) - 1)
    assert not view.records()[0].settled  # never written: nothing in it is to be trusted
    raw[at + UNSETTLED_AT] = 0
    raw[at + TCP_STAT_AT : at + REMAINS_AT] = struct.pack("<8I8Q", *fields, *wide)
    row = view.record_for(77)
    assert row is not None
    assert row[:6] == (77, TCP, "10.0.0.1", 5000, "10.0.0.2", 80)
    assert row[6:14] == fields and row[14:22] == wide and row.settled and row.raw == raw[at : at + RECORD_BYTES]
    assert [r.session_id for r in view.records()] == [77, 78]
    assert view.record_for(79) is None and view.record_for(0) is None
    give(page, at)
    assert [r.session_id for r in view.records()] == [78] and len(view) == 1


def test_records_are_reused_cleared(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, raw = pages
    offsets = [take(page, i + 1, TCP, i + 1, 80) for i in range(100)]
    assert len(set(offsets)) == 100
    for at in offsets[10:60]:
        assert at is not None
        raw[at + TCP_STAT_AT : at + RECORD_BYTES] = bytes([1]) + bytes(RECORD_BYTES - TCP_STAT_AT - 1)
        give(page, at)
        give(page, at)  # twice: ignored
    again = [take(page, 1000 + i, TCP, 9, 80) for i in range(60)]
    assert len(set(again)) == 60 and set(offsets[10:60]) < set(again)
    assert len(view) == 110
    assert all(r.state == 0 for r in view.records() if r.session_id >= 1000)


def test_full_is_counted(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, _ = pages
    offsets = [take(page, i + 1, TCP, 1, 80) for i in range(RECORDS)]
    assert None not in offsets and view.full == 0
    assert take(page, 99999, TCP, 1, 80) is None and view.full == 1
    assert offsets[7] is not None
    give(page, offsets[7])
    assert take(page, 99999, TCP, 1, 80) == offsets[7]
    assert len(view.records()) == RECORDS


def test_memory_is_taken_by_use_only(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, _ = pages
    take(page, 1, TCP, 1, 80)
    view.records()
    assert os.fstat(page.fd).st_blocks * 512 <= 8192


def test_threads_take_and_give(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, _ = pages
    held: list[list[int]] = [[] for _ in range(4)]

    def work(me: int) -> None:
        rng = random.Random(me)
        for i in range(5000):
            if held[me] and rng.random() < 0.5:
                give(page, held[me].pop())
            else:
                at = take(page, 1 + me * 10000 + i, TCP, 1, 80)
                assert at is not None
                held[me].append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    everything = [at for mine in held for at in mine]
    assert len(set(everything)) == len(everything) == len(view)


def test_size_is_sealed_and_the_view_stays_read_only(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, _ = pages
    for size in (0, 4096, 1 << 24):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(page.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert take(view, 5, TCP, 1, 80) is None
    with pytest.raises(ValueError):
        give(view, 64)


def test_a_hostile_application_is_only_skipped(pages: tuple[StatPage, StatPage, mmap.mmap]) -> None:
    page, view, raw = pages
    good = [take(page, i + 1, TCP, 5000, 80) for i in range(5)]
    assert None not in good
    bad_state, bad_proto, bad_count, bad_port = (at for at in good[:4] if at is not None)
    raw[bad_state + STATE_AT] = 11
    raw[bad_proto + 8 + 36] = 1
    raw[bad_count + REMAINS_AT - 1] = 0x80
    raw[bad_port + 8 + 32 : bad_port + 8 + 34] = b"\0\0"
    assert [r.session_id for r in view.records()] == [5]
    assert view.invalid == 4
    assert view.record_for(1) is None
    # A count of records beyond the page, a broken free list, no magic: nothing is read behind the end.
    raw[:64] = b"\xff" * 64
    assert view.record_for(5) is not None
    assert take(page, 9, TCP, 1, 80) is None
    rng = random.Random(1)
    raw[:] = rng.randbytes(len(raw))
    view.records()
    assert len(view) <= RECORDS
    raw[:] = bytes(len(raw))
    assert view.records() == []
    # A view of ruins can still be opened by the server; a library will not take them for a page.
    StatPage.open(page.fd, writable=False)
    with pytest.raises(ValueError, match="magic 0x0"):
        StatPage.open(page.fd, writable=True)


def test_open_refuses_other_files() -> None:
    with open("/dev/null") as other, pytest.raises(ValueError, match="not a status page"):
        StatPage.open(other.fileno(), writable=False)
    page = StatPage.create()
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, os.fstat(page.fd).st_size)
    with pytest.raises(ValueError, match="sealed"):
        StatPage.open(fd, writable=False)
    os.close(fd)
    with pytest.raises(TypeError, match="create"):
        StatPage()
    with pytest.raises(ValueError, match="create"):
        StatPage.__new__(StatPage).records()


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        page = StatPage.create()
        StatPage.open(page.fd, writable=True)
    del page
    assert len(os.listdir("/proc/self/fd")) == before
