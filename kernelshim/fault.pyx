"""The faulty link: wraps any link and does to its packets what networks do, replayable from a seed.

Call order: ``link = FaultLink(inner, seed, loss=0.01, delay_ns=5_000_000)``; use it as any other link.
Faults act on packets as a wire carries them: super-segments are cut and checksums completed first, so one loss is
one packet and a flipped bit is for the receiver's checksum to find. Each packet of a direction takes
the same number of random draws whatever is switched on, so changing one rate leaves the other faults where they were.

Time: the machine's monotonic clock, or with ``virtual=True`` whatever ``deferred_ns`` (or ``advance``) was last told.
Delayed packets move when the link is called; ``deferred_ns`` says when to call next.
Read first: tc-netem(8), whose model this is, except that jitter alone does not reorder.
"""

import os

from libc.errno cimport EAGAIN, EBADF, EINVAL, EMSGSIZE, ENOBUFS, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_OK,
    UL_FRAME_CSUM_PARTIAL,
    UL_FRAME_GSO_TCP4,
    UL_FRAME_GSO_UDP,
    UL_FRAME_UFO,
    UL_LINK_CSUM,
    UL_LINK_TSO,
    UL_LINK_UFO,
    UL_LINK_USO,
    Link,
    iovec,
    ul_link,
    ul_rx,
    ul_tx,
)
from ulnet.kernelshim.rawseg cimport (
    raw_complete,
    raw_fragment,
    raw_fragments,
    raw_layout,
    raw_parse,
    raw_piece,
    raw_pieces,
)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    ETHER_BYTES = 14
    FRAME_MAX_BYTES = 65535 + 14 + 64
    UNDER_WAY_MAX = 1 << 18     # packets a direction may hold; more are dropped and counted
    RETRY_NS = 50000            # when the inner link is full

cdef uint64_t ONE = <uint64_t>1 << 32


# -- chance and time -----------------------------------------------------------------------------------

cdef uint64_t draw(fault_path *path) noexcept nogil:
    """SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014)."""
    cdef uint64_t z
    path.random += <uint64_t>0x9E3779B97F4A7C15
    z = path.random
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef bint happens(fault_path *path, uint64_t chance) noexcept nogil:
    return (draw(path) >> 32) < chance


cdef int64_t fault_now(fault_state *state) noexcept nogil:
    cdef timespec now
    if not state.is_virtual:
        clock_gettime(CLOCK_MONOTONIC, &now)
        state.now_ns = <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
    return state.now_ns


# -- packets under way: a binary heap by due time ------------------------------------------------------

cdef bint before(const fault_packet *a, const fault_packet *b) noexcept nogil:
    return a.due_ns < b.due_ns or (a.due_ns == b.due_ns and a.number < b.number)


cdef int heap_push(fault_path *path, fault_packet *packet) noexcept nogil:
    cdef uint32_t at = path.heap_len
    cdef uint32_t up, room
    cdef fault_packet **heap
    if at == path.heap_room:
        room = path.heap_room * 2 if path.heap_room else 64
        heap = <fault_packet **>realloc(path.heap, room * sizeof(fault_packet *))
        if heap == NULL:
            return -ENOMEM
        path.heap = heap
        path.heap_room = room
    heap = path.heap
    path.heap_len += 1
    while at:
        up = (at - 1) // 2
        if not before(packet, heap[up]):
            break
        heap[at] = heap[up]
        at = up
    heap[at] = packet
    return 0


cdef fault_packet *heap_pop(fault_path *path) noexcept nogil:
    cdef fault_packet **heap = path.heap
    cdef fault_packet *top = heap[0]
    cdef fault_packet *last
    cdef uint32_t at = 0
    cdef uint32_t down
    path.heap_len -= 1
    if path.heap_len:
        last = heap[path.heap_len]
        while True:
            down = at * 2 + 1
            if down >= path.heap_len:
                break
            if down + 1 < path.heap_len and before(heap[down + 1], heap[down]):
                down += 1
            if not before(heap[down], last):
                break
            heap[at] = heap[down]
            at = down
        heap[at] = last
    return top


# -- what happens to one packet ------------------------------------------------------------------------

