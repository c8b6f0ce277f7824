"""What a program built on the package may rely on: C-level interfaces to compile against, stubs, one version, a loud build.

Wheels and sdists are checked by ci/dist.py (make dist), which takes minutes.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ulnet

ROOT = Path(ulnet.__file__).parent.parent

FOREIGN = """
# cython: language_level=3
from libc.stdint cimport uint8_t, uint16_t
from ulnet.kernelshim.link cimport Link, UL_LINK_CSUM
from ulnet.stack.checksum cimport cksum_add, cksum_fold

def checksum(const uint8_t[::1] data):
    cdef uint16_t sum
    with nogil:
        sum = <uint16_t>~cksum_fold(cksum_add(&data[0], data.shape[0], 0))
    return sum.to_bytes(2, "little")

def completes_checksums(Link link):
    return bool(link.ops.features & UL_LINK_CSUM)
"""
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(name="foreign", ext_modules=cythonize([Extension("foreign", ["foreign.pyx"], extra_compile_args=["-O0", "-g0"])]))
"""
USE = """
import foreign
from ulnet.kernelshim.memory import memory_pair
print(foreign.checksum(bytes.fromhex("0001f203f4f5f6f7")).hex(), foreign.completes_checksums(memory_pair(features=1)[0]))
"""


def python(*arguments: str, cwd: Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_foreign_module_compiles_against_the_package(tmp_path: Path) -> None:
    """cimport of the published .pxd files from another project, without this repository's build."""
    pytest.importorskip("Cython")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "foreign.pyx").write_text(FOREIGN)
    (tmp_path / "setup.py").write_text(SETUP)
    built = python("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    used = python("-c", USE, cwd=tmp_path)
    # RFC 1071 (3): the sum of these bytes is ddf2, so the checksum is 220d.
    assert used.stdout.split() == ["220d", "True"], used.stderr


def test_the_build_fails_without_sources(tmp_path: Path) -> None:
    """Links unpacked as text files must not give an empty wheel."""
    pytest.importorskip("Cython")
    if not (ROOT / "setup.py").exists():
        pytest.skip("runs in the repository only")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "ulnet").mkdir()
    (tmp_path / "ulnet" / "stack").write_text("../stack")
    done = python("setup.py", "-q", "build_ext", cwd=tmp_path)
    assert done.returncode != 0 and "no .pyx file" in done.stderr and not list(tmp_path.rglob("*.so"))


def test_every_public_name_of_a_compiled_module_has_a_stub() -> None:
    """In the module's own stub or in that of the module which hands it on; C-level names stand in the .pxd files."""
    folders = [path for path in Path(ulnet.__file__).parent.iterdir() if path.is_dir()]
    stubs = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.pyi"))
    stubbed = set(re.findall(r"^(?:class|def) (\w+)", stubs, re.MULTILINE))
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    names = [
        f"ulnet.{folder.name}.{path.name.partition('.')[0]}"
        for folder in folders
        for path in folder.iterdir()
        if path.name.endswith(suffixes) and path.with_name(path.name.partition(".")[0] + ".pyx").exists()
    ]
    assert len(names) > 20 or not (ROOT / "setup.py").exists()
    bare = [
        f"{name}.{key}"
        for name in names
        for key, value in vars(importlib.import_module(name)).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name and key not in stubbed
    ]
    assert not bare


def test_one_version() -> None:
    done = python("-m", "ulnet", "--version", cwd=ROOT)
    assert done.stdout == f"ulnet {ulnet.__version__}\n"
    if (ROOT / "CHANGELOG.md").exists():
        assert f"\n## {ulnet.__version__}" in (ROOT / "CHANGELOG.md").read_text()
        assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
