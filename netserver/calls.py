"""The server's side of the protocol: who is attached, what they ask, what they are told (see stack/protocol.py).

Every message comes from a program that is trusted with nothing: what breaks the protocol is counted and answered with
an errno, and no exception leaves ``handle``. A task can only name its own sessions.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Protocol

from ulnet.ipc import Hub, MachError, Message, Sender
from ulnet.kernelshim.channel import ChannelGrant
from ulnet.netserver import report
from ulnet.netserver.records import UDP, Application, Refusal, SessionRecord
from ulnet.netserver.resolver import Resolver
from ulnet.netserver.shared import SharedTable
from ulnet.stack import protocol as p
from ulnet.stack.statpage import StatPage

log = logging.getLogger("ulnet.netserver")

VIOLATIONS_MAX: Final = 1000  # of one task; then it is put out
APPLICATIONS_MAX: Final = 4096
APPLICATIONS_PER_USER: Final = 64  # its rings are 2.5 MB of the kernel's memory


class Channels(Protocol):
    """What attaching needs from the place that makes channels."""

    def open_channel(self, interface: str) -> ChannelGrant: ...
    def close_channel(self, channel: ChannelGrant) -> None: ...
    def attached(self, app: Application) -> tuple[p.Attached, list[int]]: ...


# What may come after its sender has left: frames that its engine forwards for sessions given back on leaving, and what
# other threads had to say of theirs just before (each thread's messages keep their order, but to those of the others).
LATE = frozenset((p.Call.STRAY, p.Call.FORGET, p.Call.RELEASE, p.Call.ACCEPTED))


class Calls:
    """Handlers of the service port, and the applications behind it."""

    def __init__(self, hub: Hub, table: Callable[[Calls], SharedTable], resolver: Resolver, channels: Channels) -> None:
        self.hub = hub
        self.task = hub.local_task()
        self.channels = channels
        self.resolver = resolver
        self.counters: Counter[str] = Counter()
        self.applications: dict[int, Application] = {}  # by task
        self.table = table(self)
        self._serial = 0
        self._extra: Callable[[], dict[str, Any]] = dict
        self._handlers: dict[int, Callable[[Any, Any, Message], None]] = {
            p.Call.DETACH: self._detach,
            p.Call.BIND: self._bind,
            p.Call.CONNECT: self._connect,
            p.Call.LISTEN: self._listen,
            p.Call.RETURN: self._return,
            p.Call.FORGET: self._forget,
            p.Call.ACCEPTED: lambda app, record, message: self.table.accepted(app, record),
            p.Call.RESOLVE: self._resolve,
            p.Call.STRAY: self._stray,
            p.Call.SHARE: self._share,
            p.Call.REQUEUE: self._requeue,
            p.Call.FORK: self._fork,
            p.Call.HOLD: self._hold,
            p.Call.RELEASE: self._release,
            p.Call.PROMOTE: self._promote,
            p.Call.CLAIM: self._claim,
            p.Call.PUBLISH: self._publish,
            p.Call.STATUS: lambda app, record, message: self._reply(message, self.table.status(app, record.session)),
            p.Call.OPTION: self._option,
            p.Call.LEASE: self._lease,
            p.Call.DECLARE: self._declare,
            p.Call.EMBRYO: lambda app, record, message: self.table.embryo(app, record, _state(message)),
        }

    def start(self, counters: Callable[[], dict[str, Any]]) -> None:
        """Serve from now on. ``counters``: what else `ulnet counters` shows."""
        self._extra = counters
        port = self.task.check_in(p.SERVICE)
        self.task.set_attributes(port, qlimit=1024)
        self.hub.serve(port, self.handle)
        self.hub.on_task_death(self.task_died)

    # -- dispatch ------------------------------------------------------------------------------

    def handle(self, message: Message, sender: Sender) -> None:
        """One message, whatever it is."""
        session = 0
        try:
            kind = p.REQUESTS.get(message.id)
            if kind is None:
                raise p.ProtocolError(f"there is no call {message.id}")
            record = kind.unpack(bytes(message.inline))
            session = getattr(record, "session", 0)
            if message.id == p.Call.SESSIONS:
                self._reply_json(message, report.sessions(self.table, self.applications.values()))
            elif message.id == p.Call.COUNTERS:
                self._reply_json(message, self._all_counters())
            elif isinstance(record, p.Attach):
                self._attach(sender, record, message)
            else:
                app = self.applications.get(sender.task)
                if app is None:
                    raise Refusal(errno.ENOTCONN, "attach first", violation=message.id not in LATE)
                self._handlers[message.id](app, record, message)
        except p.ProtocolError as error:
            self._refuse(message, sender, session, errno.EPROTO, str(error), violation=True)
        except Refusal as error:
            self._refuse(message, sender, session, error.errno or 0, error.strerror or "", violation=error.violation)
        except MachError as error:
            self.counters["replies_lost"] += 1  # it died, or does not read
            log.debug("call %d of pid %d: %s", message.id, sender.pid, error)
        except OSError as error:
            self._refuse(message, sender, session, error.errno or errno.EIO, error.strerror or str(error))
        except Exception:
            log.exception("call %d of pid %d failed", message.id, sender.pid)
            self.counters["internal_errors"] += 1
            self._refuse(message, sender, session, errno.EIO, "the server made a mistake; see its log")
        finally:
            self._tidy(message)

    def _tidy(self, message: Message) -> None:
        """Rights and descriptors nobody asked for must not pile up here."""
        with suppress(MachError):
            if message.remote and message.id in p.ONE_WAY:
                self.task.abandon(message)
            for right in message.rights:
                if right.name:
                    self.task.deallocate(right.name)
        for fd in message.take_fds():
            os.close(fd)

    def _refuse(
        self, message: Message, sender: Sender, session: int, code: int, reason: str, *, violation: bool = False
    ) -> None:
        app = self.applications.get(sender.task)
        self.counters["refused"] += 1
        if violation:
            self.counters["violations"] += 1
            log.warning("pid %d broke the protocol (call %d): %s", sender.pid, message.id, reason)
        with suppress(MachError):
            if message.remote:
                if message.id == p.Call.CONNECT and session and not violation:
                    kept = self.table.records.get(session)
                    reply: p.Record = p.Connected(code, session, "0.0.0.0", kept.lport if kept else 0, reason)
                else:
                    reply = p.Status(code, reason)
                self.task.reply(message, reply.pack())
            elif app is not None:
                self._upcall(app, p.Upcall.REFUSED, p.Refused(message.id & 0xFFFFFFFF, session, code, reason))
        if violation and app is not None:
            app.violations += 1
            if app.violations > VIOLATIONS_MAX:
                log.error("%s breaks the protocol again and again; it is put out", app)
                self._end(app, reset=True)
                with suppress(MachError):
                    self.hub.disconnect(sender.task)

    def _reply(self, message: Message, record: p.Record, **parts: Any) -> None:
        try:
            self.task.reply(message, record.pack(), **parts)
        except MachError as error:
            self.counters["replies_lost"] += 1
            log.debug("reply to call %d: %s", message.id, error)

    def _reply_json(self, message: Message, value: Any) -> None:
        self._reply(message, p.Status(0), ool=[json.dumps(value).encode()])

    def _upcall(self, app: Application, call: p.Upcall, record: p.Record, ool: Iterable[bytes] = ()) -> bool:
        try:
            self.task.send(app.port, call, record.pack(), ool=list(ool))
        except MachError as error:
            self.counters["upcalls_lost"] += 1
            log.debug("%s to %s: %s", call.name, app, error)
            return False
        return True

    # -- attachment ----------------------------------------------------------------------------

    def _attach(self, sender: Sender, request: p.Attach, message: Message) -> None:
        if request.version != p.VERSION:
            raise Refusal(errno.EPROTONOSUPPORT, f"protocol version {request.version}, the server speaks {p.VERSION}")
        if sender.task in self.applications:
            raise Refusal(errno.EISCONN, "attached already", violation=True)
        if request.interface >= len(p.PACKET_INTERFACES):
            raise Refusal(errno.EINVAL, f"no packet interface {request.interface}", violation=True)
        if len(message.rights) != 1:
            raise Refusal(errno.EINVAL, "attach needs a send right to a port of yours", violation=True)
        if len(self.applications) >= APPLICATIONS_MAX:
            raise Refusal(errno.EUSERS, f"{APPLICATIONS_MAX} applications are attached already")
        theirs = sum(app.sender.uid == sender.uid for app in self.applications.values())
        if sender.uid and theirs >= APPLICATIONS_PER_USER:
            raise Refusal(errno.EUSERS, f"{theirs} applications of user {sender.uid} are attached already: end some")
        channel = self.channels.open_channel(p.PACKET_INTERFACES[request.interface])
        try:
            stats = StatPage.create()
        except BaseException:
            channel.close()
            self.channels.close_channel(channel)
            raise
        self._serial += 1
        app = Application(sender, self._serial, _process_name(sender.pid), message.rights[0].name, channel, stats)
        message.rights = ()  # kept
        self.applications[sender.task] = app
        if request.heir:
            self.table.adopt(app, request.heir)
        attached, fds = self.channels.attached(app)
        try:
            self.task.reply(message, attached.pack(), fds=fds)
        except MachError:
            self._end(app)
            raise
        finally:
            channel.close()  # the application's alone from here on
        self.counters["attached"] += 1
        log.info("%s attached: uid %d, channel %d", app, sender.uid, attached.channel)

    def _detach(self, app: Application, request: p.Nothing, message: Message) -> None:
        self._end(app, left=True)
        self._reply(message, p.Status(0))
        log.info("%s left", app)

    def task_died(self, sender: Sender) -> None:
        """A process has gone, and with it its rights."""
        app = self.applications.get(sender.task)
        if app is None:
            return
        held = len(app.sessions)
        self._end(app)
        self.counters["deaths"] += 1
        log.info("%s died with %d sessions", app, held)

    def _end(self, app: Application, *, reset: bool = False, left: bool = False) -> None:
        self.applications.pop(app.sender.task, None)
        self.table.application_ended(app, reset=reset, left=left)
        with suppress(MachError):
            self.task.deallocate(app.port)
        try:
            self.channels.close_channel(app.channel)
        except (OSError, KeyError) as error:
            self.counters["close_failed"] += 1
            log.error("channel of %s: %s", app, error)

    def end_all(self) -> None:
        """The server ends: sessions held by applications are reset, for nobody would clean up after them."""
        for app in list(self.applications.values()):
            self._end(app, reset=True)

    # -- sessions ------------------------------------------------------------------------------

    def _bind(self, app: Application, request: p.Bind, message: Message) -> None:
        record = self.table.bind(app, request)
        self._reply(message, p.Bound(0, record.laddr, record.lport))

    def _connect(self, app: Application, request: p.Connect, message: Message) -> None:
        def done(record: SessionRecord, error: int, state: bytes) -> None:
            named = record.number in self.table.records
            reply = p.Connected(error, record.number, record.laddr, record.lport if named else 0)
            self._reply(message, reply, ool=[state] if state else [])

        next_hop = self.resolver.route(request.address)
        record = self.table.connect(app, request, done)
        if record.protocol == UDP:
            done(record, 0, b"")
        elif next_hop is not None:
            # TCP would try for minutes, for to it "host unreachable" is a passing thing (RFC 1122 4.2.3.9).
            self.resolver.on_failure(next_hop, lambda error: self.table.unreachable(record, error))

    def _listen(self, app: Application, request: p.Listen, message: Message) -> None:
        self.table.listen(app, request)
        self._reply(message, p.Status(0))

    def _return(self, app: Application, request: p.Return, message: Message) -> None:
        self.table.take_back(app, request.session, _state(message))
        if message.remote:  # a forked child waits: it may end by os._exit(), which leaves messages behind
            self._reply(message, p.Status(0))

    def _forget(self, app: Application, request: p.Forget, message: Message) -> None:
        self.table.forget(app, request)
        if message.remote:  # the library waits, so that the name is free when its close() returns
            self._reply(message, p.Status(0))

    def _stray(self, app: Application, request: p.Nothing, message: Message) -> None:
        self.table.strays(app, [bytes(frame) for frame in message.ool])

    def _resolve(self, app: Application, request: p.Resolve, message: Message) -> None:
        self.resolver.ask(app, request.address, lambda error: self._reply(message, p.Status(error)))

    def _lease(self, app: Application, request: p.Lease, message: Message) -> None:
        self._reply(message, p.Status(0), ool=[p.pack_ports(self.table.lease(app, request))])

    def _declare(self, app: Application, request: p.Nothing, message: Message) -> None:
        if len(message.ool) != 1:
            raise p.ProtocolError("connections are declared by one list")
        self.table.declare(app, p.unpack_connections(message.ool[0]))

    # -- shared sessions -----------------------------------------------------------------------

    def _share(self, app: Application, request: p.Share, message: Message) -> None:
        if len(message.ool) > 1:
            raise p.ProtocolError("a shared session comes with its state and nothing else")
        # Copies are made of the descriptors that stay; _tidy closes these.
        self.table.share(app, request.session, _state(message) if message.ool else None, message.fds)

    def _requeue(self, app: Application, request: p.Requeue, message: Message) -> None:
        self.table.requeue(app, request, _state(message))

    def _fork(self, app: Application, request: p.Nothing, message: Message) -> None:
        heir, lifeline = self.table.fork(app)
        with lifeline:  # lost with the reply, it ends the heir
            self._reply(message, p.Forked(0, heir.token, len(heir.sessions)), fds=[lifeline.fileno()])

    def _hold(self, app: Application, request: p.Nothing, message: Message) -> None:
        self._reply(message, self.table.info(self.table.hold(app, message.fds)))

    def _release(self, app: Application, request: p.Release, message: Message) -> None:
        self.table.release(app, request.session, abort=request.abort)
        if message.remote:  # the library waits, so that the name is free when its close() returns
            self.table.run_relays()
            self.table.drive()
            self._reply(message, p.Status(0))

    def _promote(self, app: Application, request: p.Shared, message: Message) -> None:
        def reply(state: bytes | None, fd: int) -> None:
            self._reply(message, p.Status(0), ool=[] if state is None else [state], fds=[fd])

        self.table.promote(app, request.session, reply)

    def _claim(self, app: Application, request: p.Shared, message: Message) -> None:
        self._reply(message, p.Status(0), ool=[self.table.claim(app, request.session)])

    def _publish(self, app: Application, request: p.Publish, message: Message) -> None:
        self.table.publish(app, request)
        self._reply(message, p.Status(0))

    def _option(self, app: Application, request: p.Option, message: Message) -> None:
        self._reply(message, p.OptionValue(0, self.table.option(app, request)))

    # -- what the table says by itself ---------------------------------------------------------

    def deliver(self, app: Application, listener: SessionRecord, number: int, state: bytes) -> bool:
        """An accepted session to its application; 0: its handshake is under way, and the application numbers it."""
        return self._upcall(app, p.Upcall.DELIVER, p.Deliver(listener.number, number), [state])

    def forward(self, app: Application, frames: list[bytes]) -> None:
        """Strays to their application."""
        for start in range(0, len(frames), p.FRAMES_A_MESSAGE):
            self._upcall(app, p.Upcall.STRAY, p.Nothing(), frames[start : start + p.FRAMES_A_MESSAGE])

    def _all_counters(self) -> dict[str, Any]:
        return {
            "tables": self.table.totals() | {"applications": len(self.applications), "tasks": len(self.hub.tasks())},
            "calls": dict(self.counters),
            "sessions": dict(self.table.counters + Counter(self.table.relayed())),
            "ipc": {str(k): v for k, v in self.hub.counters.items()},
            **self._extra(),
        }


def _state(message: Message) -> bytes | memoryview:
    if len(message.ool) != 1 or len(message.ool[0]) > p.MAX_STATE_BYTES:
        raise p.ProtocolError("a session comes with its state and nothing else")
    return memoryview(message.ool[0])  # where it lies: an import copies it once anyway


def _process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
