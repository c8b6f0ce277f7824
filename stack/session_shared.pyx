"""A session placed in the server, used by plain kernel calls on the user's end (U) of its descriptor pair.

Order of a call: ask the engine's ``on_shared`` (it may bring the session back: then the normal call is made), else try
the kernel call without waiting, with the session's own lock held and the role looked at under the engine's lock; wait
outside both, in ppoll(2). A transition takes the same locks, so no call finds in U what was meant for the other role:
truth bytes for data, or data for truth. What U says of an end is refined by ``on_shared_end``, which knows the errno.

A datagram on the pair is 18 bytes (address, port big-endian) and its payload.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport (
    EAGAIN, EBADF, ECONNRESET, EDESTADDRREQ, EINTR, EINVAL, EMSGSIZE, ENETDOWN, ENOMEM, ENOTCONN, EPIPE, errno,
)
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport timespec
from posix.unistd cimport write

from ulnet.kernelshim.link cimport iovec
from ulnet.stack.buf cimport rxseg, rxseg_free, rxseg_new
from ulnet.stack.engine_core cimport (
    ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_TCP, clock_now, engine, ul_session,
)
from ulnet.stack.engine_user cimport USER_PEEK, USER_TRUNC, USER_WAITALL
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock
from ulnet.stack.session cimport Session
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_IPPROTO_UDP, UL_RDHUP, UL_READABLE, UL_WRITABLE, addr_is_zero

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    #include <sys/eventfd.h>
    #include <sys/ioctl.h>
    #include <sys/socket.h>
    #include <linux/sockios.h>
    """
    enum: POLLIN
    enum: POLLOUT
    enum: POLLRDHUP
    enum: POLLHUP
    enum: POLLERR
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *fds, unsigned long n, const timespec *timeout, void *sigmask) nogil
    int poll(pollfd *fds, unsigned long n, int timeout_ms) nogil
    int eventfd(unsigned int initial, int flags) nogil
    int EFD_NONBLOCK
    int EFD_CLOEXEC
    int ioctl(int fd, unsigned long what, int *value) nogil
    unsigned long SIOCINQ
    unsigned long SIOCOUTQ
    enum: SHUT_WR
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: MSG_PEEK
    enum: MSG_TRUNC
    ctypedef unsigned int socklen_t
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    int c_shutdown "shutdown"(int fd, int how) nogil
    ssize_t c_send "send"(int fd, const void *buf, size_t n, int flags) nogil
    ssize_t c_recv "recv"(int fd, void *buf, size_t n, int flags) nogil
    ssize_t sendmsg(int fd, const msghdr *message, int flags) nogil
    ssize_t recvmsg(int fd, msghdr *message, int flags) nogil

cdef enum:
    HEAD_BYTES = 18
    DATAGRAM_MAX_BYTES = 65507
    PIECE_BYTES = 262144         # of one kernel call: the engine's lock is held meanwhile
    SEG_MAX_BYTES = 1 << 20
    LOOK_MS = 200                # without a descriptor to wake a waiter: it looks by itself


# ---------------------------------------------------------------- what U says

cdef inline bint usable(const ul_session *s) noexcept nogil:
    return s.role == ROLE_SHARED and s.fd != NULL and not s.closing


cdef uint32_t shared_ready(const ul_session *s) noexcept nogil:
    cdef pollfd p
    cdef uint32_t ready = 0
    if s.fd == NULL:
        return 0
    p.fd = s.fd.user_fd
    p.events = POLLIN | POLLOUT | POLLRDHUP
    p.revents = 0
    poll(&p, 1, 0)
    if p.revents & POLLIN or s.shut_rd:
        ready |= UL_READABLE
    if p.revents & POLLOUT and s.shared_as != ROLE_LISTEN:
        ready |= UL_WRITABLE
    if p.revents & POLLRDHUP:
        ready |= UL_RDHUP
    if p.revents & POLLHUP:
        ready |= UL_HUP
    if p.revents & POLLERR:
        ready |= UL_ERROR
    return ready


