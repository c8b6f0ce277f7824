"""requests against stock servers: ``requests_client HOST NGINX_PORT TLS_PORT SITE_PORT CA``."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.programs.apps.clients import error_of, say
from tests.programs.apps.site import pattern

host, nginx, secure, site, ca = sys.argv[1:]
static, dynamic, tls = f"http://{host}:{nginx}", f"http://{host}:{site}", f"https://{host}:{secure}"

with requests.Session() as session:
    for name in ("f0", "f1", "f1448", "f70000", "f4194304", "missing"):
        reply = session.get(f"{static}/{name}", timeout=20)
        say("get", name=name, status=reply.status_code, body=reply.content)
    reply = session.get(f"{static}/redirect", timeout=20)
    say("redirect", url=reply.url, history=[r.status_code for r in reply.history], body=reply.content)
    reply = session.get(f"{static}/text", timeout=20)
    say("gzip", coding=reply.headers.get("Content-Encoding"), body=reply.content)
    with session.get(f"{static}/f4194304", stream=True, timeout=20) as reply:
        say("streamed", sizes=sum(len(piece) for piece in reply.iter_content(10_000)))
    with session.get(f"{static}/f4194304", stream=True, timeout=20) as reply:
        say("left early", first=next(reply.iter_content(1000)))
    for name in ("f1", "f70000"):
        say("tls", name=name, body=session.get(f"{tls}/{name}", verify=ca, timeout=20).content)

for size in (0, 1, 100_000, 3_000_000):
    say("post", body=requests.post(f"{dynamic}/echo", data=pattern(size), timeout=20).content)
say("upload", body=requests.put(f"{static}/put/thing", data=pattern(2_000_000), timeout=20).content)
say("upload", body=requests.get(f"{static}/put/thing", timeout=20).content)
say("files", status=requests.post(f"{dynamic}/echo", files={"a": b"abc"}, timeout=20).status_code)
say("who", body=requests.get(f"{dynamic}/who", timeout=20).json())

say("refused", error=error_of(requests.get, f"http://{host}:1/", timeout=20))
say("late", error=error_of(requests.get, f"{static}/never", timeout=0.3))
say("untrusted", error=error_of(requests.get, f"{tls}/f1", timeout=20))

with ThreadPoolExecutor(8) as pool:
    urls = [f"{static}/f70000"] * 24 + [f"{tls}/f1448"] * 8
    for reply in pool.map(lambda url: requests.get(url, verify=ca, timeout=20), urls):
        say("in parallel", status=reply.status_code, body=reply.content)
