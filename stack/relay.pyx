"""Relays: the pump between a session of this engine and the AF_UNIX descriptor its users read and write.

Read first: unix(7), epoll(7). Call order: ``Relay`` for each session; the engine notes each one that changed
(relay_queue, at the end of a burst), epoll each descriptor that did (edge-triggered, so that a full or empty one costs
nothing); ``Relays.run`` moves data: from the receive queue's memory into sendmsg(2), from recv(2) into a block of the
send queue. Each turn moves a bounded part of each session, in the order they asked: a bulk transfer starves nobody.

No lost wake-up: in_ready and out_ready are cleared only by an EAGAIN, behind which epoll has a new edge.

What a hang-up means: AF_UNIX says EPOLLHUP when the last copy of the other end is closed, and also when both
directions were shut. The second is an end, too: TCP has nothing more to ask the user then. ECONNRESET behind it says
that data was unread; with none of it and data still in the other end's queue, the end is open and was only shut.
"""

from libc.errno cimport EAGAIN, EINTR, EISCONN, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from ulnet.kernelshim.link cimport iovec
from ulnet.stack.buf cimport rxseg, rxseg_free, txchunk_free, txchunk_new, txq_append_chunk, txq_append_copy
from ulnet.stack.engine_core cimport (
    EVENT_RELAY, ROLE_TCP, ROLE_UDP, engine_poll, engine_settle, engine_tick,
    event_add, relay_queue, session_touch,
)
from ulnet.stack.engine_output cimport emit_udp
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock
from ulnet.stack.session cimport fail
from ulnet.stack.tcp cimport tcp_shutdown, tcp_took
from ulnet.stack.tcp_cb cimport TCP_CLOSE_WAIT, TCP_CLOSED, TCP_ESTABLISHED, TF_EOF, TF_OUTPUT, tcp_pcb
from ulnet.stack.types cimport addr_is_zero, ul_addr
from ulnet.stack.udp cimport udp_icmp, udp_read_seg

cdef extern from "<sys/socket.h>" nogil:
    enum: SOL_SOCKET
    enum: SO_SNDBUF
    enum: SO_SNDBUFFORCE
    enum: SO_RCVBUF
    enum: SO_RCVBUFFORCE
    enum: SO_ERROR
    enum: SHUT_WR
    enum: SHUT_RDWR
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
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
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
    int c_shutdown "shutdown"(int fd, int how)
    ssize_t c_recv "recv"(int fd, void *buf, size_t n, int flags)
    ssize_t c_send "send"(int fd, const void *buf, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLLRDHUP
    enum: EPOLLHUP
    enum: EPOLLERR
    enum: EPOLLET
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_DEL
    enum: EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int n, int timeout_ms)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd *fds, unsigned long n, int timeout_ms)
    enum: POLLHUP
    enum: POLLRDHUP

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/sockios.h>" nogil:
    enum: SIOCOUTQ

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

STREAM = RELAY_STREAM
DATAGRAMS = RELAY_DATAGRAMS
LISTENER = RELAY_LISTENER
NEWS_HUNG = TOLD_HUNG
NEWS_RESET = TOLD_RESET
NEWS_ENDED = TOLD_ENDED
NEWS_ROOM = TOLD_ROOM

cdef enum:
    TURN_BYTES = 512 << 10           # of one session and direction in one turn
    TURN_DATAGRAMS = 64
    PIECES = 16                      # segments in one sendmsg
    EVENTS = 64
    BUFFER_BYTES = 1 << 20           # of the descriptor, each way
    DRAIN_BYTES = 64 << 20           # more than a pair's buffers hold: somebody goes on writing
    COPY_BELOW_BYTES = 16384         # less would waste most of a block of 64 KiB
    ADDRESS_BYTES = 18               # before each datagram's payload
    DATAGRAM_BYTES = 65507
    SCRATCH_BYTES = ADDRESS_BYTES + DATAGRAM_BYTES + 1
    RETRY_MS = 1                     # the link was full
    BURST = 256

