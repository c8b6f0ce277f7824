"""asyncio over our sockets: the loop of ulnet.stack.aio, and asyncio's own loop on their descriptors."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import random
import select as kernel
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sockethosts import A, B, listening, running

from tests.netserver_bed import ADDRESS, NOBODY, PEER, Bed, wait_for
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import aio, socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]

Hosts = tuple[Embedded, Embedded]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DATA = random.Random(7).randbytes(3_000_000)


@pytest.fixture(params=[False, True], ids=["", "debug"])
def run(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Callable[..., Any]]:
    """Run a coroutine on a loop of host a; afterwards no session is left that nobody closed."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        return aio.run(asyncio.wait_for(main, 20), debug=request.param, host=hosts[0])

    yield run
    gc.collect()
    deadline = time.monotonic() + 5
    for host in hosts:
        while left := [row for row in host.engine.sessions() if not row["closing"]]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def serving(host: Embedded, handler: Any = echo, **options: Any) -> AsyncIterator[int]:
    """A stream server on a socket of the other host, in the same loop."""
    listener = listening(host)
    listener.setblocking(False)
    server = await asyncio.start_server(handler, sock=listener, **options)  # type: ignore[arg-type]
    try:
        yield listener.getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


# -- streams and transports --------------------------------------------------------------------


def test_streams(run: Callable[..., Any], hosts: Hosts) -> None:
    async def main() -> None:
        async with serving(hosts[1]) as port:
            reader, writer = await asyncio.open_connection(B, port)
            assert writer.get_extra_info("peername") == (B, port)
            assert writer.get_extra_info("sockname")[0] == A
            for i in range(50):
                writer.write(b"%d" % i * 10)
                assert await reader.readexactly(len(b"%d" % i) * 10) == b"%d" % i * 10
            sending = asyncio.create_task(send(writer))
            got = hashlib.sha256(await reader.readexactly(len(DATA)))
            await sending
            assert got.digest() == hashlib.sha256(DATA).digest()
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    async def send(writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(DATA), 100_000):
            writer.write(DATA[at : at + 100_000])
            await writer.drain()

    run(main())


def test_many_clients_at_once(run: Callable[..., Any], hosts: Hosts) -> None:
    async def client(port: int, i: int) -> None:
        reader, writer = await asyncio.open_connection(B, port)
        for _ in range(5):
            writer.write(b"%03d" % i)
            assert await reader.readexactly(3) == b"%03d" % i
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        async with serving(hosts[1]) as port:
            await asyncio.gather(*(client(port, i) for i in range(40)))

    run(main())


def test_loop_opens_servers_of_ours(run: Callable[..., Any], hosts: Hosts) -> None:
    """create_server by (host, port); the client is a plain socket of the other host in a thread."""

    def client(port: int) -> bytes:
        with socket.create_connection((A, port), 5, host=hosts[1]) as sock:
            sock.sendall(b"hello")
            return sock.recv(5, socket.MSG_WAITALL)

    async def main() -> None:
        for where in ("", A, None, [A, A]):
            server = await asyncio.start_server(echo, where, 8000)  # type: ignore[arg-type]
            assert server.is_serving()
            assert all(sock.getsockname()[1] == 8000 for sock in server.sockets)
            assert await asyncio.to_thread(client, 8000) == b"hello"
            server.close()
            await server.wait_closed()
        with pytest.raises(OSError, match="while attempting to bind"):
            await asyncio.start_server(echo, "10.9.9.9", 8000)

    run(main())


def test_buffered_protocol(run: Callable[..., Any], hosts: Hosts) -> None:
    class Receiver(asyncio.BufferedProtocol):
        def __init__(self, done: asyncio.Future[bytes]) -> None:
            self.room = bytearray(10_000)
            self.got = bytearray()
            self.done = done

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.room

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.room[:nbytes]

        def connection_lost(self, exc: Exception | None) -> None:
            self.done.set_result(bytes(self.got))

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(DATA[:500_000])
        writer.close()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bytes] = loop.create_future()
        async with serving(hosts[1], send) as port:
            await loop.create_connection(lambda: Receiver(done), B, port)
            assert await done == DATA[:500_000]

    run(main())


def test_flow_control_and_abort(run: Callable[..., Any], hosts: Hosts) -> None:
    """A reader that reads nothing stops the writer; abort() ends it."""

    async def main() -> None:
        release, over = asyncio.Event(), asyncio.Event()

        async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            while await reader.read(1 << 20):
                pass
            writer.close()
            over.set()

        async with serving(hosts[1], idle) as port:
            _, writer = await asyncio.open_connection(B, port)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        writer.write(b"x" * 1_000_000)
                        await writer.drain()
            writer.transport.abort()
            release.set()
            await over.wait()
            await asyncio.sleep(0)

    run(main())


