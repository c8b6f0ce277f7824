"""``socket.socket`` of a whole program (``ulnet.patch``): one class that gives ulnet's sockets or the kernel's.

TCP and UDP over IPv4 run on this stack; every other family, type and protocol is the kernel's. 127.0.0.0/8 is the
kernel's too, in the namespace of the program: a socket that binds or connects there first becomes *held*: it keeps its
identity and hands each call to a kernel socket inside it. So does a subclass's instance of another family.

Import this module before the standard one is patched: it keeps the kernel's class.
"""

from __future__ import annotations

import errno
import fcntl
import socket as _std
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from ulnet.stack import socket as _ulnet
from ulnet.stack._socket import parse_address
from ulnet.stack.host import Host

KernelSocket: Final = _std.socket
_S = TypeVar("_S", bound=_ulnet.socket)
_AF_INET: Final = _std.AF_INET
_AF_UNIX: Final = _std.AF_UNIX
_FLAGS: Final = _std.SOCK_NONBLOCK | _std.SOCK_CLOEXEC
_OURS: Final = frozenset(
    (kind, proto)
    for kind, own in ((_std.SOCK_STREAM, _std.IPPROTO_TCP), (_std.SOCK_DGRAM, _std.IPPROTO_UDP))
    for proto in (-1, 0, own)
)
# Sockets of this stack whose descriptor a program has seen.
_seen: WeakValueDictionary[int, _ulnet.socket] = WeakValueDictionary()


def is_ours(sock: object) -> bool:
    """Its bytes go through this stack: not the kernel's socket, and not one that holds one."""
    return issubclass(type(sock), _ulnet.socket) and not issubclass(type(sock), Held)


def private_socket(fd: int) -> _ulnet.socket | None:
    """The socket of this stack whose descriptor ``fd`` is: for waiting, not for plain reads and writes."""
    sock = _seen.get(fd)
    if sock is not None and is_ours(sock) and sock.session is not None and sock.session.fileno() == fd:
        return sock
    return None


def descriptor_is_private(fd: int) -> bool:
    """``fd`` is the descriptor of a socket of this stack."""
    return private_socket(fd) is not None


def runs_here(family: int, type: int, proto: int) -> bool:
    """socket(family, type, proto) is this stack's (-1: not given)."""
    return family in (-1, _AF_INET) and (1 if type == -1 else type & ~_FLAGS, proto) in _OURS


def _open(
    family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None, *, host: Host | None = None
) -> Any:
    """What ``socket.socket(...)`` gives."""
    if fileno is None:
        if host is not None or runs_here(family, type, proto):
            return _Dispatch.make(socket, family, type, proto, host=host)
        return KernelSocket(family, type, proto)
    if family in (-1, _AF_INET) and is_unix(fileno):
        sock = _Dispatch.make(socket, fileno=fileno)
        if is_ours(sock):
            return sock
        fileno = sock.detach()
    return KernelSocket(family, type, proto, fileno)


def is_unix(fd: int) -> bool:
    """The kernel says that ``fd`` is an AF_UNIX socket, as the descriptors of this stack are."""
    try:
        kernel = KernelSocket(_AF_UNIX, _std.SOCK_STREAM, 0, fd)
    except (OSError, TypeError, ValueError):
        return False  # the caller says what is wrong with it
    try:
        return kernel.getsockopt(_std.SOL_SOCKET, _std.SO_DOMAIN) == _AF_UNIX
    except OSError:
        return False
    finally:
        kernel.detach()


