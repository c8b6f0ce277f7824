# Control messages of datagrams, for the socket's sendmsg() and recvmsg().

from libc.stdint cimport uint32_t

from ulnet.stack.engine_user cimport user_meta
from ulnet.stack.session cimport Session

# Check what sendmsg() is given and fill in meta (ttl, tos: -1 if not named); how many there were. Raises as Linux answers.
cdef int control_parse(list ancdata, bint dgram, Session s, int ifindex, user_meta *meta) except -1
# What recvmsg() tells: `wanted` as _sockopt.BESIDE has it; MSG_CTRUNC in *out_flags when `room` bytes are too few.
cdef list control_list(Session s, const user_meta *meta, uint32_t wanted, int ifindex, Py_ssize_t room, int *out_flags)
