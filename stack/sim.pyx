"""TCP endpoints on virtual wires at virtual time: ``ulnet.stack.sim``.

The same C code that runs over real links, with loss, duplication, reordering, corruption, delay, rate and full
links drawn from one seed. A failing run replays from its seed.

>>> sim = Sim(seed=1)
>>> a, b = sim.pair(delay_ns=10_000, loss=0.1)
>>> b.listen(); a.connect()
>>> a.pour(bytes(100_000), close=True); b.drain(close=True)
>>> sim.run()
>>> len(b.received), a.state, b.state
(100000, 'CLOSED', 'CLOSED')
"""
# Call order at one instant: every event of that time (arrivals, timers) -> the applications of the endpoints
# concerned -> tcp_output once for each. An endpoint's clock may be offset from the simulation's.

import heapq
import random

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ECONNRESET
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from ulnet.kernelshim.link cimport UL_LINK_EVACUATE, UL_SLOT_NONE, ul_link, ul_rx
from ulnet.stack.buf cimport bufpool, bufpool_destroy, bufpool_init, bufpool_reap, bufpool_relieve, rxseg, rxseg_free
from ulnet.stack.tcp cimport *
from ulnet.stack.tcp_cb cimport *

from ulnet.stack.sim_trace import Segment, Trace
from ulnet.stack.tcp_state import state_name

cdef enum:
    MTU_OVERHEAD_BYTES = 40
    EVENTS_MAX = 20000000            # a run that needs more is a live-lock

LETTERS = (("S", TCP_SYN), ("F", TCP_FIN), ("R", TCP_RST), ("P", TCP_PSH), ("U", TCP_URG), ("A", TCP_ACK))
TIMERS = ("rexmt", "delack", "keep", "2msl", "retry")


cdef class Packet:
    """A segment on a wire; the payload is its own copy."""
    cdef tcp_seg seg
    cdef bytes payload


cdef class Wire:
    """One direction between two endpoints. Every attribute may be changed while it runs.

    Probabilities: ``loss``, ``duplicate``, ``reorder`` (held back by up to ``reorder_ns``), ``corrupt`` (dropped,
    counted apart). ``rate_bps`` 0: unlimited; ``queue_bytes``: what may wait for it. ``gso``: super-segments travel
    whole. ``down``: everything is lost. ``full``: the link takes nothing (-EAGAIN). ``drop``: a function of the
    Segment that returns true for what is to be lost.
    """
    cdef public int64_t delay_ns, jitter_ns, reorder_ns, rate_bps, queue_bytes
    cdef public double loss, duplicate, reorder, corrupt
    cdef public bint gso, down, full
    cdef public object drop
    cdef readonly dict counts
    cdef int64_t free_at_ns

    def __init__(self, *, delay_ns: int = 10_000, jitter_ns: int = 0, loss: float = 0.0, duplicate: float = 0.0,
                 reorder: float = 0.0, reorder_ns: int = 0, corrupt: float = 0.0, rate_bps: int = 0,
                 queue_bytes: int = 1 << 30, gso: bool = False) -> None:
        self.delay_ns = delay_ns
        self.jitter_ns = jitter_ns
        self.loss = loss
        self.duplicate = duplicate
        self.reorder = reorder
        self.reorder_ns = reorder_ns or 3 * delay_ns
        self.corrupt = corrupt
        self.rate_bps = rate_bps
        self.queue_bytes = queue_bytes
        self.gso = gso
        self.counts = {"sent": 0, "lost": 0, "corrupt": 0, "queue": 0, "filtered": 0, "again": 0, "no peer": 0}


cdef int endpoint_emit(void *ctx, void *owner, const tcp_out *out) noexcept nogil:
    with gil:
        return (<Endpoint>ctx).emit(out)