cdef void shared_queues(ul_session *s, int *unread, int *unsent) noexcept nogil:
    unread[0] = 0
    unsent[0] = 0
    if s.fd != NULL:
        ioctl(s.fd.user_fd, SIOCINQ, unread)
        ioctl(s.fd.user_fd, SIOCOUTQ, unsent)


cdef void shared_wake(ul_session *s) noexcept nogil:
    # Never read while waiters may be there, so that each of them sees it; shared_leave() does.
    cdef uint64_t one = 1
    if s.shared_wake >= 0:
        write(s.shared_wake, &one, 8)


# ---------------------------------------------------------------- one try of each call. Lock held, nothing waits.

cdef Py_ssize_t datagram_recv(int fd, shared_call *c) noexcept nogil:
    cdef uint8_t head[HEAD_BYTES]
    cdef iovec iov[2]
    cdef msghdr m
    cdef ssize_t got
    memset(&m, 0, sizeof(m))
    iov[0].iov_base = head
    iov[0].iov_len = HEAD_BYTES
    iov[1].iov_base = c.data
    iov[1].iov_len = c.n
    m.msg_iov = iov
    m.msg_iovlen = 2
    while True:
        got = recvmsg(fd, &m, MSG_DONTWAIT | MSG_TRUNC | (MSG_PEEK if c.flags & USER_PEEK else 0))
        if got <= 0:
            return -errno if got < 0 else 0
        if got >= HEAD_BYTES:
            break
        if c.flags & USER_PEEK:              # no datagram of ours: somebody wrote to the pair by hand
            c_recv(fd, head, HEAD_BYTES, MSG_DONTWAIT)
    memcpy(c.addr.b, head, 16)
    c.port = <uint16_t>((head[16] << 8) | head[17])
    c.full_bytes = <uint32_t>(got - HEAD_BYTES)
    c.done = c.full_bytes if c.full_bytes < c.n else c.n
    return 1


cdef Py_ssize_t datagram_send(ul_session *s, int fd, shared_call *c) noexcept nogil:
    cdef uint8_t head[HEAD_BYTES]
    cdef iovec iov[2]
    cdef msghdr m
    if c.n > DATAGRAM_MAX_BYTES:
        return -EMSGSIZE
    if not c.to:
        if addr_is_zero(&s.flow.raddr):
            return -EDESTADDRREQ
        c.addr = s.flow.raddr
        c.port = s.flow.rport
    memcpy(head, c.addr.b, 16)
    head[16] = <uint8_t>(c.port >> 8)
    head[17] = <uint8_t>(c.port & 0xFF)
    memset(&m, 0, sizeof(m))
    iov[0].iov_base = head
    iov[0].iov_len = HEAD_BYTES
    iov[1].iov_base = c.data
    iov[1].iov_len = c.n
    m.msg_iov = iov
    m.msg_iovlen = 2
    return <Py_ssize_t>c.n if sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 else -errno


