# Buffers of one stack: received segments (in link slots or on the heap) and queues of bytes to send.
#
# One owner of each byte:
#   rxseg   payload lies in a link slot (origin SLOT, the rxseg owns the slot until rxseg_free) or in
#           the rxseg's own heap block (HEAP). Small payloads are always copied, so that slots return
#           at once. `lent` segments are referenced by a Python buffer: never moved, never reused.
#   txchunk bytes copied into its own block, or a view of a Python object held by `owner` (a strong
#           reference; given back through bufpool.dead when dropped without the GIL).
# When the link's ring comes close to the oldest held slot, bufpool_relieve() copies queued payloads
# to the heap and lets the link evacuate lent ones, so that a slow reader never stops the ring.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport iovec, ul_link, ul_rx
from ulnet.stack.types cimport ul_addr

cdef enum:
    RXSEG_HEAP = 0
    RXSEG_SLOT = 1
    RXSEG_EVACUATED = 2              # lent, its slot no longer blocks the ring; released by rxseg_free
    BUF_CLASSES = 4                  # block sizes kept on freelists
    BUF_CLASS_NONE = 254             # no block beside the header
    BUF_CLASS_MALLOC = 255           # larger than every class
    RX_COPY_BELOW_BYTES = 4096       # smaller payloads are copied out of their slot

ctypedef struct rxseg:
    rxseg *next
    rxseg *held_prev                 # bufpool's list of held slots, oldest first
    rxseg *held_next
    uint8_t *data                    # first unread byte
    uint32_t len_bytes               # unread bytes
    uint32_t cap_bytes               # HEAP: room behind data+len for more bytes of the same stream
    uint32_t slot
    uint32_t seq                     # TCP: sequence number of data[0]
    uint8_t origin
    uint8_t lent
    uint16_t rport                   # UDP: sender
    ul_addr raddr
    uint8_t *block                   # HEAP: the block beside the header that data points into, or NULL
    uint32_t mem_bytes               # charged to the queue when it was made
    uint8_t block_class

ctypedef struct rxqueue:
    rxseg *head
    rxseg *tail
    uint64_t len_bytes               # unread payload
    uint64_t mem_bytes               # what the queue really holds (blocks, slots)
    uint32_t count

ctypedef struct txchunk:
    txchunk *next
    const uint8_t *data
    uint32_t len_bytes
    uint32_t cap_bytes               # size of the own block; 0: held object, no room
    void *owner                      # PyObject*, or NULL
    uint8_t block_class              # of the chunk itself, data included

ctypedef struct txqueue:
    txchunk *head
    txchunk *tail
    uint64_t len_bytes               # from the first unacknowledged byte to the last one written
    uint32_t head_off                # acknowledged bytes at the start of head
    txchunk *cur                     # cursor for txq_iov: a chunk, and where it begins
    uint64_t cur_at                  # counted from the first byte of head, acknowledged ones included

ctypedef struct bufpool:
    ul_link *link
    rxseg *held_head                 # held slots, oldest first
    rxseg *held_tail
    uint32_t held                    # slots held (queued or lent)
    uint32_t lent                    # segments lent to Python
    uint32_t last_slot               # slot most recently received: where the ring is now
    txchunk *dead                    # chunks whose owner awaits a decref with the GIL
    void *free_blocks[BUF_CLASSES]   # freelists, by size class
    uint32_t free_count[BUF_CLASSES]
    uint64_t live_blocks             # handed out and not back: 0 when nothing leaks
    uint64_t copied_bytes            # payload copied from slot to heap
    uint64_t evacuated               # slots evacuated under lent segments
    uint64_t nomem                   # allocations refused

cdef void bufpool_init(bufpool *p, ul_link *link) noexcept nogil
cdef void bufpool_destroy(bufpool *p) noexcept nogil
# Decref what was held. Needs the GIL.
cdef void bufpool_reap(bufpool *p)
# The blocks of a detached dead list whose owners were given back by the caller.
cdef void chunks_free(bufpool *p, txchunk *c) noexcept nogil
# Called once a burst: keep the ring from running into held slots.
cdef void bufpool_relieve(bufpool *p) noexcept nogil

# Before a fork: nothing lent or queued lies in the ring any more, as far as there is memory.
cdef void bufpool_evacuate(bufpool *p) noexcept nogil

# Append payload of `frame` at (data, n). Takes the frame's slot when it is worth it (*held = 1: the
# caller must not release it), else copies (coalescing into the tail when `stream`). 0 or -ENOMEM.
cdef int rxq_append(bufpool *p, rxqueue *q, const uint8_t *data, uint32_t n, uint32_t seq,
                    const ul_rx *frame, bint stream, bint *held) noexcept nogil
# Copy out and consume up to n bytes of a stream; peek leaves them. Returns the bytes copied.
cdef size_t rxq_read(bufpool *p, rxqueue *q, uint8_t *out, size_t n, bint peek) noexcept nogil
# Forget the first n bytes of a stream (n at most what there is): they were used where they lie.
cdef void rxq_drop(bufpool *p, rxqueue *q, size_t n) noexcept nogil
# Detach the first segment (at most max_bytes of it, the rest stays queued by copy); NULL if empty.
cdef rxseg *rxq_take(bufpool *p, rxqueue *q, size_t max_bytes) noexcept nogil
# A segment that stands in no queue (reassembly), made as rxq_append makes them; NULL: no memory.
cdef rxseg *rxseg_new(bufpool *p, const uint8_t *data, uint32_t n, uint32_t seq, const ul_rx *frame,
                      uint32_t room_bytes, bint *held) noexcept nogil
cdef void rxq_push(rxqueue *q, rxseg *s) noexcept nogil
cdef void rxseg_free(bufpool *p, rxseg *s) noexcept nogil
cdef void rxq_clear(bufpool *p, rxqueue *q) noexcept nogil

cdef int txq_append_copy(bufpool *p, txqueue *q, const uint8_t *data, size_t n) noexcept nogil
# Takes a reference to owner (GIL held by the caller).
cdef int txq_append_hold(bufpool *p, txqueue *q, const uint8_t *data, size_t n, object owner)
# A block of 64 KiB in no queue (len_bytes 0: its owner fills it), into a queue, or back. NULL: no memory.
cdef txchunk *txchunk_new(bufpool *p) noexcept nogil
cdef void txq_append_chunk(txqueue *q, txchunk *c) noexcept nogil
cdef void txchunk_free(bufpool *p, txchunk *c) noexcept nogil
cdef void txq_drop(bufpool *p, txqueue *q, uint64_t n) noexcept nogil
# Fill iov with bytes [off, off+n) of the queue; returns the pieces used (at most max_iov) and in
# *filled_bytes how much they cover.
cdef int txq_iov(txqueue *q, uint64_t off, uint32_t n, iovec *iov, int max_iov, uint32_t *filled_bytes) noexcept nogil
cdef void txq_copy_out(txqueue *q, uint64_t off, uint64_t n, uint8_t *out) noexcept nogil
cdef void txq_clear(bufpool *p, txqueue *q) noexcept nogil
