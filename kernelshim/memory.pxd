# The in-memory link: a wire within one process, from a queue to a queue.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ulnet.kernelshim.link cimport Link

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

ctypedef struct mem_frame:
    uint8_t *data               # owned by the slot, kept for the next frame when the slot is free
    uint32_t room_bytes
    uint32_t len_bytes
    uint16_t flags
    uint16_t gso_size_bytes

# Where frames arrive. Shared by its own end (which receives) and the other end (which sends).
ctypedef struct mem_port:
    pthread_mutex_t lock
    int users                   # ends that still hold it; under the lock
    bint closed
    bint signalled              # the eventfd is readable
    int fd
    mem_frame *frames           # by slot number; grows, since frames received may be held for long
    uint32_t *free_slots        # stack of slots without a frame
    uint32_t frames_len, free_len
    uint32_t large_kept         # free slots that keep a large buffer
    uint32_t *queue             # ring of slots waiting for recv()
    uint32_t queue_len, queue_head, queue_count
    uint64_t rx_frames, rx_bytes, dropped_full, dropped_closed, dropped_memory

# One end: the context of its link table.
ctypedef struct mem_end:
    mem_port *mine
    mem_port *peer
    uint32_t mtu_bytes
    uint32_t features
    uint64_t tx_frames, tx_bytes, refused   # atomic: two threads may send, to two ports

cdef class MemoryLink(Link):
    cdef mem_end *end