cdef void endpoint_release(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        (<Endpoint>ctx).slot_free(slot)


cdef int endpoint_evacuate(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        (<Endpoint>ctx).evacuated.add(slot)
    return 0


cdef class Lent:
    """A received segment taken out without a copy. ``release`` (or ``with``) gives it back."""
    cdef Endpoint endpoint
    cdef rxseg *s

    def __bytes__(self) -> bytes:
        if self.s == NULL:
            raise ValueError("the segment was released")
        return PyBytes_FromStringAndSize(<char *>self.s.data, self.s.len_bytes)

    def release(self) -> None:
        if self.s != NULL:
            rxseg_free(&self.endpoint.bufs, self.s)
            self.s = NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.release()


cdef class Endpoint:
    """One end of one TCP connection."""
    cdef readonly Sim sim
    cdef readonly str name
    cdef readonly Endpoint peer
    cdef public Wire wire                # towards the peer
    cdef public int64_t clock_offset_ns
    cdef readonly bytearray received     # by drain()
    cdef readonly object finished        # None, "eof", or the OSError drain() met
    cdef public uint32_t next_iss
    cdef tcp_pcb *pcb
    cdef tcp_env env
    cdef tcp_config cfg
    cdef tcp_counters counts
    cdef bufpool bufs
    cdef ul_link link
    cdef dict slots                      # slot -> payload of frames TCP holds
    cdef set evacuated
    cdef uint32_t ring_at
    cdef bint listening, draining, drain_close, pour_close, dirty, user_gone
    cdef bytes pouring
    cdef size_t poured
    cdef int64_t scheduled_ns
    cdef list sent_now

    def __cinit__(self, Sim sim not None, name, options):
        self.sim = sim
        self.name = name
        self.slots = {}
        self.evacuated = set()
        self.received = bytearray()
        self.scheduled_ns = INT64_MAX
        memset(&self.link, 0, sizeof(self.link))
        self.link.ctx = <void *>self
        self.link.release = endpoint_release
        self.link.evacuate = endpoint_evacuate
        self.link.slots = options.pop("slots", 0)
        self.link.features = UL_LINK_EVACUATE
        bufpool_init(&self.bufs, &self.link)
        memset(&self.env, 0, sizeof(self.env))
        self.env.bufs = &self.bufs
        self.env.ctx = <void *>self
        self.env.emit = endpoint_emit
        self.env.counters = &self.counts
        self.env.max_gso_bytes = options.pop("max_gso_bytes", 0)
        self.cfg.mss_bytes = options.pop("mtu", 1500) - MTU_OVERHEAD_BYTES
        self.cfg.sndbuf_bytes = options.pop("sndbuf", 262144)
        self.cfg.rcvbuf_bytes = options.pop("rcvbuf", 262144)
        self.cfg.nodelay = options.pop("nodelay", False)
        self.cfg.keepalive = options.pop("keepalive", False)
        self.cfg.keepidle_s = options.pop("keepidle", 0)
        self.cfg.keepintvl_s = options.pop("keepintvl", 0)
        self.cfg.keepcnt = options.pop("keepcnt", 0)
        self.cfg.user_timeout_ms = options.pop("user_timeout_ms", 0)
        self.cfg.ts_offset = sim.rng.getrandbits(32)
        self.next_iss = options.pop("iss", sim.rng.getrandbits(32))
        self.clock_offset_ns = options.pop("clock_offset_ns", 0)
        if options:
            raise TypeError(f"no endpoint option {', '.join(map(repr, options))}")
        self.set_clock()
        self.make_pcb()

    def __dealloc__(self):
        if self.pcb != NULL:
            tcp_free(&self.env, self.pcb)
            self.pcb = NULL
        if self.bufs.dead != NULL:
            bufpool_reap(&self.bufs)
        bufpool_destroy(&self.bufs)

    cdef inline void set_clock(self):
        self.env.now_ns = self.sim.now_ns + self.clock_offset_ns

    cdef int make_pcb(self) except -1:
        if self.pcb != NULL:
            tcp_free(&self.env, self.pcb)
        self.pcb = tcp_new(&self.env, &self.cfg, <void *>self)
        if self.pcb == NULL:
            raise MemoryError("no memory for a control block")
        self.user_gone = False
        return 0

    # ---- the wire side ----

    cdef int emit(self, const tcp_out *out):
        cdef Packet p
        cdef Packet piece
        cdef uint32_t at = 0, n, step
        cdef bytes payload
        cdef char *to
        cdef int i
        if self.wire is not None and self.wire.full:
            return -EAGAIN
        payload = PyBytes_FromStringAndSize(NULL, out.len_bytes)
        to = PyBytes_AS_STRING(payload)
        for i in range(out.iov_count):
            memcpy(to + at, out.iov[i].iov_base, out.iov[i].iov_len)
            at += <uint32_t>out.iov[i].iov_len
        if at != out.len_bytes:
            raise AssertionError(f"{self.name}: pieces of {at} bytes in a segment of {out.len_bytes} (seed {self.sim.seed})")
        p = Packet()
        memset(&p.seg, 0, sizeof(tcp_seg))
        p.seg.seq = out.seq
        p.seg.ack = out.ack
        p.seg.wnd = out.wnd
        p.seg.flags = out.flags
        p.seg.wscale = 255
        parse_options(out.opts, out.opt_len_bytes, &p.seg)
        if out.len_bytes <= out.mss_bytes or (self.wire is not None and self.wire.gso):
            p.payload = payload
            p.seg.len_bytes = out.len_bytes
            if out.len_bytes > out.mss_bytes:
                p.seg.gso_size_bytes = out.mss_bytes
            self.to_wire(p)
            return 0
        at = 0
        while at < out.len_bytes:        # the link cuts it, as TSO does
            step = out.mss_bytes
            n = out.len_bytes - at if out.len_bytes - at < step else step
            piece = Packet()
            piece.seg = p.seg
            piece.seg.seq = out.seq + at
            piece.seg.len_bytes = n
            piece.payload = payload[at:at + n]
            if at + n < out.len_bytes:
                piece.seg.flags &= ~(TCP_FIN | TCP_PSH)
            self.to_wire(piece)
            at += n
        return 0

    cdef void to_wire(self, Packet p):
        cdef Wire w = self.wire
        cdef int64_t at, extra
        cdef object rng = self.sim.rng
        cdef str fate = "sent"
        segment = None
        if self.sim.capture or self.sent_now is not None or (w is not None and w.drop is not None):
            segment = self.describe(p)
        if w is None or self.peer is None:
            fate = "no peer"
        elif w.down or (w.loss and rng.random() < w.loss):
            fate = "lost"
        elif w.corrupt and rng.random() < w.corrupt:
            fate = "corrupt"
        elif w.drop is not None and w.drop(segment):
            fate = "filtered"
        else:
            at = self.sim.now_ns
            if w.rate_bps:
                if w.free_at_ns < at:
                    w.free_at_ns = at
                if (w.free_at_ns - at) * w.rate_bps // 8000000000 > w.queue_bytes:
                    fate = "queue"
                else:
                    w.free_at_ns += (<int64_t>p.seg.len_bytes + 66) * 8000000000 // w.rate_bps
                    at = w.free_at_ns
            if fate == "sent":
                at += w.delay_ns
                if w.jitter_ns:
                    at += rng.randrange(w.jitter_ns)
                extra = 0
                if w.reorder and rng.random() < w.reorder:
                    extra = rng.randrange(w.reorder_ns + 1)
                self.sim.at(at + extra, self.peer, p)
                if w.duplicate and rng.random() < w.duplicate:
                    w.counts["again"] += 1
                    self.sim.at(at + rng.randrange(2 * w.delay_ns + 1), self.peer, p)
        if w is not None:
            w.counts[fate] += 1
        if segment is not None:
            segment = segment._replace(fate=fate)
            if self.sim.capture:
                self.sim.trace.append(segment)
            if self.sent_now is not None:
                self.sent_now.append(segment)

    cdef object describe(self, Packet p):
        cdef tcp_seg *s = &p.seg
        cdef uint32_t iss = self.pcb.iss if self.pcb != NULL else 0
        cdef uint32_t irs = self.pcb.irs if self.pcb != NULL else 0
        cdef int shift = 0
        if self.pcb != NULL and not s.flags & TCP_SYN:
            shift = self.pcb.rcv_wscale
        return Segment(self.sim.now_ns, self.name, "".join([c for c, bit in LETTERS if s.flags & <int>bit]),
                       <uint32_t>(s.seq - iss), <uint32_t>(s.ack - irs) if s.flags & TCP_ACK else 0, s.len_bytes,
                       s.wnd << shift, "sent", s.mss, s.wscale,
                       s.ts_val if s.has_ts else None, s.ts_ecr if s.has_ts else None, s.seq, s.ack)

    cdef void slot_free(self, uint32_t slot):
        if self.slots is None:
            return                       # the garbage collector was here
        left = self.slots.get(slot)
        if left is None:
            raise AssertionError(f"{self.name}: slot {slot} released but not held (seed {self.sim.seed})")
        left[0] -= 1
        if left[0] == 0:                 # with evacuation several generations may be out: memory lives until all are back
            del self.slots[slot]
            self.evacuated.discard(slot)

    cdef void deliver(self, Packet p):
        cdef ul_rx frame
        cdef tcp_seg seg = p.seg
        cdef tcp_out out
        cdef uint32_t slot = self.ring_at, iss_least = 0
        self.dirty_now()
        if self.link.slots and slot in self.slots and slot not in self.evacuated:
            self.sim.ring_drops += 1     # the ring ran into a held slot
            return
        self.ring_at = slot + 1
        if self.link.slots:
            self.ring_at %= self.link.slots
        seg.data = <const uint8_t *>PyBytes_AS_STRING(p.payload)
        memset(&frame, 0, sizeof(frame))
        frame.data = seg.data
        frame.len_bytes = seg.len_bytes
        frame.slot = slot
        frame.gso_size_bytes = seg.gso_size_bytes
        seg.frame = &frame
        if slot in self.slots:
            self.slots[slot][0] += 1
            self.slots[slot].append(p.payload)
        else:
            self.slots[slot] = [1, p.payload]
        self.bufs.last_slot = slot
        if self.listening and (self.pcb.state == TCP_CLOSED or tcp_reusable(self.pcb, &seg, &iss_least)) and \
                seg.flags & TCP_SYN and not seg.flags & (TCP_RST | TCP_ACK):
            if self.pcb.state == TCP_TIME_WAIT:
                self.next_iss = iss_least
            self.make_pcb()
            tcp_passive(&self.env, self.pcb, &seg, self.next_iss)
        elif self.pcb.state == TCP_CLOSED:
            if tcp_refuse(&seg, &out):
                self.emit(&out)
        else:
            tcp_input(&self.env, self.pcb, &seg)
        if not seg.held:
            self.slot_free(slot)

    cdef inline void dirty_now(self):
        self.set_clock()
        if not self.dirty:
            self.dirty = True
            self.sim.dirty.append(self)

    cdef void settle(self):
        """The end of a burst: application, output, the next timer."""
        self.dirty = False
        self.set_clock()
        if self.pcb == NULL:
            return
        if self.draining or self.pouring is not None:
            self.application()
        bufpool_relieve(&self.bufs)
        if tcp_wants_output(self.pcb):
            tcp_output(&self.env, self.pcb)
        if self.bufs.dead != NULL:
            bufpool_reap(&self.bufs)
        self.schedule()

    cdef void schedule(self):
        cdef int64_t due = tcp_deadline(self.pcb)
        if due != INT64_MAX:
            due -= self.clock_offset_ns
            if due < self.scheduled_ns:
                self.scheduled_ns = due
                self.sim.at(due, self, None)

    cdef void on_timer(self):
        cdef int64_t due
        self.scheduled_ns = INT64_MAX
        if self.pcb == NULL:
            return
        self.set_clock()
        due = tcp_deadline(self.pcb)
        if due <= self.env.now_ns:
            tcp_timers(&self.env, self.pcb)
            self.dirty_now()
        else:
            self.schedule()

    cdef void application(self):
        cdef uint8_t buf[65536]
        cdef Py_ssize_t n
        while self.draining:
            n = tcp_read(&self.env, self.pcb, buf, sizeof(buf), False)
            if n > 0:
                self.received += PyBytes_FromStringAndSize(<char *>buf, n)
                continue
            if n == -EAGAIN or (n < 0 and self.pcb.state == TCP_CLOSED and not self.pcb.flags & TF_OPENED):
                break
            self.draining = False
            self.finished = "eof" if n == 0 else OSError(<int>-n, "")
            if self.drain_close and self.pouring is None:
                self.user_gone = True
                tcp_close(&self.env, self.pcb)
        while self.pouring is not None:
            if self.pcb.state < TCP_ESTABLISHED and (self.pcb.state != TCP_CLOSED or not self.pcb.flags & TF_OPENED):
                break                    # not connected yet
            if self.poured < <size_t>PyBytes_GET_SIZE(self.pouring):
                n = tcp_write(&self.env, self.pcb, <const uint8_t *>PyBytes_AS_STRING(self.pouring) + self.poured,
                              PyBytes_GET_SIZE(self.pouring) - self.poured)
                if n < 0:
                    if n != -EAGAIN:
                        self.pouring = None
                        if self.finished is None:
                            self.finished = OSError(<int>-n, "")
                    break
                self.poured += <size_t>n
                continue
            self.pouring = None
            if self.pour_close:
                if self.draining:        # half close: the other direction goes on
                    tcp_shutdown(&self.env, self.pcb, 1)
                else:
                    self.user_gone = True
                    tcp_close(&self.env, self.pcb)
            elif self.drain_close and not self.draining:
                self.user_gone = True
                tcp_close(&self.env, self.pcb)

    cdef int live(self) except -1:
        if self.pcb == NULL:
            raise ValueError(f"{self.name} was exported: import_ it first")
        self.set_clock()
        return 0

    cdef list after_call(self):
        self.dirty_now()
        self.sim.settle_all()
        return None

    # ---- the user's side ----

    def listen(self) -> None:
        """Accept the next SYN (again after each connection's end)."""
        self.listening = True

    def connect(self, peer: "Endpoint | None" = None) -> None:
        """Send a SYN."""
        self.live()
        if peer is not None and peer is not self.peer:
            raise ValueError(f"{self.name} and {peer.name} are not on one wire: make them with Sim.pair()")
        if self.pcb.state == TCP_CLOSED and self.pcb.flags & TF_OPENED:
            self.make_pcb()
        tcp_open(&self.env, self.pcb, self.next_iss)
        self.after_call()

    def write(self, data: bytes, *, hold: bool = False) -> int:
        """Bytes taken. BlockingIOError when there is no room; OSError when it cannot be."""
        cdef Py_ssize_t n
        cdef const uint8_t[::1] view
        self.live()
        if hold:
            n = tcp_write_hold(&self.env, self.pcb, <const uint8_t *>PyBytes_AS_STRING(data), len(data), data)
        else:
            n = tcp_write(&self.env, self.pcb, <const uint8_t *>PyBytes_AS_STRING(data), len(data))
        if n < 0:
            raise OSError(-n, f"{self.name}: write")
        self.after_call()
        return n

    def read(self, n: int = 65536, *, peek: bool = False) -> bytes:
        """Up to n bytes; b"" at the end of file. BlockingIOError when there is nothing yet."""
        cdef Py_ssize_t r
        self.live()
        out = PyBytes_FromStringAndSize(NULL, n)
        r = tcp_read(&self.env, self.pcb, <uint8_t *>PyBytes_AS_STRING(out), n, peek)
        if r < 0:
            raise OSError(-r, f"{self.name}: read")
        self.after_call()
        return out[:r]

    def lend(self, n: int = 1 << 30) -> Lent:
        """The next received segment, not copied."""
        cdef int err = 0
        cdef Lent lent = Lent()
        self.live()
        lent.endpoint = self
        lent.s = tcp_read_seg(&self.env, self.pcb, n, &err)
        if lent.s == NULL:
            raise EOFError(self.name) if err == 0 else OSError(-err, f"{self.name}: lend")
        self.after_call()
        return lent

    def pour(self, data: bytes, *, close: bool = False) -> None:
        """Write all of data as room appears, then shut down or close."""
        self.live()
        self.pouring = bytes(data)
        self.poured = 0
        self.pour_close = close
        self.after_call()

    def drain(self, *, close: bool = False) -> None:
        """Read everything into ``received`` until the end of file; then close, when nothing is left to pour."""
        self.live()
        if self.listening and self.pcb.state == TCP_CLOSED and self.pcb.flags & TF_OPENED:
            self.make_pcb()              # the next connection's data, not the end of the last one
        self.draining = True
        self.drain_close = close
        self.finished = None
        self.after_call()

    def stop_draining(self) -> None:
        self.draining = False

    def shutdown(self, how: int = 1) -> None:
        cdef int r
        self.live()
        r = tcp_shutdown(&self.env, self.pcb, how)
        if r < 0:
            raise OSError(-r, f"{self.name}: shutdown")
        self.after_call()

    def close(self) -> None:
        """The user is gone: FIN, or RST when data was left unread."""
        self.live()
        self.listening = False
        self.draining = False
        self.pouring = None
        self.user_gone = True
        tcp_close(&self.env, self.pcb)
        self.after_call()

    def abort(self) -> None:
        self.live()
        tcp_abort(&self.env, self.pcb)
        self.after_call()

    def setopt(self, level: int, name: int, value: int) -> None:
        cdef int r
        self.live()
        r = tcp_setopt(&self.env, self.pcb, level, name, value)
        if r < 0:
            raise OSError(-r, f"{self.name}: setopt({level}, {name}, {value})")
        self.after_call()

    def getopt(self, level: int, name: int) -> int:
        cdef int value = 0
        cdef int r
        self.live()
        r = tcp_getopt(self.pcb, level, name, &value)
        if r < 0:
            raise OSError(-r, f"{self.name}: getopt({level}, {name})")
        return value

    def icmp(self, error: int, *, seq: int | None = None, mtu: int = 0) -> None:
        """An ICMP error about a segment at ``seq`` (default: the oldest unacknowledged one); ``error``: a positive errno."""
        self.live()
        tcp_icmp(&self.env, self.pcb, -error, self.pcb.snd_una if seq is None else seq & 0xFFFFFFFF, mtu)
        self.after_call()

    def inject(self, flags: str = "A", *, seq: int | None = None, ack: int | None = None, payload: bytes = b"",
               wnd: int | None = None, mss: int = 0, wscale: int = 255, ts: tuple[int, int] | None = None,
               no_ts: bool = False) -> list:
        """Let a hand-made segment arrive; returns the Segments sent in answer.

        Defaults: the expected ``seq``, an ``ack`` of everything sent, the present window, fitting timestamps.
        ``wnd`` is the field as on the wire.
        """
        cdef Packet p = Packet()
        self.live()
        memset(&p.seg, 0, sizeof(tcp_seg))
        bits = dict(LETTERS)
        for c in flags:
            if c not in bits:
                raise ValueError(f"no flag {c!r}: use letters of SFRPUA")
            p.seg.flags |= <uint8_t><int>bits[c]
        p.seg.seq = self.pcb.rcv_nxt if seq is None else seq & 0xFFFFFFFF
        p.seg.ack = self.pcb.snd_max if ack is None else ack & 0xFFFFFFFF
        p.seg.wnd = (self.pcb.snd_wnd >> self.pcb.snd_wscale) if wnd is None else wnd
        p.seg.mss = mss
        p.seg.wscale = wscale
        p.seg.len_bytes = len(payload)
        p.payload = payload
        if ts is not None:
            p.seg.has_ts = 1
            p.seg.ts_val = ts[0] & 0xFFFFFFFF
            p.seg.ts_ecr = ts[1] & 0xFFFFFFFF
        elif self.pcb.flags & TF_TS and self.pcb.state > TCP_SYN_SENT and not no_ts:
            p.seg.has_ts = 1
            p.seg.ts_val = self.pcb.ts_recent
        answers: list = []
        self.sent_now = answers
        self.deliver(p)
        self.sim.settle_all()
        self.sent_now = None
        return answers

    def migrate(self, clock_offset_ns: int | None = None) -> int:
        """Export and import in one step; returns the size in bytes."""
        data = self.export()
        self.import_(data, clock_offset_ns)
        return len(data)

    def export(self) -> bytes:
        """The whole connection as bytes. This endpoint is empty afterwards; segments that arrive are lost."""
        cdef bytes data
        self.live()
        data = PyBytes_FromStringAndSize(NULL, tcp_export_bytes(self.pcb))
        if tcp_export(&self.env, self.pcb, <uint8_t *>PyBytes_AS_STRING(data)) != <size_t>PyBytes_GET_SIZE(data):
            raise AssertionError("tcp_export_bytes and tcp_export disagree")
        tcp_free(&self.env, self.pcb)
        self.pcb = NULL
        return data

    def import_(self, data: bytes, clock_offset_ns: int | None = None) -> None:
        """Continue a connection from bytes. OSError(EINVAL) when they make no sense."""
        cdef tcp_pcb *pcb
        cdef int err = 0
        if clock_offset_ns is not None:
            self.clock_offset_ns = clock_offset_ns
        self.set_clock()
        pcb = tcp_import(&self.env, <const uint8_t *>PyBytes_AS_STRING(data), len(data), <void *>self, &err)
        if pcb == NULL:
            raise OSError(-err, f"{self.name}: import of {len(data)} bytes")
        if self.pcb != NULL:
            tcp_free(&self.env, self.pcb)
        self.pcb = pcb
        self.scheduled_ns = INT64_MAX
        self.after_call()

    # ---- looking ----

    @property
    def state(self) -> str:
        if self.pcb == NULL:
            return "EXPORTED"
        if self.listening and self.pcb.state == TCP_CLOSED:
            return "LISTEN"
        return state_name(self.pcb.state)

    @property
    def ready(self) -> int:
        """UL_READABLE 1, UL_WRITABLE 2, UL_ERROR 4, UL_HUP 8, UL_RDHUP 16."""
        self.live()
        return tcp_ready(self.pcb)

    @property
    def error(self) -> int:
        """Pending error as a positive errno; reading does not clear it."""
        self.live()
        return -tcp_so_error(self.pcb, False)

    @property
    def numbers(self) -> dict:
        """Fields of the control block by their RFC 9293 names, and what hangs on it."""
        cdef tcp_pcb *p = self.pcb
        self.live()
        return {"iss": p.iss, "irs": p.irs, "snd_una": p.snd_una, "snd_nxt": p.snd_nxt, "snd_max": p.snd_max,
                "snd_wnd": p.snd_wnd, "rcv_nxt": p.rcv_nxt, "rcv_wnd": tcp_rcv_wnd(p), "cwnd": p.cc.cwnd_bytes,
                "ssthresh": p.cc.ssthresh_bytes, "mss": p.eff_mss, "srtt_ns": p.rtt.srtt_ns, "rto_ns": p.rtt.rto_ns,
                "backoff": p.rtt.backoff, "retransmits": p.retransmits, "ts_recent": p.ts_recent,
                "unread": p.rcv.len_bytes, "unread_memory": p.rcv.mem_bytes, "unsent": p.snd.len_bytes,
                "out_of_order": p.ooo.len_bytes, "out_of_order_pieces": p.ooo.count,
                "out_of_order_memory": p.ooo.mem_bytes, "bytes_in": p.bytes_in, "bytes_out": p.bytes_out}

    @property
    def stat(self) -> dict:
        """tcp_stat of the connection."""
        cdef tcp_stat s
        self.live()
        tcp_stat_get(self.pcb, &s)
        return dict(s)

    @property
    def timers(self) -> dict:
        """Running timers: nanoseconds left."""
        self.live()
        return {TIMERS[i]: self.pcb.timers[i] - self.env.now_ns for i in range(TT_COUNT) if self.pcb.timers[i] != INT64_MAX}

    @property
    def counters(self) -> dict:
        return dict(self.counts)

    @property
    def memory(self) -> dict:
        """What is held: blocks not on a freelist, link slots, lent segments, payload bytes copied."""
        return {"blocks": self.bufs.live_blocks, "slots": len(self.slots), "held": self.bufs.held, "lent": self.bufs.lent,
                "copied": self.bufs.copied_bytes, "evacuated": self.bufs.evacuated, "pcb_bytes": sizeof(tcp_pcb)}

    def forget(self) -> None:
        """Free the control block and start afresh, CLOSED."""
        self.live()
        self.make_pcb()
        if self.bufs.dead != NULL:
            bufpool_reap(&self.bufs)


cdef void parse_options(const uint8_t *o, int n, tcp_seg *seg):
    # What tcp_output writes, read back; the wire's own parser is tested elsewhere.
    cdef int i = 0
    while i < n and o[i]:
        if o[i] == 1:
            i += 1
            continue
        if o[i] == 2:
            seg.mss = (<uint16_t>o[i + 2] << 8) | o[i + 3]
        elif o[i] == 3:
            seg.wscale = o[i + 2]
        elif o[i] == 8:
            seg.has_ts = 1
            seg.ts_val = (<uint32_t>o[i + 2] << 24) | (<uint32_t>o[i + 3] << 16) | (<uint32_t>o[i + 4] << 8) | o[i + 5]
            seg.ts_ecr = (<uint32_t>o[i + 6] << 24) | (<uint32_t>o[i + 7] << 16) | (<uint32_t>o[i + 8] << 8) | o[i + 9]
        i += o[i + 1]


cdef class Sim:
    """A seeded world of endpoints and wires; time is ``now_ns`` and stands still unless ``run`` moves it."""
    cdef readonly object seed
    cdef readonly object rng
    cdef readonly int64_t now_ns
    cdef public bint capture
    cdef readonly object trace
    cdef readonly uint64_t events, ring_drops
    cdef list heap
    cdef list dirty
    cdef uint64_t order
    cdef bint settling

    def __init__(self, seed: object = 0, *, capture: bool = True, start_ns: int = 1_000_000_000) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_ns = start_ns
        self.capture = capture
        self.trace = Trace()
        self.heap = []
        self.dirty = []

    cdef void at(self, int64_t when, Endpoint ep, Packet p):
        self.order += 1
        heapq.heappush(self.heap, (when, self.order, ep, p))

    cdef void settle_all(self):
        cdef Endpoint ep
        if self.settling:
            return
        self.settling = True
        while self.dirty:
            ep = self.dirty.pop(0)
            ep.settle()
        self.settling = False

    def endpoint(self, name: str = "a", **options) -> Endpoint:
        """An endpoint without a peer: what it sends goes nowhere, what it receives is injected."""
        return Endpoint(self, name, options)

    def pair(self, *, names: tuple[str, str] = ("a", "b"), options: dict | None = None, options_b: dict | None = None,
             **wire) -> tuple:
        """Two endpoints joined by two wires with the given Wire options (change them apart by ``a.wire``, ``b.wire``)."""
        cdef Endpoint a = Endpoint(self, names[0], dict(options or {}))
        cdef Endpoint b = Endpoint(self, names[1], dict(options_b if options_b is not None else options or {}))
        a.peer = b
        b.peer = a
        a.wire = Wire(**wire)
        b.wire = Wire(**wire)
        return a, b

    def run(self, until_ns: int | None = None, *, for_ns: int | None = None, max_events: int = EVENTS_MAX) -> None:
        """Let events happen until a time, for a time, or until nothing is left to happen."""
        cdef int64_t limit = INT64_MAX, when
        cdef Endpoint ep
        cdef Packet p
        cdef uint64_t stop = self.events + <uint64_t>max_events
        if until_ns is not None:
            limit = until_ns
        elif for_ns is not None:
            limit = self.now_ns + <int64_t>for_ns
        while self.heap and <int64_t>self.heap[0][0] <= limit:
            when = self.heap[0][0]
            if when > self.now_ns:
                self.now_ns = when
            while self.heap and <int64_t>self.heap[0][0] <= self.now_ns:
                _, _, ep, p = heapq.heappop(self.heap)
                self.events += 1
                if p is None:
                    ep.on_timer()
                elif ep.pcb != NULL:
                    ep.deliver(p)
            self.settle_all()
            if self.events > stop:
                raise RuntimeError(f"more than {max_events} events: a live-lock? (seed {self.seed!r})")
        if limit != INT64_MAX and limit > self.now_ns:
            self.now_ns = limit

    def step(self) -> bool:
        """All events of the next instant; False when there are none."""
        if not self.heap:
            return False
        self.run(self.heap[0][0])
        return True

    def advance(self, ns: int) -> None:
        """Let time pass, with all that happens in it."""
        self.run(for_ns=ns)
