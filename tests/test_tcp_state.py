"""Every transition of tcp_state.TRANSITIONS, driven by hand-made segments, user calls and the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tcp_lone import IN_STATE, PEER, SECOND, syn_received

from ulnet.stack.sim import Endpoint
from ulnet.stack.tcp_state import STATES, TRANSITIONS, Transition, diagram, state_name

FLAGS = {"SYN": "S", "FIN": "F", "RST": "R", "ACK": "A"}


def _close(e: Endpoint) -> None:
    if e.state in ("ESTABLISHED", "CLOSE-WAIT", "SYN-RECEIVED"):
        e.shutdown()
    else:
        e.close()


def _orphan(e: Endpoint) -> None:
    e.close()
    e.sim.advance(60 * SECOND)


def _new_syn(e: Endpoint) -> None:
    e.listen()
    e.inject("S", seq=e.numbers["rcv_nxt"] + 1000, ack=0, mss=1460)


ACTIONS: dict[str, Callable[[Endpoint], object]] = {
    "call open": lambda e: e.connect(),
    "call listen": lambda e: e.listen(),
    "call close": _close,
    "call abort": lambda e: e.abort(),
    "rcv ACK": lambda e: e.inject("A", seq=PEER + 1, ack=e.numbers["snd_max"]),
    "rcv RST": lambda e: e.inject("R", seq=PEER + 1),
    "rcv SYN": lambda e: e.inject("S", seq=PEER, ack=0, mss=1460),
    "rcv same SYN": lambda e: e.inject("S", seq=PEER, ack=0, mss=1460),
    "rcv new SYN": _new_syn,
    "rcv SYN,ACK": lambda e: e.inject("SA", seq=PEER, mss=1460, wnd=1000),
    "rcv RST,ACK": lambda e: e.inject("RA", seq=0),
    "rcv bad ACK": lambda e: e.inject("A", seq=e.numbers["rcv_nxt"] or PEER, ack=e.numbers["snd_max"] + 1),
    "rcv exact RST": lambda e: e.inject("R"),
    "rcv RST in window": lambda e: e.inject("R", seq=e.numbers["rcv_nxt"] + 1),
    "rcv FIN": lambda e: e.inject(
        "FA",
        seq=e.numbers["rcv_nxt"] - (e.state == "TIME-WAIT"),
        ack=e.numbers["snd_una"] if e.state == "FIN-WAIT-1" else None,
    ),
    "rcv FIN,ACK": lambda e: e.inject("FA"),
    "rcv FIN, ACK of FIN": lambda e: e.inject("FA"),
    "rcv ACK of FIN": lambda e: e.inject("A"),
    "timeout retransmission": lambda e: e.sim.advance(200 * SECOND),
    "timeout orphan": _orphan,
    "timeout 2 MSL": lambda e: e.sim.advance(60 * SECOND),
}


@pytest.mark.parametrize("t", TRANSITIONS, ids=lambda t: f"{t.state}: {t.event}")
def test_transition(t: Transition) -> None:
    e = IN_STATE[t.state]()
    assert e.state == t.state
    sent_before = len(e.sim.trace)
    ACTIONS[t.event](e)
    if t.event == "rcv exact RST" and t.state == "SYN-RECEIVED":
        assert e.state == "LISTEN"  # the listener above it is still there
        return
    if t.event == "timeout retransmission":
        assert e.state in ("CLOSED", "LISTEN")
        return
    assert e.state == t.next
    sent = e.sim.trace[sent_before:]
    if not t.sends:
        assert not sent, str(sent)
        return
    assert sent, f"nothing was sent, {t.sends} is due"
    for name in t.sends.split(","):
        assert FLAGS[name] in sent[0].flags, str(sent)


def test_every_state_is_left_and_reached() -> None:
    assert {t.state for t in TRANSITIONS} == set(STATES)
    assert {t.next for t in TRANSITIONS} == set(STATES)


def test_diagram_names_every_transition() -> None:
    assert diagram().count("->") == len(TRANSITIONS)
    assert state_name(4) == "ESTABLISHED"
    assert state_name(99) == "state 99"


def test_close_in_syn_received_sends_fin_after_the_handshake() -> None:
    e = syn_received()
    e.shutdown()
    assert e.state == "SYN-RECEIVED"
    answer = e.inject("A")
    assert e.state == "FIN-WAIT-1"
    assert "F" in answer[-1].flags


def test_syn_with_data_or_fin_establishes_and_leaves_the_rest_to_be_resent() -> None:
    e = IN_STATE["SYN-SENT"]()
    answer = e.inject("SA", seq=PEER, payload=b"early", mss=1460)
    assert e.state == "ESTABLISHED"
    assert answer[0].raw_ack == PEER + 1
