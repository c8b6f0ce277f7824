"""An engine and its sessions across fork: what the child may use, what stays with the parent, buffers on loan."""

import errno
import os
import select
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from channel_hosts import OURS, PEER, wire_or_skip
from placed import Placed
from sockethosts import listening, running

from ulnet.kernelshim.channel import open_embedded
from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.engine import READABLE
from ulnet.stack.session import Session

pytest_plugins = ["socketfixtures"]
Joined = tuple[socket.socket, socket.socket]


def session_of(sock: socket.socket) -> Session:
    assert sock.session is not None
    return sock.session


@contextmanager
def forked(hosts: Sequence[Embedded], child: Callable[[], object]) -> Iterator[int]:
    """child() in a forked process, between the hooks that a library runs; its exception fails the test."""
    report_in, report_out = os.pipe()
    for host in hosts:
        host.engine.before_fork()
    pid = os.fork()
    if pid == 0:
        try:
            for host in hosts:
                host.engine.after_fork_child()
            child()
        except BaseException:
            os.write(report_out, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    for host in hosts:
        host.engine.after_fork_parent()
    os.close(report_out)
    try:
        yield pid
    finally:
        deadline = time.monotonic() + 10
        done = status = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.005)
        if not done:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        report = os.read(report_in, 1 << 16).decode()
        os.close(report_in)
        assert done, "the child hangs"
        assert not report and status == 0, report or f"the child ended with status {status:#x}"


def stays(call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="stayed with the parent process") as caught:
        call()
    assert caught.value.errno == errno.EBADF


