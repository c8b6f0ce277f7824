"""What the tests of fork and of passing sockets share: a bed, a kernel listener, programs that print what they saw."""

from __future__ import annotations

import json
import socket as ksocket
import subprocess
from typing import Any

from tests.netserver_bed import PEER, Bed, read_line

# At the head of every program: report() prints, end() leaves a child, placed() tells who manages a session.
HEAD = """
import errno, json, os, select, signal, threading
def report(**what):
    os.write(1, json.dumps(what).encode() + b"\\n")
def placed(sock):
    return "server" if sock.session.shared else "application"
def wait_child(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child {pid} ended with {status}"
def child(function, *arguments):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)
def read_exactly(sock, n):
    data = bytearray()
    while len(data) < n:
        part = sock.recv(min(65536, n - len(data)))
        assert part, f"end of file after {len(data)} of {n} bytes"
        data += part
    return bytes(data)
def settle(sock):
    # The last holder's next uses fetch the session back; the other's end may still be on its way to the server.
    for _ in range(200):
        try:
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        if placed(sock) == "application":
            break
        time.sleep(0.01)
    return placed(sock)
HOST, PORT = sys.argv[1], int(sys.argv[2])
"""


def run(bed: Bed, code: str, *arguments: str, port: int = 0) -> subprocess.Popen[bytes]:
    """The program, with the listener's port as its second argument."""
    return bed.program(HEAD + code, PEER, str(port), *arguments)


def told(program: subprocess.Popen[bytes], limit_s: float = 20) -> dict[str, Any]:
    """Its next report."""
    line = read_line(program, limit_s)
    assert line, f"the program ended with status {program.wait(10)}"
    answer: dict[str, Any] = json.loads(line)
    return answer


def read_to_end(sock: ksocket.socket) -> bytes:
    parts = []
    while data := sock.recv(65536):
        parts.append(data)
    return b"".join(parts)


def exactly(sock: ksocket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = sock.recv(n - len(data))
        assert part, f"end of file after {data!r}"
        data += part
    return data
