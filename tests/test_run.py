"""``ulnet run``: a program sees what python(1) would show it, and its traffic goes by ulnet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import certificates
from tests.netserver_bed import ADDRESS, PEER, Bed, read_line
from ulnet.kernelshim.testbed import can_testbed

ROOT = Path(__file__).parent.parent
RUN = [sys.executable, "-m", "ulnet", "run"]
SHOW = """
import sys, os, runpy
print(__name__, sys.argv, repr(sys.path[0]), globals().get("__file__"), __spec__ and __spec__.name, __doc__)
print(sorted(k for k in globals() if k.startswith("__")), __package__, sys.modules["__main__"].__dict__ is globals())
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else "said by the program")
"""
needs_hosts = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("run"))
    yield bed
    bed.close()


def environment(bed: Bed | None = None) -> dict[str, str]:
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    return found | {"ULNET_SERVER": bed.path} if bed else found


def start(bed: Bed, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """A program on ulnet, in the network server's namespace."""
    process = bed.a.popen(
        [*RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(bed), cwd=cwd
    )
    bed.programs.append(process)
    return process


def finish(process: subprocess.Popen[bytes]) -> tuple[str, str, int]:
    out, err = process.communicate(timeout=30)
    return out.decode(), err.decode(), process.returncode


@needs_hosts
class TestAsPython:
    """Each is run by python and by ulnet run; output, errors and status are the same."""

    def same(self, bed: Bed, folder: Path, arguments: Sequence[str]) -> tuple[str, str, int]:
        python = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(bed),
            cwd=folder,  # type: ignore[call-overload]
        )
        expected = finish(python)
        assert finish(start(bed, *arguments, cwd=folder)) == expected
        return expected

    @pytest.mark.parametrize("kind", ["script", "relative", "module", "package", "folder", "zip", "code"])
    def test_what_a_program_sees(self, bed: Bed, tmp_path: Path, kind: str) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "shown.py").write_text('"doc"\n' + SHOW)
        (tmp_path / "pack").mkdir()
        (tmp_path / "pack" / "__init__.py").write_text("")
        (tmp_path / "pack" / "__main__.py").write_text(SHOW)
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr("__main__.py", SHOW)
        run = {
            "script": [str(tmp_path / "sub" / "shown.py")],
            "relative": ["sub/shown.py"],
            "module": ["-m", "sub.shown"],
            "package": ["-m", "pack"],
            "folder": ["pack"],
            "zip": ["all.zip"],
            "code": ["-c", SHOW],
        }[kind]
        more = [] if kind == "relative" else ["7", "-m", "x", "--server", "y"]
        out, err, status = self.same(bed, tmp_path, [*run, *more])
        assert "__main__" in out and (status, err) == ((7, "") if more else (1, "said by the program\n"))

    @pytest.mark.parametrize("run", [["fail.py"], ["-m", "fail"]], ids=["script", "module"])
    def test_traceback(self, bed: Bed, tmp_path: Path, run: list[str]) -> None:
        (tmp_path / "fail.py").write_text("def f():\n    raise ValueError('of the program')\nf()\n")
        out, err, status = finish(start(bed, *run, cwd=tmp_path))
        assert (out, status) == ("", 1)
        lines = err.splitlines()
        assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ValueError: of the program"
        assert [line for line in lines if "File" in line and "fail.py" not in line] == []

    @pytest.mark.parametrize(
        "code",
        ["x = (", "import no_such_module", "import os; os.abort()", "raise SystemExit", "import os; os._exit(5)"],
    )
    def test_ends(self, bed: Bed, tmp_path: Path, code: str) -> None:
        (tmp_path / "end.py").write_text(code)
        self.same(bed, tmp_path, ["end.py"])

    def test_no_such_module(self, bed: Bed, tmp_path: Path) -> None:
        out, err, status = finish(start(bed, "-m", "no.such.module", cwd=tmp_path))
        assert status == 1 and "no.such.module" in err and err.count("\n") == 1

    def test_interrupt(self, bed: Bed, tmp_path: Path) -> None:
        code = "import atexit, time; atexit.register(print, 'at exit'); print('up', flush=True); time.sleep(30)"
        program = start(bed, "-c", code)
        assert read_line(program) == "up"
        program.send_signal(signal.SIGINT)
        out, err, status = finish(program)
        assert out == "at exit\n" and status == -signal.SIGINT
        assert err.splitlines()[-1] == "KeyboardInterrupt" and "run.py" not in err

    def test_broken_pipe_is_the_programs_own(self, bed: Bed) -> None:
        _, err, status = finish(start(bed, "-c", "raise BrokenPipeError('mine')"))
        assert status == 1 and "BrokenPipeError: mine" in err


