"""ARP at virtual time: what is sent when, what is believed, and what the page says about it."""

from __future__ import annotations

import errno
import random

import pytest

from ulnet.stack.metastate import Metastate
from ulnet.stack.neighbour import ArpMessage, NeighbourTable

US, PEER, OTHER, GATEWAY = "10.0.0.1", "10.0.0.7", "10.0.0.8", "10.0.0.254"
US_MAC = bytes.fromhex("020000000001")
PEER_MAC = bytes.fromhex("020000000007")
OTHER_MAC = bytes.fromhex("020000000008")
ALL, ZERO = b"\xff" * 6, bytes(6)
REQUEST, REPLY = 1, 2
SEC = 1_000_000_000


class Lan:
    """Our machine and a clock. ``run`` goes from deadline to deadline."""

    def __init__(self, prefix_len: int = 24) -> None:
        self.meta = Metastate.create(US, prefix_len, US_MAC, 1500, GATEWAY, shared=False)
        self.table = NeighbourTable(self.meta)
        self.now = 5 * SEC
        self.answering: dict[str, bytes] = {}

    def ask(self, addr: str) -> int:
        return self.table.ask(addr, self.now)

    def hear(self, op: int, sha: bytes, spa: str, tpa: str = US, tha: bytes = US_MAC) -> None:
        self.table.input(op, sha, spa, tha, tpa, self.now)

    def take(self) -> list[ArpMessage]:
        sent, self.table.sent = self.table.sent, []
        return sent

    def run(self, seconds: float) -> list[tuple[float, ArpMessage]]:
        """Everything sent, with seconds from the start; hosts in ``answering`` reply at once."""
        start, end, log = self.now, self.now + round(seconds * SEC), []
        for _ in range(100_000):
            for message in self.take():
                log.append(((self.now - start) / SEC, message))
                mac = self.answering.get(message.tpa)
                if mac and message.op == REQUEST and message.dst_mac in (ALL, mac):
                    self.hear(REPLY, mac, message.tpa)
            due = self.table.deadline_ns()
            if due is None or due > end:
                self.now = end
                return log
            self.now = max(self.now, due)
            self.table.timers(self.now)
        raise AssertionError("timers without end")

    def page(self, addr: str) -> tuple[bytes | None, int]:
        found = self.meta.resolve(addr)
        return found.mac, found.errno


@pytest.fixture
def lan() -> Lan:
    return Lan()


# --- asking --------------------------------------------------------------------------------------------------


def test_a_question_is_answered(lan: Lan) -> None:
    assert lan.table.deadline_ns() is None
    assert lan.ask(PEER) == 0
    assert lan.take() == [ArpMessage(ALL, REQUEST, US_MAC, US, ZERO, PEER)]
    assert lan.page(PEER) == (None, errno.EAGAIN)
    assert lan.ask(PEER) == 0 and lan.take() == []  # already asking
    lan.hear(REPLY, PEER_MAC, PEER)
    assert lan.page(PEER) == (PEER_MAC, 0)
    assert lan.ask(PEER) == 0 and lan.take() == [] and len(lan.table) == 1


def test_silence_fails_after_three_questions_and_is_forgotten(lan: Lan) -> None:
    lan.ask(PEER)
    log = lan.run(2.9)
    assert [at for at, _ in log] == [0, 1, 2] and all(m.dst_mac == ALL and m.tpa == PEER for _, m in log)
    assert lan.page(PEER) == (None, errno.EAGAIN)
    assert lan.run(0.2) == []
    assert lan.page(PEER) == (None, errno.EHOSTUNREACH)
    assert lan.ask(PEER) == errno.EHOSTUNREACH and lan.take() == []
    assert lan.run(3) == []
    assert lan.page(PEER) == (None, errno.EAGAIN)
    assert len(lan.table) == 0 and lan.table.deadline_ns() is None
    assert lan.ask(PEER) == 0 and len(lan.take()) == 1


