"""The site as a WSGI application; run as a program it is served by wsgiref: ``wsgi_site ADDRESS PORT``."""

from __future__ import annotations

import http
import sys
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from tests.programs.apps.site import answer, pieces


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    status, kind, content = answer(environ["REQUEST_METHOD"], environ["PATH_INFO"], body, environ["REMOTE_ADDR"])
    headers = [("Content-Type", kind)]
    if isinstance(content, bytes):
        headers.append(("Content-Length", str(len(content))))
    start_response(f"{status} {http.HTTPStatus(status).phrase}", headers)
    return [content] if isinstance(content, bytes) else pieces(content)


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    with make_server(sys.argv[1], int(sys.argv[2]), app, handler_class=Quiet) as server:
        server.serve_forever()
