"""Measurements with many connections: requests over a thousand of them, and sessions that only stay open."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  now: a process that gave root up may not find it later
import gc
import selectors as kernel_selectors
import socket as kernel
import time
from typing import Any

from ulnet.table import features
from ulnet.table.ends import Command, Ends, Figures, accept, listen, resident_bytes, say

REQUEST = 1024
BACKLOG = 128
DRAIN_S = 10.0


# -- asyncio: what a Python program would use over kernel sockets -----------------------------------


class _Answering(asyncio.Protocol):
    """Sends back each whole request."""

    def __init__(self, ends: _Ended) -> None:
        self._ended = ends
        self._missing = REQUEST
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing <= 0:
            self._missing += REQUEST
            self._transport.write(bytes(REQUEST))

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.one()


class _Ended:
    """Counts ends; ``all`` is done when the last one came."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.all = asyncio.get_running_loop().create_future()

    def one(self) -> None:
        self._left -= 1
        if self._left == 0 and not self.all.done():
            self.all.set_result(None)


class _Asking(asyncio.Protocol):
    """One request after the other, until told to stop."""

    answers = 0
    stopping = False

    def __init__(self) -> None:
        self._missing = REQUEST
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self) -> None:
        self._transport.write(bytes(REQUEST))

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing <= 0:
            self._missing += REQUEST
            _Asking.answers += 1
            if not _Asking.stopping:
                self.ask()

    def close(self) -> None:
        self._transport.close()


def _loop(main: Any) -> Any:
    factory = None if features.UVLOOP is None else features.UVLOOP.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def _serve(address: str, count: int, limit_s: float) -> Figures:
    ended = _Ended(count)
    server = await asyncio.get_running_loop().create_server(lambda: _Answering(ended), address, 0, backlog=BACKLOG)
    say({"port": server.sockets[0].getsockname()[1]})
    try:
        await asyncio.wait_for(ended.all, limit_s)
    finally:
        server.close()
    return {}


async def _ask(peer: str, port: int, count: int, seconds: float) -> Figures:
    loop = asyncio.get_running_loop()
    _Asking.answers, _Asking.stopping = 0, False
    asking = [(await loop.create_connection(_Asking, peer, port))[1] for _ in range(count)]
    start = time.perf_counter()
    for protocol in asking:
        protocol.ask()
    await asyncio.sleep(seconds)
    rate = _Asking.answers / (time.perf_counter() - start)
    _Asking.stopping = True
    for protocol in asking:
        protocol.close()
    await asyncio.sleep(0.1)
    return {"rate": rate}


# -- a selector loop over ulnet's sockets -----------------------------------------------------------


def _selector() -> Any:
    return (features.SELECTORS or kernel_selectors).DefaultSelector()


def _answer_all(ends: Ends, api: str, count: int, limit_s: float) -> Figures:
    view, answer = memoryview(bytearray(REQUEST)), bytes(REQUEST)
    missing: dict[Any, int] = {}
    deadline = time.monotonic() + limit_s
    with listen(ends, api, "tcp", BACKLOG) as listener, _selector() as selector:
        for _ in range(count):
            sock = accept(listener, api)
            sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
            sock.setblocking(False)
            missing[sock] = REQUEST
            selector.register(sock, kernel_selectors.EVENT_READ)
        while missing and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                sock = key.fileobj
                try:
                    n = sock.recv_into(view)
                except BlockingIOError:
                    continue
                except ConnectionResetError:  # closed with our last answer unread
                    n = 0
                if n == 0:
                    selector.unregister(sock)
                    sock.close()
                    del missing[sock]
                    continue
                missing[sock] -= n
                if missing[sock] <= 0:
                    missing[sock] += REQUEST
                    sock.sendall(answer)  # a send buffer holds far more than one answer
        for sock in missing:
            sock.close()
    return {}


def _ask_all(ends: Ends, command: Command) -> Figures:
    api, count = command["api"], command["count"]
    view, request = memoryview(bytearray(REQUEST)), bytes(REQUEST)
    missing: dict[Any, int] = {}
    answers = 0
    with _selector() as selector:
        try:
            for _ in range(count):
                sock = ends.socket(api, "tcp")
                sock.connect((command["peer"], command["port"]))
                sock.setsockopt(kernel.IPPROTO_TCP, kernel.TCP_NODELAY, 1)
                sock.setblocking(False)
                missing[sock] = REQUEST
                selector.register(sock, kernel_selectors.EVENT_READ)
            start = time.perf_counter()
            for sock in missing:
                sock.sendall(request)
            end = start + command["seconds"]
            while time.perf_counter() < end:
                for key, _ in selector.select(0.1):
                    sock = key.fileobj
                    try:
                        n = sock.recv_into(view)
                    except BlockingIOError:
                        continue
                    if n == 0:
                        raise ConnectionError("the other end closed in the middle")
                    missing[sock] -= n
                    if missing[sock] <= 0:
                        missing[sock] += REQUEST
                        answers += 1
                        sock.sendall(request)
            rate = answers / (time.perf_counter() - start)
        finally:
            for sock in missing:
                sock.close()
    return {"rate": rate}


def requests(ends: Ends, command: Command) -> Figures:
    """``count`` connections with one 1 KiB request each at any time, one thread at each end: ``rate`` in answers/s.

    Kernel sockets: asyncio (with uvloop where it is). ulnet: a loop over its selectors where it has some, otherwise
    over epoll and the sockets' descriptors.
    """
    api, count = command["api"], command["count"]
    limit_s = command["seconds"] + DRAIN_S + count * 0.02
    if command["side"] == "b":
        if api == "kernel":
            return dict(_loop(_serve(ends.address(api), count, limit_s)))
        return _answer_all(ends, api, count, limit_s)
    if api == "kernel":
        return dict(_loop(_ask(command["peer"], command["port"], count, command["seconds"])))
    return _ask_all(ends, command)


# -- sessions that only stay open -------------------------------------------------------------------


def hold(ends: Ends, command: Command) -> Figures:
    """``count`` more established TCP sessions that nobody uses; ``rss``: this process's memory then."""
    api = command["api"]
    if command["side"] == "b":
        with listen(ends, api, "tcp", BACKLOG) as listener:
            for _ in range(command["count"]):
                ends.held.append(accept(listener, api))
    else:
        for _ in range(command["count"]):
            sock = ends.socket(api, "tcp")
            sock.connect((command["peer"], command["port"]))
            ends.held.append(sock)
    gc.collect()
    return {f"rss_{command['side']}": resident_bytes(), f"held_{command['side']}": len(ends.held)}


def drop(ends: Ends, command: Command) -> Figures:
    """Close what is held."""
    while ends.held:
        ends.held.pop().close()
    return {}
