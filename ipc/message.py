"""What a program sends and receives: Message, the rights in it, and who sent it."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from .codes import PORT_NULL, MsgType

Buffer: TypeAlias = bytes | bytearray | memoryview


class Sender(NamedTuple):
    """Who sent a message: stamped by the hub from the kernel's credentials, never from what the peer says."""

    task: int
    pid: int
    uid: int
    gid: int


class PortRight(NamedTuple):
    """A right in a message's body. To send: a name and what to do with it. Received: a name and a PORT_* type."""

    name: int
    disposition: MsgType | int


@dataclass(slots=True, eq=False)
class Message:
    """One message. On receipt `remote` is the reply right (PORT_NULL if none) and `local` the port it came to."""

    remote: int = PORT_NULL
    id: int = 0
    inline: bytes = b""
    local: int = PORT_NULL
    ool: Sequence[Buffer] = ()
    rights: Sequence[PortRight] = ()
    fds: Sequence[int] = ()
    remote_disposition: MsgType | int = MsgType.AUTO
    local_disposition: MsgType | int = MsgType.MAKE_SEND_ONCE
    sender: Sender | None = None
    seqno: int = 0
    # Only descriptors that came with a received message are ours to close.
    owns_fds: bool = False

    def take_fds(self) -> list[int]:
        """The received descriptors; they are the caller's to close from now on."""
        fds = list(self.fds)
        self.fds = ()
        return fds

    def close(self) -> None:
        """Close the received descriptors nobody took and drop the out-of-line memory."""
        if self.owns_fds:
            for fd in self.take_fds():
                close_fd(fd)
        self.ool = ()

    def __del__(self) -> None:
        if self.owns_fds and self.fds:
            self.close()


def close_fd(fd: int) -> None:
    """Close a descriptor of ours; whatever close says, it is gone."""
    with suppress(OSError):
        os.close(fd)
