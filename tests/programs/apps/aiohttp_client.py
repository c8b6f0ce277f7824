"""aiohttp's client against stock servers: ``aiohttp_client HOST NGINX_PORT TLS_PORT SITE_PORT CA``."""

from __future__ import annotations

import asyncio
import sys

import aiohttp

from tests.programs.apps.clients import causes, say, tls
from tests.programs.apps.site import pattern

host, nginx, secure, site, ca = sys.argv[1:]
static, dynamic, safe = f"http://{host}:{nginx}", f"http://{host}:{site}", f"https://{host}:{secure}"


async def failing(session: aiohttp.ClientSession, what: str, url: str, timeout_s: float) -> None:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s)) as reply:
            say(what, status=reply.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        say(what, error=causes(error))


async def main() -> None:
    async with aiohttp.ClientSession() as session:
        for name in ("f0", "f1", "f1448", "f70000", "f4194304", "missing"):
            async with session.get(f"{static}/{name}") as reply:
                say("get", name=name, status=reply.status, body=await reply.read())
        async with session.get(f"{static}/redirect") as reply:
            say("redirect", url=str(reply.url), body=await reply.read())
        for size in (0, 1, 100_000, 3_000_000):
            async with session.post(f"{dynamic}/echo", data=pattern(size)) as reply:
                say("post", body=await reply.read())
        async with session.get(f"{safe}/f70000", ssl=tls(ca)) as reply:
            say("tls", status=reply.status, body=await reply.read())

        async def one(name: str) -> bytes:
            async with session.get(f"{static}/{name}") as reply:
                return await reply.read()

        for body in await asyncio.gather(*(one("f70000") for _ in range(40))):
            say("in parallel", body=body)
        tasks = [asyncio.create_task(one("never")) for _ in range(5)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        say(
            "cancelled",
            count=sum(isinstance(r, BaseException) for r in await asyncio.gather(*tasks, return_exceptions=True)),
        )
        await failing(session, "late", f"{static}/never", 0.3)
        await failing(session, "refused", f"http://{host}:1/", 20)
        await failing(session, "untrusted", f"{safe}/f1", 20)


asyncio.run(main())