@needs_hosts
class TestTraffic:
    def test_client_and_server(self, bed: Bed, tmp_path: Path) -> None:
        """http.server and urllib unchanged, each against a stock peer."""
        (tmp_path / "blob").write_bytes(os.urandom(1_000_000))
        server = start(bed, "-m", "http.server", "8001", cwd=tmp_path)
        stock = bed.b.popen(
            [sys.executable, "-u", "-m", "http.server", "8002", "--bind", PEER],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        bed.programs.append(stock)
        assert "8002" in read_line(stock)
        code = (
            "import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=5).read())"
        )
        client = start(bed, "-c", code, f"http://{PEER}:8002/blob")
        out, err = client.communicate(timeout=20)
        assert out == (tmp_path / "blob").read_bytes(), err
        get = [sys.executable, "-c", code, f"http://{ADDRESS}:8001/blob"]
        got = bed.b.popen(get, stdout=subprocess.PIPE, env=environment())
        assert got.communicate(timeout=20)[0] == (tmp_path / "blob").read_bytes()
        server.kill()
        stock.kill()

    @pytest.mark.skipif(certificates.missing() is not None, reason=str(certificates.missing()))
    def test_https(self, bed: Bed, tmp_path: Path) -> None:
        """HTTPSConnection and a TLS server, each against the standard modules on the kernel's side."""
        pem = certificates.make(tmp_path, PEER, ADDRESS)
        (tmp_path / "serve.py").write_text(
            "import http.server, ssl, sys\n"
            "class Handler(http.server.SimpleHTTPRequestHandler):\n"
            "    protocol_version = 'HTTP/1.1'\n"
            "    def log_message(self, *_): pass\n"
            "server = http.server.ThreadingHTTPServer((sys.argv[1], 8443), Handler)\n"
            "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
            "context.load_cert_chain(sys.argv[2])\n"
            "server.socket = context.wrap_socket(server.socket, server_side=True)\n"
            "print('up', flush=True)\n"
            "server.serve_forever()\n"
        )
        (tmp_path / "get.py").write_text(
            "import http.client, ssl, sys, urllib.request\n"
            "context = ssl.create_default_context(cafile=sys.argv[2])\n"
            "connection = http.client.HTTPSConnection(sys.argv[1], 8443, timeout=10, context=context)\n"
            "for path in ('/blob', '/get.py', '/blob'):\n"
            "    connection.request('GET', path)\n"
            "    data = connection.getresponse().read()\n"
            "    assert data == open(path[1:], 'rb').read(), len(data)\n"
            "kind = type(connection.sock).__module__\n"
            "url = f'https://{sys.argv[1]}:8443/blob'\n"
            "assert urllib.request.urlopen(url, timeout=10, context=context).read() == open('blob', 'rb').read()\n"
            "print(kind)\n"
        )
        (tmp_path / "blob").write_bytes(os.urandom(1_000_000))
        serve, get = (str(tmp_path / name) for name in ("serve.py", "get.py"))
        server = start(bed, serve, "", str(pem), cwd=tmp_path)
        stock = bed.b.popen([sys.executable, serve, PEER, str(pem)], stdout=subprocess.PIPE, cwd=tmp_path)
        bed.programs.append(stock)
        assert read_line(server) == read_line(stock) == "up"
        assert finish(start(bed, get, PEER, str(pem), cwd=tmp_path)) == ("ulnet.stack.tls\n", "", 0)
        got = bed.b.popen([sys.executable, get, ADDRESS, str(pem)], stdout=subprocess.PIPE, cwd=tmp_path)
        assert got.communicate(timeout=20)[0] == b"ssl\n" and got.returncode == 0
        server.kill()
        stock.kill()

    def test_children(self, bed: Bed, tmp_path: Path) -> None:
        """multiprocessing in its three ways, a manager on loopback, subprocess, os.fork: all on ulnet."""
        (tmp_path / "many.py").write_text(
            "import multiprocessing, os, socket, subprocess, sys\n"
            "def ask(queue, address):\n"
            "    with socket.create_connection(address, 5) as sock:\n"
            "        queue.put((sock.getsockname()[0], sock.recv(9)))\n"
            "if __name__ == '__main__':\n"
            "    address = (sys.argv[1], int(sys.argv[2]))\n"
            "    for method in ('spawn', 'forkserver', 'fork'):\n"
            "        context = multiprocessing.get_context(method)\n"
            "        queue = context.Queue()\n"
            "        child = context.Process(target=ask, args=(queue, address))\n"
            "        child.start()\n"
            "        print(method, *queue.get(timeout=20))\n"
            "        child.join()\n"
            "    code = 'import socket, sys; sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5);'\n"
            "    code += 'print(\"subprocess\", sock.getsockname()[0], sock.recv(9))'\n"
            "    sys.stdout.flush()\n"
            "    subprocess.check_call([sys.executable, '-c', code, *sys.argv[1:]])\n"
            "    from multiprocessing.managers import BaseManager\n"
            "    with BaseManager(('127.0.0.1', 0)) as manager:\n"
            "        print('manager', manager.address[0])\n"
            "    sys.stdout.flush()\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            "        print('os.fork', socket.create_connection(address, 5).getsockname()[0], flush=True)\n"
            "        os._exit(0)\n"
            "    os.waitpid(pid, 0)\n"
        )
        listener = bed.b.popen(
            [
                *(sys.executable, "-u", "-c"),
                "import socket, sys\n"
                "listener = socket.create_server((sys.argv[1], 0)); print(listener.getsockname()[1])\n"
                "while True: listener.accept()[0].sendall(b'hello')",
                PEER,
            ],
            stdout=subprocess.PIPE,
        )
        bed.programs.append(listener)
        program = start(bed, str(tmp_path / "many.py"), PEER, read_line(listener))
        out, err, status = finish(program)
        assert status == 0, err
        hello = f"{ADDRESS} b'hello'"
        assert out.splitlines() == [
            *(f"{method} {hello}" for method in ("spawn", "forkserver", "fork", "subprocess")),
            "manager 127.0.0.1",
            f"os.fork {ADDRESS}",
        ]
        listener.kill()

    def test_sitecustomize_is_chained(self, bed: Bed, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.chained = __file__\n")
        code = (
            "import os, subprocess, sys; os.environ['PYTHONPATH'] += os.pathsep + sys.argv[1]\n"
            "subprocess.run([sys.executable, '-c', 'import sitecustomize, socket;"
            " print(chained == sitecustomize.__file__, socket.socket.__mro__[1].__module__)'])"
        )
        assert finish(start(bed, "-c", code, str(tmp_path)))[0] == "True ulnet.stack.socket\n"


def test_other_commands_are_not_patched(tmp_path: Path) -> None:
    """A network server started by a patched program uses the kernel's sockets."""
    code = (
        "import socket, ulnet.patch; from ulnet.cli import main; before = socket.socket.__mro__[1].__module__\n"
        "try: main(['sessions', '--socket', '/nowhere'])\n"
        "except SystemExit: print(before, socket.socket.__mro__[1].__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, env=environment())
    assert done.stdout == "ulnet.stack.socket _socket\n"


class TestMistakes:
    def fail(self, *arguments: str) -> str:
        done = subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=20, env=environment())
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("ulnet run: ")
        return line

    def test_no_server(self, tmp_path: Path) -> None:
        line = self.fail("--server", str(tmp_path / "none"), "-c", "print('never')")
        assert f"no network server at {tmp_path / 'none'}" in line and "ulnet netserver" in line

    def test_patch_without_server(self, tmp_path: Path) -> None:
        code = "import ulnet.patch, socket; socket.socketpair(); socket.create_connection(('10.0.0.1', 80))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=20,
            env=environment() | {"ULNET_SERVER": str(tmp_path / "none")},
        )
        line = done.stderr.splitlines()[-1]
        assert line.startswith("FileNotFoundError") and f"no network server at {tmp_path / 'none'}" in line

    def test_no_file(self, tmp_path: Path) -> None:
        assert str(tmp_path / "none.py") in self.fail(str(tmp_path / "none.py"))

    def test_usage(self) -> None:
        done = subprocess.run(RUN, capture_output=True, text=True, timeout=20, env=environment())
        assert done.returncode == 2 and "program" in done.stderr
        done = subprocess.run([*RUN, "--help"], capture_output=True, text=True, timeout=20, env=environment())
        assert done.returncode == 0 and "--server PATH" in done.stdout and "-m" in done.stdout
