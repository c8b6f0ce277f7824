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
from libc.errno cimport EAGAIN, EBADF, EINVAL, EMSGSIZE, EOPNOTSUPP
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy
from ulnet.stack._control cimport control_list, control_parse
from ulnet.stack.engine cimport SESSION_UDP
from ulnet.stack.engine_user cimport user_dgram, user_meta
from ulnet.stack.session cimport Buffer, Session, length_to_send
from ulnet.stack.types cimport addr_equal, addr_from_ipv4, ul_addr

cdef extern from "Python.h":
    PyObject *bytes_new "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t n) except NULL
    int _PyBytes_Resize(PyObject **data, Py_ssize_t n) except -1
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *n) except NULL
    long PyLong_AsLongAndOverflow(object value, int *overflow) except? -1
    bint PyMemoryView_Check(object o)
    PyObject *PyMemoryView_GET_BASE(object o)

cdef extern from "Python.h":
    char *PyByteArray_AS_STRING(object array)

cdef extern from "<math.h>" nogil:
    double ceil(double x)

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_DONTWAIT
    enum: MSG_ERRQUEUE
    enum: MSG_FASTOPEN
    enum: MSG_MORE
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
    UDP_MAX_BYTES = 65507


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


cdef object NOT_GIVEN = object()


cdef int send_check(int flags, bint dgram) except -1:
    if flags & MSG_OOB:
        raise OSError(EOPNOTSUPP, "urgent data (MSG_OOB) is not supported; RFC 6093 advises against its use")
    if flags & MSG_FASTOPEN and not dgram:
        raise OSError(EOPNOTSUPP, "MSG_FASTOPEN is not supported: connect() first")
    return 0


cdef int recv_check(int flags, bint dgram) except -1:
    if flags & MSG_ERRQUEUE:
        raise BlockingIOError(EAGAIN, "Resource temporarily unavailable")   # the queue of errors is always empty
    if flags & MSG_OOB and not dgram:
        raise OSError(EINVAL, "Invalid argument")          # tcp(7): there are no urgent data
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


