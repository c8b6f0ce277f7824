"""What host b does while a program runs: stock servers around it, stock clients against it. All on kernel sockets."""

from __future__ import annotations

import ftplib
import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.netserver_bed import ADDRESS, PEER, wait_for
from tests.programs.apps.site import pattern
from tests.programs.harness import APPS, LIMIT_S, Run, World, in_threads

NGINX_PORT, TLS_PORT, SITE_PORT, REDIS_PORT, FTP_PORT, SMTP_PORT, TREE_PORT = 8080, 8443, 8081, 6379, 2121, 2525, 9999
MANAGER_PORT = 5000


def digest(data: bytes) -> list[Any]:
    return [len(data), hashlib.sha256(data).hexdigest()]


# -- servers on host b -----------------------------------------------------------------------------


@contextmanager
def web(world: World, run: Run) -> Iterator[None]:
    """nginx with the files, HTTP and HTTPS, and the site by wsgiref."""
    config, uploads, never = run.folder / "nginx.conf", run.folder / "put", socket.socket()
    uploads.mkdir()
    uploads.chmod(0o777)
    assert world.certificate is not None
    certificate, key = world.certificate
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = " ".join(f"{kind}_temp_path {run.folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    with never, world.b.socket() as never:
        never.bind((PEER, 0))
        never.listen()  # takes connections, answers nothing
        config.write_text(
            f"{user} daemon off; master_process off; pid {run.folder}/nginx.pid; error_log {run.folder}/nginx.log;\n"
            "events {}\n"
            f"http {{ access_log off; {temporary} client_body_temp_path {run.folder}/body; client_max_body_size 50m;\n"
            "default_type text/plain; gzip on;\n"
            f"server {{ listen {PEER}:{NGINX_PORT}; listen {PEER}:{TLS_PORT} ssl; root {run.files};\n"
            f"ssl_certificate {certificate}; ssl_certificate_key {key};\n"
            "location = /redirect { return 302 /f70000; }\n"
            f"location /put/ {{ root {run.folder}; dav_methods PUT; }}\n"
            f"location = /never {{ proxy_pass http://{PEER}:{never.getsockname()[1]}; }} }} }}\n"
        )
        nginx = shutil.which("nginx") or "nginx"
        with (
            world.stock([nginx, "-p", str(run.folder), "-c", str(config)], NGINX_PORT, run.folder, "nginx"),
            world.stock(
                [sys.executable, "-m", f"{APPS}.wsgi_site", PEER, str(SITE_PORT)], SITE_PORT, run.folder, "site"
            ),
        ):
            yield


@contextmanager
def redis_server(world: World, run: Run) -> Iterator[None]:
    argv = [
        "redis-server",
        "--port",
        str(REDIS_PORT),
        "--bind",
        PEER,
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        str(run.folder),
    ]
    with world.stock(argv, REDIS_PORT, run.folder, "redis"):
        yield


@contextmanager
def ftp_server(world: World, run: Run) -> Iterator[None]:
    (run.folder / "ftp").mkdir()
    argv = [sys.executable, "-m", f"{APPS}.ftp_server", PEER, str(FTP_PORT), str(run.folder / "ftp")]
    with world.stock(argv, FTP_PORT, run.folder, "ftpd"):
        yield


@contextmanager
def smtp_server(world: World, run: Run) -> Iterator[None]:
    assert world.certificate is not None
    argv = [sys.executable, "-m", f"{APPS}.smtp_server", PEER, str(SMTP_PORT), *map(str, world.certificate)]
    with world.stock(argv, SMTP_PORT, run.folder, "smtpd"):
        yield


@contextmanager
def ftp_folder(world: World, run: Run) -> Iterator[None]:
    """The folder that an FTP server on host a serves."""
    (run.folder / "ftp").mkdir()
    yield


@contextmanager
def tree_receiver(method: str, world: World, run: Run) -> Iterator[None]:
    """The receiving half of the transfer, on host b."""
    root = run.folder / "received"
    root.mkdir()
    argv = [sys.executable, "-m", f"{APPS}.tree", "receive", str(TREE_PORT), str(root), method]
    process = world.popen(world.b, argv, run.folder, "receiver")
    wait_for(lambda: "ready" in (run.folder / "receiver.out").read_text(), "receiver", LIMIT_S)
    yield
    assert process.wait(LIMIT_S) == 0, (run.folder / "receiver.err").read_text()


def tree_of(root: Path) -> dict[str, list[Any]]:
    """Each file below it, with its size and hash."""
    return {str(p.relative_to(root)): digest(p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()}


# -- clients of a web server -----------------------------------------------------------------------

STATIC = ("/f0", "/f1", "/f1448", "/f70000", "/f4194304", "/sub/", "/sub/small7", "/sub", "/missing")
SITE = (
    "/",
    "/bytes/0",
    "/bytes/1",
    "/bytes/1448",
    "/bytes/100000",
    "/bytes/4000000",
    "/stream/300",
    "/who",
    "/missing",
)


def answer_of(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> Any:
    connection.request(method, path, body)
    reply = connection.getresponse()
    headers = sorted((k.lower(), v) for k, v in reply.getheaders() if k.lower() not in ("date", "last-modified"))
    return method, path, reply.status, reply.reason, headers, digest(reply.read())


def connection_to(world: World, run: Run) -> http.client.HTTPConnection:
    if not run.program.tls:
        return http.client.HTTPConnection(ADDRESS, run.port, timeout=LIMIT_S)
    return http.client.HTTPSConnection(ADDRESS, run.port, timeout=LIMIT_S, context=trusting(world))


def trusting(world: World) -> ssl.SSLContext:
    """A client's context that believes the tests' certificate."""
    assert world.certificate is not None
    return ssl.create_default_context(cafile=str(world.certificate[0]))


def browse(paths: tuple[str, ...], upload: bool, world: World, run: Run, pids: int = 0) -> list[Any]:
    """All of it: one connection after another, one connection kept, many at once, curl, wget, bad requests.

    ``pids``: so many processes must be seen to answer.
    """
    seen: list[Any] = []
    for kept in (False, True):
        connection = connection_to(world, run)
        for path in paths:
            seen.append(answer_of(connection, "GET", path))
            if not kept:
                connection.close()
        seen.append(answer_of(connection, "HEAD", paths[3]))
        for size in (0, 1, 100_000, 3_000_000) if upload else ():
            seen.append(answer_of(connection, "POST", "/echo", pattern(size)))
        connection.close()

    def several(number: int) -> Any:
        connection = connection_to(world, run)
        answers = [answer_of(connection, "GET", paths[(number + turn) % len(paths)]) for turn in range(4)]
        connection.close()
        return answers

    seen += in_threads(12, several, world.b)
    seen += [curl(world, run, path) for path in paths] + wget(world, run, paths[3])
    if not run.program.tls:
        seen += [talk(run.port, request) for request in (b"rubbish\r\n\r\n", b"GET / HTTP/1.0\r\nBroken\r\n\r\n", b"")]
    if pids:
        seen.append(["workers", len(workers(pids, world, run))])
    return seen


def workers(wanted: int, world: World, run: Run) -> set[str]:
    """Process numbers of who answers; asks until as many as wanted have, but not for ever."""
    found: set[str] = set()
    for _ in range(30):
        found |= set(in_threads(2 * wanted, lambda _: get(run.port, "/pid").decode(), world.b))
        if len(found) >= wanted:
            break
    return found


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=LIMIT_S)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def curl(world: World, run: Run, path: str) -> Any:
    if shutil.which("curl") is None:
        return None
    argv = ["curl", "-s", "-S", "--max-time", "30", "-w", "%{http_code} %{size_download} %{num_connects}"]
    return output_of(world, [*argv, *(["--cacert", str(run.authority)] if run.program.tls else []), run.url(path)])


def wget(world: World, run: Run, path: str) -> list[Any]:
    if shutil.which("wget") is None:
        return []
    more = [f"--ca-certificate={run.authority}"] if run.program.tls else []
    return [output_of(world, ["wget", "-q", "-T", "30", "-O", "-", *more, run.url(path)])]


def output_of(world: World, argv: list[str]) -> Any:
    """Status, what it complained of, what it printed."""
    process = world.b.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=2 * LIMIT_S)
    return argv[0], process.returncode, err.decode(), digest(out)


def talk(port: int, request: bytes) -> Any:
    """What comes back for it, to the end, dates taken out."""
    with socket.create_connection((ADDRESS, port), LIMIT_S) as sock:
        sock.sendall(request)
        if not request:
            sock.shutdown(socket.SHUT_WR)  # after a request some servers take it for a client that has gone
        reply = b"".join(iter(partial(sock.recv, 65536), b""))
    return re.sub(rb"(?i)date: [^\r\n]*", b"DATE", reply).decode(errors="replace")


def static_site(world: World, run: Run) -> Any:
    return browse(STATIC, False, world, run)


def whole_site(world: World, run: Run) -> Any:
    return browse(SITE, True, world, run)


def site_of(pids: int) -> Callable[[World, Run], Any]:
    """The site, served by so many processes."""
    return partial(browse, SITE, True, pids=pids)


def site_and_websocket(world: World, run: Run) -> Any:
    url = f"http://{ADDRESS}:{run.port}/ws"
    return whole_site(world, run), world.peer([sys.executable, "-m", f"{APPS}.websocket_client", url], run.folder)


# -- clients of other servers ----------------------------------------------------------------------


def ftp_client(world: World, run: Run) -> Any:
    return world.peer([sys.executable, "-m", f"{APPS}.ftp_client", ADDRESS, str(run.port)], run.folder)


def curl_ftp(world: World, run: Run) -> Any:
    """curl's own FTP beside ftplib's, and two sessions at once."""
    seen = [ftp_client(world, run)]
    with ftplib.FTP() as one, ftplib.FTP() as two:
        for ftp in (one, two):
            ftp.connect(ADDRESS, run.port, LIMIT_S)
            ftp.login("user", "secret")
        one.storbinary("STOR both", io.BytesIO(pattern(100_000)))
        two.voidcmd("TYPE I")
        seen.append(two.size("both"))
    if shutil.which("curl"):
        seen.append(output_of(world, ["curl", "-sS", f"ftp://user:secret@{ADDRESS}:{run.port}/both"]))
    # The server's last words on each session come after the client has its answer.
    wait_for(lambda: run.output().count("session closed") == run.output().count("session opened"), "ends", LIMIT_S)
    return seen


@contextmanager
def manager(world: World, run: Run) -> Iterator[None]:
    argv = [sys.executable, "-m", f"{APPS}.manager", "serve", str(MANAGER_PORT)]
    with world.stock(argv, MANAGER_PORT, run.folder, "manager"):
        yield


@contextmanager
def cgi_folder(world: World, run: Run) -> Iterator[None]:
    """A site with a CGI program, which runs as nobody when its server is root."""
    (run.folder / "site" / "cgi-bin").mkdir(parents=True)
    script = run.folder / "site" / "cgi-bin" / "script"
    script.write_text(
        "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\n"
        "echo method $REQUEST_METHOD query $QUERY_STRING client $REMOTE_ADDR\n"
        'if [ "$REQUEST_METHOD" = POST ]; then head -c "$CONTENT_LENGTH"; fi\n'
    )
    script.chmod(0o755)
    (run.folder / "site" / "page").write_bytes(pattern(100_000))
    yield


def smtp_client(world: World, run: Run) -> Any:
    assert world.certificate is not None
    argv = [sys.executable, "-m", f"{APPS}.smtp_client", ADDRESS, str(run.port), str(world.certificate[0])]
    return world.peer(argv, run.folder)


def echo_stream(port: int, size: int) -> Any:
    """Send a stream, all of it before the end is awaited, and take its echo meanwhile."""
    with socket.create_connection((ADDRESS, port), LIMIT_S) as sock:
        data, back = pattern(size), bytearray()

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while piece := sock.recv(65536):
            back += piece
        sender.join()
    return port, digest(bytes(back))


def echo_tls(port: int, size: int, context: ssl.SSLContext) -> Any:
    """The same over TLS, by turns: an SSL connection is not for two threads."""
    back = bytearray()
    with (
        socket.create_connection((ADDRESS, port), LIMIT_S) as plain,
        context.wrap_socket(plain, server_hostname=ADDRESS) as sock,
    ):
        for at in range(0, size, 50_000):
            sock.sendall(pattern(size)[at : at + 50_000])
            while len(back) < min(size, at + 50_000):
                back += sock.recv(65536)
        sock.unwrap()
    return port, digest(bytes(back))


def streams(ports: tuple[int, ...], world: World) -> list[Any]:
    """Echoes of several sizes: one by one, and many at once; and clients that go away with a reset."""
    seen = [echo_stream(port, size) for port in ports for size in (0, 1, 1448, 100_000, 4_000_000)]
    for port in ports:
        seen += in_threads(16, lambda number, port=port: echo_stream(port, 1 + number * 20_000), world.b)  # type: ignore[misc]
    return seen


def echoes(world: World, run: Run) -> Any:
    """asyncio_echo's services."""
    context = trusting(world)
    seen = streams((run.port, run.port + 2), world)
    seen += [echo_tls(run.port + 1, size, context) for size in (1, 100_000, 2_000_000)]
    return seen + datagrams(run.port, SIZES)


SIZES = (1, 1472, 1473, 9000, 60_000)  # asyncio sends no empty datagrams


def datagrams(port: int, sizes: tuple[int, ...]) -> list[Any]:
    """Echoes of datagrams; one that does not come back is asked for again, as datagrams may be lost."""
    seen = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((ADDRESS, port))
        sock.settimeout(2)
        for size in sizes:
            for _ in range(5):
                sock.send(pattern(size))
                try:
                    seen.append(digest(sock.recv(65536)))
                    break
                except TimeoutError:
                    continue
    return seen


def manager_client(world: World, run: Run) -> Any:
    return world.peer([sys.executable, "-m", f"{APPS}.manager", "use", ADDRESS, str(run.port)], run.folder)


def cgi(world: World, run: Run) -> Any:
    """Pages and programs in turn, then programs at once, and one that is sent something."""
    seen = []
    for number in range(3):
        for path in ("/page", f"/cgi-bin/script?number={number}", "/cgi-bin/missing"):
            seen.append(answer_of(connection_to(world, run), "GET", path))
    seen.append(answer_of(connection_to(world, run), "POST", "/cgi-bin/script", b"line\n" * 100))
    seen.append(curl(world, run, "/cgi-bin/script?by=curl"))
    return seen + in_threads(6, lambda number: get(run.port, f"/cgi-bin/script?{number}").decode(), world.b)


def piped(world: World, run: Run) -> Any:
    """Four streams through inetd's programs, which echo."""
    return [echo_stream(run.port, size) for size in (0, 1, 100_000, 4_000_000)]


def lines(world: World, run: Run) -> Any:
    """socketserver_echo's lines: conversations one by one and at once, each line answered before the next."""

    def talk(number: int) -> list[str]:
        answers = []
        with socket.create_connection((ADDRESS, run.port), LIMIT_S) as sock, sock.makefile("rwb") as file:
            for turn in range(10):
                file.write(f"client {number}, line {turn} {'x' * (turn * 3000)}\n".encode())
                file.flush()
                answers.append(file.readline().decode())
        return answers

    return [talk(100), talk(101), *in_threads(12, talk, world.b)]


def packets(world: World, run: Run) -> Any:
    return datagrams(run.port, (0, *SIZES))


def send_tree(method: str, world: World, run: Run) -> Any:
    """The sending half of the transfer, on host b; what has arrived at the program."""
    argv = [sys.executable, "-m", f"{APPS}.tree", "send", ADDRESS, str(run.port), str(run.files), method]
    status, said = world.peer(argv, run.folder)
    assert run.process is not None
    run.process.wait(LIMIT_S)
    received = tree_of(run.folder / "received")
    assert received == tree_of(run.files)
    return status, sorted(said.splitlines()), received


def arrived(world: World, run: Run) -> Any:
    """After a program has sent a tree: what the receiver on host b has."""
    assert run.process is not None
    run.process.wait(LIMIT_S)
    received = tree_of(run.folder / "received")
    assert received == tree_of(run.files)
    return received
