"""Waiting and connecting: time-outs, signals, threads, and the right error within the right time."""

import errno
import random
import select
import signal
import struct
import threading
import time

import pytest
from sockethosts import A, B, listening, running

from ulnet.stack import socket
from ulnet.stack.embedded import Embedded

pytest_plugins = ["socketfixtures"]


# -- time-outs, signals, threads ---------------------------------------------------------------


def test_three_kinds_of_waiting(joined: tuple[socket.socket, socket.socket]) -> None:
    client, _ = joined
    client.settimeout(0.1)
    assert client.gettimeout() == client.timeout == 0.1 and client.getblocking()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out") as caught:
        client.recv(1)
    assert 0.09 < time.monotonic() - started < 1
    assert caught.value.errno is None and type(caught.value) is socket.timeout
    client.settimeout(0)
    assert not client.getblocking() and client.gettimeout() == 0.0
    with pytest.raises(BlockingIOError) as blocked:
        client.recv(1)
    assert blocked.value.errno == errno.EAGAIN
    client.setblocking(True)
    assert client.gettimeout() is None
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="out of range"):
            client.settimeout(bad)
    with pytest.raises(OverflowError):
        client.settimeout(1e30)
    with pytest.raises(TypeError):
        client.settimeout("1")  # type: ignore[arg-type]


def test_default_timeout_is_this_modules_own(hosts: tuple[Embedded, Embedded]) -> None:
    import socket as standard

    socket.setdefaulttimeout(1.5)
    try:
        assert socket.getdefaulttimeout() == 1.5 and standard.getdefaulttimeout() is None
        with socket.socket(host=hosts[0]) as sock:
            assert sock.gettimeout() == 1.5
    finally:
        socket.setdefaulttimeout(None)


def test_accept_timeout_and_nonblocking(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError, match="timed out"):
            listener.accept()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_keyboard_interrupt_in_recv(joined: tuple[socket.socket, socket.socket]) -> None:
    client, _ = joined
    client.settimeout(10)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.recv(1)
    assert time.monotonic() - started < 3
    timer.join()


def test_signal_handler_does_not_disturb_recv(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with running(lambda: (time.sleep(0.2), server.sendall(b"late"))):
            assert client.recv(10) == b"late"  # PEP 475
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits


def test_close_wakes_a_thread_that_receives(joined: tuple[socket.socket, socket.socket]) -> None:
    client, _ = joined
    client.settimeout(None)
    outcome: list[int | None] = []

    def receive() -> None:
        try:
            client.recv(1)
            outcome.append(0)
        except OSError as e:
            outcome.append(e.errno)

    with running(receive):
        time.sleep(0.1)
        client.close()
    assert outcome == [errno.EBADF]


def test_close_wakes_a_thread_that_accepts(hosts: tuple[Embedded, Embedded]) -> None:
    listener = listening(hosts[1])
    outcome: list[int | None] = []

    def accept() -> None:
        with pytest.raises(OSError) as caught:
            listener.accept()
        outcome.append(caught.value.errno)

    with running(accept):
        time.sleep(0.1)
        listener.close()
    assert outcome in ([errno.EBADF], [errno.EINVAL])


def test_many_threads_share_one_stack(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1], backlog=32) as listener:
        address = listener.getsockname()
        served = []

        def serve() -> None:
            for _ in range(8):
                sock, _ = listener.accept()
                sock.settimeout(10)
                thread = threading.Thread(target=echo, args=(sock,))
                thread.start()
                served.append(thread)
            for thread in served:
                thread.join(10)

        def echo(sock: socket.socket) -> None:
            with sock:
                while data := sock.recv(4096):
                    sock.sendall(data)

        def talk(i: int) -> None:
            rng = random.Random(i)
            with socket.create_connection(address, 10, host=hosts[0]) as sock:
                for _ in range(50):
                    data = rng.randbytes(rng.randrange(1, 3000))
                    sock.sendall(data)
                    assert sock.recv(len(data), socket.MSG_WAITALL) == data

        with running(serve):
            threads = [running(lambda i=i: talk(i)) for i in range(8)]  # type: ignore[misc]
            for t in threads:
                t.__enter__()
            for t in threads:
                t.__exit__(None, None, None)


# -- connecting --------------------------------------------------------------------------------


