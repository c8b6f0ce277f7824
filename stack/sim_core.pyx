"""The machinery of the simulator: wires with faults, the link side of endpoints, events in order of time.

``ulnet.stack.sim`` is the door; nothing here is meant to be called from Python.
"""
# Call order at one instant: every event of that time (arrivals, timers) -> the applications of the endpoints
# concerned -> tcp_output once for each. An endpoint's clock may be offset from the simulation's.

import heapq
import random

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from ulnet.kernelshim.link cimport UL_LINK_EVACUATE, ul_link, ul_rx
from ulnet.stack.buf cimport bufpool, bufpool_destroy, bufpool_init, bufpool_reap, bufpool_relieve
from ulnet.stack.tcp cimport *
from ulnet.stack.tcp_cb cimport *

from ulnet.stack.sim_trace import Segment, Trace

cdef enum:
    MTU_OVERHEAD_BYTES = 40

LETTERS = (("S", TCP_SYN), ("F", TCP_FIN), ("R", TCP_RST), ("P", TCP_PSH), ("U", TCP_URG), ("A", TCP_ACK))


cdef class Packet:
    """A segment on a wire; the payload is its own copy."""


cdef class Wire:
    """One direction between two endpoints. Every attribute may be changed while it runs.

    Probabilities: ``loss``, ``duplicate``, ``reorder`` (held back by up to ``reorder_ns``), ``corrupt`` (dropped,
    counted apart). ``rate_bps`` 0: unlimited; ``queue_bytes``: what may wait for it. ``gso``: super-segments travel
    whole. ``down``: everything is lost. ``full``: the link takes nothing (-EAGAIN). ``drop``: a function of the
    Segment that returns true for what is to be lost.
    """
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
        return (<EndpointCore>ctx).emit(out)


cdef void endpoint_release(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        (<EndpointCore>ctx).slot_free(slot)


cdef int endpoint_evacuate(void *ctx, uint32_t slot) noexcept nogil:
    with gil:
        (<EndpointCore>ctx).evacuated.add(slot)
    return 0


cdef class EndpointCore:
    """The link side of an endpoint: what it sends, what arrives, its timers, its pretended application."""

    def __cinit__(self, SimCore sim not None, name, options):
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
        self.link.small_slots = options.pop("small_slots", 0)
        self.link.small_bytes = options.pop("small_bytes", 1920)
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
        self.cfg.no_sack = not options.pop("sack", False)
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

    cdef void set_clock(self):
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
        cdef int shift = 0, i
        if self.pcb != NULL and not s.flags & TCP_SYN:
            shift = self.pcb.rcv_wscale
        return Segment(self.sim.now_ns, self.name, "".join([c for c, bit in LETTERS if s.flags & <int>bit]),
                       <uint32_t>(s.seq - iss), <uint32_t>(s.ack - irs) if s.flags & TCP_ACK else 0, s.len_bytes,
                       s.wnd << shift, "sent", s.mss, s.wscale,
                       s.ts_val if s.has_ts else None, s.ts_ecr if s.has_ts else None, s.seq, s.ack,
                       tuple([(<uint32_t>(s.sack[2 * i] - irs), <uint32_t>(s.sack[2 * i + 1] - irs))
                              for i in range(s.sack_count)]))

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

    cdef void dirty_now(self):
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


cdef void parse_options(const uint8_t *o, int n, tcp_seg *seg):
    # What tcp_output writes, read back; the wire's own parser is tested elsewhere.
    cdef int i = 0, j
    while i < n and o[i]:
        if o[i] == 1:
            i += 1
            continue
        if o[i] == 2:
            seg.mss = (<uint16_t>o[i + 2] << 8) | o[i + 3]
        elif o[i] == 3:
            seg.wscale = o[i + 2]
        elif o[i] == 4:
            seg.sack_ok = 1
        elif o[i] == 5:
            seg.sack_count = (o[i + 1] - 2) // 8
            for j in range(2 * seg.sack_count):
                seg.sack[j] = (<uint32_t>o[i + 2 + 4 * j] << 24) | (<uint32_t>o[i + 3 + 4 * j] << 16) | \
                    (<uint32_t>o[i + 4 + 4 * j] << 8) | o[i + 5 + 4 * j]
        elif o[i] == 8:
            seg.has_ts = 1
            seg.ts_val = (<uint32_t>o[i + 2] << 24) | (<uint32_t>o[i + 3] << 16) | (<uint32_t>o[i + 4] << 8) | o[i + 5]
            seg.ts_ecr = (<uint32_t>o[i + 6] << 24) | (<uint32_t>o[i + 7] << 16) | (<uint32_t>o[i + 8] << 8) | o[i + 9]
        i += o[i + 1]


cdef class SimCore:
    """Events in order of time."""

    def __init__(self, seed: object = 0, *, capture: bool = True, start_ns: int = 1_000_000_000) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_ns = start_ns
        self.capture = capture
        self.trace = Trace()
        self.heap = []
        self.dirty = []

    cdef void at(self, int64_t when, EndpointCore ep, Packet p):
        self.order += 1
        heapq.heappush(self.heap, (when, self.order, ep, p))

    cdef void settle_all(self):
        cdef EndpointCore ep
        if self.settling:
            return
        self.settling = True
        while self.dirty:
            ep = self.dirty.pop(0)
            ep.settle()
        self.settling = False
