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
from ulnet.stack.buf cimport rxseg, rxseg_free, rxseg_lend
from ulnet.stack.engine_core cimport (
    PHASE_CONNECTING, ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_TCP, ROLE_UDP, USER_SHARED, USER_STAYED,
    clock_now, engine, engine_poll, engine_settle, engine_tick, session_close, session_ready, session_shown,
    session_touch, session_unref, ul_session,
)
from ulnet.stack.engine_user cimport (
    USER_DONTWAIT, USER_RESOLVE, user_dgram, user_meta, user_recv, user_recv_seg, user_recv_segs, user_recvfrom,
    user_send, user_send_at_once, user_send_dgrams, user_send_seg, user_sendto, user_sendto_at_once, user_shutdown,
    user_wait,
)
from ulnet.stack.engine_wait cimport engine_lock, engine_trylock, engine_unlock, helper_wake
from ulnet.stack.readyfd cimport readyfd_blocking, readyfd_new, readyfd_reserve, readyfd_show, readyfd_steer
from ulnet.stack.session_place cimport shared_adopt, shared_begin, shared_end
from ulnet.stack.session_options cimport option_get, option_set
from ulnet.stack.session_shared cimport (
    USER_MINE, shared_announced, shared_ours, shared_queues, shared_recv, shared_recv_seg, shared_recvfrom, shared_send,
    shared_sendto, shared_shutdown, shared_wait,
)
from ulnet.stack.tcp cimport tcp_so_error, tcp_stat, tcp_stat_get, tcp_state
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_IPPROTO_UDP, UL_RDHUP, addr_equal, addr_is_zero, ul_addr
from ulnet.stack.udp cimport udp_so_error

cdef extern from *:
    """
    #include <errno.h>
    static inline void ulnet_set_errno(int n) { errno = n; }
    """
    void ulnet_set_errno(int n)

cdef extern from *:
    """
    #define take_pointer(at) __atomic_exchange_n((at), NULL, __ATOMIC_ACQ_REL)
    """
    rxseg *take_pointer(rxseg **at) nogil

cdef enum:
    ALLOC_MAX_BYTES = 1 << 28        # it lies in the send queue as a whole, which 32-bit sequence numbers count
    PIECE_MAX_BYTES = 1 << 30        # no limit: a received segment is smaller
    ERRNO_MAX = 4095                 # an answer beyond it: the session is not here, and the calls for single pieces know
    CHUNK_BYTES = 65536
    BURST = 64

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


cdef int64_t length_to_send(Buffer b, Py_ssize_t nbytes) except -1:
    """How many bytes of a pinned buffer nbytes means."""
    cdef Py_ssize_t have = b.seg.len_bytes if b.seg != NULL else 0
    if nbytes > have or nbytes < -1:
        raise ValueError(f"nbytes is {nbytes}, but the buffer has {have} bytes")
    return have if nbytes < 0 else nbytes


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


