"""The engine: one link, its sessions, their timers. Times in nanoseconds, sizes in bytes, ports in host order."""

from collections.abc import Callable, Iterable
from typing import Any, Final

from ulnet.kernelshim.link import Link
from ulnet.stack.metastate import Metastate
from ulnet.stack.session import Session
from ulnet.stack.statpage import StatPage

READABLE: Final = 1
WRITABLE: Final = 2
ERROR: Final = 4
HUP: Final = 8
RDHUP: Final = 16

# Kinds of Engine.events()
EV_CONNECTED: Final = 1  # an active open reached ESTABLISHED
EV_FAILED: Final = 2  # it did not; value is the errno
EV_ACCEPTED: Final = 3  # a listener has a new established session: accept() it
EV_GONE: Final = 4  # a session closed by close_session() has finished; value is its session id
EV_RELAY: Final = 5  # a relayed session has news: value is NEWS_* of relay.pyi

class Engine:
    """``library=True``: ARP, ICMP echo, RST for unknown segments and handshakes are the server's matter."""

    link: Link
    meta: Metastate
    stats: StatPage | None
    # Library: called (in whichever thread needs it) with a next hop whose MAC is unknown; returns when it is known
    # or raises OSError. None: the engine asks by ARP itself.
    resolver: Callable[[str], None] | None
    # Called from the helper thread or poll() with frames (bytes) of flows exported from here a moment ago.
    on_strays: Callable[[list[bytes]], None] | None

    # Library: of sessions placed in the server (Session.shared). None: they stay there, and errors are the pair's.
    # Called before each call on a shared session, without its lock; True: share_end() was called, it is ours again.
    on_shared: Callable[[Session], bool] | None
    # Called when U is at its end, refuses writing or was reset; raises the session's real error, if there is one.
    # Else the call goes on as U says: end of file, EPIPE, ECONNRESET.
    on_shared_end: Callable[[Session], None] | None
    # take_error(): the pending errno (positive), cleared; 0 if none.
    on_shared_error: Callable[[Session], int] | None
    # setopt() and getopt() (value None): the option's value.
    on_shared_option: Callable[[Session, int, int, int | None], int] | None

    def __init__(
        self,
        link: Link,
        meta: Metastate,
        *,
        library: bool = False,
        stats: StatPage | None = None,
        spin_ns: int = 50_000,
    ) -> None: ...
    def start_helper(self) -> None:
        """The thread that works while the program is elsewhere. Servers with their own loop call poll() instead."""
    def close(self) -> None:
        """Abort what is left, stop the helper. Does not close the link."""
    def poll(self) -> int:
        """Process waiting frames and due timers; returns frames processed. For servers' loops."""
    def deadline_ns(self) -> int | None:
        """When poll() is next needed without a frame (time.monotonic_ns() scale)."""
    def events(self) -> list[tuple[int, Session | None, int]]:
        """(EV_*, session, value) since the last call. Filled only while ``collect_events`` is True."""
    collect_events: bool

    def new_session(self, kind: int) -> Session: ...
    def open_udp(self, session: Session, laddr: str, lport: int, raddr: str | None = None, rport: int = 0) -> None: ...
    def open_tcp(self, session: Session, laddr: str, lport: int, raddr: str, rport: int) -> None:
        """Active open: the SYN goes out (after ARP). wait(WRITABLE), or EV_CONNECTED / EV_FAILED."""
    def listen(self, session: Session, laddr: str, lport: int, backlog: int) -> None: ...
    def reopen(self, session: Session) -> None:
        """Back to a shell after a connection attempt that failed."""
    def ask_neighbour(self, next_hop: str) -> None:
        """Ask by ARP for a neighbour; the answer shows in the metastate page. Not for libraries."""
    def resolve_pending(self) -> None:
        """Have ``resolver`` find the next hop that a datagram waits for."""
    def reap(self) -> None:
        """Let go of sent objects that were held; every call does it, so only who makes none needs this."""
    def announce(self) -> None:
        """Gratuitous ARP (RFC 5227 2.3). Not for libraries."""
    def set_serial(self, serial: int) -> None:
        """Library: its sessions are numbered ``serial << 32 | n`` from here on, those it accepts included."""
    def number(self) -> int:
        """Library: for a session that is set up here."""
    def lease(self, ports: Iterable[int], on: bool = True) -> None:
        """Library: these local TCP ports are its own (not ``on``: no more). What comes for no session there is refused,
        not kept."""
    def recycle(self, most: int) -> int:
        """Library: end so many sessions at leased ports that have been in TIME-WAIT for a second, and whose peers will
        know a new connection by its timestamp. How many there were."""
    def export_embryos(self, listener: Session) -> list[bytes]:
        """The states of its sessions whose handshake is under way, for deliver() elsewhere. Library: connection
        requests are strays from here on; listening again takes that back."""
    def closing_sessions(self) -> list[Session]:
        """TCP sessions that were closed and have not come to their end."""
    def knows_flow(self, proto: int, laddr: str, lport: int, raddr: str, rport: int) -> bool: ...
    def collect_ends(self) -> None:
        """Collect EV_GONE alone."""
    # Library: on_ends is called from the helper thread or poll() when there are EV_GONE, while tell_ends is set.
    tell_ends: bool
    on_ends: Callable[[], None] | None
    def set_backlog(self, session: Session, backlog: int) -> None: ...
    def accept(self, session: Session) -> Session | None:
        """An established session of the listener's queue, or None. wait(READABLE) first."""
    def close_session(self, session: Session, *, linger_abort: bool = False) -> int:
        """The user is done: TCP goes on to its end inside the engine (FIN, TIME-WAIT) without the handle. The bytes
        that could not be sent yet."""
    def abort_flow(self, laddr: str, lport: int, raddr: str, rport: int, snd_nxt: int, rcv_nxt: int) -> None:
        """Send an RST for a session this engine does not hold (its application died)."""
    def export_session(self, session: Session) -> bytes:
        """Hand-over: the whole state as bytes; the session is not live afterwards. Its flow is remembered as foreign:
        frames for it go to on_strays (library: for 2 s; server: until forget_flow())."""
    def forget_flow(self, proto: int, laddr: str, lport: int, raddr: str | None, rport: int) -> None: ...
    def import_session(
        self,
        session: Session,
        state: bytes | bytearray | memoryview,
        session_id: int,
        prefix: bytes | bytearray | memoryview = b"",
    ) -> None:
        """``prefix``: what was received before the unread data in the state (UDP: datagrams as a state has them)."""
    def revive_session(
        self, session: Session, laddr: str, lport: int, raddr: str, rport: int, record: bytes, session_id: int
    ) -> bool:
        """Take over a TCP session whose process died, from its status record (StatRecord.raw), to close it in order.

        True: the last bytes sent were not acknowledged yet. ValueError: data was lost, or the record is rubbish."""
    def deliver(self, listener: Session, state: bytes | bytearray | memoryview, session_id: int) -> None:
        """Import an accepted session into a listener's queue; one in SYN-RECEIVED comes there by itself."""
    def open_listener_shell(self, session: Session, laddr: str, lport: int, backlog: int) -> None:
        """Library: a listener whose connections arrive by deliver()."""
    def fail(self, session: Session, error: int) -> None:
        """Library: it failed or ended elsewhere, with this errno; waiters wake up. TCP ends as by a RST."""
    def inject(self, frame: bytes) -> None:
        """Process a stray as on_strays gave it: 4 bytes of flags and segment size, then the frame."""
    def adopt_foreign(self, proto: int, laddr: str, lport: int, raddr: str, rport: int) -> None:
        """Server: a flow handed out earlier (restart)."""
    def interrupt(self) -> None:
        """Wake every waiter once (they re-check)."""
    def before_fork(self) -> None:
        """All sessions that shall live on in a child are shared. Lent ring memory moves to private pages; from now to
        after_fork_*() no other thread is inside. Run the hooks below in every case, also when the fork failed."""
    def after_fork_parent(self) -> None: ...
    def after_fork_child(self) -> None:
        """This engine is the parent's: its link is closed here, calls on its sessions raise EBADF, except on shared
        ones, which work, and on shells; rebind() them to an engine of the child's own."""
    def take_session(self, session: Session) -> None:
        """What Session.rebind() calls."""
    @property
    def broken(self) -> bool:
        """True in a child for the engines of its parent."""
    def sessions(self) -> list[dict[str, Any]]: ...
    def counters(self) -> dict[str, int]:
        """Everything counted: frames, drops by reason, TCP, UDP, ICMP, ARP, buffers, system calls."""
