"""The drop-in for the standard ``socket`` module: its names and its class, over a stack in this address space.

``from ulnet.stack import socket`` in place of ``import socket``. TCP and UDP over IPv4 run here; everything that opens
no socket (constants, exceptions, getaddrinfo, inet_aton, ...) is the standard module's own.

Where a socket's sessions are set up (a Host) is chosen by ``socket(..., host=)``, else by ``set_default_host()``,
else it is the network server named by ULNET_SERVER or at the default path.

differs from socket(7): ``fileno()`` is for select, poll and epoll only, unless the session was placed in the server
(``detach``, ``set_inheritable``): only then os.read and os.write touch the connection.
MSG_DONTWAIT does not wait on a socket with a time-out either, where the standard module does.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import socket as _std
import sys
import time
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, cast

from ulnet.stack._files import Files
from ulnet.stack._socket import Socket, parse_address
from ulnet.stack._sockopt import Options
from ulnet.stack.engine import ERROR, HUP, READABLE, WRITABLE
from ulnet.stack.host import Host
from ulnet.stack.openfile import File, find, show
from ulnet.stack.session import Session

if TYPE_CHECKING:  # at run time every public name of the standard module is taken over, below
    # fmt: off
    from socket import (  # noqa: I001
        AF_INET as AF_INET, AF_INET6 as AF_INET6, AF_UNIX as AF_UNIX, AF_UNSPEC as AF_UNSPEC,
        AI_CANONNAME as AI_CANONNAME, AI_NUMERICHOST as AI_NUMERICHOST, AI_PASSIVE as AI_PASSIVE,
        EAI_NONAME as EAI_NONAME, INADDR_ANY as INADDR_ANY, INADDR_BROADCAST as INADDR_BROADCAST,
        INADDR_LOOPBACK as INADDR_LOOPBACK, IP_TOS as IP_TOS, IP_TTL as IP_TTL, IPPROTO_ICMP as IPPROTO_ICMP,
        IPPROTO_IP as IPPROTO_IP, IPPROTO_IPV6 as IPPROTO_IPV6, IPPROTO_TCP as IPPROTO_TCP,
        IPPROTO_UDP as IPPROTO_UDP, IPV6_V6ONLY as IPV6_V6ONLY, MSG_DONTWAIT as MSG_DONTWAIT,
        MSG_NOSIGNAL as MSG_NOSIGNAL, MSG_OOB as MSG_OOB, MSG_PEEK as MSG_PEEK, MSG_TRUNC as MSG_TRUNC,
        MSG_WAITALL as MSG_WAITALL, NI_NUMERICHOST as NI_NUMERICHOST, NI_NUMERICSERV as NI_NUMERICSERV,
        SHUT_RD as SHUT_RD, SHUT_RDWR as SHUT_RDWR, SHUT_WR as SHUT_WR, SO_ACCEPTCONN as SO_ACCEPTCONN,
        SO_BROADCAST as SO_BROADCAST, SO_DOMAIN as SO_DOMAIN, SO_ERROR as SO_ERROR, SO_KEEPALIVE as SO_KEEPALIVE,
        SO_LINGER as SO_LINGER, SO_PROTOCOL as SO_PROTOCOL, SO_RCVBUF as SO_RCVBUF, SO_REUSEADDR as SO_REUSEADDR,
        SO_REUSEPORT as SO_REUSEPORT, SO_SNDBUF as SO_SNDBUF, SO_TYPE as SO_TYPE, SOCK_CLOEXEC as SOCK_CLOEXEC,
        SOCK_DGRAM as SOCK_DGRAM, SOCK_NONBLOCK as SOCK_NONBLOCK, SOCK_STREAM as SOCK_STREAM,
        SOL_SOCKET as SOL_SOCKET, SOMAXCONN as SOMAXCONN, TCP_CORK as TCP_CORK, TCP_INFO as TCP_INFO,
        TCP_KEEPCNT as TCP_KEEPCNT, TCP_KEEPIDLE as TCP_KEEPIDLE, TCP_KEEPINTVL as TCP_KEEPINTVL,
        TCP_MAXSEG as TCP_MAXSEG, TCP_NODELAY as TCP_NODELAY, TCP_QUICKACK as TCP_QUICKACK,
        TCP_USER_TIMEOUT as TCP_USER_TIMEOUT, AddressFamily as AddressFamily, AddressInfo as AddressInfo,
        MsgFlag as MsgFlag, SocketIO as SocketIO, SocketKind as SocketKind, gaierror as gaierror,
        getaddrinfo as getaddrinfo, getfqdn as getfqdn, gethostbyaddr as gethostbyaddr,
        gethostbyname as gethostbyname, gethostbyname_ex as gethostbyname_ex, gethostname as gethostname,
        getnameinfo as getnameinfo, getprotobyname as getprotobyname, getservbyname as getservbyname,
        getservbyport as getservbyport, has_ipv6 as has_ipv6, herror as herror, htonl as htonl, htons as htons,
        if_indextoname as if_indextoname, if_nameindex as if_nameindex, if_nametoindex as if_nametoindex,
        inet_aton as inet_aton, inet_ntoa as inet_ntoa, inet_ntop as inet_ntop, inet_pton as inet_pton,
        ntohl as ntohl, ntohs as ntohs, socketpair as socketpair,
    )
    # fmt: on

error = OSError
timeout = TimeoutError
_UNCONNECTED: Final = frozenset(("CLOSED", "SYN-SENT", "SYN-RECEIVED"))
_LINGERING: Final = frozenset(("FIN-WAIT-1", "CLOSING", "LAST-ACK"))
_LINGER_STEP_NS: Final = 2_000_000
_Address = tuple[str, int]
_GLOBAL_DEFAULT_TIMEOUT: Final[Any] = cast(Any, _std)._GLOBAL_DEFAULT_TIMEOUT  # http.client compares with it

_default_host: Host | None = None
_default_timeout: float | None = None
# Sockets whose owner called detach(): alive under their descriptor until socket(fileno=) or close(fd).
_detached: dict[int, socket] = {}


# -- the host ------------------------------------------------------------------------------------


def set_default_host(host: Host | None) -> None:
    """Sockets made from here on without ``host=`` use this one; None: the network server again."""
    global _default_host
    _default_host = host


def get_default_host() -> Host:
    """The host of sockets made without ``host=``: by default the network server, joined at first use, or OSError."""
    if _default_host is not None:
        return _default_host
    from ulnet.stack.proxy import connect_default

    return connect_default()


# -- the class -----------------------------------------------------------------------------------


class socket(Files, Socket):
    """A TCP or UDP socket over IPv4, shaped like the standard one; send and receive calls come from ``Socket``.

    ``socket(AF_INET, SOCK_STREAM | SOCK_DGRAM)``; ``host``: where its sessions are set up (module docstring).
    ``fileno``: only a number that ``detach()`` gave. Raises OSError EAFNOSUPPORT, ESOCKTNOSUPPORT, EPROTONOSUPPORT.
    """

    __slots__ = (
        "_closed",
        "_fd",
        "_file",
        "_io_refs",
        "family",
        "proto",
        "type",
    )

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None, *, host: Host | None = None
    ) -> None:
        self._closed = True  # until it is whole: __del__ may see it earlier
        self._io_refs = 0
        self._fd = -1
        if fileno is not None:
            self._revive(fileno)
            return
        kind = _std.SOCK_STREAM if type == -1 else type & ~(_std.SOCK_NONBLOCK | _std.SOCK_CLOEXEC)
        self._check_arguments(_std.AF_INET if family == -1 else family, kind, 0 if proto == -1 else proto)
        if host is None:
            host = get_default_host()
        protocol = _std.IPPROTO_TCP if kind == _std.SOCK_STREAM else _std.IPPROTO_UDP
        self._setup(host, host.socket(protocol), max(proto, 0), Options())
        if type != -1 and type & _std.SOCK_NONBLOCK:
            self.settimeout(0)

    @staticmethod
    def _check_arguments(family: int, kind: int, proto: int) -> None:
        if family != _std.AF_INET:
            name = getattr(family, "name", family)
            raise OSError(errno.EAFNOSUPPORT, f"address family {name} is not supported by this stack, only AF_INET is")
        protocol = {_std.SOCK_STREAM: _std.IPPROTO_TCP, _std.SOCK_DGRAM: _std.IPPROTO_UDP}.get(_std.SocketKind(kind))
        if protocol is None:
            name = getattr(kind, "name", kind)
            message = f"socket type {name} is not supported by this stack, only SOCK_STREAM and SOCK_DGRAM are"
            raise OSError(errno.ESOCKTNOSUPPORT, message)
        if proto not in (0, protocol):
            raise OSError(errno.EPROTONOSUPPORT, f"protocol {proto} does not fit the socket type: use 0 or {protocol}")

    def _setup(self, host: Host, session: Session, proto: int, options: Options, named: bool = False) -> None:
        self.family = _std.AF_INET
        self.type = _std.SOCK_STREAM if session.kind == _std.IPPROTO_TCP else _std.SOCK_DGRAM
        self.proto = proto
        session.file = File(host, options)
        self._open(session, named)

    def _open(self, session: Session, named: bool) -> None:
        self._file: File = session.file
        self._file.users += 1
        self._adopt(session, named)
        self.settimeout(_default_timeout)
        self._options_hold()
        self._closed = False

    def _revive(self, fileno: int) -> None:
        """A socket around a descriptor: one that this process has a socket for already, or one passed to it."""
        if fileno < 0:
            raise ValueError("negative file descriptor")
        keeper = _detached.pop(fileno, None)
        session = keeper.session if keeper is not None else find(fileno)
        if session is None:
            host = get_default_host()
            held = host.hold(fileno)
            if held is None:
                raise OSError(errno.ENOTSOCK, f"descriptor {fileno} is no socket of this stack")
            session, bound = held
            session.file = File(host, Options())
            session.file.listening = session.listening
            session.file.bound = bound
        elif fileno != session.fileno():
            self._fd = fileno
        self.family = _std.AF_INET
        self.type = _std.SOCK_STREAM if session.kind == _std.IPPROTO_TCP else _std.SOCK_DGRAM
        self.proto = session.kind
        self._open(session, keeper._named if keeper is not None else session.session_id != 0)
        if keeper is not None:
            keeper._adopt(None, False)
            self._file.users -= 1

    def _need(self) -> Session:
        session = self.session
        if session is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return session

    def _options_hold(self) -> None:
        options = self._file.options
        self._options_changed(
            options.beside, options.receive_patience_ns, options.send_patience_ns, self._file.host.ifindex
        )

    @property
    def host(self) -> Host:
        """Where this socket's session is set up."""
        return self._file.host

    # -- names and connections --

    def _autobind(self) -> None:
        self.bind(("", 0))

    def bind(self, address: Any, /) -> None:
        """Name the local endpoint: (host, port), '' for every address, port 0 to have one chosen."""
        session = self._need()
        host, port = parse_address(address, "bind")
        if self._named:
            raise OSError(errno.EINVAL, f"the socket is bound already, to {_show(self.getsockname())}")
        options = self._file.options
        address, port = self._file.host.bind(
            session, host, port, reuse_address=options.reuse_address, reuse_port=options.reuse_port
        )
        # As the kernel: bound to any address it shows none, until it has a peer.
        self._file.bound = ("0.0.0.0" if host == "0.0.0.0" else address), port
        self._adopt(session, True)
        if session.live:
            options.apply(session)
        if self._file.inheritable:
            self._publish(session)

    def listen(self, backlog: int = min(_std.SOMAXCONN, 128), /) -> None:
        """Accept connections, at most ``backlog`` of them waiting. An unbound socket gets a port first."""
        session = self._need()
        backlog = _c_int(backlog)
        if self.type != _std.SOCK_STREAM:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not self._named:
            self.bind(("", 0))
        self._file.host.listen(session, max(backlog, 0))
        self._file.listening = True

    def accept(self) -> tuple[socket, _Address]:
        """Wait for a connection; returns (a new socket, the peer's address)."""
        session = self._need()
        if self.type != _std.SOCK_STREAM:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not self._file.listening:
            raise OSError(errno.EINVAL, "accept() on a socket that does not listen")
        accepted = self._file.host.accept(session)
        if accepted is None:
            accepted = self._wait_accept(session)
        self._file.host.accepted(session, accepted)
        sock = _wrap(self._file.host, accepted, self.proto, Options(self._file.options), named=True)
        sock._file.options.apply(accepted)
        return sock, accepted.peer or ("0.0.0.0", 0)

    def _accept(self) -> tuple[int, _Address]:
        # What the C class has: the new connection as a bare descriptor, for socket(fileno=).
        sock, address = self.accept()
        return sock.detach(), address

    def _wait_accept(self, session: Session) -> Session:
        timeout_ns = self._timeout_ns
        patient = timeout_ns < 0 and self._file.options.receive_patience_ns > 0  # SO_RCVTIMEO ends in EAGAIN
        if patient:
            timeout_ns = self._file.options.receive_patience_ns
        deadline = time.monotonic_ns() + timeout_ns
        while True:
            ready = session.wait(READABLE, timeout_ns)
            accepted = self._file.host.accept(session)
            if accepted is not None:
                return accepted
            if self.session is not session:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if ready & (ERROR | HUP):
                raise OSError(session.take_error() or errno.EINVAL, "the socket listens no more")
            if timeout_ns > 0:
                timeout_ns = max(deadline - time.monotonic_ns(), 0)
                if timeout_ns == 0 and not patient:
                    raise TimeoutError("timed out")
            if timeout_ns == 0:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def connect(self, address: Any, /) -> None:
        """Connect to (host, port). UDP: name the peer of send() and the only sender of recv()."""
        session = self._need()
        host, port = parse_address(address, "connect")
        if self.type == _std.SOCK_STREAM and self._already(session):
            return
        if host == "0.0.0.0":  # ip(7): this very host
            host = self._file.host.address
        timeout_ns = self._timeout_ns
        patient = timeout_ns < 0 and self._file.options.send_patience_ns > 0
        try:
            self._file.host.connect(session, host, port, self._file.options.send_patience_ns if patient else timeout_ns)
        except (BlockingIOError, TimeoutError) as error:
            if patient and error.errno is None:  # socket(7), SO_SNDTIMEO
                raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS)) from None
            # It goes on; without a wait its outcome may be there already, and is told to who asks next.
            self._file.connecting = isinstance(error, BlockingIOError) or (
                session.state in _UNCONNECTED and session.ready == 0
            )
            raise
        self._adopt(session, True)
        self._file.options.apply(session)
        if self._file.inheritable:
            self._publish(session)

    def _already(self, session: Session) -> bool:
        """connect() again: True when what was started before has succeeded (connect(2): 0, EALREADY, EISCONN)."""
        if self._file.listening:
            raise OSError(errno.EISCONN, "a listening socket cannot connect")
        if not self._file.connecting:
            if session.live and session.state not in _UNCONNECTED:
                raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
            return False
        ready = session.ready if self._timeout_ns == 0 else session.wait(WRITABLE, self._timeout_ns)
        number = session.take_error()
        if number or ready & (ERROR | HUP):
            self._file.connecting = False
            raise OSError(number or errno.ECONNABORTED, os.strerror(number or errno.ECONNABORTED))
        if not ready & WRITABLE:
            if self._timeout_ns > 0:
                raise TimeoutError("timed out")
            raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY))
        self._file.connecting = False
        self._adopt(session, True)
        self._file.options.apply(session)
        return True

    def connect_ex(self, address: Any, /) -> int:
        """connect() that returns the errno, 0 on success. Errors of name look-up are raised."""
        try:
            self.connect(address)
        except _std.gaierror:
            raise
        except OSError as e:
            return e.errno or errno.EAGAIN  # a time-out of our own has none
        return 0

    def getsockname(self) -> _Address:
        """The local (address, port); ("0.0.0.0", 0) without one."""
        session = self._need()
        if self._file.bound is not None and session.peer is None:
            return self._file.bound
        return session.local

    def getpeername(self) -> _Address:
        """The peer's (address, port); ENOTCONN without one."""
        session = self._need()
        peer = session.peer
        if peer is None or (self.type == _std.SOCK_STREAM and (self._file.listening or session.state in _UNCONNECTED)):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return peer

    def shutdown(self, how: int, /) -> None:
        """SHUT_RD, SHUT_WR (the peer reads end of file) or SHUT_RDWR."""
        if _c_int(how) not in (_std.SHUT_RD, _std.SHUT_WR, _std.SHUT_RDWR):
            raise OSError(errno.EINVAL, f"shutdown() takes SHUT_RD, SHUT_WR or SHUT_RDWR, not {how}")
        self._need().shutdown(int(how))
        if self._file.listening and how != _std.SHUT_WR:
            self._file.listening = False  # as Linux: accept() is invalid from here on

    # -- options --

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None, /) -> None:
        """Set an option to an int or packed bytes. ENOPROTOOPT: not one of this stack's."""
        self._file.options.set(self._need(), level, optname, value, optlen)
        self._options_hold()

    def getsockopt(self, level: int, optname: int, buflen: int = 0, /) -> Any:
        """An option's value: an int, or bytes when buflen is given."""
        if level == _std.SOL_SOCKET and optname == _std.SO_ERROR and self._file.connecting:
            return self._connect_error()
        return self._file.options.get(self._need(), level, optname, listening=self._file.listening, buflen=buflen)

    def _connect_error(self) -> int:
        # How programs learn the outcome of a connect that they did not wait for.
        session = self._need()
        number = session.take_error()
        if number:
            self._file.connecting = False
        elif session.live and session.state not in _UNCONNECTED:
            # Still "connecting": as with Linux the next connect() is told of the success, too.
            self._adopt(session, True)
            self._file.options.apply(session)
        return number

    # -- files and descriptors --

    def fileno(self) -> int:
        """A descriptor for select, poll and epoll, made at the first call; -1 once closed."""
        session = self.session
        if session is None:
            return -1
        return self._fd if self._fd >= 0 else show(session)

    def dup(self) -> socket:
        """Another socket, with a descriptor of its own, for the same connection; it ends with the last of them."""
        self._need()
        fd = os.dup(self.fileno())
        try:
            twin = type(self)(self.family, self.type, self.proto, fd)
        except BaseException:
            os.close(fd)
            raise
        twin.settimeout(self.gettimeout())
        return twin

    def get_inheritable(self) -> bool:
        """Does a program run by exec get the descriptor?"""
        self._need()
        return os.get_inheritable(self.fileno())

    def set_inheritable(self, inheritable: bool, /) -> None:
        """True: programs run by exec get the descriptor, and ``socket(fileno=...)`` there takes it over.

        The session then stays in the network server, for nobody can tell who has its descriptor.
        """
        session = self._need()
        self._file.inheritable = bool(inheritable)
        if inheritable or session.shared:
            self._publish(session)
        os.set_inheritable(self.fileno(), self._file.inheritable)

    def _publish(self, session: Session) -> None:
        # Without a name there is nothing to place in the server yet.
        if session.session_id:
            self._file.host.publish(session, self._file.inheritable)

    def detach(self) -> int:
        """Leave the connection to its descriptor, which carries the data from now on: os.read and os.write do, too.

        ``socket(fileno=...)`` takes it over; closing the descriptor ends it.
        """
        session = self.session
        if session is None:
            return -1
        fd = self.fileno()
        if self._file.users > 1:
            self._file.users -= 1  # others go on with it
        else:
            try:
                own = self._file.host.leave(session)
                if own != fd:
                    os.close(own)
            except OSError:
                # Without a name, or without a server: kept until socket(fileno=) or close(fd) of this module.
                keeper = socket.__new__(socket)
                keeper._closed, keeper._io_refs, keeper._fd = False, 0, self._fd
                keeper.proto, keeper.type, keeper.family, keeper._file = self.proto, self.type, self.family, self._file
                keeper._adopt(session, self._named)
                _detached[fd] = keeper
        self._adopt(None, False)
        self._fd = -1
        self._closed = True
        return fd

    # -- the end --

    def close(self) -> None:
        """Done with it. The connection ends in the background: what was sent is delivered, nothing blocks."""
        self._closed = True
        if self._io_refs <= 0:
            self._real_close()

    def _decref_socketios(self) -> None:  # called by the standard SocketIO
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    def _real_close(self, linger: bool = True) -> None:
        session = self.session
        if session is None:
            return
        if linger and self._file.users == 1 and self._file.options.linger_s > 0:
            self._linger(session)
        self._adopt(None, False)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._file.users -= 1
        if not self._file.users:
            self._file.host.close(session, abort=self._file.options.abort_on_close)

    def _linger(self, session: Session) -> None:
        # socket(7), SO_LINGER: until the peer has acknowledged all, or the time is over.
        if self._file.listening or session.state in _UNCONNECTED or session.stat().get("unread_bytes"):
            return
        deadline = time.monotonic_ns() + self._file.options.linger_s * 1_000_000_000
        with contextlib.suppress(OSError):
            session.shutdown(_std.SHUT_WR)
            while session.state in _LINGERING and time.monotonic_ns() < deadline:
                session.wait(0, _LINGER_STEP_NS)

    def __enter__(self) -> socket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self.close()

    def __del__(self) -> None:
        if self.session is None:
            return
        if not self._closed and not sys.is_finalizing():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        with contextlib.suppress(Exception):
            self._real_close(linger=False)  # differs: the collector does not wait

    def __repr__(self) -> str:
        session = self.session
        text = f"<{type(self).__module__}.{type(self).__qualname__}"
        if session is None:
            return f"{text} [closed] fd=-1>"
        if session.descriptor >= 0:  # looking at a socket must not make one
            text += f" fd={session.descriptor},"
        text += f" family={self.family}, type={self.type}, proto={self.proto}"
        with contextlib.suppress(OSError):
            text += f", laddr={self.getsockname()}"
            text += f", raddr={self.getpeername()}"
        return f"{text}>"

    def __reduce__(self) -> str:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")


