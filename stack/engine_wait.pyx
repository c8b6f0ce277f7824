"""Waiting: the engine's lock, who drives the link, and the helper thread.

Whoever waits first drives: it polls the link for ``spin_ns``, then sleeps in poll(2) with the lock
released. Others sleep on their own condition until the driver finds something for them, or leaves
and promotes one of them. The helper thread drives only while no caller does. Its states:

    NAPS     callers were active a moment ago: look again in 2 ms, or in 8 ms at most while they go on. (Were it
             asleep in poll(2) instead, each arriving frame would pay for waking it while a caller is already
             polling the ring.)
    SLEEPS   a caller drives and is itself asleep in poll(2): it signals the helper when it leaves.
    POLLS    nobody else is here: it drives, asleep in poll(2). A caller that wants to spin sends it to nap.

A waiter may have a *side*: kernel descriptors (in one epoll) that it watches as well. They are part of its poll(2) when
it sleeps, as a driver or as a follower; while the engine keeps it busy it is sent to look at them now and then.

So an idle program uses no CPU, and a busy one makes no system call to keep the helper informed.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, ENOMEM, errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport timespec
from posix.unistd cimport close, read, write

from ulnet.kernelshim.fastpaths cimport fast_always
from ulnet.stack.engine_core cimport (
    HELPER_NAPS, HELPER_POLLS, HELPER_RUNS, HELPER_SLEEPS, ROLE_SHARED, USER_SHARED, clock_now, engine, engine_deadline,
    engine_poll, engine_spin, pthread_cond_t, pthread_mutex_t, pthread_t, session_ready, session_ref, session_unref,
    ul_session, wait_side, waiter,
)
from ulnet.stack.stamps cimport STAMP_WOKEN, stamp
from ulnet.stack.types cimport UL_ERROR, UL_HUP

cdef extern from *:
    """
    #include <pthread.h>
    #include <poll.h>
    #include <sched.h>
    #include <sys/eventfd.h>
    static inline void ulnet_contend(uint32_t *n, int by) { __atomic_add_fetch(n, by, __ATOMIC_ACQ_REL); }
    static inline int ulnet_swap(int *at, int value) { return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL); }
    static inline int ulnet_read(int *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    static inline uint32_t ulnet_contended(uint32_t *n) { return __atomic_load_n(n, __ATOMIC_ACQUIRE); }
    static __thread int ulnet_asked_flag;
    static inline int ulnet_asked(void) { return ulnet_asked_flag; }
    static inline void ulnet_ask(int on) { ulnet_asked_flag = on; }
    static inline void ulnet_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #endif
    }
    """
    void ulnet_contend(uint32_t *n, int by) nogil
    int ulnet_swap(int *at, int value) nogil
    int ulnet_read(int *at) nogil
    uint32_t ulnet_contended(uint32_t *n) nogil
    void ulnet_pause() nogil
    int ulnet_asked() nogil           # of this thread: its wait has let signal handlers run before it sleeps
    void ulnet_ask(int on) nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_trylock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    pthread_t pthread_self()
    int pthread_equal(pthread_t a, pthread_t b)
    int pthread_condattr_init(pthread_condattr_t *a)
    int pthread_condattr_setclock(pthread_condattr_t *a, int clock)
    int pthread_cond_init(pthread_cond_t *c, pthread_condattr_t *a)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_signal(pthread_cond_t *c)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const timespec *until)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *fds, unsigned long n, const timespec *timeout, void *sigmask)
    short POLLIN

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    BURST = 64
    CLOCK_MONOTONIC_ID = 1
    LOOK_ON = 2                  # judge: nothing yet
    SPIN_SKIPS_MAX = 255

cdef int64_t NAP_NS = 2000000
cdef int64_t NAP_MAX_NS = 4000000    # a ring must take what comes meanwhile; each look takes the lock from a caller, too
cdef int64_t SIDE_NS = 100000    # a busy engine lets kernel descriptors wait no longer than this for a look
cdef int64_t LONG_NS = 10000000  # a shorter sleep ends soon enough for a signal that came before it


cdef int engine_wait_init(engine *e) noexcept nogil:
    cdef pthread_condattr_t attr
    pthread_condattr_init(&attr)
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC_ID)
    pthread_mutex_init(&e.lock, NULL)
    pthread_cond_init(&e.helper_cond, &attr)
    e.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    e.helper_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    return -ENOMEM if e.wake_fd < 0 or e.helper_fd < 0 else 0


cdef void engine_wait_end(engine *e) noexcept nogil:
    if e.wake_fd > 0:
        close(e.wake_fd)
    if e.helper_fd > 0:
        close(e.helper_fd)


cdef void engine_lock(engine *e) noexcept nogil:
    if pthread_mutex_trylock(&e.lock) == 0:
        return
    if e.fork_depth and pthread_equal(e.fork_thread, pthread_self()):
        e.fork_depth += 1                  # a destructor that runs between before_fork() and the fork
        return
    # A spinning driver looks at `contenders` and steps aside.
    ulnet_contend(&e.contenders, 1)
    pthread_mutex_lock(&e.lock)
    ulnet_contend(&e.contenders, -1)


cdef bint engine_trylock(engine *e) noexcept nogil:
    return pthread_mutex_trylock(&e.lock) == 0


cdef void engine_unlock(engine *e) noexcept nogil:
    if e.fork_depth > 1:
        e.fork_depth -= 1
        return
    pthread_mutex_unlock(&e.lock)


cdef void step_aside(engine *e) noexcept nogil:
    """The driver lets contenders in; a mutex alone would hand the lock straight back to it."""
    cdef int i = 0
    pthread_mutex_unlock(&e.lock)
    while ulnet_contended(&e.contenders) and i < 1000:
        i += 1
        ulnet_pause()
        if i & 63 == 0:
            sched_yield()
    engine_lock(e)


cdef void engine_kick(engine *e) noexcept nogil:
    cdef uint64_t one = 1
    if e.sleep_until_ns:
        e.sleep_until_ns = 0               # once is enough: it looks at everything when it wakes
        e.n.kicks += 1
        write(e.helper_fd if e.helper == HELPER_POLLS else e.wake_fd, &one, 8)


cdef void helper_wake(engine *e) noexcept nogil:
    if e.helper == HELPER_SLEEPS or e.helper == HELPER_NAPS:
        pthread_cond_signal(&e.helper_cond)
    elif e.helper == HELPER_POLLS:
        engine_kick(e)


cdef void engine_take_over(engine *e) noexcept nogil:
    # With watched descriptors it must notice frames at once, whoever else does.
    if e.helper == HELPER_POLLS and not e.watched and e.waiters == NULL:
        engine_kick(e)
        e.helper = HELPER_NAPS
        e.driving = 0


cdef void engine_left(engine *e) noexcept nogil:
    e.activity += 1
    if e.attention:
        helper_wake(e)
    elif e.watched and not e.driving and e.helper == HELPER_NAPS:
        # Somebody watches a descriptor: frames must be noticed at once, not after the nap.
        pthread_cond_signal(&e.helper_cond)


cdef void waiters_wake(engine *e, ul_session *s, uint32_t ready) noexcept nogil:
    cdef waiter *w = s.waiters
    while w != NULL:
        if not w.signalled and ready & (w.want | UL_ERROR | UL_HUP):
            w.signalled = 1
            if w.asleep_in_poll:
                engine_kick(e)
            else:
                follower_wake(e, w)
        w = w.s_next


cdef void follower_wake(engine *e, waiter *w) noexcept nogil:
    cdef uint64_t one = 1
    if w.wake_fd >= 0:
        e.n.kicks += 1
        write(w.wake_fd, &one, 8)
    else:
        pthread_cond_signal(&w.cond)


cdef int sleep_in_poll(engine *e, int wake_fd, int64_t until_ns, wait_side *side) noexcept nogil:
    """Sleep until a frame, a kick or until_ns (INT64_MAX: for ever), lock released. 0, or -EINTR after a signal, or
    WAIT_SIDE.

    Helper and callers have a wake-up descriptor each: a helper sent to nap may still be on its way out
    while the caller that took over goes to sleep, and must not swallow that caller's wake-up.
    """
    cdef pollfd fds[4]
    cdef timespec ts
    cdef timespec *timeout = NULL
    cdef int64_t left
    cdef uint64_t junk
    cdef int rc
    fds[0].fd = wake_fd
    fds[0].events = POLLIN
    fds[0].revents = 0
    fds[1].fd = e.link.fd                  # -1 is ignored by poll(2)
    fds[1].events = POLLIN
    fds[1].revents = 0
    fds[2].fd = ulnet_read(&side.fd) if side != NULL else -1
    fds[2].events = POLLIN
    fds[2].revents = 0
    fds[3].fd = e.link.large_fd
    fds[3].events = POLLIN
    fds[3].revents = 0
    if until_ns != INT64_MAX:
        left = until_ns - e.now_ns         # read a moment ago, by the poll that found nothing
        if left < 0:
            left = 0
        ts.tv_sec = left // 1000000000
        ts.tv_nsec = left % 1000000000
        timeout = &ts
    e.sleep_until_ns = until_ns
    e.n.polls += 1
    pthread_mutex_unlock(&e.lock)
    rc = ppoll(fds, 4, timeout, NULL)
    stamp(STAMP_WOKEN)
    rc = -EINTR if rc < 0 and errno == EINTR else WAIT_SIDE if fds[2].revents else 0
    if fds[0].revents:
        read(wake_fd, &junk, 8)
    engine_lock(e)
    if wake_fd == e.wake_fd or e.helper == HELPER_POLLS:
        e.sleep_until_ns = 0
    return rc


cdef int judge(engine *e, ul_session *s, const waiter *w, int64_t deadline_ns) noexcept nogil:
    """What a waiter finds when it looks: LOOK_ON, else engine_wait's answer."""
    if s.closing or e.stop:
        return -EBADF
    if s.role == ROLE_SHARED:
        return -USER_SHARED
    if session_ready(s) & (w.want | UL_ERROR | UL_HUP):
        return 0
    if deadline_ns >= 0 and e.now_ns >= deadline_ns:
        return -EAGAIN
    if w.side != NULL and w.side.fd >= 0 and e.now_ns >= w.side.due_ns:
        return WAIT_SIDE
    return LOOK_ON


