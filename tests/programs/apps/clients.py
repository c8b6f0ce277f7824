"""What several client programs need: a report of one line for each thing tried."""

from __future__ import annotations

import hashlib
import json
import ssl
import sys
from collections.abc import Callable
from typing import Any


def say(what: str, **facts: Any) -> None:
    """One line of JSON; bytes as their length and SHA-256."""
    shown = {k: [len(v), hashlib.sha256(v).hexdigest()] if isinstance(v, bytes) else v for k, v in facts.items()}
    sys.stdout.write(json.dumps({"what": what, **shown}) + "\n")
    sys.stdout.flush()


def error_of(function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """The class of what it raises, down its causes, with errnos; [] when it raises nothing."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return causes(error)
    return []


def causes(error: BaseException | None) -> list[Any]:
    """Class names and errnos, from the exception to its first cause."""
    names: list[Any] = []
    while error is not None:
        names.append([type(error).__name__, error.errno if isinstance(error, OSError) else None])
        error = error.__cause__ or error.__context__
    return names


def tls(ca: str) -> ssl.SSLContext:
    """A client's context that believes one authority."""
    return ssl.create_default_context(cafile=ca)
