"""The module stands in for the standard one: every public name is there, and means the same."""

import inspect
import socket as standard
import subprocess
import sys

import pytest

from ulnet.stack import socket
from ulnet.stack._socket import Socket, parse_address

OUR_OWN = {
    "SocketType",
    "close",
    "create_connection",
    "create_server",
    "dup",
    "fromfd",
    "getdefaulttimeout",
    "has_dualstack_ipv6",
    "setdefaulttimeout",
    "socket",
}


@pytest.mark.parametrize("name", sorted(standard.__all__))
def test_every_public_name(name: str) -> None:
    assert hasattr(socket, name)
    assert name in socket.__all__
    if name not in OUR_OWN:
        assert getattr(socket, name) is getattr(standard, name)


def test_what_programs_take_besides() -> None:
    for name in ("MsgFlag", "AddressInfo", "SocketIO", "EBADF", "EAGAIN", "EWOULDBLOCK", "_GLOBAL_DEFAULT_TIMEOUT"):
        assert getattr(socket, name) is getattr(standard, name)
    assert socket.timeout is TimeoutError and socket.error is OSError
    assert socket.has_dualstack_ipv6() is False


def test_every_method_of_the_class() -> None:
    ours = {name for name in dir(socket.socket) if not name.startswith("_")}
    theirs = {name for name in dir(standard.socket) if not name.startswith("_")}
    assert theirs - ours <= {"sendmsg_afalg"}


def test_hot_calls_are_not_wrapped_in_python() -> None:
    for name in ("send", "sendall", "sendto", "sendmsg", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg"):
        assert getattr(socket.socket, name) is getattr(Socket, name)
        assert not inspect.isfunction(getattr(socket.socket, name))


def test_same_parameters_where_programs_use_keywords() -> None:
    for function in ("create_connection", "create_server"):
        theirs = inspect.signature(getattr(standard, function)).parameters
        ours = inspect.signature(getattr(socket, function)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[name].default == p.default for name, p in theirs.items())
    assert list(inspect.signature(socket.socket.makefile).parameters) == list(
        inspect.signature(standard.socket.makefile).parameters
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("10.1.2.3", 80), ("10.1.2.3", 80)),
        (("255.255.255.255", 65535), ("255.255.255.255", 65535)),
        (("0.0.0.0", 0), ("0.0.0.0", 0)),
        (("", 1), ("0.0.0.0", 1)),
        ((b"", 1), ("0.0.0.0", 1)),
        ((b"10.1.2.3", 1), ("10.1.2.3", 1)),
        ((bytearray(b"10.1.2.3"), True), ("10.1.2.3", 1)),
        (("<broadcast>", 1), ("255.255.255.255", 1)),
        (("127.1", 1), ("127.0.0.1", 1)),  # inet_aton(3) forms, by the system's resolver
        (("010.0.0.1", 1), ("8.0.0.1", 1)),
        (("localhost", 1), ("127.0.0.1", 1)),
    ],
)
def test_addresses(given: object, expected: tuple[str, int]) -> None:
    assert parse_address(given, "connect") == expected


@pytest.mark.parametrize("host", ["1.2.3.256", "1.2.3.4.", "1..2.3", "1.2.3.4.5", "999.1.1.1", "no such host.invalid"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises((standard.gaierror, UnicodeError)):
        parse_address((host, 1), "connect")


def test_no_server_is_one_clear_error() -> None:
    code = "from ulnet.stack import socket\ntry:\n socket.socket()\nexcept OSError as e:\n print(e)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"ULNET_SERVER": "/nonexistent/ulnet.sock", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "/nonexistent/ulnet.sock" in out.stdout and out.stdout.count("\n") == 1, out.stderr