def test_datagrams(run: Callable[..., Any], hosts: Hosts) -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: Any) -> None:
            self.transport.sendto(data, address)

    class Collect(asyncio.DatagramProtocol):
        def __init__(self, want: int) -> None:
            self.got: list[bytes] = []
            self.want = want
            self.done = asyncio.get_running_loop().create_future()

        def datagram_received(self, data: bytes, address: Any) -> None:
            self.got.append(data)
            if len(self.got) == self.want:
                self.done.set_result(None)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        theirs = socket.socket(type=socket.SOCK_DGRAM, host=hosts[1])
        theirs.bind(("", 9000))
        there, _ = await loop.create_datagram_endpoint(Echo, sock=theirs)
        for options in ({"remote_addr": (B, 9000)}, {"local_addr": ("0.0.0.0", 9001), "remote_addr": (B, 9000)}):
            collected = Collect(100)
            here, _ = await loop.create_datagram_endpoint(lambda c=collected: c, **options)  # type: ignore[misc, arg-type]
            assert here.get_extra_info("peername") == (B, 9000)
            for i in range(100):
                here.sendto(b"%d" % i)
                if i % 10 == 0:
                    await asyncio.sleep(0)
            await collected.done
            assert sorted(collected.got) == sorted(b"%d" % i for i in range(100))
            here.close()
        there.close()
        await asyncio.sleep(0)

    run(main())


# -- loop.sock_* -------------------------------------------------------------------------------


def test_sock_calls(run: Callable[..., Any], hosts: Hosts) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listening(hosts[1]) as listener, socket.socket(host=hosts[0]) as client:
            listener.setblocking(False)
            client.setblocking(False)
            accepting = asyncio.create_task(loop.sock_accept(listener))  # type: ignore[arg-type]
            await loop.sock_connect(client, listener.getsockname())  # type: ignore[arg-type]
            server: Any = (await accepting)[0]
            server.setblocking(False)
            reading = asyncio.create_task(loop.sock_recv(client, 100))  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            await loop.sock_sendall(server, b"hello")
            assert await reading == b"hello"
            room = bytearray(5)
            sending = asyncio.create_task(loop.sock_sendall(client, DATA))  # type: ignore[arg-type]
            got = bytearray()
            while len(got) < len(DATA):
                got += (
                    room[: await loop.sock_recv_into(server, room)]
                    if len(got) < 20
                    else await loop.sock_recv(server, 1 << 20)
                )
            await sending
            assert got == DATA
            server.close()
            assert await loop.sock_recv(client, 1) == b""  # type: ignore[arg-type]
        with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as udp:
            udp.setblocking(False)
            udp.bind(("", 9002))
            waiting = asyncio.create_task(loop.sock_recvfrom(udp, 10))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            await loop.sock_sendto(udp, b"me", (A, 9002))  # type: ignore[arg-type]
            assert await waiting == (b"me", (A, 9002))

    run(main())


def test_refused_and_unreachable(run: Callable[..., Any], hosts: Hosts) -> None:
    async def main() -> None:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(B, 9)
        with pytest.raises(OSError) as caught:
            await asyncio.open_connection("192.0.2.1", 9)
        assert caught.value.errno == errno.ENETUNREACH

    run(main())


