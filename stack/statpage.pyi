"""The status page: what an application's sessions are doing, for the server to look at without asking."""

from typing import Final, NamedTuple, final

RECORDS: Final = 16384

class StatRecord(NamedTuple):
    session_id: int
    proto: int
    laddr: str
    lport: int
    raddr: str
    rport: int
    state: int
    snd_una: int
    snd_nxt: int
    rcv_nxt: int
    snd_wnd_bytes: int
    cwnd_bytes: int
    ssthresh_bytes: int
    retransmits: int
    bytes_in: int
    bytes_out: int
    srtt_ns: int
    rttvar_ns: int
    rto_ns: int
    unsent_bytes: int
    unread_bytes: int
    changed_ns: int
    settled: bool
    raw: bytes

@final
class StatPage:
    @staticmethod
    def create() -> StatPage: ...
    @staticmethod
    def open(fd: int, *, writable: bool) -> StatPage: ...
    @property
    def fd(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def invalid(self) -> int: ...
    @property
    def full(self) -> int: ...
    def __len__(self) -> int: ...
    def records(self) -> list[StatRecord]: ...
    def record_for(self, session_id: int) -> StatRecord | None: ...

def take(page: StatPage, session_id: int, proto: int, lport: int, rport: int) -> int | None: ...
def give(page: StatPage, offset: int) -> None: ...
