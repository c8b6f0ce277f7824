# The capturing link: any link, with a pcap file of what passes.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ulnet.kernelshim.link cimport Link, ul_link
from ulnet.kernelshim.memory cimport pthread_mutex_t

ctypedef struct cap_state:
    const ul_link *inner
    pthread_mutex_t lock        # of everything below
    bint open
    bint raw                    # write frames as the link saw them
    bint is_virtual             # time is what deferred_ns() was last told
    int fd                      # -1: the owner's file object takes the bytes
    void *owner                 # CaptureLink, borrowed
    int64_t now_ns
    int64_t flushed_ns
    uint32_t snaplen_bytes
    uint8_t *buffer
    uint32_t room_bytes, used_bytes
    uint8_t *whole              # a gathered or copied frame
    uint8_t *piece              # one packet cut from it
    uint64_t frames, packets, bytes, failed
    int last_error

cdef class CaptureLink(Link):
    cdef cap_state *state
    cdef Link inner
    cdef object file
    cdef bint owns_fd
    cdef int write_out(self, const uint8_t *data, uint32_t size) except -1
