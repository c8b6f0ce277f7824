"""Relays: sessions of this engine whose users sit behind AF_UNIX descriptors, and the turns they take.

Call order: ``Relay`` for each session; the engine notes each one that changed (relay_queue, at the end of a burst),
epoll each descriptor that did (edge-triggered, so that a full or empty one costs nothing); ``Relays.run`` lets each that
asked move a bounded part of its data (relay_pump), in the order they asked: a bulk transfer starves nobody.
"""

from libc.errno cimport EISCONN, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from ulnet.stack.buf cimport txchunk_free
from ulnet.stack.engine_core cimport engine_poll, engine_settle, engine_tick, relay_queue, ul_session
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock
from ulnet.stack.relay_pump cimport (
    RELAY_DATAGRAMS, RELAY_IDLE, RELAY_LATER, RELAY_LISTENER, RELAY_MORE, RELAY_SCRATCH_BYTES, RELAY_STREAM, TOLD_ENDED,
    TOLD_HUNG, TOLD_RESET, TOLD_ROOM, relay_announce, relay_drain, relay_pump, relay_start,
    relay_unread,
)
from ulnet.stack.session cimport fail

cdef extern from "<sys/socket.h>" nogil:
    enum: SOL_SOCKET
    enum: SO_SNDBUF
    enum: SO_SNDBUFFORCE
    enum: SO_RCVBUF
    enum: SO_RCVBUFFORCE
    ctypedef unsigned int socklen_t
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)

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
    EVENTS = 64
    BURST = 256
    BUFFER_BYTES = 1 << 20           # of a descriptor, each way
    RETRY_MS = 1

cdef int64_t TURNS_NS = 2000000      # then the loop shall hear its other callers


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
    """One look at every relay that asks. What is left: RELAY_IDLE, RELAY_MORE, or RELAY_LATER (and nothing that could be done now)."""
    cdef engine *e = set.e
    cdef ul_session *s
    cdef ul_session *last
    cdef int what
    cdef int left = RELAY_IDLE
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
            what = relay_pump(e, <relay *>s.relay, &set.spare, set.scratch)
            if what != RELAY_IDLE:
                relay_queue(e, s)
                if left != RELAY_MORE:
                    left = what
        if s == last:                      # who asked meanwhile has the next turn
            break
    if e.touched != NULL:
        last = e.relay_tail
        engine_settle(e)
        if e.relay_tail != last:
            left = RELAY_MORE                    # it let frames in
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
        self.scratch = <uint8_t *>malloc(RELAY_SCRATCH_BYTES)
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
                if left != RELAY_MORE:
                    break
                engine_poll(e, BURST)
                if e.now_ns >= until:
                    break
            engine_unlock(e)
        if e.attention or e.bufs.dead != NULL:
            self.engine.attend()
        return -1 if left == RELAY_IDLE else 0 if left == RELAY_MORE else RETRY_MS

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
                relay_start(r)
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
        cdef engine *e = self.relays.e
        cdef bint out
        with nogil:
            engine_lock(e)
            out = relay_announce(e, r, number)
            engine_unlock(e)
        return out

    def unread(self):
        return relay_unread(self._open())

    def drain(self):
        cdef relay *r = self._open()
        cdef engine *e = self.relays.e
        cdef Relays relays = self.relays
        with nogil:
            engine_lock(e)
            engine_tick(e)
            relay_drain(e, r, &relays.spare, relays.scratch)
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
