"""Flows as the table, the demultiplexer and frames have them."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from ulnet.netserver.records import TCP, UDP, Flow, SessionRecord
from ulnet.stack import protocol as p


class FlowTable(dict[Flow, SessionRecord]):
    """Records by flow; ``connections`` are those of TCP at one local port, found without looking at all."""

    def __init__(self) -> None:
        super().__init__()
        self._at: dict[int, dict[Flow, SessionRecord]] = {}

    def __setitem__(self, flow: Flow, record: SessionRecord) -> None:
        super().__setitem__(flow, record)
        if flow[0] == TCP and flow[4]:
            self._at.setdefault(flow[2], {})[flow] = record

    def __delitem__(self, flow: Flow) -> None:
        super().__delitem__(flow)
        there = self._at.get(flow[2])
        if there is not None and there.pop(flow, None) is not None and not there:
            del self._at[flow[2]]

    def pop(self, flow: Flow, default: Any = None) -> Any:
        record = self.get(flow, default)
        if flow in self:
            del self[flow]
        return record

    def connections(self, lport: int) -> list[SessionRecord]:
        return list(self._at.get(lport, {}).values())


def wire(flow: Flow) -> tuple[int, IPv4Address, int, IPv4Address | None, int]:
    """A flow as the demultiplexer wants it."""
    protocol, laddr, lport, raddr, rport = flow
    return protocol, IPv4Address(laddr), lport, IPv4Address(raddr) if raddr else None, rport


def is_request(stray: bytes) -> bool:
    """Is this TCP stray, of which ``flow_of_stray`` knows a flow, a SYN without an ACK?"""
    flags = p.STRAY_HEAD + 14 + (stray[p.STRAY_HEAD + 14] & 15) * 4 + 13
    return len(stray) > flags and stray[flags] & 0x12 == 0x02


def flow_of_stray(stray: bytes) -> Flow | None:
    """The flow of a stray, as its receiver sees it; None unless it is TCP or UDP over IPv4 over Ethernet."""
    frame = stray[p.STRAY_HEAD : p.STRAY_HEAD + 14 + 60 + 4]
    if (
        len(frame) < 38
        or len(stray) > p.STRAY_HEAD + p.MAX_FRAME_BYTES
        or frame[12:14] != b"\x08\x00"
        or frame[14] >> 4 != 4
    ):
        return None
    transport = 14 + (frame[14] & 15) * 4
    if frame[23] not in (TCP, UDP) or len(frame) < transport + 4 or transport < 34:
        return None
    if int.from_bytes(frame[20:22], "big") & 0x1FFF:
        return None  # a later fragment has no ports
    source = ".".join(map(str, frame[26:30]))
    destination = ".".join(map(str, frame[30:34]))
    sport = int.from_bytes(frame[transport : transport + 2], "big")
    dport = int.from_bytes(frame[transport + 2 : transport + 4], "big")
    return frame[23], destination, dport, source, sport
