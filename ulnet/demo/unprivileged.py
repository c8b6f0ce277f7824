"""Become an ordinary user without any capability, and prove it."""

from __future__ import annotations

import codecs
import ctypes
import os
from pathlib import Path

NOBODY = 65534
_PR_SET_NO_NEW_PRIVS = 38


def drop() -> str:
    """Give up root for good: groups, ids, every capability. Returns what the kernel says we are now.

    Done after the imports: the interpreter itself may lie where only root can read.
    """
    codecs.lookup("idna")  # what host names need; imported at first use otherwise
    if os.geteuid() == 0 and _maps_nobody():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return f"uid {os.getuid()}, effective capabilities {int(fields['CapEff'], 16):#x}"


def _maps_nobody() -> bool:
    """False in a user namespace that maps one id only: there the program stays who it is."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = (int(x) for x in line.split())
        if first <= NOBODY < first + count:
            return True
    return False
