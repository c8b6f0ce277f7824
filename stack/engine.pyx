"""The engine as Python sees it. What it does lies in engine_core and its neighbours, a session's calls in session."""

import os
import threading

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, PyObject
from libc.errno cimport EAGAIN, EBADF, EINVAL, EISCONN, ENOMEM
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from ulnet.kernelshim.link cimport UL_SLOT_NONE, Link, ul_rx
from ulnet.stack.address cimport addr_from_text, addr_to_text
from ulnet.stack.buf cimport chunks_free, txchunk
from ulnet.stack.engine_core cimport (
    ATTN_ENDS, ATTN_RESOLVE, ATTN_STRAYS, EVENT_ACCEPTED, EVENT_CONNECTED, EVENT_FAILED, EVENT_GONE, EVENT_RELAY, EVENTS_ALL,
    EVENTS_ENDS, EVENTS_NONE, PHASE_CONNECTING, PHASE_OPEN, ROLE_ENDED, ROLE_FOREIGN, ROLE_LISTEN, ROLE_SHARED,
    ROLE_SHELL, ROLE_STAYED, ROLE_TCP, ROLE_UDP, USER_STAYED, engine, engine_deadline, engine_free, engine_new,
    engine_poll, engine_settle, engine_tick, event_rec, frame_rec, session_close, session_end, session_fd_free,
    session_find, session_insert, session_new, session_ref, session_remove, session_tcp_start, session_touch,
    session_unref, ul_session,
)
from ulnet.stack.engine_fork cimport fork_child, fork_parent, fork_prepare, session_rebind
from ulnet.stack.engine_handover cimport (
    foreign_add, foreign_forget, handover_enqueue, handover_export, handover_import, handover_revive,
)
from ulnet.stack.engine_input cimport engine_frame, orphans_replay
from ulnet.stack.engine_local cimport local_closing, local_embryos, local_lease, local_number, local_recycle
from ulnet.stack.engine_output cimport emit_refusal
from ulnet.stack.engine_polls cimport polls_closed
from ulnet.stack.engine_report cimport report_counters, report_sessions
from ulnet.stack.engine_wait cimport engine_left, engine_lock, engine_unlock, helper_run, helper_wake, waiters_wake
from ulnet.stack.metastate cimport Metastate
from ulnet.stack.neighbour cimport neigh_announce, neigh_ask
from ulnet.stack.session cimport Session, fail, session_wrap
from ulnet.stack.session_shared cimport shared_wake
from ulnet.stack.statpage cimport StatPage, stat_record, stat_take
from ulnet.stack.tcp cimport TCP_ACK, TCP_RST, tcp_abort, tcp_isn, tcp_open, tcp_out, tcp_stat, tcp_stat_get, tcp_state
from ulnet.stack.tcp_timer cimport tcp_done
from ulnet.stack.types cimport UL_IPPROTO_TCP, UL_IPPROTO_UDP, flow_key, ul_addr
from ulnet.stack.udp cimport udp_new

READABLE = 1
WRITABLE = 2
ERROR = 4
HUP = 8
RDHUP = 16
EV_CONNECTED = EVENT_CONNECTED
EV_FAILED = EVENT_FAILED
EV_ACCEPTED = EVENT_ACCEPTED
EV_GONE = EVENT_GONE
EV_RELAY = EVENT_RELAY

cdef enum:
    SNDBUF_BYTES = 4 << 20
    RCVBUF_BYTES = 4 << 20
    UDP_RCVBUF_BYTES = 1 << 20
    BURST = 256


cdef int flow_fill(flow_key *flow, int proto, str laddr, int lport, str raddr, int rport) except -1:
    memset(flow, 0, sizeof(flow_key))
    flow.proto = <uint8_t>proto
    addr_from_text(laddr, &flow.laddr)
    flow.lport = <uint16_t>lport
    if raddr is not None:
        addr_from_text(raddr, &flow.raddr)
        flow.rport = <uint16_t>rport
    return 0


