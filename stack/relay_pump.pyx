"""The pumps of relays: what moves between one session and its descriptor, and what the ends of each mean.

Read first: unix(7), epoll(7). Data goes from the receive queue's memory into sendmsg(2), and from recv(2) into a block
of the send queue. No lost wake-up: in_ready and out_ready are cleared only by an EAGAIN, behind which epoll has a new
edge.

What a hang-up means: AF_UNIX says EPOLLHUP when the last copy of the other end is closed, and also when both
directions were shut. The second is an end, too: TCP has nothing more to ask the user then. ECONNRESET behind it says
that data was unread; with none of it and data still in the other end's queue, the end is open and was only shut.
"""

from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ulnet.kernelshim.fastpaths cimport fast_from_bytes
from ulnet.kernelshim.link cimport iovec
from ulnet.stack.buf cimport rxseg, rxseg_free, txchunk_new, txq_append_chunk, txq_append_copy
from ulnet.stack.engine_core cimport EVENT_RELAY, ROLE_TCP, ROLE_UDP, event_add, session_touch
from ulnet.stack.engine_output cimport emit_udp
from ulnet.stack.stamps cimport STAMP_RELAYED, STAMP_TRANSPORT_OUT, stamp
from ulnet.stack.tcp cimport tcp_shutdown, tcp_took
from ulnet.stack.tcp_cb cimport TCP_CLOSE_WAIT, TCP_CLOSED, TCP_ESTABLISHED, TF_EOF, TF_OUTPUT, tcp_pcb
from ulnet.stack.types cimport addr_is_zero, ul_addr
from ulnet.stack.udp cimport udp_icmp, udp_read_seg

cdef extern from "<sys/socket.h>" nogil:
    enum: SOL_SOCKET
    enum: SO_ERROR
    enum: SHUT_RD
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
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
    int c_shutdown "shutdown"(int fd, int how)
    ssize_t c_recv "recv"(int fd, void *buf, size_t n, int flags)
    ssize_t c_send "send"(int fd, const void *buf, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)

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

cdef enum:
    TURN_BYTES = 512 << 10           # of one session and direction in one turn
    TURN_DATAGRAMS = 64
    PIECES = 16                      # segments in one sendmsg
    DRAIN_BYTES = 64 << 20           # more than a pair's buffers hold: somebody goes on writing
    DRAIN_DATAGRAMS = 65536
    COPY_BELOW_BYTES = 16384         # less would waste most of a block of 64 KiB
    ADDRESS_BYTES = 18               # before each datagram's payload
    DATAGRAM_BYTES = 65507

cdef uint32_t copy_below_bytes = max(<uint32_t>COPY_BELOW_BYTES, fast_from_bytes(COPY_BELOW_BYTES))


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


