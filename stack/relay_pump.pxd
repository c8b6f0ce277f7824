# One relay: a session of this engine whose user sits behind an AF_UNIX descriptor. Called under the engine's lock.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from ulnet.stack.buf cimport txchunk
from ulnet.stack.engine_core cimport engine, ul_session

cdef enum:
    RELAY_STREAM = 1         # TCP over SOCK_STREAM
    RELAY_DATAGRAMS = 2      # UDP over SOCK_SEQPACKET: 16 bytes address, 2 port (big endian), payload
    RELAY_LISTENER = 3       # numbers of connections over SOCK_STREAM
    TOLD_HUNG = 1            # the last copy of the user's end is closed, or both directions are over
    TOLD_RESET = 2           # the same, with data unread
    TOLD_ENDED = 4           # the connection died, and all that came before has been handed on
    TOLD_ROOM = 8            # announcing works again

ctypedef struct relay:
    ul_session *s
    int fd
    uint8_t kind
    uint8_t in_ready         # the descriptor may have something: nobody has seen EAGAIN since
    uint8_t out_ready        # it may take something
    uint8_t hup              # it said EPOLLHUP
    uint8_t up_full          # the session's send buffer took no more
    uint8_t up_done          # the user's direction has ended
    uint8_t down_done        # the peer's direction has ended, and the user was told
    uint8_t down_shut        # the user reads no more: what comes is dropped
    uint8_t want_room        # an announcement did not fit
    uint32_t told            # NEWS_*
    uint32_t unit            # what one announcement occupies in the kernel's accounting
    uint8_t *held            # a datagram that waits for its first hop or for the link
    uint32_t held_bytes
    uint64_t up_bytes
    uint64_t down_bytes
    uint64_t up_datagrams
    uint64_t down_datagrams
    uint64_t up_blocked      # times that the session's buffer was full
    uint64_t down_blocked    # times that the descriptor was full
    uint64_t dropped         # bytes the other side did not want any more, and what could not be sent
    uint64_t malformed       # messages of the user that are none

cdef enum:                   # what a pump says
    RELAY_IDLE = 0           # nothing to do until an edge, or until the session changes
    RELAY_MORE = 1
    RELAY_LATER = 2          # the link or the kernel was full: in a moment
    RELAY_SCRATCH_BYTES = 18 + 65507 + 1

# Before the first pump.
cdef void relay_start(relay *r) noexcept nogil
# A bounded part of what can be moved. *spare: a block for the send queue, kept from call to call (NULL: none yet).
cdef int relay_pump(engine *e, relay *r, txchunk **spare, uint8_t *scratch) noexcept nogil
# All that the user has written goes into the session, whatever its send buffer's limit.
cdef void relay_drain(engine *e, relay *r, txchunk **spare, uint8_t *scratch) noexcept nogil
# A listener's: whether the number went out, and how many nobody has read.
cdef int relay_announce(engine *e, relay *r, uint64_t number) noexcept nogil
cdef uint32_t relay_unread(const relay *r) noexcept nogil
# Nobody is behind the descriptor any more. `error`: what recv said, 0 for nothing.
cdef void relay_hang_up(engine *e, relay *r, int error) noexcept nogil
