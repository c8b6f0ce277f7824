"""The AF_UNIX side channel beside the ZeroMQ socket: who the peer is, its death, and descriptors (unix(7), SCM_RIGHTS).

SOCK_SEQPACKET, because a packet keeps its descriptors and its tag together. It is `PATH.fd` for a hub at `PATH`.
"""

import array
import errno
import os
import socket
import struct

from .message import close_fd

SUFFIX = ".fd"
SUN_PATH_MAX = 107  # sizeof(sockaddr_un.sun_path) - 1
_SO_PEERPIDFD = 77  # Linux 6.5, asm-generic/socket.h
_UCRED = struct.Struct("3i")


def check_path(path: str) -> None:
    """Raise OSError if no socket can have this path."""
    room = SUN_PATH_MAX - len(SUFFIX)
    if len(os.fsencode(path)) > room:
        raise OSError(errno.ENAMETOOLONG, f"socket path longer than {room} bytes", path)


def connect(path: str, timeout: float) -> socket.socket:
    """The side channel, or one clear OSError with the path."""
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    what = "cannot reach the hub"
    # Kernel time-outs rather than Python's, which would make every call poll first.
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.connect(path + SUFFIX)
        return sock
    except FileNotFoundError as error:
        what, number = "no hub serves this path", error.errno
    except ConnectionRefusedError as error:
        what, number = "the hub that served this path is gone", error.errno
    except PermissionError as error:
        what, number = "no permission to use the hub", error.errno
    except BlockingIOError:
        what, number = f"the hub did not answer within {timeout} s", errno.ETIMEDOUT
    except OSError as error:
        number = error.errno
        what = f"{what} ({os.strerror(number or 0)})"
    sock.close()
    raise OSError(number, what, path)


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer when it connected, from the kernel."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A descriptor that becomes readable when the peer process has died; -1 if the kernel gives none."""
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4), "little", signed=True)
    except OSError:
        pass
    try:
        return os.pidfd_open(pid)  # before Linux 6.5; a reused pid would be a stranger's, the hang-up still tells
    except OSError:
        return -1


def send_packet(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """One packet with descriptors. BlockingIOError when the socket's buffer is full."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket, size: int, max_fds: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """One packet; (b"", []) when the peer has hung up. What exceeds size or max_fds is cut off by the kernel."""
    data, ancillary, _flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * 4), flags | socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % 4])
            fds.extend(numbers)
    return data, fds


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody will have."""
    for fd in fds:
        close_fd(fd)
    fds.clear()
