"""A channel's packet sockets as a link: receive from the rings the kernel fills, send with one call.

Call order: the server makes and confines the sockets (channel.py, demux.py), hands their descriptors over,
``PacketLink`` maps the rings (rings.pyx). Read first: packet(7), linux/virtio_net.h.
"""

import errno as _errno
import os

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EBADF, EINVAL, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from ulnet.kernelshim.link cimport (
    UL_FRAME_CSUM_PARTIAL, UL_FRAME_GSO_TCP4, UL_FRAME_GSO_UDP, UL_FRAME_UFO, UL_LINK_CSUM, UL_LINK_EVACUATE,
    UL_LINK_TSO, UL_LINK_UFO, UL_LINK_USO, UL_SLOT_NONE, iovec, ul_rx, ul_tx,
)
from ulnet.kernelshim.rings cimport (
    ETH_BYTES, PK_ERRNO_MAX, SLOT_OVERHEAD, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4, VNET_BYTES, fill_rx, pk_ctx, ring_evacuate, ring_recv,
    ring_release, rings_leave, rings_map, rings_unmap, sockaddr_ll, virtio_net_hdr,
)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    struct sockaddr:
        pass
    ssize_t sendto(int fd, const void *data, size_t length, int flags, const sockaddr *to, unsigned int to_bytes)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int getsockopt(int fd, int level, int name, void *value, unsigned int *length)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SOL_PACKET
        AF_PACKET

cdef extern from "<unistd.h>" nogil:
    int c_close "close" (int fd)

cdef extern from "<linux/if_packet.h>" nogil:
    struct tpacket_stats:
        unsigned int tp_packets
        unsigned int tp_drops
    enum:
        PACKET_STATISTICS

SLOT_OVERHEAD_BYTES: int = SLOT_OVERHEAD

cdef enum:
    PIECES_MAX = 18
    JOIN_BYTES = 2048   # frames up to this are put together here: the kernel takes one piece faster than several
    IPC_BUFFER_BYTES = 65536 + 64
    FEATURES = UL_LINK_CSUM | UL_LINK_TSO | UL_LINK_USO | UL_LINK_UFO


# ---- receive: one call a packet ----

cdef int ipc_recv(void *ctx, ul_rx *f) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef virtio_net_hdr vnet
    cdef iovec iov[2]
    cdef msghdr message
    cdef ssize_t got
    if c.small.fd < 0:
        return 0
    memset(&message, 0, sizeof(message))
    iov[0].iov_base = &vnet
    iov[0].iov_len = VNET_BYTES
    iov[1].iov_base = c.buf
    iov[1].iov_len = c.buf_bytes
    message.msg_iov = iov
    message.msg_iovlen = 2
    while True:
        c.syscalls += 1
        got = recvmsg(c.small.fd, &message, MSG_DONTWAIT | MSG_TRUNC)
        if got < 0:
            if errno != EAGAIN:
                c.rx_errors += 1
            return 0
        got -= VNET_BYTES
        if got < ETH_BYTES or <size_t>got > c.buf_bytes:
            c.rx_truncated += 1
            continue
        fill_rx(f, &vnet)
        f.data = c.buf
        f.len_bytes = <uint32_t>got
        f.slot = UL_SLOT_NONE
        c.rx_frames += 1
        c.rx_bytes += f.len_bytes
        return 1


cdef void ipc_release(void *ctx, uint32_t slot) noexcept nogil:
    if slot != UL_SLOT_NONE:
        (<pk_ctx *>ctx).bad_release += 1


# ---- send ----

