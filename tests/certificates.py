"""A self-signed certificate for tests, made by the openssl command, and contexts that use it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

NAME = "peer.test"


def missing() -> str | None:
    """None when certificates can be made, otherwise the reason for a skip."""
    return None if shutil.which("openssl") else "the openssl command is missing"


def make(folder: Path, *addresses: str) -> Path:
    """A file with a key and its certificate, for NAME, localhost and these addresses."""
    pem = folder / "server.pem"
    names = ",".join([f"DNS:{NAME}", "DNS:localhost", *(f"IP:{address}" for address in addresses)])
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName={names}", "-days", "2"),
            *("-keyout", str(pem), "-out", str(folder / "certificate.pem")),
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text() + (folder / "certificate.pem").read_text())
    return pem


def server_context(pem: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def client_context(pem: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pem))
