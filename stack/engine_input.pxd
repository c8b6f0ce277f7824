# What a received frame means to the engine.

from libc.stdint cimport uint32_t
from ulnet.kernelshim.link cimport ul_rx
from ulnet.stack.engine_core cimport engine, ul_session
from ulnet.stack.types cimport flow_key

# Returns 1 when the frame's slot was kept (the caller must not release it).
cdef bint engine_frame(engine *e, ul_rx *frame) noexcept nogil
# Frames that came before their session did: replay those of `flow`.
cdef void orphans_replay(engine *e, const flow_key *flow) noexcept nogil
cdef void orphans_expire(engine *e) noexcept nogil
cdef void stray_add(engine *e, const ul_rx *frame) noexcept nogil
