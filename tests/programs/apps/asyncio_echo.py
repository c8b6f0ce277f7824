"""Echo over asyncio streams, TLS streams, datagrams and loop.sock_*: ``asyncio_echo PORT CERTIFICATE KEY [uvloop]``.

PORT: streams and datagrams; PORT + 1: TLS; PORT + 2: loop.sock_*.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import sys

port = int(sys.argv[1])


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    writer.close()
    await writer.wait_closed()


class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)  # type: ignore[attr-defined]


async def sock_echo(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with sock:
        sock.setblocking(False)
        memory = bytearray(65536)
        while size := await loop.sock_recv_into(sock, memory):
            await loop.sock_sendall(sock, memoryview(memory)[:size])


async def main() -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    tasks: set[asyncio.Task[None]] = set()
    listener = socket.create_server(("", port + 2))
    listener.setblocking(False)

    async def accept() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            task = asyncio.create_task(sock_echo(sock))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    accepting = asyncio.create_task(accept())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2], sys.argv[3])
    servers = [
        await asyncio.start_server(echo, "0.0.0.0", port),
        await asyncio.start_server(echo, "0.0.0.0", port + 1, ssl=context),
    ]
    datagrams, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("0.0.0.0", port))
    print("ready", flush=True)
    await stop.wait()
    accepting.cancel()
    await asyncio.gather(accepting, return_exceptions=True)
    datagrams.close()
    for server in servers:
        server.close()
        await server.wait_closed()
    listener.close()
    print("unfinished", len(tasks))


if sys.argv[4:]:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
