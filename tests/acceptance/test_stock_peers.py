"""Stock programs on host b's kernel against a program on ulnet: curl, nginx, redis, the standard library's servers."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket as ksocket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.beds import ADDRESS, PEER, Hosts
from tests.netserver_bed import wait_for

CURL, NGINX, REDIS = (shutil.which(name) for name in ("curl", "nginx", "redis-server"))

SERVE_HTTP = """
import socketserver, http.server

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('X-Digest', hashlib.sha256(body).hexdigest())
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        name = self.path.strip('/')
        if name.isdigit():
            self.answer(os.urandom(int(name)))
        else:
            self.answer(b'no such thing', 404)
    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers['Content-Length'])))
    do_PUT = do_POST

server = HTTPServer(('', 0), Handler)
server.handle_error = lambda *args: None  # clients that go away are part of the tests
threading.Thread(target=server.serve_forever, daemon=True).start()
port = server.server_address[1]
"""


@contextmanager
def running(hosts: Hosts, argv: list[str], port: int) -> Iterator[None]:
    """A stock server on host b; waits until it answers, ends it afterwards."""
    process = hosts.b.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, f"{argv[0]} ended with status {process.returncode}"
        with hosts.b.socket() as sock:
            return sock.connect_ex((PEER, port)) == 0

    try:
        wait_for(answers, argv[0], 15)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def curl(hosts: Hosts, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    assert CURL is not None
    process = hosts.b.popen(
        [CURL, "-sS", "--max-time", "60", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate(timeout=70)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
class TestCurl:
    def test_get_keep_alive_and_errors(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.do(SERVE_HTTP)
        base = f"http://{ADDRESS}:{app.value('port')}"
        # Several requests on one connection.
        result = curl(
            hosts, "-D", "-", "-o", "/dev/null", *(f"{base}/{n}" for n in (0, 1, 1448, 100_000)), "-o/dev/null"
        )
        assert result.returncode == 0, result.stderr
        result = curl(hosts, "-w", "%{http_code} %{num_connects}", f"{base}/nothing")
        assert result.stdout == b"no such thing404 1"
        result = curl(hosts, "-i", f"{base}/{8 << 20}")
        assert result.returncode == 0, result.stderr
        head, _, body = result.stdout.partition(b"\r\n\r\n")
        assert hashlib.sha256(body).hexdigest().encode() in head

    def test_upload(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.do(SERVE_HTTP)
        url = f"http://{ADDRESS}:{app.value('port')}/upload"
        data = os.urandom(8 << 20)
        (hosts.folder / "upload").write_bytes(data)
        for method in (["--data-binary", f"@{hosts.folder}/upload"], ["-T", f"{hosts.folder}/upload"]):
            result = curl(hosts, *method, url)
            assert result.returncode == 0, result.stderr
            assert result.stdout == data

    def test_in_parallel(self, hosts: Hosts) -> None:
        app = hosts.app()
        app.do(SERVE_HTTP)
        url = f"http://{ADDRESS}:{app.value('port')}/300000"
        many = [part for _ in range(20) for part in ("-o", "/dev/null", url)]
        result = curl(hosts, "--parallel", "--parallel-max", "10", "--fail", *many)
        assert result.returncode == 0, result.stderr

    def test_a_client_that_goes_away(self, hosts: Hosts) -> None:
        """curl is killed in the middle of a download; the server of the program goes on."""
        app = hosts.app()
        app.do(SERVE_HTTP)
        base = f"http://{ADDRESS}:{app.value('port')}"
        for _ in range(3):
            assert CURL is not None
            process = hosts.b.popen(
                [CURL, "-s", "--limit-rate", "100k", "-o", "/dev/null", f"{base}/{32 << 20}"],
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.3)
            process.kill()
            process.wait()
        assert len(curl(hosts, f"{base}/1000").stdout) == 1000


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx(hosts: Hosts) -> None:
    folder = hosts.folder
    root = folder / "www"
    root.mkdir()
    files = {f"f{size}": os.urandom(size) for size in (0, 1, 1448, 70_000, 16 << 20)}
    for name, data in files.items():
        (root / name).write_bytes(data)
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"{user} daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        "events {}\n"
        "http { access_log off; sendfile on; tcp_nopush on;\n"
        + "".join(
            f"{what}_temp_path {folder}/{what};\n" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"server {{ listen {PEER}:8080; root {root}; }} }}\n"
    )
    assert NGINX is not None
    with running(hosts, [NGINX, "-c", str(config), "-p", str(folder)], 8080):
        app = hosts.app()
        app.do(
            f"import http.client\n"
            f"c = http.client.HTTPConnection('{PEER}', 8080, timeout=30)\n"
            f"c._create_connection = socket.create_connection\n"
            "def get(path, **headers):\n"
            "    c.request('GET', path, headers=headers)\n"
            "    r = c.getresponse()\n"
            "    return r.status, hashlib.sha256(r.read()).hexdigest()\n"
        )
        for _ in range(3):  # all on one connection
            for name, data in files.items():
                assert app.value(f"get('/{name}')") == [200, hashlib.sha256(data).hexdigest()]
        assert app.value("get('/missing')")[0] == 404
        part = hashlib.sha256(files["f70000"][100:50_000]).hexdigest()
        assert app.value("get('/f70000', Range='bytes=100-49999')") == [206, part]
        assert app.value("c.sock.session.stat()['retransmits']") == 0
        app.do("c.close()")


@pytest.mark.skipif(REDIS is None, reason="redis-server is not installed")
def test_redis(hosts: Hosts) -> None:
    assert REDIS is not None
    options = ["--port", "6379", "--bind", PEER, "--protected-mode", "no", "--save", "", "--appendonly", "no"]
    with running(hosts, [REDIS, *options, "--dir", str(hosts.folder)], 6379):
        app = hosts.app()
        app.do(
            f"""
