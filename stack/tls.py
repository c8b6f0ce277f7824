"""TLS for blocking sockets: the interface of ``ssl.SSLSocket`` over a socket of this stack.

``wrap(context, sock)``, or ``context.wrap_socket(sock)`` once ``install()`` was called (``ulnet.patch`` does).
``ssl.SSLSocket`` lets OpenSSL read and write a kernel descriptor; here it works on two buffers in memory (ssl.MemoryBIO)
and this class moves ciphertext. It reads record by record (RFC 8446 5.1) as OpenSSL does: bytes of a next record stay in
the session, so that fileno() says readable as long as there is more, and what follows close_notify is left to the program.

Locks: ``_send_lock`` keeps ciphertext in order, ``_receive_lock`` a record in one piece, ``_object_lock`` OpenSSL's object
to one thread at a time (never held while waiting). Order: send or receive, then object.
"""

from __future__ import annotations

import errno
import os
import select
import socket as _std
import ssl
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Final, NoReturn, cast

from ulnet.stack import dispatch
from ulnet.stack import socket as _ulnet
from ulnet.stack.engine import READABLE, WRITABLE

_HEADER_BYTES: Final = 5  # RFC 8446 (5.1): type, version, length
_RECORD_TYPES: Final = range(20, 25)  # change_cipher_spec ... heartbeat
_RECORD_BYTES_MAX: Final = 16384 + 2048  # RFC 5246 (6.2.3); TLS 1.3 has less
_CHUNK_BYTES: Final = 262144  # encrypted at a time: bounds what waits in memory for a slow peer
_READ: Final = "The read operation timed out"
_WRITE: Final = "The write operation timed out"
_HANDSHAKE: Final = "The handshake operation timed out"

