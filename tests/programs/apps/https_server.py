"""The standard library's HTTP server over TLS, its listening socket wrapped: ``https_server PORT FOLDER CERT KEY``."""

from __future__ import annotations

import signal
import ssl
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[3], sys.argv[4])
with ThreadingHTTPServer(("", int(sys.argv[1])), partial(SimpleHTTPRequestHandler, directory=sys.argv[2])) as server:
    server.socket = context.wrap_socket(server.socket, server_side=True)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print("ready", flush=True)
    server.serve_forever(0.1)
