"""What goes past the socket module, under the patch: uvloop's own sockets, and os.sendfile()."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sockethosts import read_all, running

from ulnet.stack import embedded
from ulnet.stack import socket as ours
from ulnet.stack.embedded import Embedded


@pytest.fixture
def there() -> Iterator[Embedded]:
    """Patched; the program's host is 10.0.0.1, and 10.0.0.2 is at the other end."""
    patch: ModuleType = importlib.import_module("ulnet.patch")
    patch.install()
    here, there = embedded.pair("10.0.0.1/24", "10.0.0.2/24")
    ours.set_default_host(here)
    yield there
    ours.set_default_host(None)
    patch.undo()
    here.shutdown(0.2)
    there.shutdown(0.2)


def test_uvloop(there: Embedded) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def serve() -> bytes:
        server = await asyncio.start_server(lambda reader, writer: None, "", 7000)
        with running(lambda: ours.create_connection(("10.0.0.1", 7000), 5, host=there).close()):
            await asyncio.sleep(0.2)
        server.close()
        return b"seen"

    assert uvloop.run(serve()) == b"seen"
    policy = uvloop.EventLoopPolicy()
    for loop in (uvloop.new_event_loop(), policy.new_event_loop(), uvloop.Loop()):
        assert isinstance(loop, asyncio.SelectorEventLoop)
        loop.close()


@pytest.mark.parametrize("before", ["import uvloop, ulnet.patch", "import ulnet.patch, uvloop"])
def test_uvloop_by_order_of_import(before: str) -> None:
    pytest.importorskip("uvloop")
    code = (
        f"{before}\nimport asyncio\nassert uvloop.Loop is asyncio.SelectorEventLoop\n"
        "ulnet.patch.undo()\nassert uvloop.Loop.__module__ == 'uvloop'\nassert uvloop.__spec__.name == 'uvloop'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_sendfile(there: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4000)
    listener = ours.create_server(("", 7001), host=there)
    with socket.create_connection(("10.0.0.2", 7001), 5) as sock, open(path, "rb") as file:
        accepted, _ = listener.accept()
        data: list[bytes] = []
        with running(lambda: data.append(read_all(accepted))):
            sock.settimeout(None)
            fd = sock.fileno()
            assert os.sendfile(fd, file.fileno(), 100, 50) == 50
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0  # an offset of its own leaves the position alone
            while os.sendfile(fd, file.fileno(), None, 1 << 30):
                pass
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 1_024_000
            sock.close()
        accepted.close()
    listener.close()
    whole = path.read_bytes()
    assert data[0] == whole[100:150] + whole


def test_sendfile_does_not_wait(there: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 24))
    listener = ours.create_server(("", 7002), host=there)
    with socket.create_connection(("10.0.0.2", 7002), 5) as sock, open(path, "rb") as file:
        with pytest.raises(BlockingIOError):  # a time-out of Python's: a descriptor that does not wait
            for _ in range(1000):
                os.sendfile(sock.fileno(), file.fileno(), None, 1 << 24)
        assert 0 < os.lseek(file.fileno(), 0, os.SEEK_CUR) < 1 << 24
    listener.close()
