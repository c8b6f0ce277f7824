"""aiohttp's WebSocket client: ``websocket_client URL``."""

from __future__ import annotations

import asyncio
import sys

import aiohttp

from tests.programs.apps.clients import say
from tests.programs.apps.site import pattern


async def main() -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(sys.argv[1], max_msg_size=1 << 26) as ws:
        for number in range(50):
            await ws.send_str(f"message {number}")
            say("text", text=(await ws.receive()).data)
        for size in (0, 1, 125, 126, 65536, 2_000_000):
            await ws.send_bytes(pattern(size))
            say("bytes", data=(await ws.receive()).data)
        await ws.close()
        say("closed", code=ws.close_code)


asyncio.run(main())
