"""ARP without I/O: asks for neighbours, answers for our address, keeps the metastate page true.

Read first: RFC 826 (the merge flag), RFC 1122 (2.3.2.1: unicast poll, at most one question a second), RFC 4861
(section 10: the numbers), RFC 5227 (conflicts). The server does not see what applications send, so use never refreshes
an entry; every reachable neighbour is polled instead. Call order: see neighbour.pxd.
"""

from typing import NamedTuple

from libc.errno cimport EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EHOSTUNREACH, EINVAL, ENETUNREACH, ENOBUFS
from libc.stdint cimport INT64_MAX, INT64_MIN
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from ulnet.stack.address cimport addr_from_text, addr_is_ipv4, addr_to_text, addr_word
from ulnet.stack.metastate cimport (
    NEIGH_FAILED, NEIGH_FREE, NEIGH_REACHABLE, meta_neigh_get, meta_neigh_remove, meta_neigh_set, meta_resolve,
)
from ulnet.stack.types cimport addr_equal, addr_is_zero

cdef enum:
    NEIGH_ASKING = 3             # ours alone: nothing in the page yet
    ENTRIES = 1024               # the page's 768 and the questions
    ASKING_MAX = 256             # so that who asks for many addresses cannot push out known neighbours
    NONE = 0xFFFF
    ASK_TRIES = 3                # RFC 4861 (10) MAX_MULTICAST_SOLICIT; Linux mcast_solicit
    POLL_TRIES = 3               # RFC 4861 (10) MAX_UNICAST_SOLICIT; RFC 1122 (2.3.2.1) says typically 2
    ANNOUNCE_NUM = 2             # RFC 5227 (1.1)
    ARP_REQUEST = 1
    ARP_REPLY = 2

cdef int64_t SECOND_NS = 1_000_000_000
cdef int64_t RETRANS_NS = SECOND_NS            # RFC 4861 (10) RETRANS_TIMER; RFC 1122 (2.3.2.1): not more often
cdef int64_t REACHABLE_NS = 30 * SECOND_NS     # RFC 4861 (10) REACHABLE_TIME; less up to a fifth, spread by address
cdef int64_t FAILED_NS = 3 * SECOND_NS         # as long as it took to find out; then the next packet asks again
cdef int64_t LOCK_NS = SECOND_NS               # Linux locktime: the first of several answers counts
cdef int64_t ANNOUNCE_INTERVAL_NS = 2 * SECOND_NS   # RFC 5227 (1.1)
cdef int64_t ANNOUNCE_WAIT_NS = 2 * SECOND_NS       # RFC 5227 (1.1): silence after the last probe
cdef int64_t DEFEND_INTERVAL_NS = 10 * SECOND_NS    # RFC 5227 (1.1)

# RFC 5227 (1.1): PROBE_NUM 3, PROBE_MIN 1 s; the short form is for tests and for links that cannot have a stranger.
PROBE_NUM = 3
PROBE_INTERVAL_NS = 1_000_000_000

cdef const uint8_t *BROADCAST = b"\xff\xff\xff\xff\xff\xff"
cdef const uint8_t *ZERO_MAC = b"\0\0\0\0\0\0"


# --- the table -------------------------------------------------------------------------------------------

cdef neigh_table *neigh_new(meta_page *writable_page) noexcept nogil:
    cdef neigh_table *t = <neigh_table *>calloc(1, sizeof(neigh_table))
    if t == NULL:
        return NULL
    t.entries = <neigh_entry *>calloc(ENTRIES, sizeof(neigh_entry))
    t.chains = <uint16_t *>calloc(ENTRIES, sizeof(uint16_t))
    if t.entries == NULL or t.chains == NULL:
        neigh_free(t)
        return NULL
    t.page = writable_page
    t.defended_ns = INT64_MIN
    table_reset(t)
    return t


cdef void neigh_free(neigh_table *t) noexcept nogil:
    if t != NULL:
        free(t.entries)
        free(t.chains)
        free(t)


cdef void table_reset(neigh_table *t) noexcept nogil:
    cdef int i
    memset(t.entries, 0, ENTRIES * sizeof(neigh_entry))
    for i in range(ENTRIES):
        t.chains[i] = NONE
        t.entries[i].next = <uint16_t>(i + 1) if i + 1 < ENTRIES else <uint16_t>NONE
    t.free = 0
    t.count = 0
    t.asking = 0
    if t.addr_left == 0:
        t.next_ns = INT64_MAX


