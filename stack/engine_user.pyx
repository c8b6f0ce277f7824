"""A user's calls on a session: lock, act, settle, wait where it must, unlock. No GIL.

Data is looked for before anything is waited for, so a call that finds what it wants makes no system call.
"""

from libc.errno cimport EAGAIN, EBADF, EDESTADDRREQ, EINTR, EISCONN, EMSGSIZE, ENOTCONN, EOPNOTSUPP, EPIPE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t

from ulnet.stack.engine_core cimport (
    PHASE_CONNECTING, ROLE_ENDED, ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_STAYED, ROLE_TCP, ROLE_UDP, USER_SHARED,
    USER_STAYED, engine, engine_poll, engine_tick, engine_settle, session_ready, session_ref, session_touch, session_unref, ul_session,
)
from ulnet.stack.engine_output cimport emit_udp
from ulnet.stack.engine_wait cimport engine_left, engine_lock, engine_unlock, engine_wait
from ulnet.stack.tcp cimport tcp_read, tcp_read_seg, tcp_shutdown, tcp_wants_output, tcp_write, tcp_write_hold
from ulnet.stack.types cimport UL_IPPROTO_UDP, UL_READABLE, UL_WRITABLE, addr_is_zero
from ulnet.stack.udp cimport udp_read, udp_read_seg, udp_so_error

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLOUT

cdef enum:
    BURST = 64
    HOLD_FROM_BYTES = 16384      # below it a copy is cheaper than two trips to the GIL

cdef int64_t NEIGHBOUR_NS = 5000000000   # a datagram waits so long for its first hop's address
cdef int64_t TICK_NS = 1000000


cdef void enter(engine *e, ul_session *s) noexcept nogil:
    engine_lock(e)
    session_ref(s)
    engine_tick(e)


cdef void leave(engine *e, ul_session *s) noexcept nogil:
    if e.touched != NULL:
        engine_settle(e)
    engine_left(e)
    session_unref(e, s)
    engine_unlock(e)


cdef int dead_answer(ul_session *s, bint reading) noexcept nogil:
    """What a call finds on a session that has no protocol state."""
    cdef int error
    if s.closing:
        return -EBADF
    if s.role == ROLE_SHARED:
        return -USER_SHARED
    if s.role == ROLE_STAYED:
        return -USER_STAYED
    if s.role == ROLE_ENDED:
        error = s.so_error
        if s.flow.proto == UL_IPPROTO_UDP and error:
            return error                   # each time: a datagram socket has no end of file to go on with
        s.so_error = 0
        if error:
            return error
        return 0 if reading else -EPIPE
    if s.role == ROLE_SHELL and s.phase == PHASE_CONNECTING:
        return -EAGAIN                     # as Linux: who waits for data waits for the connection, too
    return -ENOTCONN


cdef int pause_for(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, bint *looked) noexcept nogil:
    """Nothing there yet: 0 look again, else the answer. Who does not wait at least looks at the link once."""
    if deadline_ns == 0:
        if looked[0]:
            return -EAGAIN
        looked[0] = True
        engine_poll(e, BURST)
        return 0
    return engine_wait(e, s, want, deadline_ns)


cdef Py_ssize_t user_recv(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                          size_t *done) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    cdef bint peek = (flags & USER_PEEK) != 0
    cdef uint32_t full
    enter(e, s)
    while True:
        if s.role == ROLE_TCP:
            got = tcp_read(&e.env, s.tcp, out + done[0], n - done[0], peek)
        elif s.role == ROLE_UDP:
            full = 0
            got = 0 if s.shut_rd and not s.udp.rcv.count else udp_read(&e.bufs, s.udp, out, n, peek, NULL, NULL, &full)
            if got >= 0:
                if flags & USER_TRUNC:
                    got = full
                done[0] = 0
                session_touch(e, s)
                break
        else:
            got = dead_answer(s, True)
        if got > 0:
            if tcp_wants_output(s.tcp) or s.fd != NULL or s.polls != NULL:
                session_touch(e, s)
            if peek:
                break
            done[0] += got
            if not flags & USER_WAITALL or done[0] == n:
                break
            continue
        if got != -EAGAIN:
            break
        got = pause_for(e, s, UL_READABLE, deadline_ns, &looked)
        if got < 0:
            break
    leave(e, s)
    if got == -EINTR or got == -USER_SHARED:
        return got                         # it goes on from *done
    if done[0] and not peek:
        return done[0]                     # what came before an error is delivered first
    return got


cdef Py_ssize_t user_recvfrom(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                              ul_addr *src, uint16_t *sport, uint32_t *full_bytes) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    enter(e, s)
    while True:
        if s.role == ROLE_UDP:
            if s.shut_rd and not s.udp.rcv.count:
                full_bytes[0] = 0
                got = 0
            else:
                got = udp_read(&e.bufs, s.udp, out, n, (flags & USER_PEEK) != 0, src, sport, full_bytes)
            if got >= 0 and (s.fd != NULL or s.polls != NULL):
                session_touch(e, s)
        else:
            got = dead_answer(s, True)
            full_bytes[0] = 0
        if got != -EAGAIN:
            break
        got = pause_for(e, s, UL_READABLE, deadline_ns, &looked)
        if got < 0:
            break
    leave(e, s)
    return got


