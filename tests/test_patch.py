"""The standard modules under the patch, in this process: what is whose, loopback, and everything back afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import http.server
import importlib
import os
import select
import selectors
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sockethosts import running

from tests import certificates
from ulnet.stack import embedded, tls
from ulnet.stack import socket as ours
from ulnet.stack.embedded import Embedded

KERNEL = socket.socket
NATIVE = {
    name: vars(module).copy() for name, module in (("socket", socket), ("select", select), ("selectors", selectors))
}
THERE = "10.0.0.2"  # the host at the other end of the wire in memory


@pytest.fixture
def there() -> Iterator[Embedded]:
    """Patched; the program's host is 10.0.0.1, and 10.0.0.2 is at the other end."""
    patch: ModuleType = importlib.import_module("ulnet.patch")
    patch.install()
    here, there = embedded.pair("10.0.0.1/24", f"{THERE}/24")
    ours.set_default_host(here)
    yield there
    ours.set_default_host(None)
    patch.undo()
    here.shutdown(0.2)
    there.shutdown(0.2)


def is_ours(sock: Any) -> bool:
    return type(sock) is socket.socket


class TestWhose:
    def test_by_arguments(self, there: Embedded) -> None:
        assert socket.socket is not KERNEL
        for arguments in (
            (),
            (socket.AF_INET,),
            (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP),
            (socket.AF_INET, socket.SOCK_DGRAM, 0),
            (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        ):
            with socket.socket(*arguments) as sock:
                assert is_ours(sock) and isinstance(sock, ours.socket), arguments
                assert isinstance(sock, socket.socket) and not isinstance(sock, KERNEL)
        for arguments in (
            (socket.AF_UNIX,),
            (socket.AF_UNIX, socket.SOCK_DGRAM),
            (socket.AF_INET6, socket.SOCK_STREAM),
            (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        ):
            with socket.socket(*arguments) as sock:
                assert type(sock) is KERNEL and isinstance(sock, socket.socket), arguments
        for sock in socket.socketpair():
            assert type(sock) is KERNEL
            sock.close()
        assert issubclass(KERNEL, socket.socket) and issubclass(ssl.SSLSocket, socket.socket)
        assert issubclass(ours.socket, socket.socket)
        assert not isinstance(3, socket.socket) and not issubclass(int, socket.socket)
        assert issubclass(ssl.SSLSocket, KERNEL)

    def test_by_descriptor(self, there: Embedded) -> None:
        a, b = socket.socketpair()
        taken = socket.socket(fileno=a.detach())
        assert type(taken) is KERNEL and taken.family == socket.AF_UNIX
        again = socket.fromfd(b.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
        again.sendall(b"x")
        assert taken.recv(9) == b"x"
        for sock in (taken, b, again):
            sock.close()
        mine = socket.socket(type=socket.SOCK_DGRAM)
        mine.bind(("", 5000))
        back = socket.socket(fileno=mine.detach())
        assert is_ours(back) and back.getsockname()[1] == 5000
        back.close()
        with pytest.raises(OSError):
            socket.socket(fileno=back.fileno() if back.fileno() >= 0 else 9999)

    def test_subclass(self, there: Embedded) -> None:
        class Counting(socket.socket):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.calls: list[str] = []

            def connect(self, address: Any) -> None:
                self.calls.append("connect")
                super().connect(address)

            def recv(self, n: int, flags: int = 0) -> bytes:
                self.calls.append("recv")
                return super().recv(n, flags)

        with ours.create_server(("", 7), host=there) as far, KERNEL() as near:
            near.bind(("127.0.0.1", 0))
            near.listen()
            for listener, address in ((far, (THERE, 7)), (near, near.getsockname())):
                with Counting() as sock:
                    assert isinstance(sock, socket.socket) and type(sock) is Counting
                    sock.connect(address)
                    peer, name = listener.accept()
                    assert name == sock.getsockname()
                    peer.sendall(b"data")
                    peer.close()
                    assert sock.recv(9) == b"data"
                    assert sock.calls == ["connect", "recv"] and isinstance(sock, Counting)
        with Counting(socket.AF_UNIX) as sock:
            assert sock.family == socket.AF_UNIX and sock.calls == [] and isinstance(sock, Counting)
            assert sock.fileno() >= 0 and sock.getsockname() == ""
        assert sock.fileno() == -1

    def test_functions(self, there: Embedded) -> None:
        """create_server(), create_connection() and accepted sockets are ours; the time-out is for all."""
        socket.setdefaulttimeout(3)
        try:
            with socket.create_server(("", 80)) as listener:
                assert is_ours(listener) and listener.gettimeout() == 3
                with ours.create_connection(("10.0.0.1", 80), host=there) as client:
                    accepted, peer = listener.accept()
                    assert is_ours(accepted) and accepted.gettimeout() == 3 and accepted.getpeername() == peer
                    accepted.close()
                    assert client.recv(1) == b""
            with ours.create_server(("", 81), host=there), socket.create_connection((THERE, 81)) as sock:
                assert is_ours(sock) and sock.gettimeout() == 3
            with socket.socket(socket.AF_UNIX) as sock:
                assert sock.gettimeout() == 3
        finally:
            socket.setdefaulttimeout(None)
        assert ours.getdefaulttimeout() is None and socket.getdefaulttimeout() is None
        assert not socket.has_ipv6 and not socket.has_dualstack_ipv6()

    def test_standard_servers(self, there: Embedded) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.client_address[0].encode())

            def log_message(self, *_: Any) -> None:
                pass

        with socketserver.ThreadingTCPServer(("", 8080), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            connection = http.client.HTTPConnection("10.0.0.1", 8080, timeout=5)
            connection._create_connection = lambda *a, **k: ours.create_connection(*a, **k, host=there)  # type: ignore
            connection.request("GET", "/")
            assert connection.getresponse().read() == THERE.encode()
            connection.close()
            server.shutdown()
            thread.join()


class TestLoopback:
    def test_settings_are_kept(self, there: Embedded) -> None:
        with socket.socket() as listener, socket.socket() as client:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("localhost", 0))
            listener.listen()
            client.settimeout(4.5)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\5\0\0\0")
            number = client.fileno()
            client.connect(listener.getsockname())
            assert client.fileno() == number  # who has asked before goes on with it
            assert client.gettimeout() == client.timeout == 4.5
            assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b"\1\0\0\0\5\0\0\0"
            kernel = KERNEL(fileno=os.dup(number))
            assert kernel.family == socket.AF_INET and kernel.getpeername() == listener.getsockname()
            assert kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            kernel.close()
            server, _ = listener.accept()
            with client.makefile("rb") as file, server:
                server.sendall(b"a line\n")
                assert file.readline() == b"a line\n"
            assert isinstance(client, socket.socket) and "127.0.0.1" in repr(client)
        assert client.fileno() == -1
        with pytest.raises(OSError):
            client.send(b"x")

    def test_waitless(self, there: Embedded) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            address = listener.getsockname()
            with socket.socket() as sock:
                sock.setblocking(False)
                assert sock.connect_ex(address) in (0, 115)  # EINPROGRESS
                assert select.select([], [sock], [], 5)[1] and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(address)

    def test_udp(self, there: Embedded) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            server.bind(("127.0.0.1", 0))
            assert client.sendto(b"one", server.getsockname()) == 3
            assert server.recvfrom(9) == (b"one", ("127.0.0.1", client.getsockname()[1]))
            assert client.sendmsg([b"t", b"wo"], [], 0, server.getsockname()) == 3
            assert server.recv(9) == b"two"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            assert client.sendto(b"x", 0, (THERE, 9)) == 1
            assert is_ours(client) and client.getsockname()[1] > 0

    def test_passing_on(self, there: Embedded) -> None:
        """A socket on loopback is passed on by multiprocessing as the kernel's."""
        with socket.socket() as listener, socket.socket() as client:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client.connect(listener.getsockname())
            server, _ = listener.accept()
            passed = reduction.ForkingPickler.loads(bytes(reduction.ForkingPickler.dumps(client)))
            with server, passed:
                assert type(passed) is KERNEL and passed.getsockname() == client.getsockname()
                client.close()
                passed.sendall(b"passed")
                assert server.recv(9) == b"passed"

    def test_wildcard_stays(self, there: Embedded) -> None:
        with socket.socket() as listener:
            listener.bind(("", 0))
            assert is_ours(listener)
        with socket.socket() as sock:
            sock.bind(("0.0.0.0", 0))
            assert is_ours(sock)
            with pytest.raises(OSError):
                sock.connect(("127.0.0.1", 9))  # it has a name of this stack

    def test_asyncio(self, there: Embedded) -> None:
        """On loopback by the kernel, elsewhere by this stack; a file goes out either way."""

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with open(__file__, "rb") as file:
                await asyncio.get_running_loop().sendfile(writer.transport, file)
            writer.close()

        async def main() -> None:
            expected = Path(__file__).read_bytes()
            server = await asyncio.start_server(echo, "localhost", 0)
            async with server:
                address = server.sockets[0].getsockname()
                assert address[0] == "127.0.0.1"
                reader, writer = await asyncio.open_connection(*address)
                assert await reader.read() == expected
                writer.close()
            server = await asyncio.start_server(echo, None, 9000)
            async with server:
                assert [sock.getsockname()[1] for sock in server.sockets] == [9000]  # no second one for IPv6
                loop = asyncio.get_running_loop()

                def fetch() -> bytes:
                    with ours.create_connection(("10.0.0.1", 9000), 5, host=there) as sock:
                        return sock.makefile("rb").read()

                assert await loop.run_in_executor(None, fetch) == expected

        asyncio.run(main())


@pytest.mark.skipif(certificates.missing() is not None, reason=str(certificates.missing()))
class TestTLS:
    def test_both_kinds(self, there: Embedded, tmp_path: Path) -> None:
        """wrap_socket() on this stack and on loopback, before and after connecting."""
        pem = certificates.make(tmp_path, "127.0.0.1")
        server, client = certificates.server_context(pem), certificates.client_context(pem)
        client.check_hostname = False
        far = ours.create_server(("", 443), host=there)
        near = KERNEL()
        near.bind(("127.0.0.1", 0))
        near.listen()
        for listener, address in ((far, (THERE, 443)), (near, near.getsockname())):
            for first in (True, False):

                def serve(listener: Any = listener) -> None:
                    sock, _ = listener.accept()
                    with server.wrap_socket(sock, server_side=True) as wrapped:
                        wrapped.sendall(wrapped.recv(99).upper())

                with running(serve):
                    if first:
                        sock = client.wrap_socket(socket.create_connection(address))
                    else:
                        sock = client.wrap_socket(socket.socket())
                        sock.connect(address)
                    with sock:
                        sock.sendall(b"hello")
                        assert sock.recv(99) == b"HELLO" and sock.getpeername() == address
                        assert isinstance(sock, ssl.SSLSocket) and isinstance(sock, socket.socket)
                        assert (type(sock) is tls.SSLSocket) == (listener is far or not first)
        far.close()
        near.close()


class TestUndo:
    def test_everything_is_back(self, there: Embedded) -> None:
        patch = importlib.import_module("ulnet.patch")
        assert patch.is_installed() and patch.CHILDREN in os.environ["PYTHONPATH"]
        patch.install()  # twice is once
        patch.undo()
        assert not patch.is_installed()
        for module in (socket, select, selectors):
            now, before = vars(module), NATIVE[module.__name__]
            assert {name for name in before if now[name] is not before[name]} == set()
        assert ssl.SSLContext.sslsocket_class is ssl.SSLSocket
        assert patch.VARIABLE not in os.environ and patch.CHILDREN not in os.environ.get("PYTHONPATH", "")
        assert vars(ours)["_std"] is socket
        with socket.socket() as sock:
            assert type(sock) is KERNEL
        patch.undo()

    def test_children_can_be_left_alone(self, there: Embedded) -> None:
        patch = importlib.import_module("ulnet.patch")
        code = [sys.executable, "-c", "import socket; print(socket.socket.__mro__[1].__module__)"]
        assert subprocess.run(code, capture_output=True, text=True).stdout == "ulnet.stack.socket\n"
        patch.undo()
        patch.install(children=False)
        assert subprocess.run(code, capture_output=True, text=True).stdout == "_socket\n"
