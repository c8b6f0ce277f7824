"""Server programs of one process on host a; stock clients on host b."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.programs import peers
from tests.programs.harness import APPS, Program

PROGRAMS = (
    Program(
        "http.server",
        command=("-m", "http.server", "7001", "--directory", "{files}"),
        port=7001,
        ready=("Serving HTTP", 1),
        peer=peers.static_site,
        stop=signal.SIGINT,
    ),
    Program(
        "aiohttp server",
        command=("-m", f"{APPS}.aiohttp_site", "7002"),
        port=7002,
        needs=("aiohttp",),
        ready=("Running on", 1),
        peer=peers.site_and_websocket,
        stop=signal.SIGTERM,
        traceback=True,  # it logs one for a request that is none
    ),
    Program(
        "uvicorn",
        command=("-m", "uvicorn", "--host", "{address}", "--port", "7003", f"{APPS}.asgi_site:app"),
        port=7003,
        needs=("uvicorn",),
        ready=("Uvicorn running on", 1),
        peer=peers.whole_site,
        stop=signal.SIGINT,
    ),
    Program(
        "hypercorn",
        command=("-m", "hypercorn", "--bind", "0.0.0.0:7004", "--keep-alive", "1", f"{APPS}.asgi_site:app"),
        port=7004,
        needs=("hypercorn",),
        ready=("Running on", 1),
        peer=peers.whole_site,
        stop=signal.SIGTERM,
    ),
    Program(
        "flask",
        command=("-m", "flask", "--app", f"{APPS}.flask_site", "run", "--host", "{address}", "--port", "7005"),
        port=7005,
        needs=("flask",),
        ready=("Running on", 1),
        peer=peers.whole_site,
        stop=signal.SIGINT,
    ),
    Program(
        "pyftpdlib",
        command=("-m", f"{APPS}.ftp_server", "{address}", "7006", "{folder}/ftp"),
        port=7006,
        needs=("pyftpdlib",),
        around=peers.ftp_folder,
        ready=("starting FTP server", 1),
        peer=peers.curl_ftp,
        stop=signal.SIGINT,
        scrub=((r"\] (RETR|None) ", "] RETR "),),  # the name is lost when the connection is quicker than the command
    ),
    Program(
        "aiosmtpd",
        command=("-m", f"{APPS}.smtp_server", "{address}", "7007", "{cert}", "{key}"),
        port=7007,
        needs=("aiosmtpd", "/openssl"),
        ready=("ready", 1),
        peer=peers.smtp_client,
        stop=signal.SIGTERM,
    ),
    Program(
        "ThreadingTCPServer",
        command=("-m", f"{APPS}.socketserver_echo", "7008", "threading"),
        port=7008,
        ready=("ready", 1),
        peer=peers.lines,
        stop=signal.SIGTERM,
    ),
    Program(
        "ThreadingUDPServer",
        command=("-m", f"{APPS}.socketserver_echo", "7009", "threading", "udp"),
        port=7009,
        ready=("ready", 1),
        peer=peers.packets,
        stop=signal.SIGTERM,
    ),
    Program(
        "asyncio streams",
        command=("-m", f"{APPS}.asyncio_echo", "7010", "{cert}", "{key}"),
        port=7010,
        needs=("/openssl",),
        ready=("ready", 1),
        peer=peers.echoes,
        stop=signal.SIGTERM,
    ),
    Program(
        "uvloop",
        command=("-m", f"{APPS}.asyncio_echo", "7020", "{cert}", "{key}", "uvloop"),
        port=7020,
        needs=("uvloop", "/openssl"),
        ready=("ready", 1),
        peer=peers.echoes,
        stop=signal.SIGTERM,
    ),
    Program(
        "http.server over TLS",
        command=("-m", f"{APPS}.https_server", "7030", "{files}", "{cert}", "{key}"),
        port=7030,
        needs=("/openssl",),
        ready=("ready", 1),
        peer=peers.static_site,
        stop=signal.SIGTERM,
        tls=True,
    ),
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_server(equal: Callable[[Program], None], program: Program) -> None:
    equal(program)
