"""TLS for blocking sockets: the interface of ``ssl.SSLSocket`` over a socket of this stack.

``wrap(context, sock)``, or ``context.wrap_socket(sock)`` once ``install()`` was called (``ulnet.patch`` does).
``ssl.SSLSocket`` lets OpenSSL read and write a kernel descriptor; here ``tls_records`` stands between the two.
"""

from __future__ import annotations

import errno
import socket as _std
import ssl
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from ulnet.stack import dispatch
from ulnet.stack import socket as _ulnet
from ulnet.stack.tls_records import CHUNK_BYTES, Records

if TYPE_CHECKING:
    from ssl import SSLSocket as _NativeSSLSocket
else:
    _NativeSSLSocket = ssl.SSLSocket


def wrap(
    context: ssl.SSLContext,
    sock: _ulnet.socket,
    server_side: bool = False,
    do_handshake_on_connect: bool = True,
    suppress_ragged_eofs: bool = True,
    server_hostname: str | bytes | None = None,
    session: ssl.SSLSession | None = None,
) -> SSLSocket:
    """As ``context.wrap_socket``, for a socket of this stack, whose session the result takes over."""
    if sock.type != _std.SOCK_STREAM:
        raise NotImplementedError("only stream sockets are supported")
    if server_side and server_hostname:
        raise ValueError("server_hostname can only be specified in client mode")
    if server_side and session is not None:
        raise ValueError("session can only be specified in client mode")
    if context.check_hostname and not server_hostname:
        raise ValueError("check_hostname requires server_hostname")
    made: SSLSocket = SSLSocket.__new__(SSLSocket)
    made._begin(sock, context, cast(Any, context)._encode_hostname(server_hostname), session)
    made.server_side = server_side
    made.do_handshake_on_connect = do_handshake_on_connect
    made.suppress_ragged_eofs = suppress_ragged_eofs
    try:
        made._start()
    except (OSError, ValueError):
        made.close()
        raise
    return made


def install() -> None:
    """From here on ``SSLContext.wrap_socket`` takes sockets of this stack, too."""
    ssl.SSLContext.sslsocket_class = Choice


