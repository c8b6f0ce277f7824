# Hand-over of sessions between address spaces. The caller holds the engine's lock.

from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint64_t
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.statpage cimport stat_record
from ulnet.stack.types cimport flow_key

# The whole state as a new bytes object, the caller's reference; the session has ended here, its flow is foreign from now
# on. 0, -ENOTCONN, -ENOMEM (nothing happened then).
cdef int handover_export(engine *e, ul_session *s, PyObject **out) noexcept nogil
# Into a shell of the same protocol. `prefix`: what was received before the unread data in the state (UDP: datagrams as
# in a state). 0, -EINVAL malformed, -EISCONN no shell, -EADDRINUSE, -ENOMEM.
cdef int handover_import(engine *e, ul_session *s, const uint8_t *p, size_t n, uint64_t session_id, const uint8_t *prefix,
                         size_t prefix_bytes) noexcept nogil
# What a dead process left of a connection, into a shell, to be closed then. 0; -EINVAL: data was lost, or the record is
# not an honest library's; else as handover_import. *in_doubt: see tcp_revive.
cdef int handover_revive(engine *e, ul_session *s, const flow_key *flow, const stat_record *last, uint64_t session_id,
                         bint *in_doubt) noexcept nogil
# An imported session into a listener's queue, or on its way there.
cdef void handover_enqueue(engine *e, ul_session *listener, ul_session *s) noexcept nogil
# One of a listener's sessions whose handshake is under way, with a reference: it is to be exported. NULL: none.
cdef ul_session *handover_embryo(engine *e, ul_session *listener) noexcept nogil
# Frames of this flow are strays here: for FOREIGN_NS in a library, for good in a server.
cdef void foreign_add(engine *e, const flow_key *flow, uint64_t session_id) noexcept nogil
cdef void foreign_forget(engine *e, const flow_key *flow) noexcept nogil
