"""Interfaces in the manner of MIG: a subsystem's routines get consecutive ids, a reply's id is the request's + 100.

    calc = Subsystem("calc", 5000)
    add = calc.routine("add")                      # id 5000; the server's function gets keyword arguments
    log = calc.simpleroutine("log")                # id 5001, one way

    hub.serve(port, calc.server(local_task, {"add": lambda call, a, b: a + b, "log": lambda call, text: print(text)}))
    calc.client(task, right).call("add", a=1, b=2, timeout=5.0).value

Arguments are small control data and travel as JSON in the inline part; bulk goes out of line. A reply begins with a
return code: 0, one of Mach's or MIG's codes (mig_errors.h), or ERRNO_BASE + errno, which the client raises as OSError.
"""

from __future__ import annotations

import inspect
import json
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .codes import PORT_NULL, MachError, MigReturn, code_of
from .local import LocalTask
from .message import Buffer, Message, PortRight, Sender
from .task import Task

log = logging.getLogger("ulnet.ipc")

REPLY_OFFSET = 100  # MIG: msgh_id of a reply
# Return codes above this carry an errno (ours; Mach's err_system(0x8) would be out of the way as well).
ERRNO_BASE = 0x20000000
_CODE = struct.Struct("<i")


class _Deferred:
    def __repr__(self) -> str:
        return "DEFERRED"


#: A server function returns this when it will use call.reply or call.fail later.
DEFERRED = _Deferred()


class Reply(NamedTuple):
    """What a routine returned."""

    value: Any
    message: Message


class Call:
    """One request as the server's function sees it."""

    __slots__ = ("_done", "message", "name", "sender", "task")

    def __init__(self, task: LocalTask | Task, name: str, message: Message, sender: Sender) -> None:
        self.task = task
        self.name = name
        self.message = message
        self.sender = sender
        self._done = False

    def reply(
        self,
        value: Any = None,
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
    ) -> None:
        """Answer, now or later; only the first answer counts. A simpleroutine's answer goes nowhere."""
        self._finish(0, value, ool, fds, rights)

    def fail(self, error: BaseException) -> None:
        """Answer with an error: MachError and OSError arrive as such, anything else as EXCEPTION."""
        if isinstance(error, MachError):
            self._finish(int(error.code), error.what)
        elif isinstance(error, OSError) and error.errno:
            self._finish(ERRNO_BASE + error.errno, error.strerror)
        else:
            self._finish(MigReturn.EXCEPTION, f"{type(error).__name__}: {error}")

    def _finish(
        self,
        code: int,
        value: Any,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
    ) -> None:
        if self._done:
            return
        inline = _CODE.pack(code) + json.dumps(value, separators=(",", ":")).encode()
        self._done = True
        if self.message.remote == PORT_NULL:
            return
        self.task.reply(self.message, inline, ool=ool, fds=fds, rights=list(rights))


class Subsystem:
    """Names and message ids of an interface; both sides build it the same way."""

    def __init__(self, name: str, base: int) -> None:
        self.name = name
        self.base = base
        self._next = base
        self.ids: dict[str, int] = {}
        self.one_way: set[str] = set()

    def routine(self, name: str) -> int:
        """The next id, for a request with a reply."""
        if name in self.ids:
            raise ValueError(f"subsystem {self.name}: routine {name!r} is defined twice")
        if self._next >= self.base + REPLY_OFFSET:
            raise ValueError(f"subsystem {self.name}: at most {REPLY_OFFSET} routines, or replies meet requests")
        self.ids[name] = self._next
        self._next += 1
        return self.ids[name]

    def simpleroutine(self, name: str) -> int:
        """The next id, for a message without a reply."""
        number = self.routine(name)
        self.one_way.add(name)
        return number

    def skip(self) -> None:
        """Leave an id unused (a routine that is gone keeps the others' numbers)."""
        self._next += 1

    def server(
        self, task: LocalTask | Task, functions: Mapping[str, Callable[..., Any]]
    ) -> Callable[[Message, Sender], None]:
        """A handler for Hub.serve or Task.start_receiver. Functions are called as function(call, **arguments)."""
        unknown = set(functions) - set(self.ids)
        if unknown:
            raise ValueError(f"subsystem {self.name} has no routine {sorted(unknown)}")
        table = {self.ids[name]: (name, function, inspect.signature(function)) for name, function in functions.items()}

        def handle(message: Message, sender: Sender) -> None:
            entry = table.get(message.id)
            if entry is None:
                Call(task, "?", message, sender).fail(MachError(MigReturn.BAD_ID, f"no routine {message.id}"))
                return
            name, function, signature = entry
            call = Call(task, name, message, sender)
            arguments = _decode_arguments(message.inline)
            try:
                if arguments is None:
                    raise TypeError("arguments are not a JSON object")
                signature.bind(call, **arguments)
            except TypeError as error:
                call.fail(MachError(MigReturn.BAD_ARGUMENTS, f"{self.name}.{name}: {error}"))
                return
            try:
                value = function(call, **arguments)
                if value is not DEFERRED and not call._done:
                    call.reply(value)
            except (MachError, OSError) as error:
                call.fail(error)
            except Exception as error:
                log.exception("%s.%s from pid %d failed", self.name, name, sender.pid)
                call.fail(error)

        return handle

    def client(self, task: Task, port: int) -> Client:
        """The caller's side, for a send right to a port that is served."""
        return Client(self, task, port)


class Client:
    """Calls the routines of a subsystem at a port. As free of threads as its task."""

    def __init__(self, subsystem: Subsystem, task: Task, port: int) -> None:
        self.subsystem = subsystem
        self.task = task
        self.port = port

    def call(
        self,
        name: str,
        /,
        *,
        ool: Iterable[Buffer] = (),
        fds: Sequence[int] = (),
        rights: Sequence[PortRight] = (),
        timeout: float | None = None,
        **arguments: Any,
    ) -> Reply:
        """Call a routine. Raises MachError or OSError as the server failed, or as mach_msg refused."""
        number = self.subsystem.ids[name]
        inline = json.dumps(arguments, separators=(",", ":")).encode()
        message = self.task.rpc(self.port, number, inline, ool=ool, fds=fds, rights=rights, timeout=timeout)
        if message.id != number + REPLY_OFFSET:
            raise MachError(MigReturn.REPLY_MISMATCH, f"reply {message.id} to {self.subsystem.name}.{name} ({number})")
        try:
            (code,) = _CODE.unpack_from(message.inline)
            value = json.loads(message.inline[_CODE.size :])
        except (struct.error, ValueError, RecursionError):
            raise MachError(MigReturn.TYPE_ERROR, f"reply to {self.subsystem.name}.{name}") from None
        if code > ERRNO_BASE and code - ERRNO_BASE < 4096:
            raise OSError(code - ERRNO_BASE, str(value))
        if code:
            raise MachError(code_of(code), str(value))
        return Reply(value, message)

    def post(self, name: str, /, *, ool: Iterable[Buffer] = (), fds: Sequence[int] = (), **arguments: Any) -> None:
        """Send to a simpleroutine; returns at once."""
        if name not in self.subsystem.one_way:
            raise ValueError(f"{self.subsystem.name}.{name} has a reply: use call")
        inline = json.dumps(arguments, separators=(",", ":")).encode()
        self.task.post(self.port, self.subsystem.ids[name], inline, ool=ool, fds=fds)


def _decode_arguments(inline: bytes) -> dict[str, Any] | None:
    try:
        arguments = json.loads(inline) if inline else {}
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None
