# The faulty link: any link, with seeded loss, duplication, reordering, corruption, delay and a limited rate.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ulnet.kernelshim.link cimport Link, ul_link
from ulnet.kernelshim.memory cimport pthread_mutex_t

# A packet under way. Owned by the heap of its direction, then (received) by a slot until release().
ctypedef struct fault_packet:
    int64_t due_ns
    uint64_t number             # tie-break: packets due at the same time keep their order
    uint32_t slot               # of a packet handed out
    uint32_t len_bytes
    uint16_t flags
    uint8_t data[1]             # len_bytes of them

ctypedef struct fault_rates:
    # Probabilities as 32-bit fractions of 2^32 (2^32 itself: always)
    uint64_t loss, duplicate, reorder, corrupt
    int64_t delay_ns, jitter_ns, reorder_ns
    uint64_t rate_bps           # 0: unlimited
    uint64_t queue_bytes        # what may wait for the limited rate

ctypedef struct fault_path:
    fault_rates rates
    uint64_t random             # generator state, one a direction: neither's traffic changes the other's faults
    fault_packet **heap         # by due time
    uint32_t heap_len, heap_room
    uint64_t next_number
    int64_t last_due_ns         # jitter alone keeps the order
    int64_t busy_until_ns       # the limited rate's wire
    uint64_t packets, bytes, lost, duplicated, reordered, corrupted, overflowed, failed

ctypedef struct fault_state:
    const ul_link *inner
    pthread_mutex_t lock        # of everything below
    bint is_virtual             # time is what deferred_ns() or advance() last told
    bint closed
    int64_t now_ns
    fault_path tx
    fault_path rx
    fault_packet **held         # by slot: packets handed out and not yet released
    uint32_t *free_slots
    uint32_t held_len, free_len
    uint8_t *whole              # a gathered frame
    uint8_t *piece              # one packet cut from it

cdef class FaultLink(Link):
    cdef fault_state *state
    cdef Link inner
    cdef readonly object seed
