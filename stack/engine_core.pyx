"""The engine's inside: sessions, the flow table, the timer heap, and the end of a burst.

One reason: it owns every ``ul_session`` and brings each one up to date once a burst
(TCP output, timer, readiness, waiters, descriptor, events). What a frame means is in
``engine_input``, how one leaves in ``engine_output``, who waits and drives in ``engine_wait``.
"""

from libc.errno cimport EADDRINUSE, ECONNABORTED, ENOMEM
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close

from ulnet.kernelshim.fastpaths cimport fast_features, fast_spin_ns
from ulnet.kernelshim.link cimport UL_FRAME_NO_TOKEN, UL_LINK_TSO, UL_SLOT_NONE, ul_link, ul_rx
from ulnet.stack.buf cimport bufpool_destroy, bufpool_init, bufpool_relieve
from ulnet.stack.engine_input cimport engine_frame, orphans_expire
from ulnet.stack.engine_output cimport emit_arp, emit_reassembly_timeouts, emit_tcp
from ulnet.stack.engine_polls cimport polls_closed, polls_show
from ulnet.stack.engine_wait cimport engine_kick, engine_wait_end, engine_wait_init, waiters_wake
from ulnet.stack.ip_reass cimport ip_reass_deadline, ip_reass_free, ip_reass_new, ip_reass_timers
from ulnet.stack.neighbour cimport neigh_deadline, neigh_free, neigh_new, neigh_timers
from ulnet.stack.readyfd cimport readyfd_free, readyfd_show
from ulnet.stack.session_shared cimport shared_ready, shared_wake
from ulnet.stack.statpage cimport stat_give, stat_settle, stat_take, stat_unsettle
from ulnet.stack.stamps cimport STAMP_FRAME, STAMP_OUTPUT, stamp
from ulnet.stack.tcp cimport (
    tcp_abort, tcp_close, tcp_deadline, tcp_free, tcp_new, tcp_output, tcp_ready, tcp_so_error, tcp_stat_get,
    tcp_stat, tcp_state, tcp_timers, tcp_wants_output,
)
from ulnet.stack.tcp_cb cimport TCP_CLOSED, TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_SYN_RECEIVED, TCP_SYN_SENT
from ulnet.stack.types cimport (
    UL_ERROR, UL_HUP, UL_IPPROTO_TCP, UL_RDHUP, UL_READABLE, UL_WRITABLE, flow_equal, flow_hash, flow_key,
)
from ulnet.stack.udp cimport udp_free, udp_ready

cdef enum:
    TABLE_MIN = 64
    MAX_GSO_PAYLOAD = 65160        # 45 * 1448: a multiple of the usual MSS; TCP rounds to its own
    BURST_BYTES = 4 * 65160        # without offload its ACKs fill most of a ring
    LOOKS = 8
    ROUNDS_FULL_MAX = 4
    DRAIN_FRAMES = 256             # about what the rings hold
    ENDS_MANY = 256
    NUMBER_MAX = 0x7FFFFFFF        # protocol.SERVER_NUMBER - 1
    GLANCE_CALLS = 8               # of the slots, what a peer fills meanwhile is a small part


cdef extern from *:
    """
    static inline void ulnet_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #endif
    }
    """
    void ulnet_pause() nogil


cdef int64_t clock_now() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return ts.tv_sec * 1000000000 + ts.tv_nsec


cdef int64_t time_of_day() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_REALTIME, &ts)
    return <int64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


cdef void engine_tick(engine *e) noexcept nogil:
    """Look at the clock, once, for everything below that is told the time."""
    e.now_ns = clock_now()
    e.env.now_ns = e.now_ns
    e.nenv.now_ns = e.now_ns


