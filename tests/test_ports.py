"""Port names: who may share, what is chosen, what is delayed, and that nothing is left behind."""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulnet.stack.ports import QUARANTINED_MAX, TCP, UDP, Name, PortTable

A, B = "10.0.0.1", "10.0.0.2"
PEER = "192.0.2.9"
SEC = 1_000_000_000


@pytest.fixture
def table() -> PortTable:
    return PortTable([A, B], rng=random.Random(1))


def refused(number: int, call: object, *args: object, **kwargs: object) -> str:
    assert callable(call)
    with pytest.raises(OSError) as raised:
        call(*args, **kwargs)
    assert raised.value.errno == number, raised.value
    return str(raised.value)


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_addresses_overlap_as_bsd_has_it(table: PortTable, proto: int) -> None:
    table.bind(proto, A, 5000, now_ns=0)
    other = table.bind(proto, B, 5000, now_ns=0)
    assert "5000" in refused(errno.EADDRINUSE, table.bind, proto, A, 5000, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, proto, "", 5000, now_ns=0)
    table.bind(TCP + UDP - proto, "0.0.0.0", 5000, now_ns=0)  # the other protocol has its own ports
    table.release(other, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, proto, "0.0.0.0", 5000, now_ns=0)
    wild = table.bind(proto, "0.0.0.0", 5001, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, proto, A, 5001, now_ns=0)
    table.release(wild, now_ns=0)
    table.bind(proto, A, 5001, now_ns=0)


def test_mistakes(table: PortTable) -> None:
    assert "10.0.0.1, 10.0.0.2" in refused(errno.EADDRNOTAVAIL, table.bind, TCP, "10.9.9.9", 5000, now_ns=0)
    assert "1024" in refused(errno.EACCES, table.bind, TCP, A, 80, now_ns=0)
    table.bind(TCP, A, 80, now_ns=0, privileged=True)
    table.bind(TCP, A, 1024, now_ns=0)
    refused(errno.EINVAL, table.bind, TCP, A, 65536, now_ns=0)
    refused(errno.EINVAL, table.bind, TCP, A, -1, now_ns=0)
    refused(errno.EPROTONOSUPPORT, table.bind, 1, A, 5000, now_ns=0)
    refused(errno.EOPNOTSUPP, table.listen, table.bind(UDP, A, 5000, now_ns=0))
    refused(errno.EADDRNOTAVAIL, table.choose, TCP, "0.0.0.0", PEER, 80, now_ns=0)
    refused(errno.EADDRNOTAVAIL, table.choose, TCP, "10.9.9.9", PEER, 80, now_ns=0)
    with pytest.raises(ValueError, match="5-4"):
        PortTable([A], ephemeral=(5, 4))
    table.remove_address(B)
    refused(errno.EADDRNOTAVAIL, table.bind, TCP, B, 5000, now_ns=0)
    table.add_address(B)
    table.bind(TCP, B, 5000, now_ns=0)


def test_reuse_address_shares_but_not_with_a_listener(table: PortTable) -> None:
    one = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    two = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=0)
    table.listen(one)
    table.listen(one)
    refused(errno.EADDRINUSE, table.listen, two)
    assert two.state == "bound"
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=0, reuse_address=True)
    table.release(one, now_ns=0)
    table.listen(two)


def test_a_server_restarts_under_its_old_connections_with_reuse_address_only(table: PortTable) -> None:
    listener = table.bind(TCP, "", 5000, now_ns=0, reuse_address=True)
    table.listen(listener)
    conn = table.accept(listener, A, PEER, 4000, now_ns=0)
    assert (conn.addr, conn.port, conn.peer, conn.state) == (A, 5000, (PEER, 4000), "accepted")
    table.release(listener, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, TCP, "", 5000, now_ns=0)
    again = table.bind(TCP, "", 5000, now_ns=0, reuse_address=True)
    table.listen(again)
    table.release(again, now_ns=0)
    assert table.ports_in_use == 1
    table.release(conn, now_ns=0)
    assert table.ports_in_use == 0
    table.bind(TCP, "", 5000, now_ns=0)


