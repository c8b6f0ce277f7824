"""Names under the patch: by the host's files, then by a name server on the peer that only ulnet reaches."""

from __future__ import annotations

import importlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.netserver_bed import PEER, Bed, read_line
from ulnet.kernelshim.testbed import can_testbed

pytest.importorskip("dns.resolver", reason="dnspython is not installed")
pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))

SERVER = str(Path(__file__).parent / "dns_server.py")
HOSTS = """
127.0.0.1 localhost
192.0.2.50  Fifty.example.test fifty  # a comment
192.0.2.51  fifty
2001:db8::50 fifty
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("names"))
    yield bed
    bed.close()


class Questions:
    """What the name server was asked."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __call__(self) -> list[str]:
        lines = []
        while select.select([self.process.stdout], [], [], 0.02)[0]:
            lines.append(read_line(self.process))
        return lines


@pytest.fixture(scope="module")
def dns_server(bed: Bed) -> Iterator[Questions]:
    process = bed.b.popen([sys.executable, SERVER, PEER, "53"], stdout=subprocess.PIPE)
    assert read_line(process) == "ready"
    yield Questions(process)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def patched(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The whole module runs patched, in this process; its name server cannot be reached by this process's kernel."""
    from ulnet.stack import resolve
    from ulnet.stack import socket as ours

    folder = tmp_path_factory.mktemp("etc")
    (folder / "hosts").write_text(HOSTS)
    (folder / "resolv.conf").write_text(f"nameserver {PEER}\nsearch nowhere.test example.test\noptions timeout:1\n")
    patch = importlib.import_module("ulnet.patch")  # which patches
    patch.undo()
    patch.install(children=False)
    before = resolve.HOSTS, resolve.RESOLV_CONF
    resolve.HOSTS, resolve.RESOLV_CONF = str(folder / "hosts"), str(folder / "resolv.conf")
    ours.set_default_host(bed.proxy())
    yield resolve
    ours.set_default_host(None)
    resolve.HOSTS, resolve.RESOLV_CONF = before
    patch.undo()


@pytest.fixture
def asked(dns_server: Questions, patched: ModuleType) -> Questions:
    dns_server()  # forget what others asked
    return dns_server


def addresses(*arguments: object, **options: object) -> list[str]:
    return [row[4][0] for row in socket.getaddrinfo(*arguments, type=socket.SOCK_STREAM, **options)]  # type: ignore


def test_by_dns(asked: Questions) -> None:
    assert sorted(addresses("a.example.test", 80)) == ["192.0.2.1", "192.0.2.2"]
    assert asked() == ["udp a.example.test. A"]
    assert addresses("a.example.test", 80, family=socket.AF_INET6) == ["2001:db8::1"]
    assert asked() == ["udp a.example.test. AAAA"]
    rows = socket.getaddrinfo("A.Example.test.", 80, flags=socket.AI_CANONNAME)
    assert {row[:3] for row in rows} == {
        (socket.AF_INET, kind, proto) for kind, proto in ((1, 6), (2, 17), (3, 0))
    } and rows[0][3].lower() == "a.example.test"


def test_truncated(asked: Questions) -> None:
    assert len(addresses("big.example.test", 80)) == 200
    assert asked() == ["udp big.example.test. A", "tcp big.example.test. A"]


def test_search_list(asked: Questions) -> None:
    assert socket.gethostbyname("a") in ("192.0.2.1", "192.0.2.2")
    assert asked() == ["udp a.nowhere.test. A", "udp a.example.test. A"]


def test_alias(asked: Questions) -> None:
    name, others, found = socket.gethostbyname_ex("alias.example.test")
    assert (name, others, sorted(found)) == ("a.example.test", ["alias.example.test"], ["192.0.2.1", "192.0.2.2"])
    rows = socket.getaddrinfo("alias.example.test", None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    assert [row[3] for row in rows] == ["a.example.test", ""]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("none.example.test", socket.EAI_NONAME),
        ("six.example.test", socket.EAI_NODATA),
        ("fail.example.test", socket.EAI_AGAIN),
        ("", socket.EAI_NONAME),
        ("x" * 63 + "." + ".".join(["y" * 63] * 4), socket.EAI_NONAME),
    ],
)
def test_failures(asked: Questions, name: str, code: int) -> None:
    with pytest.raises(socket.gaierror) as caught:
        socket.getaddrinfo(name, 80)
    assert caught.value.errno == code and caught.value.strerror


