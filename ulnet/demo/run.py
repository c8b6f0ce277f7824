"""``ulnet demo``: the main job on real traffic, step by step, on two hosts made for it and removed after it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket as kernel
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ulnet.kernelshim.testbed import Host, Testbed, can_testbed, ensure_privilege
from ulnet.table import bed as measuring
from ulnet.table.measure import Budget, Table
from ulnet.table.report import demo_view
from ulnet.table.rows import BLOCKING, COLUMN, IPF, SPINNING

A_KERNEL, A_USER = measuring.KERNEL["a"], measuring.USER["a"]
B_KERNEL, B_USER = measuring.KERNEL["b"], measuring.USER["b"]
FILE_BYTES = 64 << 20
PAUSE_BYTES = 8 << 20
MEASURE_S = 5.0
console = Console()


class DemoError(Exception):
    """What failed, in one line."""


def expect(condition: bool, failure: str) -> None:
    if not condition:
        raise DemoError(failure)


def step(number: int, text: str) -> None:
    console.print(f"[bold]{number}.[/bold] {text}", highlight=False, soft_wrap=True)


def found(text: str) -> None:
    console.print(f"   {text}", highlight=False, soft_wrap=True)


class Application:
    """The unprivileged program (app.py), driven by JSON lines."""

    def __init__(self, host: Host, server: str) -> None:
        self.process = host.popen(
            [sys.executable, "-m", "ulnet.demo.app", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.who: str = self.read()["who"]

    def tell(self, **command: Any) -> dict[str, Any]:
        self.write(json.dumps(command))
        return self.read()

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        expect(bool(line), "the application ended unexpectedly; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start_server(host: Host, address: str, path: Path) -> measuring.Server:
    """Run ``ulnet netserver`` on the host and say that it is ready."""
    process = measuring.start_server(host, address, path)
    found(process.ready)
    return process


def addresses(host: Host) -> list[str]:
    with host.netlink() as ip:
        return [a.get_attr("IFA_ADDRESS") for a in ip.get_addr(family=kernel.AF_INET)]


def ask(what: str, path: Path) -> Any:
    """What ``ulnet sessions --json`` or ``ulnet counters --json`` shows."""
    out = subprocess.run(
        [sys.executable, "-m", "ulnet", what, "--json", "--socket", str(path)],
        capture_output=True,
        text=True,
        timeout=20,
    )
    expect(out.returncode == 0, f"ulnet {what} failed: {out.stderr.strip()}")
    return json.loads(out.stdout)


def leftovers(path: Path) -> list[str]:
    """What the server still holds, but for finished connections that TCP keeps for a minute (TIME-WAIT)."""
    tables = ask("counters", path)["tables"]
    rows = [row for row in ask("sessions", path) if row["state"] != "TIME-WAIT"]
    held = [f"{name}: {tables[name]}" for name in ("flows", "guarded", "applications") if tables[name]]
    return held + [f"{row['proto']} {row['local']} {row['remote']} {row['state']}" for row in rows]


def make_file(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for _ in range(size >> 20):
            block = os.urandom(1 << 20)
            digest.update(block)
            out.write(block)
    path.chmod(0o644)
    return digest.hexdigest()


@contextlib.contextmanager
def stock_http_server(host: Host, root: Path) -> Iterator[int]:
    """``python -m http.server`` on the host's kernel stack; gives its port."""
    port = 8000
    process = host.popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", B_KERNEL, "--directory", str(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with host.socket() as probe:
                if probe.connect_ex((B_KERNEL, port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_stopped(pid: int) -> bool:
    """Wait until the kernel shows the process as stopped."""
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt":
            return True
        time.sleep(0.01)
    return False


def show_download(app: Application, server: measuring.Server, host_b: Host, root: Path, digest: str) -> None:
    with stock_http_server(host_b, root) as port:
        app.write(
            json.dumps({"do": "download", "host": B_KERNEL, "port": port, "path": "/file", "pause_at": PAUSE_BYTES})
        )
        paused = app.read()["paused"]
        server.send_signal(signal.SIGSTOP)
        expect(is_stopped(server.pid), "the network server did not stop")
        found(f"after {paused >> 20} MiB the network server is stopped (SIGSTOP)")
        start = time.monotonic()
        app.write("go")
        result = app.read()
        seconds = time.monotonic() - start
        server.send_signal(signal.SIGCONT)
    expect(result["bytes"] == FILE_BYTES, f"downloaded {result['bytes']} of {FILE_BYTES} bytes")
    expect(result["sha256"] == digest, "the SHA-256 of the download differs")
    found(f"the rest came in {seconds:.2f} s without it; SHA-256 equal; server continued")


def show_serving(app: Application, host_b: Host, root: Path, digest: str) -> None:
    port = app.tell(do="serve_http", root=str(root))["port"]
    url = f"http://{A_USER}:{port}/file"
    curl = shutil.which("curl")
    fetch = "import sys,urllib.request as r,shutil; shutil.copyfileobj(r.urlopen(sys.argv[1]), sys.stdout.buffer)"
    argv = [curl, "-s", "--max-time", "60", url] if curl else [sys.executable, "-c", fetch, url]
    client = host_b.popen(argv, stdout=subprocess.PIPE)
    assert client.stdout is not None
    received = hashlib.sha256()
    while block := client.stdout.read(1 << 20):
        received.update(block)
    expect(client.wait() == 0, f"{argv[0]} ended with status {client.returncode}")
    expect(received.hexdigest() == digest, "what the stock client got from the application differs")
    found(f"{Path(argv[0]).name} on host B downloaded 64 MiB from it: SHA-256 equal")

    port = app.tell(do="serve_udp")["port"]
    count = 0
    with host_b.socket(type=kernel.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((A_USER, port))
        for size in [*range(1, 1400, 7), 1472, 1473, 9000, 60000]:
            data = os.urandom(size)
            sock.send(data)
            expect(sock.recv(65535) == data, f"a UDP datagram of {size} bytes came back changed")
            count += 1
    found(f"{count} UDP datagrams of 1 to 60000 bytes echoed, byte for byte")


def show_death(app: Application, path: Path, host_b: Host) -> None:
    with host_b.socket() as listener:
        listener.bind((B_KERNEL, 0))
        listener.listen(1)
        app.write(json.dumps({"do": "drain", "host": B_KERNEL, "port": listener.getsockname()[1]}))
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            app.read()
            block = bytes(1 << 16)
            for _ in range(200):
                peer.sendall(block)
            app.process.kill()
            start = time.monotonic()
            try:
                while True:
                    peer.sendall(block)
            except (ConnectionResetError, BrokenPipeError):
                waited = time.monotonic() - start
            except TimeoutError:
                raise DemoError("host B's kernel got no RST within 10 s") from None
    app.process.wait()
    found(f"host B's kernel got the RST {waited * 1000:.0f} ms after SIGKILL")
    left: list[str] = []
    for _ in range(50):
        left = leftovers(path)
        if not left:
            break
        time.sleep(0.1)
    expect(not left, f"the server still holds {left}")
    found("the server holds no session, flow, guard entry or channel of it")


def show_comparison(bed: Testbed, paths: dict[str, Path]) -> None:
    table = Table((BLOCKING, SPINNING, IPF), tuple(COLUMN[key] for key in ("tcp1", "udp1", "bulk")))
    budget = Budget(table_s=MEASURE_S, target_s=0.0, cell_s=0.03, bulk_s=0.15, passes=5, least=3)
    with (
        measuring.Pair(bed.hosts["a"], bed.hosts["b"], paths) as ends,
        Progress(TextColumn("   measuring"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar,
    ):
        task = bar.add_task("", total=1.0)
        table.measure(ends, budget, lambda share: bar.update(task, completed=share))
    console.print(demo_view(table.document()))


def run_two_hosts() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ulnet-demo-")))
        folder.chmod(0o755)
        root = folder / "files"
        root.mkdir(mode=0o755)
        digest = make_file(root / "file", FILE_BYTES)
        bed = stack.enter_context(Testbed())
        a, b = bed.host("a"), bed.host("b")
        bed.wire(a, b, a_addr=f"{A_KERNEL}/24", b_addr=f"{B_KERNEL}/24")
        paths = {"a": folder / "a.sock", "b": folder / "b.sock"}

        step(1, f"Host A: the network server owns {A_USER} on {a.interface.name}.")
        server = start_server(a, A_USER, paths["a"])
        expect(A_USER not in addresses(a), f"host A's kernel has {A_USER} itself")
        found(f"host A's kernel has only {', '.join(addresses(a))}")

        app = Application(a, str(paths["a"]))
        step(2, f"An ordinary program ({app.who}) downloads 64 MiB by http.client from a stock http.server on host B.")
        show_download(app, server, b, root, digest)

        step(3, "The same program serves HTTP and answers UDP.")
        show_serving(app, b, root, digest)

        step(4, "The program is killed in the middle of a transfer.")
        show_death(app, paths["a"], b)

        step(5, "Both ends alike, kernel sockets and ulnet in turn (filters and outgoing guard on).")
        other = start_server(b, B_USER, paths["b"])
        show_comparison(bed, paths)
        for one in (server, other):
            status = one.stop()
            expect(status == 0, f"a network server ended with status {status}")


def run_embedded(reason: str) -> None:
    """What needs no privilege at all: the same stack twice in this process, over an in-memory link."""
    from ulnet.demo import embedded

    console.print(f"No two hosts here: {reason}", highlight=False, soft_wrap=True)
    console.print(
        "Running what needs no privilege: two embedded stacks over an in-memory link.", highlight=False, soft_wrap=True
    )
    for line in embedded.run(16 << 20):
        found(line)


def missing_privilege() -> str | None:
    """None when two hosts can be made, by entering a user namespace if it takes one; otherwise the reason."""
    try:
        if ensure_privilege():
            console.print("Not root: everything runs in a user namespace.", highlight=False, soft_wrap=True)
    except (PermissionError, RuntimeError) as refused:
        return getattr(refused, "strerror", None) or str(refused)
    return can_testbed()


def main() -> int:
    try:
        reason = missing_privilege()
        if reason is None:
            run_two_hosts()
        else:
            run_embedded(reason)
    except (DemoError, measuring.MeasureError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"demo: FAILED: {error}", style="bold red", highlight=False, soft_wrap=True)
        return 1
    console.print("demo: ok", highlight=False, soft_wrap=True)
    return 0
