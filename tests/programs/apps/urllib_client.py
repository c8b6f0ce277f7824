"""urllib, http.client and ssl against stock servers: ``urllib_client HOST NGINX_PORT TLS_PORT SITE_PORT CA``."""

from __future__ import annotations

import http.client
import socket
import sys
import urllib.error
import urllib.request

from tests.programs.apps.clients import error_of, say, tls
from tests.programs.apps.site import pattern

host, nginx, secure, site, ca = sys.argv[1:]
context = tls(ca)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20, context=context if url.startswith("https") else None) as reply:
        return bytes(reply.read())


for name in ("f0", "f1", "f1448", "f70000", "f4194304"):
    say("http", body=get(f"http://{host}:{nginx}/{name}"))
    say("https", body=get(f"https://{host}:{secure}/{name}"))
say("redirect", body=get(f"http://{host}:{nginx}/redirect"))
try:
    get(f"https://{host}:{secure}/missing")
except urllib.error.HTTPError as error:
    say("missing", status=error.code, body=error.read())
say("untrusted", error=error_of(urllib.request.urlopen, f"https://{host}:{secure}/f1", timeout=20))
say("refused", error=error_of(urllib.request.urlopen, f"http://{host}:1/", timeout=20))
say("late", error=error_of(urllib.request.urlopen, f"http://{host}:{nginx}/never", timeout=0.3))

connection = http.client.HTTPSConnection(host, int(secure), context=context, timeout=20)
for _ in range(20):
    connection.request("GET", "/f1448")
    say("kept alive", body=connection.getresponse().read())
connection.close()
request = urllib.request.Request(f"http://{host}:{site}/echo", data=pattern(1_000_000), method="POST")
with urllib.request.urlopen(request, timeout=20) as reply:
    say("post", body=reply.read())

# The ssl module itself: a wrapped blocking socket, in small writes, with a certificate to look at.
with (
    socket.create_connection((host, int(secure)), timeout=20) as plain,
    context.wrap_socket(plain, server_hostname=host) as sock,
):
    say("wrapped", version=sock.version(), subject=str(sock.getpeercert()["subject"]), peer=sock.getpeername())  # type: ignore[index]
    for piece in (b"GET /f70000 HTTP/1.1\r\n", b"Host: x\r\n", b"Connection: close\r\n\r\n"):
        sock.sendall(piece)
    with sock.makefile("rb") as file:
        say("wrapped", head=file.readline().decode(), headers=len([1 for line in iter(file.readline, b"\r\n")]))
        say("wrapped", body=file.read())