cdef engine *engine_new(ul_link *link, meta_page *meta, bint library, const uint8_t *secret, int64_t spin_ns) noexcept nogil:
    cdef engine *e = <engine *>calloc(1, sizeof(engine))
    if e == NULL:
        return NULL
    e.link = link
    e.meta = meta
    e.library = library
    e.spin_ns = fast_spin_ns(spin_ns)
    link.features = fast_features(link.features)
    memcpy(e.secret, secret, 16)
    e.ip_ident = <uint16_t>(secret[0] | (secret[1] << 8))
    e.table = <ul_session **>calloc(TABLE_MIN, sizeof(void *))
    e.table_mask = TABLE_MIN - 1
    e.heap_cap = TABLE_MIN
    e.heap = <ul_session **>malloc(TABLE_MIN * sizeof(void *))
    bufpool_init(&e.bufs, link)
    e.env.bufs = &e.bufs
    e.env.ctx = e
    e.env.emit = emit_tcp
    e.env.counters = &e.tcp
    e.env.max_gso_bytes = MAX_GSO_PAYLOAD if link.features & UL_LINK_TSO else 0
    e.env.burst_bytes = BURST_BYTES
    e.nenv.ctx = e
    e.nenv.emit = emit_arp
    e.reass = ip_reass_new()
    if not library:
        e.neigh = neigh_new(meta)
    engine_tick(e)
    if e.table == NULL or e.heap == NULL or e.reass == NULL or (e.neigh == NULL and not library) or engine_wait_init(e) < 0:
        engine_free(e)
        return NULL
    return e


cdef uint64_t engine_number(engine *e) noexcept nogil:
    if e.serial == 0:
        return 0
    e.next_number = e.next_number % NUMBER_MAX + 1
    return e.serial | e.next_number


cdef bint engine_leases(const engine *e, uint16_t port) noexcept nogil:
    return e.leased != NULL and (e.leased[port >> 3] >> (port & 7)) & 1


cdef void frames_free(frame_rec *f) noexcept nogil:
    cdef frame_rec *nxt
    while f != NULL:
        nxt = f.next
        free(f.data)
        free(f)
        f = nxt


cdef void engine_free(engine *e) noexcept nogil:
    cdef event_rec *ev
    cdef ul_session *s = e.all
    cdef ul_session *nxt
    while s != NULL:
        # Handles are gone by now (each holds the Engine), so nobody looks at a shell any more.
        nxt = s.all_next
        if s.tcp != NULL:
            tcp_free(&e.env, s.tcp)
        if s.udp != NULL:
            udp_free(&e.bufs, s.udp)
        if s.fd != NULL:
            readyfd_free(s.fd)
        if s.stat != NULL:
            stat_give(s.stat)
        if s.shared_wake >= 0:
            close(s.shared_wake)
        free(s)
        s = nxt
    while e.events_head != NULL:
        ev = e.events_head
        e.events_head = ev.next
        free(ev)
    frames_free(e.strays)
    frames_free(e.orphans)
    free(e.leased)
    engine_wait_end(e)
    if e.neigh != NULL:
        neigh_free(e.neigh)
    if e.reass != NULL:
        ip_reass_free(e.reass)
    bufpool_destroy(&e.bufs)
    free(e.table)
    free(e.heap)
    free(e)


# ---------------------------------------------------------------- sessions

cdef ul_session *session_new(engine *e, uint8_t kind) noexcept nogil:
    cdef ul_session *s = <ul_session *>calloc(1, sizeof(ul_session))
    if s == NULL:
        e.n.nomem += 1
        return NULL
    s.flow.proto = kind
    s.refs = 1
    s.ttl = 64
    s.mtu_discover = 1                     # ip(7), IP_PMTUDISC_WANT
    s.deadline_ns = INT64_MAX
    s.shared_wake = -1
    s.all_next = e.all
    if e.all != NULL:
        e.all.all_prev = s
    e.all = s
    e.all_count += 1
    return s


cdef void session_ref(ul_session *s) noexcept nogil:
    s.refs += 1


cdef void session_unref(engine *e, ul_session *s) noexcept nogil:
    s.refs -= 1
    if s.refs:
        return
    session_end(e, s, 0)
    session_fd_free(e, s)
    if s.shared_wake >= 0:
        close(s.shared_wake)
    if s.all_prev != NULL:
        s.all_prev.all_next = s.all_next
    else:
        e.all = s.all_next
    if s.all_next != NULL:
        s.all_next.all_prev = s.all_prev
    e.all_count -= 1
    free(s)