cdef int pk_send(void *ctx, const ul_tx *t) noexcept nogil:
    cdef pk_ctx *c = <pk_ctx *>ctx
    cdef virtio_net_hdr vnet
    cdef uint8_t joined[JOIN_BYTES + 16]
    cdef iovec iov[PIECES_MAX + 1]
    cdef msghdr message
    cdef sockaddr_ll *to
    cdef const uint8_t *eth
    cdef size_t at
    cdef ssize_t sent
    cdef int i, code
    if c.small.fd < 0:
        return -EBADF
    if t.iov_count < 1 or t.iov_count > PIECES_MAX or t.iov[0].iov_len < ETH_BYTES:
        c.tx_errno[EINVAL] += 1
        return -EINVAL
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM if t.flags & UL_FRAME_CSUM_PARTIAL else 0
    vnet.gso_type = 0
    if t.flags & UL_FRAME_GSO_TCP4:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
    elif t.flags & UL_FRAME_GSO_UDP:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
    elif t.flags & UL_FRAME_UFO:
        vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP
    vnet.hdr_len = t.hdr_len_bytes
    vnet.gso_size = t.gso_size_bytes if vnet.gso_type else 0
    vnet.csum_start = t.csum_start if vnet.flags else 0
    vnet.csum_offset = t.csum_offset if vnet.flags else 0
    eth = <const uint8_t *>t.iov[0].iov_base
    # An all-zero destination means this very host (link.pxd).
    to = &c.to_device if eth[0] | eth[1] | eth[2] | eth[3] | eth[4] | eth[5] else &c.to_loopback
    memcpy(&to.sll_protocol, eth + 12, 2)
    c.syscalls += 1
    if t.len_bytes <= JOIN_BYTES:
        memcpy(joined, &vnet, VNET_BYTES)
        at = VNET_BYTES
        for i in range(t.iov_count):
            if at + t.iov[i].iov_len > sizeof(joined):
                c.tx_errno[EINVAL] += 1
                return -EINVAL              # len_bytes is not the sum of the pieces
            memcpy(joined + at, t.iov[i].iov_base, t.iov[i].iov_len)
            at += t.iov[i].iov_len
        sent = sendto(c.small.fd, joined, at, MSG_DONTWAIT | MSG_NOSIGNAL, <const sockaddr *>to, sizeof(sockaddr_ll))
    else:
        iov[0].iov_base = &vnet
        iov[0].iov_len = VNET_BYTES
        memcpy(&iov[1], t.iov, t.iov_count * sizeof(iovec))
        message.msg_name = to
        message.msg_namelen = sizeof(sockaddr_ll)
        message.msg_iov = iov
        message.msg_iovlen = t.iov_count + 1
        message.msg_control = NULL
        message.msg_controllen = 0
        message.msg_flags = 0
        sent = sendmsg(c.small.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        code = errno
        c.tx_errno[code if 0 < code < PK_ERRNO_MAX else 0] += 1
        return -code
    c.tx_frames += 1
    c.tx_bytes += t.len_bytes
    return 0


# ---- Python face ----

cdef void count_drops(pk_ctx *c, int fd) noexcept nogil:
    cdef tpacket_stats stats
    cdef unsigned int length = sizeof(stats)
    # Reading resets the kernel's counters.
    if fd >= 0 and getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &stats, &length) == 0:
        c.rx_drops += stats.tp_drops
        c.syscalls += 1


cdef void close_sockets(pk_ctx *c) noexcept nogil:
    if c.small.fd >= 0:
        c_close(c.small.fd)
    if c.large.fd >= 0:
        c_close(c.large.fd)
    c.small.fd = c.large.fd = -1


