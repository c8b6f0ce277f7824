# Many sessions and descriptors waited for at once. What the engine does for it: engine_polls.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from ulnet.stack.engine_core cimport engine, poll_item, poll_set, wait_side

cdef class Part:                     # the sessions of one engine
    cdef poll_set set
    cdef engine *e
    cdef object engine               # keeps e alive
    cdef int number                  # of its descriptor in the side; -1: it has none

cdef class Entry:                    # one registration
    cdef object what                 # a Session, held weakly, or a descriptor
    cdef object data
    cdef uint32_t events
    cdef uint64_t key                # of a session
    cdef size_t address              # of a session
    cdef int fd                      # in the side; -1: none
    cdef poll_item *item
    cdef Part part
    cdef tuple told                  # (data, what told_bits means) of the last time it was ready, or None
    cdef uint32_t told_bits
    cdef int tell(self, uint32_t bits, bint as_selector, list out) except -1

cdef class PollSet:
    cdef wait_side side
    cdef list parts
    cdef Part driven                 # the engine that a wait drives; None: none yet
    cdef dict by_key                 # Entry of sessions
    cdef dict by_session             # the same, by the session's address
    cdef dict by_fd                  # Entry of descriptors
    cdef dict part_by_fd
    cdef uint64_t next_key
    cdef readonly bint closed
    cdef public bint as_epoll
    cdef public bint as_selector
    cdef readonly uint64_t side_looks  # system calls made to look at descriptors
    cdef object __weakref__
    cdef void release_all(self) noexcept
    cdef Part part_of(self, object engine, engine *e)
    cdef int show_part(self, Part part) except -1
    cdef int forget_gone(self) except -1
    cdef int check(self) except -1
    cdef Entry find(self, object what)
    cdef int remove(self, Entry entry) except -1
    cdef int take(self, Part part, list out, int room) except -1
    cdef int look_aside(self, list out, int room, bint driven_taken) except -1
    cdef list wait_aside(self, int64_t timeout_ns, int64_t deadline, int max_events)
