"""The library's side of the protocol: how a server is found, and what is said when there is none."""

from __future__ import annotations

import os
import socket as ksocket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netserver_bed import ADDRESS, PEER, Bed, wait_for
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import protocol, socket
from ulnet.stack.proxy import Proxy, connect_default

needs_hosts = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("proxy"))
    yield bed
    bed.close()


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Proxy(str(tmp_path / "none"))
    text = str(caught.value)
    assert str(tmp_path / "none") in text and "ulnet netserver" in text and protocol.PATH_VARIABLE in text


def test_a_server_that_died(tmp_path: Path) -> None:
    for name in ("s", "s.fd"):
        with ksocket.socket(ksocket.AF_UNIX, ksocket.SOCK_SEQPACKET) as dead:
            dead.bind(str(tmp_path / name))
    with pytest.raises(ConnectionRefusedError) as caught:
        Proxy(str(tmp_path / "s"))
    assert str(tmp_path / "s") in str(caught.value)


def test_interface_is_checked() -> None:
    with pytest.raises(ValueError, match="ipf, shm, ipc"):
        Proxy("/nowhere", interface="carrier pigeon")


@needs_hosts
class TestDefault:
    def test_one_for_a_process_and_path(self, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(protocol.PATH_VARIABLE, bed.path)
        proxy = connect_default()
        assert connect_default() is proxy and connect_default(bed.path) is proxy
        assert proxy.path == bed.path
        with socket.socket() as sock:
            assert sock.host is proxy
        proxy.shutdown()
        proxy.shutdown()
        again = connect_default()
        assert again is not proxy
        again.shutdown()

    def test_a_child_goes_on_with_it(self, bed: Bed) -> None:
        proxy = connect_default(bed.path)
        with socket.socket(host=proxy) as sock:
            sock.bind(("", 0))
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    if connect_default(bed.path) is proxy:
                        socket.socket(host=proxy).bind(("", 0))  # attaches anew
                        status = 0 if bed.tables()["applications"] == 2 else 2
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            wait_for(lambda: len(bed.sessions()) == 1, "the child's end")  # it took nothing along
        proxy.shutdown()
        bed.expect_empty()


@needs_hosts
@pytest.mark.parametrize("interface", protocol.PACKET_INTERFACES)
def test_packet_interfaces(bed: Bed, interface: str) -> None:
    proxy = bed.proxy(interface=interface)
    with bed.b.socket() as listening:
        listening.bind((PEER, 0))
        listening.listen()
        app = socket.create_connection(listening.getsockname(), 5, host=proxy)
        peer, address = listening.accept()
        assert address[0] == ADDRESS
        peer.settimeout(5)
        app.sendall(b"x" * 100_000)
        got = 0
        while got < 100_000:
            got += len(peer.recv(65536))
        peer.close()
        assert app.recv(1) == b""
        app.close()
    proxy.shutdown()
    bed.expect_empty()


@needs_hosts
def test_descriptors_come_back(bed: Bed) -> None:
    """Attaching and leaving again leaves nothing in this process or in the server."""
    counts = []
    for _ in range(12):
        Proxy(bed.path).shutdown()
        wait_for(lambda: bed.tables()["applications"] == 0 and bed.tables()["tasks"] == 1, "gone")
        counts.append((len(os.listdir("/proc/self/fd")), bed.server_fds()))
    # The server may still be closing one or two of the last one's when it is looked at.
    assert counts[-1][0] <= counts[1][0] and counts[-1][1] <= counts[1][1] + 2, counts