class _Dispatch(type):
    """The class of ``socket.socket``: decides what a call gives, and what counts as an instance."""

    make = type.__call__

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _open(*args, **kwargs) if cls is socket else type.__call__(cls, *args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        if cls is socket:
            return isinstance(instance, (_ulnet.socket, KernelSocket))
        return type.__instancecheck__(cls, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls is socket:
            return issubclass(subclass, (_ulnet.socket, KernelSocket))
        return type.__subclasscheck__(cls, subclass)


class socket(_ulnet.socket, metaclass=_Dispatch):
    """A network socket: TCP and UDP over IPv4 by ulnet, the rest by the kernel. Arguments as the standard class's."""

    # _number: of the descriptor, once the program has asked for it; else -1. _settings: setsockopt() before a name.
    __slots__ = ("_kernel", "_number", "_settings")
    _kernel: _std.socket
    _number: int

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None, *, host: Host | None = None
    ) -> None:
        self._fresh()
        # Of a subclass, the call comes here directly; of this class, _open() has decided already.
        if fileno is None and (host is not None or runs_here(family, type, proto)):
            super().__init__(family, type, proto, host=host)
            return
        if fileno is not None:
            try:
                super().__init__(family, type, proto, fileno)
                return
            except OSError:
                pass  # not of this stack, or there is no server to ask: then the kernel's word counts
        self._hold(KernelSocket(family, type, proto, fileno))

    def _fresh(self) -> None:
        self._number = -1
        self._settings: list[tuple[Any, ...]] = []

    def _hold(self, kernel: _std.socket) -> None:
        """From here on each call goes to ``kernel``."""
        self._kernel = kernel
        self._io_refs = 0
        self._closed = False
        self.family, self.type, self.proto = kernel.family, kernel.type, kernel.proto
        self.__class__ = _holding(type(self))

    def _turn(self) -> _std.socket:
        """The program names a loopback address: an unnamed socket becomes the kernel's, its settings kept."""
        kernel = KernelSocket(self.family, self.type, self.proto)
        try:
            for setting in self._settings:
                kernel.setsockopt(*setting)
            kernel.settimeout(self.gettimeout())
        except BaseException:
            kernel.close()
            raise
        io_refs, number = self._io_refs, self._number
        _ulnet.socket._real_close(self)
        if number >= 0:
            # asyncio's sock_connect() takes the number before it connects: it stays the same. Should another thread
            # have taken it in this very moment, F_DUPFD gives the next one.
            copy = fcntl.fcntl(kernel.fileno(), fcntl.F_DUPFD_CLOEXEC, number)
            timeout = kernel.gettimeout()
            kernel.close()
            kernel = KernelSocket(self.family, self.type, self.proto, copy)
            kernel.settimeout(timeout)
        self._hold(kernel)
        self._io_refs = io_refs
        return kernel

    def _place(self, address: Any, call: str) -> tuple[tuple[str, int], bool]:
        # The address looked up, and whether it is the kernel's.
        found = parse_address(address, call)
        return found, found[0].startswith("127.")

    def bind(self, address: Any, /) -> None:
        if not self._named:
            address, loopback = self._place(address, "bind")
            if loopback:
                self._turn().bind(address)
                return
        super().bind(address)

    def connect(self, address: Any, /) -> None:
        if not self._named:
            address, loopback = self._place(address, "connect")
            if loopback:
                self._turn().connect(address)
                return
        super().connect(address)

    def sendto(self, data: Any, flags_or_address: Any, address: Any = None, /) -> int:
        if not self._named and self.type == _std.SOCK_DGRAM:
            flags, to = (0, flags_or_address) if address is None else (flags_or_address, address)
            to, loopback = self._place(to, "sendto")
            return self._turn().sendto(data, flags, to) if loopback else super().sendto(data, flags, to)
        if address is None:
            return super().sendto(data, flags_or_address)
        return super().sendto(data, flags_or_address, address)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        if address is not None and not self._named and self.type == _std.SOCK_DGRAM:
            address, loopback = self._place(address, "sendmsg")
            if loopback:
                return self._turn().sendmsg(buffers, ancdata, flags, address)
        return super().sendmsg(buffers, ancdata, flags, address)

    def accept(self) -> tuple[socket, tuple[str, int]]:
        sock, peer = super().accept()
        return adopt(sock, socket), peer

    def setsockopt(self, *setting: Any) -> None:
        super().setsockopt(*setting)
        if not self._named:
            self._settings.append(setting)

    def fileno(self) -> int:
        fd = super().fileno()
        if fd >= 0:
            self._number = fd
            _seen[fd] = self
        return fd


socket.__module__ = "socket"  # in repr, as the standard class


def adopt(sock: _ulnet.socket, cls: type[_S]) -> _S:
    """A socket of class ``cls`` in place of ``sock``, which is closed afterwards; the connection is not."""
    new = cls.__new__(cls)
    session, named = sock._need(), sock._named
    for name in _ulnet.socket.__slots__:
        setattr(new, name, getattr(sock, name))
    new._io_refs = 0
    new._adopt(session, named)
    new.settimeout(sock.gettimeout())
    if isinstance(new, socket):
        new._fresh()
    sock._adopt(None, False)
    sock._closed = True
    return new


def rebuild(make: Callable[..., _ulnet.socket], arguments: tuple[Any, ...]) -> socket:
    """What multiprocessing carried, in the process it came to."""
    return adopt(make(*arguments), socket)


def move(sock: _ulnet.socket) -> _ulnet.socket:
    """``sock`` under another object of its kind, as detach() and socket(fileno=) would do."""
    return adopt(sock, socket if issubclass(type(sock), socket) else _ulnet.socket)


class Held(socket):
    """A socket whose calls go to a kernel socket inside it."""

    __slots__ = ()

    def _real_close(self, linger: bool = True) -> None:
        self._kernel.close()

    def detach(self) -> int:
        self._closed = True
        return self._kernel.detach()

    def __del__(self) -> None:
        pass  # the kernel socket warns for itself

    def __repr__(self) -> str:
        return repr(self._kernel)

    @property
    def timeout(self) -> float | None:
        return self._kernel.gettimeout()

    def recv_buffer(self, max_bytes: int = 65536, /) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, "recv_buffer() needs a socket of ulnet; this one is the kernel's (127.0.0.0/8)")


def _hand_on(name: str) -> Callable[..., Any]:
    function = getattr(KernelSocket, name)

    def call(self: Held, *args: Any, **kwargs: Any) -> Any:
        return function(self._kernel, *args, **kwargs)

    call.__name__ = name
    call.__doc__ = function.__doc__
    return call


for _name in (
    *("accept", "bind", "connect", "connect_ex", "dup", "fileno", "get_inheritable", "getblocking", "getpeername"),
    *("getsockname", "getsockopt", "gettimeout", "listen", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg"),
    *("recvmsg_into", "send", "sendall", "sendfile", "sendmsg", "sendto", "set_inheritable", "setblocking"),
    *("setsockopt", "settimeout", "shutdown"),
):
    setattr(Held, _name, _hand_on(_name))
del _name

_twins: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def _holding(cls: type) -> type:
    """The class for instances of ``cls`` that hold a kernel socket: its own methods first, then Held's."""
    if cls is socket or issubclass(cls, Held):
        return Held if cls is socket else cls
    twin = _twins.get(cls)
    if twin is None:
        body = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        make: Any = type(cls)
        twin = _twins[cls] = make(cls.__name__, (cls, Held), body)
    return twin
