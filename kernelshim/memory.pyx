"""The in-memory link: two ends in one process, any thread at either.

Call order: ``a, b = memory_pair()``; what one end sends the other receives, in order. A frame to the
all-zero MAC comes back to its sender. The queue of each end is bounded; what does not fit is dropped and
counted, as by a switch. ``fileno()`` is readable while frames wait (until ``recv`` has answered "none").
Checksum and segmentation features pass the flags on to the receiver, as a veth pair does.
"""

from libc.errno cimport EBADF, EINVAL, EMSGSIZE, EOPNOTSUPP
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_PARTIAL,
    UL_FRAME_GSO_TCP4,
    UL_FRAME_GSO_UDP,
    UL_FRAME_UFO,
    UL_LINK_CSUM,
    UL_LINK_TSO,
    UL_LINK_USO,
    ul_rx,
    ul_tx,
)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int eventfd(unsigned int initval, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)
    ssize_t write(int fd, const void *buf, size_t count)
    int close(int fd)

cdef extern from *:
    """
    #define mem_add(counter, value) __atomic_fetch_add((counter), (value), __ATOMIC_RELAXED)
    #define mem_flag(flag) __atomic_load_n((flag), __ATOMIC_ACQUIRE)
    #define mem_raise(flag) __atomic_store_n((flag), 1, __ATOMIC_RELEASE)
    """
    void mem_add(uint64_t *counter, uint64_t value) nogil
    bint mem_flag(bint *flag) nogil
    void mem_raise(bint *flag) nogil

cdef enum:
    ETHER_BYTES = 14
    FRAME_MAX_BYTES = 65535 + 14    # IPv4 total length plus Ethernet header
    LARGE_BYTES = 4096              # a buffer above this is kept only LARGE_KEPT times
    LARGE_KEPT = 64
    ROOM_MIN_BYTES = 2048


# -- ports ---------------------------------------------------------------------------------------------

cdef mem_port *port_new(uint32_t queue_len) noexcept nogil:
    cdef mem_port *port = <mem_port *>calloc(1, sizeof(mem_port))
    if port == NULL:
        return NULL
    port.users = 2
    port.queue_len = queue_len
    port.queue = <uint32_t *>malloc(queue_len * sizeof(uint32_t))
    port.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if port.queue == NULL or port.fd < 0:
        if port.fd >= 0:
            close(port.fd)
        free(port.queue)
        free(port)
        return NULL
    pthread_mutex_init(&port.lock, NULL)
    return port


cdef void port_unref(mem_port *port) noexcept nogil:
    cdef int users
    cdef uint32_t i
    pthread_mutex_lock(&port.lock)
    port.users -= 1
    users = port.users
    pthread_mutex_unlock(&port.lock)
    if users:
        return
    pthread_mutex_destroy(&port.lock)
    for i in range(port.frames_len):
        free(port.frames[i].data)
    free(port.frames)
    free(port.free_slots)
    free(port.queue)
    close(port.fd)
    free(port)


cdef int port_grow(mem_port *port) noexcept nogil:
    """More slots, under the lock. Buffers stay where they are, so frames held elsewhere are not moved."""
    cdef uint32_t room = port.frames_len * 2 if port.frames_len else 64
    cdef uint32_t i
    cdef mem_frame *frames = <mem_frame *>realloc(port.frames, room * sizeof(mem_frame))
    cdef uint32_t *free_slots
    if frames == NULL:
        return -1
    port.frames = frames
    free_slots = <uint32_t *>realloc(port.free_slots, room * sizeof(uint32_t))
    if free_slots == NULL:
        return -1
    port.free_slots = free_slots
    for i in range(port.frames_len, room):
        frames[i].data = NULL
        frames[i].room_bytes = 0
        free_slots[port.free_len] = room - 1 - (i - port.frames_len)
        port.free_len += 1
    port.frames_len = room
    return 0


cdef void port_push(mem_port *port, const ul_tx *tx) noexcept nogil:
    """Queue a copy of the frame, under the lock; count it where it cannot be queued."""
    cdef uint32_t slot, room
    cdef mem_frame *frame
    cdef uint8_t *at
    cdef uint64_t one = 1
    cdef int i
    if port.closed:
        port.dropped_closed += 1
        return
    if port.queue_count == port.queue_len:
        port.dropped_full += 1
        return
    if port.free_len == 0 and port_grow(port) < 0:
        port.dropped_memory += 1
        return
    slot = port.free_slots[port.free_len - 1]
    frame = &port.frames[slot]
    if frame.room_bytes > LARGE_BYTES:
        port.large_kept -= 1
    if frame.room_bytes < tx.len_bytes:
        room = tx.len_bytes if tx.len_bytes > ROOM_MIN_BYTES else ROOM_MIN_BYTES
        free(frame.data)
        frame.data = <uint8_t *>malloc(room)
        frame.room_bytes = room
        if frame.data == NULL:
            frame.room_bytes = 0
            port.dropped_memory += 1
            return
    port.free_len -= 1
    at = frame.data
    for i in range(tx.iov_count):
        memcpy(at, tx.iov[i].iov_base, tx.iov[i].iov_len)
        at += tx.iov[i].iov_len
    frame.len_bytes = tx.len_bytes
    frame.flags = tx.flags & (UL_FRAME_CSUM_PARTIAL | UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP)
    frame.gso_size_bytes = tx.gso_size_bytes if tx.flags & (UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP) else 0
    port.queue[(port.queue_head + port.queue_count) % port.queue_len] = slot
    port.queue_count += 1
    if not port.signalled:
        port.signalled = True
        write(port.fd, &one, sizeof(one))


