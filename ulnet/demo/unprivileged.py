"""Become an ordinary user without any capability, and prove it."""

from __future__ import annotations

import codecs
import ctypes
import os
import struct
from pathlib import Path

NOBODY = 65534
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


def drop() -> str:
    """Give up root for good: groups, ids, every capability. Returns what the kernel says we are now.

    Done after the imports: the interpreter itself may lie where only root can read.
    """
    codecs.lookup("idna")  # what host names need; imported at first use otherwise
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and _maps(NOBODY) is not None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # A user namespace of one id leaves us its root by name: the capabilities go all the same.
    if libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the capabilities")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # nor get them back by executing something
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    uid, outside = os.getuid(), _maps(os.getuid())
    who = f"uid {uid}" if outside in (uid, None) else f"uid {outside}, called {uid} in its user namespace"
    return f"{who}, effective capabilities {int(fields['CapEff'], 16):#x}"


def _maps(uid: int) -> int | None:
    """The id that stands for ``uid`` outside this user namespace; None in one that does not have it."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, outside, count = (int(x) for x in line.split())
        if first <= uid < first + count:
            return outside + uid - first
    return None
