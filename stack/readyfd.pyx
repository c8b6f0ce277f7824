"""A kernel descriptor that tells select, poll and epoll the truth about a session of ours.

It is one end of an AF_UNIX pair (stream for TCP, seqpacket for UDP), whose four readable/writable combinations we steer from both ends
(an eventfd cannot say "neither"):

===========  ==========================================================  ==========================
shown        how                                                         undone by
===========  ==========================================================  ==========================
readable     a byte waits in the user's end (sent from ours)             receiving it
not          bytes sent by the user's end wait in ours: one message is   receiving them
writable     more than its tiny send buffer (unix(7), SO_SNDBUF)
RDHUP        our end shut for writing                                    a new pair (below)
HUP          our end shut both ways                                      a new pair
error + HUP  our end closed with unread data: ECONNRESET (unix(7))       a new pair
===========  ==========================================================  ==========================

Each change is one system call and makes exactly the edge that epoll's EPOLLET promises; showing what is shown
already makes none. So show() belongs behind every change of the session, a read by the user included.

differs: an AF_UNIX socket cannot take RDHUP, HUP or an error back. Sessions do not either, but a socket may be
connected anew after a failure: then a fresh pair is put under the same number (dup3). select and poll do not
notice; an epoll registration ends with the old pair and has to be made again.
differs: a passing error without a hang-up (UDP: an ICMP error waits) shows as readable and writable, as select
shows any error; the call that follows gets it.

A session that is placed in the server, to be used by several processes, keeps the very same open file at its user's
end, so that registrations stay true: the pair is *surrendered*, which empties and widens it, and its other end goes to
the server, which moves the session's real data through it; *regained*, it shows readiness again.

The descriptor is the user's own: a program that reads, writes or closes it by hand confuses only itself.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from ulnet.stack.types cimport UL_ERROR, UL_HUP, UL_RDHUP, UL_READABLE, UL_WRITABLE

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_UNIX
    enum: SOCK_STREAM
    enum: SOCK_SEQPACKET
    enum: SOCK_CLOEXEC
    enum: SOCK_NONBLOCK
    enum: SOL_SOCKET
    enum: SO_SNDBUF
    enum: SO_ERROR
    enum: SHUT_RDWR
    enum: SHUT_WR
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    ctypedef unsigned int socklen_t
    int socketpair(int domain, int type, int protocol, int *fds)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
    int shutdown(int fd, int how)
    ssize_t c_send "send"(int fd, const void *buf, size_t n, int flags)
    ssize_t c_recv "recv"(int fd, void *buf, size_t n, int flags)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <unistd.h>
    #include <poll.h>
    extern int dup3(int, int, int);
    """
    int dup3(int old, int new, int flags) nogil
    int fcntl(int fd, int command, ...) nogil
    enum: O_CLOEXEC
    enum: F_GETFD
    enum: FD_CLOEXEC
    enum: POLLRDHUP

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum: EFD_CLOEXEC
    enum: EFD_NONBLOCK

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    enum: POLLOUT
    enum: POLLHUP
    enum: POLLERR
    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd *fds, unsigned long n, int timeout_ms)

cdef enum:
    ALL_BITS = UL_READABLE | UL_WRITABLE | UL_HUP | UL_RDHUP | UL_ERROR
    FILL_MAX_BYTES = 16384
    WIDE_BYTES = 1 << 20         # of each end's send buffer while real data passes; net.core.wmem_max may allow less

# Bytes of one message that fills the smallest send buffer this kernel allows, of a stream and of a seqpacket pair. The
# kernel accounts whole allocations (skb truesize), so this is measured once, at the first pair of each type.
cdef uint32_t fill_bytes[2]
cdef char zeros[FILL_MAX_BYTES]


cdef int pair_new(bint datagram, int *user_fd, int *our_fd) noexcept nogil:
    cdef int fds[2]
    cdef int tiny = 1            # the kernel raises it to its minimum
    cdef int kind = SOCK_SEQPACKET if datagram else SOCK_STREAM
    if socketpair(AF_UNIX, kind | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) < 0:
        return -errno
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &tiny, sizeof(tiny))
    if fill_bytes[datagram] == 0:
        fill_bytes[datagram] = fill_measure(fds[0], fds[1])
    user_fd[0] = fds[0]
    our_fd[0] = fds[1]
    return 0


