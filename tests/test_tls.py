"""TLS over our sockets against the standard ssl module on a kernel socket of another host."""

from __future__ import annotations

import hashlib
import io
import random
import select
import socket as kernel
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sockethosts import running

from tests import certificates
from tests.certificates import NAME
from tests.netserver_bed import PEER, Bed
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import socket, tls
from ulnet.stack.proxy import Proxy

_why_not = can_testbed() or certificates.missing()
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
BLOB = random.Random(1).randbytes(3_000_000)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("tls"))
    yield bed
    bed.close()


@pytest.fixture(scope="module")
def proxy(bed: Bed) -> Proxy:
    return bed.proxy()


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.make(tmp_path_factory.mktemp("pem"), PEER)


class Joined:
    """A TCP connection: ``ours``, and ``theirs`` on the peer's kernel; TLS to be put on both."""

    def __init__(self, bed: Bed, proxy: Proxy, pem: Path) -> None:
        with bed.b.socket() as listener:
            listener.bind((PEER, 0))
            listener.listen()
            self.ours = socket.create_connection(listener.getsockname(), 10, host=proxy)
            self.theirs, _ = listener.accept()
        self.theirs.settimeout(10)
        self.pem = pem
        self.server, self.client = certificates.server_context(pem), certificates.client_context(pem)

    def wrap(self, we_serve: bool = False) -> tuple[tls.SSLSocket, ssl.SSLSocket]:
        """Both ends, handshake done."""
        got: list[ssl.SSLSocket] = []
        ours_by, theirs_by = (self.server, self.client) if we_serve else (self.client, self.server)

        def they() -> None:
            got.append(
                theirs_by.wrap_socket(self.theirs, server_side=not we_serve, server_hostname=NAME if we_serve else None)
            )

        with running(they):
            sock = tls.wrap(ours_by, self.ours, server_side=we_serve, server_hostname=None if we_serve else NAME)
        self.theirs = got[0]
        self.ours = sock  # type: ignore[assignment]
        return sock, got[0]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def joined(bed: Bed, proxy: Proxy, pem: Path) -> Iterator[Joined]:
    joined = Joined(bed, proxy, pem)
    yield joined
    joined.close()


def exactly(sock: tls.SSLSocket | ssl.SSLSocket, n: int) -> bytes:
    parts = []
    while n:
        part = sock.recv(n)
        assert part, f"end of stream, {n} bytes too early"
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("we_serve", [False, True], ids=["client", "server"])
def test_data_both_ways(joined: Joined, version: ssl.TLSVersion, we_serve: bool) -> None:
    """3 MB each way, our end with a thread for each direction, then an orderly end."""
    for context in (joined.server, joined.client):
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["b", "a"])
    before = joined.ours
    ours, theirs = joined.wrap(we_serve)
    assert before.fileno() == -1  # taken over, as wrap_socket does
    assert isinstance(ours, ssl.SSLSocket) and isinstance(ours, tls.SSLSocket) and isinstance(ours, kernel.socket)
    assert ours.version() == theirs.version() == version.name.replace("_", ".")
    assert ours.cipher() == theirs.cipher()
    assert ours.selected_alpn_protocol() == theirs.selected_alpn_protocol() == "b"
    assert ours.getsockname() == theirs.getpeername() and ours.gettimeout() == 10
    certificate = theirs if we_serve else ours
    assert certificate.getpeercert()["subject"] == ((("commonName", NAME),),)  # type: ignore[index]
    assert (ours if we_serve else theirs).getpeercert() is None
    got: list[bytes] = []

    def peer() -> None:  # by one thread: the standard class does not bear two at once
        got.append(exactly(theirs, len(BLOB)))
        theirs.sendall(BLOB)

    with running(peer), running(lambda: ours.sendall(BLOB)):
        assert hashlib.sha256(exactly(ours, len(BLOB))).digest() == hashlib.sha256(BLOB).digest()
    assert got == [BLOB]
    with running(theirs.unwrap):
        assert ours.unwrap() is ours
    assert ours.version() is None
    ours.sendall(b"in the clear")  # both ends go on below TLS
    kernel_end = kernel.socket(fileno=theirs.detach())
    kernel_end.settimeout(10)
    assert kernel_end.recv(99) == b"in the clear"
    kernel_end.sendall(b"back")
    assert ours.recv(99) == b"back"
    kernel_end.close()


