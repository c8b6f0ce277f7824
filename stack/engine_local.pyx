"""Connections that a library sets up without the server: their numbers, its leased ports, and what moves all the same.

The server leases local ports to a library and leads a listener's packets to it; from then on handshakes, refusals and
the ends of connections are the library's own (proxy.py). differs: SOSP 1993 3.1 has the server do them, at a message
pair for each; measured here, that made a connection fifteen times as dear as the kernel's.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from ulnet.stack.engine_core cimport (
    EVENT_GONE, LEASE_BYTES, ROLE_LISTEN, ROLE_TCP, engine_leases, engine_number, engine_tick, event_add, session_end,
    session_ref, session_unref,
)
from ulnet.stack.engine_handover cimport handover_embryo, handover_export
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock
from ulnet.stack.session cimport session_wrap
from ulnet.stack.tcp cimport tcp_state
from ulnet.stack.tcp_cb cimport TCP_CLOSED, TCP_TIME_WAIT, TF_TS

cdef int64_t RECYCLE_NS = 1000000000


cdef object local_number(engine *e):
    cdef uint64_t number
    with nogil:
        engine_lock(e)
        number = engine_number(e)
        engine_unlock(e)
    return number


cdef int local_lease(engine *e, ports, bint on) except -1:
    cdef int port
    if e.leased == NULL:
        e.leased = <uint8_t *>calloc(1, LEASE_BYTES)
        if e.leased == NULL:
            raise MemoryError("no memory for leased ports")
    for port in ports:
        if on:
            e.leased[(port & 0xFFFF) >> 3] |= <uint8_t>(1 << (port & 7))
        else:
            e.leased[(port & 0xFFFF) >> 3] &= <uint8_t>~(1 << (port & 7))
    return 0


cdef list local_embryos(engine *e, ul_session *listener):
    """A listener is about to move: the states of its sessions whose handshake is under way. New requests are strays."""
    cdef ul_session *s
    cdef PyObject *out
    cdef int rc
    cdef list states = []
    while True:
        out = NULL
        rc = 0
        with nogil:
            engine_lock(e)
            s = NULL
            if listener.role == ROLE_LISTEN:
                listener.shut_wr = e.library
                s = handover_embryo(e, listener)
            if s != NULL:
                rc = handover_export(e, s, &out)
                session_unref(e, s)
            engine_unlock(e)
        if s == NULL:
            return states
        if rc == 0:
            states.append(<object>out)
            Py_DECREF(<object>out)         # the reference that came with it


cdef int local_recycle(engine *e, int most):
    """End sessions that have been in TIME-WAIT for a second: their peers will know a new connection from the same port
    by its timestamp (RFC 6191, RFC 7323 5.2). How many."""
    cdef ul_session *s
    cdef ul_session *following
    cdef int n = 0
    with nogil:
        engine_lock(e)
        engine_tick(e)
        s = e.all
        while s != NULL and n < most:
            following = s.all_next
            if s.role == ROLE_TCP and s.closing and tcp_state(s.tcp) == TCP_TIME_WAIT and s.tcp.flags & TF_TS and \
                    e.now_ns - s.tcp.changed_ns > RECYCLE_NS and engine_leases(e, s.flow.lport):
                event_add(e, EVENT_GONE, s, <int64_t>s.id)
                session_end(e, s, 0)
                n += 1
            s = following
        engine_unlock(e)
    return n


cdef list local_closing(object owner, engine *e):
    """TCP sessions that were closed and have not come to their end."""
    cdef ul_session *s
    cdef ul_session **found
    cdef uint32_t i
    cdef uint32_t n = 0
    cdef uint32_t room = e.all_count + 64
    cdef list out = []
    found = <ul_session **>malloc(room * sizeof(void *))
    if found == NULL:
        raise MemoryError("no memory for the list of sessions")
    # Handles are made without the lock: that may run the collector, and a destructor which wants it.
    with nogil:
        engine_lock(e)
        s = e.all
        while s != NULL and n < room:
            if s.role == ROLE_TCP and s.closing and tcp_state(s.tcp) != TCP_CLOSED:
                session_ref(s)
                found[n] = s
                n += 1
            s = s.all_next
        engine_unlock(e)
    for i in range(n):
        s = found[i]
        if s.handle == NULL:
            out.append(session_wrap(owner, e, s))      # the reference is the handle's
        else:
            out.append(<object>s.handle)
            with nogil:
                engine_lock(e)
                session_unref(e, s)
                engine_unlock(e)
    free(found)
    return out
