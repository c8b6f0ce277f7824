"""Bulk data against the kernel's TCP, each way: equal hashes, nothing sent twice, nothing dropped, memory flat.

128 MiB each way; 1 GiB with ULNET_SOAK=1.
"""

from __future__ import annotations

import socket as ksocket
import time
from collections.abc import Callable

import pytest

from tests.acceptance.beds import (
    ADDRESS,
    PEER,
    SOAK,
    App,
    Hosts,
    meanwhile,
    one_processor,
    open_files,
    rss_kib,
    total_retrans,
)
from tests.acceptance.shell import digest_of, receive_into, send_stream

SIZE = 1 << 30 if SOAK else 128 << 20
WARM_UP = 32 << 20
GROWTH_KIB = 8 << 10  # of the application: allocator slack; a leak of one byte in a hundred would show

# The kernel's tail loss probes (RFC 8985 7), when our process got no processor for some milliseconds.
PROBES = 16
SUPER = 45  # segments of a super-segment of 64 KiB: the kernel counts those, we count frames
pytestmark = pytest.mark.timeout(900 if SOAK else 120)


def connected(hosts: Hosts, app: App) -> ksocket.socket:
    """The application's ``s`` connects to a kernel socket."""
    with hosts.listener() as listener:
        app.do(f"s = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout=60)")
        peer, _ = listener.accept()
    peer.settimeout(60)
    return peer


def accepted(hosts: Hosts, app: App) -> ksocket.socket:
    """A kernel socket connects to the application, which calls it ``s``."""
    app.do("l = socket.create_server(('', 5000)); s = None")
    peer = hosts.dial(5000)
    peer.settimeout(60)
    app.do("s, _ = l.accept(); s.settimeout(60); l.close()")
    return peer


def expect_clean(hosts: Hosts, app: App, peer: ksocket.socket, *, sent: int = 0, received: int = 0) -> None:
    """Nothing was dropped, nothing sent twice but a probe of the kernel's."""
    expect_no_drops(app)
    counters = app.value("host.engine.counters()")
    assert counters["tcp_out_of_order_in"] == 0 and counters["tcp_dup_acks_in"] == 0, counters
    stat = app.value("s.session.stat()")
    assert (stat["bytes_out"], stat["bytes_in"]) == (sent, received)
    assert stat["retransmits"] == 0
    assert total_retrans(peer) <= PROBES
    (row,) = (r for r in hosts.sessions() if r["proto"] == "tcp" and r["owner"] and r["owner"]["pid"] == app.pid)
    assert row["local"].startswith(ADDRESS) and row["state"] == "ESTABLISHED"
    # The page the server reads may be some moments old, but not for ever.
    assert row["retransmits"] == 0 and row["bytes_out"] + row["bytes_in"] > 0


def expect_no_drops(app: App) -> None:
    counters = app.value("host.engine.counters()")
    for name in ("link_rx_drops", "link_tx_errors", "link_rx_truncated", "buf_nomem"):
        assert counters[name] == 0, (name, counters)


def moves(hosts: Hosts, how: str, join: Callable[[Hosts, App], ksocket.socket]) -> None:
    with one_processor():
        app = hosts.app()
        assert "capabilities 0x0" in app.who
        move(hosts, app, how, join)


def move(hosts: Hosts, app: App, how: str, join: Callable[[Hosts, App], ksocket.socket]) -> None:
    peer = join(hosts, app)
    total, speed = 0, 0.0
    before = (0, 0)
    for size in (WARM_UP, SIZE):
        if total:
            before = (rss_kib(app.pid), open_files(app.pid))
        start = time.monotonic()
        if how == "sendall":
            with meanwhile(receive_into, peer, size) as got:
                app.do(f"send_stream(s, {size}, 1)")
            result = got
        else:
            with meanwhile(send_stream, peer, size, 1):
                result = [app.value(f"{how}(s, {size})")]
        speed = size / (time.monotonic() - start) / (1 << 20)
        assert result == [digest_of(size, 1)]
        total += size
    after = (rss_kib(app.pid), open_files(app.pid))
    print(
        f"\n{how}: {SIZE >> 20} MiB at {speed:.0f} MiB/s; memory {before[0]} to {after[0]} KiB,"
        f" descriptors {before[1]} to {after[1]}"
    )
    expect_clean(hosts, app, peer, **{"sent" if how == "sendall" else "received": total})
    assert after[0] - before[0] < GROWTH_KIB, "memory is not flat"
    assert after[1] <= before[1]
    peer.close()
    app.do("s.close()")
    assert app.end() == 0


def test_sendall(hosts: Hosts) -> None:
    moves(hosts, "sendall", connected)


def test_recv_into(hosts: Hosts) -> None:
    moves(hosts, "receive_into", connected)


def test_recv_buffer(hosts: Hosts) -> None:
    moves(hosts, "receive_buffers", connected)


def test_sendall_from_an_accepted_session(hosts: Hosts) -> None:
    moves(hosts, "sendall", accepted)


def test_both_ways_at_once(hosts: Hosts) -> None:
    app = hosts.app()
    peer = accepted(hosts, app)
    size = SIZE // 4
    app.do("import threading")
    with meanwhile(send_stream, peer, size, 2), meanwhile(receive_into, peer, size) as back:
        app.do(
            f"sender = threading.Thread(target=send_stream, args=(s, {size}, 3)); sender.start()\n"
            f"got = receive_into(s, {size}); sender.join()"
        )
    assert app.value("got") == digest_of(size, 2)
    assert back == [digest_of(size, 3)]
    # On several processors frames overtake each other on the veth pair; and a ring of 135 slots, in which each
    # acknowledgement takes one, too, overflows when this program is kept from running while its peer is not.
    counters = app.value("host.engine.counters()")
    mine, kernel = app.value("s.session.stat()['retransmits']"), total_retrans(peer)
    print(
        f"\nboth ways: {size >> 20} MiB each; {counters['tcp_out_of_order_in']} segments out of order,"
        f" {counters['link_rx_drops']} frames found no slot; sent again: {mine} here, {kernel} there"
    )
    # Of a frame that came too early the kernel takes the one before it for lost, and what it sent next to it.
    assert kernel <= SUPER * (counters["link_rx_drops"] + 2 * counters["tcp_out_of_order_in"]) + PROBES
    assert counters["link_tx_errors"] == 0 and counters["buf_nomem"] == 0
    peer.close()