cdef void under_way(
    fault_path *path, const uint8_t *data, uint32_t size, uint16_t flags, int64_t due_ns, uint64_t bit
) noexcept nogil:
    """Put a copy on its way; ``bit`` is the bit to flip, or past the end."""
    cdef fault_packet *packet
    if path.heap_len >= UNDER_WAY_MAX:
        path.overflowed += 1
        return
    packet = <fault_packet *>malloc(sizeof(fault_packet) + size)
    if packet == NULL:
        path.overflowed += 1
        return
    packet.due_ns = due_ns
    packet.number = path.next_number
    path.next_number += 1
    packet.len_bytes = size
    packet.flags = flags
    memcpy(packet.data, data, size)
    if bit < <uint64_t>size * 8:
        packet.data[bit >> 3] ^= <uint8_t>(1 << (bit & 7))
    if heap_push(path, packet) < 0:
        free(packet)
        path.overflowed += 1


cdef void fault_packet_in(fault_path *path, const uint8_t *data, uint32_t size, uint16_t flags, int64_t now) noexcept nogil:
    cdef fault_rates *rates = &path.rates
    # Always all draws, in this order: see the head of the file.
    cdef bint lost = happens(path, rates.loss)
    cdef bint duplicated = happens(path, rates.duplicate)
    cdef bint reordered = happens(path, rates.reorder)
    cdef bint corrupted = happens(path, rates.corrupt)
    cdef uint64_t jitter = draw(path)
    cdef uint64_t where = draw(path)
    cdef uint64_t bit = <uint64_t>-1
    cdef int64_t due = now
    cdef int64_t waiting
    path.packets += 1
    path.bytes += size
    if rates.rate_bps:
        # A wire of that rate with a queue before it; loss happens behind, on the wire.
        if path.busy_until_ns < now:
            path.busy_until_ns = now
        waiting = path.busy_until_ns - now
        if <double>waiting * <double>rates.rate_bps / 8e9 > <double>rates.queue_bytes:
            path.overflowed += 1
            return
        path.busy_until_ns += <int64_t>(<double>size * 8e9 / <double>rates.rate_bps)
        due = path.busy_until_ns
    if lost:
        path.lost += 1
        return
    if corrupted and size > ETHER_BYTES:
        # Behind the Ethernet header, whose damage a receiver would not see as such; its own check finds it.
        bit = ETHER_BYTES * 8 + where % (<uint64_t>(size - ETHER_BYTES) * 8)
        flags &= ~<uint16_t>UL_FRAME_CSUM_OK
        path.corrupted += 1
    due += rates.delay_ns
    if rates.jitter_ns:
        due += <int64_t>(jitter % <uint64_t>(rates.jitter_ns + 1))
    if reordered:
        path.reordered += 1
        due += rates.reorder_ns
    else:
        if due < path.last_due_ns:
            due = path.last_due_ns
        path.last_due_ns = due
    under_way(path, data, size, flags, due, bit)
    if duplicated:
        path.duplicated += 1
        under_way(path, data, size, flags, due, bit)


cdef void fault_frame(
    fault_state *state, fault_path *path, uint8_t *data, uint32_t size, uint16_t flags, uint32_t gso
) noexcept nogil:
    """Cut a frame into what a wire carries, and each of it meets its fate. ``data`` may be changed."""
    cdef raw_layout at
    cdef uint32_t number, length
    cdef int64_t now = fault_now(state)
    cdef uint16_t plain = flags & UL_FRAME_CSUM_OK
    if (
        not flags & (UL_FRAME_CSUM_PARTIAL | UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP | UL_FRAME_UFO)
        or not raw_parse(data, size, &at)
    ):
        fault_packet_in(path, data, size, plain, now)
        return
    if flags & (UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP) and gso:
        for number in range(raw_pieces(&at, gso)):
            length = raw_piece(data, &at, gso, number, flags & UL_FRAME_CSUM_PARTIAL, state.piece)
            fault_packet_in(path, state.piece, length, plain, now)
        return
    if flags & UL_FRAME_CSUM_PARTIAL:
        raw_complete(data, &at)
    if flags & UL_FRAME_UFO and gso >= 8 and not at.v6:
        for number in range(raw_fragments(&at, gso)):
            length = raw_fragment(data, &at, gso, number, state.piece)
            fault_packet_in(path, state.piece, length, plain, now)
        return
    fault_packet_in(path, data, size, plain, now)


# -- moving what is due --------------------------------------------------------------------------------

