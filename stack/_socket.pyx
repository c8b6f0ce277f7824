"""The hot half of a socket: every send and receive call, straight onto the session's C methods.

``socket.socket`` inherits these calls as they are, so that no Python frame stands between a program and the
stack; names, options and files are in socket.py. Order of each call: arguments, the session's call with this
socket's time-out, a result of exact size. Semantics are those of the standard module's objects on Linux
(CPython Modules/socketmodule.c; socket(7), tcp(7), udp(7)).
"""

import socket as _std

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_DECREF, PyObject
from libc.errno cimport EBADF, EINVAL, EMSGSIZE, EOPNOTSUPP
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy
from ulnet.stack.engine cimport SESSION_UDP
from ulnet.stack.session cimport Session
from ulnet.stack.types cimport addr_equal, addr_from_ipv4, ul_addr

cdef extern from "Python.h":
    PyObject *bytes_new "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t n) except NULL
    int _PyBytes_Resize(PyObject **data, Py_ssize_t n) except -1
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *n) except NULL
    long PyLong_AsLongAndOverflow(object value, int *overflow) except? -1
    bint PyMemoryView_Check(object o)
    PyObject *PyMemoryView_GET_BASE(object o)

cdef extern from "<math.h>" nogil:
    double ceil(double x)

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_DONTWAIT
    enum: MSG_OOB
    enum: MSG_PEEK
    enum: MSG_TRUNC
    enum: MSG_WAITALL

cdef enum:
    STACK_BYTES = 2048           # results up to this size are received on the C stack, then copied once
    CHUNK_BYTES = 65536          # larger ones get room for what is there, at least this much: below malloc's
                                 # threshold for mmap, beyond which each call pays for fresh pages (0.2 us against 30)
    GATHER_BYTES = 262144        # sendmsg() joins up to this many bytes for one send
    FOREVER = -1


# --- arguments -------------------------------------------------------------------------------------------------

cdef bint quad_parse(const char *text, Py_ssize_t n, uint8_t *ip) noexcept:
    # Plain a.b.c.d only; leading zeros and short forms (inet_aton(3)) take the slow way.
    cdef Py_ssize_t i = 0
    cdef int part = 0
    cdef int value, digits
    while True:
        value = 0
        digits = 0
        while i < n and c'0' <= text[i] <= c'9' and digits < 3:
            if digits and value == 0:
                return False
            value = value * 10 + (text[i] - c'0')
            digits += 1
            i += 1
        if digits == 0 or value > 255:
            return False
        ip[part] = <uint8_t>value
        part += 1
        if part == 4:
            return i == n
        if i == n or text[i] != c'.':
            return False
        i += 1


cdef int host_parse(object host, uint8_t *ip) except -1:
    cdef Py_ssize_t n = 0
    cdef const char *text
    if isinstance(host, str):
        text = PyUnicode_AsUTF8AndSize(host, &n)
        if quad_parse(text, n, ip):
            return 0
    elif isinstance(host, (bytes, bytearray)):
        n = len(host)
        host = bytes(host)
    else:
        raise TypeError(f"str, bytes or bytearray expected, not {type(host).__name__}")
    if n == 0:
        ip[0] = ip[1] = ip[2] = ip[3] = 0
        return 0
    if host == "<broadcast>" or host == b"<broadcast>":
        ip[0] = ip[1] = ip[2] = ip[3] = 255
        return 0
    quad = _std.getaddrinfo(host, None, _std.AF_INET)[0][4][0]
    text = PyUnicode_AsUTF8AndSize(quad, &n)
    if not quad_parse(text, n, ip):
        raise OSError(EINVAL, f"{host!r} resolved to {quad!r}, which is no IPv4 address")
    return 0


cdef int address_parse(object address, str call, uint8_t *ip) except -1:
    # Returns the port.
    cdef int overflow = 0
    cdef long port
    if not isinstance(address, tuple):
        raise TypeError(f"{call}(): AF_INET address must be tuple, not {type(address).__name__}")
    if len(<tuple>address) != 2:
        raise TypeError(f"{call}(): AF_INET address must be a pair (host, port), not {len(<tuple>address)} values")
    port = PyLong_AsLongAndOverflow((<tuple>address)[1], &overflow)
    if overflow or not 0 <= port <= 65535:
        raise OverflowError(f"{call}(): port must be 0-65535, not {(<tuple>address)[1]}")
    host_parse((<tuple>address)[0], ip)
    return <int>port


cdef object quad_text(const uint8_t *ip):
    cdef char text[16]
    cdef int n = snprintf(text, sizeof(text), "%d.%d.%d.%d", <int>ip[0], <int>ip[1], <int>ip[2], <int>ip[3])
    return text[:n].decode("ascii")


