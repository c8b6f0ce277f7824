"""Programs of several processes that share sockets: pre-forked servers, forking servers, multiprocessing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial

import pytest

from tests.programs import peers
from tests.programs.harness import APPS, Program

GUNICORN = ("-m", "gunicorn", "--workers", "4", f"{APPS}.wsgi_site:app", "--bind")


def sends(method: str) -> Program:
    """The tree is sent by the program's workers."""
    return Program(
        f"tree sender, {method}",
        command=("-m", f"{APPS}.tree", "send", "{peer}", str(peers.TREE_PORT), "{files}", method),
        around=partial(peers.tree_receiver, "fork"),
        peer=peers.arrived,
    )


def receives(method: str, port: int) -> Program:
    """The tree is received by the program's workers."""
    return Program(
        f"tree receiver, {method}",
        command=("-m", f"{APPS}.tree", "receive", str(port), "{folder}/received", method),
        port=port,
        ready=("ready", 1),
        peer=partial(peers.send_tree, "fork"),
    )


PROGRAMS = (
    Program(
        "gunicorn sync",
        command=(*GUNICORN, "{address}:7101"),
        port=7101,
        needs=("gunicorn",),
        ready=("Booting worker", 4),
        peer=peers.site_of(4),
        stop=signal.SIGTERM,
        scrub=((r"\(\d+\)", "(PID)"),),
    ),
    Program(
        "gunicorn gthread",
        command=(*GUNICORN, "0.0.0.0:7102", "--threads", "4"),
        port=7102,
        needs=("gunicorn",),
        ready=("Booting worker", 4),
        peer=peers.site_of(4),
        stop=signal.SIGTERM,
        scrub=((r"\(\d+\)", "(PID)"),),
    ),
    Program(
        "uvicorn, 2 workers",
        command=("-m", "uvicorn", "--workers", "2", "--host", "{address}", "--port", "7103", f"{APPS}.asgi_site:app"),
        port=7103,
        needs=("uvicorn",),
        ready=("Application startup complete", 2),
        peer=peers.site_of(2),
        stop=signal.SIGTERM,
        scrub=((r"(?m)^.*GET /pid.*\n", ""),),  # as many as it took to see both workers
    ),
    Program(
        "ForkingTCPServer",
        command=("-m", f"{APPS}.socketserver_echo", "7104", "forking"),
        port=7104,
        ready=("ready", 1),
        peer=peers.lines,
        stop=signal.SIGTERM,
    ),
    Program(
        "ForkingUDPServer",
        command=("-m", f"{APPS}.socketserver_echo", "7105", "forking", "udp"),
        port=7105,
        ready=("ready", 1),
        peer=peers.packets,
        stop=signal.SIGTERM,
    ),
    Program(
        "http.server --cgi",
        command=("-m", "http.server", "--cgi", "--bind", "{address}", "--directory", "{folder}/site", "7106"),
        port=7106,
        around=peers.cgi_folder,
        ready=("Serving HTTP", 1),
        peer=peers.cgi,
        stop=signal.SIGINT,
    ),
    Program(
        "inetd",
        command=("-m", f"{APPS}.inetd", "7107", "4", "cat"),
        port=7107,
        ready=("ready", 1),
        peer=peers.piped,
    ),
    Program(
        "manager",
        command=("-m", f"{APPS}.manager", "serve", "7108"),
        port=7108,
        ready=("ready", 1),
        peer=peers.manager_client,
        stop=signal.SIGTERM,
    ),
    Program(
        "manager's client",
        command=("-m", f"{APPS}.manager", "use", "{peer}", str(peers.MANAGER_PORT)),
        around=peers.manager,
    ),
    *(sends(method) for method in ("fork", "spawn", "forkserver")),
    receives("fork", 7111),
    receives("spawn", 7112),
    receives("forkserver", 7113),
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_processes(equal: Callable[[Program], None], program: Program) -> None:
    equal(program)
