"""PollSet: wait for many sessions and descriptors at once, as with epoll, but inside the engine.

Sessions of one engine are driven by the wait itself: their data costs no system call. Everything else is in an inner
epoll, the *side*: ordinary descriptors, sessions placed in the server, and one descriptor for each further engine
(readable while one of its sessions here is ready). Who sleeps, sleeps on both; a wait that the engine keeps busy looks
at the side every 100 us.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EBADF, EEXIST, EINTR, ENOENT, ENOMEM, errno
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport timespec
from posix.unistd cimport close

from ulnet.stack.engine_core cimport (
    ROLE_SHARED, ROLE_SHELL, clock_now, engine, engine_poll, engine_settle, engine_tick, poll_item, ul_session,
)
from ulnet.stack.engine_polls cimport (
    KEY_BIT_SHIFT, item_add, item_modify, item_remove, poll_hit, poll_set_close, poll_set_collect, poll_set_next_gone,
    poll_set_number, poll_set_open, pollset_session_moved, side_fd, side_watch,
)
from ulnet.stack.engine_wait cimport (
    WAIT_SIDE, engine_left, engine_lock, engine_take_over, engine_unlock, engine_wait_beside,
)
from ulnet.stack.session cimport Session, fail
from ulnet.stack.types cimport UL_READABLE

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLLERR
    enum: EPOLLHUP
    enum: EPOLLET
    enum: EPOLLONESHOT
    enum: EPOLLEXCLUSIVE
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CTL_DEL
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int n, int timeout_ms)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *fds, unsigned long n, const timespec *timeout, void *sigmask)
    short POLLIN

cdef enum:
    BURST = 256                  # about what the rings hold: what is there is told of at once
    HITS = 64                    # room on the stack; for more it is allocated
    EVENT_READ = 1               # as the selectors module has them
    EVENT_WRITE = 2

cdef int64_t SIDE_NS = 100000    # as in engine_wait


cdef int collect(Part part, poll_hit **hits, int room) noexcept nogil:
    """What is ready, into hits: HITS of them on the caller's stack, or allocated when there are more. Lock held."""
    cdef poll_hit *more
    cdef int n = <int>part.set.s.accept_count
    if n > room:
        n = room
    if n > HITS:
        more = <poll_hit *>malloc(n * sizeof(poll_hit))
        if more == NULL:
            n = HITS                       # the others with the next call
        else:
            hits[0] = more
    return poll_set_collect(&part.set, hits[0], n)


@cython.no_gc_clear
cdef class Part:
    """The sessions of one engine in a PollSet."""

    def __dealloc__(self):
        cdef engine *e = self.e
        if self.set.s != NULL:
            with nogil:
                engine_lock(e)
                poll_set_close(&self.set)
                engine_unlock(e)


