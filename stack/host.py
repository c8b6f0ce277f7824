"""Where sessions are set up: what a socket asks of the place that manages names, routes and handshakes.

Two places implement it: ``proxy.Proxy`` (the network server, by messages; SOSP 1993 table 1) and
``embedded.Embedded`` (this very process). A socket never knows which one it has.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from ulnet.stack.engine import ERROR, HUP, WRITABLE, Engine
from ulnet.stack.session import Session


class Host(ABC):
    """Session management for one stack. Errors are OSError with the BSD errno.

    Timeouts are nanoseconds: -1 for ever, 0 do not wait.
    """

    engine: Engine
    address: str  # the stack's own
    ifindex: int = 0  # of the interface, as the server's kernel counts; 0: none

    def socket(self, kind: int) -> Session:
        """A session shell for IPPROTO_TCP or IPPROTO_UDP; costs nobody a message."""
        return self.engine.new_session(kind)

    @abstractmethod
    def bind(
        self, session: Session, address: str, port: int, *, reuse_address: bool = False, reuse_port: bool = False
    ) -> tuple[str, int]:
        """Name the local endpoint (port 0: choose one); UDP migrates here. EADDRINUSE, EADDRNOTAVAIL, EACCES."""

    @abstractmethod
    def connect(self, session: Session, address: str, port: int, timeout_ns: int) -> None:
        """Open to a peer; the local endpoint is chosen if not bound.

        TCP: returns when established; timeout 0 starts it, raises BlockingIOError (EINPROGRESS) and the session becomes
        WRITABLE or ERROR later. UDP: names the peer. ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, EADDRNOTAVAIL.
        """

    def _open_tcp(
        self,
        session: Session,
        local: tuple[str, int],
        peer: tuple[str, int],
        timeout_ns: int,
        failed: Callable[[Session], None],
    ) -> None:
        """``connect`` by this host's own engine, from a local endpoint that is its own; ``failed`` takes that back.

        A blocking call that times out leaves the attempt running, as connect(2) does; close() ends it.
        """
        try:
            self.engine.open_tcp(session, *local, *peer)
        except BaseException:
            failed(session)
            raise
        if timeout_ns == 0:
            raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        ready = session.wait(WRITABLE, timeout_ns)
        if not ready:
            raise TimeoutError("timed out")
        code = session.take_error()
        if code or ready & (ERROR | HUP):
            self.engine.reopen(session)
            failed(session)
            code = code or errno.ECONNABORTED
            raise OSError(code, os.strerror(code))

    @abstractmethod
    def listen(self, session: Session, backlog: int) -> None:
        """Accept connections; established ones arrive in the session's queue (session READABLE, engine.accept())."""

    def accept(self, listener: Session) -> Session | None:
        """The next established session of a listener's queue, or None."""
        return self.engine.accept(listener)

    @abstractmethod
    def accepted(self, listener: Session, session: Session) -> None:
        """One session left the listener's queue (returns a credit to the server)."""

    @abstractmethod
    def close(self, session: Session, *, abort: bool = False) -> None:
        """The user is done with it: TCP's end is managed elsewhere from here on. Never blocks for the peer."""

    @abstractmethod
    def shutdown(self) -> None:
        """Give everything back: close every session, leave the server."""

    # -- sessions in several processes; a host that is this very process has none ------------------

    def share(self, session: Session) -> None:
        """Place a session where several processes reach it by its descriptor."""
        raise _alone()

    def publish(self, session: Session, public: bool) -> None:
        """``public``: it stays there, for nobody can tell who has its descriptor. False ends that."""
        if public:
            raise _alone()

    def send_off(self, session: Session) -> None:
        """Its descriptor is on its way to a process that will ``hold`` it."""
        raise _alone()

    def leave(self, session: Session) -> int:
        """Let go of a session but not of its descriptor, which is the caller's from now on and carries the data."""
        raise _alone()

    def hold(self, fd: int) -> tuple[Session, tuple[str, int]] | None:
        """The session whose descriptor ``fd`` is, shared with who else has it, and its local name as it was bound.

        None: no session's. The descriptor is the session's from here on."""
        return None

    # -- fork ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """os.fork() is about to be called: nobody may be inside the engine."""
        self.engine.before_fork()

    def after_fork_in_parent(self) -> None:
        """The fork is done, or failed."""
        self.engine.after_fork_parent()

    def after_fork_in_child(self) -> None:
        """This is the child: what was not shared stayed with the parent."""
        self.engine.after_fork_child()


def _alone() -> OSError:
    return OSError(
        errno.EOPNOTSUPP, "a session of an embedded stack lives in this process alone: it cannot be shared or passed"
    )