def test_no_answer(asked: Questions, patched: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second (options timeout:1 attempts:1), then EAI_AGAIN."""
    (tmp_path / "resolv.conf").write_text(f"nameserver {PEER}\noptions timeout:1 attempts:1\n")
    monkeypatch.setattr(patched, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    started = time.monotonic()
    with pytest.raises(socket.gaierror) as caught:
        socket.getaddrinfo("silent.example.test", 80)
    assert caught.value.errno == socket.EAI_AGAIN
    assert 0.9 < time.monotonic() - started < 5
    assert set(asked()) == {"udp silent.example.test. A"}


def test_files_come_first(asked: Questions) -> None:
    assert addresses("fifty", 80) == ["192.0.2.50", "192.0.2.51"]
    assert addresses("FIFTY.example.test", 80) == ["192.0.2.50"]
    assert addresses("fifty", 80, family=socket.AF_INET6) == ["2001:db8::50"]
    assert addresses("localhost", 80) == ["127.0.0.1"] and addresses("x.localhost", 80) == ["127.0.0.1"]
    assert socket.gethostbyaddr("192.0.2.50") == ("Fifty.example.test", ["fifty"], ["192.0.2.50"])
    assert socket.gethostbyname_ex("fifty") == ("Fifty.example.test", ["fifty"], ["192.0.2.50", "192.0.2.51"])
    assert asked() == []


def test_numbers_ask_nobody(asked: Questions) -> None:
    assert addresses("192.0.2.7", "https") == ["192.0.2.7"]
    assert addresses("::1", 80) == ["::1"]
    assert addresses(None, 80) == ["127.0.0.1"] and addresses(None, 80, flags=socket.AI_PASSIVE) == ["0.0.0.0"]
    assert socket.gethostbyname("") == "0.0.0.0" and socket.gethostbyname("<broadcast>") == "255.255.255.255"
    for bad in ({"host": "a.example.test", "port": "no-such-service"}, {"host": "a", "port": 1, "flags": 4}):
        with pytest.raises(socket.gaierror):
            socket.getaddrinfo(**bad)  # type: ignore[arg-type]
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("::1", 80, socket.AF_INET)
    with pytest.raises(UnicodeError):
        socket.getaddrinfo("a..b", 80)
    assert asked() == []


def test_reverse(asked: Questions) -> None:
    assert socket.gethostbyaddr("192.0.2.1") == ("a.example.test", [], ["192.0.2.1"])
    assert socket.getnameinfo(("192.0.2.1", 80), 0) == ("a.example.test", "http")
    assert socket.getnameinfo(("192.0.2.9", 80), socket.NI_NUMERICSERV) == ("192.0.2.9", "80")
    assert socket.getfqdn("192.0.2.1") == "a.example.test"
    assert asked()[0] == "udp 1.2.0.192.in-addr.arpa. PTR"
    with pytest.raises(socket.herror) as caught:
        socket.gethostbyaddr("192.0.2.9")
    assert caught.value.args == (1, "Unknown host")
    with pytest.raises(socket.gaierror):
        socket.getnameinfo(("192.0.2.9", 80), socket.NI_NAMEREQD)


def test_sockets_take_names(asked: Questions, bed: Bed) -> None:
    with bed.b.socket() as listener:
        listener.bind((PEER, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("here.example.test", port), 5) as sock:
            assert sock.getpeername() == (PEER, port)
        with socket.socket() as sock:
            sock.connect(("here", port))
            assert sock.getpeername() == (PEER, port)


def test_name_server_on_loopback(bed: Bed, tmp_path: Path) -> None:
    """127.0.0.0/8 is the kernel's, also for questions; the program lives in the network server's namespace."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.7\n")
    process = bed.a.popen([sys.executable, SERVER, "127.0.0.7", "53"], stdout=subprocess.PIPE)
    assert read_line(process) == "ready"
    code = (
        f"from ulnet.stack import resolve; resolve.RESOLV_CONF = {str(tmp_path / 'resolv.conf')!r}\n"
        "import socket; print(socket.gethostbyname('here.example.test'))\n"
        "print(len(socket.getaddrinfo('big.example.test', 1)))"
    )
    program = bed.a.popen(
        [sys.executable, "-m", "ulnet", "run", "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"ULNET_SERVER": bed.path},
    )
    bed.programs += [process, program]
    assert read_line(program) == PEER and read_line(program) == "600"
    assert program.wait(10) == 0
