"""The same calls on kernel sockets and on ours, side by side: results, errnos and what comes beside the data.

Each scenario returns what it saw. It runs over the kernel's loopback and over two embedded hosts; both must agree.
"""

import errno
import gc
import select
import socket as kernel
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sockethosts import A, B

from ulnet.stack import embedded, socket

IP_RECVTTL, IP_RECVTOS, IP_PKTINFO = 12, 13, 8
IP_MTU_DISCOVER, IP_MTU = 10, 14
SO_TIMESTAMP, SO_TIMESTAMPNS = 29, 35


class World:
    """Sockets of one kind, on a near and a far host."""

    def __init__(self, near: Any, far: Any, module: Any, names: tuple[str, str]) -> None:
        self._near, self._far, self.module, (self.near, self.far) = near, far, module, names
        self.opened: list[Any] = []

    def _keep(self, sock: Any) -> Any:
        self.opened.append(sock)
        return sock

    def socket(self, kind: int = kernel.SOCK_STREAM, far: bool = False) -> Any:
        sock = self._far(kind) if far else self._near(kind)
        return self._keep(sock)  # blocking: with a time-out the standard module polls before it asks the kernel

    def listener(self, backlog: int = 8) -> Any:
        sock = self.socket(far=True)
        sock.bind((self.far, 0))
        sock.listen(backlog)
        return sock

    def tcp(self) -> tuple[Any, Any]:
        listener = self.listener()
        client = self.socket()
        client.connect(listener.getsockname())
        server = self._keep(listener.accept()[0])
        listener.close()
        return client, server

    def udp(self) -> tuple[Any, Any]:
        client, server = self.socket(kernel.SOCK_DGRAM), self.socket(kernel.SOCK_DGRAM, far=True)
        client.bind((self.near, 0))
        server.bind((self.far, 0))
        return client, server

    def close(self) -> None:
        for sock in self.opened:
            sock.close()