def test_a_late_answer_ends_the_failure(lan: Lan) -> None:
    lan.ask(PEER)
    lan.run(4)
    lan.hear(REPLY, PEER_MAC, PEER)
    assert lan.page(PEER) == (PEER_MAC, 0)


def test_a_full_link_costs_a_second_not_the_neighbour(lan: Lan) -> None:
    lan.table.refuse = True
    lan.ask(PEER)
    assert lan.take() == [] and lan.table.counters()["emit_failed"] == 1
    lan.table.refuse = False
    lan.answering[PEER] = PEER_MAC
    assert [at for at, _ in lan.run(1.5)] == [1]
    assert lan.page(PEER) == (PEER_MAC, 0)


def test_only_hosts_on_the_link_are_asked(lan: Lan) -> None:
    for addr in ("192.0.2.1", "10.0.0.255", "224.0.0.1", "255.255.255.255", "127.0.0.1", "0.0.0.0", "ff02::1"):
        got = lan.ask(addr)
        assert got == errno.ENETUNREACH, (addr, got)
    assert lan.ask(US) == errno.EINVAL
    assert lan.take() == [] and len(lan.table) == 0
    assert lan.ask(GATEWAY) == 0
    lan.meta.set_route("2001:db8::", 64)
    assert lan.ask("2001:db8::1") == errno.EAFNOSUPPORT


def test_open_questions_are_bounded_and_do_not_push_out_neighbours() -> None:
    lan = Lan(16)
    for i in range(100):
        lan.ask(f"10.0.1.{i}")
        lan.hear(REPLY, bytes([2, 1, 0, 0, 0, i]), f"10.0.1.{i}")
    got = [lan.ask(f"10.0.{2 + i // 250}.{i % 250}") for i in range(2000)]
    assert got == [0] * 256 + [errno.ENOBUFS] * 1744
    assert lan.table.counters()["refused_full"] == 1744
    assert len(lan.take()) == 100 + 256 and len(lan.table) == 356
    lan.run(7)
    assert len(lan.table) == 100 and len(lan.meta.neighbours()) == 100
    assert lan.ask("10.0.9.9") == 0


def test_a_full_page_lets_the_oldest_go() -> None:
    lan = Lan(16)
    for i in range(1000):
        addr = f"10.0.{1 + i // 250}.{i % 250}"
        assert lan.ask(addr) == 0
        lan.hear(REPLY, PEER_MAC, addr)
        lan.now += 1
    assert len(lan.meta.neighbours()) == 768 == len(lan.table)
    assert lan.meta.evicted == 232
    assert lan.page("10.0.1.0") == (None, errno.EAGAIN) and lan.page("10.0.4.249") == (PEER_MAC, 0)
    # A stranger who asks for us is answered, but pushes nobody out.
    lan.take()
    lan.hear(REQUEST, OTHER_MAC, "10.0.9.9", tha=ZERO)
    assert [m.dst_mac for m in lan.take()] == [OTHER_MAC]
    assert lan.page("10.0.9.9") == (None, errno.EAGAIN) and lan.table.counters()["refused_full"] == 1


# --- keeping -------------------------------------------------------------------------------------------------


def test_a_reachable_neighbour_is_polled_by_unicast(lan: Lan) -> None:
    lan.answering[PEER] = PEER_MAC
    lan.ask(PEER)
    log = lan.run(200)
    polls = log[1:]
    assert all(m == ArpMessage(PEER_MAC, REQUEST, US_MAC, US, PEER_MAC, PEER) for _, m in polls)
    gaps = [b[0] - a[0] for a, b in zip(log, polls, strict=False)]
    assert 6 <= len(gaps) <= 8 and all(24 <= gap <= 30 for gap in gaps)
    assert lan.page(PEER) == (PEER_MAC, 0)


