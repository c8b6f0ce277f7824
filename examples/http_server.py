"""Serve a folder by HTTP from a user-level TCP stack with the standard library's http.server.

    ULNET_SERVER=/run/ulnet.sock python examples/http_server.py [port] [folder]

socketserver makes its socket in one place, so a subclass of four lines moves any of its servers to this stack.
"""

import functools
import http.server
import sys

from ulnet.stack import socket


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: object) -> None:
        super().__init__(address, handler, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.close()  # the kernel's, never bound
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)  # type: ignore[assignment]
        self.server_bind()
        self.server_activate()


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    folder = sys.argv[2] if len(sys.argv) > 2 else "."
    try:
        with Server(("", port), functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)) as server:
            print("serving {} on http://{}:{}/".format(folder, *server.socket.getsockname()), flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    except OSError as e:
        raise SystemExit(f"http_server: {e}") from None
