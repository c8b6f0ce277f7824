"""The standard library's clients and servers over this stack, unchanged but for the name ``socket``."""

import functools
import hashlib
import http.client
import http.server
import json
import os
import random
import socketserver
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from sockethosts import B, running

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]


@pytest.fixture
def ulnet_socket(monkeypatch: pytest.MonkeyPatch, hosts: tuple[Embedded, Embedded]) -> Iterator[None]:
    """socketserver and http.client see this module under the name socket; servers run on host b."""
    for module in (socketserver, http.server, http.client):
        monkeypatch.setattr(module, "socket", socket)
    socket.set_default_host(hosts[1])
    yield
    socket.set_default_host(None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"sha256": hashlib.sha256(body).hexdigest(), "from": self.client_address[0]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def web(ulnet_socket: None, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A ThreadingHTTPServer of tmp_path on host b; its port."""
    server = http.server.ThreadingHTTPServer((B, 0), functools.partial(Quiet, directory=str(tmp_path)))
    assert isinstance(server.socket, socket.socket)
    with running(functools.partial(server.serve_forever, 0.02)):
        yield tmp_path, server.server_address[1]
        server.shutdown()
    server.server_close()


def connection(port: int, host: Embedded) -> http.client.HTTPConnection:
    conn = http.client.HTTPConnection(B, port, timeout=10)
    conn._create_connection = functools.partial(socket.create_connection, host=host)  # type: ignore[attr-defined]
    return conn


def test_http_download(web: tuple[Path, int], hosts: tuple[Embedded, Embedded]) -> None:
    folder, port = web
    data = random.Random(7).randbytes(8_000_000)
    (folder / "big.bin").write_bytes(data)
    conn = connection(port, hosts[0])
    for _ in range(2):  # HTTP/1.1: the connection is used again
        conn.request("GET", "/big.bin")
        answer = conn.getresponse()
        assert answer.status == 200
        assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(data).digest()
    conn.request("GET", "/none")
    answer = conn.getresponse()
    assert answer.status == 404 and answer.read()
    conn.close()


def test_http_post(web: tuple[Path, int], hosts: tuple[Embedded, Embedded]) -> None:
    body = random.Random(8).randbytes(1_000_000)
    conn = connection(web[1], hosts[0])
    conn.request("POST", "/", body)
    assert json.loads(conn.getresponse().read()) == {"sha256": hashlib.sha256(body).hexdigest(), "from": "10.0.0.1"}
    conn.close()


def test_urllib_with_the_default_host(web: tuple[Path, int]) -> None:
    """Client and server on the same host: a stack talks to itself."""
    folder, port = web
    (folder / "hello.txt").write_text("hello")
    with urllib.request.urlopen(f"http://{B}:{port}/hello.txt", timeout=10) as answer:
        assert answer.read() == b"hello"


def test_clients_at_once(web: tuple[Path, int], hosts: tuple[Embedded, Embedded]) -> None:
    folder, port = web
    data = random.Random(9).randbytes(200_000)
    (folder / "some.bin").write_bytes(data)
    good: list[bool] = []

    def fetch() -> None:
        conn = connection(port, hosts[0])
        for _ in range(3):
            conn.request("GET", "/some.bin")
            good.append(conn.getresponse().read() == data)
        conn.close()

    threads = [threading.Thread(target=fetch) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert good == [True] * 36


def test_threading_tcp_server(ulnet_socket: None, hosts: tuple[Embedded, Embedded]) -> None:
    class Upper(socketserver.StreamRequestHandler):
        timeout = 5
        disable_nagle_algorithm = True

        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line.upper())

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("", 0), Upper) as server, running(functools.partial(server.serve_forever, 0.02)):
        sock = socket.create_connection((B, server.server_address[1]), 5, host=hosts[0])
        with sock, sock.makefile("rw", encoding="utf-8") as file:
            for word in ("eins", "zwei", "drei"):
                file.write(word + "\n")
                file.flush()
                assert file.readline() == word.upper() + "\n"
        server.shutdown()


def test_udp_server(ulnet_socket: None, hosts: tuple[Embedded, Embedded]) -> None:
    class Echo(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read()[::-1])

    with socketserver.UDPServer(("", 0), Echo) as server, running(functools.partial(server.serve_forever, 0.02)):
        with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as sock:
            sock.settimeout(5)
            for i in range(10):
                sock.sendto(b"abc%d" % i, (B, server.server_address[1]))
                assert sock.recvfrom(100) == (b"%dcba" % i, (B, server.server_address[1]))
        server.shutdown()


def test_the_example_without_privilege_runs() -> None:
    example = Path(__file__).parent.parent / "examples" / "embedded_pair.py"
    environment = {**os.environ, "PYTHONPATH": str(example.parent.parent)}
    out = subprocess.run(
        [sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert "alice: HELLO FROM A USER-LEVEL STACK" in out.stdout, out.stderr
