"""Sockets as files, and files through sockets: ``makefile`` and ``sendfile`` as the standard class has them."""

from __future__ import annotations

import io
import os
import socket as _std
from typing import IO, Any, Final, cast

_BLOCK_BYTES: Final = 262144
_standard: Final[Any] = _std.socket
_GiveupOnSendfile: Final[type[Exception]] = cast(Any, _std)._GiveupOnSendfile  # user classes catch the standard one


class Files:
    """What a socket class inherits. The standard methods only need its send(), recv_into(), type and _io_refs."""

    __slots__ = ()

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """A file object over the connection; closing the socket takes effect when all of them are closed."""
        made = _standard.makefile(self, mode, buffering, encoding=encoding, errors=errors, newline=newline)
        return cast(IO[Any], made)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        """Send a binary file from ``offset`` to its end, or ``count`` bytes; returns the bytes sent."""
        return cast(int, _standard.sendfile(self, file, offset, count))

    def _check_sendfile_params(self, file: IO[bytes], offset: int, count: int | None) -> None:
        _standard._check_sendfile_params(self, file, offset, count)

    def _sendfile_use_send(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        return cast(int, _standard._sendfile_use_send(self, file, offset, count))

    def _sendfile_use_sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        """A regular file: read in large blocks, which the stack holds instead of copying."""
        sock: Any = self
        self._check_sendfile_params(file, offset, count)
        try:
            fd = file.fileno()
        except (AttributeError, io.UnsupportedOperation) as error:
            raise _GiveupOnSendfile(error) from None
        try:
            size = os.fstat(fd).st_size
        except OSError as error:
            raise _GiveupOnSendfile(error) from None
        if size == 0:
            return 0
        if sock.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        total = 0
        try:
            while count is None or total < count:
                wanted = _BLOCK_BYTES if count is None else min(_BLOCK_BYTES, count - total)
                try:
                    data = os.pread(fd, wanted, offset + total)
                except OSError as error:
                    if total == 0:
                        raise _GiveupOnSendfile(error) from None  # a pipe, say
                    raise
                if not data:
                    break
                view = memoryview(data)
                while view:
                    sent = sock.send(view)  # each waits for its own time-out, as the standard one does
                    total += sent
                    view = view[sent:]
        finally:
            if total and hasattr(file, "seek"):
                file.seek(offset + total)
        return total