cdef uint32_t chain_of(const neigh_table *t, const ul_addr *a) noexcept nogil:
    cdef uint64_t h = t.page.hash_seed ^ addr_word(a, 0) ^ addr_word(a, 1)
    h = (h ^ (h >> 32)) * <uint64_t>0x9E3779B97F4A7C15   # folded: the high bits must see the address's last byte
    h = (h ^ (h >> 32)) * <uint64_t>0xC4CEB9FE1A85EC53
    return <uint32_t>(h >> 54)               # ten bits: 0..ENTRIES - 1


cdef neigh_entry *entry_find(const neigh_table *t, const ul_addr *a) noexcept nogil:
    cdef uint16_t i = t.chains[chain_of(t, a)]
    while i != NONE:
        if addr_equal(&t.entries[i].addr, a):
            return &t.entries[i]
        i = t.entries[i].next
    return NULL


cdef neigh_entry *entry_new(neigh_table *t, const ul_addr *a) noexcept nogil:
    cdef uint16_t i = t.free
    cdef uint32_t chain = chain_of(t, a)
    cdef neigh_entry *e
    if i == NONE:
        return NULL
    e = &t.entries[i]
    t.free = e.next
    memset(e, 0, sizeof(neigh_entry))
    e.addr = a[0]
    e.next = t.chains[chain]
    e.updated_ns = INT64_MIN
    t.chains[chain] = i
    t.count += 1
    return e


cdef void entry_drop(neigh_table *t, neigh_entry *e) noexcept nogil:
    cdef uint32_t chain = chain_of(t, &e.addr)
    cdef uint16_t me = <uint16_t>(e - t.entries), i = t.chains[chain]
    if i == me:
        t.chains[chain] = e.next
    else:
        while t.entries[i].next != me:
            i = t.entries[i].next
        t.entries[i].next = e.next
    if e.state == NEIGH_ASKING:
        t.asking -= 1
    e.state = NEIGH_FREE
    e.next = t.free
    t.free = me
    t.count -= 1


cdef void entry_due(neigh_table *t, neigh_entry *e, int64_t due_ns) noexcept nogil:
    e.due_ns = due_ns
    if due_ns < t.next_ns:
        t.next_ns = due_ns


cdef void addr_due(neigh_table *t, int64_t due_ns) noexcept nogil:
    t.addr_due_ns = due_ns
    if due_ns < t.next_ns:
        t.next_ns = due_ns


cdef int page_set(neigh_table *t, neigh_entry *e, uint8_t state, bint evict) noexcept nogil:
    """Show an entry in the page; who had to go there goes here too."""
    cdef ul_addr evicted
    cdef neigh_entry *old
    cdef int rc = meta_neigh_set(t.page, &e.addr, e.mac, state, evict, &evicted)
    if rc < 0:
        t.n.refused_full += 1
        return rc
    if not addr_is_zero(&evicted):
        old = entry_find(t, &evicted)
        if old != NULL and old != e:
            entry_drop(t, old)
    if e.state == NEIGH_ASKING:
        t.asking -= 1
    e.state = state
    e.tries = 0
    return 0


cdef void entry_confirmed(neigh_table *t, neigh_entry *e, int64_t now_ns) noexcept nogil:
    """Seen alive now: the next poll in 24 to 30 s, so that neighbours learned together are not polled together."""
    e.tries = 0
    entry_due(t, e, now_ns + REACHABLE_NS - (REACHABLE_NS / 5 / ENTRIES) * chain_of(t, &e.addr))


# --- sending ---------------------------------------------------------------------------------------------

cdef int arp_send(neigh_table *t, neigh_env *env, uint16_t op, const uint8_t *dst, const ul_addr *spa,
                  const uint8_t *tha, const ul_addr *tpa) noexcept nogil:
    cdef arp_pkt arp
    cdef int rc
    memset(&arp, 0, sizeof(arp))
    arp.op = op
    memcpy(arp.sha, t.page.mac, 6)
    memcpy(arp.tha, tha, 6)
    arp.spa = spa[0]
    arp.tpa = tpa[0]
    rc = env.emit(env.ctx, dst, &arp)
    if rc < 0:
        t.n.emit_failed += 1
    return rc


