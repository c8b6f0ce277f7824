# A kernel descriptor that tells select, poll and epoll the truth about a session. Made at the first fileno().

from libc.stdint cimport uint8_t, uint32_t, uint64_t

ctypedef struct readyfd:
    int user_fd                  # what fileno() gives
    int our_fd                   # its other end
    uint32_t shown               # UL_READABLE | UL_WRITABLE | UL_HUP | UL_RDHUP | UL_ERROR as shown now
    uint64_t syscalls
    uint8_t datagram             # SOCK_SEQPACKET: each message keeps its bounds
    uint8_t surrendered          # it carries real data now, somebody else has our end: nothing is shown
    uint8_t quiet                # only its number is in use: there is no pair yet, nothing is shown

cdef readyfd *readyfd_new(bint datagram, int *err) noexcept nogil
cdef readyfd *readyfd_reserve(bint datagram, int *err) noexcept nogil    # a quiet one
cdef int readyfd_steer(readyfd *r) noexcept nogil                    # quiet no more; 0, or -errno: it stays so
# A pair whose other end somebody else manages, from its user's end (taken over).
cdef readyfd *readyfd_adopt(int user_fd, bint datagram) noexcept nogil
# From showing readiness to carrying data: the pair is empty and wide, r.our_fd the caller's to take. `fresh`: what it
# shows cannot be taken back, yet data has to follow: a new pair under the same number. 0, or -errno: nothing happened.
cdef int readyfd_surrender(readyfd *r, bint fresh) noexcept nogil
# And back. The user's end has been read empty.
cdef void readyfd_regain(readyfd *r, int our_fd) noexcept nogil
# A new pair under the user's number, which says writable. False: there is no descriptor left, nothing happened.
cdef bint readyfd_renew(readyfd *r) noexcept nogil
cdef void readyfd_show(readyfd *r, uint32_t ready) noexcept nogil    # no system call when nothing changed
cdef void readyfd_free(readyfd *r) noexcept nogil                    # closes both ends
