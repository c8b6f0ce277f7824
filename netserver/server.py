"""The network server: one served address, its engine, its applications, one loop (SOSP 1993 section 3).

Call order: ``NetServer(...)`` (everything is in place, or SetupError), ``handle_signals``, ``run``, ``close``; or in a
loop of another program ``step``. One thread; every wait has an end.

At the end sessions that applications hold are reset, and so are the server's own: without a server nobody would manage
names or clean up, and what would be left is a peer that waits. (Killed, it leaves them alone: they go on.)
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import select
import signal
import time
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import Any, Final

from ulnet.ipc import Hub
from ulnet.kernelshim.channel import ChannelGrant
from ulnet.kernelshim.demux import Demux
from ulnet.kernelshim.guard import Guard
from ulnet.netserver import preflight, watch
from ulnet.netserver.calls import Calls
from ulnet.netserver.preflight import SetupError
from ulnet.netserver.records import Application
from ulnet.netserver.resolver import Resolver
from ulnet.netserver.shared import SharedTable
from ulnet.stack import protocol as p
from ulnet.stack import stamps
from ulnet.stack.engine import Engine
from ulnet.stack.metastate import Metastate

log = logging.getLogger("ulnet.netserver")

SOCKET_MODE: Final = 0o666  # any user may attach; what each may do is decided by credentials and tables
SLEEP_MAX_S: Final = 60.0
# A program lets go of its channel right after it said so. Who keeps it (a buffer on loan) is looked at less often.
SWEEP_MIN_S, SWEEP_MAX_S = 0.001, 0.25
_SILENT: Final = frozenset(("CLOSED", "LISTEN", "TIME-WAIT", "SYN-SENT"))  # nothing there that a RST would end


class NetServer:
    """Serves ``address`` ("A/LEN") on ``interface``.

    ``gateway``: next hop beyond the network. ``path``: the socket applications find it by (None: ``ULNET_SERVER`` or
    the default). ``probe``: ask the wire whether the address is free. Raises SetupError with one line for the user.
    """

    def __init__(
        self,
        interface: str,
        address: str,
        *,
        gateway: str | None = None,
        path: str | None = None,
        probe: bool = True,
    ) -> None:
        self.path = p.server_path(path)
        self.address = preflight.parse_address(address)
        hop = preflight.parse_gateway(gateway, self.address) if gateway else None
        preflight.check_privilege()
        self.interface = preflight.find_interface(interface)
        preflight.check_free(self.address)
        preflight.check_socket_path(self.path)
        self._stopping = False
        self._sweep_at, self._sweep_gap_s = 0.0, SWEEP_MIN_S
        self._status = 0
        preflight.raise_descriptor_limit()
        with ExitStack() as undo:
            undo.callback(preflight.claim_address(self.address).close)
            if probe and self.interface.up:
                preflight.probe_wire(self.interface, self.address)
            self._open(undo, hop)
            self._undo = undo.pop_all()

    def _open(self, undo: ExitStack, gateway: str | None) -> None:
        """Make everything; what was made is closed in reverse order."""
        # The hub first: of all that can fail it says most about what the user should change.
        try:
            self.hub = Hub(self.path, mode=SOCKET_MODE)
        except OSError as error:
            raise SetupError(f"socket path {self.path}: {error.strerror or error}") from None
        undo.callback(self.hub.close)
        at, own = self.interface, self.address
        claim, tag = preflight.claim_tag()
        undo.callback(claim.close)
        self.guard = Guard(at.name, own.address, tag=tag)
        undo.callback(self.guard.close)
        self.demux = Demux(at.name, ipaddress.IPv4Address(own.address), tag=tag)
        undo.callback(self.demux.close)
        self.meta = Metastate.create(own.address, own.prefix, at.mac, at.mtu, gateway)
        self.link = self.demux.open_server_channel()
        undo.callback(self.link.close)
        self.engine = Engine(self.link, self.meta)
        undo.callback(self.engine.close)
        self.resolver = Resolver(self.engine, self.meta)
        self.calls = Calls(self.hub, self._table, self.resolver, self)
        undo.callback(self.calls.table.close)
        undo.callback(self._end_sessions)
        self.watch = watch.Watch()
        undo.callback(self.watch.close)
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, self._wake_r)
        undo.callback(os.close, self._wake_w)
        self._poll = select.poll()
        table = self.calls.table
        descriptors = (self.hub, self.watch, table.relays, table.heirs)
        for fd in (*self.link.filenos(), *(part.fileno() for part in descriptors), self._wake_r):
            self._poll.register(fd, select.POLLIN)
        self.calls.start(self._counters)
        self.engine.announce()

    def _table(self, calls: Calls) -> SharedTable:
        return SharedTable(self.address.address, self.engine, self.demux, self.guard, calls.deliver, calls.forward)

    # -- channels, for attaching ---------------------------------------------------------------

    def open_channel(self, interface: str) -> ChannelGrant:
        """A channel of one application, confined and without any flow."""
        return self.demux.open_channel(interface)

    def close_channel(self, channel: ChannelGrant) -> None:
        """Its flows lead here again; who still holds the descriptor gets nothing and may send nothing."""
        self.demux.close_channel(channel.channel_id)
        self._sweep_gap_s = SWEEP_MIN_S
        self._sweep_at = time.monotonic() + self._sweep_gap_s

    def attached(self, app: Application) -> tuple[p.Attached, list[int]]:
        """What an application needs to run its engine, and the descriptors that go with it."""
        channel = app.channel
        reply = p.Attached(
            error=0,
            serial=app.serial,
            channel=channel.channel_id,
            ifindex=channel.device.ifindex,
            loopback_ifindex=channel.device.loopback_ifindex,
            mtu=channel.device.mtu,
            mac=channel.device.mac,
            prefix=self.address.prefix,
            address=self.address.address,
            small_slots=channel.rings.small.slots,
            small_slot_bytes=channel.rings.small.slot_bytes,
            large_slots=channel.rings.large.slots,
            large_slot_bytes=channel.rings.large.slot_bytes,
        )
        return reply, [*channel.fds, self.meta.fd, app.stats.fd]

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until ``stop``; the exit status."""
        while not self._stopping:
            self.step(SLEEP_MAX_S)
        return self._status

    def step(self, timeout_s: float = 0.0) -> None:
        """One turn of the loop; sleeps at most ``timeout_s`` when there is nothing to do."""
        deadline = self.engine.deadline_ns()
        if deadline is not None:
            timeout_s = min(timeout_s, max(0.0, (deadline - time.monotonic_ns()) / 1e9))
        timeout_s = min(timeout_s, self._sweep())
        relays_s = self.calls.table.wait_s()
        if relays_s is not None:
            timeout_s = min(timeout_s, relays_s)
        # Rounded up: a poll that ends just before a timer is due would turn once for nothing.
        ready = {fd for fd, _ in self._poll.poll(-(-timeout_s * 1e3 // 1))}
        stamps.mark(stamps.WOKEN)
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        table = self.calls.table
        self.engine.poll()
        if table.relays.fileno() in ready or table.wait_s() is not None:
            table.run_relays()
        table.drive()
        if table.heirs.fileno() in ready:
            table.look_at_lifelines()
        if self.hub.fileno() in ready:
            self.hub.poll(0)
            # A call may have left events of its own (a connection to this very address is there at once).
            self.engine.poll()
            if table.relays.pending:
                table.run_relays()
            table.drive()
        self.resolver.check()
        if self.watch.fileno() in ready:
            self._look_around()

    def _sweep(self) -> float:
        """Look after channels whose programs still held them when they left; the seconds until the next look."""
        if not self.demux.leaving:
            return SLEEP_MAX_S
        now = time.monotonic()
        if now >= self._sweep_at:
            self.demux.sweep()
            self._sweep_gap_s = min(2 * self._sweep_gap_s, SWEEP_MAX_S)
            self._sweep_at = now + self._sweep_gap_s
        return self._sweep_at - now

    def stop(self, status: int = 0) -> None:
        """End ``run``; callable from a signal handler and from other threads."""
        self._status = self._status or status
        self._stopping = True
        with suppress(BlockingIOError):  # full: it will wake up anyway
            os.write(self._wake_w, b"\0")

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT end the server in good order."""

        def end(number: int, frame: FrameType | None) -> None:
            log.info("%s: ending", signal.Signals(number).name)
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.signal(number, end)
            self._undo.callback(signal.signal, number, previous)

    def _look_around(self) -> None:
        """Links or addresses changed."""
        self.watch.drain()
        try:
            now = preflight.find_interface(self.interface.name)
        except SetupError as error:
            log.error("%s; ending", error)
            self.stop(1)
            return
        if now.index != self.interface.index:
            log.error("interface %s is another one now; ending", now.name)
            self.stop(1)
            return
        if now.mac != self.interface.mac or now.mtu != self.interface.mtu:
            log.warning("interface %s has changed its hardware address or MTU; restart the netserver", now.name)
        if now.up != self.interface.up:
            log.info("interface %s is %s", now.name, "up" if now.up else "down")
        if self.address.address in watch.kernel_addresses() and self.address.address not in self.interface.addresses:
            log.warning("the kernel got the served address %s, too; remove it there", self.address.address)
        self.interface = now
        for name in watch.interface_names():
            try:
                self.guard.add_device(name)
            except OSError as error:
                if error.errno != errno.ENODEV:  # else it went again already
                    log.error("the guard cannot watch %s: %s", name, error)

    # -- the end -------------------------------------------------------------------------------

    def _end_sessions(self) -> None:
        held = sum(len(app.sessions) for app in self.calls.applications.values())
        if held:
            log.info("resetting %d sessions that applications hold", held)
        self.meta.end()
        self.calls.end_all()
        # What the server was finishing for others, and handshakes: their peers need not wait for time-outs either.
        for row in self.engine.sessions():
            if row["proto"] == "tcp" and row["remote"] is not None and row["state"] not in _SILENT:
                (laddr, lport), (raddr, rport) = row["local"], row["remote"]
                self.engine.abort_flow(laddr, lport, raddr, rport, row["snd_nxt"], row["rcv_nxt"])

    def close(self) -> None:
        """Reset sessions, remove filters, rules and sockets. Safe to call twice."""
        self._undo.close()

    def __enter__(self) -> NetServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _counters(self) -> dict[str, Any]:
        return {
            "resolver": {"waiting": len(self.resolver)},
            "guard": {"refused": self.guard.refused(), "hidden": self.guard.hidden()},
            "engine": self.engine.counters(),
            "link": self.link.counters(),
        }