# Without the collector, for many are made in a second; it refers to an engine and a tuple, to nothing of the program's.
@cython.no_gc
@cython.final
@cython.freelist(256)
cdef class Buffer:
    """Memory of the stack, by the buffer protocol: received bytes where they lie (read-only), or room to write into.

    Give it back by ``release()`` or ``with``, soon when it was received: its memory is the ring's. Any thread may.
    """

    def __init__(self):
        raise TypeError("buffers come from recv_buffer(), recv_buffers() and alloc_buffer()")

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        if self.seg == NULL:
            PyBuffer_FillInfo(view, self, &self.exports, 0, 1, flags)
        else:
            PyBuffer_FillInfo(view, self, self.seg.data, self.seg.len_bytes, not self.writable, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    cdef int check(self) except -1:
        if self.released:
            raise ValueError("this buffer was released or sent: its memory belongs to the stack again")
        if self.sending:
            raise ValueError("this buffer is being sent by another thread")
        return 0

    cdef int pin(self) except -1:
        self.check()
        if self.exports:
            raise BufferError(f"{self.exports} view(s) of this buffer are still in use")
        self.sending = True
        return 0

    cdef void unpin(self, bint sent) noexcept:
        self.sending = False
        if sent:
            self.released = True
            self.give_back()

    def __len__(self):
        self.check()
        return self.seg.len_bytes if self.seg != NULL else 0

    @property
    def nbytes(self):
        return len(self)

    @property
    def readonly(self):
        return not self.writable

    def release(self):
        """Give the memory back. BufferError while memoryviews of it live; calling it again does nothing."""
        if self.exports:
            raise BufferError(f"{self.exports} view(s) of this buffer are still in use")
        if self.sending:
            raise BufferError("this buffer is being sent by another thread")
        self.released = True
        self.give_back()

    cdef void give_back(self) noexcept:
        cdef engine *e = self.e
        cdef rxseg *seg = take_pointer(&self.seg)    # of two threads that release at once, one frees
        if seg == NULL:
            return
        if engine_trylock(e):                        # nearly always: then the GIL need not change hands
            rxseg_free(&e.bufs, seg)                 # counts it as given back
            engine_unlock(e)
            return
        with nogil:
            engine_lock(e)
            rxseg_free(&e.bufs, seg)
            engine_unlock(e)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.release()

    def __repr__(self):
        if self.released:
            return "<ulnet.stack.session.Buffer released>"
        kind = "writable" if self.writable else "received"
        sender = "" if self.address is None else f" from {self.address[0]}:{self.address[1]}"
        return f"<ulnet.stack.session.Buffer {kind}, {self.seg.len_bytes if self.seg != NULL else 0} bytes{sender}>"

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
        return self.recv_datagram(out, n, flags, timeout_ns, src, sport, full_bytes, NULL)

    cdef Py_ssize_t recv_datagram(self, uint8_t *out, size_t n, int flags, int64_t timeout_ns, ul_addr *src,
                                  uint16_t *sport, uint32_t *full_bytes, user_meta *meta) except -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got = -EINTR
        cdef int64_t deadline
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_recvfrom(e, s, out, n, flags, deadline, src, sport, full_bytes, meta)
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
        cdef int64_t deadline = 0            # what is sent at once asks for none
        if not user_send_at_once(e, s, data, n, all, done, &got):
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
        return self.send_datagram(data, n, dst, dport, flags, NULL, timeout_ns)

    cdef Py_ssize_t send_datagram(self, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport, int flags,
                                  const user_meta *meta, int64_t timeout_ns) except -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef Py_ssize_t got
        cdef int64_t deadline
        if user_sendto_at_once(e, s, data, n, dst, dport, meta, &got):
            if got < 0:
                raise_timed(got, timeout_ns)
            return got
        if flags & USER_DONTWAIT:
            timeout_ns = 0
        deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                got = user_sendto(e, s, data, n, dst, dport, meta, deadline)
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

    cdef uint32_t send_dgrams(self, const user_dgram *items, uint32_t count, int64_t timeout_ns,
                              uint32_t *done) except? 0:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef int64_t deadline = deadline_of(timeout_ns)
        cdef int rc
        while True:
            with nogil:
                rc = user_send_dgrams(e, s, items, count, deadline, done)
            if rc == -EINTR:
                PyErr_CheckSignals()
            elif rc == -USER_RESOLVE:
                self.engine.resolve_pending()
            else:
                break
        if rc < -ERRNO_MAX:
            return self.send_singly(items, count, timeout_ns, done)
        if rc < 0 and done[0] == 0:
            raise_timed(rc, timeout_ns)
        return done[0]

    cdef uint32_t send_singly(self, const user_dgram *items, uint32_t count, int64_t timeout_ns,
                              uint32_t *done) except? 0:
        cdef const user_dgram *d
        while done[0] < count:
            d = items + done[0]
            try:
                self.sendto(d.data, d.len_bytes, &d.dst if d.named else NULL, d.dport, 0, timeout_ns)
            except OSError:
                if done[0]:
                    break                  # as the batch: the count tells where to go on
                raise
            done[0] += 1
        return done[0]

    cdef int send_seg(self, Buffer b, uint32_t n, int64_t timeout_ns) except -1:
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef rxseg *seg = b.seg
        cdef Py_ssize_t got
        cdef size_t sent = 0
        cdef int64_t deadline
        if b.e != e:
            # Of another stack, or an empty one: a copy goes in its place.
            with nogil:
                engine_lock(e)
                seg = rxseg_lend(&e.bufs, seg.data if seg != NULL else NULL, n)
                engine_unlock(e)
            if seg == NULL:
                raise MemoryError(f"no memory for {n} bytes")
        try:
            with nogil:
                deadline = deadline_of(timeout_ns)
                got = user_send_seg(e, s, seg, n, deadline)
            while got == -EINTR:
                PyErr_CheckSignals()
                with nogil:
                    got = user_send_seg(e, s, seg, n, deadline)
            if got < -ERRNO_MAX:
                self.sendall(seg.data, n, None, timeout_ns, &sent)
            elif got < 0:
                raise_timed(got, timeout_ns)
        except BaseException:
            if seg != b.seg:
                self.give_back(seg)
            raise
        if got >= 0 and seg == b.seg:
            b.seg = NULL                   # the connection's
        elif got < 0 and seg != b.seg:
            self.give_back(seg)
        return 0

    def send_buffer(self, Buffer b not None, Py_ssize_t nbytes=-1, int64_t timeout_ns=-1):
        """TCP: give the buffer's first nbytes (-1: all) to the connection; ownership passes, or it raises."""
        cdef uint32_t n
        b.pin()
        try:
            n = length_to_send(b, nbytes)
            self.send_seg(b, n, timeout_ns)
        except BaseException:
            b.unpin(False)
            raise
        b.unpin(True)
        return n

    def alloc_buffer(self, Py_ssize_t nbytes):
        """Memory of the stack to write into; what it holds at first is undefined."""
        cdef engine *e = self.e
        cdef rxseg *seg
        cdef Buffer b
        if not 0 <= nbytes <= ALLOC_MAX_BYTES:
            raise ValueError(f"alloc_buffer({nbytes}): 0 to {ALLOC_MAX_BYTES} bytes are possible")
        b = Buffer.__new__(Buffer)
        b.engine = self.engine
        b.e = e
        with nogil:
            engine_lock(e)
            seg = rxseg_lend(&e.bufs, NULL, <uint32_t>nbytes)
            engine_unlock(e)
        if seg == NULL:
            raise MemoryError(f"no memory for {nbytes} bytes")
        b.seg = seg
        b.writable = True
        return b

    cdef Buffer lend(self, rxseg *seg):
        cdef Buffer b = Buffer.__new__(Buffer)
        b.engine = self.engine
        b.e = self.e
        if self.kind == UL_IPPROTO_UDP:
            # Datagrams mostly come from the same peer: its tuple is kept.
            if self.src_tuple is None or seg.rport != self.src_port or not addr_equal(&seg.raddr, &self.src):
                self.src_tuple = (addr_to_text(&seg.raddr), seg.rport)
                self.src = seg.raddr
                self.src_port = seg.rport
            b.address = self.src_tuple
        b.seg = seg                        # last: what raises above leaves it with the caller
        return b

    def recv_buffer(self, size_t max_bytes, int64_t timeout_ns=-1):
        """Up to max_bytes (TCP) or one datagram (UDP) as a Buffer; empty at end of file."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef rxseg *seg
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
        return self.lend_all(seg)[0]

    def recv_buffers(self, uint32_t count, int64_t timeout_ns=-1):
        """Up to count datagrams (UDP) or pieces of the stream (TCP), waiting for the first only; [] at end of file."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        cdef rxseg *seg
        cdef Buffer b
        cdef int err = 0
        cdef int64_t deadline = deadline_of(timeout_ns)
        while True:
            with nogil:
                seg = user_recv_segs(e, s, PIECE_MAX_BYTES, count, deadline, &err)
            if seg != NULL or err != -EINTR:
                break
            PyErr_CheckSignals()
        if seg != NULL:
            return self.lend_all(seg)
        if err < -ERRNO_MAX:
            b = self.recv_buffer(CHUNK_BYTES, timeout_ns)
            return [b] if b.e != NULL else []
        if err < 0:
            raise_timed(err, timeout_ns)
        return []

    cdef list lend_all(self, rxseg *seg):
        """A chain of segments as buffers."""
        cdef rxseg *following
        cdef list out = []
        try:
            while seg != NULL:
                following = seg.next
                b = self.lend(seg)
                seg = following            # b has it
                out.append(b)
        except BaseException:
            self.give_back(seg)
            raise
        return out

    cdef void give_back(self, rxseg *seg) noexcept:
        """A chain of segments that no Buffer could be made for."""
        cdef engine *e = self.e
        cdef rxseg *following
        with nogil:
            engine_lock(e)
            while seg != NULL:
                following = seg.next
                rxseg_free(&e.bufs, seg)
                seg = following
            engine_unlock(e)

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
        return self.numbered_as(True)

    def number(self):
        """The number that fileno() gives, as a name only: until fileno() is called the descriptor says nothing."""
        return self.numbered_as(False)

    cdef int numbered_as(self, bint steered) except? -1:
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
                if s.fd != NULL and not self.nonblocking:
                    readyfd_blocking(s.fd, True)
            elif s.fd != NULL and s.fd.quiet and steered:
                err = readyfd_steer(s.fd)
                shows = err == 0
            if shows:
                e.watched += 1
                engine_tick(e)
                engine_poll(e, BURST)      # what has come by now is shown at once
                readyfd_show(s.fd, session_shown(s))
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

    def set_nonblocking(self, bint nonblocking):
        """Let O_NONBLOCK of the descriptor say so."""
        cdef engine *e = self.e
        cdef ul_session *s = self.s
        if self.nonblocking == nonblocking:
            return
        self.nonblocking = nonblocking
        if s.fd != NULL:
            with nogil:
                engine_lock(e)
                if s.fd != NULL:
                    readyfd_blocking(s.fd, not nonblocking)
                engine_unlock(e)

    @property
    def descriptor(self):
        """What fileno() gave; -1 if it was not called yet."""
        cdef ul_session *s = self.s
        return -1 if s.closing or s.fd == NULL else s.fd.user_fd

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
            rc = option_get(e, s, level, name, &value)
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