cdef int table_grow(engine *e) noexcept nogil:
    cdef uint32_t size = (e.table_mask + 1) * 2
    cdef ul_session **bigger = <ul_session **>calloc(size, sizeof(void *))
    cdef ul_session *s
    cdef ul_session *nxt
    cdef uint32_t i, at
    if bigger == NULL:
        return -ENOMEM
    for i in range(e.table_mask + 1):
        s = e.table[i]
        while s != NULL:
            nxt = s.hash_next
            at = <uint32_t>flow_hash(&s.flow) & (size - 1)
            s.hash_next = bigger[at]
            bigger[at] = s
            s = nxt
    free(e.table)
    e.table = bigger
    e.table_mask = size - 1
    return 0


cdef int session_insert(engine *e, ul_session *s) noexcept nogil:
    cdef ul_session *old = session_find(e, &s.flow)
    cdef uint32_t at
    if old != NULL:
        if old.role != ROLE_FOREIGN:
            return -EADDRINUSE
        session_remove(e, old)             # the session comes home
    if e.table_count > e.table_mask:
        table_grow(e)                      # without memory chains get longer, no more
    at = <uint32_t>flow_hash(&s.flow) & e.table_mask
    s.hash_next = e.table[at]
    e.table[at] = s
    s.in_table = 1
    e.table_count += 1
    s.refs += 1
    return 0


cdef void session_remove(engine *e, ul_session *s) noexcept nogil:
    cdef ul_session **at
    if not s.in_table:
        return
    at = &e.table[<uint32_t>flow_hash(&s.flow) & e.table_mask]
    while at[0] != s:
        at = &at[0].hash_next
    at[0] = s.hash_next
    s.hash_next = NULL
    s.in_table = 0
    e.table_count -= 1
    heap_remove(e, s)
    session_unref(e, s)


cdef ul_session *session_find(engine *e, const flow_key *flow) noexcept nogil:
    cdef ul_session *s = e.table[<uint32_t>flow_hash(flow) & e.table_mask]
    while s != NULL and not flow_equal(&s.flow, flow):
        s = s.hash_next
    return s


cdef void session_touch(engine *e, ul_session *s) noexcept nogil:
    if s.touched:
        return
    s.touched = 1
    s.refs += 1
    s.touched_next = e.touched
    e.touched = s


cdef uint32_t session_ready(const ul_session *s) noexcept nogil:
    if s.role == ROLE_TCP:
        return tcp_ready(s.tcp)
    if s.role == ROLE_UDP:
        return udp_ready(s.udp) | UL_WRITABLE | (UL_READABLE | UL_RDHUP if s.shut_rd else 0) | (
            UL_HUP if s.shut_rd and s.shut_wr else 0)
    if s.role == ROLE_LISTEN:
        return (UL_READABLE if s.accept_count or s.shut_rd else 0) | (UL_HUP if s.shut_rd else 0)
    if s.role == ROLE_POLLSET:
        return UL_READABLE if s.accept_count else 0
    if s.role == ROLE_SHARED:
        return shared_ready(s)
    if s.role == ROLE_ENDED or s.role == ROLE_STAYED:
        return UL_READABLE | UL_WRITABLE | UL_HUP | (UL_ERROR if s.so_error else 0)
    if s.phase == PHASE_CONNECTING:
        return 0
    # differs: Linux adds HUP to a TCP socket that was never connected. A descriptor cannot take a hang-up back
    # (readyfd), and who registers it before connecting wants to hear of the connection.
    return UL_WRITABLE


cdef uint32_t session_shown(const ul_session *s) noexcept nogil:
    # socket(7), SO_RCVLOWAT: less than that is not readable to poll(2), unless no more is to come.
    cdef tcp_stat t
    cdef uint32_t ready = session_ready(s)
    if s.role == ROLE_TCP and s.rcvlowat_bytes > 1 and ready & UL_READABLE and \
            not ready & (UL_RDHUP | UL_HUP | UL_ERROR):
        tcp_stat_get(s.tcp, &t)
        if 0 < t.unread_bytes < s.rcvlowat_bytes:
            ready &= ~<uint32_t>UL_READABLE
    return ready


