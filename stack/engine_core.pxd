# The engine's inside: sessions, the flow table, timers, the end of a burst. No GIL, no Python objects.
#
# Call order of a burst (engine_poll): link.recv -> engine_frame (engine_input) -> session_touch;
# then engine_settle: for each touched session TCP output, timers, readiness, waiters, descriptor, events.
# Everything here is called with the engine's lock held (engine_wait.pxd).

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_link, ul_rx
from ulnet.stack.buf cimport bufpool
from ulnet.stack.ip_reass cimport ip_reass
from ulnet.stack.metastate cimport meta_page
from ulnet.stack.neighbour cimport neigh_env, neigh_table
from ulnet.stack.readyfd cimport readyfd
from ulnet.stack.statpage cimport stat_page, stat_record
from ulnet.stack.tcp cimport tcp_config, tcp_counters, tcp_env, tcp_pcb
from ulnet.stack.types cimport flow_key, ul_addr
from ulnet.stack.udp cimport udp_pcb

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t

cdef enum session_role:
    ROLE_SHELL = 0           # made, not open
    ROLE_TCP = 1
    ROLE_UDP = 2
    ROLE_LISTEN = 3
    ROLE_FOREIGN = 4         # handed to another holder; frames for it are strays
    ROLE_ENDED = 5           # failed or closed; so_error may be pending
    ROLE_SHARED = 6          # placed in the server: its user's end is used by kernel calls (session_shared)
    ROLE_STAYED = 7          # in a forked child: the parent's
    ROLE_POLLSET = 8         # stands for a set of sessions (engine_polls): readable while one of them is ready

cdef enum session_phase:     # what the engine still has to tell about a TCP session
    PHASE_OPEN = 0
    PHASE_CONNECTING = 1     # EV_CONNECTED or EV_FAILED is due
    PHASE_EMBRYONIC = 2      # passive open, belongs to `listener`
    PHASE_QUEUED = 3         # in the listener's accept queue

cdef enum:
    EVENT_CONNECTED = 1
    EVENT_FAILED = 2
    EVENT_ACCEPTED = 3
    EVENT_GONE = 4
    EVENT_RELAY = 5          # a relayed session has news (relay.pxd); value is the bits
    ATTN_STRAYS = 1          # frames wait for on_strays
    ATTN_RESOLVE = 2         # a next hop waits for the resolver
    ATTN_ENDS = 4            # sessions have come to their end, and somebody else must know
    EVENTS_NONE = 0          # engine.collect_events
    EVENTS_ALL = 1
    EVENTS_ENDS = 2          # EVENT_GONE alone
    LEASE_BYTES = 8192       # a bit a port
    HELPER_NONE = 0          # what the helper thread does now
    HELPER_RUNS = 1
    HELPER_NAPS = 2          # timed: callers were active a moment ago
    HELPER_SLEEPS = 3        # until signalled: a caller drives and sleeps in poll(2)
    HELPER_POLLS = 4         # it drives
    USER_SHARED = 100001     # -USER_SHARED: the session is placed in the server, session_shared goes on
    USER_STAYED = 100002     # -USER_STAYED: it is the parent process's

ctypedef struct ul_session
ctypedef struct poll_item
ctypedef struct wait_side:       # what a waiter watches beside its engine
    int fd                       # an epoll descriptor; -1: none yet
    int spare_fd                 # an event descriptor for the next follower; -1: none
    int64_t due_ns               # look at fd when it is later than this; asleep it is part of the poll(2)

ctypedef struct waiter:
    pthread_cond_t cond
    ul_session *s
    waiter *s_next           # of the same session
    waiter *prev             # of the engine
    waiter *next
    wait_side *side          # NULL: only the engine
    int wake_fd              # of a follower asleep in poll(2), with a side; else -1
    uint32_t want
    uint8_t asleep_in_poll   # it drives and sleeps: wake it by the event descriptor
    uint8_t signalled
    uint8_t promote          # it shall drive now

