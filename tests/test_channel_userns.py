"""The channel tests once more without any privilege: inside a user namespace, where eBPF may not be used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ulnet.kernelshim import bpf

HERE = Path(__file__).parent
NOBODY = 65534


def run(*command: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=HERE.parent,
        user=user,
        group=user,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(HERE.parent)},
    )


@pytest.mark.parametrize("user", [None, NOBODY], ids=["same-user", "nobody"])
def test_everything_works_in_a_user_namespace(user: int | None) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    try:
        probe = run("unshare", "-Urn", sys.executable, "-c", "import ulnet.kernelshim.demux", user=user)
    except OSError as refused:  # its files are not ours to read, or there is no such user in a user namespace
        pytest.skip(f"cannot start as that user: {refused}")
    if probe.returncode != 0:
        pytest.skip(f"no user namespace, or this Python is not readable there: {probe.stderr.strip()[-200:]}")
    done = run(
        "unshare",
        "-Urn",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_channel_demux.py",
        "tests/test_channel_ring.py",
        user=user,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout[-4000:]


def test_without_privilege_there_is_one_clear_line() -> None:
    """No user namespace at all: a process whose capabilities are dropped."""
    program = (
        "from ipaddress import IPv4Address as A\n"
        "from ulnet.kernelshim.channel import open_embedded\n"
        "from ulnet.kernelshim.demux import Demux\n"
        "for call in (lambda: open_embedded('lo', A('10.9.0.9')), lambda: Demux('lo', A('10.9.0.9')),\n"
        "             lambda: Demux('lo', A('10.9.0.9'), ebpf=True)):\n"
        "    try: call()\n"
        "    except PermissionError as refused: print(refused.errno, refused.strerror)\n"
    )
    drop = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    if drop and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv(1) to drop capabilities")
    done = run(*drop, sys.executable, "-c", program)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "1 a packet socket needs CAP_NET_RAW" in lines[0] and lines[0] == lines[1]
    assert lines[2].startswith("1 eBPF needs CAP_BPF") or bpf.available()


def test_bpf_tells_whether_it_may_be_used() -> None:
    assert isinstance(bpf.available(), bool)
    if bpf.available():
        table = bpf.Hash(4, 4, 8)
        table.update_batch([(bytes([n, 0, 0, 0]), bytes(4)) for n in range(5)])
        assert sorted(key[0] for key in table.every_key()) == [0, 1, 2, 3, 4]
        table.delete(b"\2\0\0\0")
        assert table.lookup(b"\2\0\0\0") is None and table.lookup(b"\1\0\0\0") == bytes(4)
        with pytest.raises(KeyError):
            table.delete(b"\2\0\0\0")
        table.close()
        with pytest.raises(OSError, match="verifier"):
            refused = bpf.ExtendedProgram()
            refused.load(4, 0, 3, 0)
            refused.exit()
            bpf.load_socket_filter(refused)
