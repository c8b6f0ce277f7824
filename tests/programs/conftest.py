"""Fixtures: the two worlds, made once for the folder, and what the servers serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netserver_bed import ADDRESS, PEER
from tests.programs.apps.site import pattern
from tests.programs.harness import Program, Ulnet, World, compare
from ulnet.kernelshim.testbed import can_testbed


@pytest.fixture(scope="package")
def folder() -> Iterator[Path]:
    # Not pytest's tmp_path: its parents are the owner's alone, and stock servers give up their privileges.
    with tempfile.TemporaryDirectory(prefix="ulnet-programs-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="package")
def certificate(folder: Path) -> tuple[Path, Path] | None:
    """A certificate for both hosts, its own authority, and its key; None where openssl is missing."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", "/CN=ulnet test", "-addext", f"subjectAltName=IP:{ADDRESS},IP:{PEER}"]
        + ["-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture(scope="package")
def files(folder: Path) -> Path:
    """A tree of files to serve and to transfer."""
    root = folder / "files"
    (root / "sub" / "deeper").mkdir(parents=True)
    for size in (0, 1, 1448, 70_000, 4 << 20):
        (root / f"f{size}").write_bytes(pattern(size))
    for number in range(20):
        (root / "sub" / f"small{number}").write_bytes(pattern(number * 997))
    (root / "sub" / "deeper" / "big").write_bytes(pattern(3_000_001))
    (root / "sub" / "index.html").write_text("<h1>index</h1>\n")
    (root / "text").write_text("a line of text\n" * 5000)
    return root


@pytest.fixture(scope="package")
def worlds(folder: Path, certificate: tuple[Path, Path] | None) -> Iterator[tuple[World, World]]:
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    kernel = World(folder / "kernel", certificate)
    try:
        # The tests themselves, tested: what differs now differs by nature, or they are wrong.
        again = os.environ.get("ULNET_PROGRAMS") == "kernel"
        ulnet = World(folder / "again", certificate) if again else Ulnet(folder / "ulnet", certificate)
    except BaseException:
        kernel.close()
        raise
    yield kernel, ulnet
    ulnet.close()
    kernel.close()


@pytest.fixture
def equal(worlds: tuple[World, World], files: Path) -> Callable[[Program], None]:
    """``equal(program)``: it does the same in both worlds."""
    return lambda program: compare(program, worlds, files)