# The collector must not take the attributes before __dealloc__ has used them.
@cython.no_gc_clear
cdef class Engine:
    """One link and its sessions. ``library=True``: ARP, ICMP echo, refusals and handshakes are the server's matter."""

    def __cinit__(self, Link link not None, Metastate meta not None, *, bint library=False, StatPage stats=None,
                  int64_t spin_ns=50000):
        cdef bytes secret = os.urandom(16)
        cdef const uint8_t *p = secret
        self.link = link
        self.meta = meta
        self.stats = stats
        self.e = engine_new(&link.ops, meta.page, library, p, spin_ns)
        if self.e == NULL:
            raise MemoryError("no memory for an engine")
        if stats is not None and stats.writable:
            self.e.stats = stats.page

    def __dealloc__(self):
        if self.e != NULL:
            engine_free(self.e)
            self.e = NULL

    # ------------------------------------------------------------ life

    def start_helper(self):
        """The thread that works while the program is elsewhere."""
        if self.helper_thread is None:
            # It holds the engine: an engine with a helper lives until close().
            self.helper_thread = threading.Thread(target=self._helper, name="ulnet-helper", daemon=True)
            self.helper_thread.start()

    def _helper(self):
        cdef engine *e = self.e
        while not e.stop:
            with nogil:
                helper_run(e)
            self.attend()

    cdef void attend(self) noexcept:
        """What only Python can do for the engine."""
        cdef engine *e = self.e
        cdef uint32_t todo
        if e.bufs.dead != NULL:
            self.reap()
        with nogil:
            engine_lock(e)
            todo = e.attention
            e.attention = 0
            engine_unlock(e)
        try:
            if todo & ATTN_STRAYS:
                frames = self.take_strays()
                if frames and self.on_strays is not None:
                    self.on_strays(frames)
            if todo & ATTN_RESOLVE:
                self.resolve_pending()
            if todo & ATTN_ENDS and self.on_ends is not None:
                self.on_ends()
        except OSError:
            pass                           # the server is away: the sender's own timers decide

    def resolve_pending(self):
        """Have the resolver find the next hop that a datagram waits for."""
        cdef engine *e = self.e
        cdef ul_addr hop
        with nogil:
            engine_lock(e)
            hop = e.resolve_addr
            e.attention &= ~<uint32_t>ATTN_RESOLVE
            engine_unlock(e)
        if self.resolver is None:
            raise OSError(EAGAIN, "the next hop's address is not known and nobody can be asked")
        self.resolver(addr_to_text(&hop))

    def reap(self):
        """Give back the objects held for sending. Not under the lock: a decref may run anything."""
        cdef engine *e = self.e
        cdef txchunk *dead
        cdef txchunk *c
        with nogil:
            engine_lock(e)
            dead = e.bufs.dead
            e.bufs.dead = NULL
            engine_unlock(e)
        if dead == NULL:
            return
        c = dead
        while True:
            Py_DECREF(<object>c.owner)
            c.owner = NULL
            if c.next == NULL:
                break
            c = c.next
        with nogil:
            engine_lock(e)
            c.next = e.bufs.dead
            e.bufs.dead = NULL
            chunks_free(&e.bufs, dead)
            engine_unlock(e)

    cdef list take_strays(self):
        cdef engine *e = self.e
        cdef frame_rec *f
        cdef frame_rec *following
        cdef list frames = []
        with nogil:
            engine_lock(e)
            f = e.strays
            e.strays = NULL
            e.strays_tail = NULL
            e.strays_count = 0
            engine_unlock(e)
        while f != NULL:
            following = f.next
            # One header says what the ring said of the frame: flags, super-segment size.
            frames.append(f.flags.to_bytes(2, "little") + f.gso_size_bytes.to_bytes(2, "little")
                          + PyBytes_FromStringAndSize(<char *>f.data, f.len_bytes))
            free(f.data)
            free(f)
            f = following
        return frames

    def close(self):
        """Stop: wake every waiter (EBADF), end the helper. Sessions are aborted without a word to their peers
        unless they were closed or handed over before."""
        cdef engine *e = self.e
        cdef ul_session *s
        thread = self.helper_thread
        self.helper_thread = None
        with nogil:
            engine_lock(e)
            e.stop = 1
            s = e.all
            while s != NULL:
                waiters_wake(e, s, 0xFF)
                shared_wake(s)
                s = s.all_next
            helper_wake(e)
            engine_unlock(e)
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)
        self.attend()

    def poll(self):
        """Process waiting frames and due timers; the number of frames."""
        cdef engine *e = self.e
        cdef int n
        with nogil:
            engine_lock(e)
            n = engine_poll(e, BURST)
            engine_unlock(e)
        if e.attention or e.bufs.dead != NULL:
            self.attend()
        return n

    def deadline_ns(self):
        cdef engine *e = self.e
        cdef int64_t due
        with nogil:
            engine_lock(e)
            due = engine_deadline(e)
            engine_unlock(e)
        return None if due == INT64_MAX else due

    def announce(self):
        """Tell the link who has our address (gratuitous ARP, RFC 5227 2.3)."""
        cdef engine *e = self.e
        with nogil:
            engine_lock(e)
            engine_tick(e)
            if e.neigh != NULL:
                neigh_announce(e.neigh, &e.nenv)
            engine_unlock(e)

    def ask_neighbour(self, str next_hop):
        """Ask by ARP for a neighbour on behalf of somebody else; the answer shows in the metastate page."""
        cdef engine *e = self.e
        cdef ul_addr hop
        addr_from_text(next_hop, &hop)
        with nogil:
            engine_lock(e)
            engine_tick(e)
            if e.neigh != NULL:
                neigh_ask(e.neigh, &e.nenv, &hop)
            engine_unlock(e)

    def interrupt(self):
        """Wake every waiter once; they look again."""
        cdef engine *e = self.e
        cdef ul_session *s
        with nogil:
            engine_lock(e)
            s = e.all
            while s != NULL:
                waiters_wake(e, s, 0xFF)
                s = s.all_next
            engine_unlock(e)

    # ------------------------------------------------------------ sessions

    def new_session(self, int kind):
        """A shell of kind IPPROTO_TCP or IPPROTO_UDP."""
        cdef engine *e = self.e
        cdef ul_session *s
        if kind != UL_IPPROTO_TCP and kind != UL_IPPROTO_UDP:
            raise ValueError(f"session kind {kind}: IPPROTO_TCP (6) or IPPROTO_UDP (17) is meant")
        with nogil:
            engine_lock(e)
            s = session_new(e, <uint8_t>kind)
            if s != NULL:
                s.cfg.sndbuf_bytes = SNDBUF_BYTES
                s.cfg.rcvbuf_bytes = RCVBUF_BYTES if kind == UL_IPPROTO_TCP else UDP_RCVBUF_BYTES
                s.cfg.mss_bytes = <uint16_t>(e.link.mtu_bytes - 40)
                s.cfg.keepidle_s = 7200
                s.cfg.keepintvl_s = 75
                s.cfg.keepcnt = 9
            engine_unlock(e)
        if s == NULL:
            raise MemoryError("no memory for a session")
        return session_wrap(self, e, s)

    def open_udp(self, Session session not None, str laddr, int lport, str raddr=None, int rport=0):
        """Open, or give an open session another peer. EADDRINUSE when the flow exists here."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc = 0
        flow_fill(&flow, UL_IPPROTO_UDP, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            if s.role == ROLE_SHELL:
                s.udp = udp_new(s.cfg.rcvbuf_bytes)
                if s.udp == NULL:
                    rc = -ENOMEM
                else:
                    s.role = ROLE_UDP
            elif s.role != ROLE_UDP:
                rc = -EINVAL
            if rc == 0:
                session_ref(s)
                session_remove(e, s)
                s.flow = flow
                rc = session_insert(e, s)
                session_unref(e, s)
                orphans_replay(e, &s.flow)
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        self.take_stat(session)

    cdef void take_stat(self, Session session) noexcept:
        cdef ul_session *s = session.s
        if self.e.stats == NULL or s.id == 0:
            return
        if s.stat == NULL:
            s.stat = stat_take(self.e.stats, s.id, &s.flow)
        else:
            s.stat.flow = s.flow

    def open_tcp(self, Session session not None, str laddr, int lport, str raddr, int rport):
        """Active open (RFC 9293 3.10.1): the SYN goes out as soon as the next hop is known."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc
        flow_fill(&flow, UL_IPPROTO_TCP, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            engine_tick(e)
            if s.role != ROLE_SHELL:
                rc = -EISCONN
            else:
                s.flow = flow
                s.cfg.ts_offset = tcp_isn(e.secret, &flow, sizeof(flow), 0)
                rc = session_tcp_start(e, s)
                if rc == 0 and s.id and e.stats != NULL:
                    s.stat = stat_take(e.stats, s.id, &s.flow)
                if rc == 0:
                    s.phase = PHASE_CONNECTING
                    tcp_open(&e.env, s.tcp, tcp_isn(e.secret, &flow, sizeof(flow), e.now_ns))
                    session_touch(e, s)
                    engine_settle(e)
                    engine_left(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)

    def listen(self, Session session not None, str laddr, int lport, int backlog):
        """Passive open. Listening again changes the backlog."""
        self.open_listener_shell(session, laddr, lport, backlog)

    def set_backlog(self, Session session not None, int backlog):
        session.s.backlog = <uint32_t>max(backlog, 0)

    def open_listener_shell(self, Session session not None, str laddr, int lport, int backlog):
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef int rc = 0
        flow_fill(&flow, UL_IPPROTO_TCP, laddr, lport, None, 0)
        with nogil:
            engine_lock(e)
            s.backlog = <uint32_t>(backlog if backlog > 0 else 0)
            if s.role == ROLE_SHELL:
                s.flow = flow
                rc = session_insert(e, s)
                if rc == 0:
                    s.role = ROLE_LISTEN
            elif s.role != ROLE_LISTEN:
                rc = -EINVAL
            if rc == 0:
                s.shut_wr = 0              # it stays here, after all
                orphans_replay(e, &flow)
                session_touch(e, s)
                engine_settle(e)
                engine_left(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)

    def accept(self, Session session not None):
        """An established session of the listener's queue, or None."""
        cdef engine *e = self.e
        cdef ul_session *listener = session.s
        cdef ul_session *s = NULL
        cdef int rc = 0
        with nogil:
            engine_lock(e)
            if listener.closing:
                rc = -EBADF
            elif listener.role == ROLE_STAYED:
                rc = -USER_STAYED
            elif listener.role == ROLE_SHARED:
                rc = 0                     # others announce its connections now
            elif listener.role != ROLE_LISTEN:
                rc = listener.so_error if listener.role == ROLE_ENDED and listener.so_error else -EINVAL
            else:
                if listener.accept_head == NULL:
                    engine_poll(e, BURST)
                s = listener.accept_head
            if s != NULL:
                listener.accept_head = s.accept_next
                if listener.accept_head == NULL:
                    listener.accept_tail = NULL
                listener.accept_count -= 1
                s.accept_next = NULL
                if s.listener != NULL:
                    s.listener = NULL
                    session_unref(e, listener)
                s.phase = PHASE_OPEN
                session_touch(e, s)
                session_touch(e, listener)
                engine_settle(e)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        return None if s == NULL else session_wrap(self, e, s)

    # What a library needs to set connections up by itself: engine_local.

    def export_embryos(self, Session listener not None):
        return local_embryos(self.e, listener.s)

    def closing_sessions(self):
        return local_closing(self, self.e)

    def set_serial(self, uint32_t serial):
        self.e.serial = <uint64_t>serial << 32

    def number(self):
        return local_number(self.e)

    def lease(self, ports, bint on=True):
        local_lease(self.e, ports, on)

    def recycle(self, int most):
        return local_recycle(self.e, most)

    def knows_flow(self, int proto, str laddr, int lport, str raddr, int rport):
        """Has it a session of this flow?"""
        cdef engine *e = self.e
        cdef flow_key flow
        cdef ul_session *s
        flow_fill(&flow, proto, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            s = session_find(e, &flow)
            engine_unlock(e)
        return s != NULL

    def close_session(self, Session session not None, *, bint linger_abort=False):
        """The user is done with it; TCP goes on to its end by itself. Called again it can only abort that."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef tcp_stat t
        t.unsent_bytes = 0
        with nogil:
            engine_lock(e)
            engine_tick(e)
            if not s.closing:
                session_close(e, s, linger_abort)
                session_fd_free(e, s)
                engine_settle(e)
            elif linger_abort and s.role == ROLE_TCP:
                tcp_abort(&e.env, s.tcp)
                session_touch(e, s)
                engine_settle(e)
            if s.role == ROLE_TCP:
                tcp_stat_get(s.tcp, &t)
            engine_left(e)
            engine_unlock(e)
        if e.bufs.dead != NULL:
            self.reap()
        return t.unsent_bytes

    def abort_flow(self, str laddr, int lport, str raddr, int rport, uint32_t snd_nxt, uint32_t rcv_nxt):
        """RST for a session that nobody holds any more (its application died)."""
        cdef engine *e = self.e
        cdef flow_key flow
        cdef tcp_out out
        memset(&out, 0, sizeof(out))
        flow_fill(&flow, UL_IPPROTO_TCP, laddr, lport, raddr, rport)
        out.seq = snd_nxt
        out.ack = rcv_nxt
        out.flags = TCP_RST | TCP_ACK
        out.mss_bytes = 536
        with nogil:
            engine_lock(e)
            emit_refusal(e, &flow, &out)
            # The application may have sent more than it could tell of before it died, and the peer then ignores the
            # RST (RFC 5961 3.2). To an old segment it answers with an ACK of where it stands (RFC 9293 3.10.7.4), and
            # the refusal of that ACK resets it. A peer that obeyed refuses this segment; its RST is dropped here.
            out.seq = snd_nxt - 1
            out.flags = TCP_ACK
            emit_refusal(e, &flow, &out)
            engine_unlock(e)

    # ------------------------------------------------------------ hand-over

    def export_session(self, Session session not None):
        """The whole state of a session as bytes; it lives elsewhere from now on (its handle says EBADF)."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef PyObject *out = NULL
        cdef int rc
        with nogil:
            engine_lock(e)
            rc = handover_export(e, s, &out)
            if rc == 0:
                polls_closed(e, s)
            engine_unlock(e)
        if rc < 0:
            fail(rc)
        if e.bufs.dead != NULL:
            self.reap()
        state = <object>out
        Py_DECREF(state)                   # the reference that came with it
        return state

    def adopt_foreign(self, int proto, str laddr, int lport, str raddr, int rport):
        """Remember a flow that another process holds: its frames are strays here, never refused."""
        cdef engine *e = self.e
        cdef flow_key flow
        flow_fill(&flow, proto, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            foreign_add(e, &flow, 0)
            engine_unlock(e)

    def forget_flow(self, int proto, str laddr, int lport, str raddr, int rport):
        """The other holder's session is over."""
        cdef engine *e = self.e
        cdef flow_key flow
        flow_fill(&flow, proto, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            foreign_forget(e, &flow)
            engine_unlock(e)

    def import_session(self, Session session not None, state, uint64_t session_id, prefix=b""):
        """Take over a session from its exported state. ValueError when the state is malformed."""
        cdef const uint8_t[::1] view = state
        cdef const uint8_t[::1] front = prefix
        cdef const uint8_t *f = &front[0] if front.shape[0] else NULL
        cdef size_t front_bytes = front.shape[0]
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef int rc
        cdef const uint8_t *p = &view[0] if view.shape[0] else NULL
        cdef size_t n = view.shape[0]
        with nogil:
            engine_lock(e)
            rc = handover_import(e, s, p, n, session_id, f, front_bytes)
            engine_unlock(e)
        if rc == -EINVAL:
            raise ValueError(f"session state of {n} bytes is malformed")
        if rc < 0:
            fail(rc)
        self.take_stat(session)
        self.settle_imported(session)

    cdef void settle_imported(self, Session session) noexcept:
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            orphans_replay(e, &s.flow)
            session_touch(e, s)
            engine_settle(e)
            engine_left(e)
            engine_unlock(e)

    def revive_session(self, Session session not None, str laddr, int lport, str raddr, int rport, bytes record not None,
                       uint64_t session_id):
        """Take over a TCP session whose process has died, from its status record, to close it in order.

        True: its last bytes were not acknowledged yet; they are lost unless the FIN is acknowledged. ValueError: more
        was lost, or the record is rubbish.
        """
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef flow_key flow
        cdef stat_record last
        cdef bint in_doubt = False
        cdef int rc
        if PyBytes_GET_SIZE(record) != sizeof(last):
            raise ValueError(f"a status record has {sizeof(last)} bytes, not {len(record)}")
        memcpy(&last, <const char *>record, sizeof(last))
        flow_fill(&flow, UL_IPPROTO_TCP, laddr, lport, raddr, rport)
        with nogil:
            engine_lock(e)
            rc = handover_revive(e, s, &flow, &last, session_id, &in_doubt)
            engine_unlock(e)
        if rc == -EINVAL:
            raise ValueError("the session cannot end in order")
        if rc < 0:
            fail(rc)
        return in_doubt

    def deliver(self, Session listener not None, state, uint64_t session_id):
        """An accepted session, from the server, into the listener's queue. OSError EINVAL when it listens no more."""
        cdef const uint8_t[::1] view = state
        cdef const uint8_t *p = &view[0] if view.shape[0] else NULL
        cdef size_t n = view.shape[0]
        cdef engine *e = self.e
        cdef ul_session *l = listener.s
        cdef Session child = self.new_session(UL_IPPROTO_TCP)
        cdef ul_session *s = child.s
        cdef int rc = -EINVAL
        with nogil:
            engine_lock(e)
            if l.role == ROLE_LISTEN:
                s.cfg = l.cfg
                rc = handover_import(e, s, p, n, session_id, NULL, 0)
            if rc == 0:
                # The queue has a reference of its own, accept() makes another handle.
                s.handle = NULL
                handover_enqueue(e, l, s)
            engine_unlock(e)
        if rc < 0:
            raise OSError(-rc, "the listener takes no session: it is closed, or the state is malformed")
        self.take_stat(child)
        self.settle_imported(child)
        with nogil:
            engine_lock(e)
            session_unref(e, s)
            engine_unlock(e)
        child.s = NULL

    def fail(self, Session session not None, int error):
        """It failed or ended elsewhere: pending error, waiters wake. A TCP session ends as by a RST."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            if not s.closing and s.role != ROLE_ENDED and s.role != ROLE_FOREIGN:
                engine_tick(e)
                if s.role == ROLE_TCP:
                    tcp_done(&e.env, s.tcp, -error)
                else:
                    session_end(e, s, -error)
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)
        if e.bufs.dead != NULL:
            self.reap()

    def reopen(self, Session session not None):
        """Back to a shell after a connection attempt that failed (BSD lets a socket try again)."""
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        with nogil:
            engine_lock(e)
            if s.role == ROLE_TCP and tcp_state(s.tcp) == 0:
                session_end(e, s, 0)
            if s.role == ROLE_ENDED and not s.closing:
                s.role = ROLE_SHELL
                s.phase = PHASE_OPEN
                s.so_error = 0
                memset(&s.flow.raddr, 0, sizeof(ul_addr))
                s.flow.rport = 0
                session_touch(e, s)
                engine_settle(e)
            engine_unlock(e)

    def inject(self, bytes frame not None):
        """Process a stray that its former holder forwarded (with its 4-byte header, see take_strays)."""
        cdef engine *e = self.e
        cdef ul_rx rx
        cdef const uint8_t *p = frame
        cdef uint32_t n = <uint32_t>PyBytes_GET_SIZE(frame)
        if n < 4:
            return
        memset(&rx, 0, sizeof(rx))
        rx.flags = p[0] | (p[1] << 8)
        rx.gso_size_bytes = p[2] | (p[3] << 8)
        rx.data = p + 4
        rx.len_bytes = n - 4
        rx.slot = UL_SLOT_NONE
        with nogil:
            engine_lock(e)
            engine_tick(e)
            engine_frame(e, &rx)
            engine_settle(e)
            engine_left(e)
            engine_unlock(e)

    # ------------------------------------------------------------ fork

    def before_fork(self):
        """No other thread is inside from here to after_fork_*(); lent buffers lie in private memory."""
        cdef engine *e = self.e
        with nogil:
            fork_prepare(e)

    def after_fork_parent(self):
        fork_parent(self.e)

    def after_fork_child(self):
        """The engine stays with the parent: here only shared sessions and shells can be used."""
        cdef ul_session *s
        fork_child(self.e)
        self.helper_thread = None
        self.stats = None
        self.link.close_fd()
        s = self.e.all
        while s != NULL:
            if s.handle != NULL:
                (<Session>s.handle).shared_rlock = None     # a thread that is gone may have held it
            s = s.all_next

    @property
    def broken(self):
        return bool(self.e.broken)

    def take_session(self, Session session not None):
        """Session.rebind()."""
        cdef engine *former = session.e
        cdef engine *e = self.e
        cdef ul_session *s = session.s
        cdef int err = 0
        if former == e:
            return
        with session.shared_lock:
            with nogil:
                s = session_rebind(former, s, e, &err)
            if s == NULL:
                fail(err)
            session.former = session.engine
            session.engine = self
            session.e = e
            session.s = s

    # ------------------------------------------------------------ what happened, what there is

    @property
    def collect_events(self):
        return self.e.collect_events == EVENTS_ALL

    @collect_events.setter
    def collect_events(self, bint on):
        self.e.collect_events = EVENTS_ALL if on else EVENTS_NONE

    @property
    def tell_ends(self):
        return bool(self.e.tell_ends)

    @tell_ends.setter
    def tell_ends(self, bint on):
        self.e.tell_ends = on

    def collect_ends(self):
        """Of the events EV_GONE alone, for one whose sessions are waited for elsewhere."""
        self.e.collect_events = EVENTS_ENDS

    def events(self):
        """(EV_*, session or None, value) since the last call."""
        cdef engine *e = self.e
        cdef event_rec *ev
        cdef event_rec *following
        cdef list out = []
        if e.events_head == NULL:
            return out
        with nogil:
            engine_lock(e)
            ev = e.events_head
            e.events_head = NULL
            e.events_tail = NULL
            e.ends_count = 0
            engine_unlock(e)
        while ev != NULL:
            following = ev.next
            if ev.s == NULL:
                out.append((ev.kind, None, ev.value))
            else:
                out.append((ev.kind, <Session>ev.s.handle if ev.s.handle != NULL else None, ev.value))
                with nogil:
                    engine_lock(e)
                    session_unref(e, ev.s)
                    engine_unlock(e)
            free(ev)
            ev = following
        return out

    def sessions(self):
        """One dict for each session here: proto, local, remote, state, id, and its counters."""
        return report_sessions(self.e)

    def counters(self):
        """Everything counted, one flat dict: engine, TCP (tcp_...), buffers (buf_...), link (link_...)."""
        out = report_counters(self.e)
        for name, value in self.link.counters().items():
            out["link_" + name] = value
        return out