cdef bint spin_pays(const engine *e) noexcept nogil:
    return e.spin_ns and (e.spin_skips == 0 or fast_always())


cdef void spin_learn(engine *e, bint spun, int64_t slept_ns) noexcept nogil:
    """After a sleep. Polling is in vain if peers take longer than that, and in their way if they need this processor."""
    if slept_ns > e.spin_ns:
        if spun:
            e.spin_skips = 1               # until one answers soon
    elif spun:
        # The answer came once we slept: most likely it waited for the processor that we polled on.
        e.spin_backoff = 2 * e.spin_backoff + 1 if e.spin_backoff < SPIN_SKIPS_MAX else SPIN_SKIPS_MAX
        e.spin_skips = e.spin_backoff
    elif e.spin_skips:
        e.spin_skips -= 1


cdef int drive(engine *e, ul_session *s, waiter *w, int64_t deadline_ns) noexcept nogil:
    """Poll the link on behalf of everybody until s is ready. Lock held, `driving` set."""
    cdef bint spun = ulnet_asked()         # in vain, and went to let signal handlers run
    cdef bint spins = not spun and spin_pays(e)
    cdef int64_t spin_until = 0 if spins else 1
    cdef int64_t until, slept_at
    cdef int rc
    e.n.spins += spins
    while True:
        # Who does not spin looks once; eight looks, with pauses, are for those who come straight back.
        if engine_spin(e, BURST) if spins else engine_poll(e, BURST):
            if spin_until > 1:
                e.spin_backoff = 0
            spins = spin_pays(e)
            spin_until = e.now_ns + e.spin_ns if spins else 1
        elif spin_until == 0:
            spin_until = e.now_ns + e.spin_ns
        rc = judge(e, s, w, deadline_ns)
        if rc != LOOK_ON:
            return rc
        if ulnet_contended(&e.contenders):
            step_aside(e)
        elif e.now_ns < spin_until:
            ulnet_pause()
        else:
            until = engine_deadline(e)
            if 0 <= deadline_ns < until:
                until = deadline_ns
            if until <= e.now_ns:
                continue
            if spin_until > 1:
                spun = True
                e.n.spins_in_vain += 1
                if until - e.now_ns > LONG_NS and not ulnet_asked():
                    # A signal that came while we polled does not end the poll(2) that follows: handlers run first.
                    ulnet_ask(True)
                    return -EINTR
            slept_at = e.now_ns
            w.asleep_in_poll = 1
            w.signalled = 0
            rc = sleep_in_poll(e, e.wake_fd, until, w.side)
            w.asleep_in_poll = 0
            if rc != 0:
                return rc
            if e.spin_ns:
                spin_learn(e, spun, clock_now() - slept_at)
                spun = False
            if w.side != NULL:
                w.side.due_ns = clock_now() + SIDE_NS      # the poll(2) has looked
            spin_until = 1                 # woken for nothing: sleep again; for a frame: spin again
            spins = spin_pays(e)


