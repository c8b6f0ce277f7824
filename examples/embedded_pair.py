"""Two hosts, one process, no privilege: a TCP conversation over a wire in memory.

python examples/embedded_pair.py
"""

import threading

from ulnet.stack import socket
from ulnet.stack.embedded import pair


def main() -> None:
    alice, bob = pair("10.0.0.1/24", "10.0.0.2/24")
    with alice, bob:
        listener = socket.create_server(("", 7), host=bob)

        def echo() -> None:
            sock, peer = listener.accept()
            print(f"bob: connection from {peer[0]}:{peer[1]}")
            with sock:
                while data := sock.recv(4096):
                    sock.sendall(data.upper())

        thread = threading.Thread(target=echo)
        thread.start()
        with socket.create_connection(("10.0.0.2", 7), timeout=5, host=alice) as sock:
            sock.sendall(b"hello from a user-level stack")
            # A receive call that returns the stack's own memory: no copy. Give it back soon.
            with sock.recv_buffer() as buffer:
                print("alice:", bytes(memoryview(buffer)).decode())
        thread.join()
        listener.close()


if __name__ == "__main__":
    main()
