"""The site, and a WebSocket that echoes, served by aiohttp: ``aiohttp_site PORT``."""

from __future__ import annotations

import sys

from aiohttp import WSMsgType, web

from tests.programs.apps.site import answer, pieces


async def everything(request: web.Request) -> web.StreamResponse:
    status, kind, content = answer(request.method, request.path, await request.read(), request.remote or "")
    if isinstance(content, bytes):
        return web.Response(body=content, status=status, headers={"Content-Type": kind})
    response = web.StreamResponse(status=status, headers={"Content-Type": kind})
    await response.prepare(request)
    for piece in pieces(content):
        await response.write(piece)
    await response.write_eof()
    return response


async def echo(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type == WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type == WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/ws", echo)
    app.router.add_route("*", "/{path:.*}", everything)
    web.run_app(app, port=int(sys.argv[1]))
