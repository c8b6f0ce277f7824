"""The unprivileged program of the acceptance tests: Python code comes in by lines of JSON, answers go out the same way.

Runs as ``python -m tests.acceptance.shell SOCKET``. Every name below, and whatever earlier code made, is at hand.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import http.server
import json
import os
import random
import select
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ulnet.demo import unprivileged
from ulnet.demo.app import HTTPServer
from ulnet.stack import proxy, socket

MIB = 1 << 20


def blocks(size: int, seed: int) -> Iterator[memoryview]:
    """A stream of ``size`` bytes that both ends can make: pieces of up to 1 MiB, no two of them alike."""
    pool = memoryview(random.Random(seed).randbytes(2 * MIB))
    at = 0
    while size:
        take = min(MIB, size)
        yield pool[at : at + take]
        size -= take
        at = (at + 4099) % MIB


def digest_of(size: int, seed: int) -> str:
    """SHA-256 of that stream."""
    digest = hashlib.sha256()
    for block in blocks(size, seed):
        digest.update(block)
    return digest.hexdigest()


def send_stream(sock: Any, size: int, seed: int) -> None:
    """Send that stream through any kind of socket."""
    for block in blocks(size, seed):
        sock.sendall(block)


def receive_into(sock: Any, size: int) -> str:
    """Take ``size`` bytes by recv_into(); their SHA-256."""
    digest, memory = hashlib.sha256(), memoryview(bytearray(MIB))
    while size:
        got = sock.recv_into(memory[: min(size, MIB)])
        if not got:
            raise EOFError(f"{size} bytes before the end")
        digest.update(memory[:got])
        size -= got
    return digest.hexdigest()


def receive_buffers(sock: socket.socket, size: int) -> str:
    """Take ``size`` bytes by recv_buffer(), without a copy; their SHA-256."""
    digest = hashlib.sha256()
    while size:
        with sock.recv_buffer(min(size, MIB)) as buffer:
            if not len(buffer):
                raise EOFError(f"{size} bytes before the end")
            digest.update(buffer)
            size -= len(buffer)
    return digest.hexdigest()


def receive_exactly(sock: Any, size: int) -> bytes:
    """``size`` bytes, or what came before the end."""
    data = bytearray()
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return bytes(data)


def udp_socket(port: int = 0) -> socket.socket:
    """Bound, with a time-out."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind(("", port))
    return sock


def main() -> None:
    who = unprivileged.drop()
    host = proxy.Proxy(sys.argv[1])
    socket.set_default_host(host)
    names: dict[str, Any] = globals() | {"host": host}
    print(json.dumps({"value": who}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"value": None}
        try:
            if request["kind"] == "eval":
                answer["value"] = eval(request["code"], names)
            else:
                exec(compile(request["code"], "<test>", "exec"), names)
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            answer = {"error": type(error).__name__, "errno": number, "text": str(error)}
        print(json.dumps(answer), flush=True)


#: For the code that comes in.
__all__ = ["contextlib", "errno", "http", "select", "socketserver", "struct", "threading", "time", "os", "HTTPServer"]

if __name__ == "__main__":
    main()