def test_reuse_port_needs_the_same_user(table: PortTable) -> None:
    one = table.bind(TCP, A, 5000, now_ns=0, uid=7, reuse_port=True)
    two = table.bind(TCP, A, 5000, now_ns=0, uid=7, reuse_port=True)
    table.listen(one)
    table.listen(two)
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=0, uid=8, reuse_port=True)
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=0, uid=7)
    refused(errno.EADDRINUSE, table.bind, TCP, "", 5000, now_ns=0, uid=8, reuse_port=True)
    table.bind(TCP, "", 5000, now_ns=0, uid=7, reuse_port=True)


def test_a_holder_that_shares_both_ways_counts_once(table: PortTable) -> None:
    table.bind(TCP, A, 5000, now_ns=0, uid=7, reuse_address=True, reuse_port=True)
    table.bind(TCP, B, 5000, now_ns=0, uid=7)
    refused(errno.EADDRINUSE, table.bind, TCP, "", 5000, now_ns=0, uid=7, reuse_address=True, reuse_port=True)


def pairwise_conflict(new: Name, old: Name) -> bool:
    """Linux's inet_csk_bind_conflict() for one pair, as a sentence."""
    if new.addr != old.addr and "0.0.0.0" not in (new.addr, old.addr):
        return False
    if new.reuse_address and old.reuse_address and old.state != "listening":
        return False
    return not (new.reuse_port and old.reuse_port and new.uid == old.uid)


REQUEST = st.tuples(st.sampled_from(["0.0.0.0", A, B]), st.integers(0, 1), st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(REQUEST, st.integers(0, 9)), max_size=30))
def test_counted_conflicts_equal_pairwise_ones(script: list[tuple[tuple[str, int, bool, bool, bool], int]]) -> None:
    table = PortTable([A, B], rng=random.Random(1))
    held: list[Name] = []
    for (addr, uid, reuse_address, reuse_port, listens), victim in script:
        wanted = Name(TCP, addr, 5000, uid, reuse_address, reuse_port, True)
        conflict = any(pairwise_conflict(wanted, old) for old in held)
        try:
            name = table.bind(TCP, addr, 5000, now_ns=0, uid=uid, reuse_address=reuse_address, reuse_port=reuse_port)
        except OSError:
            assert conflict
            if held:
                table.release(held.pop(victim % len(held)), now_ns=0)
            continue
        assert not conflict
        held.append(name)
        if listens:
            wanted.state = "listening"
            others = [old for old in held if old is not name]
            try:
                table.listen(name)
            except OSError:
                assert any(pairwise_conflict(wanted, old) for old in others)
            else:
                assert not any(pairwise_conflict(wanted, old) for old in others)
    assert list(table.items()) == held and len(table) == len(held)
    for name in held:
        assert table.release(name, now_ns=0)
    assert (len(table), table.ports_in_use) == (0, 0)


# --- ports chosen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_port_zero_gives_each_port_once_and_at_random(proto: int) -> None:
    table = PortTable([A], ephemeral=(40000, 40099), rng=random.Random(5))
    table.bind(proto, A, 40050, now_ns=0)
    names = [table.bind(proto, A, 0, now_ns=0) for _ in range(99)]
    ports = [n.port for n in names]
    assert sorted([*ports, 40050]) == list(range(40000, 40100))
    assert ports != sorted(ports) and sum(b - a == 1 for a, b in itertools.pairwise(ports)) < 20
    assert "40000-40099" in refused(errno.EADDRINUSE, table.bind, proto, A, 0, now_ns=0)
    table.release(names[3], now_ns=0)
    assert table.bind(proto, A, 0, now_ns=0).port == ports[3]


def test_default_range_is_linux_and_randomness_the_systems() -> None:
    ports = [PortTable([A]).choose(TCP, A, PEER, 80, now_ns=0).port for _ in range(50)]
    assert all(32768 <= p <= 60999 for p in ports) and len(set(ports)) > 40


def test_every_peer_has_the_whole_range() -> None:
    table = PortTable([A], ephemeral=(40000, 40099), rng=random.Random(5))
    for peer in range(5):
        ports = [table.choose(TCP, A, PEER, 80 + peer, now_ns=0).port for _ in range(100)]
        assert sorted(ports) == list(range(40000, 40100))
        refused(errno.EADDRNOTAVAIL, table.choose, TCP, A, PEER, 80 + peer, now_ns=0)
    assert len(table) == 500 and table.ports_in_use == 100
    # Ports in use by connections are nobody's to bind.
    refused(errno.EADDRINUSE, table.bind, TCP, A, 0, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, TCP, A, 40000, now_ns=0)
    for name in list(table.items()):
        table.release(name, now_ns=0)
    table.bind(TCP, A, 40000, now_ns=0)