cdef void promote_next(engine *e) noexcept nogil:
    """The driver leaves: a waiter takes over, or the helper."""
    if e.waiters != NULL:
        e.waiters.promote = 1
        follower_wake(e, e.waiters)
    elif e.helper == HELPER_SLEEPS or (e.helper == HELPER_NAPS and e.watched):
        pthread_cond_signal(&e.helper_cond)


cdef int follower_sleep(engine *e, waiter *w, int64_t until_ns) noexcept nogil:
    """Until a wake-up or until_ns, lock released. 0; -EAGAIN: the time is over; or as sleep_in_poll."""
    cdef timespec ts
    cdef pollfd fds[2]
    cdef uint64_t junk
    cdef int rc
    if w.side == NULL or ulnet_read(&w.side.fd) < 0:
        ts.tv_sec = until_ns // 1000000000
        ts.tv_nsec = until_ns % 1000000000
        return -EAGAIN if pthread_cond_timedwait(&w.cond, &e.lock, &ts) else 0
    # A condition cannot be waited for together with descriptors.
    w.wake_fd = ulnet_swap(&w.side.spare_fd, -1)
    if w.wake_fd < 0:
        w.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    fds[0].fd = w.wake_fd
    fds[0].events = POLLIN
    fds[0].revents = 0
    fds[1].fd = w.side.fd
    fds[1].events = POLLIN
    fds[1].revents = 0
    until_ns -= e.now_ns
    if until_ns < 0:
        until_ns = 0
    elif w.wake_fd < 0 and until_ns > NAP_NS:
        until_ns = NAP_NS                  # out of descriptors, nobody can wake us: look again soon
    ts.tv_sec = until_ns // 1000000000
    ts.tv_nsec = until_ns % 1000000000
    e.n.polls += 1
    pthread_mutex_unlock(&e.lock)
    rc = ppoll(fds, 2, &ts, NULL)
    rc = -EINTR if rc < 0 and errno == EINTR else -EAGAIN if rc == 0 else WAIT_SIDE if fds[1].revents else 0
    engine_lock(e)
    # Under the lock nobody writes any more: what is left in it is read before the next one uses it.
    if w.wake_fd >= 0:
        read(w.wake_fd, &junk, 8)
        until_ns = ulnet_swap(&w.side.spare_fd, w.wake_fd)
        if until_ns >= 0:
            close(<int>until_ns)
        w.wake_fd = -1
    return rc


