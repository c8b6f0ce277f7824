"""An engine across fork(2): what has to be still while the process is copied, and what a child may keep of it.

Order: all sessions are shared (Session.share_begin) -> fork_prepare -> fork(2) -> fork_parent, or fork_child in the
child, whose link is closed by its owner. The parent goes on as if nothing had happened.

The child has one thread, so waiters, driver and helper are gone; their locks and conditions are in any state and are
made anew. It shares ring, status page, event descriptors and steered pairs with its parent: it must not touch them.
"""

from libc.errno cimport EBADF, EBUSY, ENOMEM
from libc.stdint cimport uint32_t
from posix.unistd cimport close

from ulnet.kernelshim.link cimport UL_LINK_EVACUATE, ul_link, ul_rx, ul_tx
from ulnet.stack.buf cimport bufpool_evacuate, rxseg
from ulnet.stack.engine_core cimport (
    HELPER_NONE, PHASE_CONNECTING, ROLE_ENDED, ROLE_FOREIGN, ROLE_SHARED, ROLE_SHELL, ROLE_STAYED, engine,
    engine_settle, engine_tick, pthread_t, session_new, session_ready, ul_session,
)
from ulnet.stack.engine_polls cimport polls_closed
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock, engine_wait_end, engine_wait_init
from ulnet.stack.readyfd cimport readyfd_free, readyfd_renew, readyfd_show
from ulnet.stack.session_shared cimport shared_wake

cdef extern from "<pthread.h>" nogil:
    pthread_t pthread_self()

cdef ul_link no_link                         # of an engine that stayed with the parent


cdef int no_send(void *ctx, const ul_tx *frame) noexcept nogil:
    return -EBADF


cdef int no_recv(void *ctx, ul_rx *frame) noexcept nogil:
    return 0


cdef void no_release(void *ctx, uint32_t slot) noexcept nogil:
    pass


cdef void fork_prepare(engine *e) noexcept nogil:
    engine_lock(e)
    engine_tick(e)
    if e.touched != NULL:
        engine_settle(e)
    bufpool_evacuate(&e.bufs)
    e.fork_thread = pthread_self()
    e.fork_depth = 1


cdef void fork_parent(engine *e) noexcept nogil:
    e.fork_depth = 0
    engine_unlock(e)


cdef void fork_child(engine *e) noexcept nogil:
    cdef ul_session *s
    cdef rxseg *seg
    cdef bint ring = (e.link.features & UL_LINK_EVACUATE) != 0
    e.fork_depth = 0
    e.contenders = 0
    engine_wait_end(e)                       # the event descriptors are the parent's, too
    engine_wait_init(e)
    engine_wait_end(e)                       # and nobody sleeps here
    e.wake_fd = -1
    e.helper_fd = -1
    e.broken = 1
    e.stop = 1
    e.driving = 0
    e.helper = HELPER_NONE
    e.sleep_until_ns = 0
    e.waiters = NULL
    e.attention = 0
    e.watched = 0
    no_link.fd = no_link.large_fd = -1
    no_link.send = no_send
    no_link.recv = no_recv
    no_link.release = no_release
    no_link.mtu_bytes = e.link.mtu_bytes
    e.link = &no_link
    e.bufs.link = NULL                       # releasing a slot only drops memory
    seg = e.bufs.held_head if ring else NULL
    while seg != NULL:                       # what could not be moved to private memory is not there
        seg.len_bytes = 0
        seg = seg.held_next
    e.heap_len = 0
    e.touched = NULL
    s = e.all
    while s != NULL:
        s.waiters = NULL
        s.touched = 0
        s.heap_index = 0
        s.stat = NULL
        if s.shared_wake >= 0:
            close(s.shared_wake)
            s.shared_wake = -1
        if s.role == ROLE_ENDED or (s.role == ROLE_SHELL and s.phase != PHASE_CONNECTING):
            if s.fd != NULL and readyfd_renew(s.fd):
                readyfd_show(s.fd, session_ready(s))
        elif s.role != ROLE_SHARED and s.role != ROLE_FOREIGN:
            s.role = ROLE_STAYED
            readyfd_free(s.fd)
            s.fd = NULL
        s = s.all_next


cdef ul_session *session_rebind(engine *e, ul_session *s, engine *into, int *err) noexcept nogil:
    cdef ul_session *moved = NULL
    engine_lock(e)
    if s.closing:
        err[0] = -EBADF
    elif s.role != ROLE_SHARED and s.role != ROLE_SHELL and s.role != ROLE_ENDED:
        err[0] = -EBUSY
    else:
        engine_lock(into)
        moved = session_new(into, s.flow.proto)
        if moved == NULL:
            err[0] = -ENOMEM
        else:
            polls_closed(e, s)                   # the sets are the parent's
            moved.flow = s.flow
            moved.id = s.id
            moved.role = s.role
            moved.phase = s.phase
            moved.tos = s.tos
            moved.ttl = s.ttl
            moved.shut_rd = s.shut_rd
            moved.shared_as = s.shared_as
            moved.shared_shut_wr = s.shared_shut_wr
            moved.so_error = s.so_error
            moved.backlog = s.backlog
            moved.cfg = s.cfg
            moved.handle = s.handle
            s.handle = NULL
            moved.fd = s.fd
            s.fd = NULL
            if moved.fd != NULL and not moved.fd.surrendered and not moved.fd.quiet:
                into.watched += 1
                if e.watched:
                    e.watched -= 1
            s.role = ROLE_SHARED
            shared_wake(s)
        engine_unlock(into)
    engine_unlock(e)
    return moved
