"""Imports run one way: kernelshim and ipc at the ground, stack above them, netserver above stack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ulnet"
MAY_IMPORT = {
    "kernelshim": {"kernelshim"},
    "ipc": {"ipc"},
    "stack": {"stack", "kernelshim", "ipc"},
    "netserver": {"netserver", "stack", "kernelshim", "ipc"},
}
IMPORT = re.compile(r"^\s*(?:from\s+ulnet\.(\w+)[\w.]*\s+c?import|c?import\s+ulnet\.(\w+))", re.MULTILINE)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_lies_below_it(folder: str) -> None:
    sources = [p for p in (ROOT / folder).iterdir() if p.suffix in (".py", ".pyx", ".pxd", ".pyi")]
    assert sources
    wrong = [
        f"{path.name}: ulnet.{name}"
        for path in sources
        for match in IMPORT.finditer(path.read_text())
        if (name := match[1] or match[2]) not in MAY_IMPORT[folder]
    ]
    assert not wrong