def test_three_missed_polls_remove_it(lan: Lan) -> None:
    lan.answering[PEER] = PEER_MAC
    lan.ask(PEER)
    lan.run(1)
    before = lan.meta.generation
    lan.answering.clear()
    log = lan.run(32)
    assert len(log) == 3 and log[1][0] - log[0][0] == 1
    assert lan.run(3) == [] and lan.meta.generation > before
    assert lan.page(PEER) == (None, errno.EAGAIN) and len(lan.table) == 0
    assert lan.table.counters()["lost"] == 1


def test_one_answered_poll_of_three_is_enough(lan: Lan) -> None:
    lan.answering[PEER] = PEER_MAC
    lan.ask(PEER)
    lan.run(1)
    lan.answering.clear()
    while lan.table.counters()["probes_out"] < 3:
        lan.run(0.5)
    lan.hear(REPLY, PEER_MAC, PEER)
    lan.run(10)
    assert lan.page(PEER) == (PEER_MAC, 0)


def test_polls_of_many_neighbours_are_spread() -> None:
    lan = Lan(16)
    for i in range(200):
        addr, mac = f"10.0.1.{i}", bytes([2, 1, 0, 0, 0, i])
        lan.answering[addr] = mac
        lan.ask(addr)
    log = [at for at, m in lan.run(31) if m.dst_mac != ALL]
    assert len(log) >= 200
    assert max(sum(t <= at < t + 0.5 for at in log) for t in log) < 60
    assert len(lan.meta.neighbours()) == 200


def test_no_change_no_generation(lan: Lan) -> None:
    """Applications resolve again at each generation: a poll that changes nothing must not cost them that."""
    lan.answering[PEER] = PEER_MAC
    lan.ask(PEER)
    lan.run(1)
    before = lan.meta.generation
    lan.run(100)
    assert lan.meta.generation == before


# --- hearing -------------------------------------------------------------------------------------------------


def test_requests_for_us_are_answered_and_teach(lan: Lan) -> None:
    lan.hear(REQUEST, PEER_MAC, PEER, tha=ZERO)
    assert lan.take() == [ArpMessage(PEER_MAC, REPLY, US_MAC, US, PEER_MAC, PEER)]
    assert lan.page(PEER) == (PEER_MAC, 0)


def test_what_is_not_for_us_teaches_nothing(lan: Lan) -> None:
    lan.hear(REQUEST, PEER_MAC, PEER, tpa=OTHER, tha=ZERO)  # between others
    lan.hear(REQUEST, PEER_MAC, PEER, tpa=PEER, tha=ZERO)  # gratuitous
    lan.hear(REPLY, PEER_MAC, PEER)  # an answer nobody asked for
    assert lan.take() == [] and len(lan.table) == 0 and lan.page(PEER)[1] == errno.EAGAIN


def test_an_announced_move_is_believed_and_checked(lan: Lan) -> None:
    lan.ask(PEER)
    lan.hear(REPLY, PEER_MAC, PEER)
    lan.take()
    lan.now += 2 * SEC
    lan.hear(REQUEST, OTHER_MAC, PEER, tpa=PEER, tha=ZERO)
    assert lan.page(PEER) == (OTHER_MAC, 0) and lan.table.counters()["moved"] == 1
    log = lan.run(1.5)
    assert [(at, m.dst_mac) for at, m in log] == [(1, OTHER_MAC)]
    # Nobody there: gone after three polls, and the next question finds the right one.
    lan.run(5)
    assert lan.page(PEER) == (None, errno.EAGAIN)


def test_the_first_of_several_answers_counts(lan: Lan) -> None:
    lan.ask(PEER)
    lan.hear(REPLY, PEER_MAC, PEER)
    lan.now += SEC // 2
    lan.hear(REPLY, OTHER_MAC, PEER)
    assert lan.page(PEER) == (PEER_MAC, 0) and lan.table.counters()["refused_locked"] == 1


