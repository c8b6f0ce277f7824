"""Build the sdist and, from it, the wheel, into dist/; check what they hold and use the wheel in a fresh environment.

A wheel without compiled modules builds without an error when the sources are missing from the sdist.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import ulnet

OUT = Path("dist")
# A user's program, run where the repository cannot be seen.
ECHO = """
import threading
from ulnet.stack import embedded, socket
a, b = embedded.pair()
with a, b, socket.create_server(("", 7), host=b) as listener:
    def echo():
        sock, _ = listener.accept()
        with sock:
            while data := sock.recv(65536):
                sock.sendall(data)
    thread = threading.Thread(target=echo)
    thread.start()
    with socket.create_connection((b.engine.meta.addr, 7), timeout=10, host=a) as sock:
        sock.sendall(bytes(100_000) + b"end")
        got = b""
        while not got.endswith(b"end"):
            got += sock.recv(65536)
        assert got == bytes(100_000) + b"end"
    thread.join()
import ulnet.netserver.server, ulnet.demo.run, ulnet.table.run
print("dist: 100,003 bytes echoed between two embedded stacks")
"""


def wanted(*suffixes: str) -> set[str]:
    """Files of the package in the repository, by their names in it."""
    folders = ("ulnet", "ulnet/demo", "ulnet/table", "ulnet/kernelshim", "ulnet/ipc", "ulnet/stack", "ulnet/netserver")
    return {str(path) for folder in folders for path in Path(folder).iterdir() if path.name.endswith(suffixes)}


def lacks(archive: str, needed: set[str], names: set[str]) -> bool:
    """Say what is not there."""
    missing = sorted(needed - names)
    if missing:
        print(f"dist: {archive} lacks {', '.join(missing)}", file=sys.stderr)
    return bool(missing)


def check_sdist(sdist: Path) -> bool:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    links = [member.name for member in members if not (member.isreg() or member.isdir())]
    if links:
        print(f"dist: {sdist.name} holds links, which some unpackers spoil: {', '.join(links)}", file=sys.stderr)
    needed = wanted(".py", ".pyx", ".pxd", ".pyi", ".h", "py.typed")
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/test_wire.py"}
    return not lacks(sdist.name, needed, names) and not links


def check_wheel(wheel: Path) -> bool:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    # ulnet/stack/x.cpython-311-x86_64-linux-gnu.so -> ulnet/stack/x.pyx
    names |= {name.partition(".")[0] + ".pyx" for name in names if name.endswith(".so")}
    return not lacks(wheel.name, wanted(".py", ".pyx", ".pxd", ".pyi", ".h", "py.typed"), names)


def use_wheel(wheel: Path) -> None:
    # With the repository on its path, pip would find ulnet installed there already.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-I", "-m", "pip", "install", "-q", wheel.resolve()], check=True, env=environment)
        subprocess.run([python, "-I", "-c", ECHO], check=True, cwd=folder, env=environment, timeout=60)
        said = subprocess.run(
            [python.with_name("ulnet"), "--version"],
            check=True,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
        print(f"dist: ulnet --version says {said.strip()}")
        if said != f"ulnet {ulnet.__version__}\n":
            raise SystemExit("dist: that is not the version of the source")


def main() -> int:
    stem = f"ulnet-{ulnet.__version__}"
    for old in [*OUT.glob(f"{stem}-*.whl"), *OUT.glob(f"{stem}.tar.gz")]:
        old.unlink()
    # Without --wheel or --sdist, build makes the wheel from the sdist it has just made.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", OUT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        print("dist: the build failed, see above", file=sys.stderr)
        return 1
    (sdist,) = OUT.glob(f"{stem}.tar.gz")
    (wheel,) = OUT.glob(f"{stem}-*.whl")
    if not check_sdist(sdist) or not check_wheel(wheel):
        return 1
    use_wheel(wheel)
    print(f"dist: {sdist} and {wheel} are good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
