"""The demo's application: an ordinary program that does its networking through ulnet.stack.socket.

It takes one JSON command a line and answers with one. Nothing in it knows of channels, servers or
sessions: http.client, http.server and socketserver run unchanged on sockets of another module.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import json
import socketserver
import sys
import threading
from typing import Any

import ulnet.stack.socket as user
from ulnet.demo import unprivileged
from ulnet.stack import proxy

BLOCK = 1 << 18


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Files, without a line on standard error for each."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HTTPServer(http.server.ThreadingHTTPServer):
    """The standard server; only its listening socket comes from elsewhere."""

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        socketserver.BaseServer.__init__(self, address, handler)
        self.socket: Any = user.socket(user.AF_INET, user.SOCK_STREAM)
        self.server_bind()
        self.server_activate()


def download(command: dict[str, Any]) -> dict[str, Any]:
    """GET a file; pause half-way until told to go on (the demo stops the network server meanwhile)."""
    connection = http.client.HTTPConnection(command["host"], command["port"], timeout=30)
    connection._create_connection = user.create_connection  # type: ignore[attr-defined]
    digest, got, paused = hashlib.sha256(), 0, False
    connection.request("GET", command["path"])
    response = connection.getresponse()
    while block := response.read(BLOCK):
        digest.update(block)
        got += len(block)
        if not paused and got >= command["pause_at"]:
            say({"paused": got})
            sys.stdin.readline()
            paused = True
    connection.close()
    return {"status": response.status, "bytes": got, "sha256": digest.hexdigest()}


def serve_http(command: dict[str, Any]) -> dict[str, Any]:
    handler = functools.partial(QuietHandler, directory=command["root"])
    server = HTTPServer(("", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"port": server.server_address[1]}


def serve_udp(command: dict[str, Any]) -> dict[str, Any]:
    sock = user.socket(user.AF_INET, user.SOCK_DGRAM)
    sock.bind(("", 0))

    def echo() -> None:
        while True:
            data, peer = sock.recvfrom(65535)
            sock.sendto(data, peer)

    threading.Thread(target=echo, daemon=True).start()
    return {"port": sock.getsockname()[1]}


def drain(command: dict[str, Any]) -> dict[str, Any]:
    """Receive for ever; the demo kills the process in the middle of it."""
    sock = user.create_connection((command["host"], command["port"]), timeout=30)
    say({"draining": True})
    while sock.recv(BLOCK):
        pass
    return {}


COMMANDS = {"download": download, "serve_http": serve_http, "serve_udp": serve_udp, "drain": drain}


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    who = unprivileged.drop()
    user.set_default_host(proxy.Proxy(sys.argv[1]))
    say({"who": who})
    for line in sys.stdin:
        command = json.loads(line)
        say(COMMANDS[command["do"]](command))


if __name__ == "__main__":
    main()