cdef int follow(engine *e, ul_session *s, waiter *w, int64_t deadline_ns) noexcept nogil:
    """Wait on our own condition while another thread drives. LOOK_ON: nobody drives any more."""
    cdef int64_t until
    cdef int rc
    while True:
        w.signalled = 0
        rc = judge(e, s, w, deadline_ns)
        if rc != LOOK_ON:
            return rc
        if not e.driving:
            return LOOK_ON
        # Signals reach only the thread that runs Python's handlers when it looks: look five times a second.
        until = e.now_ns + 200000000
        if 0 <= deadline_ns < until:
            until = deadline_ns
        rc = follower_sleep(e, w, until)
        e.now_ns = clock_now()
        if rc == WAIT_SIDE:
            return rc
        if rc < 0:
            rc = judge(e, s, w, deadline_ns)
            return rc if rc != LOOK_ON else -EINTR


cdef int engine_wait(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns) noexcept nogil:
    return engine_wait_beside(e, s, want, deadline_ns, NULL)


cdef int engine_wait_beside(engine *e, ul_session *s, uint32_t want, int64_t deadline_ns, wait_side *side) noexcept nogil:
    # e->now_ns is fresh: callers have entered, or polled, a moment ago; the first poll reads the clock again.
    cdef waiter w
    cdef pthread_condattr_t attr
    cdef waiter **at
    cdef int rc
    cdef bint cond_made = False
    memset(&w, 0, sizeof(w))
    w.s = s
    w.want = want
    w.side = side
    w.wake_fd = -1
    session_ref(s)
    w.s_next = s.waiters
    s.waiters = &w
    while True:
        if not e.driving or e.helper == HELPER_POLLS:
            if e.helper == HELPER_POLLS:
                engine_kick(e)             # out of its poll(2) with it: it drives no more
                e.helper = HELPER_NAPS
            e.driving = 1
            rc = drive(e, s, &w, deadline_ns)
            e.driving = 0
            promote_next(e)
            break
        if not cond_made:
            pthread_condattr_init(&attr)
            pthread_condattr_setclock(&attr, CLOCK_MONOTONIC_ID)
            pthread_cond_init(&w.cond, &attr)
            cond_made = True
            w.next = e.waiters
            if w.next != NULL:
                w.next.prev = &w
            e.waiters = &w
        rc = follow(e, s, &w, deadline_ns)
        if rc != LOOK_ON:
            break
        # Before driving: drivers are not in the list of those who could be promoted.
        w.promote = 0
        waiter_unlist(e, &w)
        pthread_cond_destroy(&w.cond)
        cond_made = False
    at = &s.waiters
    while at[0] != &w:
        at = &at[0].s_next
    at[0] = w.s_next
    if cond_made:
        waiter_unlist(e, &w)
        pthread_cond_destroy(&w.cond)
        if w.promote and not e.driving:
            promote_next(e)                # we were chosen to drive but are leaving
    if rc != -EINTR:
        ulnet_ask(False)
    session_unref(e, s)
    e.activity += 1
    return rc