cdef void ask_send(neigh_table *t, neigh_env *env, neigh_entry *e) noexcept nogil:
    t.n.requests_out += 1
    e.tries += 1
    arp_send(t, env, ARP_REQUEST, BROADCAST, &t.page.addr, ZERO_MAC, &e.addr)
    entry_due(t, e, env.now_ns + RETRANS_NS)


cdef void poll_send(neigh_table *t, neigh_env *env, neigh_entry *e) noexcept nogil:
    # RFC 1122 (2.3.2.1 (2)): a question straight to the MAC we believe in
    t.n.probes_out += 1
    e.tries += 1
    arp_send(t, env, ARP_REQUEST, e.mac, &t.page.addr, e.mac, &e.addr)
    entry_due(t, e, env.now_ns + RETRANS_NS)


cdef int announce_send(neigh_table *t, neigh_env *env) noexcept nogil:
    # RFC 5227 (2.3): a request whose sender and target are both our address
    t.n.announcements_out += 1
    return arp_send(t, env, ARP_REQUEST, BROADCAST, &t.page.addr, ZERO_MAC, &t.page.addr)


cdef void probe_send(neigh_table *t, neigh_env *env) noexcept nogil:
    # RFC 5227 (2.1.1): sender address zero, so that nobody's table changes
    cdef ul_addr nobody = t.page.addr
    memset(&nobody.b[12], 0, 4)
    t.n.announcements_out += 1
    arp_send(t, env, ARP_REQUEST, BROADCAST, &nobody, ZERO_MAC, &t.page.addr)


# --- asking ----------------------------------------------------------------------------------------------

cdef int on_link(const neigh_table *t, const ul_addr *a, int *rc) noexcept nogil:
    """1: a host on the link; 0: one behind a gateway; -1: no other host at all. *rc as meta_resolve."""
    cdef uint8_t mac[6]
    cdef ul_addr hop
    cdef uint32_t mtu
    rc[0] = meta_resolve(t.page, a, mac, &hop, &mtu)
    if rc[0] == -ENETUNREACH or addr_equal(a, &t.page.addr):
        return -1
    if rc[0] == 0 and mac[0] & 1:            # the subnet's broadcast address
        return -1
    return addr_equal(&hop, a)


cdef int neigh_ask(neigh_table *t, neigh_env *env, const ul_addr *next_hop) noexcept nogil:
    cdef neigh_entry *e
    cdef int rc
    if t.addr_state != NEIGH_ADDR_CLAIMED:
        return -EAGAIN if t.addr_state == NEIGH_ADDR_PROBING else -EADDRNOTAVAIL
    if addr_equal(next_hop, &t.page.addr):
        return -EINVAL
    if on_link(t, next_hop, &rc) != 1:
        return -ENETUNREACH
    if not addr_is_ipv4(next_hop):
        return -EAFNOSUPPORT                 # ARP speaks of IPv4 only
    if rc == 0 or rc == -EHOSTUNREACH:
        return rc
    e = entry_find(t, next_hop)
    if e != NULL and e.state == NEIGH_ASKING:
        return 0
    if e != NULL and e.state == NEIGH_REACHABLE:
        return page_set(t, e, NEIGH_REACHABLE, True)     # somebody else's entry had pushed it out of the page
    if e != NULL:
        entry_drop(t, e)
    if t.asking >= ASKING_MAX:
        t.n.refused_full += 1
        return -ENOBUFS
    e = entry_new(t, next_hop)
    if e == NULL:
        t.n.refused_full += 1
        return -ENOBUFS
    e.state = NEIGH_ASKING
    t.asking += 1
    ask_send(t, env, e)
    return 0


# --- hearing ---------------------------------------------------------------------------------------------

cdef bint addr_unspecified(const ul_addr *a) noexcept nogil:
    return a.b[12] == 0 and a.b[13] == 0 and a.b[14] == 0 and a.b[15] == 0


cdef void conflict_seen(neigh_table *t, neigh_env *env, const arp_pkt *arp) noexcept nogil:
    t.n.conflicts += 1
    memcpy(t.conflict_mac, arp.sha, 6)
    if t.addr_state == NEIGH_ADDR_PROBING:
        t.addr_state = NEIGH_ADDR_CONFLICT
        t.addr_left = 0
    elif t.addr_state == NEIGH_ADDR_CLAIMED:
        # RFC 5227 (2.4 (c)): a server keeps its address and says so, but not more than once in ten seconds
        if t.defended_ns == INT64_MIN or env.now_ns - t.defended_ns >= DEFEND_INTERVAL_NS:
            t.defended_ns = env.now_ns
            announce_send(t, env)


