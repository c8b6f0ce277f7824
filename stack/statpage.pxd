# The status page: one record for each session an application holds, written by its library at the end of
# each burst, read by the server for `ulnet sessions` and for an exact RST when the application dies.
#
# One page belongs to one writer (one process; its threads may take and give at the same time). The server
# believes nothing in it: sizes are sealed, numbers are checked, and who owns which flow it knows by itself.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from ulnet.stack.tcp cimport tcp_pcb, tcp_remains, tcp_stat
from ulnet.stack.types cimport flow_key

cdef enum:
    STAT_RECORDS = 16384

ctypedef struct stat_record:     # 192 bytes
    uint64_t session_id          # 0: free
    flow_key flow
    uint64_t link                # the writer's: own number while taken, the next free one's while free; from 1
    uint64_t unsettled           # not 0: the numbers are about to change, or were never written
    tcp_stat tcp                 # UDP: bytes_in, bytes_out only
    tcp_remains remains          # TCP: what else its end needs should the process die

ctypedef struct stat_page:
    uint32_t magic
    uint32_t version
    uint32_t size_bytes
    uint32_t used                # records [0, used) were ever taken; the others are untouched memory
    uint64_t free_head           # the writer's free list: change count in the upper half, number in the lower
    uint64_t full                # stat_take() refused for want of a record
    uint64_t pad[4]
    stat_record records[STAT_RECORDS]

cdef class StatPage:
    cdef stat_page *page
    cdef readonly bint writable
    cdef readonly int fd
    cdef readonly uint64_t invalid   # records skipped because no honest library writes such numbers
    cdef stat_page *_open(self) except NULL
    cdef list _scan(self, uint64_t wanted)

# NULL when full (counted). Any thread of the writer's, without the GIL.
cdef stat_record *stat_take(stat_page *p, uint64_t session_id, const flow_key *flow) noexcept nogil
cdef void stat_give(stat_record *r) noexcept nogil
# Around what may send: a death in between leaves a record that says of itself that it is not to be trusted.
cdef void stat_unsettle(stat_record *r) noexcept nogil
cdef void stat_settle(stat_record *r, const tcp_pcb *pcb) noexcept nogil