_NativeSSLSocket: Final = ssl.SSLSocket


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
        self._object: Any = None  # OpenSSL's; None: in the clear
        self._connected = False
        self._object_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()

    def _start(self) -> None:
        try:
            self._raw.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            self._refuse_early_data()
            return
        self._connected = True
        self._make_object()
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

    def _make_object(self) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._header = bytearray()
        self._missing = 0  # bytes of the record that is coming in
        self._unsent = memoryview(b"")  # ciphertext
        self._retry = 0  # bytes of a write that is encrypted, and whose caller was told to come again
        self._object = cast(Any, self._context)._wrap_bio(
            self._incoming,
            self._outgoing,
            self.server_side,
            self.server_hostname,
            owner=self,
            session=self._session,
        )

    # -- moving ciphertext --

    def _deadline(self) -> int:
        # In monotonic ns; -1: none; 0: do not wait.
        timeout = self._raw.gettimeout()
        if timeout is None:
            return -1
        return time.monotonic_ns() + int(timeout * 1e9) if timeout else 0

    def _wait(self, events: int, deadline: int, what: str) -> None:
        left = deadline
        if deadline == 0:
            if events == READABLE:
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)")
            raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")
        if deadline > 0:
            left = deadline - time.monotonic_ns()
            if left <= 0:
                raise TimeoutError(what)
        session = self._raw.session
        if session is not None:
            session.wait(events, left)
            return
        fd = self._raw.fileno()
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        poll = select.poll()  # connected to 127.0.0.0/8: the kernel's
        poll.register(fd, select.POLLIN if events == READABLE else select.POLLOUT)
        poll.poll(None if left < 0 else left / 1e6)

    def _receive(self, n: int, deadline: int, what: str) -> bytes:
        while True:
            try:
                return self._raw.recv(n, _std.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(READABLE, deadline, what)

    def _feed(self, deadline: int, what: str) -> None:
        """One record, or its rest, for OpenSSL; or the end of the stream."""
        with self._receive_lock:
            while not self._missing:
                data = self._receive(_HEADER_BYTES - len(self._header), deadline, what)
                if not data:
                    self._incoming.write_eof()
                    return
                self._header += data
                if len(self._header) < _HEADER_BYTES:
                    continue
                header = bytes(self._header)
                self._header.clear()
                self._incoming.write(header)
                size = int.from_bytes(header[3:], "big")
                if header[0] not in _RECORD_TYPES or header[1] != 3 or not 0 < size <= _RECORD_BYTES_MAX:
                    return  # no TLS: OpenSSL says what it is
                self._missing = size
            while self._missing:
                data = self._receive(self._missing, deadline, what)
                if not data:
                    self._missing = 0
                    self._incoming.write_eof()
                    return
                self._missing -= len(data)
                self._incoming.write(data)

    def _flush(self, deadline: int, what: str) -> None:
        """Send the ciphertext that waits. Call with ``_send_lock``."""
        while True:
            if not self._unsent:
                with self._object_lock:
                    data = self._outgoing.read() if self._outgoing.pending else b""
                if not data:
                    return
                self._unsent = memoryview(data)
            try:
                sent = self._raw.send(self._unsent, _std.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(WRITABLE, deadline, what)
            else:
                self._unsent = self._unsent[sent:]

    def _flush_if_free(self) -> None:
        # After a read that is done: an answer to a key update, say. A writer at work sends it along.
        if self._outgoing.pending and self._send_lock.acquire(blocking=False):
            try:
                self._flush(0, _WRITE)
            except (ssl.SSLWantWriteError, OSError):
                pass  # the next write sends it, or fails
            finally:
                self._send_lock.release()

    def _alert(self) -> None:
        # OpenSSL failed and may have something to tell the peer. What the program gets is the failure.
        self._flush_if_free()

    def _drive(self, call: Callable[..., Any], *arguments: Any, what: str) -> Any:
        """An operation of OpenSSL's object, with the ciphertext that it asks for."""
        deadline = self._deadline()
        while True:
            try:
                with self._object_lock:
                    result = call(*arguments)
            except ssl.SSLWantReadError:
                if self._outgoing.pending or self._unsent:
                    with self._send_lock:
                        self._flush(deadline, what)
                self._feed(deadline, what)
                continue
            except ssl.SSLError:
                self._alert()
                raise
            return result

    # -- data --

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Up to ``len`` bytes, or their number in ``buffer``; b"" or 0 at the end."""
        sslobj = self._object
        if sslobj is None:
            raise ValueError("Read on closed or unwrapped SSL socket.")
        try:
            if buffer is None:
                result = self._drive(sslobj.read, len, what=_READ)
            else:
                result = self._drive(sslobj.read, len, buffer, what=_READ)
        except ssl.SSLError as error:
            if error.args[0] == ssl.SSL_ERROR_EOF and self.suppress_ragged_eofs:
                return b"" if buffer is None else 0
            raise
        if self._outgoing.pending:
            self._flush_if_free()
        return result

    def write(self, data: Any) -> int:
        """Send; returns the bytes taken. A blocking socket takes all, others at most 256 KiB.

        SSLWantWriteError, TimeoutError: come again with the same data, which may be encrypted already.
        """
        sslobj = self._object
        if sslobj is None:
            raise ValueError("Write on closed or unwrapped SSL socket.")
        total = 0
        with memoryview(data) as view, view.cast("B") as bytes_view:
            while True:
                with bytes_view[total : total + _CHUNK_BYTES] as piece:
                    total += self._write_piece(sslobj, piece)
                if total >= len(bytes_view) or self._raw.gettimeout() is not None:
                    return total

    def _write_piece(self, sslobj: Any, piece: memoryview) -> int:
        deadline = self._deadline()
        with self._send_lock:
            try:
                if not self._retry:
                    self._flush(deadline, _WRITE)
                    if not piece:
                        return 0
                    self._retry = self._encrypt(sslobj, piece, deadline)
                elif len(piece) < self._retry:
                    raise ssl.SSLError(ssl.SSL_ERROR_SSL, "bad write retry: fewer bytes than the first time")
                self._flush(deadline, _WRITE)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, TimeoutError):
                raise
            except BaseException:
                self._retry = 0
                raise
            written, self._retry = self._retry, 0
            return written

    def _encrypt(self, sslobj: Any, piece: memoryview, deadline: int) -> int:
        while True:
            try:
                with self._object_lock:
                    return int(sslobj.write(piece))
            except ssl.SSLWantReadError:  # a handshake in between
                self._flush(deadline, _WRITE)
                self._feed(deadline, _WRITE)
            except ssl.SSLError:
                if self._outgoing.pending:
                    self._flush(deadline, _WRITE)
                raise

    def _no_flags(self, call: str, flags: int) -> None:
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to {call}() on {_NativeSSLSocket}")

    def _not_allowed(self, call: str) -> NoReturn:
        raise ValueError(f"{call} not allowed on instances of {_NativeSSLSocket}")

    def recv(self, n: int = 1024, flags: int = 0, /) -> bytes:
        if self._object is None:
            return self._raw.recv(n, flags)
        self._no_flags("recv", flags)
        return cast(bytes, self.read(n))

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        if self._object is None:
            return self._raw.recv_into(buffer, nbytes or 0, flags)
        self._no_flags("recv_into", flags)
        if not nbytes:
            with memoryview(buffer) as view:
                nbytes = view.nbytes or 1024
        return cast(int, self.read(nbytes, buffer))

    def send(self, data: Any, flags: int = 0, /) -> int:
        if self._object is None:
            return self._raw.send(data, flags)
        self._no_flags("send", flags)
        return self.write(data)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        if self._object is None:
            self._raw.sendall(data, flags)
            return
        self._no_flags("sendall", flags)
        with memoryview(data) as view, view.cast("B") as bytes_view:
            sent = 0
            while sent < len(bytes_view):
                sent += self.write(bytes_view[sent:])

    def recvfrom(self, n: int = 1024, flags: int = 0, /) -> Any:
        if self._object is not None:
            self._not_allowed("recvfrom")
        return self._raw.recvfrom(n, flags)

    def recvfrom_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> Any:
        if self._object is not None:
            self._not_allowed("recvfrom_into")
        return self._raw.recvfrom_into(buffer, nbytes or 0, flags)

    def sendto(self, data: Any, flags_or_address: Any, address: Any = None, /) -> int:
        if self._object is not None:
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
        if self._object is not None:
            self._not_allowed("recv_buffer")
        return self._raw.recv_buffer(max_bytes)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        if self._object is None:
            return self._raw.sendfile(file, offset, count)
        return _ulnet.socket.sendfile(cast(_ulnet.socket, self), file, offset, count)  # by sendall()

    def dup(self) -> NoReturn:
        raise NotImplementedError("Can't dup() SSLSocket instances")

    # -- beginning and end --

    def do_handshake(self, block: bool = False) -> None:
        """Agree with the peer. SSLCertVerificationError and other SSLErrors; non-blocking: SSLWantRead/WriteError."""
        if not self._connected:
            self.getpeername()  # ENOTCONN; connect() may have gone on in the background
            self._connected = True
        if self._object is None:
            raise ValueError("No SSL wrapper around " + str(self))
        timeout = self.gettimeout()
        try:
            if block and timeout == 0.0:
                self.settimeout(None)
            self._drive(self._object.do_handshake, what=_HANDSHAKE)
            if self._outgoing.pending or self._unsent:
                with self._send_lock:
                    self._flush(self._deadline(), _HANDSHAKE)
        finally:
            self.settimeout(timeout)

    def unwrap(self) -> SSLSocket:
        """Say close_notify and wait for the peer's; the socket itself, in the clear from here on."""
        sslobj = self._object
        if sslobj is None:
            raise ValueError("No SSL wrapper around " + str(self))
        self._drive(sslobj.shutdown, what=_READ)
        if self._outgoing.pending or self._unsent:
            with self._send_lock:
                self._flush(self._deadline(), _WRITE)
        self._object = None
        return self

    def shutdown(self, how: int, /) -> None:
        self._object = None
        self._raw.shutdown(how)

    def detach(self) -> int:
        self._closed = True
        self._object = None
        return self._raw.detach()

    def close(self) -> None:
        """Done with it; close_notify is not said (``unwrap`` does)."""
        self._closed = True
        if self._io_refs <= 0:
            self._object = None
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
        if self._connected or self._object is not None:
            raise ValueError("attempt to connect already-connected SSLSocket!")
        self._make_object()
        try:
            number = connect(address)
            if not number:
                self._connected = True
                if self.do_handshake_on_connect:
                    self.do_handshake()
            return number
        except (OSError, ValueError):
            self._object = None
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
        self._object.context = value  # within the handshake: a server-name callback does it

    @property
    def session(self) -> ssl.SSLSession | None:
        return None if self._object is None else self._object.session

    @session.setter
    def session(self, value: ssl.SSLSession) -> None:
        self._session = value
        if self._object is not None:
            self._object.session = value

    @property
    def session_reused(self) -> bool | None:
        return None if self._object is None else self._object.session_reused

    @property
    def _sslobj(self) -> Any:
        return self._object

    def pending(self) -> int:
        """Bytes that are decrypted and not read."""
        return 0 if self._object is None else int(self._object.pending())

    def getpeercert(self, binary_form: bool = False) -> Any:
        if not self._connected:
            self.getpeername()
        return self._object.getpeercert(binary_form)

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        if self._object is not None:
            return cast("bytes | None", self._object.get_channel_binding(cb_type))
        if cb_type not in ssl.CHANNEL_BINDING_TYPES:
            raise ValueError(f"{cb_type} channel binding type not implemented")
        return None

    def selected_npn_protocol(self) -> None:
        return None

    def verify_client_post_handshake(self) -> Any:
        if self._object is None:
            raise ValueError("No SSL wrapper around " + str(self))
        return self._object.verify_client_post_handshake()

    def selected_alpn_protocol(self) -> str | None:
        return None if self._object is None else self._object.selected_alpn_protocol()

    def cipher(self) -> tuple[str, str, int] | None:
        return None if self._object is None else self._object.cipher()

    def shared_ciphers(self) -> list[tuple[str, str, int]] | None:
        return None if self._object is None else self._object.shared_ciphers()

    def compression(self) -> str | None:
        return None if self._object is None else self._object.compression()

    def version(self) -> str | None:
        return None if self._object is None else self._object.version()


class Choice(_NativeSSLSocket):
    """SSLContext.sslsocket_class: makes the TLS socket that fits the socket given."""

    @classmethod
    def _create(cls, sock: Any, **options: Any) -> Any:
        if dispatch.is_ours(sock):
            return wrap(options.pop("context"), sock, **options)
        return cast(Any, _NativeSSLSocket)._create(sock, **options)