cdef void port_free_slot(mem_port *port, uint32_t slot) noexcept nogil:
    """Take a slot back, under the lock. Large buffers are kept for a burst, not for ever."""
    cdef mem_frame *frame = &port.frames[slot]
    if frame.room_bytes > LARGE_BYTES:
        if port.large_kept >= LARGE_KEPT:
            free(frame.data)
            frame.data = NULL
            frame.room_bytes = 0
        else:
            port.large_kept += 1
    port.free_slots[port.free_len] = slot
    port.free_len += 1


# -- the link table ------------------------------------------------------------------------------------

cdef int mem_judge(const mem_end *end, const ul_tx *tx) noexcept nogil:
    """0, or why a device would not take the frame."""
    cdef size_t total = 0
    cdef uint32_t piece
    cdef int i
    if tx.iov_count < 1 or tx.len_bytes < ETHER_BYTES or tx.iov[0].iov_len < ETHER_BYTES:
        return -EINVAL
    for i in range(tx.iov_count):
        total += tx.iov[i].iov_len
    if total != tx.len_bytes:
        return -EINVAL
    if (
        (tx.flags & UL_FRAME_CSUM_PARTIAL and not end.features & UL_LINK_CSUM)
        or (tx.flags & UL_FRAME_GSO_TCP4 and not end.features & UL_LINK_TSO)
        or (tx.flags & UL_FRAME_GSO_UDP and not end.features & UL_LINK_USO)
        or tx.flags & UL_FRAME_UFO
    ):
        return -EOPNOTSUPP
    if tx.flags & (UL_FRAME_GSO_TCP4 | UL_FRAME_GSO_UDP):
        # Each piece must fit the wire, and pieces are cut from behind the headers.
        if tx.gso_size_bytes == 0 or tx.hdr_len_bytes < ETHER_BYTES or tx.hdr_len_bytes > tx.len_bytes:
            return -EINVAL
        piece = <uint32_t>tx.hdr_len_bytes + tx.gso_size_bytes
        if tx.len_bytes > FRAME_MAX_BYTES:
            return -EMSGSIZE
    else:
        piece = tx.len_bytes
    if piece > end.mtu_bytes + ETHER_BYTES:
        return -EMSGSIZE
    return 0


cdef int mem_send(void *ctx, const ul_tx *tx) noexcept nogil:
    cdef mem_end *end = <mem_end *>ctx
    cdef mem_port *port = end.peer
    cdef const uint8_t *mac = NULL
    cdef int verdict = mem_judge(end, tx)
    if verdict == 0:
        mac = <const uint8_t *>tx.iov[0].iov_base
        if not (mac[0] | mac[1] | mac[2] | mac[3] | mac[4] | mac[5]):
            port = end.mine
    if mem_flag(&end.mine.closed):
        verdict = -EBADF
    if verdict:
        mem_add(&end.refused, 1)
        return verdict
    mem_add(&end.tx_frames, 1)
    mem_add(&end.tx_bytes, tx.len_bytes)
    pthread_mutex_lock(&port.lock)
    port_push(port, tx)
    pthread_mutex_unlock(&port.lock)
    return 0


cdef int mem_recv(void *ctx, ul_rx *rx) noexcept nogil:
    cdef mem_port *port = (<mem_end *>ctx).mine
    cdef mem_frame *frame
    cdef uint64_t sink
    pthread_mutex_lock(&port.lock)
    if port.queue_count == 0:
        if port.signalled:
            port.signalled = False
            read(port.fd, &sink, sizeof(sink))
        pthread_mutex_unlock(&port.lock)
        return 0
    rx.slot = port.queue[port.queue_head]
    port.queue_head = (port.queue_head + 1) % port.queue_len
    port.queue_count -= 1
    frame = &port.frames[rx.slot]
    rx.data = frame.data
    rx.len_bytes = frame.len_bytes
    rx.flags = frame.flags
    rx.gso_size_bytes = frame.gso_size_bytes
    port.rx_frames += 1
    port.rx_bytes += frame.len_bytes
    pthread_mutex_unlock(&port.lock)
    return 1


cdef void mem_release(void *ctx, uint32_t slot) noexcept nogil:
    cdef mem_port *port = (<mem_end *>ctx).mine
    pthread_mutex_lock(&port.lock)
    if slot < port.frames_len and port.free_len < port.frames_len:
        port_free_slot(port, slot)
    pthread_mutex_unlock(&port.lock)


