"""asyncio's client side against stock servers: ``asyncio_client HOST NGINX_PORT TLS_PORT SITE_PORT CA``."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

from tests.programs.apps.clients import causes, say, tls

host, nginx, secure, site, ca = sys.argv[1:]


async def fetch(path: str, port: str, **options: Any) -> bytes:
    reader, writer = await asyncio.open_connection(host, int(port), **options)
    writer.write(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.read()
    writer.close()
    await writer.wait_closed()
    return head.splitlines()[0] + b"\n" + body


async def by_sock_calls() -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, int(nginx)))
        await loop.sock_sendall(sock, b"GET /f70000 HTTP/1.0\r\n\r\n")
        data = b""
        while piece := await loop.sock_recv(sock, 10_000):
            data += piece
        return data.partition(b"\r\n\r\n")[2]


class Buffered(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.memory, self.size, self.lost = bytearray(1 << 17), 0, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(b"GET /f70000 HTTP/1.0\r\n\r\n")

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.memory)[self.size : self.size + 5000]

    def buffer_updated(self, nbytes: int) -> None:
        self.size += nbytes

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(bytes(self.memory[: self.size]).partition(b"\r\n\r\n")[2])


async def main() -> None:
    for name in ("f0", "f1", "f1448", "f70000", "f4194304", "missing"):
        say("stream", body=await fetch(name, nginx))
    say("tls", body=await fetch("f4194304", secure, ssl=tls(ca)))
    for body in await asyncio.gather(*(fetch("f70000", nginx) for _ in range(30))):
        say("in parallel", body=body)
    say("sock", body=await by_sock_calls())
    transport, protocol = await asyncio.get_running_loop().create_connection(Buffered, host, int(nginx))
    say("buffered", body=await protocol.lost)
    transport.close()
    try:
        await asyncio.wait_for(fetch("never", nginx), 0.2)
    except TimeoutError as error:
        say("late", error=causes(error)[0])
    try:
        await asyncio.open_connection(host, 1)
    except OSError as error:
        say("refused", error=causes(error)[0])


asyncio.run(main())