cdef Py_ssize_t segment_recv(engine *e, ul_session *s, int fd, shared_call *c) noexcept nogil:
    """The same into a block of the stack's own memory. 1: c.seg is there; 0: end of file."""
    cdef uint8_t first[HEAD_BYTES]
    cdef int unread = 0
    cdef bint held
    cdef Py_ssize_t got
    cdef size_t most = c.n
    cdef rxseg *seg
    # How much is there? Nobody of this process takes it meanwhile; another process may: then it is less.
    got = c_recv(fd, first, HEAD_BYTES, MSG_DONTWAIT | MSG_PEEK | MSG_TRUNC)
    if got <= 0:
        return -errno if got < 0 else 0
    if s.flow.proto != UL_IPPROTO_UDP:
        ioctl(fd, SIOCINQ, &unread)
        got = unread if unread > got else got
        if <size_t>got > c.n:
            got = c.n
        if got > SEG_MAX_BYTES:
            got = SEG_MAX_BYTES
    seg = rxseg_new(&e.bufs, NULL, 0, 0, NULL, <uint32_t>got, &held)
    if seg == NULL:
        return -ENOMEM
    c.data = seg.data
    c.n = seg.cap_bytes
    if s.flow.proto == UL_IPPROTO_UDP:
        got = datagram_recv(fd, c)
        seg.raddr = c.addr
        seg.rport = c.port
        seg.len_bytes = <uint32_t>c.done
    else:
        got = c_recv(fd, seg.data, <size_t>got, MSG_DONTWAIT)
        got = -errno if got < 0 else got
        seg.len_bytes = <uint32_t>got if got > 0 else 0
    if got <= 0:
        rxseg_free(&e.bufs, seg)
        c.n = most
        return got
    seg.cap_bytes = 0
    seg.lent = 1
    e.bufs.lent += 1
    c.seg = seg
    return 1


cdef Py_ssize_t shared_try(engine *e, ul_session *s, shared_call *c) noexcept nogil:
    cdef int fd
    cdef size_t n
    cdef ssize_t got
    if not usable(s):
        return -USER_MINE
    fd = s.fd.user_fd
    n = c.n - c.done
    if n > PIECE_BYTES:
        n = PIECE_BYTES
    if c.what == SHARED_RECV:
        got = c_recv(fd, c.data + c.done, n, MSG_DONTWAIT | (MSG_PEEK if c.flags & USER_PEEK else 0))
        got = -errno if got < 0 else got
    elif c.what == SHARED_SEND:
        if s.shared_shut_wr:
            return -EPIPE
        got = c_send(fd, c.data + c.done, n, MSG_DONTWAIT | MSG_NOSIGNAL)
        return -errno if got < 0 else got
    elif c.what == SHARED_RECVFROM:
        got = datagram_recv(fd, c)
    elif c.what == SHARED_RECV_SEG:
        got = segment_recv(e, s, fd, c)
    else:
        return datagram_send(s, fd, c)
    if got == -EAGAIN and s.shut_rd:
        return 0
    return got


cdef int pause_on(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns) noexcept nogil:
    """Until U is ready, or s is not what it was: 0; -EAGAIN at the deadline; -EINTR. Lock not held."""
    cdef pollfd fds[2]
    cdef timespec ts
    cdef int64_t left = -1
    cdef int rc
    if deadline_ns == 0:
        return -EAGAIN
    if deadline_ns > 0:
        left = deadline_ns - clock_now()
        if left <= 0:
            return -EAGAIN
    engine_lock(e)
    if not usable(s) or (e.stop and not e.broken):
        engine_unlock(e)
        return 0 if not usable(s) else -EBADF
    if s.shared_wake < 0:
        s.shared_wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    fds[0].fd = s.fd.user_fd
    fds[0].events = (POLLIN if want & UL_READABLE else 0) | (POLLOUT if want & UL_WRITABLE else 0) | (
        POLLRDHUP if want & UL_RDHUP else 0)
    fds[0].revents = 0
    fds[1].fd = s.shared_wake                # stays open as long as s does, which our caller holds
    fds[1].events = POLLIN
    fds[1].revents = 0
    engine_unlock(e)
    if fds[1].fd < 0 and (left < 0 or left > LOOK_MS * 1000000):
        left = LOOK_MS * 1000000
    ts.tv_sec = left // 1000000000
    ts.tv_nsec = left % 1000000000
    # Closed right here, the number may be another file's by now; but then the wake-up has been written.
    rc = ppoll(fds, 2, NULL if left < 0 else &ts, NULL)
    return -EINTR if rc < 0 and errno == EINTR else 0


# ---------------------------------------------------------------- calls

