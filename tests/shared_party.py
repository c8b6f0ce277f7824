"""Who takes part in the tests of shared sessions: a process that makes its calls by hand, and its server."""

from __future__ import annotations

import contextlib
import os
import socket as ksocket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netserver_bed import PEER, Bed, wait_for
from ulnet.ipc import Message, MsgType, PortRight, Task
from ulnet.stack import protocol as p
from ulnet.stack import socket
from ulnet.stack._socket import Socket
from ulnet.stack.proxy import Proxy
from ulnet.stack.session import Session

TCP, UDP = 6, 17


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("shared"))
    yield bed
    bed.close()


@pytest.fixture
def bed(running: Bed) -> Iterator[Bed]:
    """The server, with empty tables and no new descriptor after each test."""
    yield running
    running.end_programs()
    running.expect_empty()
    wait_for(lambda: running.tables()["applications"] == 0, "no applications")
    tables = running.tables()
    assert (tables["shared"], tables["heirs"]) == (0, 0)
    assert running.counters()["calls"].get("internal_errors", 0) == 0, running.log.read_text()


@pytest.fixture
def listener(bed: Bed) -> Iterator[ksocket.socket]:
    with bed.b.socket() as sock:
        sock.bind((PEER, 0))
        sock.listen(256)
        sock.settimeout(10)
        yield sock


class Party:
    """A process that takes part, by hand: its calls, without the library's own shared sockets."""

    def __init__(self, bed: Bed) -> None:
        self.proxy: Proxy = bed.proxy()

    def call(self, call: p.Call, record: p.Record, **parts: Any) -> Message:
        message = self.proxy._task.rpc(self.proxy._server, call, record.pack(), timeout=5, **parts)
        error = int.from_bytes(bytes(message.inline)[:4], "little")
        if error:
            raise OSError(error, os.strerror(error))
        return message

    def tell(self, call: p.Call, record: p.Record, **parts: Any) -> None:
        self.proxy._task.send(self.proxy._server, call, record.pack(), timeout=5, **parts)

    def connect(self, address: tuple[str, int]) -> Session:
        sock = socket.socket(host=self.proxy)
        sock.settimeout(10)
        sock.connect(address)
        return self.take(sock)

    def take(self, sock: socket.socket) -> Session:
        """The session of a socket, which forgets it."""
        session = sock.session
        assert session is not None
        sock._adopt(None, False)
        self.proxy._sessions.pop(session.session_id, None)
        return session

    def share(self, session: Session, *, state: bool = True) -> tuple[int, ksocket.socket]:
        """Into the server; its number and the users' end."""
        kind = ksocket.SOCK_STREAM if session.kind == TCP else ksocket.SOCK_SEQPACKET
        user, manager = ksocket.socketpair(ksocket.AF_UNIX, kind)
        number = session.session_id
        self.proxy._declare(session)
        ool = [self.proxy.engine.export_session(session)] if state else []
        self.proxy._gone_from_here(number)
        self.tell(p.Call.SHARE, p.Share(number), ool=ool, fds=[user.fileno(), manager.fileno()])
        manager.close()
        user.settimeout(10)
        return number, user

    def hold(self, user: ksocket.socket) -> p.Info:
        return p.Info.unpack(bytes(self.call(p.Call.HOLD, p.Nothing(), fds=[user.fileno()]).inline))

    def release(self, number: int, *, abort: bool = False) -> None:
        self.tell(p.Call.RELEASE, p.Release(number, abort))

    def status(self, number: int) -> p.Info:
        return p.Info.unpack(bytes(self.call(p.Call.STATUS, p.Shared(number)).inline))

    def promote(self, number: int, user: ksocket.socket, kind: int = TCP) -> Session:
        """Home again, with what the users' end holds still in front."""
        info = self.status(number)
        peer = (info.raddr, info.rport) if info.rport else (None, 0)
        # Frames that come from now on wait for the state.
        self.proxy.engine.forget_flow(kind, info.laddr, info.lport, *peer)
        message = self.call(p.Call.PROMOTE, p.Shared(number))
        (fd,) = message.take_fds()
        os.close(fd)
        return self.take_in(number, message.ool[0], unread(user, kind), kind)

    def take_in(self, number: int, state: Any, prefix: bytes = b"", kind: int = TCP) -> Session:
        session = self.proxy.engine.new_session(kind)
        self.proxy.engine.import_session(session, state, number, prefix)
        return session

    def give_back(self, session: Session) -> None:
        self.proxy._return(session, session.session_id)

    def fork(self) -> tuple[int, ksocket.socket]:
        message = self.call(p.Call.FORK, p.Nothing())
        forked = p.Forked.unpack(bytes(message.inline))
        (fd,) = message.take_fds()
        return forked.heir, ksocket.socket(fileno=fd)


def unread(user: ksocket.socket, kind: int = TCP) -> bytes:
    user.setblocking(False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := user.recv(1 << 20):
            if kind == UDP:  # as a state has it
                part = part[:18] + struct.pack("<I", len(part) - 18) + part[18:]
            parts.append(part)
    return b"".join(parts)


def refused(code: int) -> Any:
    return pytest.raises(OSError, match=os.strerror(code))


def read_all(sock: ksocket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def pair(bed: Bed, listener: ksocket.socket) -> tuple[Party, int, ksocket.socket, ksocket.socket]:
    """A shared connection: its holder, number, users' end, and the peer."""
    party = Party(bed)
    session = party.connect(listener.getsockname())
    peer, _ = listener.accept()
    peer.settimeout(10)
    number, user = party.share(session)
    return party, number, user, peer


def finish(user: ksocket.socket, peer: ksocket.socket) -> None:
    """Ended by the peer first, so that no TIME-WAIT is ours."""
    peer.close()
    assert user.recv(1) == b""
    user.close()


class Heritage:
    """A child that attaches with what it inherited."""

    def __init__(self, bed: Bed, heir: int) -> None:
        self.task = Task(bed.path)
        self.server = self.task.look_up(p.SERVICE)
        rights = [PortRight(self.task.allocate(), MsgType.MAKE_SEND)]
        self.call(p.Call.ATTACH, p.Attach(p.VERSION, 0, heir), rights=rights).close()

    def call(self, call: p.Call, record: p.Record, **parts: Any) -> Message:
        message = self.task.rpc(self.server, call, record.pack(), timeout=5, **parts)
        assert int.from_bytes(bytes(message.inline)[:4], "little") == 0
        return message


def read_exactly(sock: ksocket.socket, n: int) -> bytes:
    got = bytearray()
    while len(got) < n:
        part = sock.recv(min(n - len(got), 1 << 18))
        if not part:
            break
        got += part
    return bytes(got)


def home_send(session: Session, data: bytes) -> int:
    """Into a session of this process, as much as it takes now."""
    sock = Socket()
    sock._adopt(session, False)
    sock.setblocking(False)
    try:
        return sock.send(data) if data else 0
    except BlockingIOError:
        return 0
    finally:
        sock._adopt(None, False)
