"""Test hosts: network namespaces joined by veth pairs, made through pyroute2 and always removed.

Read first: network_namespaces(7), user_namespaces(7), veth(4).

Call order: ``ensure_privilege()`` (only where the program may lack root), then
``with Testbed() as bed:`` ``bed.host(name)`` for each host, ``bed.wire(a, b, ...)`` for each cable.
As root the namespaces are named ``ulnet-<pid>-<host>`` and seen by ``ip netns exec``; in a user
namespace nothing may be mounted on /run, so there they are held by descriptor only.
Entering a namespace concerns the calling thread alone, so threads of one program may be on different hosts.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import os
import re
import signal
import socket as _socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped,unused-ignore]

_P = ParamSpec("_P")
_R = TypeVar("_R")

NETNS_DIR = Path("/run/netns")
NAME_PREFIX = "ulnet"

# linux/sched.h, sys/mount.h
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2

# linux/ethtool.h, linux/sockios.h
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17
_ETHTOOL_STSO = 0x1F
_ETHTOOL_SGSO = 0x24
_ETHTOOL_SGRO = 0x2C

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    """Turn a C library call's -1 into an OSError that says what was tried."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _setns(fd: int) -> None:
    _check(_libc.setns(fd, _CLONE_NEWNET), "setns")


def _open_own_namespace() -> int:
    """Descriptor of the calling thread's network namespace (/proc/self would be the main thread's)."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _new_namespace() -> int:
    """Descriptor of a fresh network namespace; made by a thread, so that the caller stays where it is."""
    answer: list[int | OSError] = []

    def make() -> None:
        try:
            _unshare(_CLONE_NEWNET)
            answer.append(_open_own_namespace())
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=make, name="new-namespace")
    thread.start()
    thread.join()
    if isinstance(answer[0], OSError):
        raise answer[0]
    return answer[0]


def can_testbed() -> str | None:
    """None when this process can make test hosts now, otherwise the reason, fit for a test's skip."""
    try:
        os.close(_new_namespace())
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            return "test hosts need root or a user namespace (ensure_privilege() enters one)"
        return f"test hosts cannot be made: {error.strerror}"
    return None


