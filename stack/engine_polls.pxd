# Sets of sessions that somebody waits for, on the engine's side. No GIL; the engine's lock held, but for side_fd.
#
# Call order: poll_set_open; items come and go by item_*; the end of a burst calls polls_show for each session that is
# watched; who waits (engine_wait on set.s) takes what is ready by poll_set_collect. A ready session stays in the ready
# list until a look finds it no longer ready, so the set is level-triggered and a wait costs O(ready).

from libc.stdint cimport uint32_t, uint64_t
from ulnet.stack.engine_core cimport engine, poll_item, poll_set, ul_session, wait_side

cdef enum:
    # Keys of items in the side's epoll have this bit, descriptors by themselves have not.
    KEY_BIT_SHIFT = 63

ctypedef struct poll_hit:
    uint64_t key
    uint32_t events

cdef int poll_set_open(poll_set *set, engine *e, wait_side *side) noexcept nogil
cdef void poll_set_close(poll_set *set) noexcept nogil
cdef int poll_set_collect(poll_set *set, poll_hit *hits, int room) noexcept nogil
cdef int poll_set_number(poll_set *set, int *err) noexcept nogil       # a descriptor, readable while something is ready
cdef int item_add(poll_set *set, ul_session *s, uint64_t key, uint32_t events, poll_item **out) noexcept nogil
cdef int item_modify(poll_item *item, uint32_t events) noexcept nogil
cdef void item_remove(poll_item *item) noexcept nogil                  # and free it
cdef poll_item *poll_set_next_gone(poll_set *set) noexcept nogil       # off the list; item_remove() frees it

# The engine's hooks
cdef void polls_show(engine *e, ul_session *s, uint32_t ready) noexcept nogil
cdef void polls_closed(engine *e, ul_session *s) noexcept nogil
# The session was placed in the server (role SHARED, its descriptor carries the data now), or came back.
cdef void pollset_session_moved(engine *e, ul_session *s) noexcept nogil

cdef int side_fd(wait_side *side) noexcept nogil                       # the epoll, made at the first call; or -errno
cdef int side_watch(wait_side *side, int fd, uint32_t events, uint64_t key) noexcept nogil