cdef int64_t TURNS_NS = 2000000      # then the loop shall hear its other callers

cdef enum:                           # what a pump says
    IDLE = 0                         # until an edge, or the session changes
    MORE = 1
    LATER = 2


cdef void tell(engine *e, relay *r, uint32_t news) noexcept nogil:
    if news & ~r.told or news & TOLD_ROOM:
        r.told |= news
        event_add(e, EVENT_RELAY, r.s, news)


cdef uint32_t polled(int fd) noexcept nogil:
    cdef pollfd p
    p.fd = fd
    p.events = POLLRDHUP
    p.revents = 0
    c_poll(&p, 1, 0)
    return <uint32_t>p.revents


cdef void hang_up(engine *e, relay *r, int error) noexcept nogil:
    """Nobody is behind the descriptor any more. ``error``: what recv said, 0 for nothing."""
    cdef socklen_t size = sizeof(int)
    cdef int unread = 0
    r.up_done = 1
    r.down_shut = 1
    if error == 0:
        getsockopt(r.fd, SOL_SOCKET, SO_ERROR, &error, &size)
    if error:
        tell(e, r, TOLD_HUNG | TOLD_RESET)
        return
    if r.kind == RELAY_STREAM and r.s.role == ROLE_TCP and r.s.tcp.rcv.len_bytes and \
            ioctl(r.fd, SIOCOUTQ, &unread) == 0 and unread:
        # Shut both ways, not closed: as with the kernel this is no reason for a reset.
        r.dropped += r.s.tcp.rcv.len_bytes
        tcp_took(&e.env, r.s.tcp, r.s.tcp.rcv.len_bytes)
    tell(e, r, TOLD_HUNG)


cdef void user_ended(engine *e, relay *r, int error) noexcept nogil:
    """recv found the end: a hang-up, or the user has shut this direction only."""
    r.in_ready = 0
    if error or polled(r.fd) & POLLHUP:
        hang_up(e, r, error)
        return
    r.up_done = 1
    if r.kind == RELAY_STREAM and r.s.role == ROLE_TCP:
        tcp_shutdown(&e.env, r.s.tcp, SHUT_WR)
        session_touch(e, r.s)


cdef bint refused(relay *r) noexcept nogil:
    """A send failed for good: True when all is over, which the other direction will find; else nobody reads."""
    if polled(r.fd) & POLLHUP:
        r.hup = 1
        r.in_ready = 1
        return True
    r.down_shut = 1
    return False


# ---------------------------------------------------------------- TCP