cdef int session_tcp_start(engine *e, ul_session *s) noexcept nogil:
    """Give the session a control block and a place in the flow table."""
    cdef int rc
    s.tcp = tcp_new(&e.env, &s.cfg, s)
    if s.tcp == NULL:
        e.n.nomem += 1
        return -ENOMEM
    s.role = ROLE_TCP
    rc = session_insert(e, s)
    if rc < 0:
        tcp_free(&e.env, s.tcp)
        s.tcp = NULL
        s.role = ROLE_SHELL
    return rc


cdef void embryo_leave(engine *e, ul_session *s) noexcept nogil:
    """s is no longer on its way into its listener's queue."""
    cdef ul_session *listener = s.listener
    if listener == NULL:
        return
    s.listener = NULL
    if s.phase == PHASE_EMBRYONIC:
        listener.embryonic -= 1
    s.phase = PHASE_OPEN
    session_unref(e, listener)


cdef void session_end(engine *e, ul_session *s, int error) noexcept nogil:
    """Drop protocol state and everything held for it; the shell stays for those who hold references."""
    cdef ul_session *child
    cdef ul_session *nxt
    cdef uint8_t role = s.role
    if role == ROLE_ENDED:
        return
    s.role = ROLE_ENDED
    if error:
        s.so_error = error
    if s.fd != NULL and s.refs:
        # Before anything is freed: the descriptor must show the end even if nobody settles again.
        readyfd_show(s.fd, session_ready(s))
    if role == ROLE_LISTEN:
        child = s.accept_head
        s.accept_head = NULL
        s.accept_tail = NULL
        s.accept_count = 0
        while child != NULL:
            nxt = child.accept_next
            child.accept_next = NULL
            embryo_leave(e, child)
            session_close(e, child, True)
            session_unref(e, child)
            child = nxt
        if s.embryonic:
            child = e.all
            while child != NULL:
                nxt = child.all_next
                if child.listener == s and child.phase == PHASE_EMBRYONIC:
                    session_ref(child)
                    embryo_leave(e, child)
                    session_close(e, child, True)
                    nxt = child.all_next
                    session_unref(e, child)
                child = nxt
    embryo_leave(e, s)
    shared_wake(s)
    if s.tcp != NULL:
        tcp_free(&e.env, s.tcp)
        s.tcp = NULL
    if s.udp != NULL:
        udp_free(&e.bufs, s.udp)
        s.udp = NULL
    if s.stat != NULL:
        stat_give(s.stat)
        s.stat = NULL
    if s.in_table:
        session_remove(e, s)               # may drop the last reference: nothing after it


cdef void session_fd_free(engine *e, ul_session *s) noexcept nogil:
    if s.fd == NULL:
        return
    if not s.fd.surrendered and not s.fd.quiet:
        e.watched -= 1
    readyfd_free(s.fd)
    s.fd = NULL


cdef void session_close(engine *e, ul_session *s, bint abort) noexcept nogil:
    """The user is done with it. TCP goes on by itself until it is CLOSED, then EVENT_GONE."""
    session_ref(s)
    s.closing = 1
    if s.polls != NULL:
        polls_closed(e, s)
    waiters_wake(e, s, 0xFF)               # they leave with EBADF
    shared_wake(s)
    if s.role == ROLE_SHARED:
        session_fd_free(e, s)              # the kernel counts its copies: the last one's end is the session's
    if s.role == ROLE_TCP:
        if abort:
            tcp_abort(&e.env, s.tcp)
        else:
            tcp_close(&e.env, s.tcp)
        session_touch(e, s)
    else:
        session_end(e, s, 0)
        event_add(e, EVENT_GONE, s, <int64_t>s.id)
    session_unref(e, s)