def parse_address(object address, str call) -> tuple[str, int]:
    """The (host, port) given to ``call`` as (dotted quad, port); '' is any, names are looked up by the system.

    Raises TypeError, OverflowError (port), socket.gaierror.
    """
    cdef uint8_t ip[4]
    cdef int port = address_parse(address, call, ip)
    return quad_text(ip), port


cdef int flags_check(int flags) except -1:
    if flags & MSG_OOB:
        raise OSError(EOPNOTSUPP, "urgent data (MSG_OOB) is not supported; RFC 6093 advises against its use")
    return 0


cdef object owner_of(object data):
    # The immutable bytes whose memory may be held instead of copied, or None.
    if PyBytes_CheckExact(data):
        return data
    if PyMemoryView_Check(data) and PyMemoryView_GET_BASE(data) != NULL:
        base = <object>PyMemoryView_GET_BASE(data)
        if PyBytes_CheckExact(base):
            return base
    return None


# --- the socket ------------------------------------------------------------------------------------------------

cdef class Socket:
    """The send and receive calls of a socket over one session. Made by ``ulnet.stack.socket.socket``."""

    def __cinit__(self) -> None:
        self._timeout_ns = FOREVER

    cdef Session _live(self):
        if self._session is None:
            raise OSError(EBADF, "Bad file descriptor")
        return self._session

    def _adopt(self, Session session, named: bool) -> None:
        """Use this session (None: closed). ``named``: its local endpoint is chosen."""
        self._session = session
        self._dgram = session is not None and session.kind == SESSION_UDP
        self._named = named

    def _autobind(self) -> None:
        """Name the local endpoint of a UDP session at its first use. The subclass knows the host."""
        raise NotImplementedError

    @property
    def session(self) -> Session | None:
        """The session below, with ``stat()`` and ``state``; None once closed."""
        return self._session

    # --- time-outs ---

    def settimeout(self, object value, /) -> None:
        """None: wait for ever. 0: never wait (BlockingIOError). Else TimeoutError after so many seconds."""
        cdef double seconds
        if value is None:
            self._timeout_ns = FOREVER
            return
        seconds = value
        if not seconds >= 0:
            raise ValueError("Timeout value out of range")
        if seconds > 9.2e9:
            raise OverflowError(f"timeout of {value} s is too large: at most 9.2e9 s, or None to wait for ever")
        self._timeout_ns = <int64_t>ceil(seconds * 1e9)

    def gettimeout(self) -> float | None:
        """Seconds, 0.0 for non-blocking, None for blocking."""
        return None if self._timeout_ns < 0 else self._timeout_ns / 1e9

    @property
    def timeout(self) -> float | None:
        """As gettimeout()."""
        return None if self._timeout_ns < 0 else self._timeout_ns / 1e9

    def setblocking(self, bint flag, /) -> None:
        """True: settimeout(None); False: settimeout(0)."""
        self._timeout_ns = FOREVER if flag else 0

    def getblocking(self) -> bool:
        """False only in non-blocking mode (time-out 0)."""
        return self._timeout_ns != 0

    # --- sending ---

    cdef Py_ssize_t _send(self, Session s, const uint8_t *data, size_t n, object owner, int flags) except -1:
        cdef size_t sent = 0
        if self._dgram:
            return s.sendto(data, n, NULL, 0, flags, self._timeout_ns)
        if self._timeout_ns < 0 and not flags & MSG_DONTWAIT:
            # tcp(7): a blocking send takes all of it.
            s.sendall(data, n, owner, FOREVER, &sent)
            return n
        return s.send(data, n, owner, flags, self._timeout_ns)

    def send(self, object data, int flags=0, /) -> int:
        """Send; returns the bytes taken. A blocking socket takes all, others what fits (at least one byte)."""
        cdef Session s = self._live()
        cdef Py_buffer view
        flags_check(flags)
        if PyBytes_CheckExact(data):
            return self._send(s, <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data, flags)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self._send(s, <const uint8_t *>view.buf, view.len, owner_of(data), flags)
        finally:
            PyBuffer_Release(&view)

    def sendall(self, object data, int flags=0, /) -> None:
        """Send all of it or raise; how much went out before an exception is not known. The time-out is for the whole."""
        cdef Session s = self._live()
        cdef Py_buffer view
        cdef size_t sent = 0
        cdef int64_t timeout_ns = 0 if flags & MSG_DONTWAIT else self._timeout_ns
        flags_check(flags)
        if self._dgram:
            self.send(data, flags)
            return
        if PyBytes_CheckExact(data):
            s.sendall(<const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data, timeout_ns, &sent)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            s.sendall(<const uint8_t *>view.buf, view.len, owner_of(data), timeout_ns, &sent)
        finally:
            PyBuffer_Release(&view)

    def sendto(self, object data, object flags_or_address, object address=None, /) -> int:
        """sendto(data, address) or sendto(data, flags, address): one datagram. TCP ignores the address (send(2))."""
        cdef Session s = self._live()
        cdef Py_buffer view
        cdef ul_addr dst
        cdef uint8_t ip[4]
        cdef int port
        cdef int flags = 0
        if address is None:
            address = flags_or_address
        else:
            flags = flags_or_address
        flags_check(flags)
        port = address_parse(address, "sendto", ip)
        addr_from_ipv4(&dst, ip)
        if self._dgram and not self._named:
            self._autobind()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if not self._dgram:
                return self._send(s, <const uint8_t *>view.buf, view.len, owner_of(data), flags)
            return s.sendto(<const uint8_t *>view.buf, view.len, &dst, <uint16_t>port, flags, self._timeout_ns)
        finally:
            PyBuffer_Release(&view)

    def sendmsg(self, object buffers, object ancdata=(), int flags=0,
                object address=None, /) -> int:
        """Send the pieces as one message (UDP) or in order (TCP). Ancillary data is refused: EOPNOTSUPP."""
        cdef Session s = self._live()
        cdef list pieces = []
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t taken = 0
        cdef Py_ssize_t n
        if list(ancdata):
            raise OSError(EOPNOTSUPP, "ancillary data cannot be sent: this stack has no control messages")
        for piece in buffers:
            piece = memoryview(piece).cast("B")
            pieces.append(piece)
            total += len(piece)
        if self._dgram:
            if total > CHUNK_BYTES:
                raise OSError(EMSGSIZE, f"datagram of {total} bytes is too long: at most 65507")
            joined = b"".join(pieces)
            return self.send(joined, flags) if address is None else self.sendto(joined, flags, address)
        if total <= GATHER_BYTES:
            return self.send(b"".join(pieces), flags)
        for piece in pieces:
            n = len(piece)
            if n == 0:
                continue
            try:
                # Only the first piece waits, unless the socket is blocking, where all is taken.
                if taken and self._timeout_ns >= 0:
                    flags |= MSG_DONTWAIT
                got = self.send(piece, flags)
            except BlockingIOError:
                if taken:
                    return taken
                raise
            taken += got
            if got < n:
                break
        return taken

    # --- receiving ---

    cdef Py_ssize_t _read(self, Session s, uint8_t *out, size_t n, int flags, ul_addr *src, uint16_t *sport,
                          uint32_t *full_bytes) except -1:
        if self._dgram:
            if not self._named:
                self._autobind()                 # differs: Linux lets an unnamed socket wait for nothing
            return s.recvfrom(out, n, flags, self._timeout_ns, src, sport, full_bytes)
        return s.recv(out, n, flags, self._timeout_ns)

    cdef object _read_bytes(self, Session s, Py_ssize_t n, int flags, ul_addr *src, uint16_t *sport,
                            uint32_t *full_bytes):
        cdef uint8_t small[STACK_BYTES]
        cdef PyObject *raw
        cdef Py_ssize_t got, cap, unread
        flags_check(flags)
        if n <= STACK_BYTES:
            got = self._read(s, small, n, flags, src, sport, full_bytes)
            return PyBytes_FromStringAndSize(<char *>small, got if got < n else n)
        cap = n
        if cap > CHUNK_BYTES and not flags & MSG_WAITALL:
            # recv(1 << 20) must not pay for a MiB when little is there, yet give all that is there:
            # a short result tells readers of an edge-triggered epoll that nothing is left (epoll(7)).
            cap = CHUNK_BYTES
            if not self._dgram:
                unread = s.stat().get("unread_bytes", 0)  # none before a connection is made
                if unread > cap:
                    cap = unread if unread < n else n
        raw = bytes_new(NULL, cap)
        try:
            got = self._read(s, <uint8_t *>PyBytes_AS_STRING(<object>raw), cap, flags, src, sport, full_bytes)
            if got > cap:
                got = cap                        # MSG_TRUNC tells the datagram's length
            while got == cap and cap < n and not self._dgram and not flags & MSG_PEEK:
                unread = s.stat().get("unread_bytes", 0)  # none before a connection is made
                if unread <= 0:
                    break
                cap = cap + unread if cap + unread < n else n
                _PyBytes_Resize(&raw, cap)
                try:
                    got += s.recv(<uint8_t *>PyBytes_AS_STRING(<object>raw) + got, cap - got, flags | MSG_DONTWAIT, 0)
                except BlockingIOError:
                    break                        # another reader was quicker, or the session is on the move
            if got != cap:
                _PyBytes_Resize(&raw, got)
            return <object>raw
        finally:
            if raw != NULL:
                Py_DECREF(<object>raw)

    cdef object _address(self, const ul_addr *src, uint16_t sport):
        # Datagrams mostly come from the same peer: its tuple is kept.
        if self._src_tuple is None or sport != self._src_port or not addr_equal(src, &self._src):
            self._src = src[0]
            self._src_port = sport
            self._src_tuple = (quad_text(src.b + 12), <int>sport)
        return self._src_tuple

    def recv(self, Py_ssize_t n, int flags=0, /) -> bytes:
        """Up to bufsize bytes; b"" at the end of the stream."""
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef uint32_t full = 0
        if n <= 0:
            if n < 0:
                raise ValueError("negative buffersize in recv")
            self._live()
            return b""
        return self._read_bytes(self._live(), n, flags, &src, &sport, &full)

    def recvfrom(self, Py_ssize_t n, int flags=0, /) -> tuple[bytes, tuple[str, int] | None]:
        """One datagram, cut to bufsize, and its sender. TCP: bytes and None."""
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef uint32_t full = 0
        if n < 0:
            raise ValueError("negative buffersize in recvfrom")
        data = self._read_bytes(self._live(), n, flags, &src, &sport, &full)
        return data, self._address(&src, sport) if self._dgram else None

    cdef Py_ssize_t _read_into(self, object buffer, Py_ssize_t nbytes, int flags, ul_addr *src, uint16_t *sport,
                               str call) except -1:
        cdef Session s = self._live()
        cdef Py_buffer view
        cdef uint32_t full = 0
        flags_check(flags)
        if nbytes < 0:
            raise ValueError(f"negative buffersize in {call}")
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            if nbytes == 0:
                nbytes = view.len
            elif nbytes > view.len:
                raise ValueError(f"{call}: nbytes is {nbytes}, greater than the length of the buffer, {view.len}")
            if nbytes == 0 and not self._dgram:
                return 0
            return self._read(s, <uint8_t *>view.buf, nbytes, flags, src, sport, &full)
        finally:
            PyBuffer_Release(&view)

    def recv_into(self, object buffer, Py_ssize_t nbytes=0, int flags=0) -> int:
        """Receive into a writable buffer, at most nbytes (0: its length); returns the bytes stored."""
        cdef ul_addr src
        cdef uint16_t sport = 0
        return self._read_into(buffer, nbytes, flags, &src, &sport, "recv_into")

    def recvfrom_into(self, object buffer, Py_ssize_t nbytes=0, int flags=0) -> tuple[int, tuple[str, int] | None]:
        """recvfrom() into a writable buffer."""
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef Py_ssize_t got = self._read_into(buffer, nbytes, flags, &src, &sport, "recvfrom_into")
        return got, self._address(&src, sport) if self._dgram else None

    def recvmsg(self, Py_ssize_t n, Py_ssize_t ancbufsize=0,
                int flags=0, /) -> tuple[bytes, list[object], int, tuple[str, int] | None]:
        """(data, [], flags, sender): MSG_TRUNC is set in flags if the datagram was longer than bufsize."""
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef uint32_t full = 0
        if n < 0:
            raise ValueError("negative buffer size in recvmsg()")
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        if n == 0 and not self._dgram:
            self._live()
            return b"", [], 0, None
        data = self._read_bytes(self._live(), n, flags, &src, &sport, &full)
        if not self._dgram:
            return data, [], 0, None
        return data, [], MSG_TRUNC if full > <size_t>len(<bytes>data) else 0, self._address(&src, sport)

    def recvmsg_into(self, object buffers, Py_ssize_t ancbufsize=0,
                     int flags=0, /) -> tuple[int, list[object], int, tuple[str, int] | None]:
        """recvmsg() scattered over writable buffers in order."""
        cdef list views = [memoryview(b).cast("B") for b in buffers]
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t take
        for view in views:
            if view.readonly:
                raise TypeError("recvmsg_into() argument 1 must be an iterable of single-segment read-write objects")
        data, anc, out_flags, address = self.recvmsg(sum([len(v) for v in views]), ancbufsize, flags)
        piece = memoryview(data)
        for view in views:
            take = min(len(view), len(piece) - at)
            if take <= 0:
                break
            view[:take] = piece[at:at + take]
            at += take
        return at, anc, out_flags, address

    def recv_buffer(self, Py_ssize_t max_bytes=CHUNK_BYTES, /) -> object:
        """Received bytes without a copy, as a read-only buffer object in the stack's own memory.

        Give it back by ``release()`` or ``with``, soon. An empty one is the end of the stream. UDP: one datagram,
        sender in its ``address``.
        """
        cdef Session s = self._live()
        if self._dgram and not self._named:
            self._autobind()
        return s.recv_buffer(max_bytes, self._timeout_ns)
