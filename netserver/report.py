"""The rows of `ulnet sessions`: every session, whoever manages it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ulnet.netserver.leases import LeaseTable
from ulnet.netserver.records import PROTOCOL_NAMES, TCP, UDP, Application, Place, SessionRecord
from ulnet.stack.statpage import StatRecord

# RFC 9293 (3.3.2), in the order of tcp_stat.state
STATES = (
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
_FIGURES = ("bytes_in", "bytes_out", "retransmits", "srtt_ns")


def sessions(table: LeaseTable, applications: Iterable[Application]) -> list[dict[str, Any]]:
    """One dictionary a session: proto, local, remote, state, owner (pid and name; None: the server), place, figures."""
    rows: dict[int, dict[str, Any]] = {number: _row(record) for number, record in table.records.items()}
    for app in applications:
        for last in app.stats.records():
            record = app.sessions.get(last.session_id)
            if record is not None and record.place is Place.APPLICATION:
                state = STATES[last.state] if last.state < len(STATES) else "?"
                _fill(rows[record.number], last._asdict() | {"state": state}, record.protocol)
        for last in table.undeclared(app):
            rows[last.session_id] = _undeclared(app, last)
    others = []
    for figures in table.engine.sessions():
        row = rows.get(figures["session_id"])
        if row is not None:
            _fill(row, figures, TCP)
        else:
            # Handshakes under way and established sessions that wait for a listener's credit.
            others.append(_unrecorded(figures))
    return [*rows.values(), *others]


def _row(record: SessionRecord) -> dict[str, Any]:
    state = {
        Place.NAMED: "CLOSED",
        Place.CONNECTING: "SYN-SENT",
        Place.LISTENING: "LISTEN",
        Place.APPLICATION: "OPEN" if record.protocol == UDP else "ESTABLISHED",
        Place.SERVER: "CLOSING",
    }[record.share.what if record.share and record.place is Place.SHARED else record.place]
    return {
        "id": record.number,
        "proto": PROTOCOL_NAMES[record.protocol],
        "local": f"{record.laddr}:{record.lport}",
        "remote": f"{record.peer[0]}:{record.peer[1]}" if record.peer else None,
        "state": state,
        "owner": _owner(record),
        "place": record.place.value,
        **dict.fromkeys(_FIGURES, 0),
    }


def _owner(record: SessionRecord) -> dict[str, Any] | None:
    if record.owner is not None:
        return {"pid": record.owner.pid, "name": record.owner.name}
    share = record.share
    if share is None or (share.relay is None and not share.holders):
        return None
    return {"pid": min((holder.pid for holder in share.holders), default=0), "name": f"shared: {len(share.holders)}"}


def _undeclared(app: Application, last: StatRecord) -> dict[str, Any]:
    """A connection that the application has set up by itself."""
    row = {
        "id": last.session_id,
        "proto": PROTOCOL_NAMES[TCP],
        "local": f"{last.laddr}:{last.lport}",
        "remote": f"{last.raddr}:{last.rport}",
        "state": "?",
        "owner": {"pid": app.pid, "name": app.name},
        "place": Place.APPLICATION.value,
        **dict.fromkeys(_FIGURES, 0),
    }
    state = STATES[last.state] if last.state < len(STATES) else "?"
    _fill(row, last._asdict() | {"state": state}, TCP)
    return row


def _unrecorded(figures: dict[str, Any]) -> dict[str, Any]:
    row = {
        "id": 0,
        "proto": figures["proto"],
        "local": _endpoint(figures["local"]),
        "remote": _endpoint(figures["remote"]),
        "state": "?",
        "owner": None,
        "place": Place.SERVER.value,
        **dict.fromkeys(_FIGURES, 0),
    }
    _fill(row, figures, TCP)
    return row


def _fill(row: dict[str, Any], figures: dict[str, Any], protocol: int) -> None:
    for key in _FIGURES:
        if isinstance(figures.get(key), int):
            row[key] = figures[key]
    if protocol == TCP and isinstance(figures.get("state"), str):
        row["state"] = figures["state"]


def _endpoint(value: tuple[str, int] | None) -> str | None:
    return f"{value[0]}:{value[1]}" if value else None
