"""Download over a user-level TCP connection with the standard library's http.client.

    ULNET_SERVER=/run/ulnet.sock python examples/http_download.py http://10.0.0.2:8000/big.bin

The only change to ordinary code: http.client is told which create_connection to use.
"""

import hashlib
import http.client
import sys
import time
import urllib.parse

from ulnet.stack import socket


def download(url: str) -> tuple[int, str, float]:
    """Bytes, SHA-256 and seconds of a GET; raises OSError, or http.client.HTTPException for another answer than 200."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise SystemExit(f"{url!r}: a URL of the form http://host[:port]/path is meant")
    conn = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=30)
    conn._create_connection = socket.create_connection  # type: ignore[attr-defined]
    started = time.monotonic()
    conn.request("GET", parts.path or "/")
    answer = conn.getresponse()
    if answer.status != 200:
        raise http.client.HTTPException(f"{url}: {answer.status} {answer.reason}")
    digest = hashlib.sha256()
    total = 0
    while data := answer.read(1 << 20):
        digest.update(data)
        total += len(data)
    conn.close()
    return total, digest.hexdigest(), time.monotonic() - started


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: http_download.py http://host[:port]/path")
    try:
        size, sha256, seconds = download(sys.argv[1])
    except OSError as e:
        raise SystemExit(f"http_download: {e}") from None
    print(f"{size} bytes in {seconds:.3f} s ({size * 8 / seconds / 1e6:.0f} Mbit/s), sha256 {sha256}")