def test_no_overreading(joined: Joined) -> None:
    """What follows close_notify in the same segment is for the program, not for TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = joined.server.wrap_bio(incoming, outgoing, server_side=True)

    def handshake() -> None:
        while True:
            try:
                peer.do_handshake()
                joined.theirs.sendall(outgoing.read())
                return
            except ssl.SSLWantReadError:
                joined.theirs.sendall(outgoing.read())
                incoming.write(joined.theirs.recv(65536))

    with running(handshake):
        ours = tls.wrap(joined.client, joined.ours, server_hostname=NAME)
    peer.write(b"data")
    with pytest.raises(ssl.SSLWantReadError):
        peer.unwrap()
    joined.theirs.sendall(outgoing.read() + b"in the clear")
    assert ours.recv(99) == b"data" and ours.recv(99) == b""
    assert ours.unwrap().recv(99) == b"in the clear"
    ours.close()


class TestReadiness:
    def test_records_that_wait_are_shown(self, joined: Joined) -> None:
        """select() says readable until the last record is read, whatever came in one segment."""
        ours, theirs = joined.wrap()
        bundle = [b"first record", b"second", b"third" * 1000]
        for data in bundle:
            theirs.sendall(data)
        time.sleep(0.05)
        for data in bundle:
            assert select.select([ours], [], [], 5)[0], data
            assert ours.recv(16384) == data
        assert not select.select([ours], [], [], 0.05)[0]

    def test_pending(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        theirs.sendall(b"0123456789")
        assert ours.recv(4) == b"0123" and ours.pending() == 6
        buffer = bytearray(3)
        assert ours.recv_into(buffer) == 3 and buffer == b"456" and ours.pending() == 3
        assert ours.recv_into(bytearray(9), 2) == 2 and ours.read() == b"9" and ours.pending() == 0


class TestNonBlocking:
    def test_everything(self, joined: Joined) -> None:
        """Handshake, write into a full window and read by select alone."""
        theirs: list[ssl.SSLSocket] = []
        digest: list[bytes] = []

        def peer() -> None:
            time.sleep(0.1)
            theirs.append(joined.server.wrap_socket(joined.theirs, server_side=True))
            time.sleep(0.2)  # the window fills
            digest.append(hashlib.sha256(exactly(theirs[0], 4 * len(BLOB))).digest())
            theirs[0].sendall(b"thanks")

        with running(peer):
            joined.ours.setblocking(False)
            ours = tls.wrap(joined.client, joined.ours, server_hostname=NAME, do_handshake_on_connect=False)
            joined.ours = ours  # type: ignore[assignment]
            waits = {"handshake": self._patiently(ours, ours.do_handshake)}
            view = memoryview(BLOB * 4)
            waits["write"] = 0
            while view:
                piece = view[:1_000_000]
                sent: list[int] = []
                waits["write"] += self._patiently(ours, lambda piece=piece, sent=sent: sent.append(ours.send(piece)))
                view = view[sent[0] :]
            with pytest.raises(ssl.SSLWantReadError):
                ours.recv(1)
            got: list[bytes] = []
            self._patiently(ours, lambda: got.append(ours.recv(99)))
        joined.theirs = theirs[0]
        assert got == [b"thanks"] and digest == [hashlib.sha256(BLOB * 4).digest()]
        assert all(waits.values()), waits

    @staticmethod
    def _patiently(sock: tls.SSLSocket, call: object) -> int:
        waits = 0
        while True:
            try:
                call()  # type: ignore[operator]
                return waits
            except ssl.SSLWantReadError:
                assert select.select([sock], [], [], 5)[0]
            except ssl.SSLWantWriteError:
                assert select.select([], [sock], [], 5)[1]
            waits += 1

    def test_refusals(self, joined: Joined) -> None:
        joined.ours.setblocking(False)
        with pytest.raises(ValueError, match="do_handshake_on_connect"):
            tls.wrap(joined.client, joined.ours, server_hostname=NAME)


class TestTimeouts:
    def test_handshake_and_read(self, joined: Joined) -> None:
        joined.ours.settimeout(0.1)
        with pytest.raises(TimeoutError, match="handshake operation timed out"):
            tls.wrap(joined.client, joined.ours, server_hostname=NAME)

    def test_read_is_for_the_whole(self, joined: Joined) -> None:
        """A peer that sends a record byte by byte does not extend the time."""
        ours, theirs = joined.wrap()
        ours.settimeout(0.3)
        stop = threading.Event()
        raw = kernel.socket(fileno=theirs.detach())
        joined.theirs = raw  # type: ignore[assignment]

        def trickle() -> None:
            raw.sendall(b"\x17\x03\x03\x40\x00")
            while not stop.wait(0.05):
                raw.sendall(b"x")

        with running(trickle):
            started = time.monotonic()
            with pytest.raises(TimeoutError, match="read operation timed out"):
                ours.recv(1)
            assert 0.25 < time.monotonic() - started < 3
            stop.set()

    def test_write(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        ours.settimeout(0.1)
        with pytest.raises(TimeoutError, match="write operation timed out"):
            ours.sendall(bytes(30_000_000))


class TestHandshakeFailures:
    def fail(self, joined: Joined, error: type[OSError], match: str, name: str = NAME) -> list[str]:
        seen: list[str] = []

        def they() -> None:
            try:
                joined.server.wrap_socket(joined.theirs, server_side=True).close()
            except OSError as error:
                seen.append(str(error))

        with running(they), pytest.raises(error, match=match):
            tls.wrap(joined.client, joined.ours, server_hostname=name)
        assert joined.ours.fileno() == -1
        return seen

    def test_untrusted(self, joined: Joined) -> None:
        joined.client = ssl.create_default_context()
        joined.server.maximum_version = ssl.TLSVersion.TLSv1_2
        seen = self.fail(joined, ssl.SSLCertVerificationError, "self-signed|self signed")
        assert "alert unknown ca" in seen[0].lower().replace("_", " ")  # the peer was told

    def test_other_name(self, joined: Joined) -> None:
        self.fail(joined, ssl.SSLCertVerificationError, "Hostname mismatch", "other.test")

    def test_versions(self, joined: Joined) -> None:
        joined.client.minimum_version = ssl.TLSVersion.TLSv1_3
        joined.server.maximum_version = ssl.TLSVersion.TLSv1_2
        self.fail(joined, ssl.SSLError, "(?i)alert.protocol.version")

    def test_peer_speaks_http(self, joined: Joined) -> None:
        joined.theirs.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        with pytest.raises(ssl.SSLError, match="(?i)wrong.version.number"):
            tls.wrap(joined.client, joined.ours, server_hostname=NAME)

    def test_peer_leaves(self, joined: Joined) -> None:
        joined.theirs.shutdown(kernel.SHUT_WR)
        with pytest.raises(ssl.SSLEOFError):
            tls.wrap(joined.client, joined.ours, server_hostname=NAME)

    def test_arguments(self, joined: Joined) -> None:
        for options, error in (
            ({"server_side": True, "server_hostname": NAME}, ValueError),
            ({}, ValueError),  # check_hostname
        ):
            with pytest.raises(error):
                tls.wrap(joined.client, joined.ours, **options)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            tls.SSLSocket(joined.ours)
        assert joined.ours.fileno() >= 0


class TestEnds:
    def test_close_notify(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        with running(theirs.unwrap):
            assert ours.recv(9) == b"" and ours.recv(9) == b""
            ours.unwrap()

    @pytest.mark.parametrize("suppress", [True, False])
    def test_ragged(self, joined: Joined, suppress: bool) -> None:
        ours, theirs = joined.wrap()
        ours.suppress_ragged_eofs = suppress
        theirs.sendall(b"last")
        theirs.close()
        assert ours.recv(9) == b"last"
        if suppress:
            assert ours.recv(9) == b"" and ours.recv_into(bytearray(9)) == 0
        else:
            with pytest.raises(ssl.SSLEOFError):
                ours.recv(9)

    def test_reset(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        theirs.setsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(ConnectionResetError):
            ours.recv(9)

    def test_close_by_another_thread(self, joined: Joined) -> None:
        ours, _ = joined.wrap()
        errors: list[BaseException] = []

        def read() -> None:
            try:
                ours.recv(1)
            except BaseException as error:
                errors.append(error)

        with running(read):
            time.sleep(0.05)
            ours.shutdown(socket.SHUT_RDWR)
            ours.close()
        assert ours.fileno() == -1
        with pytest.raises((OSError, ValueError)):
            ours.recv(1)

    def test_files(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        with ours.makefile("rwb") as file:
            ours.close()  # takes effect with the file's end
            theirs.sendall(b"line 1\nline 2\n")
            assert file.readline() == b"line 1\n" and file.readline() == b"line 2\n"
            file.write(b"answer")
            file.flush()
            assert exactly(theirs, 6) == b"answer"
        assert ours.fileno() == -1 and theirs.recv(9) == b""

    def test_sendfile(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        with running(lambda: ours.sendfile(io.BytesIO(BLOB))):
            assert exactly(theirs, len(BLOB)) == BLOB

    def test_what_is_not_allowed(self, joined: Joined) -> None:
        ours, theirs = joined.wrap()
        for call in (
            lambda: ours.recv(1, socket.MSG_PEEK),
            lambda: ours.send(b"x", socket.MSG_DONTWAIT),
            lambda: ours.recvfrom(1),
            lambda: ours.sendto(b"x", ("10.77.0.2", 9)),
            lambda: ours.recv_buffer(),
        ):
            with pytest.raises(ValueError):
                call()
        for call in (lambda: ours.recvmsg(1), lambda: ours.sendmsg([b"x"]), lambda: ours.dup()):
            with pytest.raises(NotImplementedError):
                call()
        ours.sendall(b"still well")
        assert exactly(theirs, 10) == b"still well"


def test_session_and_server_name(bed: Bed, proxy: Proxy, pem: Path) -> None:
    """A session is used again; a server-name callback sees our socket and may change its context."""
    first = Joined(bed, proxy, pem)
    second = Joined(bed, proxy, pem)
    second.server, second.client = first.server, first.client
    try:
        for context in (first.server, first.client):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        ours, _ = first.wrap()
        session = ours.session
        assert session is not None and not ours.session_reused
        with running(lambda: second.server.wrap_socket(second.theirs, server_side=True)):
            again = tls.wrap(second.client, second.ours, server_hostname=NAME, session=session)
        assert again.session_reused and again.session.id == session.id  # type: ignore[union-attr]
        again.close()
    finally:
        first.close()
        second.close()
    third = Joined(bed, proxy, pem)
    seen: list[object] = []
    other = certificates.server_context(pem)

    def choose(sock: object, name: str, context: ssl.SSLContext) -> None:
        seen.extend((sock, name))
        sock.context = other  # type: ignore[attr-defined]

    third.server.sni_callback = choose  # type: ignore[assignment]
    ours, _ = third.wrap(we_serve=True)
    assert seen == [ours, NAME] and ours.context is other
    third.close()


def test_listener_and_connect_by_themselves(bed: Bed, proxy: Proxy, pem: Path) -> None:
    """wrap() before connecting and listening: connect() and accept() make the handshake."""
    plain = socket.create_server(("", 0), host=proxy)
    plain.settimeout(10)
    with tls.wrap(certificates.server_context(pem), plain, server_side=True) as listener:
        port = listener.getsockname()[1]
        client = tls.wrap(certificates.client_context(pem), socket.socket(host=proxy), server_hostname=NAME)
        got: list[bytes] = []

        def serve() -> None:
            sock, peer = listener.accept()
            with sock:
                assert peer == sock.getpeername() and sock.server_side
                got.append(sock.recv(99))
                sock.unwrap()

        with client, running(serve):
            with pytest.raises(OSError):
                client.do_handshake()
            client.connect((proxy.address, port))
            with pytest.raises(ValueError, match="already-connected"):
                client.connect((proxy.address, port))
            client.sendall(b"to myself")
            client.unwrap()
        assert got == [b"to myself"]
