"""The site as a Flask application, served by ``flask --app flask_site run``."""

from __future__ import annotations

from flask import Flask, Response, request

from tests.programs.apps.site import answer, pieces

app = Flask(__name__)


@app.route("/", defaults={"path": ""})
@app.route("/<path:path>", methods=["GET", "POST", "PUT"])
def everything(path: str) -> Response:
    status, kind, content = answer(request.method, path, request.get_data(), request.remote_addr or "")
    return Response(content if isinstance(content, bytes) else pieces(content), status, content_type=kind)
