"""What this build of ulnet and this machine can do: rows and targets that need more are skipped with a written reason."""

from __future__ import annotations

import importlib.util
import inspect

from ulnet.stack.proxy import Proxy
from ulnet.stack.socket import socket


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


PLACEMENT = "placement" in inspect.signature(Proxy.__init__).parameters
SEND_BUFFER = hasattr(socket, "send_buffer") and hasattr(socket, "alloc_buffer")
BATCH = hasattr(socket, "send_buffers") and hasattr(socket, "recv_buffers")
SELECTORS = _found("ulnet.stack.selectors")
UVLOOP = _found("uvloop")
MATPLOTLIB = _found("matplotlib")

NO_PLACEMENT = "sessions cannot be placed in the server in this version"
NO_BATCH = "no send_buffers and recv_buffers in this version: one call a datagram"


def buffer_interface() -> str:
    """How the rows with the buffer-returning interface send."""
    if SEND_BUFFER:
        return "send_buffer and recv_buffer"
    return "send of bytes, which are held instead of copied from 16 KiB on, and recv_buffer"