def enter_user_namespace() -> None:
    """Make this process root of a user namespace, with a network namespace of its own, for the rest of its life.

    Must come before the first thread: the kernel moves single-threaded processes only (user_namespaces(7)).
    """
    deadline = time.monotonic() + 0.2  # a thread already joined is gone from the kernel a moment later
    while (threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    if threads > 1:
        raise RuntimeError(
            f"enter_user_namespace: the process has {threads} threads, the kernel allows it only with one; "
            "call it at the start of the program or run under: unshare --user --map-root-user --net"
        )
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    except OSError as error:
        raise PermissionError(
            error.errno,
            "no user namespace to be had here (see /proc/sys/user/max_user_namespaces, "
            f"kernel.apparmor_restrict_unprivileged_userns): {error.strerror}; run as root",
        ) from None
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/setgroups").write_text("deny")  # user_namespaces(7): before gid_map
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    with IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")


def ensure_privilege() -> bool:
    """See that test hosts can be made: True when that took a user namespace, False when the process already could.

    Raises PermissionError or RuntimeError with the reason and the way out when neither works.
    """
    if can_testbed() is None:
        return False
    enter_user_namespace()
    return True


class Interface:
    """One end of a cable: ``name`` and ``mac`` as its host sees them, ``address`` in CIDR form or None."""

    def __init__(self, host: Host, name: str, index: int, mac: bytes, address: str | None, mtu: int) -> None:
        self.host = host
        self.name = name
        self.index = index
        self.mac = mac
        self.address = address
        self.mtu = mtu

    def offload(self, enabled: bool) -> None:
        """Switch checksum and segmentation offload of what this end sends (and receive merging) on or off.

        Off, its kernel computes every checksum and cuts every segment itself, as towards a plain wire.
        """
        # Segmentation needs checksums: on from the bottom up, off from the top down.
        commands = [_ETHTOOL_STXCSUM, _ETHTOOL_STSO, _ETHTOOL_SGSO]
        with self.host.socket(_socket.AF_INET, _socket.SOCK_DGRAM) as sock:
            for command in commands if enabled else reversed(commands):
                _ethtool_set(sock, self.name, command, enabled)
            with contextlib.suppress(OSError):  # not every kernel offers it on veth
                _ethtool_set(sock, self.name, _ETHTOOL_SGRO, enabled)

    def set_up(self, up: bool = True) -> None:
        """Bring the interface up, or down."""
        with self.host.netlink() as ip:
            ip.link("set", index=self.index, state="up" if up else "down")

    def add_address(self, cidr: str) -> None:
        """Give the host's kernel the address, ``"10.0.0.1/24"``."""
        address, _, prefix = cidr.partition("/")
        if not prefix:
            raise ValueError(f"address {cidr!r} lacks its prefix length, as in {cidr}/24")
        with self.host.netlink() as ip:
            ip.addr("add", index=self.index, address=address, prefixlen=int(prefix))
        self.address = self.address or cidr

    def __repr__(self) -> str:
        return f"<Interface {self.name} of {self.host.name}, {self.mac.hex(':')}, {self.address}>"


def _ethtool_set(sock: _socket.socket, name: str, command: int, enabled: bool) -> None:
    value = ctypes.create_string_buffer(struct.pack("II", command, int(enabled)), 8)
    request = struct.pack("16sP", name.encode(), ctypes.addressof(value))
    fcntl.ioctl(sock.fileno(), _SIOCETHTOOL, request.ljust(40, b"\0"))


class Host:
    """A network namespace with loopback up. Made by ``Testbed.host``.

    Attributes: ``name`` as given; ``netns`` the name ``ip netns exec`` takes, None in a user namespace;
    ``path`` a file that setns(2) and nsenter take; ``interfaces`` in order of wiring.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.netns: str | None = None
        self.interfaces: list[Interface] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._entered = threading.local()
        self.fd = _new_namespace()
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        try:
            with self.netlink() as ip:
                ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
            self._give_name()
        except BaseException:
            self.close()
            raise

    def _give_name(self) -> None:
        """Bind the namespace below /run/netns as ``ip netns`` does; in a user namespace it stays nameless."""
        name = f"{NAME_PREFIX}-{os.getpid()}-{self.name}"
        target = NETNS_DIR / name
        try:
            NETNS_DIR.mkdir(mode=0o755, exist_ok=True)
            os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
        except FileExistsError:
            raise ValueError(f"host {self.name!r} exists already in this process; give it another name") from None
        except OSError:
            return
        source = f"/proc/self/fd/{self.fd}".encode()
        if _libc.mount(source, str(target).encode(), b"none", _MS_BIND, None) != 0:
            target.unlink()
            return
        self.netns = name
        self.path = str(target)

    # -- being on the host ---------------------------------------------------------------------

    def __enter__(self) -> Host:
        """Put the calling thread on this host until the ``with`` block ends. May be nested."""
        if self.fd < 0:
            raise ValueError(f"host {self.name!r} is closed")
        stack = self._stack()
        back = _open_own_namespace()
        try:
            _setns(self.fd)
        except BaseException:
            os.close(back)
            raise
        stack.append(back)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        back = self._stack().pop()
        try:
            _setns(back)
        finally:
            os.close(back)

    def _stack(self) -> list[int]:
        stack: list[int] | None = getattr(self._entered, "stack", None)
        if stack is None:
            stack = self._entered.stack = []
        return stack

    def call(self, function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run ``function`` in this thread, on this host."""
        with self:
            return function(*args, **kwargs)

    def socket(self, family: int = _socket.AF_INET, type: int = _socket.SOCK_STREAM, proto: int = 0) -> _socket.socket:
        """A kernel socket of this host, usable from anywhere: a socket stays in the namespace it was made in."""
        with self:
            return _socket.socket(family, type, proto)

    def netlink(self) -> IPRoute:
        """An open pyroute2 IPRoute of this host; use it in a ``with`` block."""
        with self:
            return IPRoute()

    def popen(self, argv: Sequence[str | os.PathLike[str]], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a program on this host; arguments as for subprocess.Popen. Killed when the host is removed."""
        with self:  # a child starts in the namespace of the thread that forks it
            process = subprocess.Popen(argv, **kwargs)
        self._processes.append(process)
        return process

    run = popen

    # -- what it has ---------------------------------------------------------------------------

    @property
    def interface(self) -> Interface:
        """The host's first interface (most tests have one)."""
        if not self.interfaces:
            raise ValueError(f"host {self.name!r} has no interface yet; wire it first")
        return self.interfaces[0]

    @property
    def mac(self) -> bytes:
        """Hardware address of the first interface, 6 bytes."""
        return self.interface.mac

    def offload(self, enabled: bool) -> None:
        """``Interface.offload`` for every interface of the host."""
        for interface in self.interfaces:
            interface.offload(enabled)

    def pids(self) -> list[int]:
        """Processes that are on this host by their main thread, this process excepted."""
        return [pid for pid in _pids_in(os.fstat(self.fd)) if pid != os.getpid()]

    # -- the end -------------------------------------------------------------------------------

    def stop_processes(self, grace_s: float = 1.0) -> None:
        """End everything started here: SIGTERM, and SIGKILL to what is left after ``grace_s`` seconds."""
        running = [p for p in self._processes if p.poll() is None]
        for process in running:
            process.terminate()
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)  # a stopped process would not see SIGTERM
        deadline = time.monotonic() + grace_s
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self._processes:
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._processes.clear()

    def close(self) -> None:
        """End the host's processes and remove it. Safe to call twice."""
        if self.fd < 0:
            return
        self.stop_processes()
        # Children of what was started here; a namespace that anyone is in would live on, unseen.
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        # Removing the veth ends now spares the next test the kernel's lazy clean-up of namespaces.
        with contextlib.suppress(OSError, NetlinkError), self.netlink() as ip:
            for interface in self.interfaces:
                with contextlib.suppress(NetlinkError):
                    ip.link("del", index=interface.index)
        self.interfaces.clear()
        if self.netns is not None:
            _remove_name(self.netns)
            self.netns = None
        os.close(self.fd)
        self.fd = -1

    def __repr__(self) -> str:
        return f"<Host {self.name} at {self.path}>"


class Testbed:
    """Hosts and the cables between them; removes everything at the end of its ``with`` block or of the program."""

    __test__ = False  # not a test class, whatever pytest thinks of its name
    _wires = 0

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        reason = can_testbed()
        if reason is not None:
            raise PermissionError(errno.EPERM, reason)
        remove_stale()
        self._pid = os.getpid()
        atexit.register(self.close)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str) -> Host:
        """Make a host. ``name``: letters, digits, ``_``; unique in the testbed."""
        if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", name):
            raise ValueError(f"host name {name!r}: use 1 to 32 letters, digits or underscores")
        if name in self.hosts:
            raise ValueError(f"host {name!r} exists already in this testbed")
        host = self.hosts[name] = Host(name)
        return host

    def wire(
        self,
        a: Host,
        b: Host,
        *,
        a_addr: str | None = None,
        b_addr: str | None = None,
        mtu: int = 1500,
        ipv6: bool = False,
    ) -> tuple[Interface, Interface]:
        """Join two hosts by a veth pair, both ends up. Addresses as ``"10.77.0.2/24"``, None for no address.

        Interfaces are called eth0, eth1, ... on each host. Without ``ipv6`` the kernels keep IPv6 (and with it
        its unasked-for multicast) off the cable.
        """
        if a is b:
            raise ValueError(f"host {a.name!r} cannot be wired to itself")
        Testbed._wires += 1
        names = [f"eth{len(host.interfaces)}" for host in (a, b)]
        macs = [bytes((0x02, 0x75, 0x6C, Testbed._wires >> 8 & 255, Testbed._wires & 255, end)) for end in (1, 2)]
        with a.netlink() as ip:
            ip.link(
                "add",
                ifname=names[0],
                kind="veth",
                address=macs[0].hex(":"),
                mtu=mtu,
                peer={"ifname": names[1], "net_ns_fd": b.fd, "address": macs[1].hex(":"), "mtu": mtu},
            )
        ends: list[Interface] = []
        for host, name, mac, address in zip((a, b), names, macs, (a_addr, b_addr), strict=True):
            if not ipv6:
                # Where /proc/sys is read-only (containers), a quiet cable is a wish, not a need.
                with host, contextlib.suppress(OSError):
                    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            with host.netlink() as ip:
                index = ip.link_lookup(ifname=name)[0]
            interface = Interface(host, name, index, mac, None, mtu)
            host.interfaces.append(interface)
            ends.append(interface)
            if address is not None:
                interface.add_address(address)
        for interface in ends:
            interface.set_up()
        for interface in ends:
            _wait_carrier(interface)
        return ends[0], ends[1]

    def close(self) -> None:
        """Remove every host. Safe to call twice. A forked child's copy removes nothing."""
        if os.getpid() != self._pid:
            return
        while self.hosts:
            _, host = self.hosts.popitem()
            host.close()
        atexit.unregister(self.close)