cdef uint32_t fill_measure(int user_fd, int our_fd) noexcept nogil:
    # Smallest power of two that makes an empty pair not writable.
    cdef pollfd p
    cdef char scratch[FILL_MAX_BYTES]
    cdef uint32_t n = 64
    while n < FILL_MAX_BYTES:
        if c_send(user_fd, zeros, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
            break
        p.fd = user_fd
        p.events = POLLOUT
        p.revents = 0
        c_poll(&p, 1, 0)
        c_recv(our_fd, scratch, FILL_MAX_BYTES, MSG_DONTWAIT)
        if not p.revents & POLLOUT:
            return n
        n *= 2
    return n


cdef inline void drain(int fd, size_t expected) noexcept nogil:
    # Usually one call; more only if the user wrote to or read from the descriptor by hand.
    cdef char scratch[FILL_MAX_BYTES]
    cdef ssize_t got
    cdef int turns
    for turns in range(64):
        got = c_recv(fd, scratch, FILL_MAX_BYTES, MSG_DONTWAIT)
        if got == <ssize_t>expected or (got <= 0 and not (got < 0 and errno == EINTR)):
            return


cdef inline void drain_all(int fd) noexcept nogil:
    # Whatever is in it. The bound is for a user who keeps writing to his end by hand meanwhile.
    cdef char scratch[FILL_MAX_BYTES]
    cdef ssize_t got
    cdef int turns
    for turns in range(1024):
        got = c_recv(fd, scratch, FILL_MAX_BYTES, MSG_DONTWAIT)
        if got == 0 or (got < 0 and errno != EINTR):
            return


cdef inline uint32_t as_shown(uint32_t ready) noexcept nogil:
    # What a pair can show of it: hang-ups imply each other as in tcp_poll() of Linux.
    ready &= ALL_BITS
    if ready & UL_ERROR:
        ready |= UL_READABLE | UL_WRITABLE
        if not ready & UL_HUP:
            ready &= ~<uint32_t>UL_ERROR
    if ready & UL_HUP:
        ready |= UL_RDHUP | UL_WRITABLE
    if ready & UL_RDHUP:
        ready |= UL_READABLE
    return ready


cdef readyfd *readyfd_new(bint datagram, int *err) noexcept nogil:
    cdef readyfd *r = <readyfd *>calloc(1, sizeof(readyfd))
    if r == NULL:
        err[0] = -12                             # ENOMEM
        return NULL
    r.datagram = datagram
    err[0] = pair_new(datagram, &r.user_fd, &r.our_fd)
    if err[0] < 0:
        free(r)
        return NULL
    r.shown = UL_WRITABLE
    r.syscalls = 2
    return r


cdef readyfd *readyfd_adopt(int user_fd, bint datagram) noexcept nogil:
    cdef int err = 0
    cdef readyfd *r
    if fill_bytes[datagram] == 0:
        readyfd_free(readyfd_new(datagram, &err))    # measures it
    if fill_bytes[datagram] == 0:
        return NULL
    r = <readyfd *>calloc(1, sizeof(readyfd))
    if r != NULL:
        r.user_fd = user_fd
        r.our_fd = -1
        r.datagram = datagram
        r.surrendered = 1
    return r


cdef readyfd *readyfd_reserve(bint datagram, int *err) noexcept nogil:
    # One descriptor and one system call instead of two: whoever only needs a name may have ten thousand of them.
    cdef readyfd *r = <readyfd *>calloc(1, sizeof(readyfd))
    if r == NULL:
        err[0] = -12                             # ENOMEM
        return NULL
    r.user_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if r.user_fd < 0:
        err[0] = -errno
        free(r)
        return NULL
    r.our_fd = -1
    r.datagram = datagram
    r.quiet = 1
    r.syscalls = 1
    return r


cdef int readyfd_steer(readyfd *r) noexcept nogil:
    if not readyfd_renew(r):
        return -24                               # EMFILE
    r.quiet = 0
    return 0


cdef bint readyfd_renew(readyfd *r) noexcept nogil:
    # Whoever sleeps on the old one wakes by its hang-up.
    cdef int user_fd = -1
    cdef int our_fd = -1
    cdef int flags
    if pair_new(r.datagram, &user_fd, &our_fd) < 0:
        return False                             # out of descriptors: the old truth stays
    flags = fcntl(r.user_fd, F_GETFD)            # the program may have made it inheritable
    if dup3(user_fd, r.user_fd, O_CLOEXEC if flags < 0 or flags & FD_CLOEXEC else 0) < 0:
        c_close(user_fd)
        c_close(our_fd)
        return False
    c_close(user_fd)
    if r.our_fd >= 0:
        c_close(r.our_fd)
    r.our_fd = our_fd
    r.shown = UL_WRITABLE
    r.syscalls += 6
    return True


cdef void width(int fd, int bytes) noexcept nogil:
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes))


cdef int readyfd_surrender(readyfd *r, bint fresh) noexcept nogil:
    if (fresh or r.our_fd < 0) and not readyfd_renew(r):
        return -24                               # EMFILE
    r.quiet = 0
    drain_all(r.our_fd)
    drain_all(r.user_fd)
    width(r.user_fd, WIDE_BYTES)
    width(r.our_fd, WIDE_BYTES)
    r.surrendered = 1
    return 0


cdef void readyfd_regain(readyfd *r, int our_fd) noexcept nogil:
    # What it shows is read off the pair, because its other end was somebody else's: half shut, or worse.
    cdef pollfd p
    r.our_fd = our_fd
    drain_all(our_fd)
    drain_all(r.user_fd)
    width(r.user_fd, 1)
    p.fd = r.user_fd
    p.events = POLLIN | POLLOUT | POLLRDHUP
    p.revents = 0
    c_poll(&p, 1, 0)
    r.shown = UL_WRITABLE if p.revents & POLLOUT else 0
    if p.revents & POLLRDHUP:
        r.shown |= UL_RDHUP
    if p.revents & POLLHUP:
        r.shown |= UL_HUP
    if p.revents & POLLERR:
        r.shown |= UL_ERROR | UL_HUP
    r.shown = as_shown(r.shown)
    r.syscalls += 5
    r.surrendered = 0