cdef void relay_hang_up(engine *e, relay *r, int error) noexcept nogil:
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
        relay_hang_up(e, r, error)
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
            return RELAY_IDLE
        if moved >= TURN_BYTES:
            return RELAY_MORE
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
                return RELAY_IDLE
            if errno == ENOBUFS or errno == ENOMEM:
                return RELAY_LATER
            if errno != EINTR and refused(r):
                return RELAY_IDLE
            continue
        stamp(STAMP_RELAYED)
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
    return RELAY_IDLE


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
    stamp(STAMP_TRANSPORT_OUT)
    if not session_takes(pcb):
        r.dropped += <uint64_t>got         # our direction is shut: nobody will hear it
        return got
    if got < <ssize_t>copy_below_bytes:
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
                return RELAY_MORE
        elif moved >= TURN_BYTES:
            return RELAY_MORE
        elif session_takes(s.tcp):
            if s.tcp.snd.len_bytes >= s.tcp.sndbuf_bytes or (
                    r.up_full and s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes < s.tcp.sndbuf_bytes // 4):
                if not r.up_full:
                    r.up_blocked += 1
                r.up_full = 1
                return RELAY_IDLE                # acknowledgements make the engine call again
            r.up_full = 0
            if n > s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes:
                n = <size_t>(s.tcp.sndbuf_bytes - s.tcp.snd.len_bytes)
        got = read_block(e, r, spare, n)
        if got > 0:
            moved += <size_t>got
        elif got == -EAGAIN:
            r.in_ready = 0
        elif got == -ENOMEM:
            return RELAY_LATER
        elif got != -EINTR:
            user_ended(e, r, <int>-got)
    if r.hup and r.up_done and not r.told & TOLD_HUNG:
        relay_hang_up(e, r, 0)
    return RELAY_IDLE


cdef int stream_pump(engine *e, relay *r, txchunk **spare) noexcept nogil:
    cdef int down = stream_down(e, r)
    cdef int up = stream_up(e, r, spare, False)
    if r.s.role == ROLE_TCP and r.s.tcp.state == TCP_CLOSED and not r.s.tcp.rcv.len_bytes and \
            not r.told & (TOLD_HUNG | TOLD_ENDED):
        stream_forget(r)
        c_shutdown(r.fd, SHUT_RDWR)
        tell(e, r, TOLD_ENDED)
        return RELAY_IDLE
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
            return RELAY_IDLE
        if count >= TURN_DATAGRAMS:
            return RELAY_MORE
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
                return RELAY_IDLE
            if errno == EINTR:
                continue
            if errno == ENOBUFS or errno == ENOMEM:
                return RELAY_LATER
            if errno != EMSGSIZE:
                if refused(r):
                    return RELAY_IDLE
                continue
            r.dropped += seg.len_bytes
        else:
            stamp(STAMP_RELAYED)
            r.down_datagrams += 1
            r.down_bytes += seg.len_bytes
        rxseg_free(&e.bufs, udp_read_seg(&e.bufs, s.udp))
    return RELAY_IDLE


cdef int datagram_out(engine *e, relay *r, const uint8_t *message, uint32_t n) noexcept nogil:
    """Send one; it is held when it cannot go now. RELAY_IDLE: done with it."""
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
        return RELAY_IDLE
    rc = emit_udp(e, s, &dst, port, message + ADDRESS_BYTES, n - ADDRESS_BYTES)
    if rc == -EAGAIN or rc == -ENOBUFS:
        if message != r.held:
            free(r.held)
            r.held = <uint8_t *>malloc(n)
            if r.held == NULL:
                r.dropped += n - ADDRESS_BYTES
                return RELAY_IDLE
            memcpy(r.held, message, n)
            r.held_bytes = n
            r.up_blocked += 1
        # An unknown neighbour: the engine calls again when ARP has found it, or given up.
        return RELAY_MORE if s.wait_neigh else RELAY_LATER
    if rc < 0:
        udp_icmp(s.udp, rc)
        r.dropped += n - ADDRESS_BYTES
    else:
        r.up_datagrams += 1
        r.up_bytes += n - ADDRESS_BYTES
    return RELAY_IDLE


cdef int datagrams_up(engine *e, relay *r, uint8_t *scratch, bint whole) noexcept nogil:
    cdef ul_session *s = r.s
    cdef ssize_t got
    cdef int count = 0
    cdef int rc
    whole = whole or r.hup
    while s.role == ROLE_UDP:
        if r.held != NULL:
            rc = datagram_out(e, r, r.held, r.held_bytes)
            if rc != RELAY_IDLE and not whole:
                return RELAY_IDLE if rc == RELAY_MORE else RELAY_LATER
            if rc != RELAY_IDLE:
                r.dropped += r.held_bytes - ADDRESS_BYTES    # who has gone, or takes it home, does not wait for ARP
            free(r.held)
            r.held = NULL
        if not r.in_ready or r.up_done:
            break
        if count >= TURN_DATAGRAMS and not whole or count >= DRAIN_DATAGRAMS:
            return RELAY_MORE
        count += 1
        got = c_recv(r.fd, scratch, RELAY_SCRATCH_BYTES, MSG_DONTWAIT | MSG_TRUNC)
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
        elif got < 0 and errno == ECONNRESET:
            # Closed with data unread. Of a SOCK_SEQPACKET socket that comes before what is still to be read here.
            r.hup = 1
            whole = True
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
        relay_hang_up(e, r, 0)
    return RELAY_IDLE


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
            return RELAY_MORE
        turns += 1
        got = c_recv(r.fd, junk, sizeof(junk), MSG_DONTWAIT)
        if got > 0:
            r.malformed += 1
        elif got < 0 and errno == EAGAIN:
            r.in_ready = 0
        elif got == 0 or errno != EINTR:
            user_ended(e, r, errno if got < 0 else 0)
    if r.hup and r.up_done and not r.told & TOLD_HUNG:
        relay_hang_up(e, r, 0)
    if r.want_room and r.out_ready:
        r.want_room = 0
        tell(e, r, TOLD_ROOM)
    return RELAY_IDLE


# ---------------------------------------------------------------- all of them

cdef void relay_start(relay *r) noexcept nogil:
    cdef ul_session *s = r.s
    if r.kind != RELAY_STREAM or s.role != ROLE_TCP or session_takes(s.tcp) or s.tcp.state == TCP_CLOSED:
        return
    # Our direction was shut before: who writes is told so.
    c_shutdown(r.fd, SHUT_RD)
    r.up_done = 1


cdef int relay_pump(engine *e, relay *r, txchunk **spare, uint8_t *scratch) noexcept nogil:
    if r.told & (TOLD_HUNG | TOLD_ENDED):
        return RELAY_IDLE
    if r.kind == RELAY_STREAM:
        return stream_pump(e, r, spare)
    if r.kind == RELAY_DATAGRAMS:
        return datagrams_pump(e, r, scratch)
    return listener_pump(e, r)


cdef void relay_drain(engine *e, relay *r, txchunk **spare, uint8_t *scratch) noexcept nogil:
    r.in_ready = 1
    if r.kind == RELAY_STREAM:
        stream_up(e, r, spare, True)
    elif r.kind == RELAY_DATAGRAMS:
        datagrams_up(e, r, scratch, True)


cdef int relay_announce(engine *e, relay *r, uint64_t number) noexcept nogil:
    cdef uint8_t raw[8]
    cdef int occupied = 0
    cdef ssize_t got
    cdef int i
    if r.told & TOLD_HUNG:
        return False
    for i in range(8):
        raw[i] = <uint8_t>(number >> (8 * i))
    got = c_send(r.fd, raw, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
    if got == 8:
        r.down_datagrams += 1
        if r.unit == 0 and ioctl(r.fd, SIOCOUTQ, &occupied) == 0 and occupied > 0:
            r.unit = <uint32_t>occupied
        return True
    if got < 0 and errno != EAGAIN and errno != ENOBUFS and errno != ENOMEM:
        relay_hang_up(e, r, 0)             # the user shut it: it listens no more
    else:
        r.want_room = 1
        r.out_ready = 0
        r.down_blocked += 1
    return False


cdef uint32_t relay_unread(const relay *r) noexcept nogil:
    cdef int occupied = 0
    if r.unit == 0 or ioctl(r.fd, SIOCOUTQ, &occupied) < 0:
        return 0
    return (<uint32_t>occupied + r.unit - 1) // r.unit
