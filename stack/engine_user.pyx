"""A user's calls on a session: lock, act, settle, wait where it must, unlock. No GIL.

Data is looked for before anything is waited for, so a call that finds what it wants makes no system call.
"""

from libc.errno cimport EAGAIN, EBADF, EDESTADDRREQ, EINTR, EINVAL, EISCONN, EMSGSIZE, ENOTCONN, EOPNOTSUPP, EPIPE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from ulnet.kernelshim.fastpaths cimport fast_from_bytes
from ulnet.kernelshim.link cimport UL_LINK_CSUM, UL_LINK_USO
from ulnet.stack.engine_core cimport (
    PHASE_CONNECTING, ROLE_ENDED, ROLE_LISTEN, ROLE_SHARED, ROLE_SHELL, ROLE_STAYED, ROLE_TCP, ROLE_UDP, USER_SHARED,
    USER_STAYED, engine, engine_glance, engine_poll, engine_tick, engine_settle, session_end, session_ready, session_ref,
    session_touch, session_unref, ul_session,
)
from ulnet.stack.engine_output cimport emit_udp, emit_udp_train, udp_mtu
from ulnet.stack.engine_polls cimport polls_show
from ulnet.stack.engine_wait cimport engine_left, engine_lock, engine_trylock, engine_unlock, engine_wait
from ulnet.stack.stamps cimport STAMP_READY, STAMP_TRANSPORT_OUT, stamp
from ulnet.stack.tcp cimport (
    tcp_read, tcp_read_seg, tcp_shutdown, tcp_state, tcp_wants_output, tcp_write, tcp_write_hold, tcp_write_seg,
)
from ulnet.stack.tcp_cb cimport TCP_ESTABLISHED
from ulnet.stack.types cimport UL_IPPROTO_UDP, UL_READABLE, UL_WRITABLE, addr_equal, addr_is_zero, ul_addr
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
    IP_UDP_BYTES = 28            # headers of a datagram
    UDP_MAX_PAYLOAD = 65507
    TRAIN_MAX = 64               # Linux: UDP_MAX_SEGMENTS

cdef uint32_t hold_from_bytes = fast_from_bytes(HOLD_FROM_BYTES)

cdef int64_t NEIGHBOUR_NS = 5000000000   # a datagram waits so long for its first hop's address
cdef int64_t TICK_NS = 1000000


cdef inline uint32_t load_ipv4(const ul_addr *a) noexcept nogil:
    return (<const uint32_t *>a.b)[3]


cdef void enter(engine *e, ul_session *s) noexcept nogil:
    engine_lock(e)
    session_ref(s)
    engine_tick(e)


cdef void leave(engine *e, ul_session *s) noexcept nogil:
    if e.touched != NULL:
        engine_settle(e)
    engine_glance(e)
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
    if reading:
        return -ENOTCONN
    return -EDESTADDRREQ if s.flow.proto == UL_IPPROTO_UDP else -EPIPE


cdef int pause_for(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, bint *looked) noexcept nogil:
    """Nothing there yet: 0 look again, else the answer. Who does not wait at least looks at the link once."""
    cdef int rc
    if deadline_ns == 0:
        if looked[0]:
            return -EAGAIN
        looked[0] = True
        engine_poll(e, BURST)
        return 0
    rc = engine_wait(e, s, want, deadline_ns)
    stamp(STAMP_READY)
    return rc