cdef void readyfd_show(readyfd *r, uint32_t ready) noexcept nogil:
    cdef uint32_t want = as_shown(ready)
    cdef uint32_t change
    cdef int pending = 0
    cdef socklen_t size = sizeof(pending)
    if r.surrendered:
        return
    if want & UL_ERROR and r.shown & UL_HUP and not r.shown & UL_ERROR:
        want &= ~<uint32_t>UL_ERROR              # too late to show it; a hang-up is answered in the same way
    if r.quiet or want == r.shown:
        return
    if r.shown & UL_ERROR and want == (r.shown & ~<uint32_t>UL_ERROR):
        # The error was taken (SO_ERROR), the connection stays dead.
        getsockopt(r.user_fd, SOL_SOCKET, SO_ERROR, &pending, &size)
        r.shown = want
        r.syscalls += 1
        return
    if (r.shown & ~want & (UL_HUP | UL_RDHUP | UL_ERROR) or r.our_fd < 0) and not readyfd_renew(r):
        return
    change = want ^ r.shown
    if want & UL_ERROR:
        # All at once: closing our end with data unread in it. Its queue must hold something.
        if r.shown & UL_WRITABLE:
            c_send(r.user_fd, zeros, 1, MSG_DONTWAIT | MSG_NOSIGNAL)
            r.syscalls += 1
        c_close(r.our_fd)
        r.our_fd = -1
        r.syscalls += 1
        r.shown = want
        return
    if change & UL_READABLE and not want & UL_READABLE:
        drain(r.user_fd, 1)
        r.syscalls += 1
    if change & UL_WRITABLE:
        if want & UL_WRITABLE:
            drain(r.our_fd, fill_bytes[r.datagram])
        else:
            c_send(r.user_fd, zeros, fill_bytes[r.datagram], MSG_DONTWAIT | MSG_NOSIGNAL)
        r.syscalls += 1
    if change & UL_HUP:
        shutdown(r.our_fd, SHUT_RDWR)
        r.syscalls += 1
    elif change & UL_RDHUP:
        shutdown(r.our_fd, SHUT_WR)
        r.syscalls += 1
    elif change & UL_READABLE and want & UL_READABLE:
        # (A hang-up is readable by itself.)
        c_send(r.our_fd, zeros, 1, MSG_DONTWAIT | MSG_NOSIGNAL)
        r.syscalls += 1
    r.shown = want


cdef void readyfd_free(readyfd *r) noexcept nogil:
    if r == NULL:
        return
    if r.our_fd >= 0:
        c_close(r.our_fd)
    if r.user_fd >= 0:
        c_close(r.user_fd)
    free(r)


cdef class ReadyFd:
    """A descriptor by itself, for tests and for those who build their own sessions.

    ``show(mask)`` takes READABLE 1, WRITABLE 2, ERROR 4, HUP 8, RDHUP 16, as ``Session.ready`` gives them.
    ``datagram``: a pair that keeps the bounds of messages, for UDP.
    """

    cdef readyfd *r

    def __cinit__(self, *, bint datagram=False) -> None:
        cdef int err = 0
        self.r = readyfd_new(datagram, &err)
        if self.r == NULL:
            raise OSError(-err, "no descriptor for select and poll: socketpair() failed (see ulimit -n)")

    def __dealloc__(self) -> None:
        readyfd_free(self.r)

    cdef readyfd *_open(self) except NULL:
        if self.r == NULL:
            raise ValueError("this ReadyFd is closed")
        return self.r

    def fileno(self) -> int:
        """The descriptor to select, poll or epoll on."""
        return self._open().user_fd

    def show(self, ready: int) -> None:
        """Make the descriptor show these bits and no others."""
        readyfd_show(self._open(), ready)

    def surrender(self, *, bint fresh=False) -> int:
        """The pair carries data from now on, empty and wide: our end, which is the caller's now.

        ``fresh``: a new pair under the same number, for one that shows an end although data must follow. OSError.
        """
        cdef int fd
        cdef int rc
        if self._open().surrendered:
            raise ValueError("this ReadyFd was surrendered already")
        rc = readyfd_surrender(self.r, fresh)
        if rc < 0:
            raise OSError(-rc, "no descriptor for a new pair (see ulimit -n)")
        fd = self.r.our_fd
        self.r.our_fd = -1
        return fd

    def regain(self, int fd) -> None:
        """Our end (taken over) is back; what the pair still holds is dropped. It shows readiness again."""
        if not self._open().surrendered:
            raise ValueError("this ReadyFd was not surrendered")
        readyfd_regain(self.r, fd)

    @property
    def shown(self) -> int:
        """The bits shown now."""
        return self._open().shown

    @property
    def syscalls(self) -> int:
        """System calls made for it so far."""
        return self._open().syscalls

    def close(self) -> None:
        """Close both ends. Closing twice is fine."""
        readyfd_free(self.r)
        self.r = NULL
