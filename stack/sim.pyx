"""TCP endpoints on virtual wires at virtual time: ``ulnet.stack.sim``.

The same C code that runs over real links, with loss, duplication, reordering, corruption, delay, rate and full
links drawn from one seed. A failing run replays from its seed.

>>> sim = Sim(seed=1)
>>> a, b = sim.pair(delay_ns=10_000, loss=0.1)
>>> b.listen(); a.connect()
>>> a.pour(bytes(100_000), close=True); b.drain(close=True)
>>> sim.run()
>>> len(b.received), a.state, b.state
(100000, 'CLOSED', 'LISTEN')
"""

import heapq

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from ulnet.stack.buf cimport bufpool_reap, rxseg, rxseg_free
from ulnet.stack.sim_core cimport EndpointCore, Packet, SimCore
from ulnet.stack.tcp cimport *
from ulnet.stack.tcp_cb cimport *

from ulnet.stack.sim_core import LETTERS as _LETTERS, Wire
from ulnet.stack.sim_trace import Segment, Trace
from ulnet.stack.tcp_state import state_name

cdef enum:
    EVENTS_MAX = 20000000            # a run that needs more is a live-lock

_TIMERS = ("rexmt", "delack", "keep", "2msl", "retry")


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


cdef class Endpoint(EndpointCore):
    """One end of one TCP connection."""

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
               no_ts: bool = False, sack: tuple = ()) -> list:
        """Let a hand-made segment arrive; returns the Segments sent in answer.

        Defaults: the expected ``seq``, an ``ack`` of everything sent, the present window, fitting timestamps.
        ``wnd`` is the field as on the wire; ``sack`` has up to four pairs of sequence numbers.
        """
        cdef Packet p = Packet()
        cdef int i
        self.live()
        memset(&p.seg, 0, sizeof(tcp_seg))
        bits = dict(_LETTERS)
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
        p.seg.sack_count = len(sack)
        for i in range(p.seg.sack_count):
            p.seg.sack[2 * i] = sack[i][0] & 0xFFFFFFFF
            p.seg.sack[2 * i + 1] = sack[i][1] & 0xFFFFFFFF
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
        return {_TIMERS[i]: self.pcb.timers[i] - self.env.now_ns for i in range(TT_COUNT) if self.pcb.timers[i] != INT64_MAX}

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


cdef class Sim(SimCore):
    """A seeded world of endpoints and wires; time is ``now_ns`` and stands still unless ``run`` moves it."""

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
        cdef EndpointCore ep
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