cdef void transmit_due(fault_state *state, int64_t now) noexcept nogil:
    """Send on what has been delayed long enough."""
    cdef fault_path *path = &state.tx
    cdef fault_packet *packet
    cdef ul_tx tx
    cdef iovec piece
    cdef int code
    memset(&tx, 0, sizeof(tx))
    while path.heap_len and path.heap[0].due_ns <= now:
        packet = heap_pop(path)
        piece.iov_base = packet.data
        piece.iov_len = packet.len_bytes
        tx.iov = &piece
        tx.iov_count = 1
        tx.len_bytes = packet.len_bytes
        code = state.inner.send(state.inner.ctx, &tx)
        if code == -EAGAIN or code == -ENOBUFS:
            # Its number keeps it in front of those due at the same time.
            packet.due_ns = now + RETRY_NS
            if path.last_due_ns < packet.due_ns:
                path.last_due_ns = packet.due_ns
            if heap_push(path, packet) == 0:
                return
            code = -ENOMEM
        if code:
            path.failed += 1
        free(packet)


cdef void take_in(fault_state *state) noexcept nogil:
    """Take everything the inner link has; each frame's slot is given back at once."""
    cdef ul_rx rx
    cdef uint32_t size
    while state.inner.recv(state.inner.ctx, &rx) == 1:
        size = rx.len_bytes
        if size <= FRAME_MAX_BYTES:
            memcpy(state.whole, rx.data, size)
            fault_frame(state, &state.rx, state.whole, size, rx.flags, rx.gso_size_bytes)
        else:
            state.rx.failed += 1
        state.inner.release(state.inner.ctx, rx.slot)


cdef int hold(fault_state *state, fault_packet *packet) noexcept nogil:
    """Give the packet a slot until release()."""
    cdef uint32_t room, i
    cdef fault_packet **held
    cdef uint32_t *free_slots
    if state.free_len == 0:
        room = state.held_len * 2 if state.held_len else 64
        held = <fault_packet **>realloc(state.held, room * sizeof(fault_packet *))
        if held == NULL:
            return -ENOMEM
        state.held = held
        free_slots = <uint32_t *>realloc(state.free_slots, room * sizeof(uint32_t))
        if free_slots == NULL:
            return -ENOMEM
        state.free_slots = free_slots
        for i in range(state.held_len, room):
            held[i] = NULL
            free_slots[state.free_len] = i
            state.free_len += 1
        state.held_len = room
    state.free_len -= 1
    packet.slot = state.free_slots[state.free_len]
    state.held[packet.slot] = packet
    return 0


# -- the link table ------------------------------------------------------------------------------------

cdef int fault_send(void *ctx, const ul_tx *tx) noexcept nogil:
    cdef fault_state *state = <fault_state *>ctx
    cdef uint32_t at = 0
    cdef uint32_t wire
    cdef int i
    if tx.len_bytes > FRAME_MAX_BYTES:
        return -EMSGSIZE
    if tx.len_bytes < ETHER_BYTES or tx.iov_count < 1:
        return -EINVAL
    if tx.flags & (UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP):
        wire = <uint32_t>tx.hdr_len_bytes + tx.gso_size_bytes
        if tx.gso_size_bytes == 0:
            return -EINVAL
    else:
        wire = 0 if tx.flags & UL_FRAME_UFO else tx.len_bytes
    # The inner link would refuse it much later, when nobody is left to be told.
    if wire > state.inner.mtu_bytes + ETHER_BYTES:
        return -EMSGSIZE
    pthread_mutex_lock(&state.lock)
    if state.closed:
        pthread_mutex_unlock(&state.lock)
        return -EBADF
    for i in range(tx.iov_count):
        if at + tx.iov[i].iov_len > tx.len_bytes:
            break
        memcpy(state.whole + at, tx.iov[i].iov_base, tx.iov[i].iov_len)
        at += <uint32_t>tx.iov[i].iov_len
    fault_frame(state, &state.tx, state.whole, at, tx.flags & ~<uint16_t>UL_FRAME_CSUM_OK, tx.gso_size_bytes)
    transmit_due(state, state.now_ns)
    pthread_mutex_unlock(&state.lock)
    return 0