ctypedef struct ul_session:
    flow_key flow
    uint64_t id
    uint32_t refs            # handle, table, waiters, callers
    uint8_t role
    uint8_t phase
    uint8_t in_table
    uint8_t touched
    uint8_t closing          # the user closed it; free it when TCP is done
    uint8_t wait_neigh
    uint8_t tos
    uint8_t ttl
    uint8_t shut_rd          # UDP, SHARED; LISTEN: shutdown() ended the accepting
    uint8_t shut_wr          # UDP; LISTEN: it is about to move, a SYN is a stray
    uint8_t shared_as        # SHARED: the role it had, or has in the server
    uint8_t shared_shut_wr   # SHARED: the user's end is shut for writing
    int shared_wake          # SHARED: event descriptor of those who wait for it in poll(2); -1: none
    uint8_t stamp            # UDP: datagrams are stamped with the time of day (SO_TIMESTAMP)
    uint8_t mtu_discover     # IP_MTU_DISCOVER
    uint32_t rcvlowat_bytes  # SO_RCVLOWAT; 0 as 1
    uint16_t path_mtu_bytes
    int so_error             # negative errno, for roles without a pcb
    tcp_pcb *tcp
    udp_pcb *udp
    ul_session *listener
    ul_session *accept_head  # LISTEN: established sessions; else the queue's link
    ul_session *accept_tail
    ul_session *accept_next
    uint32_t accept_count    # POLLSET: items ready
    uint32_t embryonic
    uint32_t backlog
    uint32_t heap_index      # 0: not in the heap
    int64_t deadline_ns
    ul_session *hash_next
    ul_session *touched_next
    ul_session *all_prev
    ul_session *all_next
    waiter *waiters
    poll_item *polls         # the sets that watch it
    void *handle             # its Session object, borrowed; NULL: none. Under the GIL.
    readyfd *fd
    void *relay              # its relay (relay.pxd), or NULL
    ul_session *relay_next
    uint8_t relay_queued
    stat_record *stat
    # route cache
    uint64_t meta_generation
    ul_addr meta_dst
    uint8_t mac[6]
    tcp_config cfg

ctypedef struct poll_set:    # sessions that somebody waits for together (engine_polls)
    engine *e
    ul_session *s            # stands for the set: role POLLSET, accept_count is the length of the ready list
    wait_side *side          # of the owner, shared by its sets in other engines
    poll_item *ready_head
    poll_item *ready_tail
    poll_item *gone          # their sessions were closed: for the owner to forget

ctypedef struct poll_item:
    ul_session *s            # holds a reference
    poll_set *set
    poll_item *s_next        # of the same session
    poll_item *prev          # ready list
    poll_item *next          # ready list, list of the gone
    uint64_t key             # the owner's name for it
    uint32_t events          # as epoll has them; EPOLLERR and EPOLLHUP always count
    uint8_t queued           # in the ready list
    uint8_t outside          # the session is placed in the server: its descriptor is in the side's epoll
    uint8_t gone

ctypedef struct event_rec:
    event_rec *next
    int kind
    ul_session *s            # holds a reference, or NULL
    int64_t value

ctypedef struct frame_rec:   # a frame kept by copy: orphan or stray
    frame_rec *next
    int64_t expires_ns
    flow_key flow
    uint32_t len_bytes
    uint16_t flags
    uint16_t gso_size_bytes
    uint8_t *data

ctypedef struct engine_counters:
    uint64_t frames_in
    uint64_t frames_out
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t short_frames
    uint64_t unknown_ethertype
    uint64_t bad_ip
    uint64_t not_ours
    uint64_t bad_tcp
    uint64_t bad_udp
    uint64_t bad_icmp
    uint64_t bad_arp
    uint64_t bad_checksum
    uint64_t fragments_in
    uint64_t fragments_out
    uint64_t unknown_proto
    uint64_t no_listener     # SYN or segment for nobody: refused with RST
    uint64_t no_udp_port
    uint64_t backlog_full
    uint64_t embryonic_dropped
    uint64_t icmp_in
    uint64_t icmp_out
    uint64_t icmp_limited
    uint64_t icmp_unmatched
    uint64_t echo_replies
    uint64_t orphans_held
    uint64_t orphans_dropped
    uint64_t strays
    uint64_t strays_dropped
    uint64_t link_refused    # sends the link did not take
    uint64_t no_route
    uint64_t polls           # system calls: poll(2)
    uint64_t spins           # waits that polled the link before they slept
    uint64_t spins_in_vain
    uint64_t kicks           # writes to the event descriptor
    uint64_t helper_runs
    uint64_t nomem
    uint64_t udp_trains      # sends that carried several datagrams

