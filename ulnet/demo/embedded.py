"""The demo without privilege: http.client, http.server and UDP on two embedded stacks in one process."""

from __future__ import annotations

import hashlib
import http.client
import os
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ulnet.stack.socket as user
from ulnet.stack import embedded


class _Handler(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self, host: Any) -> None:
        socketserver.BaseServer.__init__(self, ("", 8000), _Handler)
        self.socket: Any = user.socket(user.AF_INET, user.SOCK_STREAM, host=host)
        self.server_bind()
        self.server_activate()


def run(size: int) -> Iterator[str]:
    """Yield one line for each thing shown; raises RuntimeError when something differs."""
    client, server = embedded.pair()
    with client, server:
        _Handler.body = os.urandom(size)
        service = _Server(server)
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = server.engine.meta.addr

        connection = http.client.HTTPConnection(address, 8000, timeout=30)

        def connect(to: tuple[str, int], timeout: float, source: Any = None) -> Any:
            sock = user.socket(user.AF_INET, user.SOCK_STREAM, host=client)
            sock.settimeout(timeout)
            sock.connect(to)
            return sock

        connection._create_connection = connect  # type: ignore[attr-defined]
        connection.request("GET", "/")
        body = connection.getresponse().read()
        connection.close()
        service.shutdown()
        service.server_close()
        if hashlib.sha256(body).digest() != hashlib.sha256(_Handler.body).digest():
            raise RuntimeError("the SHA-256 of the embedded download differs")
        yield f"http.client downloaded {size >> 20} MiB from http.server: SHA-256 equal"

        with (
            user.socket(user.AF_INET, user.SOCK_DGRAM, host=server) as there,
            user.socket(user.AF_INET, user.SOCK_DGRAM, host=client) as here,
        ):
            there.bind(("", 0))
            here.settimeout(5)
            there.settimeout(5)
            for length in (1, 100, 1472, 9000):
                data = os.urandom(length)
                here.sendto(data, (address, there.getsockname()[1]))
                got, peer = there.recvfrom(65535)
                there.sendto(got, peer)
                if here.recv(65535) != data:
                    raise RuntimeError(f"a UDP datagram of {length} bytes came back changed")
        yield "UDP datagrams of 1 to 9000 bytes echoed, byte for byte"
