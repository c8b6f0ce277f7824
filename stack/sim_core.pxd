# The machinery of the simulator: packets, wires, and the side of endpoints and world that the user does not see.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from ulnet.kernelshim.link cimport ul_link
from ulnet.stack.buf cimport bufpool
from ulnet.stack.tcp cimport tcp_config, tcp_counters, tcp_env, tcp_out, tcp_seg
from ulnet.stack.tcp_cb cimport tcp_pcb


cdef class Packet:
    """A segment on a wire; the payload is its own copy."""
    cdef tcp_seg seg
    cdef bytes payload


cdef class Wire:
    cdef public int64_t delay_ns, jitter_ns, reorder_ns, rate_bps, queue_bytes
    cdef public double loss, duplicate, reorder, corrupt
    cdef public bint gso, down, full
    cdef public object drop
    cdef readonly dict counts
    cdef int64_t free_at_ns


cdef class EndpointCore:
    cdef readonly SimCore sim
    cdef readonly str name
    cdef readonly EndpointCore peer
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
    cdef void set_clock(self)
    cdef int make_pcb(self) except -1
    cdef int emit(self, const tcp_out *out)
    cdef void to_wire(self, Packet p)
    cdef object describe(self, Packet p)
    cdef void slot_free(self, uint32_t slot)
    cdef void deliver(self, Packet p)
    cdef void dirty_now(self)
    cdef void settle(self)
    cdef void schedule(self)
    cdef void on_timer(self)
    cdef void application(self)
    cdef int live(self) except -1
    cdef list after_call(self)


cdef class SimCore:
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
    cdef void at(self, int64_t when, EndpointCore ep, Packet p)
    cdef void settle_all(self)
