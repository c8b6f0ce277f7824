"""``import ulnet.patch``: this whole program, its libraries and its Python children included, runs on ulnet's sockets.

The standard ``socket``, ``ssl``, ``select`` and ``selectors`` modules get ulnet's names in place of their own. Who has
imported *names* from them before (``from socket import socket``) keeps those: import this first, or use ``ulnet run``.
Python children that get this process's environment are patched too (ulnet/children). ``undo()`` gives the standard
modules their names back; sockets that exist stay what they are.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import selectors
import socket
import ssl  # before anything is replaced: ssl.SSLSocket stays derived from the kernel's class
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import reduction  # it registers the kernel's class under the name it finds
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

from ulnet import standin
from ulnet.stack import dispatch, openfile, proxy, resolve, tls  # noqa: F401 (proxy: it must know the true modules)
from ulnet.stack import socket as _ulnet

_SENDFILE_BYTES: Final = 1 << 20
VARIABLE: Final = "ULNET_PATCH"  # names the interpreter whose children are patched
CHILDREN: Final = str(Path(__file__).resolve().parent / "children")

_std_close = socket.close
_std_fork_exec: Any = getattr(subprocess, "_fork_exec", None)
_std_fromfd = socket.fromfd
_std_sendfile = os.sendfile
_std_setdefaulttimeout = socket.setdefaulttimeout

_undo: list[Callable[[], object]] = []


def is_installed() -> bool:
    """The standard modules have ulnet's names now."""
    return bool(_undo)


def install(*, children: bool = True) -> None:
    """Patch the standard modules, and the Python children started from here on. Does nothing the second time."""
    if _undo:
        return
    for module in (select, selectors):
        _own(module)  # before it could see the patched one
    _set_aside((socket, ssl, select, selectors))
    _teach_pickling()
    for name, value in _socket_names().items():
        _replace(socket, name, value)
    _replace(ssl.SSLContext, "sslsocket_class", tls.Choice)
    _replace(os, "sendfile", _sendfile)
    if hasattr(subprocess, "_fork_exec"):
        _replace(subprocess, "_fork_exec", _fork_exec)
    for module in (select, selectors):
        _take_names(module)
    standin.install()
    _undo.append(standin.undo)
    if children:
        _reach_children()


def undo() -> None:
    """Give the standard modules their own names back."""
    while _undo:
        _undo.pop()()


def _replace(target: Any, name: str, value: Any) -> None:
    before = getattr(target, name)
    setattr(target, name, value)
    _undo.append(lambda: setattr(target, name, before))


def _set_aside(modules: tuple[ModuleType, ...]) -> None:
    """ulnet's own modules go on with the standard modules as they are now, but for the look-up of names."""
    for module in modules:
        copy = ModuleType(module.__name__, module.__doc__)
        vars(copy).update(vars(module))
        if module is socket:
            vars(copy).update({name: getattr(resolve, name) for name in resolve.__all__})
        for name, own in list(sys.modules.items()):
            if name.startswith("ulnet.") and own is not None and name != __name__ and own is not resolve:
                for key, value in list(vars(own).items()):
                    if value is module:
                        _replace(own, key, copy)


def _socket_names() -> dict[str, Any]:
    names: dict[str, Any] = {name: getattr(resolve, name) for name in resolve.__all__}
    return names | {
        "socket": dispatch.socket,
        "SocketType": dispatch.socket,
        "close": _close,
        "fromfd": _fromfd,
        "setdefaulttimeout": _setdefaulttimeout,
        "has_ipv6": False,
        "has_dualstack_ipv6": _ulnet.has_dualstack_ipv6,
    }


def _take_names(module: ModuleType) -> None:
    """What ulnet.stack has of a module's names."""
    ours = _own(module)
    for name in getattr(ours, "__all__", ()):
        if hasattr(module, name) and getattr(ours, name) is not getattr(module, name):
            _replace(module, name, getattr(ours, name))


def _own(module: ModuleType) -> ModuleType | None:
    try:
        return importlib.import_module(f"ulnet.stack.{module.__name__}")
    except ModuleNotFoundError:
        return None  # our descriptors tell the standard ones the truth


def _teach_pickling() -> None:
    """multiprocessing carries sockets by their exact class: those of the patch like the classes they stand for."""
    known = cast(Any, reduction.ForkingPickler)._extra_reducers
    reduction.register(dispatch.Held, known[dispatch.KernelSocket])
    plain = known.get(_ulnet.socket)
    if plain is not None:
        reduction.register(dispatch.socket, lambda sock: (dispatch.rebuild, plain(sock)))


# -- functions of the socket module that take descriptors ------------------------------------------


def _close(fd: int, /) -> None:
    _ulnet.close(fd)


def _fork_exec(arguments: Any, programs: Any, close_fds: Any, pass_fds: Any, *more: Any) -> Any:
    """Before subprocess forks: a connection given as a standard stream or by ``pass_fds`` is placed in the server, so
    that its descriptor carries the data itself, as an inetd expects."""
    # cwd, env, then the pipes: p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
    for fd in {*pass_fds, more[2], more[5], more[7]}:
        session = openfile.find(fd) if fd >= 0 else None
        if session is not None:
            session.file.host.publish(session, True)
    return _std_fork_exec(arguments, programs, close_fds, pass_fds, *more)


def _fromfd(fd: int, family: int, type: int, proto: int = 0) -> Any:
    """As socket.fromfd(), for a descriptor of either kind."""
    if dispatch.runs_here(family, type, proto) and dispatch.is_unix(fd):
        return dispatch.adopt(_ulnet.fromfd(fd, family, type, proto), dispatch.socket)
    return _std_fromfd(fd, family, type, proto)


def _setdefaulttimeout(value: float | None, /) -> None:
    _std_setdefaulttimeout(value)
    _ulnet.setdefaulttimeout(value)


def _sendfile(out_fd: int, in_fd: int, offset: int | None, count: int, *more: Any, **options: Any) -> int:
    sock = dispatch.private_socket(out_fd)
    if sock is not None:
        return _send_part(sock, in_fd, offset, count)
    return _std_sendfile(out_fd, in_fd, offset, count, *more, **options)


def _send_part(sock: _ulnet.socket, in_fd: int, offset: int | None, count: int) -> int:
    """sendfile(2) into a socket of this stack: as much as one send takes, from ``offset`` or the file's position."""
    at = os.lseek(in_fd, 0, os.SEEK_CUR) if offset is None else offset
    data = os.pread(in_fd, min(count, _SENDFILE_BYTES), at)
    if not data:
        return 0
    waits = sock.gettimeout() is None  # a time-out of Python's means a descriptor that does not wait
    sent = sock.send(data, 0 if waits else _ulnet.MSG_DONTWAIT)
    if offset is None:
        os.lseek(in_fd, at + sent, os.SEEK_SET)
    return sent


# -- children --------------------------------------------------------------------------------------


def _reach_children() -> None:
    _environ(VARIABLE, sys.implementation.cache_tag or sys.implementation.name)
    before = os.environ.get("PYTHONPATH")
    if before is None or CHILDREN not in before.split(os.pathsep):
        _environ("PYTHONPATH", CHILDREN if not before else CHILDREN + os.pathsep + before)


def _environ(name: str, value: str) -> None:
    before = os.environ.get(name)
    os.environ[name] = value

    def back() -> None:
        if before is not None:
            os.environ[name] = before
        else:
            with contextlib.suppress(KeyError):
                del os.environ[name]

    _undo.append(back)


install()
