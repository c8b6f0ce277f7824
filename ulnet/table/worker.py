"""One end of a measurement: a process that holds kernel sockets and ulnet sockets and is told what to do.

Commands and answers are JSON lines on standard input and output. Both ends run this same program, so "both ends alike"
is true by construction: ``api`` chooses how sockets are opened (ends.Api), nothing else changes. Operations with many
connections are in ``crowds``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket as kernel
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from ulnet.demo import unprivileged
from ulnet.stack import stamps
from ulnet.table import crowds, features
from ulnet.table.chooser import Chooser
from ulnet.table.ends import TIMEOUT_S, Command, Ends, Figures, accept, listen, pair, patient, say

LOST_S = 0.2  # a datagram train that has paused for so long has lost the rest
ANSWER_S = 0.01  # for a datagram's answer, where some get lost
LAST = 255  # the byte that ends round trips of unknown number
CHUNK = 1 << 20
PIECE = 65_536  # what the buffer interface sends and takes at a time
AHEAD = 2  # datagram trains on their way


def _tune(sock: Any, api: str, tcp: bool, spin: bool) -> None:
    if tcp:
        sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
    # A kernel socket spins by not blocking; an ulnet socket spins by itself before it sleeps.
    if spin and api == "kernel":
        sock.setblocking(False)


def _until(call: Callable[[], int]) -> int:
    """Repeat a call on a socket that does not block."""
    end = 0.0
    while True:
        try:
            return call()
        except BlockingIOError:
            if end == 0.0:
                end = time.monotonic() + TIMEOUT_S
            elif time.monotonic() > end:
                raise TimeoutError("nothing received or taken") from None


# -- round trips -----------------------------------------------------------------------------------


class Plain:
    """Messages of one size by send and recv_into, the calls that a program uses today."""

    def __init__(self, sock: Any, size: int, spin: bool) -> None:
        self._size = size
        self._view = memoryview(bytearray(size))
        self._message = bytes(size)
        self._send = sock.send
        self._recv_into = sock.recv_into
        self._spin = spin

    def send(self) -> None:
        self._send(self._message)

    def receive(self) -> bool:
        """False at the end of the stream."""
        got = 0
        while got < self._size:
            view = self._view[got:] if got else self._view
            n = _until(lambda view=view: self._recv_into(view)) if self._spin else self._recv_into(view)  # type: ignore[misc]
            if n == 0:
                return False
            got += n
        return True


class Lent:
    """The same by the buffer interface (SOSP 1993 4.2): what is received is the stack's own memory, sent back."""

    def __init__(self, sock: Any, size: int) -> None:
        self._sock = sock
        self._size = size
        self._message = bytes(size)
        self._buffer: Any = None

    def send(self) -> None:
        if not features.SEND_BUFFER:
            self._sock.send(self._message)
            return
        buffer = self._buffer or self._sock.alloc_buffer(self._size)
        self._buffer = None
        self._sock.send_buffer(buffer)

    def receive(self) -> bool:
        buffer = self._sock.recv_buffer(self._size)
        got = len(buffer)
        if got == self._size and features.SEND_BUFFER:
            self._buffer = buffer
            return True
        buffer.release()
        while 0 < got < self._size:  # TCP may deliver it in pieces
            with self._sock.recv_buffer(self._size - got) as more:
                if len(more) == 0:
                    return False
                got += len(more)
        return got == self._size


def _round_trips(ends: Ends, sock: Any, command: Command) -> Figures:
    """For each size, ``count`` round trips after ``warm`` others: quartiles in us; what the engine counted."""
    api, count, warm = command["api"], command["count"], command["warm"]
    spin = command.get("spin", True)
    _tune(sock, api, command["proto"] == "tcp", spin)
    clock = time.perf_counter_ns
    sizes = []
    counted: dict[str, int] = {}
    for size in command["sizes"]:
        end = Lent(sock, size) if command.get("lend") else Plain(sock, size, spin and api == "kernel")
        send, receive = end.send, end.receive
        if command["side"] == "b":
            for _ in range(count + warm):
                if not receive():
                    raise ConnectionError("the other end closed in the middle")
                send()
            continue
        times = []
        for _ in range(warm):
            send()
            receive()
        before = ends.counters(api)
        for _ in range(count):
            start = clock()
            send()
            receive()
            times.append(clock() - start)
        after = ends.counters(api)
        counted = {name: value - before[name] for name, value in after.items() if name in before}
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        sizes.append({"size": size, "q1": quartiles[0] / 1e3, "us": quartiles[1] / 1e3, "q3": quartiles[2] / 1e3})
    return {"sizes": sizes, "us": sizes[0]["us"], "counters": counted} if sizes else {}