def test_impossible_senders_are_counted_and_ignored(lan: Lan) -> None:
    lan.ask(PEER)
    lan.take()
    bad: list[tuple[int, bytes, str]] = [
        (REPLY, ALL, PEER),
        (REPLY, bytes.fromhex("010000000007"), PEER),
        (REPLY, ZERO, PEER),
        (3, PEER_MAC, PEER),
        (REQUEST, PEER_MAC, "224.0.0.5"),
        (REQUEST, PEER_MAC, "10.0.0.255"),
        (REQUEST, PEER_MAC, "127.0.0.1"),
        (REQUEST, PEER_MAC, "255.255.255.255"),
    ]
    for op, sha, spa in bad:
        lan.hear(op, sha, spa)
    assert lan.table.counters()["bad_in"] == len(bad)
    assert lan.take() == [] and lan.meta.neighbours() == []
    lan.hear(REQUEST, US_MAC, US)  # our own frame, come back
    assert lan.table.counters()["conflicts"] == 0
    # A sender from behind the gateway is answered but not learned: nobody sends to it on the link.
    lan.hear(REQUEST, PEER_MAC, "192.0.2.1")
    assert len(lan.take()) == 1 and lan.meta.neighbours() == []


def test_what_is_set_by_hand_stays(lan: Lan) -> None:
    lan.meta.set_neighbour(PEER, PEER_MAC)
    lan.hear(REQUEST, OTHER_MAC, PEER, tha=ZERO)
    assert len(lan.take()) == 1 and lan.page(PEER) == (PEER_MAC, 0)
    lan.ask(OTHER)
    lan.hear(REPLY, OTHER_MAC, OTHER)
    lan.meta.set_neighbour(OTHER, PEER_MAC)
    lan.now += 2 * SEC
    lan.hear(REPLY, OTHER_MAC, OTHER)
    lan.run(100)
    assert lan.page(OTHER) == (PEER_MAC, 0) and len(lan.table) == 0
    lan.ask(GATEWAY)
    lan.meta.set_neighbour(GATEWAY, PEER_MAC)
    lan.run(10)
    assert lan.page("192.0.2.1") == (PEER_MAC, 0)


def test_flush_forgets_everything_learned(lan: Lan) -> None:
    lan.ask(PEER)
    lan.hear(REPLY, PEER_MAC, PEER)
    lan.ask(OTHER)
    lan.table.flush()
    assert len(lan.table) == 0 and lan.meta.neighbours() == [] and lan.table.deadline_ns() is None


# --- our own address -----------------------------------------------------------------------------------------


