"""The Internet checksum against the definition of RFC 1071, at every alignment and length, by every path."""

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guarded import Guarded
from ulnet.stack import checksum as ck


def reference(data: bytes, initial: int = 0) -> int:
    """RFC 1071 section 1, word for word; not complemented."""
    total = initial
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


SUMS: list[Callable[[bytes | memoryview], int]] = [ck.checksum, ck.checksum_portable, ck.checksum_naive]


@pytest.fixture(autouse=True, params=[True, False], ids=["vector", "words"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    if ck.use_fast_path(request.param) != request.param:
        pytest.skip("this processor has no AVX2")
    yield
    ck.use_fast_path(True)


def test_example_of_rfc_1071() -> None:
    # section 3: the sum of these four words is ddf2
    assert ck.sum16(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert ck.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF


def test_a_right_checksum_sums_to_zero() -> None:
    header = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")
    assert ck.checksum(header) == 0


def test_nothing_and_one_byte() -> None:
    assert ck.checksum(b"") == 0xFFFF
    assert ck.checksum(b"\x12") == 0x1200 ^ 0xFFFF


def test_every_length_and_alignment() -> None:
    pattern = bytes((i * 151 + 7 + i // 256 * 13) & 0xFF for i in range(800))
    for length in [*range(300), 383, 384, 385, 511, 513, 700]:
        want = reference(pattern[:length]) ^ 0xFFFF
        for align in (0, 1, 2, 3, 5, 8, 15, 31):
            view = memoryview(b"\xff" * align + pattern[:length] + b"\xff" * 3)[align : align + length]
            for add in SUMS:
                assert add(view) == want, (add, length, align)


@pytest.mark.parametrize("fill", [b"\xff", b"\x00", b"\x00\xff", b"\xff\xff\x00\x00"])
@pytest.mark.parametrize("length", [1, 2, 31, 1460, 65535, 65536, 1 << 20])
def test_carries_of_extreme_data(fill: bytes, length: int) -> None:
    data = (fill * (length // len(fill) + 1))[:length]
    want = reference(data)
    assert ck.sum16(data) == want
    assert ck.checksum_portable(data) == want ^ 0xFFFF


@given(st.binary(max_size=3000), st.integers(0, 0xFFFF))
@settings(max_examples=150, deadline=None)
def test_all_paths_agree_with_the_definition(data: bytes, initial: int) -> None:
    want = reference(data, initial) ^ 0xFFFF
    assert ck.checksum(data, initial) == want
    assert ck.checksum_portable(data, initial) == want


@given(st.lists(st.binary(max_size=200), max_size=8))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_length_sum_to_the_whole(pieces: list[bytes]) -> None:
    total = offset = 0
    for piece in pieces:
        total = ck.sum16(piece, total, offset)
        offset += len(piece)
    assert total == reference(b"".join(pieces))


@given(st.binary(max_size=600), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_copy_copies_exactly_and_sums(data: bytes, room: int) -> None:
    dst = bytearray(b"\xa5" * (len(data) + room))
    assert ck.copy_checksum(dst, data) == reference(data) ^ 0xFFFF
    assert bytes(dst) == data + b"\xa5" * room


@given(st.binary(min_size=2, max_size=60).filter(lambda b: len(b) % 2 == 0), st.integers(0, 29), st.integers(0, 0xFFFF))
@settings(max_examples=200, deadline=None)
def test_update_of_a_word_is_as_good_as_summing_again(data: bytes, at: int, new: int) -> None:
    at = at % (len(data) // 2) * 2
    changed = data[:at] + struct.pack("!H", new) + data[at + 2 :]
    old_sum, (old,) = ck.checksum(data), struct.unpack_from("!H", data, at)
    updated = ck.update(old_sum, old, new)
    # A receiver accepts it: 0 and 0xffff are one value in ones' complement.
    assert (reference(changed) + updated) % 0xFFFF == 0


def test_update_example_of_rfc_1624() -> None:
    # section 4: the case that RFC 1141's equation gets wrong
    assert ck.update(0xDD2F, 0x5555, 0x3285) == 0x0000


def test_nothing_is_read_or_written_beyond_the_data() -> None:
    with Guarded() as memory, Guarded() as target:
        for length in [*range(140), 255, 256, 257, 1460, 4095]:
            data = bytes(range(256)) * 16
            for place, to in ((memory.at_end, target.at_end), (memory.at_start, target.at_start)):
                view = place(data[:length])
                want = reference(data[:length]) ^ 0xFFFF
                assert [add(view) for add in SUMS] == [want] * 3
                room = to(bytes(length))
                assert ck.copy_checksum(room, view) == want
                assert bytes(room) == data[:length]


def test_mistakes_name_the_value() -> None:
    with pytest.raises(ValueError, match="initial=65536"):
        ck.checksum(b"", 65536)
    with pytest.raises(ValueError, match="dst has 3 bytes, src 4"):
        ck.copy_checksum(bytearray(3), b"1234")
    with pytest.raises(BufferError):
        ck.copy_checksum(b"1234", b"12")
    with pytest.raises(ValueError, match="new_word=-1"):
        ck.update(0, 0, -1)