cdef bint set_by_hand(neigh_table *t, const neigh_entry *e) noexcept nogil:
    """Whether the page says about this address what we did not write: then it is the administrator's."""
    cdef uint8_t mac[6]
    cdef uint8_t state = meta_neigh_get(t.page, &e.addr, mac)
    if state == NEIGH_FREE:
        return False
    return state != e.state or (state == NEIGH_REACHABLE and memcmp(mac, e.mac, 6) != 0)


cdef void merge(neigh_table *t, neigh_env *env, neigh_entry *e, const arp_pkt *arp, bint for_us) noexcept nogil:
    """RFC 826's merge: a sender we have an entry of tells its MAC."""
    cdef bint same = memcmp(e.mac, arp.sha, 6) == 0
    if set_by_hand(t, e):
        entry_drop(t, e)
        return
    if e.state == NEIGH_REACHABLE:
        if same:
            if for_us:
                entry_confirmed(t, e, env.now_ns)
                page_set(t, e, NEIGH_REACHABLE, True)    # sets its age; brings it back if it had been pushed out
            return
        if env.now_ns - e.updated_ns < LOCK_NS:
            t.n.refused_locked += 1
            return
        t.n.moved += 1
    else:
        t.n.learned += 1
    memcpy(e.mac, arp.sha, 6)
    e.updated_ns = env.now_ns
    page_set(t, e, NEIGH_REACHABLE, True)
    entry_confirmed(t, e, env.now_ns)
    if not for_us:
        # Said to everybody, not answered to us: believed (RFC 826), but asked whether it hears us there.
        entry_due(t, e, env.now_ns + RETRANS_NS)


cdef void learn(neigh_table *t, neigh_env *env, const arp_pkt *arp) noexcept nogil:
    """Who asks for us will get packets from us (RFC 826); but a stranger never pushes out a neighbour that answers."""
    cdef neigh_entry *e
    if meta_neigh_get(t.page, &arp.spa, NULL) != NEIGH_FREE:
        return                               # set by hand in the page: not ours to change
    e = entry_new(t, &arp.spa)
    if e == NULL:
        t.n.refused_full += 1
        return
    memcpy(e.mac, arp.sha, 6)
    e.updated_ns = env.now_ns
    if page_set(t, e, NEIGH_REACHABLE, False) < 0:
        entry_drop(t, e)
        return
    t.n.learned += 1
    entry_confirmed(t, e, env.now_ns)


cdef void neigh_input(neigh_table *t, neigh_env *env, const arp_pkt *arp) noexcept nogil:
    cdef neigh_entry *e
    cdef bint for_us = addr_equal(&arp.tpa, &t.page.addr)
    cdef bint nobody = addr_unspecified(&arp.spa)
    cdef int rc, where
    if (arp.op != ARP_REQUEST and arp.op != ARP_REPLY) or arp.sha[0] & 1 or memcmp(arp.sha, ZERO_MAC, 6) == 0:
        t.n.bad_in += 1
        return
    if memcmp(arp.sha, t.page.mac, 6) == 0:
        return                               # our own, come back
    if addr_equal(&arp.spa, &t.page.addr) or (
            nobody and for_us and arp.op == ARP_REQUEST and t.addr_state == NEIGH_ADDR_PROBING):
        # RFC 5227 (2.1.1): its owner speaks, or another host probes for the same address at the same time
        conflict_seen(t, env, arp)
        return
    if t.addr_state != NEIGH_ADDR_CLAIMED:
        return
    if arp.op == ARP_REQUEST:
        t.n.requests_in += for_us
    else:
        t.n.replies_in += 1
    if not nobody:
        e = entry_find(t, &arp.spa)
        if e != NULL:
            merge(t, env, e, arp, for_us and (arp.op == ARP_REQUEST or memcmp(arp.tha, t.page.mac, 6) == 0))
        else:
            where = on_link(t, &arp.spa, &rc)
            if where < 0:
                t.n.bad_in += 1              # a group's, a loopback or broadcast address, or of no net we know
                return
            if where == 1 and for_us and arp.op == ARP_REQUEST:
                learn(t, env, arp)
    if arp.op == ARP_REQUEST and for_us:
        t.n.replies_out += 1
        arp_send(t, env, ARP_REPLY, arp.sha, &t.page.addr, arp.sha, &arp.spa)