def test_both_use_what_is_shared(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    _, server = joined
    number = server.fileno()
    placed = Placed(session_of(server))

    def child() -> None:
        placed.end.close()  # the server has it
        assert server.fileno() == number
        assert select.select([server], [], [], 5)[0]
        assert server.recv(5) == b"hello"
        server.sendall(b"from the child")
        with pytest.raises(TimeoutError):
            server.settimeout(0.05)
            server.recv(1)
        server.close()

    with forked(hosts, child):
        placed.end.sendall(b"hello")
        assert placed.end.recv(100) == b"from the child"
    server.sendall(b"and the parent")
    assert placed.end.recv(100) == b"and the parent"  # no end of file: one holder is left
    placed.back()
    joined[0].sendall(b"as before")
    assert server.recv(100) == b"as before"


def test_what_is_not_shared_stays(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    client.fileno()
    udp = socket.socket(type=socket.SOCK_DGRAM, host=hosts[1])
    udp.bind(("", 9001))
    with listening(hosts[1]) as listener:

        def child() -> None:
            stays(lambda: client.recv(1))
            stays(lambda: client.send(b"x"))
            stays(lambda: client.recv_buffer(1))
            stays(lambda: client.shutdown(socket.SHUT_WR))
            stays(lambda: session_of(client).wait(READABLE))
            stays(lambda: session_of(client).share_begin())
            stays(lambda: listener.accept())
            stays(lambda: udp.recvfrom(1))
            stays(lambda: udp.sendto(b"x", ("10.0.0.1", 1)))
            assert hosts[0].engine.broken and not hosts[0].engine.sessions()
            hosts[0].engine.poll()
            for sock in (client, server, udp, listener):
                sock.close()

        with forked(hosts, child):
            pass
        client.sendall(b"undisturbed")
        assert server.recv(100) == b"undisturbed"
        assert not hosts[0].engine.broken
        late = socket.create_connection(listener.getsockname(), 5, host=hosts[0])
        listener.accept()[0].close()
        late.close()
    udp.close()


def test_buffers_on_loan_are_read_in_both(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    data = os.urandom(60_000)
    client.sendall(data)
    session_of(server).wait(READABLE, 10**9)
    lent = server.recv_buffer(1 << 20)
    view = memoryview(lent)

    def child() -> None:
        assert data.startswith(bytes(lent)) and view == bytes(lent)
        view.release()
        lent.release()
        with pytest.raises(ValueError, match="released"):
            bytes(lent)

    with forked(hosts, child):
        pass
    assert data.startswith(bytes(lent)) and len(lent) == len(view)
    view.release()
    lent.release()
    assert hosts[1].engine.counters()["buf_lent"] == 0
    client.sendall(b"x")


def test_buffers_in_a_ring_are_read_in_both() -> None:
    """They lie in memory that the kernel refills: before the fork they move to pages of the process's own."""
    wire = wire_or_skip()
    near = wire.peer.udp(PEER, 777)
    with wire.ours.inside():
        host = Embedded(open_embedded("ve0", OURS, slots=16), f"{OURS}/24")
        sock = socket.socket(type=socket.SOCK_DGRAM, host=host)
        sock.bind(("", 9000))
        sock.settimeout(5)
        data = [os.urandom(60_000) for _ in range(4)]
        for piece in data:
            near.sendto(piece, (str(OURS), 9000))
        lent = [sock.recv_buffer() for _ in data]
        views = [memoryview(one) for one in lent]
        assert [bytes(view) for view in views] == data
        held = host.engine.counters()["buf_held"]

        def child() -> None:
            assert [bytes(view) for view in views] == data
            for view, one in zip(views, lent, strict=True):
                view.release()
                one.release()
            sock.close()
            host.engine.close()

        with forked([host], child):
            for _ in range(40):  # twice around the ring
                near.sendto(bytes(1000), (str(OURS), 9000))
                sock.recv(2000)
            assert [bytes(view) for view in views] == data
        assert [bytes(view) for view in views] == data
        assert host.engine.counters()["buf_evacuated"] == held > 0
        for view, one in zip(views, lent, strict=True):
            view.release()
            one.release()
        sock.close()
        host.shutdown(0)
    near.close()
    wire.close()


def test_brought_home_by_the_child(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    client.sendall(b"unread ")
    session_of(server).wait(READABLE, 10**9)
    session = session_of(server)
    number, peer = server.fileno(), client.getsockname()
    placed = Placed(session)
    placed.end.sendall(b"in the pair ")

    def child() -> None:
        own, other = embedded.pair()
        session.rebind(own.engine)
        assert session.engine is own.engine and session.shared
        assert server.recv(3) == b"in "
        placed.back()
        assert not session.shared and server.fileno() == number and session.peer == peer
        assert server.recv(100) == b"the pair unread "
        assert not select.select([server], [], [], 0)[0]
        shell = socket.socket(host=hosts[1])
        shell.session.rebind(own.engine)  # type: ignore[union-attr]
        shell._host = own
        shell.bind(("", 4000))
        shell.close()
        own.engine.close_session(session, linger_abort=True)
        own.shutdown(0)
        other.shutdown(0)

    with forked(hosts, child):
        server.close()
    placed.end.close()


def test_a_thread_of_the_parent_is_not_disturbed(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    got: list[bytes] = []
    with running(lambda: got.append(server.recv(100))):
        time.sleep(0.05)

        def child() -> None:
            assert threading.active_count() == 1
            stays(lambda: server.recv(1))

        with forked(hosts, child):
            pass
        client.sendall(b"for the parent")
    assert got == [b"for the parent"]


def test_a_thread_waits_on_the_pair_while_the_child_uses_it(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    server.settimeout(5)
    placed = Placed(session_of(server))
    got: list[bytes] = []
    with running(lambda: got.append(server.recv(100))):
        time.sleep(0.05)

        def child() -> None:
            placed.end.close()
            server.sendall(b"child")  # its locks are its own
            server.close()

        with forked(hosts, child):
            assert placed.end.recv(100) == b"child"
        placed.back()
        client.sendall(b"parent")
    assert got == [b"parent"]


def test_steered_descriptors_are_not_shared(hosts: tuple[Embedded, Embedded]) -> None:
    """A child's shell must not show what the parent's became."""
    with socket.socket(host=hosts[0]) as sock, listening(hosts[1]) as listener:
        number = sock.fileno()
        ready_in, ready_out = os.pipe()

        def child() -> None:
            assert os.read(ready_in, 1) == b"x"
            assert sock.fileno() == number
            assert select.select([sock], [sock], [], 0) == ([], [sock], [])

        with forked(hosts, child):
            sock.connect(listener.getsockname())
            peer, _ = listener.accept()
            peer.sendall(b"readable")
            assert select.select([sock], [], [], 5)[0]
            os.write(ready_out, b"x")
        peer.close()
        os.close(ready_in)
        os.close(ready_out)


def test_destructors_between_the_hooks(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    """Other modules' hooks run there, and with them the collector."""
    client, server = joined
    client.sendall(b"x" * 50_000)
    session_of(server).wait(READABLE, 10**9)
    lent = server.recv_buffer(1 << 20)
    engine = hosts[1].engine
    shell = engine.new_session(6)
    engine.before_fork()
    del lent, shell
    engine.after_fork_parent()
    assert engine.counters()["buf_lent"] == 0
    with running(lambda: engine.before_fork() or engine.after_fork_parent()):
        pass


def test_many_forks_with_data_under_way(hosts: tuple[Embedded, Embedded], joined: Joined) -> None:
    client, server = joined
    stop = threading.Event()
    got = bytearray()

    def talk() -> None:
        while not stop.is_set():
            client.sendall(b"0123456789" * 10)
        client.shutdown(socket.SHUT_WR)

    def listen() -> None:
        while data := server.recv(1 << 16):
            got.extend(data)

    with running(talk), running(listen):
        for _ in range(15):
            with forked(hosts, lambda: None):
                pass
        stop.set()
    assert len(got) % 10 == 0 and got == b"0123456789" * (len(got) // 10)