cdef bint shared_ours(Session session) except -1:
    """Is it ours (again)? Asked before each call on a shared session."""
    hook = session.engine.on_shared
    if hook is not None:
        hook(session)
    return session.s.role != ROLE_SHARED or session.s.closing


cdef Py_ssize_t one_try(Session session, shared_call *c) except? -1:
    cdef engine *e
    cdef ul_session *s
    cdef Py_ssize_t got
    with session.shared_lock:
        e = session.e                        # may have moved (rebind)
        s = session.s
        with nogil:
            engine_lock(e)
            got = shared_try(e, s, c)
            engine_unlock(e)
    return got


cdef Py_ssize_t ended(Session session, Py_ssize_t got) except? -1:
    """U is at its end: what does the session itself say?"""
    if not session.s.shared_shut_wr or got != -EPIPE:
        hook = session.engine.on_shared_end
        if hook is not None:
            hook(session)
    if session.s.role != ROLE_SHARED or session.s.closing:
        return -USER_MINE
    if session.kind == UL_IPPROTO_UDP and not (got == 0 and session.s.shut_rd):
        return -ENETDOWN                     # a datagram socket has no end: the server has gone
    return got


cdef Py_ssize_t shared_run(Session session, shared_call *c, int64_t deadline_ns) except? -1:
    cdef engine *e
    cdef ul_session *s
    cdef Py_ssize_t got
    cdef uint32_t want = UL_WRITABLE if c.what == SHARED_SEND or c.what == SHARED_SENDTO else UL_READABLE
    if shared_ours(session):
        return -USER_MINE
    if c.n == 0 and (c.what == SHARED_RECV or c.what == SHARED_SEND):
        return 0
    while True:
        got = one_try(session, c)
        if got > 0:
            if c.what == SHARED_SEND:
                c.done += got
                if c.all and c.done < c.n:
                    continue
                return c.done
            if c.what == SHARED_RECV:
                if c.flags & USER_PEEK:
                    return got
                c.done += got
                if c.flags & USER_WAITALL and c.done < c.n:
                    continue
                return c.done
            if c.what == SHARED_RECVFROM:
                return c.full_bytes if c.flags & USER_TRUNC else c.done
            return got
        if got == -EAGAIN:
            e = session.e
            s = session.s
            with nogil:
                got = pause_on(e, s, want, deadline_ns)
            if got == 0:
                continue
        if got == -EINTR:
            PyErr_CheckSignals()
            continue
        if got == -USER_MINE:
            return got
        if c.what == SHARED_RECV and c.done:
            return c.done                    # what came before an end is delivered first
        if c.what == SHARED_SENDTO and got == 0:
            return 0                         # an empty datagram went out
        if (got == 0 and want == UL_READABLE) or got == -EPIPE or got == -ECONNRESET:
            return ended(session, got)
        return got


cdef Py_ssize_t shared_recv(Session session, uint8_t *out, size_t n, int flags, int64_t deadline_ns, size_t *done) except? -1:
    cdef shared_call c
    cdef Py_ssize_t got
    memset(&c, 0, sizeof(c))
    c.what = SHARED_RECVFROM if session.kind == UL_IPPROTO_UDP else SHARED_RECV
    c.data = out
    c.n = n
    c.done = done[0]
    c.flags = flags
    got = shared_run(session, &c, deadline_ns)
    done[0] = c.done
    return got


cdef Py_ssize_t shared_recvfrom(Session session, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                                ul_addr *src, uint16_t *sport, uint32_t *full_bytes) except? -1:
    cdef shared_call c
    cdef Py_ssize_t got
    memset(&c, 0, sizeof(c))
    c.what = SHARED_RECVFROM
    c.data = out
    c.n = n
    c.flags = flags & ~USER_TRUNC        # the caller looks at full_bytes
    got = shared_run(session, &c, deadline_ns)
    src[0] = c.addr
    sport[0] = c.port
    full_bytes[0] = c.full_bytes
    return got


