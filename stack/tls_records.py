"""OpenSSL over a socket that it cannot read itself: its object works on two buffers in memory, we move ciphertext.

``read``, ``write``, ``do_handshake`` and ``shutdown`` behave as those of the object that ``ssl.SSLSocket`` has, with
the time-outs of the socket. Ciphertext is read record by record (RFC 8446 5.1), as OpenSSL does: bytes of the next
record stay in the session, so that fileno() says readable while there is more, and what follows close_notify is the
program's.

Locks: ``_send_lock`` keeps ciphertext in order, ``_receive_lock`` a record in one piece, ``_object_lock`` OpenSSL's
object to one thread at a time (never held while waiting). Order: send, receive, object.
"""

from __future__ import annotations

import errno
import os
import select
import ssl
import threading
import time
from collections.abc import Callable
from socket import MSG_DONTWAIT
from typing import Any, Final

from ulnet.stack.engine import READABLE, WRITABLE
from ulnet.stack.socket import socket

_HEADER_BYTES: Final = 5  # RFC 8446 (5.1): type, version, length
_RECORD_TYPES: Final = range(20, 25)  # change_cipher_spec ... heartbeat
_RECORD_BYTES_MAX: Final = 16384 + 2048  # RFC 5246 (6.2.3); TLS 1.3 has less
CHUNK_BYTES: Final = 262144  # encrypted at a time: bounds what waits in memory for a slow peer
_READ: Final = "The read operation timed out"
_WRITE: Final = "The write operation timed out"
_HANDSHAKE: Final = "The handshake operation timed out"


class Records:
    """One TLS connection below the interface. ``make``: OpenSSL's object for (incoming, outgoing)."""

    def __init__(self, raw: socket, make: Callable[[ssl.MemoryBIO, ssl.MemoryBIO], Any]) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._header = bytearray()
        self._missing = 0  # bytes of the record that is coming in
        self._unsent = memoryview(b"")  # ciphertext
        self._retry = 0  # bytes of a write that is encrypted, and whose caller was told to come again
        self._object_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self.object = make(self._incoming, self._outgoing)

    # -- what ssl.SSLSocket asks of its object --

    def read(self, n: int, buffer: Any = None) -> Any:
        """Up to ``n`` bytes, or their number in ``buffer``. SSLEOFError: the end came without close_notify."""
        result = self._drive(self.object.read, *((n,) if buffer is None else (n, buffer)), what=_READ)
        self._flush_if_free()
        return result

    def write(self, piece: memoryview) -> int:
        """Send at most CHUNK_BYTES; the bytes sent. SSLWantWriteError, TimeoutError: come again with the same data."""
        piece = piece[:CHUNK_BYTES]
        deadline = self._deadline()
        with self._send_lock:
            try:
                if not self._retry:
                    self._flush(deadline, _WRITE)
                    if not piece:
                        return 0
                    self._retry = self._encrypt(piece, deadline)
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

    def do_handshake(self) -> None:
        self._drive(self.object.do_handshake, what=_HANDSHAKE)
        self._flush_all(_HANDSHAKE)

    def shutdown(self) -> None:
        """close_notify, ours and the peer's."""
        self._drive(self.object.shutdown, what=_READ)
        self._flush_all(_WRITE)

    # -- between OpenSSL and the socket --

    def _drive(self, call: Callable[..., Any], *arguments: Any, what: str) -> Any:
        """An operation of OpenSSL's object, with the ciphertext that it asks for."""
        deadline = self._deadline()
        while True:
            try:
                with self._object_lock:
                    return call(*arguments)
            except ssl.SSLWantReadError:
                if self._outgoing.pending or self._unsent:
                    with self._send_lock:
                        self._flush(deadline, what)
                self._feed(deadline, what)
            except ssl.SSLError:
                self._flush_if_free()  # an alert for the peer; what the program gets is the failure
                raise

    def _encrypt(self, piece: memoryview, deadline: int) -> int:
        while True:
            try:
                with self._object_lock:
                    return int(self.object.write(piece))
            except ssl.SSLWantReadError:  # a handshake in between
                self._flush(deadline, _WRITE)
                self._feed(deadline, _WRITE)

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

    def _receive(self, n: int, deadline: int, what: str) -> bytes:
        while True:
            try:
                return self._raw.recv(n, MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(READABLE, deadline, what)

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
                sent = self._raw.send(self._unsent, MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(WRITABLE, deadline, what)
            else:
                self._unsent = self._unsent[sent:]

    def _flush_all(self, what: str) -> None:
        if self._outgoing.pending or self._unsent:
            with self._send_lock:
                self._flush(self._deadline(), what)

    def _flush_if_free(self) -> None:
        # After a read: an answer to a key update, say. A writer at work sends it along.
        if self._outgoing.pending and self._send_lock.acquire(blocking=False):
            try:
                self._flush(0, _WRITE)
            except OSError:
                pass  # no room now, or an error: the next write sends it, or fails
            finally:
                self._send_lock.release()

    # -- waiting --

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