def test_cancellation_and_time_outs_leave_nothing(run: Callable[..., Any], hosts: Hosts) -> None:
    """Connecting to nobody, reading what never comes, accepting nobody."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = len(loop._selector.get_map())  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection("10.0.0.77", 1), 0.05)
        with listening(hosts[1]) as listener, socket.create_connection(listener.getsockname(), host=hosts[0]) as sock:
            listener.setblocking(False)
            sock.setblocking(False)
            for call in (
                lambda: loop.sock_recv(sock, 1),  # type: ignore[arg-type]
                lambda: loop.sock_recv_into(sock, bytearray(1)),  # type: ignore[arg-type]
            ):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(call(), 0.02)
                task = asyncio.create_task(call())
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            listener.accept()[0].close()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(loop.sock_accept(listener), 0.02)  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert len(loop._selector.get_map()) == before  # type: ignore[attr-defined]

    run(main())


def test_add_reader_and_writer(run: Callable[..., Any], hosts: Hosts) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listening(hosts[1]) as listener, socket.create_connection(listener.getsockname(), host=hosts[0]) as sock:
            peer, _ = listener.accept()
            for name in (sock, sock.fileno()):
                readable, writable = asyncio.Event(), asyncio.Event()
                loop.add_reader(name, readable.set)
                loop.add_writer(name, writable.set)
                await writable.wait()
                assert loop.remove_writer(name)
                peer.send(b"x")
                await readable.wait()
                assert sock.recv(1) == b"x"
                assert loop.remove_reader(name) and not loop.remove_reader(name)
            peer.close()

    run(main())


# -- files, TLS --------------------------------------------------------------------------------


def test_sendfile_falls_back(run: Callable[..., Any], hosts: Hosts, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digests.append(hashlib.sha256(await reader.read()).digest())
        writer.close()
        arrived.set()

    async def main() -> None:
        nonlocal arrived
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serving(hosts[1], collect, limit=1 << 24) as port:
            _, writer = await asyncio.open_connection(B, port)
            with open(path, "rb") as file:
                assert await loop.sendfile(writer.transport, file) == len(DATA)
            writer.close()
            await arrived.wait()
            arrived.clear()
            with socket.create_connection((B, port), host=hosts[0]) as sock, open(path, "rb") as file:
                sock.setblocking(False)
                assert await loop.sock_sendfile(sock, file) == len(DATA)  # type: ignore[arg-type]
            await arrived.wait()

    digests: list[bytes] = []
    arrived: asyncio.Event
    run(main())
    assert digests == [hashlib.sha256(DATA).digest()] * 2


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server and of a client that trusts its self-signed certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=test"
    command += f" -addext subjectAltName=IP:{B}"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert", folder / "key")
    client = ssl.create_default_context(cafile=str(folder / "cert"))
    return server, client


def test_tls(run: Callable[..., Any], hosts: Hosts, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main() -> None:
        async with serving(hosts[1], ssl=contexts[0]) as port:
            reader, writer = await asyncio.open_connection(B, port, ssl=contexts[1])
            assert writer.get_extra_info("cipher")
            writer.write(DATA[:300_000])
            assert await reader.readexactly(300_000) == DATA[:300_000]
            writer.close()
            await writer.wait_closed()
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection(B, port, ssl=ssl.create_default_context())

    run(main())


def test_start_tls(run: Callable[..., Any], hosts: Hosts, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.start_tls(contexts[0])
        await echo(reader, writer)

    async def main() -> None:
        async with serving(hosts[1], upgrade) as port:
            reader, writer = await asyncio.open_connection(B, port)
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"go\n"
            await writer.start_tls(contexts[1], server_hostname=B)
            writer.write(b"secret" * 1000)
            assert await reader.readexactly(6000) == b"secret" * 1000
            writer.close()
            await writer.wait_closed()

    run(main())


# -- the loop itself ---------------------------------------------------------------------------


def test_no_system_call_for_a_wake_up(hosts: Hosts) -> None:
    """The descriptor of a transport is a name: nothing is shown by it until somebody asks for it."""

    async def main() -> None:
        async with serving(hosts[1]) as port:
            reader, writer = await asyncio.open_connection(B, port)
            peer: Any = writer.transport
            number = peer._sock_fd
            poller = kernel.poll()
            poller.register(number, kernel.POLLIN)
            for _ in range(20):
                writer.write(b"x")
                await reader.readexactly(1)
            writer.write(b"y")
            await asyncio.sleep(0.05)
            assert poller.poll(0) == []  # an eventfd that nobody writes
            sock = writer.get_extra_info("socket")
            peer.pause_reading()
            assert sock.fileno() == number
            peer.resume_reading()
            writer.close()
            await writer.wait_closed()

    aio.run(main(), host=hosts[0])


def test_threads_signals_and_subprocesses(hosts: Hosts) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        hit = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, hit.set)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        started = time.monotonic()
        await asyncio.wait_for(hit.wait(), 5)
        assert await asyncio.to_thread(lambda: 5) == 5
        called = asyncio.Event()
        threading.Timer(0.05, loop.call_soon_threadsafe, (called.set,)).start()
        await asyncio.wait_for(called.wait(), 5)
        assert time.monotonic() - started < 3
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1993)", stdout=subprocess.PIPE)
        assert (await child.communicate())[0] == b"1993\n"
        loop.remove_signal_handler(signal.SIGUSR1)

    aio.run(main(), host=hosts[0])


def test_threadsafe_call_while_the_loop_is_busy_with_a_socket(hosts: Hosts) -> None:
    """The loop's own pipe is looked at although our sockets are always ready."""

    async def main() -> None:
        async with serving(hosts[1]) as port:
            loop = asyncio.get_running_loop()
            with socket.create_connection((B, port), host=hosts[0]) as sock:
                loop.add_writer(sock, lambda: None)  # ready for ever
                called = loop.create_future()
                threading.Timer(0.05, loop.call_soon_threadsafe, (called.set_result, 1)).start()
                assert await asyncio.wait_for(called, 5) == 1
                loop.remove_writer(sock)

    aio.run(main(), host=hosts[0])


