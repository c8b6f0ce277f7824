"""What one end of a measurement opens sockets with, and how two ends find each other."""

from __future__ import annotations

import json
import resource
import socket as kernel
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

import ulnet.stack.socket as user
from ulnet.stack import proxy
from ulnet.table import features
from ulnet.table.chooser import Chooser

TIMEOUT_S = 20.0
GREET_S = 1.0
Command = dict[str, Any]
Figures = dict[str, Any]


class Api(NamedTuple):
    """``"kernel"``, or ``"ulnet"`` with options: the packet interface, "server" (placement), "still" (never polls)."""

    kernel: bool
    interface: str = "ipf"
    server: bool = False
    still: bool = False

    @classmethod
    def parse(cls, name: str) -> Api:
        first, *options = name.split("-")
        unknown = set(options) - {"ipf", "shm", "ipc", "server", "still"}
        if first not in ("kernel", "ulnet") or unknown or (first == "kernel" and options):
            raise ValueError(f"no way to open sockets is called {name!r}")
        interface = next((o for o in options if o in ("ipf", "shm", "ipc")), "ipf")
        return cls(first == "kernel", interface, "server" in options, "still" in options)


class Ends:
    """What this process opens sockets with: the kernel, and one attachment to the server for each kind of Api."""

    def __init__(self, server: str, local: dict[str, str], chooser: Chooser) -> None:
        self.chooser = chooser  # for kernel sockets
        self._server = server
        self._local = local
        self._hosts: dict[Api, proxy.Proxy] = {}
        self.held: list[Any] = []  # idle sessions (crowds.hold)

    def host(self, api: str) -> proxy.Proxy:
        kind = Api.parse(api)
        if kind not in self._hosts:
            options: dict[str, Any] = {"interface": kind.interface}
            if kind.still:
                options["spin_ns"] = 0
            if kind.server:
                if not features.PLACEMENT:
                    raise OSError(features.NO_PLACEMENT)
                options["placement"] = "server"
            self._hosts[kind] = proxy.Proxy(self._server, **options)
        return self._hosts[kind]

    def socket(self, api: str, proto: str) -> Any:
        kind = kernel.SOCK_STREAM if proto == "tcp" else kernel.SOCK_DGRAM
        if api == "kernel":
            return patient(kernel.socket(kernel.AF_INET, kind))
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


def patient(sock: kernel.socket, seconds: float = TIMEOUT_S) -> kernel.socket:
    """Blocking, but not for ever. A time-out of Python's would cost the kernel's side a poll(2) a call."""
    sock.setblocking(True)
    whole = int(seconds)
    for option in (kernel.SO_RCVTIMEO, kernel.SO_SNDTIMEO):
        sock.setsockopt(kernel.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6)))
    return sock


def accept(listener: Any, api: str) -> Any:
    connection, _ = listener.accept()
    if api == "kernel":
        return patient(connection)
    connection.settimeout(TIMEOUT_S)
    return connection


def listen(ends: Ends, api: str, proto: str, backlog: int = 1) -> Any:
    """Side b's first socket; its port is told to side a."""
    sock = ends.socket(api, proto)
    sock.setsockopt(kernel.SOL_SOCKET, kernel.SO_REUSEADDR, 1)
    sock.bind((ends.address(api), 0))
    if proto == "tcp":
        sock.listen(backlog)
    say({"port": sock.getsockname()[1]})
    return sock


def pair(ends: Ends, command: Command) -> Any:
    """The connected socket of this end."""
    api, proto = command["api"], command["proto"]
    if command["side"] == "b":
        sock = listen(ends, api, proto)
        if proto == "tcp":
            with sock:
                return accept(sock, api)
        _, peer = sock.recvfrom(64)
        sock.connect(peer)
        sock.send(b"hello")
        return sock
    sock = ends.socket(api, proto)
    sock.connect((command["peer"], command["port"]))
    if proto == "udp":
        _greet(sock, api)
    return sock


def _greet(sock: Any, api: str) -> None:
    """Until there is an answer: the link may lose some."""
    end = time.monotonic() + TIMEOUT_S
    patient(sock, GREET_S) if api == "kernel" else sock.settimeout(GREET_S)
    while True:
        sock.send(b"hello")
        try:
            sock.recv(64)
            break
        except (BlockingIOError, TimeoutError):
            if time.monotonic() > end:
                raise TimeoutError("no answer to a greeting") from None
    patient(sock) if api == "kernel" else sock.settimeout(TIMEOUT_S)


def say(answer: Figures) -> None:
    print(json.dumps(answer), flush=True)


def page_bytes() -> int:
    return resource.getpagesize()


def resident_bytes() -> int:
    """This process's memory (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