ctypedef struct engine:
    pthread_mutex_t lock
    uint32_t contenders      # threads that wait for the lock (atomic)
    uint32_t fork_depth      # the forking thread has the lock: so many times (engine_fork)
    pthread_t fork_thread
    ul_link *link
    meta_page *meta
    bufpool bufs
    tcp_env env
    tcp_counters tcp
    engine_counters n
    neigh_env nenv
    neigh_table *neigh       # NULL in a library
    ip_reass *reass
    uint8_t library
    uint8_t collect_events
    uint8_t stop
    uint8_t tell_ends        # see ATTN_ENDS
    uint8_t last_call        # an orphan's time is over: refuse it
    uint8_t broken           # forked child, or closed
    stat_page *stats         # of a library, or NULL
    uint8_t *leased          # library: local TCP ports that are its own, a bit each; NULL: none
    uint64_t serial          # library: upper half of the numbers of its sessions
    uint32_t next_number
    uint8_t secret[16]
    uint16_t ip_ident
    uint32_t attention
    int64_t now_ns
    int64_t spin_ns
    uint8_t rounds_full      # rounds in a row that left frames behind
    uint16_t spin_skips      # so many waits that end soon do not spin
    uint16_t spin_backoff    # how many, the next time
    # flow table
    ul_session **table
    uint32_t table_mask
    uint32_t table_count
    ul_session *all          # every session
    uint32_t all_count
    # timer heap, 1-based
    ul_session **heap
    uint32_t heap_len
    uint32_t heap_cap
    ul_session *touched
    # relayed sessions that changed, in order
    ul_session *relay_head
    ul_session *relay_tail
    # events, strays, orphans
    event_rec *events_head
    event_rec *events_tail
    uint32_t ends_count      # EVENTS_ENDS: how many wait
    frame_rec *strays
    frame_rec *strays_tail
    uint32_t strays_count
    frame_rec *orphans
    uint32_t orphans_count
    uint64_t orphans_bytes
    ul_addr resolve_addr
    # waiting
    uint8_t driving          # a thread drives (caller or helper)
    uint8_t helper           # HELPER_*
    uint32_t watched         # sessions with a descriptor
    uint64_t activity        # calls that waited or sent
    uint32_t calls           # users' calls, for engine_glance
    int64_t sleep_until_ns   # of the thread asleep in poll(2); 0: none sleeps
    int wake_fd              # of callers
    int helper_fd            # of the helper
    pthread_cond_t helper_cond
    waiter *waiters
    # ICMP rate limit (RFC 1812 4.3.2.8)
    int64_t icmp_refill_ns
    uint32_t icmp_tokens

cdef engine *engine_new(ul_link *link, meta_page *meta, bint library, const uint8_t *secret, int64_t spin_ns) noexcept nogil
cdef void engine_free(engine *e) noexcept nogil
cdef uint64_t engine_number(engine *e) noexcept nogil                # for a session that is set up here; 0: the server's matter
cdef bint engine_leases(const engine *e, uint16_t port) noexcept nogil
cdef int64_t clock_now() noexcept nogil
cdef int64_t time_of_day() noexcept nogil                            # CLOCK_REALTIME
cdef void engine_tick(engine *e) noexcept nogil

cdef ul_session *session_new(engine *e, uint8_t kind) noexcept nogil
cdef void session_ref(ul_session *s) noexcept nogil
cdef void session_unref(engine *e, ul_session *s) noexcept nogil
cdef int session_insert(engine *e, ul_session *s) noexcept nogil      # into the flow table; -EADDRINUSE
cdef void session_remove(engine *e, ul_session *s) noexcept nogil
cdef ul_session *session_find(engine *e, const flow_key *flow) noexcept nogil
cdef void session_touch(engine *e, ul_session *s) noexcept nogil
cdef uint32_t session_ready(const ul_session *s) noexcept nogil
cdef void session_end(engine *e, ul_session *s, int error) noexcept nogil   # drop protocol state, keep the shell
cdef uint32_t session_shown(const ul_session *s) noexcept nogil     # what its descriptor shows of that
cdef int session_tcp_start(engine *e, ul_session *s) noexcept nogil
cdef void session_fd_free(engine *e, ul_session *s) noexcept nogil         # its descriptor, if it has one
cdef void session_close(engine *e, ul_session *s, bint abort) noexcept nogil
cdef void relay_queue(engine *e, ul_session *s) noexcept nogil        # its relay shall look
cdef void event_add(engine *e, int kind, ul_session *s, int64_t value) noexcept nogil

cdef int engine_poll(engine *e, int budget) noexcept nogil            # frames processed; settles
cdef int engine_spin(engine *e, int budget) noexcept nogil           # for one who polls without pause
cdef void engine_glance(engine *e) noexcept nogil                    # at the end of a user's call
cdef void engine_settle(engine *e) noexcept nogil
cdef int64_t engine_deadline(engine *e) noexcept nogil
cdef void engine_timers(engine *e) noexcept nogil
cdef void neighbours_changed(engine *e) noexcept nogil
cdef void foreign_arm(engine *e, ul_session *s, int64_t deadline_ns) noexcept nogil