# -- the Python face -----------------------------------------------------------------------------------

cdef class MemoryLink(Link):
    """One end of an in-memory wire; made by ``memory_pair``."""

    def __init__(self):
        if self.end == NULL:
            raise TypeError("a MemoryLink comes in pairs: use memory_pair()")

    def counters(self) -> dict[str, int]:
        """``tx_*``: sent here. ``rx_*``: received here. ``dropped_*``: addressed here, but lost:
        queue full, this end closed, no memory. ``refused``: sends answered with an error."""
        cdef mem_end *end = self.end
        cdef mem_port *port = end.mine
        return {
            "tx_frames": end.tx_frames,
            "tx_bytes": end.tx_bytes,
            "rx_frames": port.rx_frames,
            "rx_bytes": port.rx_bytes,
            "dropped_full": port.dropped_full,
            "dropped_closed": port.dropped_closed,
            "dropped_memory": port.dropped_memory,
            "refused": end.refused,
        }

    def waiting(self) -> int:
        """Frames that ``recv`` would hand out now."""
        return self.end.mine.queue_count

    def close(self) -> None:
        """Pull this end's plug: waiting frames are lost, sends fail with EBADF, the peer's vanish counted.

        Frames still held stay readable until the object goes.
        """
        cdef mem_port *port
        if self.end == NULL:
            return
        port = self.end.mine
        pthread_mutex_lock(&port.lock)
        mem_raise(&port.closed)
        while port.queue_count:
            port_free_slot(port, port.queue[port.queue_head])
            port.queue_head = (port.queue_head + 1) % port.queue_len
            port.queue_count -= 1
            port.dropped_closed += 1
        pthread_mutex_unlock(&port.lock)

    def __dealloc__(self):
        if self.end != NULL:
            port_unref(self.end.mine)
            port_unref(self.end.peer)
            free(self.end)


cdef MemoryLink make_end(mem_port *mine, mem_port *peer, bytes mac, uint32_t mtu, uint32_t features):
    cdef MemoryLink link = MemoryLink.__new__(MemoryLink)
    cdef mem_end *end = <mem_end *>calloc(1, sizeof(mem_end))
    if end == NULL:
        raise MemoryError
    end.mine = mine
    end.peer = peer
    end.mtu_bytes = mtu
    end.features = features
    link.end = end
    link.ops.ctx = end
    link.ops.send = mem_send
    link.ops.recv = mem_recv
    link.ops.release = mem_release
    link.ops.evacuate = NULL
    link.ops.deferred_ns = NULL
    link.ops.fd = mine.fd
    link.ops.slots = 0
    link.ops.mtu_bytes = mtu
    link.ops.features = features
    memcpy(link.ops.mac, <const char *>mac, 6)
    return link


def memory_pair(
    mtu: int = 1500,
    features: int = UL_LINK_CSUM | UL_LINK_TSO | UL_LINK_USO,
    mac_a: bytes = b"\x02\x75\x6c\x00\x00\x01",
    mac_b: bytes = b"\x02\x75\x6c\x00\x00\x02",
    queue_frames: int = 1024,
) -> tuple[MemoryLink, MemoryLink]:
    """Two ends of a wire. ``features``: UL_LINK_CSUM, UL_LINK_TSO, UL_LINK_USO bits, 0 for a plain wire.
    ``queue_frames``: what each end lets wait before it drops."""
    cdef mem_port *port_a
    cdef mem_port *port_b
    cdef bytes address_a, address_b
    address_a, address_b = bytes(mac_a), bytes(mac_b)
    for address in (address_a, address_b):
        if len(address) != 6:
            raise ValueError(f"a MAC address has 6 bytes, not {len(address)}: {address!r}")
    if not 68 <= mtu <= 65535:  # RFC 791: every link carries 68 bytes
        raise ValueError(f"mtu {mtu} is not within 68 to 65535")
    if features & ~(UL_LINK_CSUM | UL_LINK_TSO | UL_LINK_USO):
        raise ValueError(f"features {features:#x}: a memory link has UL_LINK_CSUM, UL_LINK_TSO and UL_LINK_USO only")
    if not 1 <= queue_frames <= 1 << 20:
        raise ValueError(f"queue_frames {queue_frames} is not within 1 to {1 << 20}")
    port_a = port_new(queue_frames)
    port_b = port_new(queue_frames)
    if port_a == NULL or port_b == NULL:
        for_both_unref(port_a)
        for_both_unref(port_b)
        raise OSError("memory link: no memory or no descriptor left for its two ends")
    return (
        make_end(port_a, port_b, address_a, mtu, features),
        make_end(port_b, port_a, address_b, mtu, features),
    )


cdef void for_both_unref(mem_port *port) noexcept:
    if port != NULL:
        port_unref(port)
        port_unref(port)