cdef Py_ssize_t shared_send(Session session, const uint8_t *data, size_t n, bint all, int64_t deadline_ns,
                            size_t *done) except? -1:
    cdef shared_call c
    cdef Py_ssize_t got
    memset(&c, 0, sizeof(c))
    c.what = SHARED_SEND
    c.data = <uint8_t *>data
    c.n = n
    c.all = all
    c.done = done[0]
    try:
        got = shared_run(session, &c, deadline_ns)
    finally:
        done[0] = c.done
    return got


cdef Py_ssize_t shared_sendto(Session session, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                              int64_t deadline_ns) except? -1:
    cdef shared_call c
    memset(&c, 0, sizeof(c))
    c.what = SHARED_SENDTO
    c.data = <uint8_t *>data
    c.n = n
    if dst != NULL:
        c.addr = dst[0]
        c.port = dport
        c.to = True
    return shared_run(session, &c, deadline_ns)


cdef int shared_recv_seg(Session session, size_t max_bytes, int64_t deadline_ns, rxseg **seg) except? -1:
    cdef shared_call c
    cdef Py_ssize_t got
    memset(&c, 0, sizeof(c))
    c.what = SHARED_RECV_SEG
    c.n = max_bytes
    got = shared_run(session, &c, deadline_ns)
    seg[0] = c.seg
    return <int>got if got < 0 else 0


cdef int shared_wait(Session session, uint32_t mask, int64_t deadline_ns) except? -1:
    cdef engine *e
    cdef ul_session *s
    cdef uint32_t ready
    cdef int rc
    if shared_ours(session):
        return -USER_MINE
    while True:
        e = session.e
        s = session.s
        with nogil:
            engine_lock(e)
            rc = 0 if usable(s) else -USER_MINE
            ready = shared_ready(s) if rc == 0 else 0
            engine_unlock(e)
        if rc < 0:
            return rc
        if ready & (mask | UL_ERROR | UL_HUP):
            return ready
        with nogil:
            rc = pause_on(e, s, mask, deadline_ns)
        if rc == -EINTR:
            PyErr_CheckSignals()
        elif rc < 0:
            return 0


cdef int shared_shutdown(Session session, int how) except? -1:
    """Writing is ended on U, for everybody who has it. Reading only for this process: the server goes on relaying."""
    cdef engine *e
    cdef ul_session *s
    cdef int rc = 0
    if shared_ours(session):
        return -USER_MINE
    with session.shared_lock:
        e = session.e
        s = session.s
        with nogil:
            engine_lock(e)
            if not usable(s):
                rc = -USER_MINE
            elif s.shared_as == ROLE_SHELL or (s.flow.proto == UL_IPPROTO_UDP and addr_is_zero(&s.flow.raddr)):
                rc = -ENOTCONN
            elif s.shared_as == ROLE_TCP and how != 0 and c_shutdown(s.fd.user_fd, SHUT_WR) < 0:
                rc = -errno
            else:
                if s.shared_as == ROLE_TCP and how != 0:
                    s.shared_shut_wr = 1
                if s.shared_as != ROLE_LISTEN and how != 1:
                    s.shut_rd = 1
                    shared_wake(s)
            engine_unlock(e)
    return rc


cdef object shared_announced(Session session):
    cdef shared_call c
    cdef uint8_t raw[8]
    cdef uint64_t number
    cdef Py_ssize_t got
    memset(&c, 0, sizeof(c))
    c.data = raw
    c.n = 8
    if session.s.role != ROLE_SHARED or session.s.shared_as != ROLE_LISTEN:
        return None
    # Numbers are written whole, and read whole by whoever is first.
    got = one_try(session, &c)
    if got == 0 or got == -ECONNRESET:
        if ended(session, got) != -USER_MINE:
            raise OSError(EINVAL, "the network server has ended this listener")
    if got != 8:
        return None
    memcpy(&number, raw, 8)
    return number
