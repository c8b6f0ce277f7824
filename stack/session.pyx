"""One session as Python holds it, and the buffers it lends: locks, waits and errors are dealt with here, once."""

import threading
import weakref

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EBADF, EINTR, EINVAL
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from ulnet.stack.address cimport addr_from_text, addr_to_text
from ulnet.stack.buf cimport rxseg, rxseg_free
from ulnet.stack.engine_core cimport (
    PHASE_CONNECTING, ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_TCP, ROLE_UDP, USER_SHARED, USER_STAYED,
    clock_now, engine, engine_settle, session_close, session_ready, session_touch, session_unref,
    ul_session,
)
from ulnet.stack.engine_user cimport (
    USER_DONTWAIT, USER_RESOLVE, user_recv, user_recv_seg, user_recvfrom, user_send, user_sendto, user_shutdown,
    user_wait,
)
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock, helper_wake
from ulnet.stack.readyfd cimport readyfd_new, readyfd_reserve, readyfd_show, readyfd_steer
from ulnet.stack.session_place cimport shared_adopt, shared_begin, shared_end
from ulnet.stack.session_options cimport option_get, option_set
from ulnet.stack.session_shared cimport (
    USER_MINE, shared_announced, shared_ours, shared_queues, shared_recv, shared_recv_seg, shared_recvfrom, shared_send,
    shared_sendto, shared_shutdown, shared_wait,
)
from ulnet.stack.tcp cimport tcp_so_error, tcp_stat, tcp_stat_get, tcp_state
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_IPPROTO_UDP, UL_RDHUP, addr_is_zero, ul_addr
from ulnet.stack.udp cimport udp_so_error

cdef extern from *:
    """
    #include <errno.h>
    static inline void ulnet_set_errno(int n) { errno = n; }
    """
    void ulnet_set_errno(int n)

STATES = ("CLOSED", "LISTEN", "SYN-SENT", "SYN-RECEIVED", "ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT",
          "CLOSING", "LAST-ACK", "TIME-WAIT")


# Sessions by the number of their descriptor, for who has only that. Entries of sessions that ended stay until the
# number is used again: so whoever looks asks the session whether the number is still its own.
cdef dict numbers = {}


def session_of(int number):
    """The open session whose descriptor has this number, or None."""
    cdef Session session
    cdef engine *e
    cdef ul_session *s
    cdef bint its_own
    ref = numbers.get(number)
    session = ref() if ref is not None else None
    if session is None:
        return None
    e = session.e
    s = session.s
    with nogil:
        engine_lock(e)
        its_own = s.fd != NULL and s.fd.user_fd == number and not s.closing
        engine_unlock(e)
    return session if its_own else None


cdef int fail(Py_ssize_t code) except -1:
    cdef object kind = OSError       # looked up first: the look-up may change errno
    if code == -USER_STAYED:
        raise OSError(EBADF, "this socket stayed with the parent process")
    ulnet_set_errno(<int>-code)
    PyErr_SetFromErrno(kind)         # picks the subclass, and is far cheaper than a call of OSError
    return -1


cdef int raise_timed(Py_ssize_t code, int64_t timeout_ns) except -1:
    if code == -EAGAIN and timeout_ns > 0:
        raise TimeoutError("timed out")
    return fail(code)


cdef str addr_shown(const ul_addr *a):
    return "0.0.0.0" if addr_is_zero(a) else addr_to_text(a)


cdef inline int64_t deadline_of(int64_t timeout_ns) noexcept nogil:
    return timeout_ns if timeout_ns <= 0 else clock_now() + timeout_ns


