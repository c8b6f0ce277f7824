"""Answer UDP datagrams from a user-level stack, many clients, one loop.

ULNET_SERVER=/run/ulnet.sock python examples/udp_echo.py [port]
"""

import sys

from ulnet.stack import socket


def serve(sock: socket.socket) -> None:
    """Send each datagram back to where it came from, for ever."""
    while True:
        with sock.recv_buffer() as datagram:  # the stack's own memory: nothing is copied on the way in
            assert datagram.address is not None
            sock.sendto(datagram, datagram.address)


if __name__ == "__main__":
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("", int(sys.argv[1]) if len(sys.argv) > 1 else 7))
            print("answering on {}:{}".format(*sock.getsockname()), flush=True)
            serve(sock)
    except KeyboardInterrupt:
        pass
    except OSError as e:
        raise SystemExit(f"udp_echo: {e}") from None
