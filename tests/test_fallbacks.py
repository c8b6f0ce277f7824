"""The demo where there is no root: in a user namespace everything, without even that the embedded part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A user namespace whose limit for further ones is 0 (sysctl user.* are per user namespace), then no capability at all.
NOTHING = (
    "echo 0 > /proc/sys/user/max_user_namespaces && "
    'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"'
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, sys.executable, "-m", "ulnet", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_without_any_privilege_the_embedded_part_runs() -> None:
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs unshare(1) and setpriv(1)")
    if subprocess.run(["unshare", "-Ur", "sh", "-c", NOTHING, "sh", "true"], capture_output=True).returncode:
        pytest.skip("needs a user namespace to give privilege up in")
    done = run("unshare", "-Ur", "sh", "-c", NOTHING, "sh")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("No two hosts here: no user namespace to be had here")
    assert any("SHA-256 equal" in line for line in lines) and lines[-1] == "demo: ok"
    assert done.stderr == ""


def test_an_ordinary_user_gets_a_user_namespace() -> None:
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("needs unshare(1) and setpriv(1)")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    probe = [*become, "unshare", "-Urn", sys.executable, "-c", "import ulnet.stack.engine"]
    if subprocess.run(probe, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("no user namespace to be had here, or this Python is not readable by an ordinary user")
    done = run(*become)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Not root: everything runs in a user namespace."
    assert any("effective capabilities 0x0" in line for line in lines)
    assert any("got the RST" in line for line in lines) and lines[-1] == "demo: ok"
