"""Next hops that somebody waits for: the engine asks by ARP, the metastate page has the answer."""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Callable
from typing import Final

from ulnet.netserver.records import Application, Refusal
from ulnet.stack.engine import Engine
from ulnet.stack.metastate import Metastate

WAITING_MAX: Final = 64  # of one application


class Resolver:
    """Call ``check`` after each poll of the engine."""

    def __init__(self, engine: Engine, meta: Metastate) -> None:
        self._engine = engine
        self._meta = meta
        self._waiting: dict[str, list[Callable[[int], None]]] = {}

    def __len__(self) -> int:
        return sum(len(answers) for answers in self._waiting.values())

    def ask(self, app: Application, address: str, answer: Callable[[int], None]) -> None:
        """For an application: ``answer`` gets 0 once the neighbour is in the page, or an errno; now, or later."""
        if ipaddress.ip_address(address).version != 4:
            raise Refusal(errno.EAFNOSUPPORT, f"{address} is not an IPv4 address", violation=True)
        found = self._meta.resolve(address)
        if found.errno != errno.EAGAIN:
            answer(found.errno)
            return
        if found.next_hop != address:
            raise Refusal(errno.EINVAL, f"{address} is not on the link; ask for its next hop", violation=True)
        if app.resolving >= WAITING_MAX:
            raise Refusal(errno.EAGAIN, f"{WAITING_MAX} addresses are being asked for already")
        app.resolving += 1

        def count(error: int) -> None:
            app.resolving -= 1
            answer(error)

        self._wait(address, count)

    def route(self, address: str) -> str | None:
        """For a connect: the next hop to be asked for first, None when it is known. ENETUNREACH, EHOSTUNREACH."""
        found = self._meta.resolve(address)
        if found.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            raise Refusal(found.errno, f"{os.strerror(found.errno)}: {address}")
        return found.next_hop if found.errno == errno.EAGAIN else None

    def on_failure(self, next_hop: str, answer: Callable[[int], None]) -> None:
        """``answer`` gets the errno when nobody answers at ``next_hop``."""
        self._wait(next_hop, lambda error: answer(error) if error else None)

    def _wait(self, address: str, answer: Callable[[int], None]) -> None:
        self._waiting.setdefault(address, []).append(answer)
        self._engine.ask_neighbour(address)

    def check(self) -> None:
        """Answer whoever can be answered."""
        for address in list(self._waiting):
            error = self._meta.resolve(address).errno
            if error != errno.EAGAIN:
                for answer in self._waiting.pop(address):
                    answer(error)