def pack(*words):
    words = [w if isinstance(w, bytes) else str(w).encode() for w in words]
    return b'*%d\\r\\n' % len(words) + b''.join(b'$%d\\r\\n%s\\r\\n' % (len(w), w) for w in words)

def reply(f):
    line = f.readline()
    kind, rest = line[:1], line[1:-2]
    if kind == b'-': raise RuntimeError(rest)
    if kind == b':': return int(rest)
    if kind == b'$': return None if rest == b'-1' else f.read(int(rest) + 2)[:-2]
    if kind == b'*': return [reply(f) for _ in range(int(rest))]
    return rest

s = socket.create_connection(('{PEER}', 6379), timeout=30)
f = s.makefile('rb')
def call(*words):
    s.sendall(pack(*words))
    return reply(f)
"""
        )
        assert app.value("call('PING').decode()") == "PONG"
        app.do("big = os.urandom(4 << 20); assert call('SET', 'big', big) == b'OK'; assert call('GET', 'big') == big")
        assert app.value("[call('INCR', 'n') for _ in range(300)][-1]") == 300
        # A pipeline: all questions in one go, then all answers.
        app.do(
            "s.sendall(b''.join(pack('SET', f'k{n}', n) + pack('GET', f'k{n}') for n in range(2000)))\n"
            "for n in range(2000): assert reply(f) == b'OK' and reply(f) == b'%d' % n"
        )
        # Somebody else publishes: what comes unasked wakes up who waits.
        app.do("assert call('SUBSCRIBE', 'news') == [b'subscribe', b'news', 1]")
        app.start("[reply(f)[2].decode() for _ in range(3)]", "eval")
        with hosts.b.socket() as publisher:
            publisher.settimeout(10)
            publisher.connect((PEER, 6379))
            for word in ("one", "two", "three"):
                publisher.sendall(f"PUBLISH news {word}\r\n".encode())
                publisher.recv(100)
                time.sleep(0.05)
        assert app.answer() == ["one", "two", "three"]
        app.do("f.close(); s.close()")


def test_the_standard_library(hosts: Hosts, tmp_path: Path) -> None:
    """socketserver's UDP server and selectors on ulnet, a stock socket client in the test."""
    app = hosts.app()
    app.do(
        """
import socketserver, selectors
class Upper(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        sock.sendto(data.upper(), self.client_address)
class Server(socketserver.UDPServer):
    def __init__(self, address, handler):
        socketserver.BaseServer.__init__(self, address, handler)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server_bind()
udp = Server(('', 0), Upper)
threading.Thread(target=udp.serve_forever, daemon=True).start()

tcp = socket.create_server(('', 0)); tcp.setblocking(False)
def serve():
    selector = selectors.DefaultSelector()
    selector.register(tcp, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is tcp:
                s, _ = tcp.accept(); s.setblocking(False)
                selector.register(s, selectors.EVENT_READ)
                continue
            data = key.fileobj.recv(65536)
            if data:
                key.fileobj.sendall(data.upper())
            else:
                selector.unregister(key.fileobj); key.fileobj.close()
threading.Thread(target=serve, daemon=True).start()
"""
    )
    with hosts.datagrams() as sock:
        for number in range(50):
            sock.sendto(b"hello %d" % number, (ADDRESS, app.value("udp.server_address[1]")))
            assert sock.recv(100) == b"HELLO %d" % number
    port = app.value("tcp.getsockname()[1]")
    clients = [hosts.dial(port) for _ in range(20)]
    for turn in range(5):
        for number, client in enumerate(clients):
            client.sendall(b"client %d turn %d" % (number, turn))
        for number, client in enumerate(clients):
            assert client.recv(100) == b"CLIENT %d TURN %d" % (number, turn)
    for client in clients:
        client.shutdown(ksocket.SHUT_WR)
        assert client.recv(1) == b""
        client.close()
