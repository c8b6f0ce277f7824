"""The status page: what an application's sessions are doing, for the server to look at without asking.

Call order: the server ``create``s a page for each application, keeps a read-only view (``open(fd, writable=False)``)
and passes ``fd``; the application ``open``s it writable. Its engine calls ``stat_take`` for each session, writes the
record's numbers after each burst, and ``stat_give`` at the session's end. The server reads ``records()``, also after
the application has died. Source: SOSP 1993 section 3.2 (the server cleans up after a process).
"""

import fcntl
import os
from typing import NamedTuple

from libc.errno cimport errno
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize
from ulnet.stack.address cimport addr_to_text
from ulnet.stack.tcp cimport tcp_remains_get, tcp_stat_get

cdef extern from "<unistd.h>" nogil:
    int c_close "close" (int fd)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t n, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t n)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t ul_stat_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint32_t ul_stat_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void ul_stat_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline uint64_t ul_stat_add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline int ul_stat_cas64(uint64_t *p, uint64_t *old, uint64_t v)
    { return __atomic_compare_exchange_n(p, old, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline int ul_stat_cas32(uint32_t *p, uint32_t *old, uint32_t v)
    { return __atomic_compare_exchange_n(p, old, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline void ul_stat_fence(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    """
    uint64_t ul_stat_load64(const uint64_t *p) noexcept nogil
    uint32_t ul_stat_load32(const uint32_t *p) noexcept nogil
    void ul_stat_store64(uint64_t *p, uint64_t v) noexcept nogil
    uint64_t ul_stat_add64(uint64_t *p, uint64_t v) noexcept nogil
    bint ul_stat_cas64(uint64_t *p, uint64_t *old, uint64_t v) noexcept nogil
    bint ul_stat_cas32(uint32_t *p, uint32_t *old, uint32_t v) noexcept nogil
    void ul_stat_fence() noexcept nogil

cdef enum:
    STAT_MAGIC = 0x74617473      # "stat"
    STAT_VERSION = 2
    LAST_STATE = 10              # TIME-WAIT, the last of RFC 9293's eleven states
    PROTO_TCP = 6
    PROTO_UDP = 17

# No interval or byte count of an honest session reaches this (292 years, 8 EiB).
cdef uint64_t PLAUSIBLE = <uint64_t>1 << 63
cdef uint64_t LOWER = 0xFFFFFFFF
cdef int SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

if sizeof(tcp_stat) != 96 or sizeof(tcp_remains) != 32 or sizeof(flow_key) != 40 or sizeof(stat_record) != 192:
    raise ImportError("ulnet.stack.statpage: the record layout is not the one this version was written for")
if sizeof(stat_page) != 64 + STAT_RECORDS * sizeof(stat_record):
    raise ImportError("ulnet.stack.statpage: the page layout is not the one this version was written for")

RECORDS = STAT_RECORDS
_TYPES = {"laddr": str, "raddr": str, "settled": bool, "raw": bytes}
StatRecord = NamedTuple("StatRecord", [(name, _TYPES.get(name, int)) for name in (
    "session_id", "proto", "laddr", "lport", "raddr", "rport", "state", "snd_una", "snd_nxt", "rcv_nxt",
    "snd_wnd_bytes", "cwnd_bytes", "ssthresh_bytes", "retransmits", "bytes_in", "bytes_out", "srtt_ns", "rttvar_ns",
    "rto_ns", "unsent_bytes", "unread_bytes", "changed_ns", "settled", "raw",
)])
StatRecord.__module__ = __name__


cdef stat_record *stat_take(stat_page *p, uint64_t session_id, const flow_key *flow) noexcept nogil:
    """A cleared record, shown to the server from here on. From the free list, else one never used."""
    cdef stat_record *r
    cdef uint64_t head, number
    cdef uint32_t used
    if session_id == 0:
        return NULL
    head = ul_stat_load64(&p.free_head)
    while True:                              # ends: a failed exchange means that another thread got its record
        number = head & LOWER
        if number == 0 or number > STAT_RECORDS:
            number = 0
            break
        # The upper half counts changes, so that a record taken and given meanwhile is not mistaken (ABA).
        if ul_stat_cas64(&p.free_head, &head, (((head >> 32) + 1) << 32) | (p.records[number - 1].link & LOWER)):
            break
    if number == 0:
        used = ul_stat_load32(&p.used)
        while used < STAT_RECORDS and not ul_stat_cas32(&p.used, &used, used + 1):
            pass
        if used >= STAT_RECORDS:
            ul_stat_add64(&p.full, 1)
            return NULL
        number = used + 1
    r = &p.records[number - 1]
    r.link = number
    r.flow = flow[0]
    memset(&r.tcp, 0, sizeof(tcp_stat) + sizeof(tcp_remains))
    r.unsettled = 1
    ul_stat_store64(&r.session_id, session_id)
    return r


cdef void stat_give(stat_record *r) noexcept nogil:
    cdef uint64_t number, head
    cdef stat_page *p
    if r == NULL or r.session_id == 0 or r.link == 0 or r.link > STAT_RECORDS:
        return
    number = r.link
    p = <stat_page *>(<uint8_t *>(r - (number - 1)) - (sizeof(stat_page) - STAT_RECORDS * sizeof(stat_record)))
    ul_stat_store64(&r.session_id, 0)
    head = ul_stat_load64(&p.free_head)
    while True:
        r.link = head & LOWER
        if ul_stat_cas64(&p.free_head, &head, (((head >> 32) + 1) << 32) | number):
            return


cdef void stat_unsettle(stat_record *r) noexcept nogil:
    ul_stat_store64(&r.unsettled, 1)


cdef void stat_settle(stat_record *r, const tcp_pcb *pcb) noexcept nogil:
    tcp_stat_get(pcb, &r.tcp)
    tcp_remains_get(pcb, &r.remains)
    ul_stat_store64(&r.unsettled, 0)


cdef bint plausible(const stat_record *r) noexcept nogil:
    """Whether an honest library could have written this; of what is not, nothing is shown or used."""
    if r.flow.proto != PROTO_TCP and r.flow.proto != PROTO_UDP:
        return False
    if r.tcp.state > LAST_STATE or r.flow.lport == 0:
        return False
    return (r.tcp.bytes_in | r.tcp.bytes_out | r.tcp.srtt_ns | r.tcp.rttvar_ns | r.tcp.rto_ns | r.tcp.unsent_bytes
            | r.tcp.unread_bytes | r.tcp.changed_ns) < PLAUSIBLE


cdef object record_row(const stat_record *r):
    return StatRecord(
        r.session_id, r.flow.proto, addr_to_text(&r.flow.laddr), r.flow.lport, addr_to_text(&r.flow.raddr), r.flow.rport,
        r.tcp.state, r.tcp.snd_una, r.tcp.snd_nxt, r.tcp.rcv_nxt, r.tcp.snd_wnd_bytes, r.tcp.cwnd_bytes,
        r.tcp.ssthresh_bytes, r.tcp.retransmits, r.tcp.bytes_in, r.tcp.bytes_out, r.tcp.srtt_ns, r.tcp.rttvar_ns,
        r.tcp.rto_ns, r.tcp.unsent_bytes, r.tcp.unread_bytes, r.tcp.changed_ns, r.unsettled == 0,
        PyBytes_FromStringAndSize(<const char *>r, sizeof(stat_record)),
    )


cdef class StatPage:
    """The page of one application.

    Attributes: ``fd`` (to pass; closed with the object), ``writable``, ``invalid`` (records skipped by this view).
    """

    def __cinit__(self) -> None:
        self.page = NULL
        self.fd = -1

    def __init__(self) -> None:
        raise TypeError("use StatPage.create() or StatPage.open(fd)")

    def __dealloc__(self) -> None:
        if self.page != NULL:
            munmap(self.page, sizeof(stat_page))
        if self.fd >= 0:
            c_close(self.fd)                 # at the interpreter's end there is no module os any more

    cdef stat_page *_open(self) except NULL:
        if self.page == NULL:
            raise ValueError("this StatPage has no page: use StatPage.create() or StatPage.open(fd)")
        return self.page

    @staticmethod
    def create() -> StatPage:
        """A new empty page in a memfd of sealed size: whoever holds it cannot make a reader fault.

        3 MiB of address space; memory is taken by the records in use.
        """
        cdef stat_page *p
        fd = os.memfd_create("ulnet-status", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, sizeof(stat_page))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
            page = _map(fd, True)
        finally:
            os.close(fd)
        p = (<StatPage>page).page
        p.size_bytes = sizeof(stat_page)
        p.version = STAT_VERSION
        p.magic = STAT_MAGIC
        return page

    @staticmethod
    def open(fd, *, writable) -> StatPage:
        """Map the page behind ``fd``; the caller keeps ``fd``. Raises ValueError if it is no such page.

        The server checks only what the kernel guarantees (size and seals); what stands inside is the application's.
        """
        cdef StatPage page
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise ValueError(f"descriptor {fd} is not a status page: not a sealable memory file") from None
        size = os.fstat(fd).st_size
        if size != sizeof(stat_page) or seals & SEALS != SEALS:
            raise ValueError(
                f"descriptor {fd} is not a status page of this version: {size} bytes, not {sizeof(stat_page)} sealed ones"
            )
        page = _map(fd, writable)
        if writable and (page.page.magic != STAT_MAGIC or page.page.version != STAT_VERSION):
            raise ValueError(
                f"descriptor {fd} is not a status page of version {STAT_VERSION}: "
                f"magic {page.page.magic:#x}, version {page.page.version}; are server and library of one release?"
            )
        return page

    @property
    def full(self) -> int:
        """Sessions that got no record because all 16384 were taken (they work, but are not shown)."""
        return self._open().full

    def __len__(self) -> int:
        """Records taken."""
        cdef const stat_page *p = self._open()
        cdef uint32_t i, used = min(ul_stat_load32(&p.used), <uint32_t>STAT_RECORDS)
        cdef int count = 0
        for i in range(used):
            count += p.records[i].session_id != 0
        return count

    def records(self) -> list[StatRecord]:
        """Every session shown. The numbers are the application's word: right in form, perhaps not in fact.

        One pass over what was ever in use. A record changed while it is read may mix two moments.
        """
        return self._scan(0)

    def record_for(self, session_id) -> StatRecord | None:
        """The record of one session, or None. One pass: for many sessions make a dictionary of ``records()``."""
        rows = self._scan(session_id) if session_id else None
        return rows[0] if rows else None

    cdef list _scan(self, uint64_t wanted):
        cdef const stat_page *p = self._open()
        cdef uint32_t i, used = min(ul_stat_load32(&p.used), <uint32_t>STAT_RECORDS)
        cdef stat_record copy
        cdef list rows = []
        for i in range(used):
            copy.session_id = ul_stat_load64(&p.records[i].session_id)
            if copy.session_id == 0 or (wanted and copy.session_id != wanted):
                continue
            memcpy(&copy.flow, &p.records[i].flow, sizeof(stat_record) - sizeof(uint64_t))
            ul_stat_fence()
            if ul_stat_load64(&p.records[i].session_id) != copy.session_id:
                continue                     # given back meanwhile
            if not plausible(&copy):         # judged on the copy: the page may change again
                self.invalid += 1
                continue
            rows.append(record_row(&copy))
            if wanted:
                break
        return rows


cdef StatPage _map(fd, bint writable):
    cdef StatPage page = StatPage.__new__(StatPage)
    cdef void *where
    page.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    where = mmap(NULL, sizeof(stat_page), PROT_READ | PROT_WRITE if writable else PROT_READ, MAP_SHARED, page.fd, 0)
    if where == MAP_FAILED:
        raise OSError(errno, f"the status page cannot be mapped: {os.strerror(errno)}")
    page.page = <stat_page *>where
    page.writable = writable
    return page


def take(StatPage page, session_id, proto, lport, rport) -> int | None:
    """For tests and tools: take a record as an engine does; its offset in the page, or None when full."""
    cdef flow_key flow
    cdef stat_record *r
    memset(&flow, 0, sizeof(flow))
    flow.laddr.b[10] = flow.laddr.b[11] = flow.raddr.b[10] = flow.raddr.b[11] = 0xFF
    flow.laddr.b[12] = flow.raddr.b[12] = 10
    flow.laddr.b[15] = 1
    flow.raddr.b[15] = 2
    flow.proto, flow.lport, flow.rport = proto, lport, rport
    r = stat_take(page._open(), session_id, &flow) if page.writable else NULL
    if r == NULL:
        return None
    return <uint8_t *>r - <uint8_t *>page.page


def give(StatPage page, offset) -> None:
    """For tests and tools: give back the record that take() returned."""
    cdef size_t header = sizeof(stat_page) - STAT_RECORDS * sizeof(stat_record)
    if not header <= offset < sizeof(stat_page) or (offset - header) % sizeof(stat_record) or not page.writable:
        raise ValueError(f"{offset} is not the offset of a record in a writable page")
    stat_give(<stat_record *>(<uint8_t *>page._open() + <size_t>offset))