cdef class Entry:
    """One registration."""

    cdef int tell(self, uint32_t bits, bint as_selector, list out) except -1:
        """Add to out that it is ready, by the pair of the last time if that says the same."""
        cdef uint32_t events = bits
        if bits != self.told_bits or self.told is None:
            if as_selector:
                # An error or a hang-up is for whoever reads and for whoever writes.
                events = (EVENT_READ if bits & ~<uint32_t>EPOLLOUT and self.events & EPOLLIN else 0) | (
                    EVENT_WRITE if bits & ~<uint32_t>EPOLLIN and self.events & EPOLLOUT else 0)
                if not events:
                    return 0
            self.told = (self.data, events)
            self.told_bits = bits
        out.append(self.told)
        return 0


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class PollSet:
    """Sessions and descriptors to wait for, each with the epoll events to wait for and something to call it by.

    Level-triggered for sessions; EPOLLET, EPOLLONESHOT and EPOLLEXCLUSIVE put a session's descriptor into the inner
    epoll instead. A closed session leaves its sets by itself. Any thread may use a set at any time.
    """

    def __cinit__(self):
        self.side.fd = -1
        self.side.spare_fd = -1
        self.side.due_ns = 0
        self.parts = []
        self.by_key = {}
        self.by_session = {}
        self.by_fd = {}
        self.part_by_fd = {}
        self.next_key = 1

    def __dealloc__(self):
        self.release_all()

    cdef void release_all(self) noexcept:
        cdef Entry entry
        cdef Part part
        cdef engine *e
        if self.by_key is not None:
            for entry in self.by_key.values():
                e = entry.part.e
                with nogil:
                    engine_lock(e)
                    item_remove(entry.item)
                    engine_unlock(e)
                entry.item = NULL
        for part in self.parts or ():
            e = part.e
            with nogil:
                engine_lock(e)
                poll_set_close(&part.set)
                engine_unlock(e)
        self.parts = []
        self.driven = None
        self.by_key = {}
        self.by_session = {}
        self.by_fd = {}
        self.part_by_fd = {}
        if self.side.fd >= 0:
            close(self.side.fd)
            self.side.fd = -1
        if self.side.spare_fd >= 0:
            close(self.side.spare_fd)
            self.side.spare_fd = -1

    def close(self):
        """Forget everything. A thread that waits on an engine leaves with ValueError. Twice is fine."""
        if not self.closed:
            self.closed = True
            self.release_all()

    cdef int check(self) except -1:
        if self.closed:
            raise ValueError("I/O operation on closed PollSet")
        if self.parts:
            self.forget_gone()
        return 0

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, kind, value, trace):
        self.close()

    def __len__(self):
        self.check()
        return len(self.by_key) + len(self.by_fd)

    # ------------------------------------------------------------ engines

    cdef Part part_of(self, object engine, engine *e):
        cdef Part part
        cdef int rc
        for part in self.parts:
            if part.e == e:
                break
        else:
            part = Part.__new__(Part)
            part.engine = engine
            part.e = e
            part.number = -1
            with nogil:
                engine_lock(e)
                rc = poll_set_open(&part.set, e, &self.side)
                engine_unlock(e)
            if rc < 0:
                fail(rc)
            self.parts.append(part)
        if self.driven is None or (self.driven.e.stop and not e.stop):
            # The first one, or the one after an engine that has ended.
            self.driven = part
        elif part is not self.driven:
            self.show_part(part)
        return part

    cdef int show_part(self, Part part) except -1:
        """Have the side tell of the part's sessions."""
        cdef engine *e = part.e
        cdef int err = 0
        cdef int rc = 0
        if part.number >= 0:
            return 0
        with nogil:
            engine_lock(e)
            part.number = poll_set_number(&part.set, &err)
            engine_unlock(e)
        if part.number >= 0:
            err = side_watch(&self.side, part.number, EPOLLIN, part.number)
        if err < 0:
            fail(err)
        self.part_by_fd[part.number] = part
        return 0

    cdef int forget_gone(self) except -1:
        """Sessions that were closed: their entries go."""
        cdef Part part
        cdef Entry entry
        cdef engine *e
        cdef poll_item *item
        for part in self.parts:
            e = part.e
            while part.set.gone != NULL:
                with nogil:
                    engine_lock(e)
                    item = poll_set_next_gone(&part.set)
                    engine_unlock(e)
                if item == NULL:
                    break
                entry = self.by_key.pop(item.key, None)
                if entry is not None:
                    entry.item = NULL
                    self.by_session.pop(entry.address, None)
                with nogil:
                    engine_lock(e)
                    item_remove(item)
                    engine_unlock(e)
        return 0

    # ------------------------------------------------------------ registering

    cdef Entry find(self, object what):
        cdef Entry entry
        if isinstance(what, Session):
            entry = self.by_session.get(<size_t>(<Session>what).s)
            if entry is None:
                entry = self.by_fd.get((<Session>what).numbered_as(False))
        else:
            entry = self.by_fd.get(what)
        return entry

    def register(self, object what, uint32_t events, object data=None):
        """Add a Session or a descriptor. FileExistsError: it is there; OSError EBADF: it is closed; PermissionError:
        epoll does not take it (a regular file)."""
        cdef Entry entry = Entry.__new__(Entry)
        cdef Session session
        cdef Part part
        cdef engine *e
        cdef ul_session *s
        cdef uint64_t key
        cdef int rc = 0
        self.check()
        entry.data = data
        entry.events = events
        entry.fd = -1
        if isinstance(what, Session):
            session = what
            if <size_t>session.s in self.by_session:
                fail(-EEXIST)
            if not events & (EPOLLET | EPOLLONESHOT | EPOLLEXCLUSIVE):
                e = session.e
                s = session.s
                part = self.part_of(session.engine, e)
                key = self.next_key
                self.next_key += 1
                entry.part = part
                entry.key = key
                entry.address = <size_t>s
                self.by_key[key] = entry
                self.by_session[entry.address] = entry
                with nogil:
                    engine_lock(e)
                    rc = -EBADF if s.closing else item_add(&part.set, s, key, events, &entry.item)
                    engine_unlock(e)
                if rc < 0:
                    del self.by_key[key]
                    del self.by_session[entry.address]
                    fail(rc)
                return
            what = session.fileno()
            if what < 0:
                fail(-EBADF)
        entry.fd = what
        rc = side_watch(&self.side, entry.fd, events, entry.fd)
        if rc < 0:
            fail(rc)
        self.by_fd[entry.fd] = entry

    def modify(self, object what, uint32_t events, object data=None):
        """Other events, and other data. FileNotFoundError: it is not there."""
        cdef Entry entry
        cdef poll_item *item
        cdef engine *e
        cdef epoll_event event
        cdef int rc
        self.check()
        entry = self.find(what)
        if entry is None:
            fail(-ENOENT)
        if (entry.item == NULL) != bool(events & (EPOLLET | EPOLLONESHOT | EPOLLEXCLUSIVE)) and isinstance(what, Session):
            self.remove(entry)
            self.register(what, events, data)
            return
        entry.data = data
        entry.told = None
        if entry.events == events and not events & EPOLLONESHOT:
            return
        if entry.item != NULL:
            item = entry.item
            e = entry.part.e
            with nogil:
                engine_lock(e)
                rc = item_modify(item, events)
                engine_unlock(e)
        else:
            event.events = events
            event.data.u64 = entry.fd
            rc = -errno if epoll_ctl(self.side.fd, EPOLL_CTL_MOD, entry.fd, &event) < 0 else 0
        if rc < 0:
            fail(rc)
        entry.events = events
        entry.told = None                  # by a wait meanwhile, of the events before

    def unregister(self, object what):
        """Take it out. FileNotFoundError: it is not there (a closed session never is)."""
        cdef Entry entry
        self.check()
        entry = self.find(what)
        if entry is None:
            fail(-ENOENT)
        self.remove(entry)

    cdef int remove(self, Entry entry) except -1:
        cdef poll_item *item = entry.item
        cdef engine *e
        cdef epoll_event event
        if item != NULL:
            e = entry.part.e
            entry.item = NULL
            del self.by_key[entry.key]
            del self.by_session[entry.address]
            with nogil:
                engine_lock(e)
                item_remove(item)
                engine_unlock(e)
            return 0
        if entry.fd < 0:
            fail(-ENOENT)                  # another thread is about to add it
        del self.by_fd[entry.fd]
        if epoll_ctl(self.side.fd, EPOLL_CTL_DEL, entry.fd, &event) < 0:
            fail(-errno)
        return 0

    def fileno(self):
        """A descriptor that is readable while something here is ready: for a poll or an epoll around this set."""
        cdef Part part
        cdef int fd
        self.check()
        fd = side_fd(&self.side)
        if fd < 0:
            fail(fd)
        for part in self.parts:
            self.show_part(part)
        return fd

    # ------------------------------------------------------------ waiting

    def wait(self, int64_t timeout_ns=-1, int max_events=-1, bint relaxed=False):
        """What is ready, as [(data, epoll events), ...]: at once when something is, empty when the time is over.

        timeout_ns -1: for ever. 0 looks at the kernel's descriptors, too; with ``relaxed`` only every 100 us.
        ``as_selector``: the events are EVENT_READ and EVENT_WRITE.
        Signal handlers run; what they raise ends the wait (PEP 475).
        """
        cdef poll_hit few[HITS]
        cdef poll_hit *hits = few
        cdef Part part
        cdef engine *e
        cdef wait_side *side = &self.side
        cdef int64_t deadline
        cdef int room = max_events if max_events >= 0 else INT_MAX
        cdef int n, i, rc
        cdef bint aside, settled
        cdef list out = []
        cdef Entry entry
        self.check()
        if timeout_ns < 0:
            deadline = -1
        else:
            deadline = 0 if timeout_ns == 0 else clock_now() + timeout_ns
        while True:
            part = self.driven
            if part is None or part.e.stop or part.e.broken:
                return self.wait_aside(timeout_ns, deadline, max_events)
            e = part.e
            with nogil:
                engine_lock(e)
                rc = 0
                if part.set.s == NULL:
                    n = 0
                    rc = -EBADF
                else:
                    engine_tick(e)
                    engine_take_over(e)
                    engine_poll(e, BURST)
                    n = collect(part, &hits, room)
                    aside = side.fd >= 0 and (e.now_ns >= side.due_ns or (deadline == 0 and not relaxed))
                    if n == 0 and not aside:
                        rc = -EAGAIN
                        if deadline != 0:
                            rc = engine_wait_beside(e, part.set.s, UL_READABLE, deadline, side)
                            if rc == 0 or rc == -EAGAIN:
                                n = collect(part, &hits, room)
                            # At the end of the time everything is looked at.
                            aside = rc == WAIT_SIDE or (rc == -EAGAIN and side.fd >= 0)
                    if e.touched != NULL:
                        engine_settle(e)
                    engine_left(e)
                engine_unlock(e)
            if e.bufs.dead != NULL:
                part.engine.reap()
            for i in range(n):
                entry = self.by_key.get(hits[i].key)
                if entry is not None:
                    entry.tell(hits[i].events, self.as_selector, out)
            if hits != few:
                free(hits)
                hits = few
            if aside and rc != -EBADF:
                self.look_aside(out, room - <int>len(out), n > 0)
            if out:
                return out
            if rc == -EINTR:
                PyErr_CheckSignals()
            elif rc == -EBADF:
                self.check()               # the set was closed; or the engine was, and the rest goes on
            elif deadline == 0 or rc == -EAGAIN:
                return out
            if self.parts:
                self.forget_gone()

    cdef int take(self, Part part, list out, int room) except -1:
        """What is ready of one engine, without waiting."""
        cdef poll_hit few[HITS]
        cdef poll_hit *hits = few
        cdef engine *e = part.e
        cdef Entry entry
        cdef int n = 0
        cdef int i
        with nogil:
            engine_lock(e)
            if part.set.s != NULL:
                n = collect(part, &hits, room)
            engine_unlock(e)
        for i in range(n):
            entry = self.by_key.get(hits[i].key)
            if entry is not None:
                entry.tell(hits[i].events, self.as_selector, out)
        if hits != few:
            free(hits)
        return n

    cdef int look_aside(self, list out, int room, bint driven_taken) except -1:
        """What the side has, without waiting."""
        cdef epoll_event few[HITS]
        cdef epoll_event *events = few
        cdef epoll_event dropped
        cdef Entry entry
        cdef Part part
        cdef uint64_t key
        cdef uint32_t bits
        cdef int n, i
        if room <= 0 or self.side.fd < 0:
            return 0
        n = <int>(len(self.by_key) + len(self.by_fd) + len(self.part_by_fd))
        if n < HITS:
            n = HITS                       # others may put something into it (fileno)
        if room > n:
            room = n
        if room > HITS:
            events = <epoll_event *>malloc(room * sizeof(epoll_event))
            if events == NULL:
                raise MemoryError(f"no memory for {room} events")
        n = epoll_wait(self.side.fd, events, room, 0)
        self.side_looks += 1
        self.side.due_ns = clock_now() + SIDE_NS
        for i in range(n):
            key = events[i].data.u64
            bits = events[i].events
            if key >> KEY_BIT_SHIFT:
                entry = self.by_key.get(key & ~(<uint64_t>1 << KEY_BIT_SHIFT))
                if entry is not None:
                    entry.tell(bits, self.as_selector, out)
                continue
            entry = self.by_fd.get(key)
            if entry is not None:
                entry.tell(bits, self.as_selector, out)
                continue
            part = self.part_by_fd.get(key)
            if part is None and self.as_epoll:
                out.append((key, bits))
            elif part is None:
                # Its number was closed here, but another descriptor keeps the file open.
                epoll_ctl(self.side.fd, EPOLL_CTL_DEL, <int>key, &dropped)
            elif part is not self.driven or not driven_taken:
                self.take(part, out, room)
        if events != few:
            free(events)
        return n

    cdef list wait_aside(self, int64_t timeout_ns, int64_t deadline, int max_events):
        """Without an engine: only the side."""
        cdef list out = []
        cdef pollfd p
        cdef timespec ts
        cdef timespec *timeout
        cdef int64_t left
        cdef int rc
        cdef int room = max_events if max_events >= 0 else INT_MAX
        rc = side_fd(&self.side)
        if rc < 0:
            fail(rc)
        while True:
            self.look_aside(out, room, False)
            if out or timeout_ns == 0:
                return out
            timeout = NULL
            if deadline > 0:
                left = deadline - clock_now()
                if left <= 0:
                    return out
                ts.tv_sec = left // 1000000000
                ts.tv_nsec = left % 1000000000
                timeout = &ts
            p.fd = self.side.fd
            p.events = POLLIN
            p.revents = 0
            with nogil:
                rc = ppoll(&p, 1, timeout, NULL)
                if rc < 0:
                    rc = -errno
            if rc == -EINTR:
                PyErr_CheckSignals()
            elif rc < 0:
                fail(rc)
            self.check()


def session_moved(Session session not None, bint outside):
    """Tell its sets that a shell was placed in the server, or came back: what the code that moves sessions does, as a
    door for tests. Returns False when the session is not a shell (the data of others would be lost)."""
    cdef engine *e = session.e
    cdef ul_session *s = session.s
    cdef int role = ROLE_SHELL if outside else ROLE_SHARED
    cdef bint done
    session.fileno()
    with nogil:
        engine_lock(e)
        done = s.role == role
        if done:
            s.role = ROLE_SHARED if outside else ROLE_SHELL
            pollset_session_moved(e, s)
        engine_unlock(e)
    return done