cdef Py_ssize_t user_recv(engine *e, ul_session *s, uint8_t *out, size_t n, int flags, int64_t deadline_ns,
                          size_t *done) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    cdef bint peek = (flags & USER_PEEK) != 0
    cdef uint32_t full
    cdef size_t enough = n                     # socket(7), SO_RCVLOWAT; recv(2), MSG_WAITALL
    enter(e, s)
    if not flags & USER_WAITALL and s.rcvlowat_bytes < n:
        enough = s.rcvlowat_bytes if s.rcvlowat_bytes else 1
    while True:
        if s.closing:
            got = -EBADF                   # by another thread, a moment ago
        elif s.role == ROLE_TCP:
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
            if tcp_wants_output(s.tcp) or (s.fd != NULL and not s.fd.quiet):
                session_touch(e, s)
            elif not peek:
                # All that changes by it; the rest of a settle is left out.
                if s.stat != NULL:
                    s.stat.tcp.unread_bytes = s.tcp.rcv.len_bytes
                if s.polls != NULL:
                    polls_show(e, s, session_ready(s))
            if peek:
                break
            done[0] += got
            if done[0] >= enough:
                break
            continue
        if got != -EAGAIN:
            session_touch(e, s)            # the error was taken: the descriptor shows it no more
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
                              ul_addr *src, uint16_t *sport, uint32_t *full_bytes, user_meta *meta) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    enter(e, s)
    while True:
        if s.role == ROLE_UDP and not s.closing:
            if s.shut_rd and not s.udp.rcv.count:
                full_bytes[0] = 0
                got = 0
            else:
                if meta != NULL and s.udp.rcv.head != NULL:
                    meta.ttl = s.udp.rcv.head.ttl
                    meta.tos = s.udp.rcv.head.tos
                    meta.stamp_ns = s.udp.rcv.head.stamp_ns
                got = udp_read(&e.bufs, s.udp, out, n, (flags & USER_PEEK) != 0, src, sport, full_bytes)
            if got != -EAGAIN and (s.fd != NULL or s.polls != NULL):
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


cdef rxseg *take_seg(engine *e, ul_session *s, size_t max_bytes, int *rc) noexcept nogil:
    cdef rxseg *seg = NULL
    rc[0] = 0
    if s.role == ROLE_TCP and not s.closing:
        seg = tcp_read_seg(&e.env, s.tcp, max_bytes, rc)
    elif s.role == ROLE_UDP and not s.closing:
        seg = udp_read_seg(&e.bufs, s.udp)
        if seg == NULL and not s.shut_rd:
            rc[0] = udp_so_error(s.udp, True)
            if rc[0] == 0:
                rc[0] = -EAGAIN
    else:
        rc[0] = dead_answer(s, True)
    return seg


cdef inline uint32_t segs_waiting(const ul_session *s) noexcept nogil:
    if s.role == ROLE_TCP:
        return s.tcp.rcv.count
    return s.udp.rcv.count if s.role == ROLE_UDP else 0


cdef rxseg *user_recv_seg(engine *e, ul_session *s, size_t max_bytes, int64_t deadline_ns, int *err) noexcept nogil:
    return user_recv_segs(e, s, max_bytes, 1, deadline_ns, err)


cdef rxseg *user_recv_segs(engine *e, ul_session *s, size_t max_bytes, uint32_t count, int64_t deadline_ns,
                           int *err) noexcept nogil:
    cdef rxseg *first = NULL
    cdef rxseg *last
    cdef rxseg *seg
    cdef bint looked = False
    cdef int rc
    enter(e, s)
    while True:
        first = take_seg(e, s, max_bytes, &rc)
        if first != NULL:
            break
        if rc != -EAGAIN:
            session_touch(e, s)
            break
        rc = pause_for(e, s, UL_READABLE, deadline_ns, &looked)
        if rc < 0:
            break
    err[0] = rc
    if first != NULL:
        if segs_waiting(s) + 1 < count:
            engine_poll(e, BURST)          # what the link has already comes along: no system call
        last = first
        last.next = NULL
        while count > 1 and segs_waiting(s):
            seg = take_seg(e, s, max_bytes, &rc)
            if seg == NULL:
                break                      # no memory: what is there already is delivered first
            last.next = seg
            last = seg
            last.next = NULL
            count -= 1
        session_touch(e, s)
    leave(e, s)
    return first


cdef Py_ssize_t write_held(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner) noexcept with gil:
    return tcp_write_hold(&e.env, s.tcp, data, n, <object>owner)


cdef Py_ssize_t user_send(engine *e, ul_session *s, const uint8_t *data, size_t n, void *owner, bint all,
                          int64_t deadline_ns, size_t *done) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    enter(e, s)
    stamp(STAMP_TRANSPORT_OUT)
    while True:
        if s.role == ROLE_TCP and not s.closing:
            if n == 0:
                # tcp(7): nothing to wait for room for, but not into a closed or unmade connection
                got = tcp_write(&e.env, s.tcp, data, 0)
                if got == -EAGAIN and tcp_state(s.tcp) >= TCP_ESTABLISHED:
                    got = 0
            elif owner != NULL and n - done[0] >= hold_from_bytes:
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
            session_touch(e, s)
            break
        got = pause_for(e, s, UL_WRITABLE, deadline_ns, &looked)
        if got < 0:
            break
    leave(e, s)
    return got