def test_refused(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.settimeout(5)
        with pytest.raises(ConnectionRefusedError) as caught:
            sock.connect((B, 9))
        assert caught.value.errno == errno.ECONNREFUSED
        assert sock.connect_ex((B, 9)) == errno.ECONNREFUSED
        with listening(hosts[1], 7001):  # a socket may try again
            sock.connect((B, 7001))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((B, 9), 5, host=hosts[0])
    with pytest.raises(ExceptionGroup):
        socket.create_connection((B, 9), 5, all_errors=True, host=hosts[0])


def test_unreachable(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.settimeout(10)
        with pytest.raises(OSError) as caught:
            sock.connect(("192.0.2.1", 80))
        assert caught.value.errno == errno.ENETUNREACH
    with socket.socket(host=hosts[0]) as sock:
        with pytest.raises(OSError, match="loopback") as caught:
            sock.connect(("127.0.0.1", 80))
        assert caught.value.errno == errno.ENETUNREACH


def test_nobody_at_that_address(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.settimeout(15)
        started = time.monotonic()
        with pytest.raises(OSError) as caught:
            sock.connect(("10.0.0.99", 80))
        assert caught.value.errno == errno.EHOSTUNREACH
        assert time.monotonic() - started < 10


def test_connect_timeout(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError, match="timed out"):
            sock.connect(("10.0.0.98", 80))
        assert sock.connect_ex(("10.0.0.98", 80)) in (errno.EAGAIN, errno.EALREADY)


def test_nonblocking_connect(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener, socket.socket(host=hosts[0]) as sock:
        sock.setblocking(False)
        assert sock.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        _, writable, _ = select.select([], [sock], [], 5)
        assert writable
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert sock.getpeername() == listener.getsockname()
        assert sock.connect_ex(listener.getsockname()) == 0  # connect(2): once more, as Linux
        assert sock.connect_ex(listener.getsockname()) == errno.EISCONN
        server, _ = listener.accept()
        server.close()


def test_nonblocking_connect_twice_and_refused(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.connect(("10.0.0.97", 80))
        assert sock.connect_ex(("10.0.0.97", 80)) == errno.EALREADY
        with pytest.raises(OSError) as caught:
            sock.getpeername()
        assert caught.value.errno == errno.ENOTCONN
    with socket.socket(host=hosts[0]) as sock:
        sock.setblocking(False)
        assert sock.connect_ex((B, 9)) == errno.EINPROGRESS
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        events = poller.poll(5000)
        assert events and events[0][1] & select.POLLERR
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_bind_before_connect_and_conflicts(hosts: tuple[Embedded, Embedded]) -> None:
    a, b = hosts
    with listening(b, 7002) as listener:
        with socket.create_connection((B, 7002), 5, ("", 5555), host=a) as sock:
            assert sock.getsockname() == (A, 5555)
            server, peer = listener.accept()
            assert peer == (A, 5555)
            server.close()
        with pytest.raises(OSError, match="while attempting to bind") as caught:
            socket.create_server(("", 7002), host=b)
        assert caught.value.errno == errno.EADDRINUSE
    with socket.socket(host=a) as sock:
        with pytest.raises(OSError) as caught:
            sock.bind((B, 0))
        assert caught.value.errno == errno.EADDRNOTAVAIL
        sock.bind(("", 0))
        assert sock.getsockname()[1] >= 1024
        with pytest.raises(OSError, match="bound already"):
            sock.bind(("", 0))
        with pytest.raises(OSError) as caught:
            sock.accept()
        assert caught.value.errno == errno.EINVAL


def test_unconnected_calls(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(host=hosts[0]) as sock:
        sock.settimeout(1)
        for call in (
            lambda: sock.recv(1),
            lambda: sock.getpeername(),
            lambda: sock.shutdown(socket.SHUT_WR),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(OSError) as caught:
            sock.send(b"x")
        assert caught.value.errno in (errno.ENOTCONN, errno.EPIPE)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("10.0.0.2:80", TypeError),
        (("10.0.0.2",), TypeError),
        (("10.0.0.2", 80, 0, 0), TypeError),
        (("10.0.0.2", "80"), TypeError),
        (("10.0.0.2", 65536), OverflowError),
        (("10.0.0.2", -1), OverflowError),
        ((5, 80), TypeError),
        (("10.0.0.256", 80), socket.gaierror),
    ],
)
def test_bad_addresses(hosts: tuple[Embedded, Embedded], address: object, error: type[Exception]) -> None:
    with socket.socket(host=hosts[0]) as sock, pytest.raises(error):
        sock.connect(address)


def test_linger_zero_resets(hosts: tuple[Embedded, Embedded]) -> None:
    with listening(hosts[1]) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        server, _ = listener.accept()
    server.settimeout(5)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)
    client.close()
    with server, pytest.raises(ConnectionResetError):
        server.recv(1)


def test_close_with_unread_data_resets(joined: tuple[socket.socket, socket.socket]) -> None:
    client, server = joined
    client.sendall(b"never read")
    assert server.recv(1, socket.MSG_PEEK)
    server.close()  # RFC 1122 4.2.2.13
    with pytest.raises(ConnectionResetError):
        client.recv(1)