cdef void waiter_unlist(engine *e, waiter *w) noexcept nogil:
    if w.prev != NULL:
        w.prev.next = w.next
    elif e.waiters == w:
        e.waiters = w.next
    if w.next != NULL:
        w.next.prev = w.prev
    w.prev = NULL
    w.next = NULL


cdef void helper_run(engine *e) noexcept nogil:
    cdef timespec ts
    cdef int64_t until
    cdef int64_t nap = NAP_NS
    cdef uint64_t seen
    engine_lock(e)
    e.helper = HELPER_NAPS
    while not e.stop and not e.attention:
        if e.driving:
            if e.sleep_until_ns:
                # The driver sleeps in poll(2); it signals us when it leaves.
                e.helper = HELPER_SLEEPS
                pthread_cond_wait(&e.helper_cond, &e.lock)
                e.helper = HELPER_NAPS
                continue
            seen = e.activity
        else:
            seen = e.activity
            e.n.helper_runs += 1
            engine_poll(e, BURST)
            if e.attention or e.stop:
                break
        if e.driving or not e.watched:
            # Callers were here a moment ago? Then nap, and look whether they were again.
            until = clock_now() + nap
            ts.tv_sec = until // 1000000000
            ts.tv_nsec = until % 1000000000
            pthread_cond_timedwait(&e.helper_cond, &e.lock, &ts)
            if e.driving or e.activity != seen:
                nap = min(2 * nap, NAP_MAX_NS)
                continue
        nap = NAP_NS
        if e.bufs.dead != NULL:
            break                          # held objects wait for their decref
        # Nobody: drive until a caller takes over.
        e.helper = HELPER_POLLS
        e.driving = 1
        while e.helper == HELPER_POLLS and not e.stop and not e.attention and e.bufs.dead == NULL:
            if engine_poll(e, BURST):
                continue
            until = engine_deadline(e)
            if until > e.now_ns:
                sleep_in_poll(e, e.helper_fd, until, NULL)
        if e.helper == HELPER_POLLS:
            e.helper = HELPER_NAPS
            e.driving = 0
            promote_next(e)
    e.helper = HELPER_RUNS
    engine_unlock(e)
