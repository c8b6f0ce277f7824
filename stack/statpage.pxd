# The status page: one record for each session an application holds, written by its library at the end of
# each burst, read by the server for `ulnet sessions` and for an exact RST when the application dies.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.tcp cimport tcp_stat
from ulnet.stack.types cimport flow_key

cdef enum:
    STAT_RECORDS = 16384

ctypedef struct stat_record:     # 160 bytes
    uint64_t session_id          # 0: free
    flow_key flow
    uint64_t reserved[2]
    tcp_stat tcp                 # UDP: bytes_in, bytes_out only

ctypedef struct stat_page:
    uint32_t magic
    uint32_t version
    stat_record records[STAT_RECORDS]

cdef class StatPage:
    cdef stat_page *page
    cdef readonly bint writable
    cdef int fd
    cdef uint32_t hint
    cdef object free_slots

cdef stat_record *stat_take(StatPage page, uint64_t session_id, const flow_key *flow)   # NULL when full (counted)
cdef void stat_give(stat_record *r) noexcept nogil
