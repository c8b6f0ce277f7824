"""TCP's states and transitions (RFC 9293 figure 5 and section 3.10) as data: for tests, diagrams and messages."""

from __future__ import annotations

from typing import NamedTuple

# Index = the number that tcp_stat.state carries; the order of RFC 9293 3.3.2, CLOSED first.
STATES: tuple[str, ...] = (
    "CLOSED",
    "LISTEN",
    "SYN-SENT",
    "SYN-RECEIVED",
    "ESTABLISHED",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "CLOSE-WAIT",
    "CLOSING",
    "LAST-ACK",
    "TIME-WAIT",
)


class Transition(NamedTuple):
    """One arrow of the diagram. ``event`` is a user call, a segment, or a timer; ``sends`` what leaves in answer."""

    state: str
    event: str
    sends: str
    next: str
    source: str


def _t(state: str, event: str, sends: str, next_state: str, source: str) -> Transition:
    return Transition(state, event, sends, next_state, source)


# Events: "call NAME", "rcv WHAT" (exact = at RCV.NXT), "timeout WHAT".
TRANSITIONS: tuple[Transition, ...] = (
    _t("CLOSED", "call open", "SYN", "SYN-SENT", "RFC 9293 3.10.1"),
    _t("CLOSED", "call listen", "", "LISTEN", "RFC 9293 3.10.1"),
    _t("CLOSED", "rcv ACK", "RST", "CLOSED", "RFC 9293 3.10.7.1"),
    _t("CLOSED", "rcv RST", "", "CLOSED", "RFC 9293 3.10.7.1"),
    _t("LISTEN", "rcv SYN", "SYN,ACK", "SYN-RECEIVED", "RFC 9293 3.10.7.2"),
    _t("LISTEN", "rcv ACK", "RST", "LISTEN", "RFC 9293 3.10.7.2"),
    _t("LISTEN", "rcv RST", "", "LISTEN", "RFC 9293 3.10.7.2"),
    _t("LISTEN", "call close", "", "CLOSED", "RFC 9293 3.10.4"),
    _t("SYN-SENT", "rcv SYN,ACK", "ACK", "ESTABLISHED", "RFC 9293 3.10.7.3"),
    _t("SYN-SENT", "rcv SYN", "SYN,ACK", "SYN-RECEIVED", "RFC 9293 3.10.7.3"),
    _t("SYN-SENT", "rcv RST,ACK", "", "CLOSED", "RFC 9293 3.10.7.3"),
    _t("SYN-SENT", "rcv RST", "", "SYN-SENT", "RFC 9293 3.10.7.3"),
    _t("SYN-SENT", "rcv bad ACK", "RST", "SYN-SENT", "RFC 9293 3.10.7.3"),
    _t("SYN-SENT", "call close", "", "CLOSED", "RFC 9293 3.10.4"),
    _t("SYN-SENT", "timeout retransmission", "", "CLOSED", "RFC 9293 3.8.3"),
    _t("SYN-RECEIVED", "rcv ACK", "", "ESTABLISHED", "RFC 9293 3.10.7.4"),
    _t("SYN-RECEIVED", "rcv bad ACK", "RST", "SYN-RECEIVED", "RFC 9293 3.10.7.4"),
    _t("SYN-RECEIVED", "rcv same SYN", "SYN,ACK", "SYN-RECEIVED", "RFC 9293 3.8.1"),
    _t("SYN-RECEIVED", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("SYN-RECEIVED", "rcv FIN,ACK", "ACK", "CLOSE-WAIT", "RFC 9293 3.10.7.4"),
    _t("SYN-RECEIVED", "call close", "", "SYN-RECEIVED", "RFC 9293 3.10.4, the FIN waits for ESTABLISHED"),
    _t("SYN-RECEIVED", "timeout retransmission", "", "CLOSED", "RFC 9293 3.8.3"),
    _t("ESTABLISHED", "call close", "FIN,ACK", "FIN-WAIT-1", "RFC 9293 3.10.4"),
    _t("ESTABLISHED", "call abort", "RST", "CLOSED", "RFC 9293 3.10.5"),
    _t("ESTABLISHED", "rcv FIN", "ACK", "CLOSE-WAIT", "RFC 9293 3.10.7.4"),
    _t("ESTABLISHED", "rcv exact RST", "", "CLOSED", "RFC 5961 3.2"),
    _t("ESTABLISHED", "rcv RST in window", "ACK", "ESTABLISHED", "RFC 5961 3.2"),
    _t("ESTABLISHED", "rcv SYN", "ACK", "ESTABLISHED", "RFC 5961 4.2"),
    _t("ESTABLISHED", "rcv bad ACK", "ACK", "ESTABLISHED", "RFC 5961 5.2"),
    _t("FIN-WAIT-1", "rcv ACK of FIN", "", "FIN-WAIT-2", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-1", "rcv FIN", "ACK", "CLOSING", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-1", "rcv FIN, ACK of FIN", "ACK", "TIME-WAIT", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-1", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-2", "rcv FIN", "ACK", "TIME-WAIT", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-2", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("FIN-WAIT-2", "timeout orphan", "", "CLOSED", "as Linux and BSD: 60 s without a user"),
    _t("CLOSE-WAIT", "call close", "FIN,ACK", "LAST-ACK", "RFC 9293 3.10.4"),
    _t("CLOSE-WAIT", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("CLOSING", "rcv ACK of FIN", "", "TIME-WAIT", "RFC 9293 3.10.7.4"),
    _t("CLOSING", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("LAST-ACK", "rcv ACK of FIN", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("LAST-ACK", "rcv exact RST", "", "CLOSED", "RFC 9293 3.10.7.4"),
    _t("TIME-WAIT", "rcv FIN", "ACK", "TIME-WAIT", "RFC 9293 3.10.7.4, the timer restarts"),
    _t("TIME-WAIT", "rcv exact RST", "", "TIME-WAIT", "RFC 1337"),
    _t("TIME-WAIT", "rcv SYN", "ACK", "TIME-WAIT", "RFC 5961 4.2, an old SYN"),
    _t("TIME-WAIT", "rcv new SYN", "SYN,ACK", "SYN-RECEIVED", "RFC 9293 3.10.7.4, RFC 6191"),
    _t("TIME-WAIT", "timeout 2 MSL", "", "CLOSED", "RFC 9293 3.6"),
)


def state_name(number: int) -> str:
    """Name of a state number as ``tcp_stat.state`` has it; unknown numbers are shown as such."""
    return STATES[number] if 0 <= number < len(STATES) else f"state {number}"


def diagram() -> str:
    """The transitions as Graphviz text."""
    lines = ["digraph tcp {"]
    lines += [
        f'  "{t.state}" -> "{t.next}" [label="{t.event}{" / " + t.sends if t.sends else ""}"];' for t in TRANSITIONS
    ]
    return "\n".join([*lines, "}"])
