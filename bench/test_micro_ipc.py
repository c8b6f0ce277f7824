"""Messages: frames between task and hub packed and read, the server's records, and an RPC between two processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ulnet.ipc import Task, wire
from ulnet.stack import protocol

SERVER = """
import sys
from ulnet.ipc import Hub
hub = Hub(sys.argv[1])
task = hub.local_task()
hub.serve(task.check_in("bench.echo"), lambda message, sender: task.reply(message, message.inline, ool=message.ool))
print("ready", flush=True)
while True:
    hub.poll(None)
"""


def test_message_frame(benchmark: BenchmarkFixture) -> None:
    """The header of a message, there and back."""
    benchmark.group = "message, encode and decode"
    fields = (wire.Op.DELIVER, 0, 0, 0, 7, 3, 4, 9300, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6)

    def there_and_back() -> tuple[int, ...]:
        return wire.MESSAGE.unpack(wire.MESSAGE.pack(*fields))

    assert benchmark(there_and_back) == fields


def test_record(benchmark: BenchmarkFixture) -> None:
    """A call of the network server's protocol, fields checked."""
    benchmark.group = "message, encode and decode"
    request = protocol.Connect(1 << 32, 6, "10.77.0.2", 80)

    def there_and_back() -> protocol.Connect:
        return protocol.Connect.unpack(request.pack())

    assert benchmark(there_and_back) == request


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[tuple[Task, int]]:
    path = tmp_path / "hub.sock"
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        with Task(path) as task:
            yield task, task.look_up("bench.echo")
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


@pytest.mark.parametrize("size", [0, 1024, 1 << 20], ids=["empty", "1 KiB inline", "1 MiB out of line"])
def test_rpc(benchmark: BenchmarkFixture, echo: tuple[Task, int], size: int) -> None:
    """A call and its answer between two processes."""
    benchmark.group = "rpc between processes"
    task, port = echo
    data = bytes(size)
    inline, ool = (b"", [data]) if size > 65_536 else (data, [])

    def call() -> int:
        reply = task.rpc(port, 100, inline, ool=ool, timeout=5.0)
        return len(reply.inline) + sum(len(part) for part in reply.ool)

    assert benchmark(call) == size
