"""``python -m ulnet.table.channels PATH COUNT SECONDS``: attach to a server many times, stay until standard input ends.

Each attachment is a channel of its own, without a ring ("ipc"), as the rings of one are 2.5 MB of the kernel's memory.
Prints how many there are. Runs as root, who may have as many as the server allows.
"""

from __future__ import annotations

import os
import resource
import sys
import time

from ulnet.ipc import MachError, MsgType, PortRight, Task
from ulnet.stack import protocol as p

CALL_TIMEOUT_S = 5.0


def attach(path: str) -> tuple[Task, int]:
    """A task with a channel: both stay as long as the caller keeps them. OSError with the server's reason."""
    task = Task(path)
    try:
        server, port = task.look_up(p.SERVICE), task.allocate()
        request = p.Attach(p.VERSION, p.PACKET_INTERFACES.index("ipc"))
        rights = [PortRight(port, MsgType.MAKE_SEND)]
        message = task.rpc(server, p.Call.ATTACH, request.pack(), rights=rights, timeout=CALL_TIMEOUT_S)
        inline = bytes(message.inline)
        error = int.from_bytes(inline[:4], "little")
        if error:
            raise OSError(error, p.Status.unpack(inline).reason or os.strerror(error))
        channel, *pages = message.take_fds()
        for fd in pages:
            os.close(fd)
    except BaseException:
        task.close()
        raise
    return task, channel


def main() -> None:
    path, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held: list[tuple[Task, int]] = []
    end = time.monotonic() + seconds
    reason = ""
    while len(held) < count and not reason:
        if time.monotonic() > end:
            reason = f"no time for more: {seconds:.0f} s"
            break
        try:
            held.append(attach(path))
        except (OSError, MachError) as error:
            reason = str(error)
    print(len(held), reason, flush=True)
    sys.stdin.read()
    os._exit(0)  # the server sees that we are gone; taking leave one by one would take as long as coming


if __name__ == "__main__":
    main()