cdef void event_add(engine *e, int kind, ul_session *s, int64_t value) noexcept nogil:
    cdef event_rec *ev
    cdef bint ends = e.collect_events == EVENTS_ENDS
    if e.collect_events == EVENTS_NONE or (ends and (kind != EVENT_GONE or s.id >> 32 << 32 != e.serial
                                                     or s.flow.proto != UL_IPPROTO_TCP)):
        return
    ev = <event_rec *>malloc(sizeof(event_rec))
    if ev == NULL:
        e.n.nomem += 1
        return
    ev.next = NULL
    ev.kind = kind
    ev.s = NULL if ends else s
    ev.value = value
    if not ends:
        s.refs += 1
    if e.events_tail != NULL:
        e.events_tail.next = ev
    else:
        e.events_head = ev
    e.events_tail = ev
    if ends:
        e.ends_count += 1
        if e.tell_ends or e.ends_count >= ENDS_MANY:
            e.attention |= ATTN_ENDS


# ---------------------------------------------------------------- timer heap (1-based, by deadline_ns)

cdef void heap_up(engine *e, uint32_t i) noexcept nogil:
    cdef ul_session *s = e.heap[i]
    while i > 1 and e.heap[i >> 1].deadline_ns > s.deadline_ns:
        e.heap[i] = e.heap[i >> 1]
        e.heap[i].heap_index = i
        i >>= 1
    e.heap[i] = s
    s.heap_index = i


cdef void heap_down(engine *e, uint32_t i) noexcept nogil:
    cdef ul_session *s = e.heap[i]
    cdef uint32_t child
    while True:
        child = i * 2
        if child > e.heap_len:
            break
        if child < e.heap_len and e.heap[child + 1].deadline_ns < e.heap[child].deadline_ns:
            child += 1
        if e.heap[child].deadline_ns >= s.deadline_ns:
            break
        e.heap[i] = e.heap[child]
        e.heap[i].heap_index = i
        i = child
    e.heap[i] = s
    s.heap_index = i


cdef void heap_remove(engine *e, ul_session *s) noexcept nogil:
    cdef uint32_t i = s.heap_index
    cdef ul_session *last
    if not i:
        return
    s.heap_index = 0
    s.deadline_ns = INT64_MAX
    last = e.heap[e.heap_len]
    e.heap_len -= 1
    if last != s:
        e.heap[i] = last
        last.heap_index = i
        heap_up(e, i)
        heap_down(e, last.heap_index)


cdef void heap_set(engine *e, ul_session *s, int64_t deadline_ns) noexcept nogil:
    """Arm s. A later deadline than the armed one is left alone: the early wake-up looks again and re-arms.

    Most segments move a timer back; this keeps the heap out of the hot path.
    """
    cdef ul_session **bigger
    if s.heap_index:
        if deadline_ns < s.deadline_ns:
            s.deadline_ns = deadline_ns
            heap_up(e, s.heap_index)
        return
    if deadline_ns == INT64_MAX:
        return
    if e.heap_len + 1 >= e.heap_cap:
        bigger = <ul_session **>realloc(e.heap, e.heap_cap * 2 * sizeof(void *))
        if bigger == NULL:
            e.n.nomem += 1
            return
        e.heap = bigger
        e.heap_cap *= 2
    e.heap_len += 1
    s.deadline_ns = deadline_ns
    e.heap[e.heap_len] = s
    heap_up(e, e.heap_len)


# ---------------------------------------------------------------- the end of a burst

cdef void accept_enqueue(engine *e, ul_session *s) noexcept nogil:
    """s has been established by its peer: it joins its listener's queue."""
    cdef ul_session *listener = s.listener
    listener.embryonic -= 1
    s.phase = PHASE_QUEUED
    s.accept_next = NULL
    if listener.accept_tail != NULL:
        listener.accept_tail.accept_next = s
    else:
        listener.accept_head = s
    listener.accept_tail = s
    listener.accept_count += 1
    session_ref(s)                         # the queue's
    if s.id == 0 and e.serial:
        # From here on a death of this process is heard of by the peer.
        s.id = engine_number(e)
        if e.stats != NULL:
            s.stat = stat_take(e.stats, s.id, &s.flow)
    session_touch(e, listener)
    event_add(e, EVENT_ACCEPTED, listener, 0)