cdef int fault_recv(void *ctx, ul_rx *rx) noexcept nogil:
    cdef fault_state *state = <fault_state *>ctx
    cdef fault_path *path = &state.rx
    cdef fault_packet *packet
    cdef int64_t now
    cdef int got = 0
    pthread_mutex_lock(&state.lock)
    if not state.closed:
        now = fault_now(state)
        transmit_due(state, now)
        take_in(state)      # always: a packet's delay begins when it is first seen
        now = state.now_ns
        if path.heap_len and path.heap[0].due_ns <= now:
            packet = heap_pop(path)
            if hold(state, packet) < 0:
                free(packet)
                path.overflowed += 1
            else:
                rx.data = packet.data
                rx.len_bytes = packet.len_bytes
                rx.slot = packet.slot
                rx.flags = packet.flags
                rx.gso_size_bytes = 0
                got = 1
    pthread_mutex_unlock(&state.lock)
    return got


cdef void fault_release(void *ctx, uint32_t slot) noexcept nogil:
    cdef fault_state *state = <fault_state *>ctx
    pthread_mutex_lock(&state.lock)
    if slot < state.held_len and state.held[slot] != NULL:
        free(state.held[slot])
        state.held[slot] = NULL
        state.free_slots[state.free_len] = slot
        state.free_len += 1
    pthread_mutex_unlock(&state.lock)


cdef int fault_deferred(void *ctx, int64_t now_ns, int64_t *due_ns) noexcept nogil:
    """Packets under way in either direction: a recv() at that time moves both."""
    cdef fault_state *state = <fault_state *>ctx
    cdef int64_t due = 0
    cdef int64_t other
    cdef int found = 0
    pthread_mutex_lock(&state.lock)
    if state.is_virtual and now_ns > state.now_ns:
        state.now_ns = now_ns
    if state.tx.heap_len:
        due = state.tx.heap[0].due_ns
        found = 1
    if state.rx.heap_len and (not found or state.rx.heap[0].due_ns < due):
        due = state.rx.heap[0].due_ns
        found = 1
    if state.inner.deferred_ns != NULL and state.inner.deferred_ns(state.inner.ctx, now_ns, &other):
        if not found or other < due:
            due = other
        found = 1
    pthread_mutex_unlock(&state.lock)
    if found:
        due_ns[0] = due
    return found


# -- the Python face -----------------------------------------------------------------------------------

cdef dict path_counters(str name, const fault_path *path):
    return {
        f"fault_{name}_packets": path.packets,
        f"fault_{name}_bytes": path.bytes,
        f"fault_{name}_lost": path.lost,
        f"fault_{name}_duplicated": path.duplicated,
        f"fault_{name}_reordered": path.reordered,
        f"fault_{name}_corrupted": path.corrupted,
        f"fault_{name}_overflowed": path.overflowed,
        f"fault_{name}_failed": path.failed,
        f"fault_{name}_under_way": path.heap_len,
    }


cdef uint64_t chance(str name, value) except? 0xFFFFFFFFFFFFFFFF:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} is not a probability: use 0.0 to 1.0")
    return <uint64_t>(<double>value * <double>ONE)


cdef int64_t span(str name, value) except -1:
    if not 0 <= value <= 3600 * 10**9:
        raise ValueError(f"{name}={value} is not within 0 and one hour, in nanoseconds")
    return value