def _wrap(host: Host, session: Session, proto: int, options: Options, named: bool) -> socket:
    """A socket around a session that exists already."""
    sock = socket.__new__(socket)
    sock._closed = True
    sock._io_refs = 0
    sock._fd = -1
    sock._setup(host, session, proto, options, named)
    return sock


def _c_int(value: int) -> int:
    """A number that must fit a C int, as the standard module's argument parsing has it."""
    number = operator.index(value)
    if not -0x80000000 <= number <= 0x7FFFFFFF:
        raise OverflowError(
            "signed integer is greater than maximum" if number > 0 else "signed integer is less than minimum"
        )
    return number


def _show(address: _Address) -> str:
    return f"{address[0]}:{address[1]}"


SocketType = socket


# -- functions that open sockets -----------------------------------------------------------------


def getdefaulttimeout() -> float | None:
    """The time-out of new sockets, in seconds; None: they wait for ever."""
    return _default_timeout


def setdefaulttimeout(value: float | None, /) -> None:
    """Set the time-out of new sockets of this module (the standard module has one of its own)."""
    global _default_timeout
    if value is not None and not value >= 0:
        raise ValueError("Timeout value out of range")
    _default_timeout = value


def create_connection(
    address: tuple[str | None, int],
    timeout: float | None = _GLOBAL_DEFAULT_TIMEOUT,
    source_address: _Address | None = None,
    *,
    all_errors: bool = False,
    host: Host | None = None,
) -> socket:
    """Connect to (name, port), trying each IPv4 address. Raises the last error (``all_errors``: all of them)."""
    errors: list[OSError] = []
    for family, kind, proto, _, target in getaddrinfo(address[0], address[1], _std.AF_INET, _std.SOCK_STREAM):
        sock = None
        try:
            sock = socket(family, kind, proto) if host is None else socket(family, kind, proto, host=host)
            if timeout is not _GLOBAL_DEFAULT_TIMEOUT:
                sock.settimeout(timeout)
            if source_address:
                sock.bind(source_address)
            sock.connect(target)
            return sock
        except OSError as e:
            errors.append(e)
            if sock is not None:
                sock.close()
    try:
        if not errors:
            raise OSError("getaddrinfo returns an empty list")
        if all_errors:
            raise ExceptionGroup("create_connection failed", errors)
        raise errors[-1]
    finally:
        errors.clear()  # breaks the cycle through the traceback


