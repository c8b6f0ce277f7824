"""What every host does around os.fork(): its sessions are made ready, its lock is held, the child starts anew."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulnet.stack.host import Host

_hosts: weakref.WeakSet[Host] = weakref.WeakSet()
_forking: list[Host] = []

is_child = False  # this process was forked


def watch(host: Host) -> None:
    """From now on the host is told of forks."""
    _hosts.add(host)


def _before() -> None:
    _forking[:] = list(_hosts)
    for host in _forking:
        host.before_fork()


def _in_parent() -> None:
    for host in _forking:
        host.after_fork_in_parent()
    _forking.clear()


def _in_child() -> None:
    global is_child
    is_child = True
    for host in _forking:
        host.after_fork_in_child()
    _forking.clear()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
