"""A session's two transitions: placed in the server, to be used by several processes, and home again.

``share_begin``: state and the manager's end of the descriptor pair leave, handle and user's end stay; threads that wait
wake up and go on on the user's end (session_shared). ``share_end`` is the way back. Both hold the session's own lock,
so that no kernel call is under way on the pair, and do the decisive step under the engine's.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, PyObject
from libc.errno cimport EAGAIN, EALREADY, EBADF, EINVAL, EISCONN, ENOMEM, ENOTCONN, EPROTOTYPE, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close, read

from ulnet.stack.engine_core cimport (
    PHASE_CONNECTING, PHASE_OPEN, ROLE_ENDED, ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_STAYED, ROLE_TCP, ROLE_UDP,
    USER_STAYED, engine, engine_settle, session_end, session_insert, session_ready, session_ref, session_touch,
    session_unref, ul_session,
)
from ulnet.stack.engine_handover cimport handover_export
from ulnet.stack.engine_polls cimport pollset_session_moved
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock, helper_wake, waiters_wake
from ulnet.stack.readyfd cimport (
    readyfd, readyfd_adopt, readyfd_free, readyfd_new, readyfd_regain, readyfd_show, readyfd_surrender,
)
from ulnet.stack.session cimport Session, fail
from ulnet.stack.session_shared cimport SHARED_RECV, SHARED_RECVFROM, shared_call, shared_try, shared_wake
from ulnet.stack.tcp cimport tcp_state
from ulnet.stack.tcp_cb cimport (
    TCP_CLOSING, TCP_FIN_WAIT_1, TCP_FIN_WAIT_2, TCP_LAST_ACK, TCP_SYN_RECEIVED, TCP_SYN_SENT, TCP_TIME_WAIT, TF_EOF,
)
from ulnet.stack.types cimport UL_HUP, UL_IPPROTO_UDP, UL_RDHUP

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    enum: SOL_SOCKET
    enum: SO_TYPE
    enum: SO_DOMAIN
    enum: AF_UNIX
    enum: SOCK_STREAM
    enum: SOCK_SEQPACKET
    enum: SHUT_WR
    int c_shutdown "shutdown"(int fd, int how)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)


cdef void moved(engine *e, ul_session *s) noexcept nogil:
    """Whoever watches s looks again, and finds it where it is now. Lock held; in both transitions."""
    waiters_wake(e, s, 0xFF)
    shared_wake(s)
    pollset_session_moved(e, s)


cdef int shared_leave(engine *e, ul_session *s, PyObject **out, int *u_fd, int *o_fd) noexcept nogil:
    """From our own engine into the server. Lock held. 0 or a negative errno: nothing happened."""
    cdef readyfd *fd
    cdef uint8_t role = s.role
    cdef bint shut_wr = False
    cdef bint fresh = False
    cdef bint made = False
    cdef bint quiet
    cdef uint64_t junk
    cdef int state
    cdef int rc = 0
    if s.closing:
        return -EBADF
    if role == ROLE_SHARED:
        return -EINVAL
    if role == ROLE_STAYED:
        return -USER_STAYED
    if role == ROLE_ENDED:
        return -ENOTCONN
    if s.phase == PHASE_CONNECTING:
        return -EALREADY
    if role == ROLE_LISTEN and s.accept_count:
        return -EAGAIN
    if role == ROLE_TCP:
        state = tcp_state(s.tcp)
        if state == TCP_SYN_SENT or state == TCP_SYN_RECEIVED:
            return -EALREADY
        shut_wr = state == TCP_FIN_WAIT_1 or state == TCP_FIN_WAIT_2 or state == TCP_CLOSING or \
            state == TCP_LAST_ACK or state == TCP_TIME_WAIT
    fd = s.fd
    if fd == NULL:
        fd = readyfd_new(s.flow.proto == UL_IPPROTO_UDP, &rc)
        if fd == NULL:
            return rc
        made = True
    elif fd.quiet:
        fresh = True                         # a number and nothing more until now
    elif fd.shown & (UL_RDHUP | UL_HUP) and role == ROLE_TCP:
        # Its other end is shut: harmless when nothing more has to pass through it.
        fresh = s.tcp.rcv.len_bytes != 0 or not s.tcp.flags & TF_EOF
    quiet = fd.quiet
    rc = readyfd_surrender(fd, fresh or (fd.shown & (UL_RDHUP | UL_HUP) and role != ROLE_TCP))
    if rc == 0 and (role == ROLE_TCP or role == ROLE_UDP):
        s.fd = NULL                          # or it would be closed with the handle, which stays
        rc = handover_export(e, s, out)
        s.fd = fd
        if rc == 0:
            s.closing = 0
        else:
            readyfd_regain(fd, fd.our_fd)
    elif rc == 0:
        s.fd = NULL
        session_ref(s)
        session_end(e, s, 0)
        session_unref(e, s)
        s.fd = fd
    if rc < 0:
        if made:
            s.fd = NULL
            readyfd_free(fd)
        else:
            if quiet and not fd.quiet:
                e.watched += 1               # it is steered by now
            readyfd_show(fd, session_ready(s))
        return rc
    if not made and not quiet:
        e.watched -= 1
    s.role = ROLE_SHARED
    s.phase = PHASE_OPEN
    s.shared_as = role
    s.shared_shut_wr = shut_wr
    if shut_wr:
        c_shutdown(fd.user_fd, SHUT_WR)      # the server will find it so
    u_fd[0] = fd.user_fd
    o_fd[0] = fd.our_fd
    fd.our_fd = -1
    moved(e, s)
    if s.shared_wake >= 0:
        read(s.shared_wake, &junk, 8)
    if e.touched != NULL:
        engine_settle(e)
    return 0


cdef tuple shared_begin(Session session):
    cdef engine *e
    cdef ul_session *s
    cdef PyObject *out = NULL
    cdef object state = None
    cdef int u_fd = -1
    cdef int o_fd = -1
    cdef int rc
    with session.shared_lock:
        e = session.e
        s = session.s
        with nogil:
            engine_lock(e)
            rc = shared_leave(e, s, &out, &u_fd, &o_fd)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        if e.bufs.dead != NULL:
            session.engine.reap()
        if out != NULL:
            state = <object>out
            Py_DECREF(state)                 # the reference that came with it
        return u_fd, o_fd, state


cdef bytes take_rest(engine *e, ul_session *s):
    """What U still holds, as import_session() wants it in front of what the state brings."""
    cdef list parts = []
    cdef shared_call c
    cdef bytes room
    cdef Py_ssize_t got
    cdef uint32_t length
    cdef bint datagrams = s.flow.proto == UL_IPPROTO_UDP
    while True:
        memset(&c, 0, sizeof(c))
        c.what = SHARED_RECVFROM if datagrams else SHARED_RECV
        c.n = 65536
        room = PyBytes_FromStringAndSize(NULL, c.n)
        c.data = <uint8_t *>PyBytes_AS_STRING(room)
        with nogil:
            engine_lock(e)
            got = shared_try(e, s, &c)
            engine_unlock(e)
        if got <= 0:
            break
        if datagrams:
            length = <uint32_t>c.done
            parts.append(PyBytes_FromStringAndSize(<char *>c.addr.b, 16) + c.port.to_bytes(2, "big")
                         + length.to_bytes(4, "little") + room[:length])
        else:
            parts.append(room[:got])
    return b"".join(parts)


cdef int come_home(engine *e, ul_session *s) noexcept nogil:
    """A listener or a shell: there is no state to import. Lock held."""
    cdef int rc = 0
    if s.closing or s.role != ROLE_SHARED:
        return -EBADF
    if s.shared_as == ROLE_LISTEN:
        rc = session_insert(e, s)
    if rc == 0:
        s.role = s.shared_as
    return rc


cdef void steer(engine *e, ul_session *s, int o_fd) noexcept nogil:
    """U shows readiness from now on. Lock held."""
    if s.fd == NULL or not s.fd.surrendered:
        close(o_fd)                          # closed, or shared again, by another thread
        return
    readyfd_regain(s.fd, o_fd)
    e.watched += 1
    readyfd_show(s.fd, session_ready(s))
    moved(e, s)
    session_touch(e, s)
    engine_settle(e)
    helper_wake(e)


cdef Py_ssize_t shared_end(Session session, int o_fd, object state, object number) except -1:
    cdef engine *e
    cdef ul_session *s
    cdef bytes rest
    cdef int rc = 0
    with session.shared_lock:
        e = session.e
        s = session.s
        if s.closing:
            fail(-EBADF)
        if s.role != ROLE_SHARED:
            raise OSError(EINVAL, "the session is not shared: there is nothing to end")
        rest = take_rest(e, s)
        if state is None:
            with nogil:
                engine_lock(e)
                rc = come_home(e, s)
                engine_unlock(e)
            if rc < 0:
                fail(rc)
            s.id = number
        else:
            session.engine.import_session(session, state, number, prefix=rest)
        with nogil:
            engine_lock(e)
            steer(e, s, o_fd)
            engine_unlock(e)
    return len(rest)


cdef int shared_adopt(Session session, int u_fd, bint listening, bint named) except -1:
    cdef engine *e = session.e
    cdef ul_session *s = session.s
    cdef int kind = 0
    cdef int domain = 0
    cdef socklen_t size = sizeof(kind)
    cdef bint datagram = s.flow.proto == UL_IPPROTO_UDP
    cdef int rc = 0
    if getsockopt(u_fd, SOL_SOCKET, SO_TYPE, &kind, &size) < 0 or \
            getsockopt(u_fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0:
        fail(-errno)
    if domain != AF_UNIX or kind != (SOCK_SEQPACKET if datagram else SOCK_STREAM):
        raise OSError(EPROTOTYPE, f"descriptor {u_fd} is no end of a descriptor pair of this kind of session")
    with nogil:
        engine_lock(e)
        if s.closing:
            rc = -EBADF
        elif s.role != ROLE_SHELL or s.fd != NULL or s.phase == PHASE_CONNECTING:
            rc = -EISCONN
        else:
            s.fd = readyfd_adopt(u_fd, datagram)
            if s.fd == NULL:
                rc = -ENOMEM
            else:
                s.role = ROLE_SHARED
                s.shared_as = ROLE_LISTEN if listening else ROLE_SHELL if named else ROLE_UDP if datagram else ROLE_TCP
        engine_unlock(e)
    if rc < 0:
        fail(rc)
    return 0
