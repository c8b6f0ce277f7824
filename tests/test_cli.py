"""The command line: every mistake gives one clear line and a non-zero exit; the tables show what is there."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netserver_bed import ADDRESS, PEER, Bed, read_line
from ulnet.kernelshim.testbed import Testbed, can_testbed
from ulnet.netserver import preflight

needs_hosts = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))
CLI = [sys.executable, "-m", "ulnet.cli"]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("cli"))
    yield bed
    bed.close()


def refused(bed: Bed, *arguments: str) -> str:
    """Run ``ulnet netserver`` that must fail at once with one line; that line."""
    process = bed.a.popen([*CLI, "netserver", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and out == b"", (process.returncode, out, err)
    lines = err.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ulnet netserver: "), err.decode()
    return lines[0]


@pytest.mark.parametrize(
    "address",
    ["10.77.0/24", "10.77.0.300/24", "10.77.0.11/33", "fe80::1/64", "224.0.0.1/24", "10.77.0.0/24", "127.0.0.1/8", ""],
)
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(preflight.SetupError) as caught:
        preflight.parse_address(address)
    assert repr(address) in str(caught.value) and "\n" not in str(caught.value)


def test_addresses_as_they_should_be() -> None:
    assert str(preflight.parse_address("10.77.0.11/24")) == "10.77.0.11/24"
    assert str(preflight.parse_address("10.77.0.0/31")) == "10.77.0.0/31"  # RFC 3021: no network address there


@pytest.mark.parametrize("gateway", ["10.78.0.1", "nowhere", "10.77.0.11", "::1"])
def test_gateway_must_be_a_neighbour(gateway: str) -> None:
    address = preflight.parse_address("10.77.0.11/24")
    assert preflight.parse_gateway("10.77.0.1", address) == "10.77.0.1"
    with pytest.raises(preflight.SetupError, match=gateway):
        preflight.parse_gateway(gateway, address)


def test_socket_paths(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(preflight.SetupError, match=str(tmp_path / "f")):
        preflight.check_socket_path(str(tmp_path / "f" / "s"))
    with pytest.raises(preflight.SetupError, match="too long"):
        preflight.check_socket_path("/tmp/" + "x" * 120)
    with pytest.raises(preflight.SetupError, match="cannot make /proc/none"):
        preflight.check_socket_path("/proc/none/s")
    preflight.check_socket_path(str(tmp_path / "new" / "s"))
    assert (tmp_path / "new").is_dir()


@needs_hosts
class TestNetserverRefuses:
    def test_no_such_interface(self, bed: Bed, tmp_path: Path) -> None:
        line = refused(bed, "--interface", "eth7", "--address", "10.77.0.11/24", "--socket", str(tmp_path / "s"))
        assert "'eth7'" in line and "eth0" in line

    def test_loopback_is_no_ethernet(self, bed: Bed) -> None:
        with pytest.raises(preflight.SetupError, match="not an Ethernet"):
            bed.a.call(preflight.find_interface, "lo")

    def test_malformed_address(self, bed: Bed, tmp_path: Path) -> None:
        line = refused(bed, "--interface", "eth0", "--address", "10.77.0.11", "--socket", str(tmp_path / "s"))
        assert "'10.77.0.11'" in line and "/24" in line

    def test_address_of_the_kernel(self, bed: Bed, tmp_path: Path) -> None:
        bed.a.interface.add_address("10.88.0.1/24")
        try:
            line = refused(bed, "--interface", "eth0", "--address", "10.88.0.1/24", "--socket", str(tmp_path / "s"))
            assert "kernel's own" in line and "eth0" in line
        finally:
            with bed.a.netlink() as ip:
                ip.addr("del", index=bed.a.interface.index, address="10.88.0.1", prefixlen=24)

    def test_address_already_served(self, bed: Bed, tmp_path: Path) -> None:
        line = refused(bed, "--interface", "eth0", "--address", f"{ADDRESS}/24", "--socket", str(tmp_path / "s"))
        assert ADDRESS in line and "already served" in line

    def test_address_in_use_on_the_wire(self, bed: Bed, tmp_path: Path) -> None:
        line = refused(bed, "--interface", "eth0", "--address", f"{PEER}/24", "--socket", str(tmp_path / "s"))
        assert bed.b.mac.hex(":") in line
        assert list(tmp_path.iterdir()) == []  # nothing stays behind a refusal

    def test_path_already_served(self, bed: Bed) -> None:
        line = refused(bed, "--interface", "eth0", "--address", "10.77.0.11/24", "--socket", bed.path, "--no-probe")
        assert "already served" in line and bed.path in line

    def test_path_is_a_file(self, bed: Bed, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("precious")
        line = refused(bed, "--interface", "eth0", "--address", "10.77.0.11/24", "--socket", str(tmp_path / "s"))
        assert "not a socket" in line and (tmp_path / "s").read_text() == "precious"

    def test_without_privilege(self, bed: Bed, tmp_path: Path) -> None:
        drop = (
            "import ctypes, sys; from ulnet import cli;"
            "libc = ctypes.CDLL(None);"
            "[libc.prctl(24, c, 0, 0, 0) for c in range(41)];"  # PR_CAPBSET_DROP, for the exec below
            "import os; os.execv(sys.executable, [sys.executable, '-m', 'ulnet.cli', *sys.argv[1:]])"
        )
        arguments = ["netserver", "--interface", "eth0", "--address", "10.77.0.11/24", "--socket", str(tmp_path / "s")]
        process = bed.a.popen([sys.executable, "-c", drop, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 1 and err.decode().count("\n") == 1
        assert "no privilege" in err.decode() and "CAP_NET_ADMIN" in err.decode()


@needs_hosts
def test_serve_and_end(tmp_path: Path) -> None:
    """The ready line, a world-connectable socket, a clean end with status 0, and the address free for the next one."""
    with Testbed() as testbed:
        a, b = testbed.host("cli_a"), testbed.host("cli_b")
        testbed.wire(a, b, b_addr="10.77.0.2/24")
        path = tmp_path / "sub" / "s"
        for number in (signal.SIGTERM, signal.SIGINT):
            server = a.popen(
                [*CLI, "netserver", "--interface", "eth0", "--address", "10.77.0.10/24", "--socket", str(path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert read_line(server) == f"ulnet: serving 10.77.0.10/24 on eth0 at {path}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
            assert path.parent.stat().st_mode & 0o755 == 0o755
            with b.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:  # answers ARP, and refuses
                sock.settimeout(5)
                with pytest.raises(ConnectionRefusedError):
                    sock.connect(("10.77.0.10", 9))
            server.send_signal(number)
            assert server.wait(10) == 0, server.stderr and server.stderr.read()
            assert list(path.parent.iterdir()) == []


@needs_hosts
class TestLooking:
    def test_sessions(self, bed: Bed) -> None:
        program = bed.program(
            "s = socket.create_server(('', 7001)); print('up', flush=True); c, _ = s.accept(); c.send(c.recv(9))\n"
            "print('done', flush=True); sys.stdin.read()"
        )
        assert read_line(program) == "up"
        with bed.b.socket() as peer:
            peer.settimeout(5)
            peer.connect((ADDRESS, 7001))
            peer.send(b"abc")
            assert peer.recv(9) == b"abc"
            assert read_line(program) == "done"
            rows = json.loads(self.run(bed, "sessions", "--json"))
            listener = next(r for r in rows if r["state"] == "LISTEN")
            assert listener["local"] == f"{ADDRESS}:7001" and listener["remote"] is None
            row = next(r for r in rows if r["state"] == "ESTABLISHED")
            assert row["proto"] == "tcp"
            assert row["remote"] == "{}:{}".format(*peer.getsockname())
            assert row["owner"]["pid"] == program.pid and row["owner"]["name"].startswith("python")
            assert (row["bytes_in"], row["bytes_out"], row["retransmits"]) == (3, 3, 0)
            assert 0 < row["srtt_ns"] < 1e9
            text = self.run(bed, "sessions")
            assert f"{ADDRESS}:7001" in text and "ESTABLISHED" in text and str(program.pid) in text
            counters = self.run(bed, "counters")
            assert "tables.sessions 1\n" in counters
        program.kill()
        program.wait()
        bed.expect_empty()

    @staticmethod
    def run(bed: Bed, *arguments: str) -> str:
        # by the environment variable, without any privilege over the server's namespace
        environment = os.environ | {"ULNET_SERVER": bed.path}
        done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=20, env=environment)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout


@pytest.mark.parametrize("command", ["sessions", "counters"])
def test_no_server(tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [*CLI, command, "--socket", str(tmp_path / "none")], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ulnet {command}: no network server at {tmp_path / 'none'}") and "ulnet netserver" in line


def test_usage() -> None:
    done = subprocess.run([*CLI, "netserver"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "--interface" in done.stderr
