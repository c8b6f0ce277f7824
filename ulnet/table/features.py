"""What this build of ulnet and this machine can do: what needs more is skipped with a written reason."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from ulnet.stack.proxy import Proxy
from ulnet.stack.socket import socket


def _optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


PLACEMENT = "placement" in inspect.signature(Proxy.__init__).parameters
SEND_BUFFER = hasattr(socket, "send_buffer") and hasattr(socket, "alloc_buffer")
BATCH = hasattr(socket, "send_buffers") and hasattr(socket, "recv_buffers")
# Modules are imported at once: a measuring process that has given root up may not be able to read them any more.
SELECTORS = _optional("ulnet.stack.selectors")
UVLOOP = _optional("uvloop")

NO_PLACEMENT = "sessions cannot be placed in the server in this version"
NO_BATCH = "no send_buffers and recv_buffers in this version: one call a datagram"


def buffer_interface() -> str:
    """How the rows with the buffer-returning interface send."""
    if SEND_BUFFER:
        return "send_buffer and recv_buffer"
    return "send of bytes, which are held instead of copied from 16 KiB on, and recv_buffer"