def test_an_idle_loop_uses_no_processor(hosts: Hosts) -> None:
    async def main() -> float:
        async with serving(hosts[1]) as port:
            _, writer = await asyncio.open_connection(B, port)
            await asyncio.sleep(0.1)
            used = time.process_time()
            await asyncio.sleep(0.5)
            used = time.process_time() - used
            writer.close()
            return used

    assert aio.run(main(), host=hosts[0]) < 0.1


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio's policies are deprecated")
def test_policy_and_runner(hosts: Hosts) -> None:
    async def main() -> str:
        return type(asyncio.get_running_loop()).__module__

    asyncio.set_event_loop_policy(aio.EventLoopPolicy())
    try:
        assert asyncio.run(main()) == "ulnet.stack.aio"
    finally:
        asyncio.set_event_loop_policy(None)
    with asyncio.Runner(loop_factory=aio.new_event_loop) as runner:
        assert runner.run(main()) == "ulnet.stack.aio"


def test_plain_asyncio_on_the_descriptors(hosts: Hosts) -> None:
    """asyncio's own loop, the kernel's epoll: sockets that the program makes."""

    async def main() -> None:
        async with serving(hosts[1]) as port:
            sock = socket.create_connection((B, port), host=hosts[0])
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=sock)  # type: ignore[arg-type]
            for _ in range(20):
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


# -- under a network server --------------------------------------------------------------------


@pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))
def test_client_and_server_under_a_network_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The peer is the kernel of another host. Once connections stand, the network server is asked nothing."""
    bed = Bed(tmp_path_factory.mktemp("aio"))
    service = bed.b.socket()
    service.bind((PEER, 0))
    service.listen()
    service.settimeout(10)

    def messages() -> int:
        return sum(n for name, n in bed.counters()["calls"].items() if name.upper() != "COUNTERS")

    def serve() -> None:
        theirs, _ = service.accept()
        with theirs:
            while data := theirs.recv(65536):
                theirs.sendall(data)

    def call(theirs: Any, port: int) -> bytes:
        theirs.settimeout(10)
        theirs.connect((ADDRESS, port))
        theirs.sendall(b"from the kernel")
        got: bytes = theirs.recv(100)
        theirs.close()
        return got

    async def main() -> None:
        reader, writer = await asyncio.open_connection(*service.getsockname())
        before = messages()
        for size in (1, 100, 100_000):
            for _ in range(10):
                writer.write(b"x" * size)
                assert await reader.readexactly(size) == b"x" * size
        assert messages() == before
        writer.close()
        await writer.wait_closed()
        server = await asyncio.start_server(echo, "", 8001)
        async with server:
            got = [asyncio.to_thread(call, bed.b.socket(), 8001) for _ in range(3)]
            assert await asyncio.gather(*got) == [b"from the kernel"] * 3
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(PEER, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection(NOBODY, 1), 0.1)

    try:
        proxy = bed.proxy()
        with running(serve):
            aio.run(asyncio.wait_for(main(), 20), host=proxy)
        wait_for(lambda: not bed.live(), "no session is left")
    finally:
        service.close()
        bed.close()


# -- other loops -------------------------------------------------------------------------------


def test_trio(hosts: Hosts) -> None:
    """The example, whole: trio's own waiting on our descriptors."""
    pytest.importorskip("trio", reason="trio is missing")
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "examples" / "trio_echo.py")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "20 clients, 200 messages; sessions left: 0\n"


def test_uvloop_waits_on_our_descriptors(hosts: Hosts) -> None:
    """add_reader and loop.sock_* work. Transports do not: they duplicate the descriptor and read it themselves."""
    uvloop = pytest.importorskip("uvloop", reason="uvloop is missing")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listening(hosts[1]) as listener, socket.socket(host=hosts[0]) as sock:
            for each in (sock, listener):
                each.setblocking(False)
            accepting = asyncio.create_task(loop.sock_accept(listener))  # type: ignore[arg-type]
            await loop.sock_connect(sock, listener.getsockname())  # type: ignore[arg-type]
            peer: Any = (await accepting)[0]
            readable = asyncio.Event()
            loop.add_reader(sock.fileno(), readable.set)
            threading.Timer(0.05, peer.send, (b"x",)).start()
            await asyncio.wait_for(readable.wait(), 5)
            loop.remove_reader(sock.fileno())
            reading = asyncio.create_task(loop.sock_recv(sock, 2))  # type: ignore[arg-type]
            assert await reading == b"x"
            reading = asyncio.create_task(loop.sock_recv(sock, 2))  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            await loop.sock_sendall(peer, b"y")
            assert await asyncio.wait_for(reading, 5) == b"y"
            peer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