cdef Py_ssize_t user_send_seg(engine *e, ul_session *s, rxseg *seg, uint32_t n, int64_t deadline_ns) noexcept nogil:
    cdef Py_ssize_t got
    cdef bint looked = False
    enter(e, s)
    while True:
        if s.role == ROLE_TCP and not s.closing:
            got = tcp_write_seg(&e.env, s.tcp, seg, n)
        else:
            got = dead_answer(s, False)
        if got != -EAGAIN:
            break
        got = pause_for(e, s, UL_WRITABLE, deadline_ns, &looked)
        if got < 0:
            break
    session_touch(e, s)
    leave(e, s)
    return got


cdef Py_ssize_t user_sendto(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t dport,
                            const user_meta *meta, int64_t deadline_ns) noexcept nogil:
    cdef user_dgram item
    cdef uint32_t done = 0
    cdef int rc
    item.data = data
    item.len_bytes = n
    item.named = dst != NULL
    item.meta = meta
    if dst != NULL:
        item.dst = dst[0]
        item.dport = dport
    rc = user_send_dgrams(e, s, &item, 1, deadline_ns, &done)
    return <Py_ssize_t>n if rc == 0 else rc


cdef inline const ul_addr *dgram_to(const ul_session *s, const user_dgram *d, uint16_t *port) noexcept nogil:
    port[0] = d.dport if d.named else s.flow.rport
    if d.named and load_ipv4(&d.dst) == 0:
        return &s.flow.laddr               # ip(7): sent to any address is sent to this host
    return &d.dst if d.named else &s.flow.raddr


cdef int send_one(engine *e, ul_session *s, const user_dgram *d, const ul_addr *dst, uint16_t port) noexcept nogil:
    """What is asked for one datagram is the session's for so long; the lock is held."""
    cdef uint8_t ttl = s.ttl
    cdef uint8_t tos = s.tos
    cdef int rc
    if d.meta != NULL:
        if d.meta.ttl >= 0:
            s.ttl = <uint8_t>d.meta.ttl
        if d.meta.tos >= 0:
            s.tos = <uint8_t>d.meta.tos
    rc = emit_udp(e, s, dst, port, d.data, <uint32_t>d.len_bytes)
    s.ttl = ttl
    s.tos = tos
    return rc


cdef uint32_t train_length(engine *e, const ul_session *s, const user_dgram *items, uint32_t count) noexcept nogil:
    """How many of the first datagrams may leave as one train: of one size (the last may be shorter), to one place."""
    cdef size_t size = items.len_bytes
    cdef size_t total = size
    cdef uint32_t i = 1
    cdef uint16_t port, other
    cdef const ul_addr *dst
    if count < 2 or size == 0 or size + IP_UDP_BYTES > udp_mtu(e, s) or not e.link.features & UL_LINK_USO or \
            not e.link.features & UL_LINK_CSUM:
        return 1
    dst = dgram_to(s, items, &port)
    while i < count and i < TRAIN_MAX and items[i].len_bytes and items[i].len_bytes <= size:
        total += items[i].len_bytes
        if total > UDP_MAX_PAYLOAD or not addr_equal(dgram_to(s, items + i, &other), dst) or other != port:
            break
        i += 1
        if items[i - 1].len_bytes < size:
            break
    return i


cdef int send_train(engine *e, ul_session *s, const user_dgram *items, uint32_t count) noexcept nogil:
    # One flat copy: a frame takes 17 pieces, and for small datagrams a piece costs more than the copy.
    cdef size_t total = items.len_bytes * (count - 1) + items[count - 1].len_bytes
    cdef uint8_t *flat = <uint8_t *>malloc(total)
    cdef uint8_t *at = flat
    cdef const ul_addr *dst
    cdef uint16_t port
    cdef uint32_t i
    cdef int rc
    if flat == NULL:
        return -EOPNOTSUPP                 # one by one, then
    for i in range(count):
        memcpy(at, items[i].data, items[i].len_bytes)
        at += items[i].len_bytes
    dst = dgram_to(s, items, &port)
    rc = emit_udp_train(e, s, dst, port, flat, <uint32_t>total, <uint32_t>items.len_bytes, count)
    free(flat)
    return rc