def _stamped(sock: Any, command: Command) -> Figures:
    """1-byte round trips with time stamps at the program's calls (layers.py reads them, and the engine's)."""
    api = command["api"]
    _tune(sock, api, command["proto"] == "tcp", command.get("spin", True))
    end = Plain(sock, 1, command.get("spin", True) and api == "kernel")
    mark, call, returned, received = stamps.mark, stamps.CALL_SEND, stamps.SEND_RETURN, stamps.RECV_RETURN
    asking = command["side"] == "a"
    for _ in range(command["count"]):
        if not asking:
            end.receive()
            mark(received)
        mark(call)
        end.send()
        mark(returned)
        if asking:
            end.receive()
            mark(received)
    return {}


def _trips_for(sock: Any, command: Command) -> Figures:
    """1-byte round trips for ``seconds``, where some get lost: ``us`` the median, ``mean_us`` of all the time spent.

    A datagram that has no answer after ANSWER_S is ``lost``; TCP sends again by itself.
    """
    tcp, spin = command["proto"] == "tcp", command["api"] == "kernel"
    _tune(sock, command["api"], tcp, spin)
    if not (tcp or spin):
        sock.settimeout(ANSWER_S)
    view = memoryview(bytearray(1))
    quiet: tuple[type[OSError], ...] = (BlockingIOError, TimeoutError)

    def received(limit_s: float) -> bool:
        """False at the end of the stream, or when the answer is late."""
        end = time.monotonic() + limit_s
        while True:
            try:
                return bool(sock.recv_into(view))
            except quiet:
                if time.monotonic() > end:
                    return False

    if command["side"] == "b":
        while received(TIMEOUT_S if tcp else TIMEOUT_S / 10) and view[0] != LAST:
            sock.send(view)
        return {}
    times = []
    lost = number = 0
    start = time.monotonic()
    end = start + command["seconds"]
    while (now := time.monotonic()) < end:
        number = (number + 1) % LAST
        sock.send(bytes((number,)))
        while (answered := received(TIMEOUT_S if tcp else ANSWER_S)) and view[0] != number:
            pass  # a late one
        if answered:
            times.append(time.monotonic() - now)
        elif tcp:
            raise TimeoutError(f"no answer for {TIMEOUT_S:.0f} s")
        else:
            lost += 1
    mean = (time.monotonic() - start) / max(1, len(times))
    with contextlib.suppress(ConnectionRefusedError):  # it went at the first of them
        for _ in range(1 if tcp else 10):
            sock.send(bytes((LAST,)))
    if not times:
        raise TimeoutError("nothing was answered")
    return {"us": statistics.median(times) * 1e6, "mean_us": mean * 1e6, "lost": lost, "sent": len(times) + lost}


# -- bulk ------------------------------------------------------------------------------------------


def _bulk_in(sock: Any, total: int, lend: bool) -> int:
    """Receive ``total`` bytes; what is missing at the end of the stream."""
    buffer = memoryview(bytearray(CHUNK))
    while total:
        if lend:
            with sock.recv_buffer(CHUNK) as piece:
                n = len(piece)
        else:
            n = _until(lambda: sock.recv_into(buffer))
        if n == 0:
            break
        total -= n
    return total


