"""Client programs on host a against stock servers on host b."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.programs import peers
from tests.programs.harness import APPS, Program

WEB = ("{peer}", str(peers.NGINX_PORT), str(peers.TLS_PORT), str(peers.SITE_PORT), "{cert}")
WEB_NEEDS = ("/nginx", "/openssl")

PROGRAMS = (
    Program(
        "urllib, http.client, ssl",
        command=("-m", f"{APPS}.urllib_client", *WEB),
        needs=WEB_NEEDS,
        around=peers.web,
    ),
    Program(
        "requests",
        command=("-m", f"{APPS}.requests_client", *WEB),
        needs=("requests", *WEB_NEEDS),
        around=peers.web,
    ),
    Program(
        "aiohttp client",
        command=("-m", f"{APPS}.aiohttp_client", *WEB),
        needs=("aiohttp", *WEB_NEEDS),
        around=peers.web,
    ),
    Program(
        "asyncio client",
        command=("-m", f"{APPS}.asyncio_client", *WEB),
        needs=WEB_NEEDS,
        around=peers.web,
    ),
    Program(
        "redis-py",
        command=("-m", f"{APPS}.redis_client", "{peer}", str(peers.REDIS_PORT)),
        needs=("redis", "/redis-server"),
        around=peers.redis_server,
    ),
    Program(
        "ftplib",
        command=("-m", f"{APPS}.ftp_client", "{peer}", str(peers.FTP_PORT)),
        needs=("pyftpdlib",),
        around=peers.ftp_server,
        scrub=((r"\d+(,\d+)+", "ENDPOINT"),),
    ),
    Program(
        "smtplib",
        command=("-m", f"{APPS}.smtp_client", "{peer}", str(peers.SMTP_PORT), "{cert}"),
        needs=("aiosmtpd", "/openssl"),
        around=peers.smtp_server,
    ),
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_client(equal: Callable[[Program], None], program: Program) -> None:
    equal(program)
