"""The engine as Python sees it: Engine, Session, Buffer. What they do lies in engine_core and its neighbours."""

import os
import threading
import weakref

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport (
    EADDRINUSE, EAGAIN, EBADF, EINTR, EINVAL, EISCONN, ENOMEM, ENOPROTOOPT, ENOTCONN, EOPNOTSUPP, ETIMEDOUT,
)
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ulnet.kernelshim.link cimport UL_SLOT_NONE, Link, ul_rx
from ulnet.stack.buf cimport chunks_free, rxseg, rxseg_free, txchunk
from ulnet.stack.engine_core cimport (
    ATTN_RESOLVE, ATTN_STRAYS, EVENT_ACCEPTED, EVENT_CONNECTED, EVENT_FAILED, EVENT_GONE, PHASE_CONNECTING, PHASE_OPEN,
    PHASE_QUEUED, ROLE_ENDED, ROLE_FOREIGN, ROLE_LISTEN, ROLE_SHELL, ROLE_TCP, ROLE_UDP, clock_now, engine,
    engine_deadline, engine_free, engine_new, engine_poll, engine_settle, event_rec, foreign_arm, frame_rec,
    session_close, session_end, session_find, session_insert, session_new, session_ready, session_ref, session_remove,
    session_tcp_start, session_touch, session_unref, ul_session,
)
from ulnet.stack.engine_input cimport engine_frame, orphans_replay
from ulnet.stack.engine_output cimport emit_refusal
from ulnet.stack.engine_user cimport (
    USER_DONTWAIT, USER_RESOLVE, user_recv, user_recv_seg, user_recvfrom, user_send, user_sendto, user_shutdown,
    user_wait,
)
from ulnet.stack.engine_wait cimport engine_left, engine_lock, engine_unlock, helper_run, helper_wake, waiters_wake
from ulnet.stack.metastate cimport Metastate
from ulnet.stack.neighbour cimport neigh_announce, neigh_ask
from ulnet.stack.readyfd cimport readyfd_free, readyfd_new, readyfd_show
from ulnet.stack.statpage cimport StatPage, stat_take
from ulnet.stack.tcp cimport (
    TCP_ACK, TCP_RST, tcp_export, tcp_export_bytes, tcp_getopt, tcp_import, tcp_isn, tcp_open, tcp_out, tcp_setopt,
    tcp_so_error, tcp_stat, tcp_stat_get, tcp_state, tcp_wants_output,
)
from ulnet.stack.tcp_cb cimport TCP_MSS_MIN
from ulnet.stack.types cimport UL_IPPROTO_TCP, UL_IPPROTO_UDP, addr_from_ipv4, addr_is_zero, flow_key, ul_addr
from ulnet.stack.udp cimport udp_new, udp_so_error

READABLE = 1
WRITABLE = 2
ERROR = 4
HUP = 8
RDHUP = 16
EV_CONNECTED = EVENT_CONNECTED
EV_FAILED = EVENT_FAILED
EV_ACCEPTED = EVENT_ACCEPTED
EV_GONE = EVENT_GONE

STATES = ("CLOSED", "LISTEN", "SYN-SENT", "SYN-RECEIVED", "ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT",
          "CLOSING", "LAST-ACK", "TIME-WAIT")

cdef enum:
    SNDBUF_BYTES = 4 << 20
    RCVBUF_BYTES = 4 << 20
    UDP_RCVBUF_BYTES = 1 << 20
    BURST = 256
    STATE_MAGIC = 0x554C5331       # "ULS1"
    # option names, Linux
    SOL_SOCKET = 1
    SO_SNDBUF = 7
    SO_RCVBUF = 8
    SO_KEEPALIVE = 9
    SOL_IP = 0
    IP_TOS = 1
    IP_TTL = 2
    TCP_NODELAY = 1
    TCP_MAXSEG = 2
    TCP_KEEPIDLE = 4
    TCP_KEEPINTVL = 5
    TCP_KEEPCNT = 6
    TCP_USER_TIMEOUT = 18

cdef int64_t FOREIGN_NS = 2000000000   # a library remembers what it gave back for so long

ctypedef struct state_head:
    uint32_t magic
    uint32_t head_bytes
    flow_key flow
    uint8_t ttl
    uint8_t tos
    uint8_t pad[6]

ctypedef struct session_row:       # what sessions() copies under the lock
    uint8_t role
    uint8_t closing
    flow_key flow
    uint64_t id
    tcp_stat t


cdef int fail(Py_ssize_t code) except -1:
    """The one place where a code of the C level becomes an OSError."""
    cdef int number = <int>-code
    raise OSError(number, os.strerror(number))


cdef int addr_parse(str text, ul_addr *out) except -1:
    cdef bytes packed
    cdef const uint8_t *p
    parts = text.split(".")
    try:
        packed = bytes(int(x) for x in parts) if len(parts) == 4 else b""
    except ValueError:
        packed = b""
    if len(packed) != 4:
        raise ValueError(f"{text!r} is not an IPv4 address of the form a.b.c.d")
    p = packed
    addr_from_ipv4(out, p)
    return 0


cdef str addr_text(const ul_addr *a):
    if addr_is_zero(a):
        return "0.0.0.0"
    return f"{a.b[12]}.{a.b[13]}.{a.b[14]}.{a.b[15]}"


