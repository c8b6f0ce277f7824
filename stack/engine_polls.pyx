"""Sets of sessions that somebody waits for: who is ready, kept up to date at the end of each burst.

A set stands among the sessions as one of role POLLSET that is readable while its ready list is not empty. So it is
waited for like any session (engine_wait), drives and follows like any waiter, and can have a descriptor of its own.
"""

from libc.errno cimport EEXIST, ENOENT, ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

from ulnet.stack.engine_core cimport (
    ROLE_POLLSET, ROLE_SHARED, engine, poll_item, session_new, session_ready, session_ref, session_unref,
    session_fd_free, ul_session, wait_side,
)
from ulnet.stack.engine_wait cimport helper_wake, waiters_wake
from ulnet.stack.readyfd cimport readyfd_new, readyfd_show
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_RDHUP, UL_READABLE, UL_WRITABLE

cdef extern from *:
    """
    static inline int ulnet_put_fd(int *at, int value) {
        int none = -1;
        return __atomic_compare_exchange_n(at, &none, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    static inline int ulnet_read_fd(int *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    """
    bint ulnet_put_fd(int *at, int value) nogil
    int ulnet_read_fd(int *at) nogil

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLLRDNORM
    enum: EPOLLWRNORM
    enum: EPOLLERR
    enum: EPOLLHUP
    enum: EPOLLRDHUP
    enum: EPOLL_CLOEXEC
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CTL_DEL
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)


# ---------------------------------------------------------------- the side: kernel descriptors

cdef int side_fd(wait_side *side) noexcept nogil:
    cdef int fd = ulnet_read_fd(&side.fd)
    if fd >= 0:
        return fd
    fd = epoll_create1(EPOLL_CLOEXEC)
    if fd < 0:
        return -errno
    if not ulnet_put_fd(&side.fd, fd):
        close(fd)                          # another thread was faster
    return ulnet_read_fd(&side.fd)


cdef int side_watch(wait_side *side, int fd, uint32_t events, uint64_t key) noexcept nogil:
    cdef epoll_event event
    cdef int epfd = side_fd(side)
    if epfd < 0:
        return epfd
    event.events = events
    event.data.u64 = key
    return -errno if epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event) < 0 else 0


# ---------------------------------------------------------------- readiness as epoll has it

cdef inline uint32_t epoll_bits(uint32_t ready, uint32_t events) noexcept nogil:
    cdef uint32_t bits = 0
    if ready & UL_HUP:
        # As tcp_poll() of Linux: both directions have ended, neither read nor write would wait.
        ready |= UL_RDHUP | UL_READABLE | UL_WRITABLE
    if ready & UL_READABLE:
        bits |= EPOLLIN | EPOLLRDNORM
    if ready & UL_WRITABLE:
        bits |= EPOLLOUT | EPOLLWRNORM
    if ready & UL_RDHUP:
        bits |= EPOLLRDHUP
    if ready & UL_ERROR:
        bits |= EPOLLERR
    if ready & UL_HUP:
        bits |= EPOLLHUP
    return bits & (events | EPOLLERR | EPOLLHUP)


# ---------------------------------------------------------------- the ready list

cdef void unqueue(poll_item *item) noexcept nogil:
    cdef poll_set *set = item.set
    if not item.queued:
        return
    item.queued = 0
    if item.prev != NULL:
        item.prev.next = item.next
    else:
        set.ready_head = item.next
    if item.next != NULL:
        item.next.prev = item.prev
    else:
        set.ready_tail = item.prev
    item.prev = NULL
    item.next = NULL
    set.s.accept_count -= 1
    if set.s.accept_count == 0 and set.s.fd != NULL:
        readyfd_show(set.s.fd, 0)


cdef void enqueue(poll_item *item) noexcept nogil:
    cdef poll_set *set = item.set
    item.queued = 1
    item.next = NULL
    item.prev = set.ready_tail
    if set.ready_tail != NULL:
        set.ready_tail.next = item
    else:
        set.ready_head = item
    set.ready_tail = item
    set.s.accept_count += 1
    if set.s.accept_count == 1:
        if set.s.fd != NULL:
            readyfd_show(set.s.fd, UL_READABLE)
        waiters_wake(set.e, set.s, UL_READABLE)


cdef void item_show(poll_item *item, uint32_t ready) noexcept nogil:
    if item.outside or item.gone:
        return
    if epoll_bits(ready, item.events):
        if not item.queued:
            enqueue(item)
    else:
        unqueue(item)


cdef void move_to_end(poll_item *item) noexcept nogil:
    cdef poll_set *set = item.set
    if item.next == NULL:
        return
    item.next.prev = item.prev
    if item.prev != NULL:
        item.prev.next = item.next
    else:
        set.ready_head = item.next
    item.next = NULL
    item.prev = set.ready_tail
    set.ready_tail.next = item
    set.ready_tail = item


cdef int poll_set_collect(poll_set *set, poll_hit *hits, int room) noexcept nogil:
    """What is ready now, at most room of it. The next call starts with those that this one had no room for."""
    cdef poll_item *item
    cdef poll_item *last = set.ready_tail
    cdef poll_item *following
    cdef uint32_t bits
    cdef int n = 0
    item = set.ready_head
    while item != NULL and n < room:
        following = item.next if item != last else NULL
        bits = epoll_bits(session_ready(item.s), item.events)
        if bits:
            hits[n].key = item.key
            hits[n].events = bits
            n += 1
            move_to_end(item)              # level-triggered, yet fair to the others
        else:
            unqueue(item)
        item = following
    return n


