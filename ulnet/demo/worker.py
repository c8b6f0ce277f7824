"""One end of a measurement: a process that holds kernel sockets and ulnet sockets and is told what to do.

Commands and answers are JSON lines on standard input and output. Both ends run this same program, so
"both ends alike" is true by construction: ``api`` chooses the socket module, nothing else changes.
"""

from __future__ import annotations

import json
import os
import socket as kernel
import statistics
import sys
import time
from typing import Any

import ulnet.stack.socket as user
from ulnet.demo import unprivileged
from ulnet.stack import proxy

TIMEOUT_S = 20.0
CHUNK = 1 << 20


def _module(api: str) -> Any:
    return kernel if api == "kernel" else user


def _tune(sock: Any, api: str, tcp: bool, spin: bool) -> None:
    if tcp:
        sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
    # A kernel socket spins by not blocking; an ulnet socket spins by itself before it sleeps.
    sock.settimeout(0.0 if spin and api == "kernel" else TIMEOUT_S)


def _receive(sock: Any, view: memoryview, want: int) -> int:
    """Fill view[:want]; spins on sockets that do not block."""
    got = 0
    end = 0.0
    while got < want:
        try:
            n = sock.recv_into(view[got:want])
        except BlockingIOError:
            if end == 0.0:
                end = time.monotonic() + TIMEOUT_S
            elif time.monotonic() > end:
                raise TimeoutError("nothing received") from None
            continue
        if n == 0:
            break
        got += n
    return got


def _pair(api: str, command: dict[str, Any], local: str) -> Any:
    """The connected socket of this end."""
    module = _module(api)
    tcp = command["proto"] == "tcp"
    kind = kernel.SOCK_STREAM if tcp else kernel.SOCK_DGRAM
    if command["side"] == "b":
        sock = module.socket(kernel.AF_INET, kind)
        sock.setsockopt(kernel.SOL_SOCKET, kernel.SO_REUSEADDR, 1)
        sock.settimeout(TIMEOUT_S)
        sock.bind((local, 0))
        if tcp:
            sock.listen(1)
        _say({"port": sock.getsockname()[1]})
        if tcp:
            connection, _ = sock.accept()
            sock.close()
            return connection
        _, peer = sock.recvfrom(64)
        sock.connect(peer)
        sock.send(b"hello")
        return sock
    sock = module.socket(kernel.AF_INET, kind)
    sock.settimeout(TIMEOUT_S)
    sock.connect((command["peer"], command["port"]))
    if not tcp:
        sock.send(b"hello")
        sock.recv(64)
    return sock


def _round_trips(sock: Any, api: str, command: dict[str, Any]) -> dict[str, Any]:
    _tune(sock, api, command["proto"] == "tcp", command.get("spin", True))
    size, count, warm = command["size"], command["count"], command["warm"]
    buffer = memoryview(bytearray(size))
    message = bytes(size)
    times = []
    clock = time.perf_counter_ns
    if command["side"] == "b":
        for _ in range(count + warm):
            if _receive(sock, buffer, size) < size:
                break
            sock.send(message)
        return {}
    for _ in range(count + warm):
        start = clock()
        sock.send(message)
        _receive(sock, buffer, size)
        times.append(clock() - start)
    return {"us": statistics.median(times[warm:]) / 1000}


def _bulk(sock: Any, command: dict[str, Any]) -> dict[str, Any]:
    total = command["bytes"]
    if command["side"] == "b":
        buffer = memoryview(bytearray(CHUNK))
        left = total
        while left:
            n = sock.recv_into(buffer)
            if n == 0:
                break
            left -= n
        sock.sendall(b"k" if left == 0 else b"e")
        return {}
    block = bytes(CHUNK)
    start = time.perf_counter_ns()
    for _ in range(total // CHUNK):
        sock.sendall(block)
    answer = sock.recv(1)
    seconds = (time.perf_counter_ns() - start) / 1e9
    if answer != b"k":
        raise ConnectionError("the receiver did not get everything")
    return {"gbit": total * 8 / seconds / 1e9}


def _run(command: dict[str, Any], local: dict[str, str]) -> dict[str, Any]:
    api = command["api"]
    sock = _pair(api, command, local[api])
    try:
        if command["op"] == "rtt":
            return _round_trips(sock, api, command)
        return _bulk(sock, command)
    finally:
        sock.close()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    setup = json.loads(sys.argv[1])
    os.sched_setaffinity(0, setup["cpus"])
    who = unprivileged.drop()
    user.set_default_host(proxy.Proxy(setup["server"]))
    _say({"who": who})
    for line in sys.stdin:
        try:
            _say({"ok": _run(json.loads(line), setup["local"])})
        except OSError as error:
            _say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
