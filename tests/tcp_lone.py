"""A lone endpoint brought into each state by hand-made segments: shared by the TCP tests."""

from __future__ import annotations

from collections.abc import Callable

from ulnet.stack.sim import Endpoint, Sim

ISS, PEER = 1000, 5_000_000
SECOND = 1_000_000_000
MS = 1_000_000


def lone(sim: Sim | None = None, **options: int) -> Endpoint:
    return (sim or Sim(seed=7)).endpoint("a", iss=ISS, **options)


def syn_sent(**options: int) -> Endpoint:
    e = lone(**options)
    e.connect()
    return e


def established(*, wnd: int = 65535, mss: int = 1460, wscale: int = 0, ts: bool = False, **options: int) -> Endpoint:
    e = syn_sent(**options)
    e.inject("SA", seq=PEER, ack=ISS + 1, wnd=wnd, mss=mss, wscale=wscale, ts=(100, 0) if ts else None)
    assert e.state == "ESTABLISHED"
    return e


def syn_received(**options: int) -> Endpoint:
    e = lone(**options)
    e.listen()
    e.inject("S", seq=PEER, ack=0, wnd=65535, mss=1460)
    return e


def listening(**options: int) -> Endpoint:
    e = lone(**options)
    e.listen()
    return e


def fin_wait_1() -> Endpoint:
    e = established()
    e.shutdown()
    return e


def fin_wait_2() -> Endpoint:
    e = fin_wait_1()
    e.inject("A")
    return e


def close_wait() -> Endpoint:
    e = established()
    e.inject("FA")
    return e


def closing() -> Endpoint:
    e = fin_wait_1()
    e.inject("FA", ack=e.numbers["snd_una"])
    return e


def last_ack() -> Endpoint:
    e = close_wait()
    e.shutdown()
    return e


def time_wait() -> Endpoint:
    e = fin_wait_2()
    e.inject("FA")
    return e


IN_STATE: dict[str, Callable[[], Endpoint]] = {
    "CLOSED": lone,
    "LISTEN": listening,
    "SYN-SENT": syn_sent,
    "SYN-RECEIVED": syn_received,
    "ESTABLISHED": established,
    "FIN-WAIT-1": fin_wait_1,
    "FIN-WAIT-2": fin_wait_2,
    "CLOSE-WAIT": close_wait,
    "CLOSING": closing,
    "LAST-ACK": last_ack,
    "TIME-WAIT": time_wait,
}