def _wait_carrier(interface: Interface, limit_s: float = 2.0) -> None:
    """Wait until the interface is operational: frames sent before that would be lost."""
    deadline = time.monotonic() + limit_s
    with interface.host.netlink() as ip:
        while time.monotonic() < deadline:
            if ip.get_links(interface.index)[0].get_attr("IFLA_OPERSTATE") == "UP":
                return
            time.sleep(0.002)
    raise TimeoutError(f"{interface!r} did not come up within {limit_s} s")


# -- names left behind by programs that were killed ------------------------------------------------


def _remove_name(name: str) -> None:
    path = NETNS_DIR / name
    _libc.umount2(str(path).encode(), _MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _pids_in(namespace: os.stat_result) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            found = os.stat(f"/proc/{entry}/ns/net")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (namespace.st_dev, namespace.st_ino):
            yield int(entry)


def remove_stale() -> list[str]:
    """Remove test hosts whose maker is dead, with the processes still on them; the names removed."""
    removed: list[str] = []
    try:
        names = os.listdir(NETNS_DIR)
    except OSError:
        return removed
    for name in names:
        match = re.fullmatch(rf"{NAME_PREFIX}-(\d+)-\w+", name)
        if match is None or os.path.exists(f"/proc/{match[1]}"):
            continue
        path = NETNS_DIR / name
        try:
            mounted = os.stat(path)
            if mounted.st_dev != os.stat(NETNS_DIR).st_dev:  # else a bare file: its namespace is gone
                for pid in _pids_in(mounted):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            _remove_name(name)
        except OSError:
            continue
        removed.append(name)
    return removed