def test_probing_an_unused_address(lan: Lan) -> None:
    """RFC 5227 (2.1.1, 2.3): three probes with sender zero, silence, two announcements."""
    lan.table.probe(lan.now)
    assert lan.table.address_state == "probing"
    assert lan.ask(PEER) == errno.EAGAIN and lan.table.announce(lan.now) == errno.EAGAIN
    lan.hear(REQUEST, PEER_MAC, PEER, tha=ZERO)  # not ours yet: no answer
    log = lan.run(20)
    probe = ArpMessage(ALL, REQUEST, US_MAC, "0.0.0.0", ZERO, US)
    announcement = ArpMessage(ALL, REQUEST, US_MAC, US, ZERO, US)
    assert log == [(0, probe), (1, probe), (2, probe), (4, announcement), (6, announcement)]
    assert lan.table.address_state == "claimed" and lan.ask(PEER) == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_probe(lan: Lan, count: int) -> None:
    lan.table.probe(lan.now, count=count, interval_ns=SEC // 10)
    log = lan.run(1)
    assert sum(m.spa == "0.0.0.0" for _, m in log) == count
    assert lan.table.address_state == "claimed"
    assert log[-1][1].spa == US and log[-1][0] == pytest.approx(0.1 * (count + 1))


@pytest.mark.parametrize(
    "answer",
    [(REPLY, US, US), (REQUEST, US, PEER), (REQUEST, "0.0.0.0", US)],
    ids=["the owner answers", "the owner asks for another", "another host probes too"],
)
def test_probing_a_used_address(lan: Lan, answer: tuple[int, str, str]) -> None:
    op, spa, tpa = answer
    lan.table.probe(lan.now)
    lan.run(1.5)
    lan.hear(op, OTHER_MAC, spa, tpa=tpa, tha=ZERO)
    assert lan.table.address_state == "conflict" and lan.table.conflict_mac == OTHER_MAC
    assert lan.run(20) == []
    assert lan.ask(PEER) == errno.EADDRNOTAVAIL and lan.table.announce(lan.now) == errno.EADDRNOTAVAIL
    lan.hear(REQUEST, PEER_MAC, PEER, tha=ZERO)
    assert lan.take() == []


def test_a_claimed_address_is_defended_not_too_often(lan: Lan) -> None:
    assert lan.table.conflict_mac is None
    for _ in range(40):  # ten seconds of a quarrel
        lan.hear(REQUEST, OTHER_MAC, US, tpa=US, tha=ZERO)
        lan.now += SEC // 4
    assert [m.spa for m in lan.take()] == [US]
    lan.hear(REQUEST, OTHER_MAC, US, tpa=US, tha=ZERO)
    assert len(lan.take()) == 1
    assert lan.table.counters()["conflicts"] == 41 and lan.table.address_state == "claimed"
    assert lan.meta.neighbours() == []
    # A stranger's probe for our address is answered: it is in use (RFC 5227 2.1.1).
    lan.hear(REQUEST, OTHER_MAC, "0.0.0.0", tha=ZERO)
    assert lan.take() == [ArpMessage(OTHER_MAC, REPLY, US_MAC, US, OTHER_MAC, "0.0.0.0")]


def test_announcing_twice(lan: Lan) -> None:
    assert lan.table.announce(lan.now) == 0
    assert [(at, m.spa, m.tpa) for at, m in lan.run(30)] == [(0, US, US), (2, US, US)]
    assert lan.table.deadline_ns() is None


def test_mistakes() -> None:
    meta = Metastate.create(US, 24, US_MAC, 1500)
    with pytest.raises(PermissionError):
        NeighbourTable(Metastate.open(meta.fd))
    with pytest.raises(ValueError, match="0 probes"):
        NeighbourTable(meta).probe(0, count=0)


@pytest.mark.parametrize("seed", range(5))
def test_any_noise_keeps_the_machine_whole(seed: int) -> None:
    """Random messages, questions and time: the page agrees with the machine, nothing grows, timers end."""
    rng = random.Random(seed)
    lan = Lan(20)
    hosts = [f"10.0.{rng.randrange(16)}.{rng.randrange(1, 255)}" for _ in range(1200)]
    macs = [bytes([2, 0, 0, 0, 0, i]) for i in range(1, 8)] + [ALL, ZERO, US_MAC]
    odd = ["0.0.0.0", "224.0.0.1", "255.255.255.255", US, "192.0.2.1"]
    for _ in range(4000):
        addr = rng.choice(odd) if rng.random() < 0.1 else rng.choice(hosts)
        match rng.randrange(4):
            case 0:
                lan.ask(addr)
            case 1:
                lan.now += rng.randrange(SEC // 4)
                lan.table.timers(lan.now)
            case _:
                tpa = US if rng.random() < 0.7 else rng.choice(hosts)
                lan.hear(rng.choice([0, 1, 1, 2, 2]), rng.choice(macs), addr, tpa=tpa, tha=rng.choice(macs))
        assert len(lan.table) <= 1024
    lan.take()
    known = {n.addr for n in lan.meta.neighbours()}
    assert US not in known and not known & set(odd)
    assert all(n.mac is None or n.mac in macs[:7] for n in lan.meta.neighbours())
    lan.run(60)  # nobody answers
    assert lan.meta.neighbours() == [] and len(lan.table) == 0 and lan.table.deadline_ns() is None
