"""Fail when a .pyi file and the compiled module beside it differ (mypy.stubtest), but for what Cython always adds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# Patterns of what is right although stubtest finds it.
ALLOWED = (
    r".*\.__(reduce_cython|setstate_cython|pyx_capi|pyx_unpickle_\w+|test)__",
    # __cinit__ takes the arguments at run time; to a type checker that is __init__.
    r".*\.__init__",
    # Records of a set's inside; Cython has no private classes.
    r"ulnet\.stack\.pollset\.(Part|Entry)",
    # PEP 688: Python has it from 3.12 on, for type checkers it stands in the stub.
    r".*\.__buffer__",
)


def main() -> int:
    names = sorted(
        ".".join(("ulnet", path.parent.name, path.stem))
        for path in Path("ulnet").glob("*/*.pyi")
        if path.with_suffix(".pyx").exists()
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as allowed:
        allowed.write("\n".join(ALLOWED))
        allowed.flush()
        options = ("--concise", "--ignore-unused-allowlist", "--ignore-disjoint-bases", "--allowlist", allowed.name)
        status = subprocess.run([sys.executable, "-m", "mypy.stubtest", *options, *names]).returncode
    print(f"stubs: {len(names)} modules compared" if status == 0 else "stubs: see above")
    return status


if __name__ == "__main__":
    sys.exit(main())
