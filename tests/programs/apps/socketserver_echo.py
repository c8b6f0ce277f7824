"""A socketserver that echoes lines: ``socketserver_echo PORT threading|forking [udp]``."""

from __future__ import annotations

import os
import signal
import socketserver
import sys
import threading

port, kind, udp = int(sys.argv[1]), sys.argv[2], "udp" in sys.argv[3:]


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(b"%d bytes: %s" % (len(line), line))


class Packets(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        data = self.rfile.read()
        self.wfile.write(b"%d bytes: %s" % (len(data), data))


mixin = {"threading": socketserver.ThreadingMixIn, "forking": socketserver.ForkingMixIn}[kind]
base = socketserver.UDPServer if udp else socketserver.TCPServer


class Server(mixin, base):  # type: ignore[misc, valid-type]
    allow_reuse_address = True
    request_queue_size = 64


with Server(("", port), Packets if udp else Lines) as server:
    parent = os.getpid()
    signal.signal(
        signal.SIGTERM,
        lambda *_: threading.Thread(target=server.shutdown).start() if os.getpid() == parent else os._exit(1),
    )
    print("ready", flush=True)
    server.serve_forever(0.1)
print("ended", flush=True)