cdef int raise_patience(object error, size_t done) except -1:
    # socket(7), SO_RCVTIMEO: EAGAIN, or what was done until then. A connection's own ETIMEDOUT stays.
    if error.errno is not None:
        raise error
    if done == 0:
        raise BlockingIOError(EAGAIN, "Resource temporarily unavailable") from None
    return 0


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

    def _options_changed(self, uint32_t wanted, int64_t rcv_ns, int64_t snd_ns, int ifindex) -> None:
        """What of the options matters here: see _sockopt."""
        self._wanted = wanted
        self._rcv_ns = rcv_ns
        self._snd_ns = snd_ns
        self._ifindex = ifindex

    @property
    def session(self) -> Session | None:
        """The session below, with ``stat()`` and ``state``; None once closed."""
        return self._session

    # --- time-outs ---

    cdef int _wait_ns(self, int64_t timeout_ns) except -1:
        self._live().set_nonblocking(timeout_ns >= 0)     # as the standard module: any time-out means O_NONBLOCK
        self._timeout_ns = timeout_ns
        return 0

    def settimeout(self, object value, /) -> None:
        """None: wait for ever. 0: never wait (BlockingIOError). Else TimeoutError after so many seconds."""
        cdef double seconds
        if value is None:
            self._wait_ns(FOREVER)
            return
        seconds = value
        if not seconds >= 0:
            raise ValueError("Timeout value out of range")
        if seconds > 9.2e9:
            raise OverflowError(f"timeout of {value} s is too large: at most 9.2e9 s, or None to wait for ever")
        self._wait_ns(<int64_t>ceil(seconds * 1e9))

    def gettimeout(self) -> float | None:
        """Seconds, 0.0 for non-blocking, None for blocking."""
        return None if self._timeout_ns < 0 else self._timeout_ns / 1e9

    @property
    def timeout(self) -> float | None:
        """As gettimeout()."""
        return None if self._timeout_ns < 0 else self._timeout_ns / 1e9

    def setblocking(self, bint flag, /) -> None:
        """True: settimeout(None); False: settimeout(0)."""
        self._wait_ns(FOREVER if flag else 0)

    def getblocking(self) -> bool:
        """False only in non-blocking mode (time-out 0)."""
        return self._timeout_ns != 0

    # --- sending ---

    cdef Py_ssize_t _send(self, Session s, const uint8_t *data, size_t n, object owner, int flags) except -1:
        cdef size_t sent = 0
        if self._dgram:
            return self._send_dgram(s, data, n, NULL, 0, flags, NULL)
        if self._timeout_ns < 0 and not flags & MSG_DONTWAIT:
            # tcp(7): a blocking send takes all of it.
            try:
                s.sendall(data, n, owner, self._snd_ns if self._snd_ns else FOREVER, &sent)
            except TimeoutError as e:
                raise_patience(e, sent)
                return sent
            return n
        return s.send(data, n, owner, flags, self._timeout_ns)

    cdef Py_ssize_t _send_dgram(self, Session s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t port,
                                int flags, const user_meta *meta) except -1:
        cdef int64_t wait = self._timeout_ns
        cdef ul_addr first
        cdef bytes whole
        cdef list parts
        if wait < 0 and self._snd_ns:
            wait = self._snd_ns              # never waits so long: a datagram that cannot go at once is rare
        if self._parts is None and not flags & MSG_MORE:
            return s.send_datagram(data, n, dst, port, flags, meta, wait)
        # udp(7), MSG_MORE: one datagram of several calls; the first names the receiver.
        if self._parts is None:
            self._parts = [None if dst == NULL else ((<const char *>dst.b)[:16], port), bytearray()]
        parts = self._parts
        (<bytearray>parts[1]).extend((<const char *>data)[:n])
        if len(<bytearray>parts[1]) > UDP_MAX_BYTES:
            self._parts = None
            raise OSError(EMSGSIZE, "Message too long")
        if flags & MSG_MORE:
            return n
        self._parts = None
        whole = bytes(parts[1])
        if parts[0] is None:
            s.send_datagram(<const uint8_t *>PyBytes_AS_STRING(whole), len(whole), NULL, 0, flags, meta, wait)
        else:
            memcpy(first.b, PyBytes_AS_STRING(parts[0][0]), 16)
            s.send_datagram(<const uint8_t *>PyBytes_AS_STRING(whole), len(whole), &first, <uint16_t>parts[0][1], flags,
                            meta, wait)
        return n

    def send(self, object data, int flags=0, /) -> int:
        """Send; returns the bytes taken. A blocking socket takes all, others what fits (at least one byte)."""
        cdef Session s = self._live()
        cdef Py_buffer view
        send_check(flags, self._dgram)
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
        send_check(flags, self._dgram)
        if self._dgram:
            self.send(data, flags)
            return
        if timeout_ns < 0 and self._snd_ns:
            timeout_ns = self._snd_ns            # differs: the standard one begins anew at each piece
        if PyBytes_CheckExact(data):
            s.sendall(<const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data, timeout_ns, &sent)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            s.sendall(<const uint8_t *>view.buf, view.len, owner_of(data), timeout_ns, &sent)
        finally:
            PyBuffer_Release(&view)

    def sendto(self, object data, object flags_or_address, object address=NOT_GIVEN, /) -> int:
        """sendto(data, address) or sendto(data, flags, address): one datagram. TCP ignores the address (send(2))."""
        cdef Session s = self._live()
        cdef Py_buffer view
        cdef ul_addr dst
        cdef uint8_t ip[4]
        cdef int port
        cdef int flags = 0
        if address is NOT_GIVEN:
            address = flags_or_address
        else:
            flags = flags_or_address
        send_check(flags, self._dgram)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            port = address_parse(address, "sendto", ip)
            addr_from_ipv4(&dst, ip)
            if self._dgram and not self._named:
                self._autobind()
            if not self._dgram:
                return self._send(s, <const uint8_t *>view.buf, view.len, owner_of(data), flags)
            return self._send_dgram(s, <const uint8_t *>view.buf, view.len, &dst, <uint16_t>port, flags, NULL)
        finally:
            PyBuffer_Release(&view)

    def sendmsg(self, object buffers, object ancdata=(), int flags=0,
                object address=None, /) -> int:
        """Send the pieces as one message (UDP) or in order (TCP).

        Ancillary data, UDP: IP_TTL, IP_TOS, IP_PKTINFO, for this datagram; others as Linux answers them.
        """
        cdef Session s = self._live()
        cdef list pieces = []
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t taken = 0
        cdef Py_ssize_t n
        cdef uint8_t ip[4]
        cdef user_meta meta
        cdef ul_addr dst
        cdef int port = 0
        cdef int controls
        controls = control_parse(list(ancdata), self._dgram, s, self._ifindex, &meta)
        for piece in buffers:
            piece = memoryview(piece).cast("B")
            pieces.append(piece)
            total += len(piece)
        if self._dgram:
            if total > CHUNK_BYTES:
                raise OSError(EMSGSIZE, f"datagram of {total} bytes is too long: at most 65507")
            joined = b"".join(pieces)
            if not controls:
                return self.send(joined, flags) if address is None else self.sendto(joined, flags, address)
            send_check(flags, True)
            if address is not None:
                port = address_parse(address, "sendmsg", ip)
                addr_from_ipv4(&dst, ip)
                if not self._named:
                    self._autobind()
            return self._send_dgram(s, <const uint8_t *>PyBytes_AS_STRING(joined), len(joined),
                                    NULL if address is None else &dst, <uint16_t>port, flags, &meta)
        if address is not None:
            address_parse(address, "sendmsg", ip)     # send(2): a stream ignores it
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
            if self._timeout_ns >= 0 or self._rcv_ns == 0:
                return s.recvfrom(out, n, flags, self._timeout_ns, src, sport, full_bytes)
        elif self._timeout_ns >= 0 or self._rcv_ns == 0:
            return s.recv(out, n, flags, self._timeout_ns)
        try:
            if self._dgram:
                return s.recvfrom(out, n, flags, self._rcv_ns, src, sport, full_bytes)
            return s.recv(out, n, flags, self._rcv_ns)
        except TimeoutError as e:
            raise_patience(e, 0)
        return 0

    cdef object _read_bytes(self, Session s, Py_ssize_t n, int flags, ul_addr *src, uint16_t *sport,
                            uint32_t *full_bytes):
        cdef uint8_t small[STACK_BYTES]
        cdef PyObject *raw
        cdef Py_ssize_t got, cap, unread
        recv_check(flags, self._dgram)
        if n <= STACK_BYTES:
            got = self._read(s, small, n, flags, src, sport, full_bytes)
            data = PyBytes_FromStringAndSize(<char *>small, got if got < n else n)
            if flags & MSG_TRUNC and self._dgram and full_bytes[0] > <size_t>got:
                data += bytes(full_bytes[0] - got)       # recv(2), MSG_TRUNC: as long as the datagram
            return data
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
            if flags & MSG_TRUNC and self._dgram and full_bytes[0] > <size_t>got:
                return <object>raw + bytes(full_bytes[0] - got)
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
        cdef Py_ssize_t got
        recv_check(flags, self._dgram)
        if nbytes < 0:
            raise ValueError(f"negative buffersize in {call}")
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        except BufferError:
            raise TypeError(f"{call}() argument 1 must be read-write bytes-like object, "
                            f"not {type(buffer).__name__}") from None
        try:
            if nbytes == 0:
                nbytes = view.len
            elif nbytes > view.len:
                raise ValueError(f"{call}: nbytes is {nbytes}, greater than the length of the buffer, {view.len}")
            if nbytes == 0 and not self._dgram:
                return 0
            got = self._read(s, <uint8_t *>view.buf, nbytes, flags, src, sport, &full)
            return full if flags & MSG_TRUNC and self._dgram else got
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
        """(data, ancillary data, flags, sender): MSG_TRUNC is set in flags if the datagram was longer than bufsize.

        Ancillary data, UDP, as asked for by setsockopt: SO_TIMESTAMP, SO_TIMESTAMPNS, IP_PKTINFO, IP_RECVTTL,
        IP_RECVTOS. MSG_CTRUNC: they did not fit into ancbufsize (CMSG_SPACE).
        """
        cdef Session s = self._live()
        cdef ul_addr src
        cdef uint16_t sport = 0
        cdef uint32_t full = 0
        cdef user_meta meta
        cdef int out_flags = 0
        cdef int64_t wait = self._timeout_ns
        cdef Py_ssize_t got
        cdef bytearray room
        if n < 0:
            raise ValueError("negative buffer size in recvmsg()")
        if not 0 <= ancbufsize <= 0x7FFFFFFF:
            raise ValueError("invalid ancillary data buffer length")
        if n == 0 and not self._dgram:
            recv_check(flags, False)
            return b"", [], 0, None
        if not self._dgram or not self._wanted:
            data = self._read_bytes(s, n, flags, &src, &sport, &full)
            if not self._dgram:
                return data, [], 0, None
            got = len(<bytes>data)
            return data, [], MSG_TRUNC if full > <size_t>min(got, n) else 0, self._address(&src, sport)
        recv_check(flags, True)
        if not self._named:
            self._autobind()
        meta.ttl = -1
        room = bytearray(min(n, CHUNK_BYTES))
        try:
            got = s.recv_datagram(<uint8_t *>PyByteArray_AS_STRING(room), len(room), flags,
                                  self._rcv_ns if wait < 0 and self._rcv_ns else wait, &src, &sport, &full, &meta)
        except TimeoutError as e:
            if wait < 0:
                raise_patience(e, 0)
            raise
        if full > <size_t>got:
            out_flags = MSG_TRUNC
        if full == 0 and got == 0 and meta.ttl < 0:
            return b"", [], 0, None                          # shut down
        beside = control_list(s, &meta, self._wanted, self._ifindex, ancbufsize, &out_flags)
        if flags & MSG_TRUNC and full > <size_t>got:
            return bytes(room[:got]) + bytes(full - got), beside, out_flags, self._address(&src, sport)
        return bytes(room[:got]), beside, out_flags, self._address(&src, sport)

    def recvmsg_into(self, object buffers, Py_ssize_t ancbufsize=0,
                     int flags=0, /) -> tuple[int, list[object], int, tuple[str, int] | None]:
        """recvmsg() scattered over writable buffers in order."""
        cdef list views = [memoryview(b).cast("B") for b in buffers]
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t full
        cdef Py_ssize_t take
        for view in views:
            if view.readonly:
                raise TypeError("recvmsg_into() argument 1 must be an iterable of single-segment read-write objects")
        data, anc, out_flags, address = self.recvmsg(sum([len(v) for v in views]), ancbufsize, flags)
        full = len(data)                         # with MSG_TRUNC perhaps more than the buffers hold
        piece = memoryview(data)
        for view in views:
            take = min(len(view), len(piece) - at)
            if take <= 0:
                break
            view[:take] = piece[at:at + take]
            at += take
        return full, anc, out_flags, address

    def recv_buffer(self, Py_ssize_t max_bytes=CHUNK_BYTES, /) -> object:
        """Received bytes without a copy, as a read-only buffer object in the stack's own memory.

        Give it back by ``release()`` or ``with``, soon. An empty one is the end of the stream. UDP: one datagram,
        sender in its ``address``.
        """
        cdef Session s = self._live()
        if self._dgram and not self._named:
            self._autobind()
        return s.recv_buffer(max_bytes, self._timeout_ns)

    # --- the stack's own buffers ---

    def recv_buffers(self, Py_ssize_t n, /) -> list[Buffer]:
        """Up to n datagrams (UDP) or pieces of the stream (TCP) as buffers; [] at the end of the stream.

        It waits for the first only, with this socket's time-out; the rest is what is there already.
        """
        cdef Session s = self._live()
        if not 1 <= n <= 0x7FFFFFFF:
            raise ValueError(f"recv_buffers({n}): at least 1 buffer is asked for")
        if self._dgram and not self._named:
            self._autobind()
        return s.recv_buffers(<uint32_t>n, self._timeout_ns)

    def alloc_buffer(self, Py_ssize_t nbytes, /) -> Buffer:
        """Writable memory of the stack for send_buffer(): nbytes of it, their contents undefined."""
        return self._live().alloc_buffer(nbytes)

    def send_buffer(self, Buffer buffer not None, object address=None, *, Py_ssize_t nbytes=-1) -> int:
        """Send a buffer's first nbytes (-1: all) and give it to the stack: it is released when this returns.

        TCP sends it from where it lies, without a copy, and takes it whole or not at all: when this raises it is still
        the caller's. UDP: one datagram, to ``address`` or the connected peer. ValueError: released already;
        BufferError: views of it live.
        """
        cdef Session s = self._live()
        cdef user_dgram item
        cdef uint32_t done = 0
        if not self._dgram:
            return s.send_buffer(buffer, nbytes, self._timeout_ns)
        item.meta = NULL
        item.named = address is not None
        if item.named:
            self._dgram_to(&item, address)
        buffer.pin()
        try:
            item.len_bytes = length_to_send(buffer, nbytes)
            item.data = buffer.seg.data if buffer.seg != NULL else NULL
            s.send_dgrams(&item, 1, self._timeout_ns, &done)
        finally:
            buffer.unpin(done == 1)
        return item.len_bytes

    cdef int _dgram_to(self, user_dgram *item, object address) except -1:
        cdef uint8_t ip[4]
        item.dport = <uint16_t>address_parse(address, "send_buffers", ip)
        addr_from_ipv4(&item.dst, ip)
        if not self._named:
            self._autobind()
        return 0

    def send_buffers(self, object buffers, object address=None, /) -> int:
        """Send many datagrams in one call; returns how many went out. UDP only.

        Each item is a buffer of the stack (released once it is out), bytes or another readable object, or a pair of
        one and its own address; the others go to ``address``, or to the connected peer. Runs of datagrams of one size
        to one place leave together where the link can. As sendmmsg(2): an error is raised if the first one meets it,
        otherwise the count tells where to go on.
        """
        cdef Session s = self._live()
        cdef list items = list(buffers)
        cdef Py_ssize_t n = len(items)
        cdef Py_ssize_t i
        cdef Py_ssize_t pinned = 0
        cdef uint32_t done = 0
        cdef user_dgram *dgrams
        cdef user_dgram *d
        cdef object to, named = None
        cdef const user_dgram *same = NULL       # the last one parsed: the address object is mostly the same
        if not self._dgram:
            raise OSError(EOPNOTSUPP, "send_buffers() sends datagrams: on a stream use send_buffer() or sendmsg()")
        if n == 0:
            return 0
        if n > 0x7FFFFFFF:
            raise ValueError(f"send_buffers() takes fewer datagrams at once than {n}")
        dgrams = <user_dgram *>PyMem_Malloc(n * sizeof(user_dgram))
        if dgrams == NULL:
            raise MemoryError
        try:
            for i in range(n):
                d = dgrams + i
                item = items[i]
                to = address
                if isinstance(item, tuple):
                    if len(<tuple>item) != 2:
                        raise TypeError(f"send_buffers(): item {i} is no pair (data, address)")
                    if (<tuple>item)[1] is not None:
                        to = (<tuple>item)[1]
                    item = items[i] = (<tuple>item)[0]
                d.meta = NULL
                d.named = to is not None
                if d.named:
                    if to is named:
                        d.dst = same.dst
                        d.dport = same.dport
                    else:
                        self._dgram_to(d, to)
                        named = to
                        same = d
                if isinstance(item, Buffer):
                    (<Buffer>item).pin()
                    d.len_bytes = (<Buffer>item).seg.len_bytes if (<Buffer>item).seg != NULL else 0
                    d.data = (<Buffer>item).seg.data if (<Buffer>item).seg != NULL else NULL
                else:
                    if not PyBytes_CheckExact(item):
                        item = items[i] = memoryview(item).tobytes()
                    d.data = <const uint8_t *>PyBytes_AS_STRING(item)
                    d.len_bytes = PyBytes_GET_SIZE(item)
                pinned = i + 1
            return s.send_dgrams(dgrams, <uint32_t>n, self._timeout_ns, &done)
        finally:
            PyMem_Free(dgrams)
            for i in range(pinned):
                if isinstance(items[i], Buffer):
                    (<Buffer>items[i]).unpin(i < <Py_ssize_t>done)
