"""Changes of links and addresses in this network namespace, as a descriptor for the server's loop.

Read first: rtnetlink(7). The multicast messages only say that something changed; what holds now is read by a dump,
so that a lost message (ENOBUFS) needs no care of its own.
"""

from __future__ import annotations

import socket
from typing import Final

from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]

_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_IFADDR: Final = 0x10


class Watch:
    """Readable when a link or an IPv4 address changed; ``drain`` first, then ask."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Take what is there off the descriptor."""
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                continue  # ENOBUFS: some were lost, which the dump makes good

    def close(self) -> None:
        self._socket.close()


def interface_names() -> list[str]:
    """Every device there is now."""
    return [name for _, name in socket.if_nameindex()]


def kernel_addresses() -> set[str]:
    """Every IPv4 address the kernel has now."""
    with IPRoute() as ip:
        return {str(row.get_attr("IFA_LOCAL")) for row in ip.addr("dump", family=socket.AF_INET)}
