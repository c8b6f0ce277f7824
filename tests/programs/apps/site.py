"""What the small web applications answer, so that one client can browse them all; no framework here."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"


def pattern(size: int) -> bytes:
    """``size`` bytes that both ends can make."""
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


def pieces(count: int) -> Iterator[bytes]:
    """A streamed body."""
    for number in range(count):
        yield f"{number:08d}\n".encode() * 100


def answer(method: str, path: str, body: bytes, client: str) -> tuple[int, str, bytes | int]:
    """Status, content type, and the body, or the number of ``pieces()`` to stream."""
    name, _, number = path.strip("/").partition("/")
    if name == "":
        return 200, TEXT, "hello, wörld\n".encode()
    if name == "bytes":
        return 200, BYTES, pattern(int(number))
    if name == "stream":
        return 200, TEXT, int(number)
    if name == "echo" and method in ("POST", "PUT"):
        return 200, BYTES, body
    if name == "who":
        return 200, "application/json", json.dumps({"client": client}).encode()
    if name == "pid":
        time.sleep(0.05)  # the other workers get the other connections
        return 200, TEXT, str(os.getpid()).encode()
    return 404, TEXT, b"no such thing\n"
