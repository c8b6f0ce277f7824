"""An aiosmtpd server that prints what it gets: ``smtp_server ADDRESS PORT CERTIFICATE KEY``."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import ssl
import sys
from typing import Any

from aiosmtpd.smtp import SMTP


class Handler:
    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address.endswith("@refused.example"):
            return "550 not here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        digest = hashlib.sha256(envelope.content).hexdigest()
        print(
            "message", session.peer[0], envelope.mail_from, envelope.rcpt_tos, len(envelope.content), digest, flush=True
        )
        return f"250 {digest}"


async def main() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3], sys.argv[4])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(Handler(), hostname="small.example.com", tls_context=context), sys.argv[1], int(sys.argv[2])
    )
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    print("ready", flush=True)
    await stop.wait()
    server.close()
    await server.wait_closed()


asyncio.run(main())
