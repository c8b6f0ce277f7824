"""Metastate: address, routes and neighbours in a page the server writes and every application reads.

Source: Maeda and Bershad, SOSP 1993, section 3.3: the server owns routes and ARP entries, libraries cache them.
Here the cache is the server's own page, so nothing needs to be called back: sending asks nobody, and a change is
seen at the next packet. Call order: ``create`` in the server, pass ``fd``, ``open`` in the application,
``meta_resolve`` for each packet or whenever the generation has changed. RFC 1122 (3.3.1) is the routing it does.
"""

import fcntl
import os
from typing import NamedTuple

from libc.errno cimport EAGAIN, EHOSTUNREACH, ENETUNREACH, ENOBUFS, errno
from libc.string cimport memcmp, memcpy, memmove, memset
from ulnet.stack.address cimport (
    addr_from_text, addr_is_ipv4, addr_never_unicast, addr_to_text, addr_word, mac_from_bytes, network_text,
    prefix_covers, prefix_narrow, prefix_wide,
)
from ulnet.stack.types cimport addr_equal, addr_is_zero

cdef extern from "<unistd.h>" nogil:
    int c_close "close" (int fd)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t n, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t n)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t ul_load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint64_t ul_load_relaxed(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void ul_store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void ul_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    static inline void ul_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    """
    uint64_t ul_load_acquire(const uint64_t *p) noexcept nogil
    uint64_t ul_load_relaxed(const uint64_t *p) noexcept nogil
    void ul_store_release(uint64_t *p, uint64_t v) noexcept nogil
    void ul_fence_acquire() noexcept nogil
    void ul_fence_release() noexcept nogil

cdef enum:
    META_MAGIC = 0x6174656D      # "meta"
    META_VERSION = 2
    READ_TRIES = 64              # a reader repeats only while a running writer changes the page again and again
    NONE = META_NEIGHBOURS       # no slot
    MTU_MIN_BYTES = 68           # RFC 791 (3.2): every module forwards 68 bytes
    MTU_MAX_BYTES = 65535        # RFC 791 (3.1): total length has 16 bits

cdef int SEALS_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
cdef int SEAL_FUTURE_WRITE = 0x0010          # linux/fcntl.h, since 5.1; older fcntl modules lack the name

# Every reader and writer maps the same layout: a compiler that pads otherwise must not get far.
if META_NEIGHBOURS != 1 << 10 or sizeof(meta_route) != 40 or sizeof(meta_neighbour) != 24 or sizeof(meta_page) % 8:
    raise ImportError("ulnet.stack.metastate: the page layout is not the one this version was written for")

Route = NamedTuple("Route", [("dst", str), ("prefix_len", int), ("gateway", object), ("metric", int), ("mtu", int)])
Neighbour = NamedTuple("Neighbour", [("addr", str), ("mac", object), ("state", str)])
Resolution = NamedTuple("Resolution", [("mac", object), ("next_hop", object), ("mtu", int), ("errno", int)])
for _kind in (Route, Neighbour, Resolution):
    _kind.__module__ = __name__


# --- reading ---------------------------------------------------------------------------------------------

cdef bint is_subnet_broadcast(const meta_page *m, const ul_addr *a) noexcept nogil:
    cdef int i, bits = m.prefix_len
    if not addr_is_ipv4(a) or bits > 126:         # RFC 3021: a /31 has no broadcast address
        return False
    for i in range(bits >> 3, 16):
        if a.b[i] | (<uint8_t>(0xFF << (8 - (bits & 7))) if i == bits >> 3 else 0) != 0xFF:
            return False
    return prefix_covers(&m.addr, bits, a)


cdef inline uint32_t neigh_home(const meta_page *m, const ul_addr *a) noexcept nogil:
    # A product's high bits depend on every bit below: fold each word first, as the last byte of an IPv4 address
    # stands at the very top of its word.
    cdef uint64_t h = m.hash_seed ^ addr_word(a, 0)
    h = (h ^ (h >> 32)) * <uint64_t>0xFF51AFD7ED558CCD
    h ^= addr_word(a, 1)
    h = (h ^ (h >> 32)) * <uint64_t>0xC4CEB9FE1A85EC53
    h = (h ^ (h >> 32)) * <uint64_t>0x9E3779B97F4A7C15   # once more: neighbours in number are not to be so in the table
    return <uint32_t>(h >> 54)               # ten bits: 0..META_NEIGHBOURS - 1


cdef uint32_t neigh_find(const meta_page *m, const meta_tables *t, const ul_addr *a) noexcept nogil:
    cdef uint32_t i = neigh_home(m, a)
    cdef int n
    for n in range(META_NEIGHBOURS):         # bounded even if the table changes underneath
        if t.neighbours[i].state == NEIGH_FREE:
            return NONE
        if addr_equal(&t.neighbours[i].addr, a):
            return i
        i = (i + 1) & (META_NEIGHBOURS - 1)
    return NONE


cdef int lookup(const meta_page *m, const meta_tables *t, const ul_addr *dst, uint8_t *mac, ul_addr *next_hop,
                uint32_t *mtu_bytes) noexcept nogil:
    cdef const meta_route *r
    cdef const meta_neighbour *e
    cdef uint32_t slot
    cdef int i
    for i in range(META_ROUTES):
        r = &t.routes[i]
        if not r.used:
            break
        if not prefix_covers(&r.dst, r.prefix_len, dst):
            continue
        next_hop[0] = dst[0] if addr_is_zero(&r.gateway) else r.gateway
        if r.mtu_bytes and r.mtu_bytes < m.mtu_bytes:
            mtu_bytes[0] = r.mtu_bytes
        slot = neigh_find(m, t, next_hop)
        if slot == NONE:
            return -EAGAIN
        e = &t.neighbours[slot]
        if e.state != NEIGH_REACHABLE:
            return -EHOSTUNREACH
        memcpy(mac, e.mac, 6)
        return 0
    return -ENETUNREACH


cdef int meta_resolve(const meta_page *m, const ul_addr *dst, uint8_t *mac, ul_addr *next_hop, uint32_t *mtu_bytes) noexcept nogil:
    cdef uint64_t generation
    cdef int rc, n
    mtu_bytes[0] = m.mtu_bytes
    next_hop[0] = dst[0]
    if addr_equal(dst, &m.addr):
        memset(mac, 0, 6)
        return 0
    if addr_never_unicast(dst):
        memset(next_hop, 0, sizeof(ul_addr))
        return -ENETUNREACH
    if is_subnet_broadcast(m, dst):
        memset(mac, 0xFF, 6)
        return 0
    for n in range(READ_TRIES):
        mtu_bytes[0] = m.mtu_bytes
        memset(next_hop, 0, sizeof(ul_addr))
        generation = ul_load_acquire(&m.generation)
        rc = lookup(m, &m.tables[generation & 1], dst, mac, next_hop, mtu_bytes)
        ul_fence_acquire()
        if ul_load_relaxed(&m.generation) == generation:
            return rc
    memset(next_hop, 0, sizeof(ul_addr))
    return -EAGAIN


cdef uint64_t meta_generation(const meta_page *m) noexcept nogil:
    return ul_load_acquire(&m.generation)


cdef uint64_t meta_shares(const meta_page *m) noexcept nogil:
    return ul_load_acquire(&m.shares)


# --- writing ---------------------------------------------------------------------------------------------

cdef void change_begin(meta_page *m) noexcept nogil:
    """Readers go to tables[1]; then tables[0] may change."""
    ul_store_release(&m.generation, m.generation + 1)
    ul_fence_release()


cdef void change_end(meta_page *m) noexcept nogil:
    """Readers go to the new tables[0]; tables[1] follows. 27 KiB a change, some 25 changes a second at most."""
    ul_store_release(&m.generation, m.generation + 1)
    ul_fence_release()
    memcpy(&m.tables[1], &m.tables[0], sizeof(meta_tables))


cdef void order_add(meta_writer *w, uint32_t slot, uint8_t state) noexcept nogil:
    w.links[slot].older = w.newest[state]
    w.links[slot].newer = NONE
    if w.newest[state] != NONE:
        w.links[w.newest[state]].newer = <uint16_t>slot
    else:
        w.oldest[state] = <uint16_t>slot
    w.newest[state] = <uint16_t>slot


cdef void order_drop(meta_writer *w, uint32_t slot, uint8_t state) noexcept nogil:
    cdef meta_link l = w.links[slot]
    if l.older != NONE:
        w.links[l.older].newer = l.newer
    else:
        w.oldest[state] = l.newer
    if l.newer != NONE:
        w.links[l.newer].older = l.older
    else:
        w.newest[state] = l.older


cdef void order_move(meta_writer *w, uint32_t old, uint32_t new, uint8_t state) noexcept nogil:
    """The entry at slot `old` goes to slot `new` and keeps its place in the order."""
    cdef meta_link l = w.links[old]
    w.links[new] = l
    if l.older != NONE:
        w.links[l.older].newer = <uint16_t>new
    else:
        w.oldest[state] = <uint16_t>new
    if l.newer != NONE:
        w.links[l.newer].older = <uint16_t>new
    else:
        w.newest[state] = <uint16_t>new


cdef void slot_clear(meta_page *m, uint32_t hole) noexcept nogil:
    """Free a slot of tables[0] by shifting back what was probed past it (Knuth 6.4 R): no tombstones to gather."""
    cdef meta_tables *t = &m.tables[0]
    cdef uint32_t i = hole, home
    cdef int n
    order_drop(&m.writer, hole, t.neighbours[hole].state)
    m.writer.count -= 1
    for n in range(META_NEIGHBOURS):
        i = (i + 1) & (META_NEIGHBOURS - 1)
        if t.neighbours[i].state == NEIGH_FREE:
            break
        home = neigh_home(m, &t.neighbours[i].addr)
        # Only an entry whose home is not cyclically within (hole, i] may fill the hole.
        if ((i - home) & (META_NEIGHBOURS - 1)) >= ((i - hole) & (META_NEIGHBOURS - 1)):
            order_move(&m.writer, i, hole, t.neighbours[i].state)
            t.neighbours[hole] = t.neighbours[i]
            hole = i
    memset(&t.neighbours[hole], 0, sizeof(meta_neighbour))


cdef int meta_neigh_set(meta_page *m, const ul_addr *addr, const uint8_t *mac, uint8_t state, bint evict,
                        ul_addr *evicted) noexcept nogil:
    cdef meta_tables *t = &m.tables[0]
    cdef uint32_t slot = neigh_find(m, t, addr), victim = NONE
    cdef meta_neighbour *e
    if evicted != NULL:
        memset(evicted, 0, sizeof(ul_addr))
    if slot != NONE:
        e = &t.neighbours[slot]
        order_drop(&m.writer, slot, e.state)
        order_add(&m.writer, slot, state)
        if e.state == state and memcmp(e.mac, mac, 6) == 0:
            return 0
        change_begin(m)
    else:
        if m.writer.count >= META_NEIGHBOURS_MAX:
            victim = m.writer.oldest[NEIGH_FAILED]
            if victim == NONE:
                if not evict:
                    return -ENOBUFS
                victim = m.writer.oldest[NEIGH_REACHABLE]
        change_begin(m)
        if victim != NONE:
            m.evicted += 1
            if evicted != NULL:
                evicted[0] = t.neighbours[victim].addr
            slot_clear(m, victim)
        slot = neigh_home(m, addr)
        while t.neighbours[slot].state != NEIGH_FREE:      # ends: a quarter of the slots is always free
            slot = (slot + 1) & (META_NEIGHBOURS - 1)
        e = &t.neighbours[slot]
        e.addr = addr[0]
        m.writer.count += 1
        order_add(&m.writer, slot, state)
    memcpy(e.mac, mac, 6)
    e.state = state
    change_end(m)
    return 0


cdef bint meta_neigh_remove(meta_page *m, const ul_addr *addr) noexcept nogil:
    cdef uint32_t slot = neigh_find(m, &m.tables[0], addr)
    if slot == NONE:
        return False
    change_begin(m)
    slot_clear(m, slot)
    change_end(m)
    return True


cdef uint8_t meta_neigh_get(const meta_page *m, const ul_addr *addr, uint8_t *mac) noexcept nogil:
    cdef uint32_t slot = neigh_find(m, &m.tables[0], addr)
    if slot != NONE and mac != NULL:
        memcpy(mac, m.tables[0].neighbours[slot].mac, 6)
    return m.tables[0].neighbours[slot].state if slot != NONE else <uint8_t>NEIGH_FREE


# --- Python face -----------------------------------------------------------------------------------------

cdef list snapshot_rows(const meta_page *m, bint want_routes):
    """Rows of one whole state."""
    cdef uint64_t generation
    cdef meta_tables copy
    cdef int n, i
    cdef list rows = []
    for n in range(READ_TRIES):
        generation = ul_load_acquire(&m.generation)
        memcpy(&copy, &m.tables[generation & 1], sizeof(meta_tables))
        ul_fence_acquire()
        if ul_load_relaxed(&m.generation) == generation:
            break
    else:
        raise BlockingIOError(EAGAIN, "the metastate page changes faster than it can be read; try again")
    if want_routes:
        for i in range(META_ROUTES):
            if not copy.routes[i].used:
                break
            gateway = None if addr_is_zero(&copy.routes[i].gateway) else addr_to_text(&copy.routes[i].gateway)
            rows.append(Route(
                addr_to_text(&copy.routes[i].dst), prefix_narrow(&copy.routes[i].dst, copy.routes[i].prefix_len),
                gateway, copy.routes[i].metric, copy.routes[i].mtu_bytes,
            ))
        return rows
    for i in range(META_NEIGHBOURS):
        if copy.neighbours[i].state == NEIGH_REACHABLE:
            rows.append(Neighbour(addr_to_text(&copy.neighbours[i].addr), bytes(copy.neighbours[i].mac[:6]), "reachable"))
        elif copy.neighbours[i].state == NEIGH_FAILED:
            rows.append(Neighbour(addr_to_text(&copy.neighbours[i].addr), None, "failed"))
    return rows


cdef class Metastate:
    """The page. ``create`` makes a writable one, ``open`` maps somebody else's read-only.

    Attributes: ``fd`` (to pass to applications; -1 for private memory; closed with the object), ``writable``.
    One writer at a time; readers are never in its way.
    """

    def __cinit__(self) -> None:
        self.page = NULL
        self.fd = -1

    def __init__(self) -> None:
        raise TypeError("use Metastate.create(...) or Metastate.open(fd)")

    def __dealloc__(self) -> None:
        if self.page != NULL:
            munmap(self.page, sizeof(meta_page))
        if self.fd >= 0:
            c_close(self.fd)                 # at the interpreter's end there is no module os any more

    cdef meta_page *_open(self) except NULL:
        if self.page == NULL:
            raise ValueError("this Metastate has no page: use Metastate.create(...) or Metastate.open(fd)")
        return self.page

    cdef meta_page *_writable(self) except NULL:
        if not self.writable:
            raise PermissionError(1, "this metastate is mapped read-only: only the server that made it changes it")
        return self._open()

    @staticmethod
    def create(addr, prefix_len, mac, mtu, gateway=None, *, shared=True) -> Metastate:
        """A new page for our address ``addr``/``prefix_len`` with its on-link route, and a default route if
        ``gateway`` is given. ``mtu``: largest IP packet of the link in bytes (more than 65535 counts as 65535).

        ``shared=True`` puts it into a memfd whose size is sealed and which nobody else can write
        (F_SEAL_FUTURE_WRITE, Linux 5.1); ``shared=False`` into private memory, for a stack of its own.
        Raises ValueError for what cannot be an address, prefix, MAC or MTU, and OSError without memory.
        """
        cdef Metastate self = Metastate.__new__(Metastate)
        cdef void *where
        cdef ul_addr own
        cdef uint8_t own_mac[6]
        cdef uint8_t wide
        addr_from_text(addr, &own)
        wide = prefix_wide(&own, prefix_len)
        mac_from_bytes(mac, own_mac, True)
        if addr_is_zero(&own) or (addr_is_ipv4(&own) and (own.b[12] == 0 or own.b[12] >= 224)) or own.b[0] == 0xFF:
            raise ValueError(f"{addr} is not the address of one host")
        if not isinstance(mtu, int) or mtu < MTU_MIN_BYTES:
            raise ValueError(f"MTU {mtu!r} is below the {MTU_MIN_BYTES} bytes that IP needs")
        if shared:
            self.fd = os.memfd_create("ulnet-metastate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, sizeof(meta_page))
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS_SIZE)
            where = mmap(NULL, sizeof(meta_page), PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        else:
            where = mmap(NULL, sizeof(meta_page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if where == MAP_FAILED:
            raise OSError(errno, f"no memory for the metastate page: {os.strerror(errno)}")
        self.page = <meta_page *>where
        self.writable = True
        if shared:
            # From here on our mapping is the only writable one there can ever be.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        self.page.hash_seed = int.from_bytes(os.urandom(8), "little")
        self.page.size_bytes = sizeof(meta_page)
        self.page.mtu_bytes = min(mtu, MTU_MAX_BYTES)
        self.page.addr = own
        self.page.prefix_len = wide
        memcpy(self.page.mac, own_mac, 6)
        for state in range(3):
            self.page.writer.oldest[<int>state] = NONE
            self.page.writer.newest[<int>state] = NONE
        self.page.version = META_VERSION
        self.page.magic = META_MAGIC
        bits = (32 if addr_is_ipv4(&own) else 128) - prefix_len
        self.set_route(network_text(addr, bits), prefix_len)
        if gateway is not None:
            self.set_route("::" if ":" in addr else "0.0.0.0", 0, gateway)
        return self

    @staticmethod
    def open(fd) -> Metastate:
        """Map the page behind ``fd`` read-only. The caller keeps ``fd``. Raises ValueError if it is no such page."""
        cdef Metastate self = Metastate.__new__(Metastate)
        cdef void *where
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise ValueError(f"descriptor {fd} is not a metastate page: not a sealable memory file") from None
        size = os.fstat(fd).st_size
        if size != sizeof(meta_page) or seals & SEALS_SIZE != SEALS_SIZE:
            raise ValueError(
                f"descriptor {fd} is not a metastate page of this version: {size} bytes, not {sizeof(meta_page)} sealed ones"
            )
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        where = mmap(NULL, sizeof(meta_page), PROT_READ, MAP_SHARED, self.fd, 0)
        if where == MAP_FAILED:
            raise OSError(errno, f"the metastate page cannot be mapped: {os.strerror(errno)}")
        self.page = <meta_page *>where
        self.writable = False
        if self.page.magic != META_MAGIC or self.page.version != META_VERSION or self.page.size_bytes != sizeof(meta_page):
            raise ValueError(
                f"descriptor {fd} is not a metastate page of version {META_VERSION}: "
                f"magic {self.page.magic:#x}, version {self.page.version}; are server and library of one release?"
            )
        return self

    @property
    def generation(self) -> int:
        """Changes with every change of routes or neighbours; odd while one is being made."""
        return meta_generation(self._open())

    @property
    def addr(self) -> str:
        return addr_to_text(&self._open().addr)

    @property
    def prefix_len(self) -> int:
        return prefix_narrow(&self._open().addr, self._open().prefix_len)

    @property
    def mac(self) -> bytes:
        return bytes(self._open().mac[:6])

    @property
    def mtu(self) -> int:
        return self._open().mtu_bytes

    @property
    def evicted(self) -> int:
        """Neighbours thrown out because the table was full."""
        return self._open().evicted

    @property
    def shares(self) -> int:
        """How often some shared session was left with one holder, who may take it home."""
        return meta_shares(self._open())

    def bump_shares(self) -> None:
        """One more. For the server."""
        cdef meta_page *m = self._writable()
        ul_store_release(&m.shares, m.shares + 1)

    @property
    def ended(self) -> bool:
        """The server left in good order; what applications held was reset. False when it was killed: they go on."""
        return self._open().ended != 0

    def end(self) -> None:
        """Say so. For the server, before it leaves: a message might be overtaken by the news of its death."""
        self._writable().ended = 1

    def set_route(self, dst, prefix_len, gateway=None, *, metric=0, mtu=0) -> None:
        """Add the route, or replace the one with the same ``dst``/``prefix_len`` and ``metric``.

        ``gateway=None``: on the link. ``mtu=0``: the link's. Raises ValueError for a network with host bits or a
        gateway that no on-link route reaches, OSError (ENOBUFS) when all 64 places are taken.
        """
        cdef meta_page *m = self._writable()
        cdef meta_route new
        cdef meta_route *r
        cdef int i, at = 0, count = 0, same = -1
        cdef ul_addr probe
        memset(&new, 0, sizeof(new))
        addr_from_text(dst, &new.dst)
        new.prefix_len = prefix_wide(&new.dst, prefix_len)
        bits = (32 if addr_is_ipv4(&new.dst) else 128) - prefix_len
        addr_from_text(network_text(dst, bits), &probe)
        if not addr_equal(&probe, &new.dst):
            raise ValueError(f"{dst}/{prefix_len} has bits behind its prefix: did you mean {network_text(dst, bits)}/{prefix_len}?")
        if not 0 <= metric <= 0xFFFFFFFF:
            raise ValueError(f"route metric {metric} is not within 0..{0xFFFFFFFF}")
        if mtu and not MTU_MIN_BYTES <= mtu <= MTU_MAX_BYTES:
            raise ValueError(f"route MTU {mtu} is not 0 or within {MTU_MIN_BYTES}..{MTU_MAX_BYTES}")
        new.metric = metric
        new.mtu_bytes = mtu
        new.used = 1
        if gateway is not None:
            addr_from_text(gateway, &new.gateway)
            if addr_equal(&new.gateway, &m.addr):
                raise ValueError(f"gateway {gateway} of {dst}/{prefix_len} is our own address")
            if not self._on_link(&new.gateway):
                raise ValueError(
                    f"gateway {gateway} of {dst}/{prefix_len} is not on the link: add an on-link route to it first"
                )
        for i in range(META_ROUTES):
            r = &m.tables[0].routes[i]
            if not r.used:
                break
            count += 1
            if r.prefix_len > new.prefix_len or (r.prefix_len == new.prefix_len and r.metric < new.metric):
                at = i + 1
            if r.prefix_len == new.prefix_len and r.metric == new.metric and addr_equal(&r.dst, &new.dst):
                same = i
        if same >= 0:
            if memcmp(&m.tables[0].routes[same], &new, sizeof(new)) != 0:
                change_begin(m)
                m.tables[0].routes[same] = new
                change_end(m)
            return
        if count == META_ROUTES:
            raise OSError(ENOBUFS, f"no room for route {dst}/{prefix_len}: all {META_ROUTES} places are taken; summarise some")
        change_begin(m)
        memmove(&m.tables[0].routes[at + 1], &m.tables[0].routes[at], (count - at) * sizeof(meta_route))
        m.tables[0].routes[at] = new
        change_end(m)

    cdef bint _on_link(self, const ul_addr *a):
        """Whether the best route to `a` has no gateway."""
        cdef const meta_tables *t = &self.page.tables[0]
        cdef int i
        if addr_never_unicast(a):
            return False
        for i in range(META_ROUTES):
            if not t.routes[i].used:
                return False
            if prefix_covers(&t.routes[i].dst, t.routes[i].prefix_len, a):
                return addr_is_zero(&t.routes[i].gateway)
        return False

    def remove_route(self, dst, prefix_len, *, metric=0) -> bool:
        """Whether there was such a route. It is gone at the readers' next packet."""
        cdef meta_page *m = self._writable()
        cdef ul_addr net
        cdef int i, wide, same = -1, count = 0
        addr_from_text(dst, &net)
        wide = prefix_wide(&net, prefix_len)
        for i in range(META_ROUTES):
            if not m.tables[0].routes[i].used:
                break
            count += 1
            if (m.tables[0].routes[i].prefix_len == wide and m.tables[0].routes[i].metric == metric
                    and addr_equal(&m.tables[0].routes[i].dst, &net)):
                same = i
        if same < 0:
            return False
        change_begin(m)
        memmove(&m.tables[0].routes[same], &m.tables[0].routes[same + 1], (count - same - 1) * sizeof(meta_route))
        memset(&m.tables[0].routes[count - 1], 0, sizeof(meta_route))
        change_end(m)
        return True

    def routes(self) -> list[Route]:
        """Every route in the order of the search: longest prefix first, then lowest metric."""
        return snapshot_rows(self._open(), True)

    def set_neighbour(self, addr, mac) -> None:
        """``addr`` has MAC ``mac`` (6 bytes); ``mac=None``: it does not answer (EHOSTUNREACH for who sends there).

        A full table throws out an entry that failed, else the one set longest ago (see ``evicted``).
        """
        cdef meta_page *m = self._writable()
        cdef ul_addr a
        cdef uint8_t raw[6]
        addr_from_text(addr, &a)
        if addr_never_unicast(&a) or addr_equal(&a, &m.addr):
            raise ValueError(f"{addr} is no neighbour: it is our own address or not that of one host")
        memset(raw, 0, 6)
        if mac is not None:
            mac_from_bytes(mac, raw, False)
        meta_neigh_set(m, &a, raw, NEIGH_FAILED if mac is None else NEIGH_REACHABLE, True, NULL)

    def remove_neighbour(self, addr) -> bool:
        """Whether there was such an entry. Who sends there next is told EAGAIN: ask again."""
        cdef meta_page *m = self._writable()
        cdef ul_addr a
        addr_from_text(addr, &a)
        return meta_neigh_remove(m, &a)

    def neighbours(self) -> list[Neighbour]:
        """Every neighbour, in no particular order. ``state`` is 'reachable' or 'failed' (then ``mac`` is None)."""
        return snapshot_rows(self._open(), False)

    def resolve(self, addr) -> Resolution:
        """``(mac, next_hop, mtu, errno)`` for a packet to ``addr``; errno 0 or as ``meta_resolve`` has it, positive.

        EAGAIN: ``next_hop`` must be asked for first. EHOSTUNREACH: it does not answer. ENETUNREACH: no route.
        """
        cdef const meta_page *m = self._open()
        cdef ul_addr a, hop
        cdef uint8_t mac[6]
        cdef uint32_t mtu = 0
        cdef int rc
        addr_from_text(addr, &a)
        rc = meta_resolve(m, &a, mac, &hop, &mtu)
        where = None if addr_is_zero(&hop) else addr_to_text(&hop)
        return Resolution(bytes(mac[:6]) if rc == 0 else None, where, mtu, -rc)

    def probe_length(self, addr) -> int:
        """Slots of the neighbour table that a look-up of ``addr`` walks. For tests and tools; below 10 on average."""
        cdef const meta_page *m = self._open()
        cdef const meta_tables *t = &m.tables[meta_generation(m) & 1]
        cdef ul_addr a
        cdef int i, slot
        addr_from_text(addr, &a)
        for i in range(META_NEIGHBOURS):
            slot = (neigh_home(m, &a) + i) & (META_NEIGHBOURS - 1)
            if t.neighbours[slot].state == NEIGH_FREE or addr_equal(&t.neighbours[slot].addr, &a):
                return i + 1
        return META_NEIGHBOURS