# --- time ------------------------------------------------------------------------------------------------

cdef int64_t neigh_deadline(const neigh_table *t) noexcept nogil:
    return t.next_ns


cdef void addr_timer(neigh_table *t, neigh_env *env) noexcept nogil:
    if t.addr_state == NEIGH_ADDR_CLAIMED:
        t.addr_left -= 1
        announce_send(t, env)
        t.addr_due_ns = env.now_ns + ANNOUNCE_INTERVAL_NS
        return
    t.addr_left -= 1
    if t.addr_left > 1:
        probe_send(t, env)
        t.addr_due_ns = env.now_ns + t.addr_interval_ns
    elif t.addr_left == 1:                   # the last probe; then silence for as long as RFC 5227 wants
        probe_send(t, env)
        t.addr_due_ns = env.now_ns + max(t.addr_interval_ns, min(ANNOUNCE_WAIT_NS, 2 * t.addr_interval_ns))
    else:
        t.addr_state = NEIGH_ADDR_CLAIMED
        neigh_announce(t, env)


cdef void entry_timer(neigh_table *t, neigh_env *env, neigh_entry *e) noexcept nogil:
    if set_by_hand(t, e):
        entry_drop(t, e)
        return
    if e.state == NEIGH_ASKING:
        if e.tries < ASK_TRIES:
            ask_send(t, env, e)
            return
        t.n.failed += 1
        if page_set(t, e, NEIGH_FAILED, False) < 0:
            entry_drop(t, e)                 # a table full of neighbours that answer: nothing to say about this one
        else:
            entry_due(t, e, env.now_ns + FAILED_NS)
    elif e.state == NEIGH_REACHABLE:
        if meta_neigh_get(t.page, &e.addr, NULL) != NEIGH_REACHABLE:
            entry_drop(t, e)                 # taken out by hand, or pushed out by an entry made by hand
        elif e.tries < POLL_TRIES:
            poll_send(t, env, e)
        else:
            t.n.lost += 1
            meta_neigh_remove(t.page, &e.addr)
            entry_drop(t, e)
    else:
        meta_neigh_remove(t.page, &e.addr)
        entry_drop(t, e)


cdef void neigh_timers(neigh_table *t, neigh_env *env) noexcept nogil:
    cdef int i
    if env.now_ns < t.next_ns:
        return
    if t.addr_left and t.addr_due_ns <= env.now_ns:
        addr_timer(t, env)
    for i in range(ENTRIES):
        if t.entries[i].state != NEIGH_FREE and t.entries[i].due_ns <= env.now_ns:
            entry_timer(t, env, &t.entries[i])
    t.next_ns = t.addr_due_ns if t.addr_left else INT64_MAX
    for i in range(ENTRIES):
        if t.entries[i].state != NEIGH_FREE and t.entries[i].due_ns < t.next_ns:
            t.next_ns = t.entries[i].due_ns


cdef int neigh_announce(neigh_table *t, neigh_env *env) noexcept nogil:
    if t.addr_state != NEIGH_ADDR_CLAIMED:
        return -EAGAIN if t.addr_state == NEIGH_ADDR_PROBING else -EADDRNOTAVAIL
    t.addr_left = ANNOUNCE_NUM - 1
    addr_due(t, env.now_ns + ANNOUNCE_INTERVAL_NS)
    return announce_send(t, env)


cdef void neigh_probe(neigh_table *t, neigh_env *env, uint8_t count, int64_t interval_ns) noexcept nogil:
    # addr_left counts the first probe, sent here, and one step more: the silence at the end.
    if count == 0:
        count = 1
    t.addr_state = NEIGH_ADDR_PROBING
    t.addr_interval_ns = interval_ns
    t.addr_left = count
    probe_send(t, env)
    addr_due(t, env.now_ns + (interval_ns if count > 1 else min(ANNOUNCE_WAIT_NS, 2 * interval_ns)))


cdef int neigh_address(const neigh_table *t) noexcept nogil:
    return t.addr_state


cdef void neigh_flush(neigh_table *t) noexcept nogil:
    cdef int i
    for i in range(ENTRIES):
        if t.entries[i].state == NEIGH_REACHABLE or t.entries[i].state == NEIGH_FAILED:
            meta_neigh_remove(t.page, &t.entries[i].addr)
    table_reset(t)
    if t.addr_left:
        t.next_ns = t.addr_due_ns


