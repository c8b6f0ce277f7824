"""Build sdist, then the wheel from the sdist, and check that the wheel holds every compiled module.

A wheel without compiled modules builds without an error when the sources are missing from the sdist.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path


def main() -> int:
    wanted = {path.stem for path in Path("ulnet").glob("*/*.pyx")}
    with tempfile.TemporaryDirectory() as folder:
        # Without --wheel or --sdist, build makes the wheel from the sdist it has just made.
        subprocess.run([sys.executable, "-m", "build", "--outdir", folder], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        compiled = {name.split("/")[-1].split(".")[0] for name in names if name.endswith(".so")}
        missing = wanted - compiled
        if missing:
            print(f"dist: {wheel.name} lacks {sorted(missing)}", file=sys.stderr)
            return 1
        for needed in ("ulnet/py.typed", "ulnet/stack/engine.pyi", "ulnet/stack/engine.pxd"):
            if needed not in names:
                print(f"dist: {wheel.name} lacks {needed}", file=sys.stderr)
                return 1
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
        subprocess.run(
            [python, "-c", "import ulnet.stack.socket, ulnet.netserver.server; print('dist: imports from the wheel')"],
            check=True,
            cwd=folder,
        )
        print(f"dist: {wheel.name} holds {len(compiled)} compiled modules")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