cdef void settle_tcp(engine *e, ul_session *s) noexcept nogil:
    cdef int state
    cdef int error
    if tcp_wants_output(s.tcp):
        if s.stat != NULL:
            stat_unsettle(s.stat)
        stamp(STAMP_OUTPUT)
        tcp_output(&e.env, s.tcp)
    state = tcp_state(s.tcp)
    if s.phase != PHASE_OPEN and state != TCP_SYN_SENT and state != TCP_SYN_RECEIVED:
        if s.phase == PHASE_CONNECTING:
            s.phase = PHASE_OPEN
            if state == TCP_CLOSED:
                error = tcp_so_error(s.tcp, False)
                event_add(e, EVENT_FAILED, s, -error if error else ECONNABORTED)
            else:
                event_add(e, EVENT_CONNECTED, s, 0)
        elif s.phase == PHASE_EMBRYONIC:
            if state == TCP_CLOSED:
                session_end(e, s, 0)
                return
            accept_enqueue(e, s)
    if s.stat != NULL:
        stat_settle(s.stat, s.tcp)
        if s.phase == PHASE_QUEUED:
            stat_unsettle(s.stat)          # nobody has accepted it: a death resets it, as in BSD
    if state == TCP_CLOSED and s.closing:
        event_add(e, EVENT_GONE, s, <int64_t>s.id)
        session_end(e, s, 0)
        return
    heap_set(e, s, tcp_deadline(s.tcp))


cdef void settle_one(engine *e, ul_session *s) noexcept nogil:
    cdef uint32_t ready
    if s.role == ROLE_TCP:
        settle_tcp(e, s)
    elif s.role == ROLE_UDP and s.stat != NULL:
        s.stat.tcp.bytes_in = s.udp.bytes_in
        s.stat.tcp.bytes_out = s.udp.bytes_out
    ready = session_ready(s)
    if s.fd != NULL:
        readyfd_show(s.fd, session_shown(s))
    if s.polls != NULL:
        polls_show(e, s, ready)
    if s.relay != NULL:
        relay_queue(e, s)
    if s.waiters != NULL and ready:
        waiters_wake(e, s, ready)


cdef void relay_queue(engine *e, ul_session *s) noexcept nogil:
    """Only noted here: a relay at work inside a settle could keep it going for ever."""
    if s.relay_queued:
        return
    s.relay_queued = 1
    s.relay_next = NULL
    if e.relay_tail != NULL:
        e.relay_tail.relay_next = s
    else:
        e.relay_head = s
    e.relay_tail = s


cdef int engine_drain(engine *e, int budget) noexcept nogil:
    """Process up to budget waiting frames, without settling."""
    cdef ul_rx frame
    cdef int done = 0
    while done < budget and e.link.recv(e.link.ctx, &frame):
        stamp(STAMP_FRAME)
        if done == 0:
            engine_tick(e)
        done += 1
        e.n.frames_in += 1
        e.n.bytes_in += frame.len_bytes
        if frame.slot != UL_SLOT_NONE:
            e.bufs.last_slot = frame.slot
        elif frame.flags & UL_FRAME_NO_TOKEN and e.bufs.last_slot < e.link.slots:
            # It came in a slot whose address is still lent from an earlier turn: the ring has moved on all the same,
            # towards slots that must be cleared before the kernel stops at them.
            e.bufs.last_slot = (e.bufs.last_slot + 1) % e.link.slots
        if not engine_frame(e, &frame):
            e.link.release(e.link.ctx, frame.slot)
    return done


cdef void engine_settle(engine *e) noexcept nogil:
    cdef ul_session *s
    cdef ul_session *batch
    while e.touched != NULL:
        batch = e.touched
        e.touched = NULL
        while batch != NULL:
            s = batch
            batch = s.touched_next
            s.touched_next = NULL
            s.touched = 0
            settle_one(e, s)
            if s.role == ROLE_TCP and tcp_wants_output(s.tcp):
                session_touch(e, s)        # its burst is used up: let the answers in first
            session_unref(e, s)
        if e.touched != NULL:
            engine_drain(e, DRAIN_FRAMES)
    if e.bufs.held:
        bufpool_relieve(&e.bufs)
    if e.sleep_until_ns and e.heap_len and e.heap[1].deadline_ns < e.sleep_until_ns:
        engine_kick(e)                     # whoever sleeps in poll(2) set out for too long