cdef rxseg *user_recv_seg(engine *e, ul_session *s, size_t max_bytes, int64_t deadline_ns, int *err) noexcept nogil:
    cdef rxseg *seg = NULL
    cdef bint looked = False
    cdef int rc
    enter(e, s)
    while True:
        rc = 0
        if s.role == ROLE_TCP:
            seg = tcp_read_seg(&e.env, s.tcp, max_bytes, &rc)
        elif s.role == ROLE_UDP:
            seg = udp_read_seg(&e.bufs, s.udp)
            if seg == NULL and not s.shut_rd:
                rc = udp_so_error(s.udp, True)
                if rc == 0:
                    rc = -EAGAIN
        else:
            rc = dead_answer(s, True)
        if seg != NULL:
            session_touch(e, s)
            break
        if rc != -EAGAIN:
            break
        rc = pause_for(e, s, UL_READABLE, deadline_ns, &looked)
        if rc < 0:
            break
    err[0] = rc
    leave(e, s)
    return seg


cdef Py_ssize_t write_held(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner) noexcept with gil:
    return tcp_write_hold(&e.env, s.tcp, data, n, <object>owner)


cdef Py_ssize_t user_send(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner, bint all,
                          int64_t deadline_ns, size_t *done) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    enter(e, s)
    while True:
        if s.role == ROLE_TCP:
            if n == 0:
                got = 0
            elif owner != NULL and n - done[0] >= HOLD_FROM_BYTES:
                got = write_held(e, s, data + done[0], n - done[0], owner)
            else:
                got = tcp_write(&e.env, s.tcp, data + done[0], n - done[0])
        else:
            got = dead_answer(s, False)
        if got >= 0:
            done[0] += got
            session_touch(e, s)
            engine_settle(e)
            if not all or done[0] == n:
                got = done[0]
                break
            looked = False
            continue
        if got != -EAGAIN:
            break
        got = pause_for(e, s, UL_WRITABLE, deadline_ns, &looked)
        if got < 0:
            break
    leave(e, s)
    return got


cdef Py_ssize_t user_sendto(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                            int64_t deadline_ns) noexcept nogil:
    cdef int64_t give_up
    cdef int rc
    cdef pollfd p
    if n > 65507:
        return -EMSGSIZE
    enter(e, s)
    give_up = e.now_ns + NEIGHBOUR_NS
    while True:
        if s.role != ROLE_UDP:
            rc = dead_answer(s, False)
            break
        if s.udp.so_error:
            rc = udp_so_error(s.udp, True)
            break
        if dst == NULL:
            if addr_is_zero(&s.flow.raddr):
                rc = -EDESTADDRREQ
                break
            rc = emit_udp(e, s, &s.flow.raddr, s.flow.rport, data, <uint32_t>n)
        else:
            rc = emit_udp(e, s, dst, dport, data, <uint32_t>n)
        if rc != -EAGAIN:
            break
        if s.wait_neigh:
            s.wait_neigh = 0
            if e.library:
                rc = -USER_RESOLVE
                break
            if e.now_ns >= give_up:
                break
            # Even a socket that does not wait gives ARP its moment, as the kernel queues the packet.
            rc = engine_wait(e, s, 0, e.now_ns + TICK_NS)
            if rc == -EAGAIN or rc == 0:
                continue
            break
        if deadline_ns == 0 or (deadline_ns > 0 and e.now_ns >= deadline_ns):
            break
        engine_unlock(e)
        p.fd = e.link.fd
        p.events = POLLOUT
        p.revents = 0
        poll(&p, 1, 10)
        engine_lock(e)
        engine_tick(e)
    if s.stat != NULL:
        session_touch(e, s)
    leave(e, s)
    return <Py_ssize_t>n if rc == 0 else rc


cdef int user_wait(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, uint32_t *ready) noexcept nogil:
    cdef int rc
    enter(e, s)
    if s.role == ROLE_SHARED or s.role == ROLE_STAYED:
        rc = dead_answer(s, True)
    elif deadline_ns == 0:
        engine_poll(e, BURST)
        rc = 0
    else:
        rc = engine_wait(e, s, want, deadline_ns)
    ready[0] = session_ready(s)
    leave(e, s)
    return rc


cdef int user_shutdown(engine *e, ul_session *s, int how) noexcept nogil:
    cdef int rc = 0
    enter(e, s)
    if s.role == ROLE_TCP:
        rc = tcp_shutdown(&e.env, s.tcp, how)
    elif s.role == ROLE_UDP:
        if addr_is_zero(&s.flow.raddr):
            rc = -ENOTCONN
        elif how != 1:
            s.shut_rd = 1
    elif s.role == ROLE_LISTEN and how != 1:
        rc = 0                             # Linux ends the listening; the owner closes it
    else:
        rc = dead_answer(s, False)
        if rc == -EPIPE or rc == -EAGAIN:
            rc = -ENOTCONN
    session_touch(e, s)
    leave(e, s)
    return rc
