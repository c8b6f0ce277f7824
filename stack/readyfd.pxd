# A kernel descriptor that tells select, poll and epoll the truth about a session. Made at the first fileno().

from libc.stdint cimport uint32_t, uint64_t

ctypedef struct readyfd:
    int user_fd                  # what fileno() gives
    int our_fd                   # its other end
    uint32_t shown               # UL_READABLE | UL_WRITABLE | UL_HUP | UL_RDHUP | UL_ERROR as shown now
    uint64_t syscalls

cdef readyfd *readyfd_new(int *err) noexcept nogil
cdef void readyfd_show(readyfd *r, uint32_t ready) noexcept nogil    # no system call when nothing changed
cdef void readyfd_blocking(readyfd *r, bint blocking) noexcept nogil  # O_NONBLOCK as the user sees it
cdef void readyfd_free(readyfd *r) noexcept nogil                    # closes both ends