# --- Python face -----------------------------------------------------------------------------------------

ArpMessage = NamedTuple("ArpMessage", [
    ("dst_mac", bytes), ("op", int), ("sha", bytes), ("spa", str), ("tha", bytes), ("tpa", str),
])
ArpMessage.__module__ = __name__


cdef int collect(void *ctx, const uint8_t *dst_mac, const arp_pkt *arp) noexcept with gil:
    cdef NeighbourTable self = <NeighbourTable>ctx
    if self.refuse:
        return -EAGAIN
    self.sent.append(ArpMessage(
        bytes(dst_mac[:6]), arp.op, bytes(arp.sha[:6]), addr_to_text(&arp.spa), bytes(arp.tha[:6]), addr_to_text(&arp.tpa)
    ))
    return 0


cdef class NeighbourTable:
    """The machine with its frames in a list: for tests, simulators and tools. ``now_ns`` is any clock that goes forward.

    ``sent``: messages emitted, in order; the caller empties it. ``refuse``: True: the link takes nothing.
    """

    cdef neigh_table *t
    cdef readonly Metastate meta
    cdef public list sent
    cdef public bint refuse

    def __cinit__(self, meta: Metastate) -> None:
        self.t = neigh_new((<Metastate>meta)._writable())
        if self.t == NULL:
            raise MemoryError("no memory for the neighbour table")
        self.meta = meta
        self.sent = []

    def __dealloc__(self) -> None:
        neigh_free(self.t)

    cdef neigh_env _env(self, int64_t now_ns):
        cdef neigh_env env
        env.now_ns = now_ns
        env.ctx = <void *>self
        env.emit = &collect
        return env

    def ask(self, addr, now_ns) -> int:
        """Ask for a neighbour; 0 or a positive errno as neigh_ask has it."""
        cdef neigh_env env = self._env(now_ns)
        cdef ul_addr a
        addr_from_text(addr, &a)
        return -neigh_ask(self.t, &env, &a)

    def input(self, op, sha, spa, tha, tpa, now_ns) -> None:
        """An ARP message arrived."""
        cdef neigh_env env = self._env(now_ns)
        cdef arp_pkt arp
        if len(sha) != 6 or len(tha) != 6:
            raise ValueError(f"a MAC address is 6 bytes, not {sha!r} and {tha!r}")
        arp.op = op
        memcpy(arp.sha, <const uint8_t *><bytes>sha, 6)
        memcpy(arp.tha, <const uint8_t *><bytes>tha, 6)
        addr_from_text(spa, &arp.spa)
        addr_from_text(tpa, &arp.tpa)
        neigh_input(self.t, &env, &arp)

    def timers(self, now_ns) -> None:
        """Do what is due."""
        cdef neigh_env env = self._env(now_ns)
        neigh_timers(self.t, &env)

    def deadline_ns(self) -> int | None:
        """When timers() has something to do."""
        cdef int64_t due = neigh_deadline(self.t)
        return None if due == INT64_MAX else due

    def announce(self, now_ns) -> int:
        """Tell everybody our MAC, twice; 0 or a positive errno."""
        cdef neigh_env env = self._env(now_ns)
        return -neigh_announce(self.t, &env)

    def probe(self, now_ns, count=PROBE_NUM, interval_ns=PROBE_INTERVAL_NS) -> None:
        """Ask whether somebody has our address before it is used (RFC 5227 2.1.1)."""
        cdef neigh_env env = self._env(now_ns)
        if not 1 <= count <= 10 or interval_ns < 1:
            raise ValueError(f"{count} probes {interval_ns} ns apart: 1 to 10 probes, at least 1 ns apart")
        neigh_probe(self.t, &env, count, interval_ns)

    def flush(self) -> None:
        """Forget everything learned."""
        neigh_flush(self.t)

    @property
    def address_state(self) -> str:
        """'claimed', 'probing' or 'conflict'."""
        return ("claimed", "probing", "conflict")[neigh_address(self.t)]

    @property
    def conflict_mac(self) -> bytes | None:
        """Who else used our address last."""
        return bytes(self.t.conflict_mac[:6]) if self.t.n.conflicts else None

    def __len__(self) -> int:
        """Neighbours known, failed or asked for."""
        return self.t.count

    def counters(self) -> dict[str, int]:
        return self.t.n