def test_chosen_ports_keep_off_explicit_ones_and_off_themselves() -> None:
    table = PortTable([A], ephemeral=(40000, 40009), rng=random.Random(5))
    table.listen(table.bind(TCP, A, 40003, now_ns=0))
    table.bind(TCP, A, 40004, now_ns=0)
    got = {table.choose(TCP, A, PEER, 80, now_ns=0).port for _ in range(8)}
    assert got == set(range(40000, 40010)) - {40003, 40004}
    refused(errno.EADDRNOTAVAIL, table.choose, TCP, A, PEER, 80, now_ns=0)
    own = {table.choose(TCP, A, A, 40007, now_ns=0).port for _ in range(7)}
    assert 40007 not in own
    refused(errno.EADDRNOTAVAIL, table.choose, TCP, A, A, 40007, now_ns=0)


def test_udp_chosen_ports_are_not_shared() -> None:
    table = PortTable([A], ephemeral=(40000, 40009), rng=random.Random(5))
    for i in range(10):
        table.choose(UDP, A, PEER, 80 + i, now_ns=0)
    assert table.ports_in_use == 10
    refused(errno.EADDRNOTAVAIL, table.choose, UDP, A, PEER, 99, now_ns=0)


def test_sequences_differ_between_peers() -> None:
    """RFC 6056 (3.3.4): going up toward one peer tells nothing about the ports toward another."""
    table = PortTable([A], rng=random.Random(5))
    starts = Counter(table.choose(TCP, A, PEER, port, now_ns=0).port for port in range(200))
    assert len(starts) > 180
    first, second = (table.choose(TCP, A, PEER, 1000, now_ns=0).port for _ in range(2))
    assert (second - first) % 28232 == 1


# --- connections, quarantine ---------------------------------------------------------------------------------


def test_four_tuples_are_unique(table: PortTable) -> None:
    one = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    two = table.bind(TCP, "", 5000, now_ns=0, reuse_address=True)
    table.connect(one, A, PEER, 80, now_ns=0)
    assert "exists" in refused(errno.EADDRNOTAVAIL, table.connect, two, A, PEER, 80, now_ns=0)
    refused(errno.EINVAL, table.connect, one, A, PEER, 81, now_ns=0)
    table.connect(two, B, PEER, 80, now_ns=0)
    table.disconnect(one)
    assert (one.state, one.peer) == ("bound", None)
    table.connect(one, A, PEER, 81, now_ns=0)


def test_accept_refuses_what_exists_and_needs_a_listener(table: PortTable) -> None:
    listener = table.bind(TCP, A, 5000, now_ns=0)
    refused(errno.EINVAL, table.accept, listener, A, PEER, 80, now_ns=0)
    table.listen(listener)
    conn = table.accept(listener, A, PEER, 80, now_ns=0)
    refused(errno.EADDRINUSE, table.accept, listener, A, PEER, 80, now_ns=0)
    table.release(conn, now_ns=0)
    table.accept(listener, A, PEER, 80, now_ns=0)


def test_udp_names_may_share_a_peer(table: PortTable) -> None:
    one = table.bind(UDP, A, 5000, now_ns=0)
    table.connect(one, A, PEER, 53, now_ns=0)
    table.connect(one, A, PEER, 54, now_ns=0)
    assert one.peer == (PEER, 54)
    table.disconnect(one)
    assert one.peer is None


def test_quarantine_holds_name_and_four_tuple_until_it_ends(table: PortTable) -> None:
    name = table.bind(TCP, A, 5000, now_ns=0)
    table.connect(name, A, PEER, 80, now_ns=0)
    assert table.release(name, now_ns=0, quarantine_ns=60 * SEC)
    assert not table.release(name, now_ns=0)
    assert len(table) == 0 and list(table.quarantined().values()) == [60 * SEC]
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=60 * SEC - 1)
    table.bind(TCP, A, 5000, now_ns=60 * SEC)
    assert not table.quarantined()


