"""The three packet interfaces of a channel (SOSP 1993 section 4.1): each carries data, each waits in its own way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.netserver_bed import PEER, Bed
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import socket
from ulnet.stack.proxy import Proxy

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))
TRIPS = 20


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("interfaces"))
    yield bed
    bed.close()


def counted_trips(bed: Bed, proxy: Proxy, *, trips: int = TRIPS, answer_s: float = 0.002) -> dict[str, int]:
    """What the engine counts during round trips with a kernel socket that answers late enough to be waited for."""
    with bed.b.socket() as listener:
        listener.bind((PEER, 0))
        listener.listen(1)
        listener.settimeout(10)

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                while data := peer.recv(64):
                    if answer_s:
                        threading.Event().wait(answer_s)
                    peer.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        with socket.create_connection(listener.getsockname(), 10, host=proxy) as sock:
            before = proxy.engine.counters()
            for trip in range(trips):
                sock.sendall(b"%04d" % trip)
                assert sock.recv(64) == b"%04d" % trip
            after = proxy.engine.counters()
        thread.join(10)
    return {name: after[name] - before.get(name, 0) for name in after}


@pytest.mark.parametrize("interface", ["ipf", "shm", "ipc"])
def test_each_carries_data_and_sleeps_while_nothing_comes(bed: Bed, interface: str) -> None:
    proxy = bed.proxy(interface=interface)
    assert proxy.link.interface == interface
    assert (proxy.link.slots == 0) == (interface == "ipc")
    counted = counted_trips(bed, proxy)
    assert counted["polls"] >= TRIPS
    receive_calls = counted["link_syscalls"] - counted["link_tx_frames"]
    if interface == "ipc":
        assert receive_calls >= TRIPS
    else:
        assert receive_calls <= 2  # the two readings of the counters


def test_only_the_polled_ring_spins(bed: Bed) -> None:
    """A spin time longer than the wait leaves no sleep; the sleeping interfaces have one only when asked."""
    patient = bed.proxy(interface="ipf", spin_ns=1_000_000_000)
    assert counted_trips(bed, patient)["polls"] < TRIPS
    asked = bed.proxy(interface="shm", spin_ns=1_000_000_000)
    assert counted_trips(bed, asked)["polls"] < TRIPS


def test_polling_ends_where_answers_are_late(bed: Bed) -> None:
    counted = counted_trips(bed, bed.proxy(interface="ipf"))
    assert counted["spins_in_vain"] <= TRIPS // 4
    assert counted["polls"] >= TRIPS


def test_polling_ends_where_the_peer_needs_the_processor(bed: Bed) -> None:
    """An answer that comes as soon as we sleep: spinning only keeps the peer from giving it."""
    proxy = bed.proxy(interface="ipf")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(allowed)])  # this thread, and the one that answers
        counted = counted_trips(bed, proxy, trips=1000, answer_s=0)
    finally:
        os.sched_setaffinity(0, allowed)
    assert counted["spins_in_vain"] < 100


def test_an_unknown_one_is_refused(bed: Bed) -> None:
    with pytest.raises(ValueError, match="'dma'.*ipf, shm, ipc"):
        Proxy(bed.path, interface="dma")
