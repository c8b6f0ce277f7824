"""A manager of shared sessions for the tests: what the network server does, in a thread, with plain Python."""

import select
import socket as standard
import threading
from types import TracebackType

from ulnet.stack import socket
from ulnet.stack._sockopt import Options
from ulnet.stack.engine import Engine
from ulnet.stack.session import Session
from ulnet.stack.socket import _wrap

TCP = 6


class Placed:
    """``session`` is shared from here to ``back()``; ``end`` is the manager's end of its pair, driven by the test."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.user_fd, o_fd, self.state = session.share_begin()
        self.end = standard.socket(fileno=o_fd)
        self.end.settimeout(5)

    def back(self) -> int:
        return self.session.share_end(self.end.detach(), self.state, self.session.session_id)

    def __enter__(self) -> "Placed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end.close()


class Relay(Placed):
    """The same with its state in an engine and a thread that relays, so that the connection goes on."""

    def __init__(self, session: Session, host: object) -> None:
        engine: Engine = session.engine
        self.strays: list[bytes] = []
        engine.on_strays = self.strays.extend
        super().__init__(session)
        shell = engine.new_session(TCP)
        assert self.state is not None
        engine.import_session(shell, self.state, session.session_id)
        for frame in self.strays:
            engine.inject(frame)
        self.sock = _wrap(host, shell, 0, Options(), named=True)  # type: ignore[arg-type]
        self.sock.setblocking(False)
        self.end.setblocking(False)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        out = b""  # from the session to O
        back = b""  # from O to the session
        while not self.stop.is_set():
            poller = select.poll()
            poller.register(self.end, (select.POLLOUT if out else 0) | (0 if back else select.POLLIN))
            poller.register(self.sock, (select.POLLOUT if back else 0) | (0 if out else select.POLLIN))
            poller.poll(5)
            out, back = self.turn(out, back)
        # Nothing may stay behind: O is empty at the end, and what found no room in it goes in front of the state.
        self.unsent = out
        self.sock.settimeout(5)
        self.sock.sendall(back)
        while data := receive(self.end):
            self.sock.sendall(data)

    def turn(self, out: bytes, back: bytes) -> tuple[bytes, bytes]:
        out = out or receive(self.sock)
        back = back or receive(self.end)
        if out:
            out = out[send(self.end, out) :]
        if back:
            back = back[send(self.sock, back) :]
        return out, back

    def back(self) -> int:
        with self.session.shared_lock:
            self.stop.set()
            self.thread.join(10)
            assert not self.thread.is_alive()
            engine, session = self.session.engine, self.sock.session
            assert session is not None
            self.state = engine.export_session(session)
            if self.unsent:
                shell = engine.new_session(TCP)
                engine.import_session(shell, self.state, session.session_id, prefix=self.unsent)
                self.state = engine.export_session(shell)
            taken = super().back()
        for frame in self.strays:
            self.session.engine.inject(frame)
        return taken


def receive(sock: standard.socket | socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except BlockingIOError:
        return b""


def send(sock: standard.socket | socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0
