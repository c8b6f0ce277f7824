# The hot half of a socket, for subclasses in C.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from ulnet.stack.engine_user cimport user_dgram, user_meta
from ulnet.stack.session cimport Session
from ulnet.stack.types cimport ul_addr

cdef class Socket:
    cdef Session _session            # None: closed
    cdef readonly int64_t _timeout_ns  # -1: for ever
    cdef readonly bint _named        # the local endpoint is chosen
    cdef bint _dgram
    cdef uint16_t _src_port          # sender of the last datagram, and its tuple
    cdef ul_addr _src
    cdef object _src_tuple
    cdef int64_t _rcv_ns             # SO_RCVTIMEO, SO_SNDTIMEO; 0: for ever
    cdef int64_t _snd_ns
    cdef uint32_t _wanted            # what recvmsg() tells beside a datagram (_sockopt.BESIDE)
    cdef int _ifindex
    cdef list _parts                 # MSG_MORE: [address or None, bytearray] of a datagram in the making; None: none
    cdef object __weakref__
    cdef Session _live(self)
    cdef int _wait_ns(self, int64_t timeout_ns) except -1
    cdef Py_ssize_t _send(self, Session s, const uint8_t *data, size_t n, object owner, int flags) except -1
    cdef Py_ssize_t _send_dgram(self, Session s, const uint8_t *data, size_t n, const ul_addr *dst, uint16_t port,
                                int flags, const user_meta *meta) except -1
    cdef Py_ssize_t _read(self, Session s, uint8_t *out, size_t n, int flags, ul_addr *src, uint16_t *sport,
                          uint32_t *full_bytes) except -1
    cdef object _read_bytes(self, Session s, Py_ssize_t n, int flags, ul_addr *src, uint16_t *sport,
                            uint32_t *full_bytes)
    cdef object _address(self, const ul_addr *src, uint16_t sport)
    cdef Py_ssize_t _read_into(self, object buffer, Py_ssize_t nbytes, int flags, ul_addr *src, uint16_t *sport,
                               str call) except -1
    cdef int _dgram_to(self, user_dgram *item, object address) except -1
