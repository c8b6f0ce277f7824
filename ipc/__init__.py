"""Mach-style ports between the tasks (processes) of one machine, over ZeroMQ.

A **Hub** is the microkernel of ports: it holds every task's name space, rights and queues, and is the only judge of who
may send where. Programs join it with a **Task**. The process that hosts the hub has a local task whose messages
cross no socket. Names, rights, dispositions and error codes are Mach's. Usable by itself; Linux only.

A server, driven by one thread::

    from ulnet.ipc import Hub, MachError

    hub = Hub("/run/demo.sock")                     # also makes /run/demo.sock.fd, the side channel
    task = hub.local_task()
    port = task.check_in("demo.echo")               # name of a receive right
    hub.serve(port, lambda message, sender: task.reply(message, b"you are pid %d" % sender.pid))
    hub.on_task_death(lambda sender: print("gone:", sender.pid))
    while True:
        hub.poll(None)                              # or wait for hub.fileno() in a loop of your own, then hub.poll(0)

A client, usable from any thread::

    from ulnet.ipc import Task

    with Task("/run/demo.sock") as task:
        echo = task.look_up("demo.echo")            # name of a send right
        reply = task.rpc(echo, 100, b"hello", ool=[bytearray(1 << 20)], fds=[0], timeout=5.0)
        print(bytes(reply.inline), reply.ool, reply.take_fds())

Signatures (seconds are floats; `None` waits for ever; a name is an int, `PORT_NULL` is 0)::

    Hub(path, *, mode=0o600, limits=Limits(), bootstrap_policy=...)    OSError, one clear line: path cannot be served
        .local_task() -> LocalTask               the hub's own task (always the same one)
        .serve(port, handler)                    handler(message: Message, sender: Sender); port: a receive right of the
                                                 local task. Reply now or later by local_task.reply(message, ...)
        .unserve(port)
        .fileno() -> int                         level-triggered: readable while there is something to do
        .poll(timeout=0.0) -> int                handles what is there; number of messages and events handled
        .on_task_death(callback)                 callback(sender), once a task, after its rights are destroyed
        .tasks() -> list[Sender]                 remote tasks alive
        .disconnect(task_id)                     ends a task as if it had died
        .counters: Counter[str]                  everything dropped or refused, by reason
        .close()                                 clients get SERVER_DIED; socket files removed
    All of a hub and its local task is for one thread.

    Task(path, *, timeout=5.0)                   an OSError: not found, refused, no permission, timed out
    LocalTask (from Hub.local_task())            the same calls; never waits; no rpc()
        .check_in(name: str) -> int              receive right of a service (names are dotted strings). By default root
                                                 and the hub's user may serve any name, others "user.<uid>.*"
        .look_up(name: str) -> int               send right, also before the server has checked in (requests queue)
        .register(name: str, port: int)          publishes a send right; PORT_NULL withdraws
        .allocate(right=Right.RECEIVE) -> int
        .destroy(name) .deallocate(name) .mod_refs(name, right, delta) .get_refs(name, right) -> int
        .names() -> dict[int, RightSet] .type(name) -> RightSet .rename(old, new)
        .insert_right(name, port, disposition) .extract_right(name, disposition) -> int   within the task's own space
        .get_attributes(name) -> PortStatus .set_attributes(name, qlimit=N)
        .request_notification(name, Notify.X, sync, notify_port, disposition=MAKE_SEND_ONCE) -> int   (the last one)
        .msg(message, options, timeout=None, rcv_name=0) -> Message | None                mach_msg
        .send(dest, id, inline=b"", *, ool=(), fds=(), rights=(), local=0, timeout=None)  waits until it is queued
        .post(dest, id, inline=b"", *, ool=(), fds=(), rights=(), local=0)                does not wait for the hub
        .receive(name, timeout=None) -> Message  MACH_RCV_TIMED_OUT; LocalTask: never waits
        .reply(message, inline=b"", *, ool=(), fds=(), rights=(), id=None)                id: message.id + 100
    Task only
        .rpc(dest, id, inline=b"", *, ool=(), fds=(), rights=(), timeout=None) -> Message
        .start_receiver(handler, names=None)     one daemon thread; handler(message, sender); names: these ports only
        .fileno(), .drain(handler) -> int        or the same in a loop of your own (readable when drain has work)
        .alive -> bool, .on_server_death(cb)     cb() from the receiver thread or drain
        .posts_refused() -> int, .counters, .close()

    Message: remote, local, id, inline (bytes), ool (list of buffers), rights (list[PortRight]), fds (list[int]), seqno,
             sender (Sender(task, pid, uid, gid), stamped by the hub from the kernel's credentials)
        .take_fds() -> list[int]                 the caller's from now on; those not taken are closed with the message
        .close()
        PortRight(name, disposition)             to send: MsgType.MAKE_SEND, MOVE_RECEIVE, ...; received: a PORT_* type

    Subsystem(name, base)                        an interface in the manner of MIG: see ulnet.ipc.subsystem
    MachError(code, what)                        every refusal; `.code` is a KernReturn, MachMsgReturn, MigReturn or
                                                 BootstrapReturn member (IntEnum)

Descriptors given to a send are duplicated: the caller keeps its own. Out-of-line buffers are not copied on the way to
ZeroMQ: do not change them before the call returns (rpc, send) or, after post, before the message has been received.
Received out-of-line memory is a read-only buffer object (memoryview).

After a fork the child's copy of a Task is unusable (every call raises RuntimeError); the child makes its own.
"""

from .calls import PortStatus
from .codes import (
    PORT_DEAD,
    PORT_NULL,
    BootstrapReturn,
    KernReturn,
    MachError,
    MachMsgReturn,
    MigReturn,
    MsgOption,
    MsgType,
    Notify,
    Right,
    RightSet,
)
from .hub import Hub
from .local import LocalTask
from .message import Message, PortRight, Sender
from .objects import Limits
from .subsystem import DEFERRED, Subsystem
from .task import Task

__all__ = [
    "DEFERRED",
    "PORT_DEAD",
    "PORT_NULL",
    "BootstrapReturn",
    "Hub",
    "KernReturn",
    "Limits",
    "LocalTask",
    "MachError",
    "MachMsgReturn",
    "Message",
    "MigReturn",
    "MsgOption",
    "MsgType",
    "Notify",
    "PortRight",
    "PortStatus",
    "Right",
    "RightSet",
    "Sender",
    "Subsystem",
    "Task",
]