# ---------------------------------------------------------------- items

cdef int watch_outside(poll_item *item) noexcept nogil:
    cdef int rc
    if item.s.fd == NULL:
        return -ENOENT
    rc = side_watch(item.set.side, item.s.fd.user_fd, item.events, item.key | (<uint64_t>1 << KEY_BIT_SHIFT))
    if rc < 0 and rc != -EEXIST:
        item.set.e.n.nomem += 1
        return rc
    item.outside = 1
    # Whoever waits may have had no kernel descriptors until now: it looks again, and goes to sleep with them.
    waiters_wake(item.set.e, item.set.s, 0xFF)
    return 0


cdef void unwatch_outside(poll_item *item) noexcept nogil:
    cdef epoll_event event
    item.outside = 0
    # Not in a forked child: the epoll is its parent's as well.
    if item.s.fd != NULL and item.set.side.fd >= 0 and not item.set.e.broken:
        epoll_ctl(item.set.side.fd, EPOLL_CTL_DEL, item.s.fd.user_fd, &event)


cdef int item_add(poll_set *set, ul_session *s, uint64_t key, uint32_t events, poll_item **out) noexcept nogil:
    cdef poll_item *item = <poll_item *>calloc(1, sizeof(poll_item))
    cdef int rc = 0
    if item == NULL:
        return -ENOMEM
    item.set = set
    item.s = s
    item.key = key
    item.events = events
    if s.role == ROLE_SHARED:
        rc = watch_outside(item)
        if rc < 0:
            free(item)
            return rc
    session_ref(s)
    item.s_next = s.polls
    s.polls = item
    if not item.outside:
        item_show(item, session_ready(s))
    out[0] = item
    return 0


cdef int item_modify(poll_item *item, uint32_t events) noexcept nogil:
    cdef epoll_event event
    item.events = events
    if item.outside and item.s.fd != NULL:
        event.events = events
        event.data.u64 = item.key | (<uint64_t>1 << KEY_BIT_SHIFT)
        if epoll_ctl(item.set.side.fd, EPOLL_CTL_MOD, item.s.fd.user_fd, &event) < 0:
            return -errno
    item_show(item, session_ready(item.s))
    return 0


cdef void unlist(poll_item *item) noexcept nogil:
    cdef poll_item **at = &item.s.polls
    while at[0] != NULL and at[0] != item:
        at = &at[0].s_next
    if at[0] == item:
        at[0] = item.s_next
    item.s_next = NULL


cdef void item_remove(poll_item *item) noexcept nogil:
    cdef engine *e = item.set.e
    cdef poll_item **at
    if item.gone:
        at = &item.set.gone
        while at[0] != NULL and at[0] != item:
            at = &at[0].next
        if at[0] == item:
            at[0] = item.next
    else:
        unqueue(item)
        unlist(item)
        if item.outside:
            unwatch_outside(item)
    session_unref(e, item.s)
    free(item)


cdef poll_item *poll_set_next_gone(poll_set *set) noexcept nogil:
    cdef poll_item *item = set.gone
    if item != NULL:
        set.gone = item.next
        item.next = NULL
    return item


# ---------------------------------------------------------------- the engine's hooks

cdef void polls_show(engine *e, ul_session *s, uint32_t ready) noexcept nogil:
    cdef poll_item *item = s.polls
    while item != NULL:
        item_show(item, ready)
        item = item.s_next


cdef void polls_closed(engine *e, ul_session *s) noexcept nogil:
    """As epoll does: who is closed leaves every set. Its descriptor is still there."""
    cdef poll_item *item = s.polls
    cdef poll_item *following
    s.polls = NULL
    while item != NULL:
        following = item.s_next
        unqueue(item)
        if item.outside:
            unwatch_outside(item)
        item.s_next = NULL
        item.gone = 1
        item.next = item.set.gone
        item.set.gone = item
        item = following


cdef void pollset_session_moved(engine *e, ul_session *s) noexcept nogil:
    cdef poll_item *item = s.polls
    cdef bint outside = s.role == ROLE_SHARED
    while item != NULL:
        if outside and not item.outside:
            unqueue(item)
            watch_outside(item)
        elif not outside and item.outside:
            unwatch_outside(item)
            item_show(item, session_ready(s))
        item = item.s_next


# ---------------------------------------------------------------- sets

cdef int poll_set_open(poll_set *set, engine *e, wait_side *side) noexcept nogil:
    set.e = e
    set.side = side
    set.ready_head = NULL
    set.ready_tail = NULL
    set.gone = NULL
    set.s = session_new(e, 0)
    if set.s == NULL:
        return -ENOMEM
    set.s.role = ROLE_POLLSET
    return 0


cdef void poll_set_close(poll_set *set) noexcept nogil:
    """Its items were removed before. Who waits for it leaves with EBADF."""
    set.s.closing = 1
    waiters_wake(set.e, set.s, 0xFF)
    session_fd_free(set.e, set.s)
    session_unref(set.e, set.s)
    set.s = NULL


cdef int poll_set_number(poll_set *set, int *err) noexcept nogil:
    if set.s.fd == NULL:
        set.s.fd = readyfd_new(False, err)
        if set.s.fd == NULL:
            return -1
        set.e.watched += 1
        readyfd_show(set.s.fd, session_ready(set.s))
        helper_wake(set.e)
    return set.s.fd.user_fd