cdef class FaultLink(Link):
    """``inner`` with faults, the same for the same ``seed``, packets and times.

    ``loss``, ``duplicate``, ``reorder``, ``corrupt``: probability for each packet. ``delay_ns``: of every packet;
    ``jitter_ns``: up to so much more. A reordered packet takes ``reorder_ns`` longer, others overtake it.
    ``rate_bps``: bits a second, with ``queue_bytes`` waiting before it, 0 for no limit.
    ``tx``, ``rx``: whether faults act on what is sent, and received. ``virtual``: see the module.
    """

    def __cinit__(self):
        self.state = <fault_state *>calloc(1, sizeof(fault_state))
        if self.state == NULL:
            raise MemoryError
        pthread_mutex_init(&self.state.lock, NULL)

    def __init__(
        self,
        Link inner,
        seed: int,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay_ns: int = 0,
        jitter_ns: int = 0,
        reorder_ns: int = 1_000_000,
        rate_bps: int = 0,
        queue_bytes: int = 256 * 1024,
        tx: bool = True,
        rx: bool = True,
        virtual: bool = False,
    ):
        cdef fault_state *state = self.state
        if state.inner != NULL:
            raise ValueError("a FaultLink is made once: make another")
        state.whole = <uint8_t *>malloc(FRAME_MAX_BYTES)
        state.piece = <uint8_t *>malloc(FRAME_MAX_BYTES)
        if state.whole == NULL or state.piece == NULL:
            raise MemoryError
        self.inner = inner
        self.seed = seed
        state.is_virtual = virtual
        state.tx.random = <uint64_t>(seed & 0xFFFFFFFFFFFFFFFF)
        state.rx.random = <uint64_t>((seed ^ 0x5DEECE66D1234567) & 0xFFFFFFFFFFFFFFFF)
        self.configure(
            loss=loss, duplicate=duplicate, reorder=reorder, corrupt=corrupt, delay_ns=delay_ns, jitter_ns=jitter_ns,
            reorder_ns=reorder_ns, rate_bps=rate_bps, queue_bytes=queue_bytes, tx=tx, rx=rx,
        )
        state.inner = &inner.ops
        self.ops = inner.ops
        self.ops.ctx = state
        self.ops.send = fault_send
        self.ops.recv = fault_recv
        self.ops.release = fault_release
        self.ops.evacuate = NULL
        self.ops.deferred_ns = fault_deferred
        self.ops.slots = self.ops.small_slots = 0  # every packet is a copy
        # Cutting and completing is done here, whatever the inner link can do.
        self.ops.features = UL_LINK_CSUM | UL_LINK_TSO | UL_LINK_USO | UL_LINK_UFO

    def configure(
        self,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay_ns: int = 0,
        jitter_ns: int = 0,
        reorder_ns: int = 1_000_000,
        rate_bps: int = 0,
        queue_bytes: int = 256 * 1024,
        tx: bool = True,
        rx: bool = True,
    ) -> None:
        """Set all rates of the chosen directions anew, for packets from now on; what is not named is off."""
        cdef fault_rates rates
        rates.loss = chance("loss", loss)
        rates.duplicate = chance("duplicate", duplicate)
        rates.reorder = chance("reorder", reorder)
        rates.corrupt = chance("corrupt", corrupt)
        rates.delay_ns = span("delay_ns", delay_ns)
        rates.jitter_ns = span("jitter_ns", jitter_ns)
        rates.reorder_ns = span("reorder_ns", reorder_ns)
        if rate_bps < 0 or queue_bytes < 0:
            raise ValueError(f"rate_bps={rate_bps}, queue_bytes={queue_bytes}: neither can be negative")
        rates.rate_bps = rate_bps
        rates.queue_bytes = queue_bytes
        with nogil:
            pthread_mutex_lock(&self.state.lock)
        if tx:
            self.state.tx.rates = rates
        if rx:
            self.state.rx.rates = rates
        pthread_mutex_unlock(&self.state.lock)

    def advance(self, now_ns: int) -> None:
        """Tell a virtual link, and those below it, the time, for callers that do not use ``deferred_ns``.
        Never goes back."""
        cdef int64_t now = now_ns
        cdef int64_t due
        if not self.state.is_virtual:
            raise ValueError("advance: this link runs on the machine's clock; make it with virtual=True")
        with nogil:
            fault_deferred(self.state, now, &due)

    def due(self) -> int | None:
        """When the next packet under way is due, in nanoseconds of the link's clock; None if there is none."""
        cdef int64_t due
        if fault_deferred(self.state, self.state.now_ns, &due):
            return due
        return None

    def counters(self) -> dict[str, int]:
        """The inner link's counters; and for each direction (``fault_tx_*``, ``fault_rx_*``) packets and bytes seen,
        lost, duplicated, reordered, corrupted, overflowed (queue or memory full), failed (refused by the link),
        and under_way."""
        return self.inner.counters() | path_counters("tx", &self.state.tx) | path_counters("rx", &self.state.rx)

    def close_fd(self) -> None:
        self.inner.close_fd()

    def close(self) -> None:
        """Drop what is under way and close the inner link."""
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            self.state.closed = True
            drop_all(&self.state.tx)
            drop_all(&self.state.rx)
            pthread_mutex_unlock(&self.state.lock)
        self.inner.close()

    def __dealloc__(self):
        cdef uint32_t i
        cdef fault_state *state = self.state
        if state == NULL:
            return
        drop_all(&state.tx)
        drop_all(&state.rx)
        for i in range(state.held_len):
            free(state.held[i])
        free(state.tx.heap)
        free(state.rx.heap)
        free(state.held)
        free(state.free_slots)
        free(state.whole)
        free(state.piece)
        pthread_mutex_destroy(&state.lock)
        free(state)


cdef void drop_all(fault_path *path) noexcept nogil:
    while path.heap_len:
        path.heap_len -= 1
        free(path.heap[path.heap_len])