class SSLSocket:
    """A TLS connection; made by ``wrap``. The calls and their errors are those of ``ssl.SSLSocket``."""

    server_side: bool
    do_handshake_on_connect: bool
    suppress_ragged_eofs: bool

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance(sock, ssl.SSLSocket): ftplib and asyncio ask
        return _NativeSSLSocket

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("SSLSocket does not have a public constructor: use ulnet.stack.tls.wrap() or wrap_socket()")

    def _begin(
        self, sock: _ulnet.socket, context: ssl.SSLContext, hostname: str | None, session: ssl.SSLSession | None
    ) -> None:
        self._closed = False
        self._io_refs = 0
        self._raw = dispatch.move(sock)
        self.server_hostname = hostname
        self._context = context
        self._session = session
        self._tls: Records | None = None
        self._connected = False

    def _start(self) -> None:
        try:
            self._raw.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            self._refuse_early_data()
            return
        self._connected = True
        self._begin_tls()
        if self.do_handshake_on_connect:
            if not self.getblocking():
                raise ValueError("do_handshake_on_connect should not be specified for non-blocking sockets")
            self.do_handshake()

    def _refuse_early_data(self) -> None:
        # As the standard class (CVE-2023-40217): what came before a connection ended must not pass for TLS data.
        try:
            early = self._raw.recv(1, _std.MSG_DONTWAIT)
        except OSError:
            return
        if early:
            raise ssl.SSLError(errno.ENOTCONN, "Closed before TLS handshake with data in recv buffer.")

    def _begin_tls(self) -> None:
        def make(incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> Any:
            return cast(Any, self._context)._wrap_bio(
                incoming, outgoing, self.server_side, self.server_hostname, owner=self, session=self._session
            )

        self._tls = Records(self._raw, make)

    @property
    def _sslobj(self) -> Any:
        # OpenSSL's object, under the name that the standard class has for it; None: in the clear.
        return None if self._tls is None else self._tls.object

    # -- data --

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Up to ``len`` bytes, or their number in ``buffer``; b"" or 0 at the end."""
        if self._tls is None:
            raise ValueError("Read on closed or unwrapped SSL socket.")
        try:
            return self._tls.read(len, buffer)
        except ssl.SSLError as error:
            if error.args[0] == ssl.SSL_ERROR_EOF and self.suppress_ragged_eofs:
                return b"" if buffer is None else 0
            raise

    def write(self, data: Any) -> int:
        """Send; returns the bytes taken. A blocking socket takes all, others at most 256 KiB.

        SSLWantWriteError, TimeoutError: come again with the same data, which may be encrypted already.
        """
        if self._tls is None:
            raise ValueError("Write on closed or unwrapped SSL socket.")
        total = 0
        with memoryview(data) as view, view.cast("B") as bytes_view:
            while True:
                with bytes_view[total:] as rest:
                    total += self._tls.write(rest)
                if total >= len(bytes_view) or self._raw.gettimeout() is not None:
                    return total

    def _no_flags(self, call: str, flags: int) -> None:
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to {call}() on {_NativeSSLSocket}")

    def _not_allowed(self, call: str) -> NoReturn:
        raise ValueError(f"{call} not allowed on instances of {_NativeSSLSocket}")

    def recv(self, n: int = 1024, flags: int = 0, /) -> bytes:
        if self._tls is None:
            return self._raw.recv(n, flags)
        self._no_flags("recv", flags)
        return cast(bytes, self.read(n))

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        if self._tls is None:
            return self._raw.recv_into(buffer, nbytes or 0, flags)
        self._no_flags("recv_into", flags)
        if not nbytes:
            with memoryview(buffer) as view:
                nbytes = view.nbytes or 1024
        return cast(int, self.read(nbytes, buffer))

    def send(self, data: Any, flags: int = 0, /) -> int:
        if self._tls is None:
            return self._raw.send(data, flags)
        self._no_flags("send", flags)
        return self.write(data)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        if self._tls is None:
            self._raw.sendall(data, flags)
            return
        self._no_flags("sendall", flags)
        with memoryview(data) as view, view.cast("B") as bytes_view:
            sent = 0
            while sent < len(bytes_view):
                sent += self.write(bytes_view[sent:])

    def recvfrom(self, n: int = 1024, flags: int = 0, /) -> Any:
        if self._tls is not None:
            self._not_allowed("recvfrom")
        return self._raw.recvfrom(n, flags)

    def recvfrom_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> Any:
        if self._tls is not None:
            self._not_allowed("recvfrom_into")
        return self._raw.recvfrom_into(buffer, nbytes or 0, flags)

    def sendto(self, data: Any, flags_or_address: Any, address: Any = None, /) -> int:
        if self._tls is not None:
            self._not_allowed("sendto")
        return (
            self._raw.sendto(data, flags_or_address)
            if address is None
            else self._raw.sendto(data, flags_or_address, address)
        )

    def recvmsg(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"recvmsg not allowed on instances of {_NativeSSLSocket}")

    def recvmsg_into(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"recvmsg_into not allowed on instances of {_NativeSSLSocket}")

    def sendmsg(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sendmsg not allowed on instances of {_NativeSSLSocket}")

    def recv_buffer(self, max_bytes: int = 65536, /) -> object:
        if self._tls is not None:
            self._not_allowed("recv_buffer")
        return self._raw.recv_buffer(max_bytes)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        """Send a binary file from ``offset`` to its end, or ``count`` bytes; returns the bytes sent."""
        if self._tls is None:
            return self._raw.sendfile(file, offset, count)
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and (not isinstance(count, int) or count <= 0):
            raise ValueError(f"count must be a positive integer (got {count!r})")
        if not self.getblocking():
            raise ValueError("non-blocking sockets are not supported")
        if offset:
            file.seek(offset)
        total = 0
        try:
            while count is None or total < count:
                data = file.read(CHUNK_BYTES if count is None else min(CHUNK_BYTES, count - total))
                if not data:
                    break
                self.sendall(data)
                total += len(data)
        finally:
            if total and hasattr(file, "seek"):
                file.seek(offset + total)
        return total

    def dup(self) -> NoReturn:
        raise NotImplementedError("Can't dup() SSLSocket instances")

    # -- beginning and end --

    def do_handshake(self, block: bool = False) -> None:
        """Agree with the peer. SSLCertVerificationError and other SSLErrors; non-blocking: SSLWantRead/WriteError."""
        if not self._connected:
            self.getpeername()  # ENOTCONN; connect() may have gone on in the background
            self._connected = True
        if self._tls is None:
            raise ValueError("No SSL wrapper around " + str(self))
        timeout = self.gettimeout()
        try:
            if block and timeout == 0.0:
                self.settimeout(None)
            self._tls.do_handshake()
        finally:
            self.settimeout(timeout)

    def unwrap(self) -> SSLSocket:
        """Say close_notify and wait for the peer's; the socket itself, in the clear from here on."""
        if self._tls is None:
            raise ValueError("No SSL wrapper around " + str(self))
        self._tls.shutdown()
        self._tls = None
        return self

    def shutdown(self, how: int, /) -> None:
        self._tls = None
        self._raw.shutdown(how)

    def detach(self) -> int:
        self._closed = True
        self._tls = None
        return self._raw.detach()

    def close(self) -> None:
        """Done with it; close_notify is not said (``unwrap`` does)."""
        self._closed = True
        if self._io_refs <= 0:
            self._tls = None
            self._raw.close()

    def _decref_socketios(self) -> None:  # called by the standard SocketIO
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    def makefile(self, mode: str = "r", buffering: int | None = None, **options: Any) -> IO[Any]:
        """A file object over the connection; closing the socket takes effect when all of them are closed."""
        return cast("IO[Any]", cast(Any, dispatch.KernelSocket).makefile(self, mode, buffering, **options))

    def __enter__(self) -> SSLSocket:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closed:
            self.close()

    def __repr__(self) -> str:
        return f"<ulnet.stack.tls.SSLSocket {self.version() or 'in the clear'} over {self._raw!r}>"

    def __reduce__(self) -> str:
        raise TypeError("cannot pickle 'SSLSocket' object")

    def __getattr__(self, name: str) -> Any:
        # Names, options, time-outs, the descriptor: the socket's own.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._raw, name)

    def connect(self, address: Any, /) -> None:
        self._connect(self._raw.connect, address)

    def connect_ex(self, address: Any, /) -> int:
        return cast(int, self._connect(self._raw.connect_ex, address))

    def _connect(self, connect: Callable[[Any], int | None], address: Any) -> int | None:
        if self.server_side:
            raise ValueError("can't connect in server-side mode")
        if self._connected or self._tls is not None:
            raise ValueError("attempt to connect already-connected SSLSocket!")
        self._begin_tls()
        try:
            number = connect(address)
            if not number:
                self._connected = True
                if self.do_handshake_on_connect:
                    self.do_handshake()
            return number
        except (OSError, ValueError):
            self._tls = None
            raise

    def accept(self) -> tuple[SSLSocket, tuple[str, int]]:
        """The next connection, as a server's TLS socket with this one's settings."""
        sock, peer = self._raw.accept()
        made = Choice._create(
            sock,
            context=self._context,
            server_side=True,
            do_handshake_on_connect=self.do_handshake_on_connect,
            suppress_ragged_eofs=self.suppress_ragged_eofs,
        )
        return made, peer

    # -- what was agreed upon --

    @property
    def context(self) -> ssl.SSLContext:
        return self._context

    @context.setter
    def context(self, value: ssl.SSLContext) -> None:
        self._context = value
        self._sslobj.context = value  # within the handshake: a server-name callback does it

    @property
    def session(self) -> ssl.SSLSession | None:
        return None if self._tls is None else self._sslobj.session

    @session.setter
    def session(self, value: ssl.SSLSession) -> None:
        self._session = value
        if self._tls is not None:
            self._sslobj.session = value

    @property
    def session_reused(self) -> bool | None:
        return None if self._tls is None else self._sslobj.session_reused

    def pending(self) -> int:
        """Bytes that are decrypted and not read."""
        return 0 if self._tls is None else int(self._sslobj.pending())

    def getpeercert(self, binary_form: bool = False) -> Any:
        if not self._connected:
            self.getpeername()
        return self._sslobj.getpeercert(binary_form)

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        if self._tls is not None:
            return cast("bytes | None", self._sslobj.get_channel_binding(cb_type))
        if cb_type not in ssl.CHANNEL_BINDING_TYPES:
            raise ValueError(f"{cb_type} channel binding type not implemented")
        return None

    def selected_npn_protocol(self) -> None:
        return None

    def verify_client_post_handshake(self) -> Any:
        if self._tls is None:
            raise ValueError("No SSL wrapper around " + str(self))
        return self._sslobj.verify_client_post_handshake()

    def selected_alpn_protocol(self) -> str | None:
        return None if self._tls is None else self._sslobj.selected_alpn_protocol()

    def cipher(self) -> tuple[str, str, int] | None:
        return None if self._tls is None else self._sslobj.cipher()

    def shared_ciphers(self) -> list[tuple[str, str, int]] | None:
        return None if self._tls is None else self._sslobj.shared_ciphers()

    def compression(self) -> str | None:
        return None if self._tls is None else self._sslobj.compression()

    def version(self) -> str | None:
        return None if self._tls is None else self._sslobj.version()


class Choice(_NativeSSLSocket):
    """SSLContext.sslsocket_class: makes the TLS socket that fits the socket given."""

    @classmethod
    def _create(cls, sock: Any, **options: Any) -> Any:
        if dispatch.is_ours(sock):
            return wrap(options.pop("context"), sock, **options)
        return cast(Any, _NativeSSLSocket)._create(sock, **options)
