"""A served address for tests: host ``a`` with a netserver, host ``b`` with the kernel's stack, joined by a cable.

A packet socket stays in the namespace it was made in, so the test process itself can be an application.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ulnet.kernelshim.testbed import Testbed
from ulnet.stack import protocol
from ulnet.stack.proxy import Proxy, query

ADDRESS = "10.77.0.10"
PEER = "10.77.0.2"
NOBODY = "10.77.0.99"
EMPTY = {"sessions": 0, "flows": 0, "guarded": 0, "names": 0, "engine_flows": 0}


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 5.0) -> Any:
    """Until the condition holds; its value."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {limit_s} s")
        time.sleep(0.01)


class Bed:
    """The hosts and one running server; ``close`` ends everything."""

    _count = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "netserver.sock")
        self.testbed = Testbed()
        try:
            Bed._count += 1
            self.a = self.testbed.host(f"a{Bed._count}")
            self.b = self.testbed.host(f"b{Bed._count}")
            self.wire()
            self.log = folder / "netserver.log"
            self.server = self.start()
        except BaseException:
            self.testbed.close()
            raise
        self.proxies: list[Proxy] = []
        self.programs: list[subprocess.Popen[bytes]] = []

    def wire(self) -> None:
        """Join the hosts."""
        self.testbed.wire(self.a, self.b, b_addr=f"{PEER}/24")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ulnet.cli", *arguments]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """Run the server and wait for its ready line."""
        with open(self.log, "ab") as log:
            server = self.a.popen(
                self.command(
                    "netserver",
                    *("--interface", "eth0", "--address", f"{ADDRESS}/24", "--socket", self.path, "--no-probe"),
                    *more,
                ),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        line = read_line(server)
        assert line == f"ulnet: serving {ADDRESS}/24 on eth0 at {self.path}", (line, self.log.read_text())
        return server

    def stop(self) -> int:
        """End the server in good order; its exit status."""
        self.server.send_signal(signal.SIGTERM)
        return self.server.wait(10)

    def proxy(self, **options: Any) -> Proxy:
        """This process as one more application."""
        proxy = Proxy(self.path, **options)
        self.proxies.append(proxy)
        return proxy

    def program(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        """An application of its own process: Python code with ``ulnet.stack.socket`` as ``socket``."""
        head = "import sys, time\nfrom ulnet.stack import socket\n"
        program = self.a.popen(
            [sys.executable, "-c", head + code, *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            env=os.environ | {protocol.PATH_VARIABLE: self.path},
        )
        self.programs.append(program)
        return program

    def end_programs(self) -> None:
        for proxy in self.proxies:
            proxy.shutdown()
        self.proxies.clear()
        for program in self.programs:
            program.kill()
            program.wait()
        self.programs.clear()

    def counters(self) -> dict[str, Any]:
        return query(protocol.Call.COUNTERS, self.path)

    def tables(self) -> dict[str, int]:
        return dict(self.counters()["tables"])

    def sessions(self) -> list[dict[str, Any]]:
        return query(protocol.Call.SESSIONS, self.path)

    def is_empty(self) -> bool:
        """Nothing left but TIME-WAIT, which RFC 9293 wants kept by whoever closed first."""
        tables, sessions = self.tables(), self.sessions()
        waiting = sum(row["state"] == "TIME-WAIT" and row["owner"] is None for row in sessions)
        elsewhere = sum(row["state"] == "TIME-WAIT" and row["owner"] is not None for row in sessions)
        return len(sessions) == waiting + elsewhere and {k: tables[k] for k in EMPTY} == EMPTY | {
            "sessions": waiting,
            "names": waiting,
            "engine_flows": waiting,
        }

    def expect_empty(self, limit_s: float = 5.0) -> None:
        try:
            wait_for(self.is_empty, "empty tables", limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {json.dumps(self.tables())} {json.dumps(self.live())}") from None

    def live(self) -> list[dict[str, Any]]:
        """Sessions that are not in TIME-WAIT."""
        return [row for row in self.sessions() if row["state"] != "TIME-WAIT"]

    def server_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def close(self) -> None:
        self.end_programs()
        self.testbed.close()


def read_line(process: subprocess.Popen[bytes], limit_s: float = 15.0) -> str:
    """One line of the process's output; fails when none comes in time."""
    assert process.stdout is not None
    line = b""
    deadline = time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise AssertionError(f"no line within {limit_s} s, only {line!r}")
        byte = os.read(process.stdout.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode().rstrip("\n")