def _bulk_out(sock: Any, total: int, lend: bool) -> None:
    block = memoryview(bytes(CHUNK))
    if lend and features.SEND_BUFFER:
        for _ in range(total // PIECE):
            sock.send_buffer(sock.alloc_buffer(PIECE))
        return
    if sock.getblocking():
        data = block.obj
        for _ in range(total // CHUNK):
            sock.sendall(data)
        return
    for _ in range(total // CHUNK):
        sent = 0
        while sent < CHUNK:
            view = block[sent:]
            sent += _until(lambda view=view: sock.send(view))  # type: ignore[misc]


def _bulk(ends: Ends, sock: Any, command: Command) -> Figures:
    """``bytes`` from a to b, and b's answer when it has them all."""
    if command["api"] == "kernel":
        ends.chooser.choose(sock)
    total, lend = command["bytes"], command.get("lend", False) and command["api"] != "kernel"
    _tune(sock, command["api"], False, command.get("spin", False))
    if command["side"] == "b":
        left = _bulk_in(sock, total, lend)
        sock.setblocking(True)
        sock.sendall(b"k" if left == 0 else b"e")
        return {}
    start = time.perf_counter_ns()
    _bulk_out(sock, total, lend)
    answer = bytearray(1)
    _until(lambda: sock.recv_into(answer))
    seconds = (time.perf_counter_ns() - start) / 1e9
    if answer != b"k":
        raise ConnectionError("the receiver did not get everything")
    return {"gbit": total * 8 / seconds / 1e9, "seconds": seconds}


# -- connections, datagrams ------------------------------------------------------------------------


def _connections(ends: Ends, command: Command) -> Figures:
    """Connect, exchange one byte each way, close; one connection after the other."""
    api, count = command["api"], command["count"]
    if command["side"] == "b":
        with listen(ends, api, "tcp", 16) as listener:
            for _ in range(count):
                with accept(listener, api) as connection:
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


def _train_in(sock: Any, length: int, size: int, batch: bool, wait_s: float) -> int:
    """One train; how many datagrams of it are lost. ``wait_s``: for the first; the others follow each other closely."""
    buffer = memoryview(bytearray(max(size, 64)))
    got, limit = 0, time.monotonic() + wait_s
    while got < length:
        try:
            if batch:
                for piece in sock.recv_buffers(length - got):
                    piece.release()
                    got += 1
            else:
                sock.recvfrom_into(buffer)
                got += 1
        except (TimeoutError, BlockingIOError):
            if time.monotonic() < limit:
                continue
            if got == 0:
                raise TimeoutError("a whole train of datagrams was lost") from None
            break
        if got == 1 or batch:
            limit = time.monotonic() + LOST_S
    return length - got


def _trains(sock: Any, command: Command) -> Figures:
    """Trains of datagrams as fast as they go, each answered when it is complete: ``us`` for each datagram.

    The answers bound what is on its way (``ahead`` trains), so that no receive buffer overflows, however late the
    receiver runs. ``batch``: by send_buffers and recv_buffers; otherwise sendto and recvfrom_into, one call a datagram.
    """
    api, batch = command["api"], command.get("batch", False) and features.BATCH and command["api"] != "kernel"
    size, length, ahead = command["size"], command["length"], command.get("ahead", 1)
    trains = command["count"] // length
    peer = sock.getpeername()
    if command["side"] == "b":
        lost = 0
        for number in range(trains):
            if number == 0:
                patient(sock, LOST_S) if api == "kernel" else sock.settimeout(LOST_S)
                _tune(sock, api, False, command.get("spin", True))
            lost += _train_in(sock, length, size, batch, TIMEOUT_S if number == 0 else TIMEOUT_S / 4)
            sock.send(b"k")
        return {"lost": lost}
    _tune(sock, api, False, command.get("spin", True))
    message = bytes(size)
    messages = [message] * length
    answer = bytearray(64)
    start = time.perf_counter_ns()
    for number in range(trains):
        if batch:
            sent = 0
            while sent < length:
                sent += sock.send_buffers(messages[sent:] if sent else messages)
        else:
            for _ in range(length):
                sock.sendto(message, peer)
        if number >= ahead - 1:
            _until(lambda: int(sock.recv_into(answer)))
    for _ in range(min(ahead - 1, trains)):
        _until(lambda: int(sock.recv_into(answer)))
    return {"us": (time.perf_counter_ns() - start) / 1000 / (trains * length)}


# -- the process -----------------------------------------------------------------------------------


def _place(cpus: list[int]) -> None:
    """All threads of this process on these processors (sched_setaffinity(2) is a thread's own)."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


def _run(ends: Ends, command: Command) -> Figures:
    op = command["op"]
    if op == "place":
        _place(command["cpus"])
        return {}
    if op == "stamps":
        stamps.open(command["path"])
        return {}
    if op == "congestion":
        with kernel.socket() as sock:
            return {"congestion": ends.chooser.choose(sock)}
    if op == "counters":
        return {"counters": ends.counters(command["api"])}
    whole: dict[str, Callable[[Ends, Command], Figures]] = {
        "connect": _connections,
        "requests": crowds.requests,
        "hold": crowds.hold,
        "drop": crowds.drop,
    }
    if op in whole:
        return whole[op](ends, command)
    with pair(ends, command) as sock:
        if op == "rtt":
            return _round_trips(ends, sock, command)
        if op == "trips-for":
            return _trips_for(sock, command)
        if op == "stamped":
            return _stamped(sock, command)
        if op == "train":
            return _trains(sock, command)
        return _bulk(ends, sock, command)


def main() -> None:
    setup = json.loads(sys.argv[1])
    _place(setup["cpus"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    chooser = Chooser()
    who = unprivileged.drop()
    ends = Ends(setup["server"], setup["local"], chooser)
    ends.host("ulnet")  # a server that is not there shows here
    say({"who": who})
    for line in sys.stdin:
        try:
            say({"ok": _run(ends, json.loads(line))})
        except (OSError, ValueError) as error:
            say({"error": f"{type(error).__name__}: {error}"})
    ends.shutdown()


if __name__ == "__main__":
    main()