cdef void engine_timers(engine *e) noexcept nogil:
    cdef ul_session *s
    while e.heap_len and e.heap[1].deadline_ns <= e.now_ns:
        s = e.heap[1]
        session_ref(s)
        heap_remove(e, s)
        if s.role == ROLE_TCP:
            if s.stat != NULL:
                stat_unsettle(s.stat)      # a probe may go out
            tcp_timers(&e.env, s.tcp)
            session_touch(e, s)
        elif s.role == ROLE_FOREIGN:
            session_end(e, s, 0)           # its memory was for stragglers only
        session_unref(e, s)
    if e.neigh != NULL and neigh_deadline(e.neigh) <= e.now_ns:
        neigh_timers(e.neigh, &e.nenv)
        neighbours_changed(e)
    if ip_reass_deadline(e.reass) <= e.now_ns:
        ip_reass_timers(e.reass, e.now_ns)
        emit_reassembly_timeouts(e)
    if e.orphans != NULL:
        orphans_expire(e)


cdef void neighbours_changed(engine *e) noexcept nogil:
    """The neighbour table moved: sessions that wait for a MAC look again."""
    cdef ul_session *s = e.all
    while s != NULL:
        if s.wait_neigh:
            s.wait_neigh = 0
            if s.role == ROLE_TCP:
                # Its short retry timer would do it too, later.
                tcp_timers(&e.env, s.tcp)
                tcp_output(&e.env, s.tcp)
            session_touch(e, s)
        s = s.all_next


cdef void foreign_arm(engine *e, ul_session *s, int64_t deadline_ns) noexcept nogil:
    heap_set(e, s, deadline_ns)


cdef int64_t engine_deadline(engine *e) noexcept nogil:
    cdef int64_t due = INT64_MAX
    cdef int64_t other
    if e.heap_len:
        due = e.heap[1].deadline_ns
    if e.neigh != NULL:
        other = neigh_deadline(e.neigh)
        if other < due:
            due = other
    other = ip_reass_deadline(e.reass)
    if other < due:
        due = other
    if e.orphans != NULL and e.orphans.expires_ns < due:
        due = e.orphans.expires_ns
    if e.link.deferred_ns != NULL and e.link.deferred_ns(e.link.ctx, e.now_ns, &other) and other < due:
        due = other
    return due


cdef int engine_poll(engine *e, int budget) noexcept nogil:
    """Process up to budget waiting frames and every due timer, then settle. Returns the frames processed."""
    return engine_finish(e, engine_drain(e, budget), budget)


cdef int engine_spin(engine *e, int budget) noexcept nogil:
    """The same for one who polls without pause: a few looks at the ring for each look at the clock."""
    cdef int done = 0
    cdef int look
    for look in range(LOOKS):
        done = engine_drain(e, budget)
        if done:
            break
        ulnet_pause()
    return engine_finish(e, done, budget)


cdef void engine_glance(engine *e) noexcept nogil:
    """Who goes through many sessions that are ready would otherwise let the ring run over: a look now and then.

    Without a ring each look is a system call, and the socket's queue is what takes a burst.
    """
    e.calls += 1
    if e.calls % GLANCE_CALLS == 0 and e.link.slots and engine_drain(e, DRAIN_FRAMES):
        engine_settle(e)


cdef int engine_finish(engine *e, int done, int budget) noexcept nogil:
    if done == 0:
        engine_tick(e)
    # Who was away for long finds timers due and, behind the frames of this round, what they wait for: the frames first.
    if done < budget or e.rounds_full == ROUNDS_FULL_MAX:
        e.rounds_full = 0
        engine_timers(e)
    else:
        e.rounds_full += 1
    if e.touched != NULL or done:
        engine_settle(e)
    return done
