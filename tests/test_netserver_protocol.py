"""Messages between library and server: each is exactly what was sent, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulnet.stack import protocol as p

addresses = st.ip_addresses().map(str)
ports = st.integers(0, 65535)
numbers = st.integers(0, 2**64 - 1)


@given(numbers, st.integers(0, 255), addresses, ports, st.booleans(), st.booleans())
def test_a_record_survives_packing(number: int, protocol: int, address: str, port: int, one: bool, two: bool) -> None:
    record = p.Bind(number, protocol, address, port, one, two)
    again = p.Bind.unpack(record.pack())
    # ::ffff:a.b.c.d and a.b.c.d are one address here (RFC 4291 2.5.5.2)
    assert p.pack_address(again.address) == p.pack_address(address)
    assert (again.session, again.protocol, again.port) == (number, protocol, port)
    assert (again.reuse_address, again.reuse_port) == (one, two)


@given(st.sampled_from(sorted(p.REQUESTS)), st.binary(max_size=200))
def test_garbage_is_refused_or_is_a_record(call: int, data: bytes) -> None:
    kind = p.REQUESTS[call]
    try:
        record = kind.unpack(data)
    except p.ProtocolError:
        return
    assert len(data) == kind.size() and isinstance(record, kind)


def test_a_truth_value_is_0_or_1() -> None:
    data = bytearray(p.Forget(1, True).pack())
    data[-1] = 2
    with pytest.raises(p.ProtocolError):
        p.Forget.unpack(bytes(data))


def test_ids_are_unique_and_leave_room_for_replies() -> None:
    requests = [int(call) for call in p.Call]
    upcalls = [int(call) for call in p.Upcall]
    replies = [call + p.REPLY_OFFSET for call in requests]
    assert len({*requests, *upcalls, *replies}) == len(requests) * 2 + len(upcalls)


def test_long_reasons_are_cut_and_not_refused() -> None:
    assert p.Status.unpack(p.Status(1, "x" * 500).pack()).reason == "x" * 191


def test_path_is_argument_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(p.PATH_VARIABLE, raising=False)
    assert p.server_path() == p.DEFAULT_PATH
    monkeypatch.setenv(p.PATH_VARIABLE, "/x")
    assert p.server_path() == "/x"
    assert p.server_path("/y") == "/y"
