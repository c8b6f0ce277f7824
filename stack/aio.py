"""asyncio over our sockets: an event loop that waits in their engine and opens its connections there.

``aio.run(main())`` in place of ``asyncio.run(main())``, or ``asyncio.Runner(loop_factory=aio.new_event_loop)``.
Streams, transports, servers, ``loop.sock_*`` and TLS are asyncio's own code. While the loop is busy with our sockets
it makes no system call to learn what is ready.

asyncio knows its sockets by number. Inside this loop the number is only a name (``Session.number``): the descriptor
behind it shows readiness from the moment that somebody else asks ``fileno()``.

differs: names are resolved to IPv4 only. ``bind`` and UDP ``connect`` wait for the server's answer (about 1 ms).
"""

from __future__ import annotations

import asyncio
import socket as _std
import sys
from asyncio import SendfileNotAvailableError
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar, cast

from ulnet.stack import socket
from ulnet.stack._socket import Socket
from ulnet.stack.host import Host
from ulnet.stack.openfile import session_behind
from ulnet.stack.selectors import UlnetSelector

_T = TypeVar("_T")
_Infos = list[tuple[Any, Any, int, str, Any]]
_HOT: Final = ("recv", "recv_into", "recvfrom", "send", "sendmsg", "sendto")


class _Named:
    """A socket as asyncio's code sees it: ``fileno()`` gives its number, and nobody steers the descriptor for that."""

    __slots__ = ("__weakref__", "_sock", "fileno", *_HOT)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        session = sock.session
        self.fileno: Callable[[], int] = sock.fileno if session is None else session.number
        for name in _HOT:
            setattr(self, name, getattr(sock, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def __repr__(self) -> str:
        return repr(self._sock)


def _named(sock: Any) -> Any:
    return _Named(sock) if isinstance(sock, socket.socket) else sock


def _number(file: Any) -> Any:
    session = session_behind(file)
    return file if session is None else session.number()


class EventLoop(asyncio.SelectorEventLoop):
    """``asyncio.SelectorEventLoop`` over our sockets. ``host``: where sessions are set up; None: the default host."""

    def __init__(self, host: Host | None = None) -> None:
        super().__init__(UlnetSelector(relaxed=True))
        self._ulnet_host = host

    # -- asyncio's own code gets named sockets --

    def _make_socket_transport(self, sock: Any, *args: Any, **options: Any) -> Any:
        base: Any = super()
        named = _named(sock)
        transport = base._make_socket_transport(named, *args, **options)
        return _told(named, sock, transport)

    def _make_ssl_transport(self, rawsock: Any, *args: Any, **options: Any) -> Any:
        base: Any = super()
        named = _named(rawsock)
        transport = base._make_ssl_transport(named, *args, **options)
        return _told(named, rawsock, transport)

    def _make_datagram_transport(self, sock: Any, *args: Any, **options: Any) -> Any:
        base: Any = super()
        named = _named(sock)
        transport = base._make_datagram_transport(named, *args, **options)
        return _told(named, sock, transport)

    def _start_serving(self, protocol_factory: Any, sock: Any, *args: Any, **options: Any) -> None:
        base: Any = super()
        base._start_serving(protocol_factory, _named(sock), *args, **options)

    def _stop_serving(self, sock: Any) -> None:
        base: Any = super()
        base._stop_serving(_named(sock))

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """See asyncio."""
        super().add_reader(_number(fd), callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        """See asyncio."""
        return super().remove_reader(_number(fd))

    def add_writer(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """See asyncio."""
        super().add_writer(_number(fd), callback, *args)

    def remove_writer(self, fd: Any) -> bool:
        """See asyncio."""
        return super().remove_writer(_number(fd))

    async def sock_recv(self, sock: Any, n: int) -> bytes:
        """See asyncio."""
        return await super().sock_recv(_named(sock), n)

    async def sock_recv_into(self, sock: Any, buf: Any) -> int:
        """See asyncio."""
        return await super().sock_recv_into(_named(sock), buf)

    async def sock_recvfrom(self, sock: Any, bufsize: int) -> tuple[bytes, Any]:
        """See asyncio."""
        return await super().sock_recvfrom(_named(sock), bufsize)

    async def sock_recvfrom_into(self, sock: Any, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """See asyncio."""
        return await super().sock_recvfrom_into(_named(sock), buf, nbytes)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        """See asyncio."""
        await super().sock_sendall(_named(sock), data)

    async def sock_sendto(self, sock: Any, data: Any, address: Any) -> int:
        """See asyncio."""
        return await super().sock_sendto(_named(sock), data, address)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """See asyncio."""
        await super().sock_connect(_named(sock), address)

    async def sock_accept(self, sock: Any) -> tuple[Any, Any]:
        """See asyncio."""
        return await super().sock_accept(_named(sock))

    async def _sock_sendfile_native(self, sock: Any, *args: Any) -> Any:
        if isinstance(sock, Socket | _Named):
            raise SendfileNotAvailableError("sendfile(2) goes past this stack")  # asyncio then reads and sends
        base: Any = super()
        return await base._sock_sendfile_native(sock, *args)

    # -- sockets that the loop opens --

    async def _resolve(self, address: tuple[Any, ...], family: int, kind: int, proto: int, flags: int) -> _Infos:
        base: Any = self
        infos: _Infos = await base._ensure_resolved(
            address, family=family or _std.AF_INET, type=kind, proto=proto, flags=flags, loop=self
        )
        if not infos:
            raise OSError("getaddrinfo() returned empty list")
        return infos

    def _socket(self, family: int, kind: int, proto: int) -> socket.socket:
        sock = socket.socket(family, kind, proto, host=self._ulnet_host)
        sock.setblocking(False)
        return sock

    async def _connect_sock(
        self, exceptions: list[list[OSError]], addr_info: Any, local_addr_infos: Iterable[Any] | None = None
    ) -> socket.socket:
        mine: list[OSError] = []
        exceptions.append(mine)
        family, kind, proto, _, address = addr_info
        sock = None
        try:
            sock = self._socket(family, kind, proto)
            if local_addr_infos is not None:
                _bind_one(sock, [info[4] for info in local_addr_infos if info[0] == family])
            await self.sock_connect(sock, address)
            return sock
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, OSError):
                mine.append(error)
            raise

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """See asyncio; the socket is one of ours unless ``sock`` is given."""
        if options.get("sock") is None and not options.get("family"):
            options["family"] = _std.AF_INET
        return await super().create_connection(protocol_factory, host, port, **options)

    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        host: str | Sequence[str] | None = None,
        port: int | str | None = None,
        *,
        family: int = 0,
        flags: int = _std.AI_PASSIVE,
        sock: Any = None,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        start_serving: bool = True,
        **options: Any,
    ) -> asyncio.Server:
        """See asyncio; the sockets are ours unless ``sock`` is given."""
        create: Any = super().create_server
        if sock is not None or (host is None and port is None):
            server: Any = await create(protocol_factory, host, port, sock=sock, start_serving=start_serving, **options)
            return cast(asyncio.Server, server)
        hosts = [host or None] if host is None or isinstance(host, str) else list(host)
        addresses: dict[Any, tuple[int, int, int]] = {}
        for name in hosts:
            for fam, kind, proto, _, address in await self._resolve((name, port), family, _std.SOCK_STREAM, 0, flags):
                addresses.setdefault(address, (fam, kind, proto))
        sockets: list[socket.socket] = []
        try:
            for address, what in addresses.items():
                sockets.append(self._socket(*what))
                if reuse_address is None or reuse_address:
                    sockets[-1].setsockopt(_std.SOL_SOCKET, _std.SO_REUSEADDR, 1)
                if reuse_port:
                    sockets[-1].setsockopt(_std.SOL_SOCKET, _std.SO_REUSEPORT, 1)
                _bind_one(sockets[-1], [address])
            server = await create(protocol_factory, sock=sockets[0], start_serving=False, **options)
        except BaseException:
            for opened in sockets:
                opened.close()
            raise
        server._sockets.extend(sockets[1:])
        if start_serving:
            await server.start_serving()
        return cast(asyncio.Server, server)

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], Any],
        local_addr: Any = None,
        remote_addr: Any = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        sock: Any = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """See asyncio; the socket is one of ours unless ``sock`` is given."""
        create: Any = super().create_datagram_endpoint
        if sock is not None or family == _std.AF_UNIX or not (local_addr or remote_addr or family):
            options |= {"family": family, "proto": proto, "flags": flags, "reuse_port": reuse_port}
            options |= {"allow_broadcast": allow_broadcast, "sock": sock}
            pair: tuple[Any, Any] = await create(protocol_factory, local_addr, remote_addr, **options)
            return pair
        ends: list[Any] = []
        for address in (local_addr, remote_addr):
            if address is None:
                ends.append(None)
                continue
            if not (isinstance(address, tuple) and len(address) == 2):
                raise TypeError("2-tuple is expected")
            ends.append((await self._resolve(address, family, _std.SOCK_DGRAM, proto, flags))[0][4])
        ours = self._socket(family or _std.AF_INET, _std.SOCK_DGRAM, proto)
        try:
            if reuse_port:
                ours.setsockopt(_std.SOL_SOCKET, _std.SO_REUSEPORT, 1)
            if allow_broadcast:
                ours.setsockopt(_std.SOL_SOCKET, _std.SO_BROADCAST, 1)
            if ends[0] is not None:
                _bind_one(ours, [ends[0]])
            if ends[1] is not None:
                await self.sock_connect(ours, ends[1])
            pair = await create(protocol_factory, sock=ours, **options)
        except BaseException:
            ours.close()
            raise
        return pair


def _told(named: Any, sock: Any, transport: Any) -> Any:
    """The transport has taken the number; who asks for it by get_extra_info("socket") wants a true descriptor."""
    if named is not sock:
        named.fileno = sock.fileno
    return transport


def _bind_one(sock: socket.socket, addresses: list[Any]) -> None:
    """Bind to the first address that works. The messages are asyncio's."""
    last: OSError | None = None
    for address in addresses:
        try:
            sock.bind(address)
            return
        except OSError as error:
            text = str(error.strerror or error).lower()
            last = OSError(error.errno, f"error while attempting to bind on address {address!r}: {text}")
    raise last if last is not None else OSError(f"no matching local address with family={sock.family!r} found")


def new_event_loop(host: Host | None = None) -> EventLoop:
    """A loop over our sockets; ``host``: where sessions are set up."""
    return EventLoop(host)


def run(main: Coroutine[Any, Any, _T], *, debug: bool | None = None, host: Host | None = None) -> _T:
    """``asyncio.run`` with such a loop."""
    with asyncio.Runner(debug=debug, loop_factory=lambda: EventLoop(host)) as runner:
        return runner.run(main)


if sys.version_info < (3, 14):  # deprecated there: use run(), or loop_factory

    class EventLoopPolicy(asyncio.DefaultEventLoopPolicy):
        """For ``asyncio.set_event_loop_policy``: every new loop is one over our sockets."""

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            """See asyncio."""
            return EventLoop()