def test_quarantined_four_tuple_is_not_chosen_again() -> None:
    table = PortTable([A], ephemeral=(40000, 40001), rng=random.Random(1))
    one, two = (table.choose(TCP, A, PEER, 80, now_ns=0) for _ in range(2))
    table.release(one, now_ns=0, quarantine_ns=SEC)
    refused(errno.EADDRNOTAVAIL, table.choose, TCP, A, PEER, 80, now_ns=1)
    assert table.choose(TCP, A, PEER, 81, now_ns=1)
    assert table.choose(TCP, A, PEER, 80, now_ns=SEC).port == one.port
    table.release(two, now_ns=SEC)


def test_reuse_address_binds_and_listens_over_time_wait_but_the_tuple_stays_shut(table: PortTable) -> None:
    listener = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    table.listen(listener)
    conn = table.accept(listener, A, PEER, 80, now_ns=0)
    table.release(conn, now_ns=0, quarantine_ns=SEC)
    table.release(listener, now_ns=0)
    refused(errno.EADDRINUSE, table.bind, TCP, A, 5000, now_ns=0)
    active = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    assert "a moment ago" in refused(errno.EADDRNOTAVAIL, table.connect, active, A, PEER, 80, now_ns=0)
    table.release(active, now_ns=0)
    again = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    table.listen(again)
    # The peer itself may open it anew.
    table.accept(again, A, PEER, 80, now_ns=0)
    assert not table.quarantined()


def test_quarantine_is_bounded_and_counts_what_it_cuts(table: PortTable) -> None:
    listener = table.bind(TCP, A, 5000, now_ns=0)
    table.listen(listener)
    for i in range(QUARANTINED_MAX + 10):
        conn = table.accept(listener, A, f"192.0.{i >> 16}.2", i & 0xFFFF, now_ns=i)
        table.release(conn, now_ns=i, quarantine_ns=SEC)
    assert len(table.quarantined()) == QUARANTINED_MAX and table.quarantine_cut == 10
    table.release(listener, now_ns=0)
    table.expire(3 * SEC)
    assert (len(table), table.ports_in_use, len(table.quarantined())) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_nothing_is_left_after_any_life(seed: int) -> None:
    rng = random.Random(seed)
    table = PortTable([A, B], ephemeral=(40000, 40019), rng=random.Random(seed))
    now = 0
    for _ in range(150):
        now += rng.randrange(SEC)
        names = list(table.items())
        name = rng.choice(names) if names else None
        try:
            match rng.randrange(7):
                case 0:
                    table.bind(
                        rng.choice([TCP, UDP]),
                        rng.choice(["", A, B]),
                        rng.choice([0, 0, 40003, 5000]),
                        now_ns=now,
                        reuse_address=rng.random() < 0.7,
                        reuse_port=rng.random() < 0.2,
                    )
                case 1:
                    table.choose(rng.choice([TCP, UDP]), A, PEER, rng.randrange(3), now_ns=now)
                case 2 if name:
                    table.listen(name)
                case 3 if name:
                    table.accept(name, A, PEER, rng.randrange(5), now_ns=now)
                case 4 if name:
                    table.connect(name, A, PEER, rng.randrange(5), now_ns=now)
                case _ if name:
                    table.release(name, now_ns=now, quarantine_ns=rng.choice([0, 5 * SEC]))
        except OSError:
            pass
        tuples = [(n.addr, n.port, n.peer) for n in table.items() if n.proto == TCP and n.peer and n.addr != "0.0.0.0"]
        assert len(set(tuples)) == len(tuples)
    for name in table.items():
        table.release(name, now_ns=now)
    table.expire(now + 6 * SEC)
    assert (len(table), table.ports_in_use, table.quarantined()) == (0, 0, {})
    assert len({table.bind(TCP, A, 0, now_ns=now).port for _ in range(20)}) == 20


def test_cost_does_not_grow_with_the_table(table: PortTable) -> None:
    """Two thousand holders of one port: a bind still counts, and does not look at each."""
    listener = table.bind(TCP, A, 5000, now_ns=0, reuse_address=True)
    table.listen(listener)

    def cost() -> float:
        best = 1.0
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(50):
                refused(errno.EADDRINUSE, table.bind, TCP, "", 5000, now_ns=0, reuse_address=True)
            best = min(best, time.perf_counter() - start)
        return best

    before = cost()
    for i in range(20000):
        table.accept(listener, A, f"192.0.2.{i >> 14}", i & 0x3FFF, now_ns=0)
    assert cost() < 20 * before