cdef inline int64_t deadline_of(int64_t timeout_ns) noexcept nogil:
    return timeout_ns if timeout_ns <= 0 else clock_now() + timeout_ns


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class Buffer:
    """Received bytes in the stack's own memory (a ring slot, if they were many): read-only, by the buffer protocol."""

    cdef Engine engine
    cdef rxseg *seg
    cdef int exports
    cdef bint released
    cdef readonly object address

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        if self.seg == NULL:
            PyBuffer_FillInfo(view, self, &self.exports, 0, 1, flags)
        else:
            PyBuffer_FillInfo(view, self, self.seg.data, self.seg.len_bytes, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    cdef int check(self) except -1:
        if self.released:
            raise ValueError("this buffer was released: its memory belongs to the stack again")
        return 0

    def __len__(self):
        self.check()
        return self.seg.len_bytes if self.seg != NULL else 0

    @property
    def nbytes(self):
        return len(self)

    def release(self):
        """Give the memory back. BufferError while memoryviews of it live; calling it again does nothing."""
        if self.exports:
            raise BufferError(f"{self.exports} view(s) of this buffer are still in use")
        self.released = True
        self.give_back()

    cdef void give_back(self) noexcept:
        cdef engine *e
        cdef rxseg *seg = self.seg
        if seg == NULL:
            return
        e = self.engine.e
        self.seg = NULL
        with nogil:
            engine_lock(e)
            rxseg_free(&e.bufs, seg)
            engine_unlock(e)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.release()

    def __dealloc__(self):
        self.give_back()


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class Session:
    """One session, or the shell of one that is not open yet. Made by Engine.new_session()."""

    def __init__(self):
        raise TypeError("sessions are made by Engine.new_session()")

    def __dealloc__(self):
        cdef engine *e
        cdef ul_session *s = self.s
        if s == NULL:
            return
        e = self.engine.e
        self.s = NULL
        s.handle = NULL
        with nogil:
            engine_lock(e)
            if not s.closing:
                session_close(e, s, False)
                if e.touched != NULL:
                    engine_settle(e)
            session_unref(e, s)
            engine_unlock(e)

    # ------------------------------------------------------------ data

    cdef Py_ssize_t recv(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns) except -1:
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got
        cdef size_t done = 0
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        with nogil:
            deadline = deadline_of(timeout_ns)
            got = user_recv(e, s, out, n, flags, deadline, &done)
        while got == -EINTR:
            PyErr_CheckSignals()
            with nogil:
                got = user_recv(e, s, out, n, flags, deadline, &done)
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    cdef Py_ssize_t recvfrom(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns,
                             ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except -1:
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got = -EINTR
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_recvfrom(e, s, out, n, flags, deadline, src, sport, full_bytes)
            if got != -EINTR:
                break
            PyErr_CheckSignals()
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    cdef Py_ssize_t send_some(self, const uint8_t *data, size_t n, object owner, bint all, int64_t timeout_ns,
                              size_t *done) except -1:
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef void *held = NULL if owner is None else <void *>owner
        cdef Py_ssize_t got
        cdef int64_t deadline
        with nogil:
            deadline = deadline_of(timeout_ns)
            got = user_send(e, s, data, n, held, all, deadline, done)
        while got == -EINTR:
            PyErr_CheckSignals()
            with nogil:
                got = user_send(e, s, data, n, held, all, deadline, done)
        if e.bufs.dead != NULL:
            self.engine.reap()
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    cdef Py_ssize_t send(self, const uint8_t *data, size_t n, object owner, int flags, int64_t timeout_ns) except -1:
        cdef size_t done = 0
        return self.send_some(data, n, owner, False, 0 if flags & USER_DONTWAIT else timeout_ns, &done)

    cdef int sendall(self, const uint8_t *data, size_t n, object owner, int64_t timeout_ns, size_t *sent) except -1:
        sent[0] = 0
        self.send_some(data, n, owner, True, timeout_ns, sent)
        return 0

    cdef Py_ssize_t sendto(self, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport, int flags,
                           int64_t timeout_ns) except -1:
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_sendto(e, s, data, n, dst, dport, deadline)
            if got == -EINTR:
                PyErr_CheckSignals()
            elif got == -USER_RESOLVE:
                self.engine.resolve_pending()
            else:
                break
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    def recv_buffer(self, size_t max_bytes, int64_t timeout_ns=-1):
        """Up to max_bytes (TCP) or one datagram (UDP) as a Buffer; empty at end of file."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef rxseg *seg
        cdef Buffer b
        cdef int err = 0
        cdef int64_t deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                seg = user_recv_seg(e, s, max_bytes, deadline, &err)
            if seg != NULL or err != -EINTR:
                break
            PyErr_CheckSignals()
        if seg == NULL:
            if err < 0:
                raise_timed(err, timeout_ns)
            return Buffer.__new__(Buffer)  # end of file: an empty one
        b = Buffer.__new__(Buffer)
        b.engine = self.engine
        b.seg = seg
        if self.kind == UL_IPPROTO_UDP:
            b.address = (addr_text(&seg.raddr), seg.rport)
        return b

    # ------------------------------------------------------------ readiness

    @property
    def ready(self):
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef uint32_t bits
        with nogil:
            engine_lock(e)
            bits = session_ready(s)
            engine_unlock(e)
        return bits

    def wait(self, uint32_t mask, int64_t timeout_ns=-1):
        """Drive the engine until one of mask (or ERROR, HUP) is ready; the ready bits, 0 on time-out."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef uint32_t ready = 0
        cdef int rc
        cdef int64_t deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                rc = user_wait(e, s, mask, deadline, &ready)
            if rc != -EINTR:
                break
            PyErr_CheckSignals()
        if rc == -EBADF:
            fail(rc)
        return ready & (mask | 12)

    def fileno(self):
        """A descriptor that select, poll and epoll may watch; the same one at every call, -1 once closed."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int err = 0
        if s.closing:
            return -1
        with nogil:
            engine_lock(e)
            if s.fd == NULL:
                s.fd = readyfd_new(&err)
                if s.fd != NULL:
                    e.watched += 1
                    readyfd_show(s.fd, session_ready(s))
                    helper_wake(e)         # from now on frames must be noticed at once
            engine_unlock(e)
        if s.fd == NULL:
            fail(err)
        return s.fd.user_fd

    # ------------------------------------------------------------ names, state, options

    @property
    def session_id(self):
        return self.s.id

    @session_id.setter
    def session_id(self, uint64_t value):
        self.s.id = value

    @property
    def local(self):
        return (addr_text(&self.s.flow.laddr), self.s.flow.lport)

    @property
    def peer(self):
        if addr_is_zero(&self.s.flow.raddr):
            return None
        return (addr_text(&self.s.flow.raddr), self.s.flow.rport)

    @property
    def live(self):
        return self.s.role == ROLE_TCP or self.s.role == ROLE_UDP or self.s.role == ROLE_LISTEN

    @property
    def listening(self):
        return self.s.role == ROLE_LISTEN

    @property
    def closed(self):
        return bool(self.s.closing)

    @property
    def state(self):
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int state = 0
        cdef int role
        with nogil:
            engine_lock(e)
            role = s.role
            if role == ROLE_TCP:
                state = tcp_state(s.tcp)
            engine_unlock(e)
        if role == ROLE_UDP:
            return "OPEN"
        if role == ROLE_LISTEN:
            return "LISTEN"
        return STATES[state]

    def set_local(self, str address, int port):
        """Note the local endpoint of a shell (bound, not open yet)."""
        addr_parse(address, &self.s.flow.laddr)
        self.s.flow.lport = <uint16_t>port

    def begin_connect(self):
        """A shell whose connection is being made elsewhere: neither readable nor writable until it is imported."""
        self.s.phase = PHASE_CONNECTING

    def take_error(self):
        """SO_ERROR: the pending errno, cleared; 0 if none."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int error = 0
        with nogil:
            engine_lock(e)
            if s.role == ROLE_TCP:
                error = tcp_so_error(s.tcp, True)
            elif s.role == ROLE_UDP:
                error = udp_so_error(s.udp, True)
            else:
                error = s.so_error
                s.so_error = 0
            session_touch(e, s)
            engine_settle(e)
            engine_unlock(e)
        return -error

    def setopt(self, int level, int name, int value):
        """SOL_SOCKET, IPPROTO_IP and IPPROTO_TCP options; OSError ENOPROTOOPT for those unknown."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int rc = 0
        with nogil:
            engine_lock(e)
            rc = option_set(e, s, level, name, value)
            if s.role == ROLE_TCP:
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)

    def getopt(self, int level, int name):
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int rc
        cdef int value = 0
        with nogil:
            engine_lock(e)
            rc = option_get(s, level, name, &value)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        return value

    def shutdown(self, int how):
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef int rc
        with nogil:
            rc = user_shutdown(e, s, how)
        if rc < 0:
            fail(rc)

    def stat(self):
        """Counters and estimators by name (tcp_stat); times in ns. Empty when there is no protocol state."""
        cdef engine *e = self.engine.e
        cdef ul_session *s = self.s
        cdef tcp_stat t
        cdef int role
        memset(&t, 0, sizeof(t))
        with nogil:
            engine_lock(e)
            role = s.role
            if role == ROLE_TCP:
                tcp_stat_get(s.tcp, &t)
            elif role == ROLE_UDP:
                t.bytes_in = s.udp.bytes_in
                t.bytes_out = s.udp.bytes_out
            engine_unlock(e)
        if role == ROLE_UDP:
            return {"bytes_in": t.bytes_in, "bytes_out": t.bytes_out}
        return dict(t) if role == ROLE_TCP else {}


cdef int raise_timed(Py_ssize_t code, int64_t timeout_ns) except -1:
    if code == -EAGAIN and timeout_ns > 0:
        raise TimeoutError("timed out")
    return fail(code)


cdef int option_set(engine *e, ul_session *s, int level, int name, int value) noexcept nogil:
    if level == SOL_IP:
        if name == IP_TTL:
            if value < 1 or value > 255:
                return -EINVAL
            s.ttl = <uint8_t>value
            return 0
        if name == IP_TOS:
            s.tos = <uint8_t>value
            return 0
        return -ENOPROTOOPT
    if s.flow.proto == UL_IPPROTO_UDP:
        if level == SOL_SOCKET and name == SO_RCVBUF:
            s.cfg.rcvbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
            if s.udp != NULL:
                s.udp.rcvbuf_bytes = s.cfg.rcvbuf_bytes
            return 0
        if level == SOL_SOCKET and (name == SO_SNDBUF or name == SO_KEEPALIVE):
            return 0
        return -ENOPROTOOPT
    # The configuration is what accepted connections inherit and what the control block starts with.
    if level == SOL_SOCKET:
        if name == SO_SNDBUF:
            s.cfg.sndbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
        elif name == SO_RCVBUF:
            s.cfg.rcvbuf_bytes = <uint32_t>(value if value > 4096 else 4096)
        elif name == SO_KEEPALIVE:
            s.cfg.keepalive = value != 0
        elif s.role != ROLE_TCP:
            return -ENOPROTOOPT
    elif level == UL_IPPROTO_TCP:
        if name == TCP_NODELAY:
            s.cfg.nodelay = value != 0
        elif name == TCP_KEEPIDLE or name == TCP_KEEPINTVL or name == TCP_KEEPCNT:
            if value < 1 or value > 32767:
                return -EINVAL
            if name == TCP_KEEPIDLE:
                s.cfg.keepidle_s = value
            elif name == TCP_KEEPINTVL:
                s.cfg.keepintvl_s = value
            else:
                s.cfg.keepcnt = value
        elif name == TCP_USER_TIMEOUT:
            if value < 0:
                return -EINVAL
            s.cfg.user_timeout_ms = value
        elif name == TCP_MAXSEG and s.role != ROLE_TCP:
            if value < TCP_MSS_MIN or value > 65495:
                return -EINVAL
            if value < s.cfg.mss_bytes:
                s.cfg.mss_bytes = <uint16_t>value
        elif s.role != ROLE_TCP:
            return -ENOPROTOOPT
    else:
        return -ENOPROTOOPT
    if s.role == ROLE_TCP:
        return tcp_setopt(&e.env, s.tcp, level, name, value)
    return 0


cdef int option_get(ul_session *s, int level, int name, int *value) noexcept nogil:
    if level == SOL_IP and name == IP_TTL:
        value[0] = s.ttl
        return 0
    if level == SOL_IP and name == IP_TOS:
        value[0] = s.tos
        return 0
    if s.role == ROLE_TCP:
        return tcp_getopt(s.tcp, level, name, value)
    if level == SOL_SOCKET:
        if name == SO_SNDBUF:
            value[0] = s.cfg.sndbuf_bytes
        elif name == SO_RCVBUF:
            value[0] = s.cfg.rcvbuf_bytes
        elif name == SO_KEEPALIVE:
            value[0] = s.cfg.keepalive
        else:
            return -ENOPROTOOPT
        return 0
    if level == UL_IPPROTO_TCP and s.flow.proto == UL_IPPROTO_TCP:
        if name == TCP_NODELAY:
            value[0] = s.cfg.nodelay
        elif name == TCP_KEEPIDLE:
            value[0] = s.cfg.keepidle_s
        elif name == TCP_KEEPINTVL:
            value[0] = s.cfg.keepintvl_s
        elif name == TCP_KEEPCNT:
            value[0] = s.cfg.keepcnt
        elif name == TCP_USER_TIMEOUT:
            value[0] = s.cfg.user_timeout_ms
        elif name == TCP_MAXSEG:
            value[0] = s.cfg.mss_bytes
        else:
            return -ENOPROTOOPT
        return 0
    return -ENOPROTOOPT


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class Engine:
    """One link and its sessions. ``library=True``: ARP, ICMP echo, refusals and handshakes are the server's matter."""

    def __cinit__(self, Link link not None, Metastate meta not None, *, bint library=False, StatPage stats=None,
                  int64_t spin_ns=50000):
        cdef bytes secret = os.urandom(16)
        cdef const uint8_t *p = secret
        self.link = link
        self.meta = meta
        self.stats = stats
        self.e = engine_new(&link.ops, meta.page, library, p, spin_ns)
        if self.e == NULL:
            raise MemoryError("no memory for an engine")

    def __dealloc__(self):
        if self.e != NULL:
            engine_free(self.e)
            self.e = NULL

    # ------------------------------------------------------------ life

    def start_helper(self):
        """The thread that works while the program is elsewhere."""
        if self.helper_thread is None:
            # It holds the engine: an engine with a helper lives until close().
            self.helper_thread = threading.Thread(target=self._helper, name="ulnet-helper", daemon=True)
            self.helper_thread.start()

    def _helper(self):
        cdef engine *e = self.e
        while not e.stop:
            with nogil:
                helper_run(e)
            self.attend()

    cdef void attend(self) noexcept:
        """What only Python can do for the engine."""
        cdef engine *e = self.e
        cdef uint32_t todo
        if e.bufs.dead != NULL:
            self.reap()
        with nogil:
            engine_lock(e)
            todo = e.attention
            e.attention = 0
            engine_unlock(e)
        try:
            if todo & ATTN_STRAYS:
                frames = self.take_strays()
                if frames and self.on_strays is not None:
                    self.on_strays(frames)
            if todo & ATTN_RESOLVE:
                self.resolve_pending()
        except OSError:
            pass                           # the server is away: the sender's own timers decide

    cdef int resolve_pending(self) except -1:
        cdef engine *e = self.e
        cdef ul_addr hop
        with nogil:
            engine_lock(e)
            hop = e.resolve_addr
            e.attention &= ~<uint32_t>ATTN_RESOLVE
            engine_unlock(e)
        if self.resolver is None:
            raise OSError(EAGAIN, "the next hop's address is not known and nobody can be asked")
        self.resolver(addr_text(&hop))
        return 0

    cdef void reap(self) noexcept:
        """Decref what was held for sending. Not under the lock: a decref may run anything."""
        cdef engine *e = self.e
        cdef txchunk *dead
        cdef txchunk *c
        with nogil:
            engine_lock(e)
            dead = e.bufs.dead
            e.bufs.dead = NULL
            engine_unlock(e)
        if dead == NULL:
            return
        c = dead
        while True:
            Py_DECREF(<object>c.owner)
            c.owner = NULL
            if c.next == NULL:
                break
            c = c.next
        with nogil:
            engine_lock(e)
            c.next = e.bufs.dead
            e.bufs.dead = NULL
            chunks_free(&e.bufs, dead)
            engine_unlock(e)

    cdef list take_strays(self):
        cdef engine *e = self.e
        cdef frame_rec *f
        cdef frame_rec *following
        cdef list frames = []
        with nogil:
            engine_lock(e)
            f = e.strays
            e.strays = NULL
            e.strays_tail = NULL
            e.strays_count = 0
            engine_unlock(e)
        while f != NULL:
            following = f.next
            # One header says what the ring said of the frame: flags, super-segment size.
            frames.append(f.flags.to_bytes(2, "little") + f.gso_size_bytes.to_bytes(2, "little")
                          + PyBytes_FromStringAndSize(<char *>f.data, f.len_bytes))
            free(f.data)
            free(f)
            f = following
        return frames

    def close(self):
        """Stop: wake every waiter (EBADF), end the helper. Sessions are aborted without a word to their peers
        unless they were closed or handed over before."""
        cdef engine *e = self.e
        cdef ul_session *s
        thread = self.helper_thread
        self.helper_thread = None
        with nogil:
            engine_lock(e)
            e.stop = 1
            s = e.all
            while s != NULL:
                waiters_wake(e, s, 0xFF)
                s = s.all_next
            helper_wake(e)
            engine_unlock(e)
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)
        self.attend()

    def poll(self):
        """Process waiting frames and due timers; the number of frames."""
        cdef engine *e = self.e
        cdef int n
        with nogil:
            engine_lock(e)
            n = engine_poll(e, BURST)
            engine_unlock(e)
        if e.attention or e.bufs.dead != NULL:
            self.attend()
        return n

    def deadline_ns(self):
        cdef engine *e = self.e
        cdef int64_t due
        with nogil:
            engine_lock(e)
            due = engine_deadline(e)
            engine_unlock(e)
        return None if due == INT64_MAX else due

    def announce(self):
        """Tell the link who has our address (gratuitous ARP, RFC 5227 2.3)."""
        cdef engine *e = self.e
        with nogil:
            engine_lock(e)
            e.nenv.now_ns = clock_now()
            if e.neigh != NULL:
                neigh_announce(e.neigh, &e.nenv)
            engine_unlock(e)

    def ask_neighbour(self, str next_hop):
        """Ask by ARP for a neighbour on behalf of somebody else; the answer shows in the metastate page."""
        cdef engine *e = self.e
        cdef ul_addr hop
        addr_parse(next_hop, &hop)
        with nogil:
            engine_lock(e)
            e.nenv.now_ns = clock_now()
            if e.neigh != NULL:
                neigh_ask(e.neigh, &e.nenv, &hop)
            engine_unlock(e)

    def interrupt(self):
        """Wake every waiter once; they look again."""
        cdef engine *e = self.e
        cdef ul_session *s
        with nogil:
            engine_lock(e)
            s = e.all
            while s != NULL:
                waiters_wake(e, s, 0xFF)
                s = s.all_next
            engine_unlock(e)

    # ------------------------------------------------------------ sessions

    def new_session(self, int kind):
        """A shell of kind IPPROTO_TCP or IPPROTO_UDP."""
        cdef engine *e = self.e
        cdef ul_session *s
        if kind != UL_IPPROTO_TCP and kind != UL_IPPROTO_UDP:
            raise ValueError(f"session kind {kind}: IPPROTO_TCP (6) or IPPROTO_UDP (17) is meant")
        with nogil:
            engine_lock(e)
            s = session_new(e, <uint8_t>kind)
            if s != NULL:
                s.cfg.sndbuf_bytes = SNDBUF_BYTES
                s.cfg.rcvbuf_bytes = RCVBUF_BYTES if kind == UL_IPPROTO_TCP else UDP_RCVBUF_BYTES
                s.cfg.mss_bytes = <uint16_t>(e.link.mtu_bytes - 40)
                s.cfg.keepidle_s = 7200
                s.cfg.keepintvl_s = 75
                s.cfg.keepcnt = 9
            engine_unlock(e)
        if s == NULL:
            raise MemoryError("no memory for a session")
        return self.wrap(s)

    cdef Session wrap(self, ul_session *s):
        """Takes over one reference to s."""
        cdef Session handle = Session.__new__(Session)
        handle.engine = self
        handle.kind = s.flow.proto
        handle.s = s
        s.handle = <void *>handle
        return handle

    def open_udp(self, Session session not None, str laddr, int lport, str raddr=None, int rport=0):
        """Open, or give an open session another peer. EADDRINUSE when the flow exists here."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc = 0
        memset(&flow, 0, sizeof(flow))
        flow.proto = UL_IPPROTO_UDP
        addr_parse(laddr, &flow.laddr)
        flow.lport = <uint16_t>lport
        if raddr is not None:
            addr_parse(raddr, &flow.raddr)
            flow.rport = <uint16_t>rport
        with nogil:
            engine_lock(e)
            if s.role == ROLE_SHELL:
                s.udp = udp_new(s.cfg.rcvbuf_bytes)
                if s.udp == NULL:
                    rc = -ENOMEM
                else:
                    s.role = ROLE_UDP
            elif s.role != ROLE_UDP:
                rc = -EINVAL
            if rc == 0:
                session_ref(s)
                session_remove(e, s)
                s.flow = flow
                rc = session_insert(e, s)
                session_unref(e, s)
                orphans_replay(e, &s.flow)
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        self.take_stat(session)

    cdef void take_stat(self, Session session) noexcept:
        cdef ul_session *s = session.s
        if self.stats is None or s.id == 0:
            return
        if s.stat == NULL:
            s.stat = stat_take(self.stats, s.id, &s.flow)
        else:
            s.stat.flow = s.flow

    def open_tcp(self, Session session not None, str laddr, int lport, str raddr, int rport):
        """Active open (RFC 9293 3.10.1): the SYN goes out as soon as the next hop is known."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc
        memset(&flow, 0, sizeof(flow))
        flow.proto = UL_IPPROTO_TCP
        addr_parse(laddr, &flow.laddr)
        addr_parse(raddr, &flow.raddr)
        flow.lport = <uint16_t>lport
        flow.rport = <uint16_t>rport
        with nogil:
            engine_lock(e)
            e.now_ns = clock_now()
            e.env.now_ns = e.now_ns
            e.nenv.now_ns = e.now_ns
            if s.role != ROLE_SHELL:
                rc = -EISCONN
            else:
                s.flow = flow
                s.cfg.ts_offset = tcp_isn(e.secret, &flow, sizeof(flow), 0)
                rc = session_tcp_start(e, s)
                if rc == 0:
                    s.phase = PHASE_CONNECTING
                    tcp_open(&e.env, s.tcp, tcp_isn(e.secret, &flow, sizeof(flow), e.now_ns))
                    session_touch(e, s)
                    engine_settle(e)
                    engine_left(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)

    def listen(self, Session session not None, str laddr, int lport, int backlog):
        """Passive open. Listening again changes the backlog."""
        self.open_listener_shell(session, laddr, lport, backlog)

    def set_backlog(self, Session session not None, int backlog):
        session.s.backlog = <uint32_t>max(backlog, 0)

    def open_listener_shell(self, Session session not None, str laddr, int lport, int backlog):
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc = 0
        memset(&flow, 0, sizeof(flow))
        flow.proto = UL_IPPROTO_TCP
        addr_parse(laddr, &flow.laddr)
        flow.lport = <uint16_t>lport
        with nogil:
            engine_lock(e)
            s.backlog = <uint32_t>(backlog if backlog > 0 else 0)
            if s.role == ROLE_SHELL:
                s.flow = flow
                rc = session_insert(e, s)
                if rc == 0:
                    s.role = ROLE_LISTEN
                    session_touch(e, s)
                    engine_settle(e)
            elif s.role != ROLE_LISTEN:
                rc = -EINVAL
            engine_unlock(e)
        if rc < 0:
            fail(rc)

    def accept(self, Session session not None):
        """An established session of the listener's queue, or None."""
        cdef engine *e = self.e
        cdef ul_session *listener = session.s
        cdef ul_session *s = NULL
        cdef int rc = 0
        with nogil:
            engine_lock(e)
            if listener.closing:
                rc = -EBADF
            elif listener.role != ROLE_LISTEN:
                rc = -EINVAL
            else:
                if listener.accept_head == NULL:
                    engine_poll(e, BURST)
                s = listener.accept_head
            if s != NULL:
                listener.accept_head = s.accept_next
                if listener.accept_head == NULL:
                    listener.accept_tail = NULL
                listener.accept_count -= 1
                s.accept_next = NULL
                if s.listener != NULL:
                    s.listener = NULL
                    session_unref(e, listener)
                s.phase = PHASE_OPEN
                session_touch(e, listener)
                engine_settle(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        return None if s == NULL else self.wrap(s)

    def close_session(self, Session session not None, *, bint linger_abort=False):
        """The user is done with it; TCP goes on to its end by itself. Calling it again does nothing."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            e.now_ns = clock_now()
            e.env.now_ns = e.now_ns
            if not s.closing:
                session_close(e, s, linger_abort)
                if s.fd != NULL:
                    e.watched -= 1
                    readyfd_free(s.fd)
                    s.fd = NULL
                engine_settle(e)
            engine_left(e)
            engine_unlock(e)
        if e.bufs.dead != NULL:
            self.reap()

    def abort_flow(self, str laddr, int lport, str raddr, int rport, uint32_t snd_nxt, uint32_t rcv_nxt):
        """RST for a session that nobody holds any more (its application died)."""
        cdef engine *e = self.e
        cdef flow_key flow
        cdef tcp_out out
        memset(&flow, 0, sizeof(flow))
        memset(&out, 0, sizeof(out))
        flow.proto = UL_IPPROTO_TCP
        addr_parse(laddr, &flow.laddr)
        addr_parse(raddr, &flow.raddr)
        flow.lport = <uint16_t>lport
        flow.rport = <uint16_t>rport
        out.seq = snd_nxt
        out.ack = rcv_nxt
        out.flags = TCP_RST | TCP_ACK
        out.mss_bytes = 536
        with nogil:
            engine_lock(e)
            emit_refusal(e, &flow, &out)
            engine_unlock(e)

    # ------------------------------------------------------------ hand-over

    def export_session(self, Session session not None):
        """The whole state of a TCP session as bytes; it lives elsewhere from now on (its handle says EBADF)."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef ul_session *mark
        cdef uint8_t *out
        cdef size_t n = 0
        cdef size_t room
        cdef state_head head
        cdef bytes state = b""
        cdef int rc = 0
        with nogil:
            engine_lock(e)
            e.now_ns = clock_now()
            e.env.now_ns = e.now_ns
            if s.role != ROLE_TCP:
                rc = -ENOTCONN
            else:
                session_ref(s)
                memset(&head, 0, sizeof(head))
                head.magic = STATE_MAGIC
                head.head_bytes = sizeof(head)
                head.flow = s.flow
                head.ttl = s.ttl
                head.tos = s.tos
                room = tcp_export_bytes(s.tcp)
                with gil:
                    # bytes are filled in place: bulk in flight is copied once
                    try:
                        state = PyBytes_FromStringAndSize(NULL, sizeof(head) + room)
                    except MemoryError:
                        rc = -ENOMEM
                    out = <uint8_t *>PyBytes_AS_STRING(state)
                if rc == 0:
                    memcpy(out, &head, sizeof(head))
                    n = tcp_export(&e.env, s.tcp, out + sizeof(head))
                    s.closing = 1
                    waiters_wake(e, s, 0xFF)
                    session_end(e, s, 0)
                    if s.fd != NULL:
                        e.watched -= 1
                        readyfd_free(s.fd)
                        s.fd = NULL
                    mark = session_new(e, UL_IPPROTO_TCP)
                    if mark != NULL:
                        mark.flow = head.flow
                        mark.role = ROLE_FOREIGN
                        mark.id = s.id
                        session_insert(e, mark)
                        if e.library:
                            foreign_arm(e, mark, e.now_ns + FOREIGN_NS)
                        session_unref(e, mark)
                session_unref(e, s)
            engine_unlock(e)
        if e.bufs.dead != NULL:
            self.reap()
        if rc < 0:
            fail(rc)
        if n != room:
            state = state[:sizeof(head) + n]
        return state

    def adopt_foreign(self, int proto, str laddr, int lport, str raddr, int rport):
        """Remember a flow that another process holds: its frames are strays here, never refused."""
        cdef engine *e = self.e
        cdef ul_session *mark
        cdef flow_key flow
        flow_fill(&flow, proto, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            mark = session_find(e, &flow)
            if mark == NULL:
                mark = session_new(e, flow.proto)
                if mark != NULL:
                    mark.flow = flow
                    mark.role = ROLE_FOREIGN
                    session_insert(e, mark)
                    session_unref(e, mark)
            engine_unlock(e)

    def forget_flow(self, int proto, str laddr, int lport, str raddr, int rport):
        """The other holder's session is over."""
        cdef engine *e = self.e
        cdef ul_session *mark
        cdef flow_key flow
        flow_fill(&flow, proto, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            mark = session_find(e, &flow)
            if mark != NULL and mark.role == ROLE_FOREIGN:
                session_end(e, mark, 0)
            engine_unlock(e)

    def import_session(self, Session session not None, state, uint64_t session_id):
        """Take over a session from its exported state. ValueError when the state is malformed."""
        cdef const uint8_t[::1] view = state
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef int rc
        cdef const uint8_t *p = &view[0] if view.shape[0] else NULL
        cdef size_t n = view.shape[0]
        with nogil:
            engine_lock(e)
            rc = import_state(e, s, p, n, session_id)
            engine_unlock(e)
        if rc == -EINVAL:
            raise ValueError(f"session state of {n} bytes is malformed")
        if rc < 0:
            fail(rc)
        self.take_stat(session)
        self.settle_imported(session)

    cdef void settle_imported(self, Session session) noexcept:
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            orphans_replay(e, &s.flow)
            session_touch(e, s)
            engine_settle(e)
            engine_left(e)
            engine_unlock(e)

    def deliver(self, Session listener not None, state, uint64_t session_id):
        """An accepted session, from the server, into the listener's queue. OSError EINVAL when it listens no more."""
        cdef const uint8_t[::1] view = state
        cdef const uint8_t *p = &view[0] if view.shape[0] else NULL
        cdef size_t n = view.shape[0]
        cdef engine *e = self.e
        cdef ul_session *l = listener.s
        cdef Session child = self.new_session(UL_IPPROTO_TCP)
        cdef ul_session *s = child.s
        cdef int rc = -EINVAL
        with nogil:
            engine_lock(e)
            if l.role == ROLE_LISTEN:
                s.cfg = l.cfg
                rc = import_state(e, s, p, n, session_id)
            if rc == 0:
                # The queue gets a reference of its own, accept() another handle.
                s.handle = NULL
                s.phase = PHASE_QUEUED
                s.listener = l
                session_ref(l)
                session_ref(s)
                if l.accept_tail != NULL:
                    l.accept_tail.accept_next = s
                else:
                    l.accept_head = s
                l.accept_tail = s
                l.accept_count += 1
                session_touch(e, l)
            engine_unlock(e)
        if rc < 0:
            raise OSError(-rc, "the listener takes no session: it is closed, or the state is malformed")
        self.take_stat(child)
        self.settle_imported(child)
        with nogil:
            engine_lock(e)
            session_unref(e, s)
            engine_unlock(e)
        child.s = NULL

    def fail(self, Session session not None, int error):
        """Connecting failed elsewhere: pending error, waiters wake."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            if s.role == ROLE_SHELL:
                session_end(e, s, -error)
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)

    def reopen(self, Session session not None):
        """Back to a shell after a connection attempt that failed (BSD lets a socket try again)."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            if s.role == ROLE_TCP and tcp_state(s.tcp) == 0:
                session_end(e, s, 0)
            if s.role == ROLE_ENDED and not s.closing:
                s.role = ROLE_SHELL
                s.phase = PHASE_OPEN
                s.so_error = 0
                memset(&s.flow.raddr, 0, sizeof(ul_addr))
                s.flow.rport = 0
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)

    def inject(self, bytes frame not None):
        """Process a stray that its former holder forwarded (with its 4-byte header, see take_strays)."""
        cdef engine *e = self.e
        cdef ul_rx rx
        cdef const uint8_t *p = frame
        cdef uint32_t n = <uint32_t>PyBytes_GET_SIZE(frame)
        if n < 4:
            return
        memset(&rx, 0, sizeof(rx))
        rx.flags = p[0] | (p[1] << 8)
        rx.gso_size_bytes = p[2] | (p[3] << 8)
        rx.data = p + 4
        rx.len_bytes = n - 4
        rx.slot = UL_SLOT_NONE
        with nogil:
            engine_lock(e)
            e.now_ns = clock_now()
            e.env.now_ns = e.now_ns
            engine_frame(e, &rx)
            engine_settle(e)
            engine_left(e)
            engine_unlock(e)

    # ------------------------------------------------------------ what happened, what there is

    @property
    def collect_events(self):
        return bool(self.e.collect_events)

    @collect_events.setter
    def collect_events(self, bint on):
        self.e.collect_events = on

    def events(self):
        """(EV_*, session or None, value) since the last call."""
        cdef engine *e = self.e
        cdef event_rec *ev
        cdef event_rec *following
        cdef list out = []
        if e.events_head == NULL:
            return out
        with nogil:
            engine_lock(e)
            ev = e.events_head
            e.events_head = NULL
            e.events_tail = NULL
            engine_unlock(e)
        while ev != NULL:
            following = ev.next
            out.append((ev.kind, <Session>ev.s.handle if ev.s.handle != NULL else None, ev.value))
            with nogil:
                engine_lock(e)
                session_unref(e, ev.s)
                engine_unlock(e)
            free(ev)
            ev = following
        return out

    def sessions(self):
        """One dict for each session here: proto, local, remote, state, id, and its counters."""
        cdef engine *e = self.e
        cdef ul_session *s
        cdef session_row *rows
        cdef session_row *row
        cdef uint32_t n = 0
        cdef uint32_t room = e.all_count + 64
        cdef uint32_t i
        cdef list out = []
        # Python objects are made after the lock is let go: making one may run the collector, and that a destructor
        # which wants the lock.
        rows = <session_row *>malloc(room * sizeof(session_row))
        if rows == NULL:
            raise MemoryError("no memory for the list of sessions")
        with nogil:
            engine_lock(e)
            s = e.all
            while s != NULL and n < room:
                if s.role == ROLE_TCP or s.role == ROLE_UDP or s.role == ROLE_LISTEN:
                    row = &rows[n]
                    n += 1
                    row.role = s.role
                    row.closing = s.closing
                    row.flow = s.flow
                    row.id = s.id
                    memset(&row.t, 0, sizeof(tcp_stat))
                    if s.role == ROLE_TCP:
                        tcp_stat_get(s.tcp, &row.t)
                    elif s.role == ROLE_UDP:
                        row.t.bytes_in = s.udp.bytes_in
                        row.t.bytes_out = s.udp.bytes_out
                s = s.all_next
            engine_unlock(e)
        for i in range(n):
            row = &rows[i]
            entry = dict(row.t)
            entry["proto"] = "udp" if row.role == ROLE_UDP else "tcp"
            entry["local"] = (addr_text(&row.flow.laddr), row.flow.lport)
            entry["remote"] = None if addr_is_zero(&row.flow.raddr) else (addr_text(&row.flow.raddr), row.flow.rport)
            entry["state"] = ("OPEN" if row.role == ROLE_UDP else "LISTEN" if row.role == ROLE_LISTEN
                              else STATES[row.t.state])
            entry["session_id"] = row.id
            entry["closing"] = bool(row.closing)
            out.append(entry)
        free(rows)
        return out

    def counters(self):
        """Everything counted, one flat dict: engine, TCP (tcp_...), buffers (buf_...), link (link_...)."""
        cdef engine *e = self.e
        out = dict(e.n)
        for name, value in dict(e.tcp).items():
            out["tcp_" + name] = value
        out["buf_held"] = e.bufs.held
        out["buf_lent"] = e.bufs.lent
        out["buf_copied_bytes"] = e.bufs.copied_bytes
        out["buf_evacuated"] = e.bufs.evacuated
        out["buf_nomem"] = e.bufs.nomem
        out["reass_done"] = e.reass.done
        out["reass_timeouts"] = e.reass.timeouts
        out["reass_overlaps"] = e.reass.overlaps
        out["reass_overflow"] = e.reass.overflow
        out["sessions"] = e.all_count
        out["flows"] = e.table_count
        for name, value in self.link.counters().items():
            out["link_" + name] = value
        return out


cdef int flow_fill(flow_key *flow, int proto, str laddr, int lport, str raddr, int rport) except -1:
    memset(flow, 0, sizeof(flow_key))
    flow.proto = <uint8_t>proto
    addr_parse(laddr, &flow.laddr)
    addr_parse(raddr, &flow.raddr)
    flow.lport = <uint16_t>lport
    flow.rport = <uint16_t>rport
    return 0


cdef int import_state(engine *e, ul_session *s, const uint8_t *p, size_t n, uint64_t session_id) noexcept nogil:
    """Lock held. Sender and receiver are of one build: the head's size is its version."""
    cdef state_head head
    cdef int err = 0
    cdef int rc
    if n < sizeof(head):
        return -EINVAL
    memcpy(&head, p, sizeof(head))
    if head.magic != STATE_MAGIC or head.head_bytes != sizeof(head) or head.flow.proto != UL_IPPROTO_TCP:
        return -EINVAL
    if s.role != ROLE_SHELL:
        return -EISCONN
    e.now_ns = clock_now()
    e.env.now_ns = e.now_ns
    s.tcp = tcp_import(&e.env, p + sizeof(head), n - sizeof(head), s, &err)
    if s.tcp == NULL:
        return err if err else -EINVAL
    s.flow = head.flow
    s.ttl = head.ttl
    s.tos = head.tos
    s.id = session_id
    s.phase = PHASE_OPEN
    s.role = ROLE_TCP
    rc = session_insert(e, s)
    if rc < 0:
        session_end(e, s, rc)
    return rc