@pytest.fixture(scope="module")
def worlds() -> Iterator[tuple[World, World]]:
    a, b = embedded.pair()
    theirs = World(
        lambda kind: kernel.socket(type=kind), lambda kind: kernel.socket(type=kind), kernel, ("127.0.0.1", "127.0.0.1")
    )
    ours = World(
        lambda kind: socket.socket(type=kind, host=a), lambda kind: socket.socket(type=kind, host=b), socket, (A, B)
    )
    yield theirs, ours
    gc.collect()
    a.shutdown(0.2)
    b.shutdown(0.2)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, or the kind of its exception and the errno."""
    try:
        return function(*arguments)
    except OSError as error:
        return type(error).__name__, errno.errorcode.get(error.errno or 0, None)
    except Exception as error:
        return type(error).__name__


SCENARIOS: list[Callable[[World], Any]] = []


def scenario(function: Callable[[World], Any]) -> Callable[[World], Any]:
    SCENARIOS.append(function)
    return function


@pytest.mark.parametrize("see", SCENARIOS, ids=lambda f: f.__name__)
def test_alike(worlds: tuple[World, World], see: Callable[[World], Any]) -> None:
    seen = []
    for world in worlds:
        try:
            seen.append(see(world))
        finally:
            world.close()
    assert seen[1] == seen[0]


# Every scenario is pure observation: what must hold by itself is asserted in the tests below them.

# -- flags ----------------------------------------------------------------------------------------


@scenario
def msg_trunc(w: World) -> Any:
    client, server = w.udp()
    for _ in range(6):
        client.sendto(b"0123456789", server.getsockname())
    buffer = bytearray(4)
    seen = [
        len(server.recv(4, kernel.MSG_TRUNC)),
        server.recv_into(buffer, 4, kernel.MSG_TRUNC),
        len(server.recv(1, kernel.MSG_PEEK | kernel.MSG_TRUNC)),
        server.recvfrom_into(buffer, 0, kernel.MSG_TRUNC)[0],
        server.recvmsg(4)[2] & kernel.MSG_TRUNC,
        server.recvmsg_into([buffer], 0, kernel.MSG_TRUNC)[0],
        len(server.recvfrom(4, kernel.MSG_TRUNC)[0]),
    ]
    one, two = w.tcp()
    one.sendall(b"0123456789")
    time.sleep(0.02)
    return [*seen, len(two.recv(4, kernel.MSG_TRUNC)), two.recv(100)]


@scenario
def error_queue_and_urgent(w: World) -> Any:
    one, two = w.tcp()
    client, server = w.udp()
    client.sendto(b"x", server.getsockname())
    return [
        outcome(one.recv, 10, kernel.MSG_ERRQUEUE),
        outcome(client.recvmsg, 10, 100, kernel.MSG_ERRQUEUE),
        outcome(two.recv, 1, kernel.MSG_OOB),
        outcome(server.recv, 10, kernel.MSG_OOB),
        outcome(client.sendto, b"x", kernel.MSG_OOB, server.getsockname()),
    ]


@scenario
def harmless_flags(w: World) -> Any:
    one, two = w.tcp()
    client, server = w.udp()
    client.connect(server.getsockname())
    flags = kernel.MSG_NOSIGNAL | kernel.MSG_CONFIRM | kernel.MSG_DONTROUTE
    return [one.send(b"ab", flags), two.recv(2, kernel.MSG_WAITALL), client.send(b"cd", flags), server.recv(9)]


@scenario
def msg_more(w: World) -> Any:
    client, server = w.udp()
    client.sendto(b"one ", kernel.MSG_MORE, server.getsockname())
    client.sendto(b"two ", kernel.MSG_MORE, server.getsockname())
    nothing = outcome(server.recv, 100, kernel.MSG_DONTWAIT)
    client.sendto(b"three", server.getsockname())
    first = server.recv(100)
    client.connect(server.getsockname())
    client.send(b"a" * 60000, kernel.MSG_MORE)
    long = outcome(client.send, b"a" * 10000)
    client.send(b"last")
    one, two = w.tcp()
    one.send(b"to", kernel.MSG_MORE)
    one.send(b"gether")
    return [nothing, first, long, server.recv(100), two.recv(8, kernel.MSG_WAITALL)]


@scenario
def dontwait_and_peek(w: World) -> Any:
    one, two = w.tcp()
    seen = [outcome(two.recv, 1, kernel.MSG_DONTWAIT), outcome(two.recv_into, bytearray(1), 0, kernel.MSG_DONTWAIT)]
    one.send(b"xyz")
    select.select([two], [], [], 5)
    return [*seen, two.recv(2, kernel.MSG_PEEK), two.recv(1), two.recvmsg(9, 0, kernel.MSG_PEEK)[0], two.recv(9)]


# -- beside the data ------------------------------------------------------------------------------


@scenario
def ancillary_received(w: World) -> Any:
    client, server = w.udp()
    server.setsockopt(kernel.IPPROTO_IP, IP_RECVTTL, 1)
    server.setsockopt(kernel.IPPROTO_IP, IP_RECVTOS, 1)
    client.setsockopt(kernel.IPPROTO_IP, kernel.IP_TTL, 33)
    client.setsockopt(kernel.IPPROTO_IP, kernel.IP_TOS, 0x10)
    for _ in range(7):
        client.sendto(b"data", server.getsockname())
    sizes = (0, 10, 16, 18, kernel.CMSG_SPACE(4), kernel.CMSG_SPACE(4) + 17, 200)
    return [server.recvmsg(10, size)[:3] for size in sizes]


@scenario
def packet_information(w: World) -> Any:
    client, server = w.udp()
    server.setsockopt(kernel.IPPROTO_IP, IP_PKTINFO, 1)
    client.sendto(b"data", server.getsockname())
    ((level, kind, data),) = server.recvmsg(10, 100)[1]
    own = kernel.inet_aton(server.getsockname()[0])
    return level, kind, data[4:] == own + own, server.getsockopt(kernel.IPPROTO_IP, IP_PKTINFO)


@scenario
def time_stamps(w: World) -> Any:
    client, server = w.udp()
    seen = []
    for option, form, unit in ((SO_TIMESTAMP, "@ll", 1e6), (SO_TIMESTAMPNS, "@ll", 1e9)):
        server.setsockopt(kernel.SOL_SOCKET, option, 1)
        client.sendto(b"data", server.getsockname())
        ((level, kind, data),) = server.recvmsg(10, 100)[1]
        seconds, part = struct.unpack(form, data)
        seen.append((level, kind, abs(seconds + part / unit - time.time()) < 5))
    return [*seen, [server.getsockopt(kernel.SOL_SOCKET, o) for o in (SO_TIMESTAMP, SO_TIMESTAMPNS)]]


@scenario
def ancillary_sent(w: World) -> Any:
    client, server = w.udp()
    server.setsockopt(kernel.IPPROTO_IP, IP_RECVTTL, 1)
    server.setsockopt(kernel.IPPROTO_IP, IP_RECVTOS, 1)
    to = server.getsockname()
    own, number = kernel.inet_aton(client.getsockname()[0]), struct.Struct("@i").pack
    good: list[list[Any]] = [
        [(0, kernel.IP_TTL, number(7))],
        [(0, kernel.IP_TOS, number(0x20)), (0, kernel.IP_TTL, number(9))],
        [(0, kernel.IP_TOS, b"\x08")],
        [(0, IP_PKTINFO, number(0) + own + own)],
        [(77, 3, b"of another level")],
        [],
    ]
    seen: list[Any] = []
    for items in good:
        seen.append(outcome(client.sendmsg, [b"da", b"ta"], items, 0, to))
        seen.append(server.recvmsg(10, 100)[:3])
    bad: list[list[Any]] = [
        [(0, kernel.IP_TTL, number(0))],
        [(0, kernel.IP_TTL, number(256))],
        [(0, kernel.IP_TTL, b"\x01")],
        [(0, kernel.IP_TOS, number(256))],
        [(0, IP_PKTINFO, b"short")],
        [(0, IP_PKTINFO, number(0) + kernel.inet_aton("192.0.2.77") * 2)],
        [(0, 99, b"")],
        [(kernel.SOL_SOCKET, 99, b"")],
    ]
    seen += [outcome(client.sendmsg, [b"data"], items, 0, to) for items in bad]
    one, two = w.tcp()
    seen += [outcome(one.sendmsg, [b"s"], [(kernel.SOL_SOCKET, 99, b"")]), outcome(one.sendmsg, [b"t"], bad[0])]
    return [*seen, two.recv(10)]


# -- options --------------------------------------------------------------------------------------


@scenario
def options_and_their_errors(w: World) -> Any:
    stream, dgram = w.socket(), w.socket(kernel.SOCK_DGRAM)
    seen = []
    trials: list[tuple[int, int, Any]] = [
        (kernel.SOL_SOCKET, kernel.SO_PRIORITY, 3),
        (kernel.SOL_SOCKET, kernel.SO_DONTROUTE, 1),
        (kernel.SOL_SOCKET, kernel.SO_OOBINLINE, 5),
        (kernel.SOL_SOCKET, kernel.SO_RCVLOWAT, 100),
        (kernel.SOL_SOCKET, kernel.SO_TYPE, 1),
        (kernel.SOL_SOCKET, kernel.SO_ERROR, 1),
        (kernel.SOL_SOCKET, 9999, 1),
        (kernel.SOL_SOCKET, 20, 5),
        (kernel.SOL_SOCKET, 20, struct.pack("@ll", 1, 1_000_000)),
        (kernel.SOL_SOCKET, 20, struct.pack("@ll", 2, 500_000)),
        (kernel.SOL_SOCKET, kernel.SO_LINGER, 1),
        (kernel.IPPROTO_IP, kernel.IP_TTL, 0),
        (kernel.IPPROTO_IP, kernel.IP_TTL, 300),
        (kernel.IPPROTO_IP, kernel.IP_TTL, -1),
        (kernel.IPPROTO_IP, IP_MTU_DISCOVER, 2),
        (kernel.IPPROTO_IP, IP_MTU_DISCOVER, 9),
        (kernel.IPPROTO_IP, 9999, 1),
        (kernel.IPPROTO_TCP, 9999, 1),
        (kernel.IPPROTO_TCP, kernel.TCP_SYNCNT, 0),
        (kernel.IPPROTO_TCP, kernel.TCP_SYNCNT, 3),
        (kernel.IPPROTO_TCP, kernel.TCP_KEEPIDLE, 0),
        (kernel.IPPROTO_TCP, kernel.TCP_KEEPCNT, 200),
        (kernel.IPPROTO_TCP, kernel.TCP_NODELAY, b""),
        (kernel.IPPROTO_TCP, kernel.TCP_CONGESTION, b"no-such-thing"),
        (kernel.IPPROTO_TCP, kernel.TCP_CONGESTION, b"reno"),
        (4711, 1, 1),
        (kernel.SOL_SOCKET, kernel.SO_REUSEADDR, 2**40),
        (kernel.SOL_SOCKET, kernel.SO_REUSEADDR, "text"),
    ]
    for sock in (stream, dgram):
        for level, name, value in trials:
            seen.append((level, name, outcome(sock.setsockopt, level, name, value)))
    for sock in (stream, dgram):
        for level, name in (
            (kernel.SOL_SOCKET, kernel.SO_PRIORITY),
            (kernel.SOL_SOCKET, kernel.SO_DONTROUTE),
            (kernel.SOL_SOCKET, kernel.SO_OOBINLINE),
            (kernel.SOL_SOCKET, kernel.SO_RCVLOWAT),
            (kernel.SOL_SOCKET, kernel.SO_DOMAIN),
            (kernel.SOL_SOCKET, 9999),
            (kernel.IPPROTO_IP, kernel.IP_TTL),
            (kernel.IPPROTO_IP, IP_MTU_DISCOVER),
            (kernel.IPPROTO_IP, IP_MTU),
            (kernel.IPPROTO_TCP, kernel.TCP_SYNCNT),
            (kernel.IPPROTO_TCP, 9999),
        ):
            seen.append((level, name, outcome(sock.getsockopt, level, name)))
        seen.append(sock.getsockopt(kernel.SOL_SOCKET, 20, 16))
    seen.append(stream.getsockopt(kernel.IPPROTO_TCP, kernel.TCP_CONGESTION, 16).rstrip(b"\0"))
    seen.append(outcome(stream.getsockopt, 1, 1, 1025))
    seen.append(outcome(stream.setsockopt, 1, 2, None))
    seen.append(outcome(stream.setsockopt, 1, 2, 1, 4))
    return seen


@scenario
def receive_and_send_timeouts(w: World) -> Any:
    one, two = w.tcp()
    listener = w.listener()
    client, server = w.udp()
    short = struct.pack("@ll", 0, 30_000)
    for sock in (one, two, listener, server):
        sock.setsockopt(kernel.SOL_SOCKET, 20, short)
        sock.setsockopt(kernel.SOL_SOCKET, 21, short)
        sock.settimeout(None)
    seen = [outcome(two.recv, 10), outcome(server.recvfrom, 10), outcome(listener.accept), outcome(server.recvmsg, 9)]
    data = b"x" * (1 << 22)
    total = 0
    for _ in range(100):
        sent = outcome(one.send, data)
        if isinstance(sent, tuple):
            seen.append(sent)
            break
        total += sent
    two.settimeout(0.02)
    seen.append(outcome(listener.accept))
    return [*seen, total > 0]


@scenario
def low_water_mark(w: World) -> Any:
    one, two = w.tcp()
    two.setsockopt(kernel.SOL_SOCKET, kernel.SO_RCVLOWAT, 6)
    one.send(b"abc")
    two.settimeout(0)
    time.sleep(0.02)
    seen: list[Any] = [select.select([two], [], [], 0)[0] == [], two.recv(100, kernel.MSG_DONTWAIT)]
    two.settimeout(None)
    later = threading.Timer(0.05, one.send, [b"defghi"])
    later.start()
    seen.append(two.recv(100))
    later.join()
    one.send(b"k")
    one.shutdown(kernel.SHUT_WR)
    seen.append(bool(select.select([two], [], [], 5)[0]))
    return [*seen, two.recv(100), two.recv(100)]


@scenario
def datagrams_never_in_pieces(w: World) -> Any:
    client, server = w.udp()
    client.setsockopt(kernel.IPPROTO_IP, IP_MTU_DISCOVER, 2)
    client.connect(server.getsockname())
    mtu = client.getsockopt(kernel.IPPROTO_IP, IP_MTU)
    fits = min(mtu - 28, 65507)
    return [
        outcome(client.send, b"x" * fits) == fits,
        len(server.recv(65535)) == fits,
        outcome(client.send, bytes(65508)),
    ]


# -- states ---------------------------------------------------------------------------------------


@scenario
def calls_out_of_turn(w: World) -> Any:
    fresh, dgram = w.socket(), w.socket(kernel.SOCK_DGRAM)
    listener = w.listener()
    one, two = w.tcp()
    bound = w.socket()
    bound.bind((w.near, 0))
    seen = [
        outcome(fresh.send, b"x"),
        outcome(fresh.recv, 1),
        outcome(fresh.getpeername),
        outcome(fresh.shutdown, kernel.SHUT_RDWR),
        outcome(fresh.accept),
        outcome(dgram.send, b"x"),
        outcome(dgram.sendto, b"x", (w.far, 0)),
        outcome(dgram.listen),
        outcome(dgram.accept),
        outcome(dgram.getpeername),
        outcome(dgram.shutdown, kernel.SHUT_RD),
        outcome(dgram.sendto, bytes(65508), (w.far, 9)),
        outcome(listener.connect, (w.far, 9)),
        outcome(listener.recv, 1),
        outcome(listener.send, b"x"),
        outcome(listener.getpeername),
        outcome(one.connect, (w.far, 9)),
        outcome(one.connect_ex, (w.far, 9)),
        outcome(one.listen),
        outcome(one.accept),
        outcome(one.bind, (w.near, 0)),
        outcome(one.shutdown, 7),
        outcome(bound.bind, (w.near, 0)),
        outcome(w.socket().bind, ("192.0.2.1", 0)),
        outcome(w.socket().bind, (w.near, bound.getsockname()[1])),
        outcome(w.socket().connect, (w.far, 1)),
        outcome(w.socket().connect_ex, (w.far, 1)),
    ]
    one.shutdown(kernel.SHUT_WR)
    seen += [outcome(one.send, b"x"), outcome(one.shutdown, kernel.SHUT_WR), two.recv(1), two.recv(1)]
    two.close()
    one.close()
    return [*seen, *(outcome(call) for call in (one.fileno, one.getsockname, one.listen, one.accept, one.close))]


@scenario
def names(w: World) -> Any:
    stream, dgram = w.socket(), w.socket(kernel.SOCK_DGRAM)
    seen: list[Any] = [stream.getsockname(), dgram.getsockname()]
    stream.bind(("", 0))
    seen.append(stream.getsockname()[0])
    stream.listen()
    seen.append(stream.getsockname()[0])
    client, server = w.udp()
    dgram.sendto(b"x", server.getsockname())
    seen += [dgram.getsockname()[0], server.recvfrom(1)[1][0] == w.near]
    dgram.connect(server.getsockname())
    return [*seen, dgram.getsockname()[0] == w.near, dgram.getpeername() == server.getsockname()]


@scenario
def any_address_is_this_host(w: World) -> Any:
    listener, dgram, sender = w.socket(), w.socket(kernel.SOCK_DGRAM), w.socket(kernel.SOCK_DGRAM)
    for sock in (listener, dgram):
        sock.bind(("", 0))
    listener.listen()
    client = w.socket()
    client.connect(listener.getsockname())
    server = w._keep(listener.accept()[0])
    sender.sendto(b"x", dgram.getsockname())
    return [server.getpeername() == client.getsockname(), dgram.recv(9)]


@scenario
def shutdown_wakes_accept(w: World) -> Any:
    listener = w.listener()
    listener.settimeout(5)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(outcome(listener.accept)))
    thread.start()
    time.sleep(0.1)
    seen.append(outcome(listener.shutdown, kernel.SHUT_RDWR))
    thread.join(5)
    return [sorted(map(str, seen)), outcome(listener.accept)]


@scenario
def lingering_close(w: World) -> Any:
    one, two = w.tcp()
    one.setsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, struct.pack("@ii", 1, 5))
    one.sendall(b"x" * 300_000)
    got: list[bytes] = []

    def read() -> None:
        time.sleep(0.1)
        while data := two.recv(65536):
            got.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    one.close()
    thread.join(5)
    return sum(map(len, got))


@scenario
def linger_runs_out(w: World) -> Any:
    one, two = w.tcp()
    two.setsockopt(kernel.SOL_SOCKET, kernel.SO_RCVBUF, 4096)
    one.setsockopt(kernel.SOL_SOCKET, kernel.SO_LINGER, struct.pack("@ii", 1, 1))
    one.setblocking(False)
    while not isinstance(outcome(one.send, b"x" * 65536), tuple):  # what nobody reads cannot be acknowledged
        pass
    began = time.monotonic()
    one.close()
    return 0.7 < time.monotonic() - began < 4


@scenario
def three_time_out_states(w: World) -> Any:
    sock = w.socket()
    seen = []
    for value in (None, 0, 0.0, 2, 0.5):
        sock.settimeout(value)
        seen.append((sock.gettimeout(), sock.timeout, sock.getblocking()))
    for flag in (True, False):
        sock.setblocking(flag)
        seen.append((sock.gettimeout(), sock.timeout, sock.getblocking()))
    seen += [outcome(sock.settimeout, -1), outcome(sock.settimeout, "x"), outcome(sock.settimeout, float("nan"))]
    sock.close()
    return [*seen, outcome(sock.settimeout, 1), outcome(sock.setblocking, True)]


@scenario
def connecting_in_the_background(w: World) -> Any:
    listener = w.listener()
    sock = w.socket()
    sock.setblocking(False)
    seen = [outcome(sock.connect, listener.getsockname())]
    select.select([], [sock], [], 5)
    seen += [sock.getsockopt(kernel.SOL_SOCKET, kernel.SO_ERROR), outcome(sock.connect, listener.getsockname())]
    refused = w.socket()
    refused.setblocking(False)
    seen.append(outcome(refused.connect, (w.far, 1))[0])
    select.select([], [refused], [], 5)
    error = refused.getsockopt(kernel.SOL_SOCKET, kernel.SO_ERROR)
    return [*seen, error, refused.getsockopt(kernel.SOL_SOCKET, kernel.SO_ERROR)]


# -- arguments and manners ------------------------------------------------------------------------


@scenario
def arguments(w: World) -> Any:
    one, _two = w.tcp()
    client, server = w.udp()
    return [
        outcome(one.recv, -1),
        outcome(one.recv, "1"),
        outcome(one.recv_into, b"constant"),
        outcome(one.recv_into, bytearray(2), 5),
        outcome(one.recv_into, bytearray(2), -1),
        outcome(one.recvmsg, -1),
        outcome(one.recvmsg, 1, -1),
        outcome(one.recvmsg_into, [b"constant"]),
        outcome(one.send, "text"),
        outcome(one.sendall, 5),
        outcome(one.sendmsg, 5),
        outcome(one.sendmsg, [b"x"], 5),
        outcome(client.sendto, b"x", "nowhere"),
        outcome(client.sendto, b"x", (w.far,)),
        outcome(client.sendto, b"x", (w.far, "80")),
        outcome(client.sendto, b"x", (w.far, 65536)),
        outcome(client.connect, (w.far, -1)),
        outcome(client.bind, None),
        outcome(one.shutdown, "x"),
        outcome(one.shutdown, 2**31),
        outcome(one.listen, 2**31),
        outcome(one.sendfile, open("/dev/null")),
    ]


@scenario
def manners(w: World) -> Any:
    sock = w.socket()
    seen: list[Any] = [
        repr(sock.family), repr(sock.type), sock.proto, hasattr(sock, "__dict__"), isinstance(sock, w.module.socket),
        isinstance(sock, w.module.SocketType), outcome(__import__("pickle").dumps, sock),
        outcome(__import__("copy").copy, sock),
    ]  # fmt: skip
    with sock as same:
        seen.append(same is sock)
    seen += [sock.fileno(), "[closed]" in repr(sock), sock.close()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost = w.socket()
        w.opened.remove(lost)
        del lost
        gc.collect()
    return [*seen, [c.category.__name__ for c in caught]]


def test_every_public_name_is_there() -> None:
    missing = [name for name in kernel.__all__ if not hasattr(socket, name)]
    assert missing == []
    absent = [name for name in dir(kernel.socket) if not hasattr(socket.socket, name)]
    assert set(absent) <= {"sendmsg_afalg", "__weakref__"}  # cryptography of the kernel's; a detail of classes in C


def test_a_subclass_is_an_ordinary_class(worlds: tuple[World, World]) -> None:
    class Mine(socket.socket):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.note = "kept"

    host = worlds[1].socket().host
    with Mine(type=socket.SOCK_DGRAM, host=host) as sock:
        assert sock.note == "kept" and sock.type == socket.SOCK_DGRAM
    worlds[1].close()


def test_interface_number_of_packet_information(worlds: tuple[World, World]) -> None:
    client, server = worlds[1].udp()
    server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    client.sendto(b"x", server.getsockname())
    data = server.recvmsg(10, 100)[1][0][2]
    reply = [(socket.IPPROTO_IP, IP_PKTINFO, data)]
    assert server.sendmsg([b"y"], reply, 0, client.getsockname()) == 1 and client.recv(9) == b"y"
    wrong = struct.pack("@i", 4711) + data[4:]
    with pytest.raises(OSError) as caught:
        server.sendmsg([b"y"], [(socket.IPPROTO_IP, IP_PKTINFO, wrong)], 0, client.getsockname())
    assert caught.value.errno == errno.ENODEV
    worlds[1].close()


def test_what_needs_privilege_is_refused(worlds: tuple[World, World]) -> None:
    sock = worlds[1].socket()
    for name, value in ((36, 1), (socket.SO_BINDTODEVICE, b"eth0"), (socket.SO_PRIORITY, 7), (32, 1 << 20)):
        with pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, name, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"\0")
    worlds[1].close()
