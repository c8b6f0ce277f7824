"""One end of a measurement: a process that holds kernel sockets and ulnet sockets and is told what to do.

Commands and answers are JSON lines on standard input and output. Both ends run this same program, so
"both ends alike" is true by construction: ``api`` chooses the socket module, nothing else changes. It is
"kernel", "ulnet", or "ulnet-shm" and "ulnet-ipc" for the other two packet interfaces.
"""

from __future__ import annotations

import json
import os
import socket as kernel
import statistics
import struct
import sys
import time
from typing import Any

import ulnet.stack.socket as user
from ulnet.demo import unprivileged
from ulnet.stack import proxy

TIMEOUT_S = 20.0
CHUNK = 1 << 20


class Ends:
    """What this process opens sockets with: the kernel, and one attachment to the server for each packet interface."""

    def __init__(self, server: str, local: dict[str, str]) -> None:
        self._server = server
        self._local = local
        self._hosts: dict[str, proxy.Proxy] = {}

    def host(self, api: str) -> proxy.Proxy:
        interface = api.partition("-")[2] or "ipf"
        if interface not in self._hosts:
            self._hosts[interface] = proxy.Proxy(self._server, interface=interface)
        return self._hosts[interface]

    def socket(self, api: str, proto: str) -> Any:
        kind = kernel.SOCK_STREAM if proto == "tcp" else kernel.SOCK_DGRAM
        if api == "kernel":
            return _patient(kernel.socket(kernel.AF_INET, kind))
        sock = user.socket(kernel.AF_INET, kind, host=self.host(api))
        sock.settimeout(TIMEOUT_S)
        return sock

    def address(self, api: str) -> str:
        return self._local["kernel" if api == "kernel" else "ulnet"]

    def counters(self, api: str) -> dict[str, int]:
        return {} if api == "kernel" else self.host(api).engine.counters()

    def shutdown(self) -> None:
        for host in self._hosts.values():
            host.shutdown()


def _patient(sock: kernel.socket) -> kernel.socket:
    """Blocking, but not for ever. A time-out of Python's would cost the kernel's side a poll(2) a call."""
    sock.setblocking(True)
    for option in (kernel.SO_RCVTIMEO, kernel.SO_SNDTIMEO):
        sock.setsockopt(kernel.SOL_SOCKET, option, struct.pack("@ll", int(TIMEOUT_S), 0))
    return sock


def _accept(listener: Any, api: str) -> Any:
    connection, _ = listener.accept()
    if api == "kernel":
        return _patient(connection)
    connection.settimeout(TIMEOUT_S)
    return connection


def _tune(sock: Any, api: str, tcp: bool, spin: bool) -> None:
    if tcp:
        sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
    # A kernel socket spins by not blocking; an ulnet socket spins by itself before it sleeps.
    if spin and api == "kernel":
        sock.setblocking(False)


def _take(sock: Any, view: memoryview) -> int:
    """One receive; spins on a socket that does not block."""
    end = 0.0
    while True:
        try:
            got: int = sock.recv_into(view)
            return got
        except BlockingIOError:
            if end == 0.0:
                end = time.monotonic() + TIMEOUT_S
            elif time.monotonic() > end:
                raise TimeoutError("nothing received") from None


def _receive(sock: Any, view: memoryview, want: int) -> int:
    """Fill view[:want], or less at the end of the stream."""
    got = 0
    while got < want:
        n = _take(sock, view[got:want])
        if n == 0:
            break
        got += n
    return got


def _listen(ends: Ends, api: str, proto: str, backlog: int = 1) -> Any:
    """Side b's first socket; its port is told to side a."""
    sock = ends.socket(api, proto)
    sock.setsockopt(kernel.SOL_SOCKET, kernel.SO_REUSEADDR, 1)
    sock.bind((ends.address(api), 0))
    if proto == "tcp":
        sock.listen(backlog)
    _say({"port": sock.getsockname()[1]})
    return sock