cdef int stream_down(engine *e, relay *r) noexcept nogil:
    """What the peer sent goes to the user, from where it lies."""
    cdef ul_session *s = r.s
    cdef iovec iov[PIECES]
    cdef msghdr msg
    cdef rxseg *seg
    cdef size_t n
    cdef size_t moved = 0
    cdef ssize_t got
    while s.role == ROLE_TCP and s.tcp.rcv.len_bytes:
        if r.down_shut:
            r.dropped += s.tcp.rcv.len_bytes
            tcp_took(&e.env, s.tcp, s.tcp.rcv.len_bytes)
            session_touch(e, s)
            break
        if not r.out_ready:
            return IDLE
        if moved >= TURN_BYTES:
            return MORE
        memset(&msg, 0, sizeof(msg))
        msg.msg_iov = iov
        n = 0
        seg = s.tcp.rcv.head
        while seg != NULL and msg.msg_iovlen < PIECES and n < TURN_BYTES:
            iov[msg.msg_iovlen].iov_base = seg.data
            iov[msg.msg_iovlen].iov_len = seg.len_bytes
            msg.msg_iovlen += 1
            n += seg.len_bytes
            seg = seg.next
        got = sendmsg(r.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
        if got < 0:
            if errno == EAGAIN:
                r.out_ready = 0
                r.down_blocked += 1
                return IDLE
            if errno == ENOBUFS or errno == ENOMEM:
                return LATER
            if errno != EINTR and refused(r):
                return IDLE
            continue
        tcp_took(&e.env, s.tcp, <size_t>got)
        session_touch(e, s)                # the window may have opened
        r.down_bytes += <uint64_t>got
        moved += <size_t>got
    if s.role == ROLE_TCP and not r.down_done and s.tcp.flags & TF_EOF and s.tcp.state != TCP_CLOSED:
        r.down_done = 1
        c_shutdown(r.fd, SHUT_WR)
        if r.up_done:
            r.hup = 1                      # both directions are over: no hang-up could say more
            r.in_ready = 1
    return IDLE


cdef bint session_takes(const tcp_pcb *pcb) noexcept nogil:
    return pcb.state == TCP_ESTABLISHED or pcb.state == TCP_CLOSE_WAIT


cdef ssize_t read_block(engine *e, relay *r, txchunk **spare, size_t n) noexcept nogil:
    """Up to n bytes of the user's into the send queue. As recv(2), errors negative."""
    cdef ssize_t got
    cdef tcp_pcb *pcb = r.s.tcp
    if spare[0] == NULL:
        spare[0] = txchunk_new(&e.bufs)
        if spare[0] == NULL:
            return -ENOMEM
    if n > spare[0].cap_bytes:
        n = spare[0].cap_bytes
    got = c_recv(r.fd, <void *>spare[0].data, n, MSG_DONTWAIT)
    if got <= 0:
        return got if got == 0 else -errno
    if not session_takes(pcb):
        r.dropped += <uint64_t>got         # our direction is shut: nobody will hear it
        return got
    if got < COPY_BELOW_BYTES:
        if txq_append_copy(&e.bufs, &pcb.snd, spare[0].data, <size_t>got) < 0:
            spare[0].len_bytes = <uint32_t>got
            txq_append_chunk(&pcb.snd, spare[0])     # wasteful, and not lost
            spare[0] = NULL
    else:
        spare[0].len_bytes = <uint32_t>got
        txq_append_chunk(&pcb.snd, spare[0])
        spare[0] = NULL
    r.up_bytes += <uint64_t>got
    pcb.flags |= TF_OUTPUT
    session_touch(e, r.s)
    return got


cdef int stream_up(engine *e, relay *r, txchunk **spare, bint whole) noexcept nogil:
    """What the user wrote goes into the session: as much as its send buffer takes, or the whole."""
    cdef ul_session *s = r.s
    cdef size_t moved = 0
    cdef size_t n
    cdef ssize_t got
    whole = whole or r.hup
    while s.role == ROLE_TCP and r.in_ready and not r.up_done:
        n = 65536
        if whole:
            if moved >= DRAIN_BYTES:
                return MORE
        elif moved >= TURN_BYTES:
            return MORE
        elif session_takes(s.tcp):
            if s.tcp.snd.len_bytes >= s.tcp.sndbuf_bytes or (
                    r.up_full and s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes < s.tcp.sndbuf_bytes // 4):
                if not r.up_full:
                    r.up_blocked += 1
                r.up_full = 1
                return IDLE                # acknowledgements make the engine call again
            r.up_full = 0
            if n > s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes:
                n = <size_t>(s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes)
        got = read_block(e, r, spare, n)
        if got > 0:
            moved += <size_t>got
        elif got == -EAGAIN:
            r.in_ready = 0
        elif got == -ENOMEM:
            return LATER
        elif got != -EINTR:
            user_ended(e, r, <int>-got)
    if r.hup and r.up_done and not r.told & TOLD_HUNG:
        hang_up(e, r, 0)
    return IDLE


cdef int stream_pump(engine *e, relay *r, txchunk **spare) noexcept nogil:
    cdef int down = stream_down(e, r)
    cdef int up = stream_up(e, r, spare, False)
    if r.s.role == ROLE_TCP and r.s.tcp.state == TCP_CLOSED and not r.s.tcp.rcv.len_bytes and \
            not r.told & (TOLD_HUNG | TOLD_ENDED):
        stream_forget(r)
        c_shutdown(r.fd, SHUT_RDWR)
        tell(e, r, TOLD_ENDED)
        return IDLE
    return down if down > up else up


cdef void stream_forget(relay *r) noexcept nogil:
    """Take what can never be sent off the descriptor: closed with it inside, the user would be told of a reset."""
    cdef ssize_t got = 1
    cdef size_t taken = 0
    cdef char small[4096]
    while got > 0 and taken < DRAIN_BYTES:
        got = c_recv(r.fd, small, sizeof(small), MSG_DONTWAIT)
        if got > 0:
            taken += <size_t>got
    r.dropped += taken
    r.up_done = 1


# ---------------------------------------------------------------- UDP

cdef int datagrams_down(engine *e, relay *r) noexcept nogil:
    cdef ul_session *s = r.s
    cdef uint8_t head[ADDRESS_BYTES]
    cdef iovec iov[2]
    cdef msghdr msg
    cdef rxseg *seg
    cdef int count = 0
    while s.role == ROLE_UDP and s.udp.rcv.count:
        seg = s.udp.rcv.head
        if r.down_shut:
            r.dropped += seg.len_bytes
            rxseg_free(&e.bufs, udp_read_seg(&e.bufs, s.udp))
            continue
        if not r.out_ready:
            return IDLE
        if count >= TURN_DATAGRAMS:
            return MORE
        count += 1
        memcpy(head, seg.raddr.b, 16)
        head[16] = <uint8_t>(seg.rport >> 8)
        head[17] = <uint8_t>(seg.rport & 0xFF)
        iov[0].iov_base = head
        iov[0].iov_len = ADDRESS_BYTES
        iov[1].iov_base = seg.data
        iov[1].iov_len = seg.len_bytes
        memset(&msg, 0, sizeof(msg))
        msg.msg_iov = iov
        msg.msg_iovlen = 2
        if sendmsg(r.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
            if errno == EAGAIN:
                r.out_ready = 0
                r.down_blocked += 1
                return IDLE
            if errno == EINTR:
                continue
            if errno == ENOBUFS or errno == ENOMEM:
                return LATER
            if errno != EMSGSIZE:
                if refused(r):
                    return IDLE
                continue
            r.dropped += seg.len_bytes
        else:
            r.down_datagrams += 1
            r.down_bytes += seg.len_bytes
        rxseg_free(&e.bufs, udp_read_seg(&e.bufs, s.udp))
    return IDLE


cdef int datagram_out(engine *e, relay *r, const uint8_t *message, uint32_t n) noexcept nogil:
    """Send one; it is held when it cannot go now. IDLE: done with it."""
    cdef ul_session *s = r.s
    cdef ul_addr dst
    cdef uint16_t port = <uint16_t>((message[16] << 8) | message[17])
    cdef int rc
    memcpy(dst.b, message, 16)
    if addr_is_zero(&dst):
        dst = s.flow.raddr
        port = s.flow.rport
    if addr_is_zero(&dst) or port == 0:
        r.malformed += 1
        return IDLE
    rc = emit_udp(e, s, &dst, port, message + ADDRESS_BYTES, n - ADDRESS_BYTES)
    if rc == -EAGAIN or rc == -ENOBUFS:
        if message != r.held:
            free(r.held)
            r.held = <uint8_t *>malloc(n)
            if r.held == NULL:
                r.dropped += n - ADDRESS_BYTES
                return IDLE
            memcpy(r.held, message, n)
            r.held_bytes = n
            r.up_blocked += 1
        # An unknown neighbour: the engine calls again when ARP has found it, or given up.
        return MORE if s.wait_neigh else LATER
    if rc < 0:
        udp_icmp(s.udp, rc)
        r.dropped += n - ADDRESS_BYTES
    else:
        r.up_datagrams += 1
        r.up_bytes += n - ADDRESS_BYTES
    return IDLE


cdef int datagrams_up(engine *e, relay *r, uint8_t *scratch, bint whole) noexcept nogil:
    cdef ul_session *s = r.s
    cdef ssize_t got
    cdef int count = 0
    cdef int rc
    whole = whole or r.hup
    while s.role == ROLE_UDP:
        if r.held != NULL:
            rc = datagram_out(e, r, r.held, r.held_bytes)
            if rc != IDLE and not whole:
                return IDLE if rc == MORE else LATER
            if rc != IDLE:
                r.dropped += r.held_bytes - ADDRESS_BYTES    # who has gone, or takes it home, does not wait for ARP
            free(r.held)
            r.held = NULL
        if not r.in_ready or r.up_done:
            break
        if count >= TURN_DATAGRAMS and not whole or count >= 65536:
            return MORE
        count += 1
        got = c_recv(r.fd, scratch, SCRATCH_BYTES, MSG_DONTWAIT | MSG_TRUNC)
        if got > 0:
            if got < ADDRESS_BYTES:
                r.malformed += 1
            elif got > ADDRESS_BYTES + DATAGRAM_BYTES:
                r.dropped += <uint64_t>got
                udp_icmp(s.udp, -EMSGSIZE)
            else:
                datagram_out(e, r, scratch, <uint32_t>got)
        elif got < 0 and errno == EAGAIN:
            r.in_ready = 0
        elif got < 0 and errno != EINTR:
            user_ended(e, r, errno)
        elif got == 0:
            # An empty message looks like the end.
            if polled(r.fd) & (POLLRDHUP | POLLHUP):
                user_ended(e, r, 0)
            else:
                r.malformed += 1
    if s.stat != NULL and count:
        session_touch(e, s)
    if r.hup and r.up_done and not r.told & TOLD_HUNG:
        hang_up(e, r, 0)
    return IDLE


cdef int datagrams_pump(engine *e, relay *r, uint8_t *scratch) noexcept nogil:
    cdef int down = datagrams_down(e, r)
    cdef int up = datagrams_up(e, r, scratch, False)
    return down if down > up else up


# ---------------------------------------------------------------- listeners

cdef int listener_pump(engine *e, relay *r) noexcept nogil:
    """Nobody has anything to say on a listener; what is written there is dropped, its end is news."""
    cdef char junk[4096]
    cdef ssize_t got
    cdef int turns = 0
    while r.in_ready and not r.up_done:
        if turns >= TURN_DATAGRAMS:
            return MORE
        turns += 1
        got = c_recv(r.fd, junk, sizeof(junk), MSG_DONTWAIT)
        if got > 0:
            r.malformed += 1
        elif got < 0 and errno == EAGAIN:
            r.in_ready = 0
        elif got == 0 or errno != EINTR:
            user_ended(e, r, errno if got < 0 else 0)
    if r.hup and r.up_done and not r.told & TOLD_HUNG:
        hang_up(e, r, 0)
    if r.want_room and r.out_ready:
        r.want_room = 0
        tell(e, r, TOLD_ROOM)
    return IDLE


# ---------------------------------------------------------------- all of them

cdef int pump(Relays set, relay *r) noexcept nogil:
    if r.told & (TOLD_HUNG | TOLD_ENDED):
        return IDLE
    if r.kind == RELAY_STREAM:
        return stream_pump(set.e, r, &set.spare)
    if r.kind == RELAY_DATAGRAMS:
        return datagrams_pump(set.e, r, set.scratch)
    return listener_pump(set.e, r)


cdef void note(Relays set) noexcept nogil:
    """What epoll says of the descriptors."""
    cdef epoll_event events[EVENTS]
    cdef relay *r
    cdef uint32_t bits
    cdef int i
    cdef int n = epoll_wait(set.epoll_fd, events, EVENTS, 0)
    for i in range(n):
        r = <relay *>events[i].data.ptr
        bits = events[i].events
        if bits & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            r.in_ready = 1
        if bits & (EPOLLOUT | EPOLLHUP | EPOLLERR):
            r.out_ready = 1
        if bits & EPOLLHUP:
            r.hup = 1
        relay_queue(set.e, r.s)


cdef int turn(Relays set) noexcept nogil:
    """One look at every relay that asks. What is left: IDLE, MORE, or LATER (and nothing that could be done now)."""
    cdef engine *e = set.e
    cdef ul_session *s
    cdef ul_session *last
    cdef int what
    cdef int left = IDLE
    note(set)
    last = e.relay_tail
    while e.relay_head != NULL:
        s = e.relay_head
        e.relay_head = s.relay_next
        if e.relay_head == NULL:
            e.relay_tail = NULL
        s.relay_next = NULL
        s.relay_queued = 0
        if s.relay != NULL:
            what = pump(set, <relay *>s.relay)
            if what != IDLE:
                relay_queue(e, s)
                if left != MORE:
                    left = what
        if s == last:                      # who asked meanwhile has the next turn
            break
    if e.touched != NULL:
        last = e.relay_tail
        engine_settle(e)
        if e.relay_tail != last:
            left = MORE                    # it let frames in
    return left


cdef void grow(int fd, int forced, int polite) noexcept nogil:
    cdef int size = BUFFER_BYTES
    if setsockopt(fd, SOL_SOCKET, forced, &size, sizeof(size)) < 0:      # needs CAP_NET_ADMIN
        setsockopt(fd, SOL_SOCKET, polite, &size, sizeof(size))


cdef void unqueue(engine *e, ul_session *s) noexcept nogil:
    cdef ul_session *at = e.relay_head
    cdef ul_session *before = NULL
    if not s.relay_queued:
        return
    while at != s:
        before = at
        at = at.relay_next
    if before != NULL:
        before.relay_next = s.relay_next
    else:
        e.relay_head = s.relay_next
    if e.relay_tail == s:
        e.relay_tail = before
    s.relay_next = NULL
    s.relay_queued = 0


cdef class Relays:
    """All relays of one engine, with one descriptor for the loop that runs them."""

    def __cinit__(self, Engine engine not None):
        self.engine = engine
        self.e = engine.e
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.scratch = <uint8_t *>malloc(SCRATCH_BYTES)
        if self.epoll_fd < 0 or self.scratch == NULL:
            raise OSError(errno, "no descriptor or memory for relays")

    def __dealloc__(self):
        self.close()
        free(self.scratch)

    def fileno(self):
        return self.epoll_fd

    def run(self):
        cdef engine *e = self.e
        cdef int64_t until
        cdef int left
        with nogil:
            engine_lock(e)
            engine_tick(e)
            until = e.now_ns + TURNS_NS
            while True:
                left = turn(self)
                if left != MORE:
                    break
                engine_poll(e, BURST)
                if e.now_ns >= until:
                    break
            engine_unlock(e)
        if e.attention or e.bufs.dead != NULL:
            self.engine.attend()
        return -1 if left == IDLE else 0 if left == MORE else RETRY_MS

    @property
    def pending(self):
        return self.e.relay_head != NULL

    def close(self):
        if self.epoll_fd < 0:
            return
        c_close(self.epoll_fd)
        self.epoll_fd = -1
        with nogil:
            engine_lock(self.e)
            if self.spare != NULL:
                txchunk_free(&self.e.bufs, self.spare)
                self.spare = NULL
            engine_unlock(self.e)


cdef class Relay:
    """One session and the manager's end of its pair, which belongs to the relay from now on."""

    def __cinit__(self, Relays relays not None, Session session not None, int fd, int kind=RELAY_STREAM):
        cdef epoll_event ev
        cdef engine *e = relays.e
        cdef relay *r
        cdef int rc = 0
        if not RELAY_STREAM <= kind <= RELAY_LISTENER:
            raise ValueError(f"relay kind {kind}: STREAM (1), DATAGRAMS (2) or LISTENER (3) is meant")
        if session.s.relay != NULL:
            fail(-EISCONN)
        r = <relay *>calloc(1, sizeof(relay))
        if r == NULL:
            raise MemoryError("no memory for a relay")
        r.s = session.s
        r.fd = fd
        r.kind = <uint8_t>kind
        r.in_ready = 1
        r.out_ready = 1
        grow(fd, SO_SNDBUFFORCE, SO_SNDBUF)
        grow(fd, SO_RCVBUFFORCE, SO_RCVBUF)
        memset(&ev, 0, sizeof(ev))
        ev.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
        ev.data.ptr = r
        with nogil:
            engine_lock(e)
            if epoll_ctl(relays.epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0:
                rc = -errno
            else:
                r.s.relay = r
                relay_queue(e, r.s)
            engine_unlock(e)
        if rc < 0:
            free(r)
            fail(rc)
        self.relays = relays
        self.session = session
        self.r = r

    def __dealloc__(self):
        self.close()

    cdef relay *_open(self) except NULL:
        if self.r == NULL:
            raise ValueError("this relay has ended")
        return self.r

    @property
    def fd(self):
        return self.r.fd if self.r != NULL else -1

    @property
    def eof(self):
        return bool(self.r == NULL or self.r.down_done or self.r.told & (TOLD_HUNG | TOLD_ENDED))

    @property
    def news(self):
        return self._open().told

    def announce(self, uint64_t number):
        cdef relay *r = self._open()
        cdef uint8_t raw[8]
        cdef int occupied = 0
        cdef ssize_t got
        cdef int i
        for i in range(8):
            raw[i] = <uint8_t>(number >> (8 * i))
        if r.told & TOLD_HUNG:
            return False
        with nogil:
            engine_lock(self.relays.e)
            got = c_send(r.fd, raw, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
            if got == 8:
                r.down_datagrams += 1
                if r.unit == 0 and ioctl(r.fd, SIOCOUTQ, &occupied) == 0 and occupied > 0:
                    r.unit = <uint32_t>occupied
            elif got < 0 and errno != EAGAIN and errno != ENOBUFS and errno != ENOMEM:
                hang_up(self.relays.e, r, 0)           # the user shut it: it listens no more
            else:
                r.want_room = 1
                r.out_ready = 0
                r.down_blocked += 1
            engine_unlock(self.relays.e)
        return got == 8

    def unread(self):
        cdef relay *r = self._open()
        cdef int occupied = 0
        if r.unit == 0 or ioctl(r.fd, SIOCOUTQ, &occupied) < 0:
            return 0
        return (<uint32_t>occupied + r.unit - 1) // r.unit

    def drain(self):
        cdef relay *r = self._open()
        cdef engine *e = self.relays.e
        cdef Relays relays = self.relays
        with nogil:
            engine_lock(e)
            engine_tick(e)
            r.in_ready = 1
            if r.kind == RELAY_STREAM:
                stream_up(e, r, &relays.spare, True)
            elif r.kind == RELAY_DATAGRAMS:
                datagrams_up(e, r, relays.scratch, True)
            if e.touched != NULL:
                engine_settle(e)
            engine_unlock(e)

    def detach(self):
        cdef relay *r = self._open()
        cdef engine *e = self.relays.e
        cdef int fd = r.fd
        with nogil:
            engine_lock(e)
            unqueue(e, r.s)
            r.s.relay = NULL
            if self.relays.epoll_fd >= 0:
                # By hand: a copy of the descriptor elsewhere would keep it in the set.
                epoll_ctl(self.relays.epoll_fd, EPOLL_CTL_DEL, fd, NULL)
            engine_unlock(e)
        free(r.held)
        free(r)
        self.r = NULL
        return fd

    def close(self):
        if self.r != NULL:
            c_close(self.detach())

    def counters(self):
        cdef relay *r = self._open()
        return {
            "up_bytes": r.up_bytes,
            "down_bytes": r.down_bytes,
            "up_datagrams": r.up_datagrams,
            "down_datagrams": r.down_datagrams,
            "up_blocked": r.up_blocked,
            "down_blocked": r.down_blocked,
            "dropped": r.dropped,
            "malformed": r.malformed,
        }
