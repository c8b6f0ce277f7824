"""What an engine has and has counted, as Python objects: for ``ulnet sessions``, ``ulnet counters`` and tests."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from ulnet.stack.address cimport addr_to_text
from ulnet.stack.engine_core cimport ROLE_LISTEN, ROLE_TCP, ROLE_UDP, ul_session
from ulnet.stack.engine_wait cimport engine_lock, engine_unlock
from ulnet.stack.session import STATES
from ulnet.stack.tcp cimport tcp_stat, tcp_stat_get
from ulnet.stack.types cimport addr_is_zero, flow_key, ul_addr

ctypedef struct session_row:       # what is copied under the lock
    uint8_t role
    uint8_t closing
    flow_key flow
    uint64_t id
    tcp_stat t


cdef str addr_shown(const ul_addr *a):
    return "0.0.0.0" if addr_is_zero(a) else addr_to_text(a)


cdef list report_sessions(engine *e):
    cdef ul_session *s
    cdef session_row *rows
    cdef session_row *row
    cdef uint32_t n = 0
    cdef uint32_t room = e.all_count + 64
    cdef uint32_t i
    cdef list out = []
    # Python objects are made after the lock is let go: making one may run the collector, and that a destructor
    # which wants the lock.
    rows = <session_row *>malloc(room * sizeof(session_row))
    if rows == NULL:
        raise MemoryError("no memory for the list of sessions")
    with nogil:
        engine_lock(e)
        s = e.all
        while s != NULL and n < room:
            if s.role == ROLE_TCP or s.role == ROLE_UDP or s.role == ROLE_LISTEN:
                row = &rows[n]
                n += 1
                row.role = s.role
                row.closing = s.closing
                row.flow = s.flow
                row.id = s.id
                memset(&row.t, 0, sizeof(tcp_stat))
                if s.role == ROLE_TCP:
                    tcp_stat_get(s.tcp, &row.t)
                elif s.role == ROLE_UDP:
                    row.t.bytes_in = s.udp.bytes_in
                    row.t.bytes_out = s.udp.bytes_out
            s = s.all_next
        engine_unlock(e)
    for i in range(n):
        row = &rows[i]
        entry = dict(row.t)
        entry["proto"] = "udp" if row.role == ROLE_UDP else "tcp"
        entry["local"] = (addr_shown(&row.flow.laddr), row.flow.lport)
        entry["remote"] = None if addr_is_zero(&row.flow.raddr) else (addr_shown(&row.flow.raddr), row.flow.rport)
        entry["state"] = ("OPEN" if row.role == ROLE_UDP else "LISTEN" if row.role == ROLE_LISTEN
                          else STATES[row.t.state])
        entry["session_id"] = row.id
        entry["closing"] = bool(row.closing)
        out.append(entry)
    free(rows)
    return out


cdef dict report_counters(engine *e):
    """One flat dict: engine, TCP (tcp_...), buffers (buf_...)."""
    out = dict(e.n)
    for name, value in dict(e.tcp).items():
        out["tcp_" + name] = value
    out["buf_held"] = e.bufs.held
    out["buf_lent"] = e.bufs.lent
    out["buf_copied_bytes"] = e.bufs.copied_bytes
    out["buf_evacuated"] = e.bufs.evacuated
    out["buf_slots_short"] = e.bufs.slots_short
    out["buf_nomem"] = e.bufs.nomem
    out["reass_done"] = e.reass.done
    out["reass_timeouts"] = e.reass.timeouts
    out["reass_overlaps"] = e.reass.overlaps
    out["reass_overflow"] = e.reass.overflow
    out["sessions"] = e.all_count
    out["flows"] = e.table_count
    return out
