"""A small inetd: each connection becomes standard input and output of a program: ``inetd PORT COUNT COMMAND...``."""

from __future__ import annotations

import socket
import subprocess
import sys

children = []
with socket.create_server(("", int(sys.argv[1]))) as listener:
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        connection, _ = listener.accept()
        with connection:
            children.append(subprocess.Popen(sys.argv[3:], stdin=connection.fileno(), stdout=connection.fileno()))
print("statuses", [child.wait(30) for child in children])