def _pair(ends: Ends, command: dict[str, Any]) -> Any:
    """The connected socket of this end."""
    api, proto = command["api"], command["proto"]
    if command["side"] == "b":
        sock = _listen(ends, api, proto)
        if proto == "tcp":
            with sock:
                return _accept(sock, api)
        _, peer = sock.recvfrom(64)
        sock.connect(peer)
        sock.send(b"hello")
        return sock
    sock = ends.socket(api, proto)
    sock.connect((command["peer"], command["port"]))
    if proto == "udp":
        sock.send(b"hello")
        sock.recv(64)
    return sock


def _round_trips(ends: Ends, sock: Any, command: dict[str, Any]) -> dict[str, Any]:
    """``counters``: also what the engine counted in the measured part."""
    api = command["api"]
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
    for _ in range(warm):
        sock.send(message)
        _receive(sock, buffer, size)
    before = ends.counters(api)
    for _ in range(count):
        start = clock()
        sock.send(message)
        _receive(sock, buffer, size)
        times.append(clock() - start)
    counted = {name: value - before[name] for name, value in ends.counters(api).items() if name in before}
    return {"us": statistics.median(times) / 1000, "counters": counted}


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
    return {"gbit": total * 8 / seconds / 1e9, "seconds": seconds}


def _connections(ends: Ends, command: dict[str, Any]) -> dict[str, Any]:
    """Connect, exchange one byte each way, close; one connection after the other."""
    api, count = command["api"], command["count"]
    if command["side"] == "b":
        with _listen(ends, api, "tcp", 16) as listener:
            for _ in range(count):
                with _accept(listener, api) as connection:
                    if connection.recv(1):
                        connection.send(b"a")
                        connection.recv(1)  # the end: the asking side closes first and keeps TIME-WAIT
        return {}
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        with ends.socket(api, "tcp") as sock:
            sock.connect((command["peer"], command["port"]))
            sock.send(b"q")
            if sock.recv(1) != b"a":
                raise ConnectionError("the peer closed instead of answering")
        times.append(time.perf_counter_ns() - start)
    return {"us": statistics.median(times) / 1000}


def _trains(sock: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Trains of datagrams as fast as they go, each answered when it is complete: ``us`` for each datagram.

    The answer bounds what is on its way, so that no receive buffer overflows, however late the receiver runs.
    """
    _tune(sock, command["api"], False, command.get("spin", True))
    size, length, trains = command["size"], command["length"], command["count"] // command["length"]
    buffer = memoryview(bytearray(max(size, 64)))
    if command["side"] == "b":
        for _ in range(trains):
            for _ in range(length):
                _take(sock, buffer)
            sock.send(b"k")
        return {}
    message = bytes(size)
    start = time.perf_counter_ns()
    for _ in range(trains):
        for _ in range(length):
            sock.send(message)
        _take(sock, buffer)
    return {"us": (time.perf_counter_ns() - start) / 1000 / (trains * length)}


def _run(ends: Ends, command: dict[str, Any]) -> dict[str, Any]:
    if command["op"] == "connect":
        return _connections(ends, command)
    with _pair(ends, command) as sock:
        if command["op"] == "rtt":
            return _round_trips(ends, sock, command)
        if command["op"] == "train":
            return _trains(sock, command)
        return _bulk(sock, command)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    setup = json.loads(sys.argv[1])
    os.sched_setaffinity(0, setup["cpus"])
    who = unprivileged.drop()
    ends = Ends(setup["server"], setup["local"])
    ends.host("ulnet")  # a server that is not there shows here
    _say({"who": who})
    for line in sys.stdin:
        try:
            _say({"ok": _run(ends, json.loads(line))})
        except OSError as error:
            _say({"error": f"{type(error).__name__}: {error}"})
    ends.shutdown()


if __name__ == "__main__":
    main()