cdef int user_send_dgrams(engine *e, ul_session *s, const user_dgram *items, uint32_t count, int64_t deadline_ns,
                          uint32_t *done) noexcept nogil:
    cdef int64_t give_up
    cdef const user_dgram *d
    cdef const ul_addr *dst
    cdef uint32_t run
    cdef uint32_t most = count
    cdef uint16_t port
    cdef int rc = 0
    cdef pollfd p
    enter(e, s)
    give_up = e.now_ns + NEIGHBOUR_NS
    while done[0] < count:
        d = items + done[0]
        if s.role != ROLE_UDP or s.closing:
            rc = dead_answer(s, False)
            break
        if s.udp.so_error:
            rc = udp_so_error(s.udp, True) if done[0] == 0 else s.udp.so_error
            break
        if d.len_bytes > UDP_MAX_PAYLOAD:
            rc = -EMSGSIZE
            break
        dst = dgram_to(s, d, &port)
        if not d.named and addr_is_zero(dst):
            rc = -EDESTADDRREQ
            break
        if d.named and port == 0:
            rc = -EINVAL
            break
        if s.shut_wr:
            rc = -EPIPE
            break
        run = train_length(e, s, d, count - done[0]) if most > 1 else 1
        if run > 1:
            rc = send_train(e, s, d, run)
            if rc == -EINVAL or rc == -EOPNOTSUPP:
                most = 1                   # Linux before 6.2 knows no trains
                continue
        else:
            rc = send_one(e, s, d, dst, port)
        if rc == 0:
            done[0] += run
            continue
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
    if s.stat != NULL or rc < 0:
        session_touch(e, s)
    leave(e, s)
    return rc


cdef bint user_send_at_once(engine *e, ul_session *s, const uint8_t *data, size_t n, bint all, size_t *done,
                            Py_ssize_t *rc) noexcept nogil:
    cdef Py_ssize_t got
    if n == 0 or n > USER_LITTLE_BYTES or not engine_trylock(e):
        return False
    if s.role != ROLE_TCP or s.closing:
        engine_unlock(e)
        return False
    session_ref(s)
    engine_tick(e)
    stamp(STAMP_TRANSPORT_OUT)
    got = tcp_write(&e.env, s.tcp, data, n)
    if got != -EAGAIN:
        session_touch(e, s)                # taken, or the error was
    leave(e, s)
    if got > 0:
        done[0] += got
    rc[0] = got
    return got != -EAGAIN and (got < 0 or not all or done[0] == n)


cdef bint user_sendto_at_once(engine *e, ul_session *s, const uint8_t *data, size_t n, const ul_addr *dst,
                              uint16_t dport, const user_meta *meta, Py_ssize_t *rc) noexcept nogil:
    cdef user_dgram item
    cdef const ul_addr *to
    cdef uint16_t port
    cdef int sent
    if n > USER_LITTLE_BYTES or not engine_trylock(e):
        return False
    item.data = data
    item.len_bytes = n
    item.named = dst != NULL
    item.meta = meta
    if dst != NULL:
        item.dst = dst[0]
        item.dport = dport
    to = dgram_to(s, &item, &port)
    if s.role != ROLE_UDP or s.closing or s.shut_wr or s.udp.so_error or port == 0 or addr_is_zero(to):
        engine_unlock(e)                   # nothing that is done every day
        return False
    session_ref(s)
    engine_tick(e)
    sent = send_one(e, s, &item, to, port)
    if s.stat != NULL or sent < 0:
        session_touch(e, s)
    leave(e, s)
    rc[0] = <Py_ssize_t>n if sent == 0 else sent
    return sent != -EAGAIN


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
        else:
            s.shut_rd |= how != 1
            s.shut_wr |= how != 0
    elif s.role == ROLE_LISTEN:
        if how != 1:
            s.shut_rd = 1                  # who waits in accept() is told
    elif s.role == ROLE_SHARED:
        rc = -USER_SHARED
    elif s.role == ROLE_STAYED:
        rc = -USER_STAYED
    else:
        rc = -EBADF if s.closing else -ENOTCONN
    session_touch(e, s)
    leave(e, s)
    return rc