cdef Session session_wrap(object owner, engine *e, ul_session *s):
    cdef Session handle = Session.__new__(Session)
    handle.engine = owner
    handle.e = e
    handle.kind = s.flow.proto
    handle.s = s
    s.handle = <void *>handle
    return handle


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class Buffer:
    """Received bytes in the stack's own memory (a ring slot, if they were many): read-only, by the buffer protocol."""

    cdef object engine               # keeps e alive
    cdef engine *e
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
        cdef engine *e = self.e
        cdef rxseg *seg = self.seg
        if seg == NULL:
            return
        self.seg = NULL
        with nogil:
            engine_lock(e)
            rxseg_free(&e.bufs, seg)         # counts it as given back
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        if s == NULL:
            return
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got
        cdef size_t done = 0
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        with nogil:
            deadline = deadline_of(timeout_ns)
            got = user_recv(e, s, out, n, flags, deadline, &done)
        while got == -EINTR or got == -USER_SHARED:
            if got == -USER_SHARED:
                got = shared_recv(self, out, n, flags, deadline, &done)
                if got != -USER_MINE:
                    break
                e = self.e
                s = self.s
            else:
                PyErr_CheckSignals()
            with nogil:
                got = user_recv(e, s, out, n, flags, deadline, &done)
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    cdef Py_ssize_t recvfrom(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns,
                             ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got = -EINTR
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_recvfrom(e, s, out, n, flags, deadline, src, sport, full_bytes)
            if got == -USER_SHARED:
                got = shared_recvfrom(self, out, n, flags, deadline, src, sport, full_bytes)
                if got == -USER_MINE:
                    e = self.e
                    s = self.s
                    continue
            if got != -EINTR:
                break
            PyErr_CheckSignals()
        if got < 0:
            raise_timed(got, timeout_ns)
        return got

    cdef Py_ssize_t send_some(self, const uint8_t *data, size_t n, object owner, bint all, int64_t timeout_ns,
                              size_t *done) except -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef void *held = NULL if owner is None else <void *>owner
        cdef Py_ssize_t got
        cdef int64_t deadline
        with nogil:
            deadline = deadline_of(timeout_ns)
            got = user_send(e, s, data, n, held, all, deadline, done)
        while got == -EINTR or got == -USER_SHARED:
            if got == -USER_SHARED:
                got = shared_send(self, data, n, all, deadline, done)
                if got != -USER_MINE:
                    break
                e = self.e
                s = self.s
            else:
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_sendto(e, s, data, n, dst, dport, deadline)
            if got == -USER_SHARED:
                got = shared_sendto(self, data, n, dst, dport, deadline)
                if got == -USER_MINE:
                    e = self.e
                    s = self.s
                    continue
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef rxseg *seg
        cdef Buffer b
        cdef int err = 0
        cdef int64_t deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                seg = user_recv_seg(e, s, max_bytes, deadline, &err)
            if seg == NULL and err == -USER_SHARED:
                err = shared_recv_seg(self, max_bytes, deadline, &seg)
                e = self.e
                s = self.s
                if err == -USER_MINE:
                    continue
            if seg != NULL or err != -EINTR:
                break
            PyErr_CheckSignals()
        if seg == NULL:
            if err < 0:
                raise_timed(err, timeout_ns)
            return Buffer.__new__(Buffer)  # end of file: an empty one
        b = Buffer.__new__(Buffer)
        b.engine = self.engine
        b.e = e
        b.seg = seg
        if self.kind == UL_IPPROTO_UDP:
            b.address = (addr_to_text(&seg.raddr), seg.rport)
        return b

    # ------------------------------------------------------------ readiness

    @property
    def ready(self):
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef uint32_t bits
        with nogil:
            engine_lock(e)
            bits = session_ready(s)
            engine_unlock(e)
        return bits

    def wait(self, uint32_t mask, int64_t timeout_ns=-1):
        """Drive the engine until one of mask (or ERROR, HUP) is ready; the ready bits, 0 on time-out."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef uint32_t ready = 0
        cdef int rc
        cdef int64_t deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                rc = user_wait(e, s, mask, deadline, &ready)
            if rc == -USER_SHARED:
                rc = shared_wait(self, mask, deadline)
                if rc == -USER_MINE:
                    e = self.e
                    s = self.s
                    continue
                ready = rc
            if rc != -EINTR:
                break
            PyErr_CheckSignals()
        if rc == -EBADF or rc == -USER_STAYED:
            fail(rc)
        return ready & (mask | UL_ERROR | UL_HUP)

    def fileno(self):
        """A descriptor that select, poll and epoll may watch; the same one at every call, -1 once closed."""
        return self.descriptor(True)

    def number(self):
        """The number that fileno() gives, as a name only: until fileno() is called the descriptor says nothing."""
        return self.descriptor(False)

    cdef int descriptor(self, bint steered) except? -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int err = 0
        cdef int number = -1
        cdef bint shows = False
        cdef bint datagram = s.flow.proto == UL_IPPROTO_UDP
        with nogil:
            engine_lock(e)
            if s.fd == NULL and not s.closing:
                s.fd = readyfd_new(datagram, &err) if steered else readyfd_reserve(datagram, &err)
                shows = steered and s.fd != NULL
            elif s.fd != NULL and s.fd.quiet and steered:
                err = readyfd_steer(s.fd)
                shows = err == 0
            if shows:
                e.watched += 1
                readyfd_show(s.fd, session_ready(s))
                helper_wake(e)             # from now on frames must be noticed at once
            if s.fd != NULL:
                number = s.fd.user_fd
            engine_unlock(e)
        if err < 0:
            fail(err)
        if number >= 0 and not self.numbered:
            self.numbered = True
            numbers[number] = weakref.ref(self)
        return number

    # ------------------------------------------------------------ names, state, options

    @property
    def session_id(self):
        return self.s.id

    @session_id.setter
    def session_id(self, uint64_t value):
        self.s.id = value

    @property
    def local(self):
        return (addr_shown(&self.s.flow.laddr), self.s.flow.lport)

    @property
    def peer(self):
        if addr_is_zero(&self.s.flow.raddr):
            return None
        return (addr_to_text(&self.s.flow.raddr), self.s.flow.rport)

    @property
    def live(self):
        cdef int role = self.s.shared_as if self.s.role == ROLE_SHARED else self.s.role
        return role == ROLE_TCP or role == ROLE_UDP or role == ROLE_LISTEN

    @property
    def listening(self):
        return self.s.role == ROLE_LISTEN or (self.s.role == ROLE_SHARED and self.s.shared_as == ROLE_LISTEN)

    @property
    def closed(self):
        return bool(self.s.closing)

    @property
    def state(self):
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int state = 0
        cdef int role
        cdef uint32_t ready
        with nogil:
            engine_lock(e)
            role = s.role
            if role == ROLE_TCP:
                state = tcp_state(s.tcp)
            elif role == ROLE_SHARED:
                # The server knows better; its Info has it. This is what both ends of the pair say of it.
                role = s.shared_as
                if role == ROLE_TCP:
                    ready = session_ready(s)
                    state = 0 if ready & UL_HUP else 7 if ready & UL_RDHUP else 6 if s.shared_shut_wr else 4
            engine_unlock(e)
        if role == ROLE_UDP:
            return "OPEN"
        if role == ROLE_LISTEN:
            return "LISTEN"
        return STATES[state]

    def set_local(self, str address, int port):
        """Note the local endpoint of a shell (bound, not open yet)."""
        addr_from_text(address, &self.s.flow.laddr)
        self.s.flow.lport = <uint16_t>port

    def begin_connect(self):
        """A shell whose connection is being made elsewhere: neither readable nor writable until it is imported."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        with nogil:
            engine_lock(e)
            s.phase = PHASE_CONNECTING
            session_touch(e, s)  # a descriptor made before has shown it writable and hung up
            engine_settle(e)
            engine_unlock(e)

    def take_error(self):
        """SO_ERROR: the pending errno, cleared; 0 if none."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int error = 0
        if s.role == ROLE_SHARED and not shared_ours(self):
            hook = self.engine.on_shared_error
            return 0 if hook is None else hook(self)
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int rc = 0
        if s.role == ROLE_SHARED and not shared_ours(self):
            hook = self.engine.on_shared_option
            if hook is not None:
                hook(self, level, name, value)
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
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int rc
        cdef int value = 0
        if s.role == ROLE_SHARED and not shared_ours(self):
            hook = self.engine.on_shared_option
            if hook is not None:
                return hook(self, level, name, None)
        with nogil:
            engine_lock(e)
            rc = option_get(s, level, name, &value)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        return value

    def shutdown(self, int how):
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int rc
        while True:
            with nogil:
                rc = user_shutdown(e, s, how)
            if rc != -USER_SHARED:
                break
            rc = shared_shutdown(self, how)
            if rc != -USER_MINE:
                break
            e = self.e
            s = self.s
        if rc < 0:
            fail(rc)

    def stat(self):
        """Counters and estimators by name (tcp_stat); times in ns. Empty when there is no protocol state."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef tcp_stat t
        cdef int role
        cdef int unread
        cdef int unsent
        memset(&t, 0, sizeof(t))
        with nogil:
            engine_lock(e)
            role = s.role
            if role == ROLE_TCP:
                tcp_stat_get(s.tcp, &t)
            elif role == ROLE_SHARED:
                role = s.shared_as
                shared_queues(s, &unread, &unsent)
                t.unread_bytes = unread
                t.unsent_bytes = unsent
            elif role == ROLE_UDP:
                t.bytes_in = s.udp.bytes_in
                t.bytes_out = s.udp.bytes_out
            engine_unlock(e)
        if role == ROLE_UDP:
            return {"bytes_in": t.bytes_in, "bytes_out": t.bytes_out}
        return dict(t) if role == ROLE_TCP else {}

    # ------------------------------------------------------------ placed in the server (session_shared)

    @property
    def shared(self):
        return self.s.role == ROLE_SHARED

    @property
    def shared_lock(self):
        cdef object lock
        if self.shared_rlock is None:
            lock = threading.RLock()
            if self.shared_rlock is None:    # making it may have let another thread in
                self.shared_rlock = lock
        return self.shared_rlock

    def share_begin(self):
        """Export it, keeping handle and descriptor: (user's end, manager's end, state)."""
        return shared_begin(self)

    def share_end(self, int o_fd, state, uint64_t number):
        """It is ours again; takes o_fd over. Returns the bytes that were still in the user's end."""
        return shared_end(self, o_fd, state, number)

    def adopt_fd(self, int u_fd, *, local=None, peer=None, bint listening=False, bint named=False):
        """A fresh shell becomes a shared session around a descriptor that comes from elsewhere."""
        shared_adopt(self, u_fd, listening, named)
        self.set_shared(local=local, peer=peer)

    def set_shared(self, *, local=None, peer=None, listening=None):
        """What another process, or a call to the server, made of a shared session."""
        cdef ul_session *s = self.s
        if s.role != ROLE_SHARED:
            raise OSError(EINVAL, "the session is not shared")
        if local is not None:
            addr_from_text(local[0], &s.flow.laddr)
            s.flow.lport = <uint16_t>local[1]
        if peer is not None:
            addr_from_text(peer[0], &s.flow.raddr)
            s.flow.rport = <uint16_t>peer[1]
            if s.shared_as == ROLE_SHELL:
                s.shared_as = ROLE_UDP if self.kind == UL_IPPROTO_UDP else ROLE_TCP
        if listening is not None:
            s.shared_as = ROLE_LISTEN if listening else ROLE_SHELL

    def leave(self):
        """Of a shared session: close it here, but not its descriptor, which is the caller's from now on."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int fd = -1
        with self.shared_lock:
            with nogil:
                engine_lock(e)
                if s.role == ROLE_SHARED and s.fd != NULL and not s.closing:
                    fd = s.fd.user_fd
                    s.fd.user_fd = -1
                    session_close(e, s, False)
                engine_unlock(e)
        if fd < 0:
            raise OSError(EINVAL, "the session is not shared")
        return fd

    def announced(self):
        """Of a shared listener: the number of the next connection that waits, or None."""
        return shared_announced(self)

    def rebind(self, owner):
        """Move to another engine, after a fork."""
        owner.take_session(self)
