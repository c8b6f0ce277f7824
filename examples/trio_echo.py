"""Trio over user-level TCP: our sockets wait by trio's own primitives, on their descriptors. Nothing of trio changes.

python examples/trio_echo.py          (needs: pip install trio)
"""

import trio

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded, pair


class Stream(trio.abc.HalfCloseableStream):
    """A connected socket as a trio stream. Give it to trio.SSLStream for TLS."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self.sock.send(view[sent:])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock.fileno())

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self.sock.fileno())

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.sock.recv(max_bytes or 65536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock.fileno())

    async def send_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        # Whoever waits for the descriptor in another task is told before it goes (trio.ClosedResourceError).
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock.fileno())
            self.sock.close()
        await trio.lowlevel.checkpoint()


async def connect(host: Embedded, address: tuple[str, int]) -> Stream:
    sock = socket.socket(host=host)
    try:
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock.fileno())
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "the connection failed") from None
        return Stream(sock)
    except BaseException:  # a cancellation leaves no session behind
        sock.close()
        raise


async def accept(listener: socket.socket) -> Stream:
    listener.setblocking(False)
    while True:
        try:
            return Stream(listener.accept()[0])
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener.fileno())


async def echo(stream: Stream) -> None:
    async with stream:
        while data := await stream.receive_some():
            await stream.send_all(data)


async def serve(listener: socket.socket, nursery: trio.Nursery) -> None:
    while True:
        nursery.start_soon(echo, await accept(listener))


async def client(host: Embedded, address: tuple[str, int], count: int) -> None:
    async with await connect(host, address) as stream:
        for i in range(count):
            message = b"message %d" % i
            await stream.send_all(message)
            got = b""
            while len(got) < len(message):
                got += await stream.receive_some()
            assert got == message
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def main() -> None:
    alice, bob = pair("10.0.0.1/24", "10.0.0.2/24")
    with alice, bob, socket.create_server(("", 7), host=bob) as listener:
        async with trio.open_nursery() as servers:
            servers.start_soon(serve, listener, servers)
            async with trio.open_nursery() as clients:
                for _ in range(20):
                    clients.start_soon(client, alice, ("10.0.0.2", 7), 10)
            servers.cancel_scope.cancel()
        with trio.move_on_after(0.05) as scope:
            await connect(alice, ("10.0.0.99", 7))  # nobody has this address
        assert scope.cancelled_caught
        left = sum(not row["closing"] for row in alice.engine.sessions())
        print(f"20 clients, 200 messages; sessions left: {left}")


if __name__ == "__main__":
    trio.run(main)
