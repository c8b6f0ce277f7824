"""Fail when Cython has a performance hint: some hot function would check for exceptions or take the GIL."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

DIRECTIVES = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")


def main() -> int:
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(Path("ulnet").glob("*/*.pyx")):
            out = Path(folder) / f"{source.stem}.c"
            options = [word for directive in DIRECTIVES for word in ("-X", directive)]
            command = [sys.executable, "-m", "cython", "-3", "-I", ".", *options, str(source), "-o", str(out)]
            result = subprocess.run(command, capture_output=True, text=True)
            text = result.stdout + result.stderr
            if result.returncode or "performance hint" in text:
                found += 1
                print(text, file=sys.stderr)
    print(f"hints: {found} module(s) with performance hints or errors")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