def create_server(
    address: _Address,
    *,
    family: int = _std.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
    host: Host | None = None,
) -> socket:
    """A listening TCP socket bound to (host, port), with SO_REUSEADDR."""
    if dualstack_ipv6:
        raise ValueError("dualstack_ipv6 not supported on this platform")
    sock = socket(family, _std.SOCK_STREAM) if host is None else socket(family, _std.SOCK_STREAM, host=host)
    try:
        sock.setsockopt(_std.SOL_SOCKET, _std.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(_std.SOL_SOCKET, _std.SO_REUSEPORT, 1)
        try:
            sock.bind(address)
        except OSError as e:
            message = f"{e.strerror} (while attempting to bind on address {address!r})"
            raise OSError(e.errno, message) from None
        if backlog is None:
            sock.listen()
        else:
            sock.listen(backlog)
        return sock
    except BaseException:
        sock.close()
        raise


def has_dualstack_ipv6() -> bool:
    """False: this stack speaks IPv4."""
    return False


def fromfd(fd: int, family: int, type: int, proto: int = 0) -> socket:
    """A socket around a duplicate of a descriptor: of this process's own, or one that was passed to it."""
    copy = os.dup(fd)
    try:
        return socket(family, type, proto, copy)
    except BaseException:
        os.close(copy)
        raise


def close(fd: int, /) -> None:
    """Close what ``detach()`` left: a connection of this stack, or any other descriptor."""
    sock = _detached.pop(fd, None)
    if sock is None:
        _std.close(fd)
    else:
        sock.close()


if not TYPE_CHECKING:
    # Everything else is the standard module's: constants, exceptions, look-ups.
    globals().update((name, value) for name, value in vars(_std).items() if name not in globals())

__all__ = sorted({name for name in _std.__all__ if name in globals()} | {"get_default_host", "set_default_host"})

import ulnet.stack.passing  # noqa: E402, F401  so that multiprocessing knows how to pass sockets on