cdef class PacketLink(Link):
    """A channel's packet sockets, made elsewhere, as a link. Takes the descriptors over, also when it raises.

    ``fds`` come from ``Demux.open_channel`` or ``open_embedded``: SOCK_RAW, all devices, PACKET_VNET_HDR. For
    ``ipf`` and ``shm`` they are two, of small frames and of large ones, each with a TPACKET_V2 ring; ``small`` and
    ``large`` are the rings' slots and bytes a slot.
    ``interface``: ``ipf`` (rings, polled), ``shm`` (rings, the engine sleeps between frames), ``ipc`` (one
    descriptor, one receive call a packet). ``features`` masks the LINK_* bits on offer.

    Raises ValueError for an impossible argument, OSError when a ring cannot be mapped.
    """

    def __cinit__(self, *args, **kwargs):
        self.c.small.fd = self.c.large.fd = -1

    def __init__(self, fds, *, int ifindex, int loopback_ifindex, bytes mac, int mtu, str interface="ipf",
                 small=(0, 0), large=(0, 0), features=None):
        cdef pk_ctx *c = &self.c
        cdef int code
        if c.small.fd >= 0:
            raise ValueError("this link is open already: make a new one")
        memset(c, 0, sizeof(pk_ctx))
        c.small.fd = c.large.fd = -1
        c.small.pending = c.large.pending = c.soft = c.barrier = UL_SLOT_NONE
        try:
            if interface not in ("ipf", "shm", "ipc"):
                raise ValueError(f"packet interface {interface!r}: it must be one of 'ipf', 'shm', 'ipc'")
            wanted = 1 if interface == "ipc" else 2
            if len(fds) != wanted:
                raise ValueError(f"interface {interface!r} needs {wanted} descriptors, not {len(fds)}")
            if len(mac) != 6:
                raise ValueError(f"a MAC address has 6 bytes, not {len(mac)}")
            if interface == "ipc" and (small[0] or large[0]):
                raise ValueError("interface 'ipc' uses no ring: the channel must be opened for 'ipc'")
            c.small.fd = fds[0]
            if interface == "ipc":
                c.buf_bytes = IPC_BUFFER_BYTES
                c.buf = <uint8_t *>calloc(1, c.buf_bytes)
                if c.buf == NULL:
                    raise MemoryError()
            else:
                c.large.fd = fds[1]
                page = os.sysconf("SC_PAGESIZE")
                for slots, slot_bytes, unit in ((*small, 64), (*large, page)):
                    if slots < 4 or slot_bytes == 0 or slot_bytes % unit or slots * slot_bytes % page:
                        raise ValueError(f"interface {interface!r} needs rings of at least 4 slots, large ones of "
                                         f"whole pages, not {slots} of {slot_bytes} bytes")
                c.small.slots, c.small.slot_bytes = small
                c.large.slots, c.large.slot_bytes = large
                code = rings_map(c)
                if code < 0:
                    raise OSError(-code, f"cannot map packet rings of {small[0]} slots of {small[1]} bytes and "
                                         f"{large[0]} of {large[1]}: {os.strerror(-code)}")
        except BaseException:
            for fd in fds:
                if fd != c.small.fd and fd != c.large.fd:
                    c_close(fd)
            self._shut()
            raise
        c.to_device.sll_family = c.to_loopback.sll_family = AF_PACKET
        c.to_device.sll_halen = c.to_loopback.sll_halen = 6
        c.to_device.sll_ifindex = ifindex
        c.to_loopback.sll_ifindex = loopback_ifindex
        self.interface = interface
        self.ops.ctx = c
        self.ops.send = pk_send
        if interface == "ipc":
            self.ops.recv = ipc_recv
            self.ops.release = ipc_release
            self.ops.evacuate = NULL
            self.ops.features = FEATURES
        else:
            self.ops.recv = ring_recv
            self.ops.release = ring_release
            self.ops.evacuate = ring_evacuate
            self.ops.features = FEATURES | UL_LINK_EVACUATE
        if features is not None:
            self.ops.features &= <uint32_t>features
        self.ops.deferred_ns = NULL
        self.ops.fd = c.small.fd
        self.ops.large_fd = c.large.fd
        self.ops.slots = c.large.slots
        self.ops.small_slots = c.small.slots
        self.ops.small_bytes = c.small.slot_bytes - SLOT_OVERHEAD if c.small.slots else 0
        self.ops.mtu_bytes = mtu
        memcpy(self.ops.mac, <const char *>mac, 6)

    def __dealloc__(self):
        self._shut()

    @property
    def slots(self) -> int:
        """Slots of the ring of large frames; 0 for ``ipc``."""
        return self.c.large.slots

    def hold_frame(self):
        """The next frame as (slot, memoryview onto the ring), or None. ``release`` it; a small one has no slot, and
        is there until the next is asked for.

        For tests and tools. The view must not be used after the release or after ``close``.
        """
        cdef ul_rx rx
        if self.c.large.base == NULL:
            raise ValueError("interface 'ipc' lends no frames")
        if not ring_recv(&self.c, &rx):
            return None
        return (None if rx.slot == UL_SLOT_NONE else rx.slot), PyMemoryView_FromMemory(<char *>rx.data, rx.len_bytes, PyBUF_READ)

    def release(self, uint32_t slot) -> None:
        """Give a held slot back."""
        self.ops.release(&self.c, slot)

    def evacuate(self, uint32_t slot) -> None:
        """Give the slot to the kernel, keep its frame readable at the same address. Raises OSError."""
        cdef int code = ring_evacuate(&self.c, slot) if self.c.large.base != NULL else -EINVAL
        if code < 0:
            raise OSError(-code, f"cannot evacuate slot {slot}: {os.strerror(-code)}")

    def counters(self) -> dict[str, int]:
        """Frames, bytes, system calls and everything dropped, since the link was made.

        ``rx_drops``: no free slot; ``rx_copied``: frames without a token, because a copy of an earlier one
        is still held; ``tx_E...``: sends refused with that errno (ENOBUFS: by the guard or a full queue).
        """
        cdef pk_ctx *c = &self.c
        count_drops(c, c.small.fd)
        count_drops(c, c.large.fd)
        counted = {
            "rx_frames": c.rx_frames, "rx_bytes": c.rx_bytes, "rx_drops": c.rx_drops,
            "rx_truncated": c.rx_truncated, "rx_copied": c.rx_copied, "rx_errors": c.rx_errors,
            "tx_frames": c.tx_frames, "tx_bytes": c.tx_bytes,
            "tx_errors": 0, "evacuated": c.evacuated, "restored": c.restored,
            "bad_release": c.bad_release, "syscalls": c.syscalls,
        }
        for number in range(PK_ERRNO_MAX):
            if c.tx_errno[number]:
                counted["tx_errors"] += c.tx_errno[number]
                counted["tx_" + _errno.errorcode.get(number, str(number))] = c.tx_errno[number]
        return counted

    def close_fd(self) -> None:
        """In a forked child: let go of the sockets. The rings were not copied; frames evacuated before stay readable."""
        cdef pk_ctx *c = &self.c
        close_sockets(c)
        self.ops.fd = self.ops.large_fd = -1
        rings_leave(c)

    cdef void _shut(self) noexcept:
        cdef pk_ctx *c = &self.c
        rings_unmap(c)
        free(c.buf)
        c.buf = NULL
        close_sockets(c)
        self.ops.fd = self.ops.large_fd = -1

    def close(self) -> None:
        """Unmap the rings and close the descriptors. Frames still held become invalid."""
        self.counters()
        self._shut()
