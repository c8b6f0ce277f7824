"""What programs built on the package rely on: C-level interfaces to compile against, stubs, one version, a loud build.

Wheels and sdists are checked by ci/dist.py (make dist), which takes minutes.
"""

from __future__ import annotations

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
setup(name="foreign", ext_modules=cythonize([Extension("foreign", ["foreign.pyx"], extra_compile_args=["-O0"])]))
"""
USE = """
import foreign
from ulnet.kernelshim.memory import memory_pair
print(foreign.checksum(bytes.fromhex("0001f203f4f5f6f7")).hex())
print(foreign.completes_checksums(memory_pair(features=1)[0]))
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


def test_every_compiled_module_that_python_imports_has_a_stub() -> None:
    """The others are C-level: their .pxd says it all."""
    package = Path(ulnet.__file__).parent
    folders = [path for path in package.iterdir() if path.is_dir()]
    compiled = {
        f"ulnet.{folder.name}.{path.name.partition('.')[0]}": folder / path.name.partition(".")[0]
        for folder in folders
        for path in folder.iterdir()
        if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    }
    assert len(compiled) > 20
    readers = [*package.glob("*.py"), *(path for folder in folders for path in folder.glob("*.py"))]
    readers += [path for name in ("tests", "bench", "examples") for path in (ROOT / name).glob("*.py")]
    pattern = re.compile(r"^\s*from (ulnet[\w.]*) import ([^(\n]*|\([^)]*\))", re.MULTILINE)
    imported = set()
    for path in readers:
        for module, names in pattern.findall(path.read_text()):
            imported |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))}
    assert "ulnet.stack.engine" in imported
    missing = [name for name in sorted(imported & compiled.keys()) if not compiled[name].with_suffix(".pyi").exists()]
    assert not missing


def test_one_version() -> None:
    done = python("-m", "ulnet", "--version", cwd=ROOT)
    assert done.stdout == f"ulnet {ulnet.__version__}\n"
    if (ROOT / "CHANGELOG.md").exists():
        assert f"\n## {ulnet.__version__}" in (ROOT / "CHANGELOG.md").read_text()
        assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
