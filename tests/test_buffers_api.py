"""Buffers of the stack in a program's hands: many at a call, filled in place, given away, given back, and by whom."""

from __future__ import annotations

import errno
import gc
import hashlib
import random
import socket as kernel
import threading
import time
from collections.abc import Iterator

import pytest
from sockethosts import A, B, listening, read_all, running

from tests.netserver_bed import PEER, Bed
from ulnet.kernelshim.link import LINK_CSUM, LINK_TSO
from ulnet.kernelshim.memory import memory_pair
from ulnet.kernelshim.testbed import can_testbed
from ulnet.stack import embedded, socket
from ulnet.stack.embedded import Embedded
from ulnet.stack.proxy import Proxy
from ulnet.stack.session import Buffer

pytest_plugins = ["socketfixtures"]

Pair = tuple[socket.socket, socket.socket]


def data_of(buffer: Buffer) -> bytes:
    with memoryview(buffer) as view:  # type: ignore[arg-type]
        return bytes(view)


def fill(buffer: Buffer, data: bytes) -> Buffer:
    with memoryview(buffer) as view:  # type: ignore[arg-type]
        view[: len(data)] = data
    return buffer


def lent(host: Embedded | Proxy) -> int:
    return host.engine.counters()["buf_lent"]


def eventually(host: Embedded | Proxy, count: int) -> None:
    """The peer's acknowledgements come by and by."""
    deadline = time.monotonic() + 5
    while lent(host) != count and time.monotonic() < deadline:
        time.sleep(0.002)
    assert lent(host) == count


def fill_up(sock: socket.socket) -> tuple[int, Buffer]:
    """Send until nothing fits any more: the bytes taken, and the buffer of 1 MiB that was not."""
    sock.settimeout(0.3)
    taken = 0
    while True:
        buffer = sock.alloc_buffer(1 << 20)
        try:
            taken += sock.send_buffer(buffer)
        except TimeoutError:
            return taken, buffer


# -- many at a call ----------------------------------------------------------------------------


def test_many_datagrams_in_one_call(udp: Pair) -> None:
    client, server = udp
    sent = [b"%d" % i * (i % 5) for i in range(100)]  # empty ones among them
    for data in sent:
        client.sendto(data, (B, 9000))
    got = []
    while len(got) < len(sent):
        buffers = server.recv_buffers(7)
        assert 1 <= len(buffers) <= 7
        got += buffers
    assert [data_of(b) for b in got] == sent
    assert {b.address for b in got} == {(A, client.getsockname()[1])}
    assert all(b.readonly for b in got)
    assert lent(server.host) == 100
    for buffer in got:
        buffer.release()
    assert lent(server.host) == 0
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.recv_buffers(7)
    server.settimeout(0.02)
    with pytest.raises(TimeoutError):
        server.recv_buffers(7)


def test_senders_are_told_apart(hosts: tuple[Embedded, Embedded], udp: Pair) -> None:
    client, server = udp
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as other:
        for i in range(6):
            (client, other)[i % 2].sendto(b"%d" % i, (B, 9000))
        got = server.recv_buffers(10)
        assert [b.address for b in got] == [(A, sock.getsockname()[1]) for sock in (client, other)] * 3
        server.send_buffers([(b, b.address) for b in got])
        client.settimeout(5)
        assert [client.recv(9) for _ in range(3)] == [b"0", b"2", b"4"]
        other.settimeout(5)
        assert [other.recv(9) for _ in range(3)] == [b"1", b"3", b"5"]


def test_pieces_of_a_stream(joined: Pair) -> None:
    client, server = joined
    data = random.Random(1).randbytes(3_000_000)
    got = hashlib.sha256()
    with running(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR))):
        while buffers := server.recv_buffers(4):
            assert len(buffers) <= 4
            for buffer in buffers:
                with buffer:
                    got.update(buffer)  # type: ignore[arg-type]
    assert got.digest() == hashlib.sha256(data).digest()
    assert server.recv_buffers(1) == []  # the end stays the end


def test_what_came_before_an_error_is_delivered_first(joined: Pair) -> None:
    client, server = joined
    client.sendall(b"last words")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert server.session is not None and server.session.wait(1, 5_000_000_000)
    client.close()
    with pytest.raises(ConnectionResetError):
        while server.recv_buffers(9):
            pass
    assert lent(server.host) == 0


@pytest.mark.parametrize("n", [0, -1, 1 << 40])
def test_number_of_buffers(udp: Pair, n: int) -> None:
    with pytest.raises(ValueError, match=f"recv_buffers\\({n}\\)"):
        udp[1].recv_buffers(n)


# -- filled in place, and given away -----------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65_536, 3_000_000])
def test_what_is_written_arrives(joined: Pair, size: int) -> None:
    client, server = joined
    data = random.Random(size).randbytes(size)
    buffer = fill(client.alloc_buffer(size), data)
    assert not buffer.readonly and len(buffer) == size and lent(client.host) == 1
    copied = client.host.engine.counters()["buf_copied_bytes"]
    with running(lambda: (client.send_buffer(buffer), client.shutdown(socket.SHUT_WR))):
        assert read_all(server) == data
    assert client.host.engine.counters()["buf_copied_bytes"] == copied
    eventually(client.host, 0)


def test_after_sending_it_is_the_stacks(joined: Pair) -> None:
    client, server = joined
    buffer = fill(client.alloc_buffer(10_000), b"x" * 10_000)
    assert client.send_buffer(buffer, nbytes=6000) == 6000
    with pytest.raises(ValueError, match="released or sent"):
        memoryview(buffer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="released or sent"):
        len(buffer)
    with pytest.raises(ValueError, match="released or sent"):
        client.send_buffer(buffer)
    buffer.release()  # harmless
    buffer.release()
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == b"x" * 6000
    assert "released" in repr(buffer)


def test_a_view_forbids_sending(joined: Pair, udp: Pair) -> None:
    buffer = joined[0].alloc_buffer(100)
    view = memoryview(buffer)  # type: ignore[arg-type]
    for send in (
        lambda: joined[0].send_buffer(buffer),
        lambda: udp[0].send_buffer(buffer, (B, 9000)),
        lambda: udp[0].send_buffers([b"first", buffer], (B, 9000)),
        buffer.release,
    ):
        with pytest.raises(BufferError, match="1 view"):
            send()
    view[0] = 7  # still the program's
    view.release()
    buffer.release()
    udp[1].settimeout(0)
    with pytest.raises(BlockingIOError):
        udp[1].recv(9)  # not even the first one went


@pytest.mark.parametrize("nbytes", [-2, 101])
def test_nbytes_is_checked(joined: Pair, nbytes: int) -> None:
    with joined[0].alloc_buffer(100) as buffer:
        with pytest.raises(ValueError, match=f"nbytes is {nbytes}, but the buffer has 100 bytes"):
            joined[0].send_buffer(buffer, nbytes=nbytes)
        assert len(buffer) == 100


@pytest.mark.parametrize("size", [-1, (1 << 28) + 1])
def test_size_is_checked(joined: Pair, size: int) -> None:
    with pytest.raises(ValueError, match=f"alloc_buffer\\({size}\\)"):
        joined[0].alloc_buffer(size)


def test_only_buffers_of_the_stack(joined: Pair) -> None:
    with pytest.raises(TypeError):
        joined[0].send_buffer(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recv_buffer"):
        Buffer()


def test_who_cannot_send_keeps_it(joined: Pair) -> None:
    client, server = joined
    taken, buffer = fill_up(client)
    assert len(buffer) == 1 << 20  # whole, and the caller's
    client.settimeout(0)
    with pytest.raises(BlockingIOError):
        client.send_buffer(buffer)
    assert len(fill(buffer, b"again")) == 1 << 20
    client.settimeout(10)
    with running(lambda: (client.send_buffer(buffer), client.shutdown(socket.SHUT_WR))):
        data = read_all(server)
    assert len(data) == taken + (1 << 20) and data[taken:].startswith(b"again")


def test_errors_leave_it_with_the_caller(hosts: tuple[Embedded, Embedded], joined: Pair, udp: Pair) -> None:
    buffer = joined[0].alloc_buffer(50_000)
    with socket.socket(host=hosts[0]) as shell, pytest.raises(OSError) as caught:
        shell.send_buffer(buffer)
    assert caught.value.errno in (errno.ENOTCONN, errno.EPIPE)
    with pytest.raises(OSError) as caught:
        udp[0].send_buffer(buffer)
    assert caught.value.errno == errno.EDESTADDRREQ
    joined[0].shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        joined[0].send_buffer(buffer)
    joined[0].close()
    with pytest.raises(OSError) as caught:
        joined[0].send_buffer(buffer)
    assert caught.value.errno == errno.EBADF
    assert len(buffer) == 50_000
    assert udp[0].send_buffer(buffer, (B, 9000)) == 50_000
    assert len(udp[1].recv(65536)) == 50_000


def test_echo_without_a_copy(hosts: tuple[Embedded, Embedded], joined: Pair) -> None:
    client, server = joined
    data = random.Random(4).randbytes(20_000_000)

    def echo() -> None:
        while buffers := server.recv_buffers(16):
            for buffer in buffers:
                server.send_buffer(buffer)
        server.shutdown(socket.SHUT_WR)

    with running(echo), running(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR))):
        got = read_all(client)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    eventually(hosts[1], 0)


def test_a_buffer_of_another_stack_is_copied(hosts: tuple[Embedded, Embedded], joined: Pair) -> None:
    client, server = joined
    data = random.Random(5).randbytes(20_000)
    stranger = fill(server.alloc_buffer(20_000), data)
    copied = hosts[0].engine.counters()["buf_copied_bytes"]
    assert client.send_buffer(stranger) == 20_000
    assert hosts[0].engine.counters()["buf_copied_bytes"] - copied == 20_000
    assert lent(hosts[1]) == 0
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == data
    stranger = server.alloc_buffer(5)
    with pytest.raises(BrokenPipeError):
        client.send_buffer(stranger)
    assert len(stranger) == 5
    eventually(hosts[0], 0)


def test_end_of_file_buffer_can_be_sent(joined: Pair) -> None:
    client, server = joined
    client.shutdown(socket.SHUT_WR)
    empty = server.recv_buffer()
    assert len(empty) == 0 and server.send_buffer(empty) == 0
    server.close()
    assert client.recv(1) == b""


# -- many datagrams out ------------------------------------------------------------------------


def datagrams(rng: random.Random) -> list[bytes]:
    out: list[bytes] = []
    while len(out) < 300:
        size = rng.choice((0, 1, 64, 64, 200, 1000, 1472, 1473, 9000))
        out += [rng.randbytes(size) for _ in range(rng.randrange(1, 90))]
        if rng.random() < 0.5:
            out.append(rng.randbytes(size // 2))  # a shorter one ends a train
    return out


@pytest.mark.parametrize("features", [LINK_CSUM | LINK_TSO | 4, LINK_CSUM, 0])
def test_trains_and_single_ones_look_alike(features: int) -> None:
    sent = datagrams(random.Random(features))
    ends = memory_pair(features=features, queue_frames=1 << 15)
    with (
        Embedded(ends[0], "10.0.0.1/24") as a,
        Embedded(ends[1], "10.0.0.2/24") as b,
        socket.socket(type=socket.SOCK_DGRAM, host=a) as client,
        socket.socket(type=socket.SOCK_DGRAM, host=b) as server,
    ):
        server.bind(("", 9000))
        server.settimeout(5)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        client.connect((B, 9000))
        done = 0
        while done < len(sent):
            done += client.send_buffers(sent[done : done + 100])
        got = [server.recv(65536) for _ in sent]
        assert got == sent
        trains = a.engine.counters()["udp_trains"]
        assert trains > 0 if features & 4 else trains == 0
        frames = a.engine.counters()["frames_out"]
        assert frames < len(sent) if features & 4 else frames >= len(sent)


def test_mixed_batch(hosts: tuple[Embedded, Embedded], udp: Pair) -> None:
    client, server = udp
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[1]) as second:
        second.bind(("", 9001))
        second.settimeout(5)
        buffer = fill(client.alloc_buffer(6), b"filled")
        batch: list[object] = [
            b"bytes",
            bytearray(b"array"),
            (memoryview(b"xviewx")[1:5], (B, 9001)),
            buffer,
            (b"named", (B, 9001)),
            (b"default", None),
        ]
        assert client.send_buffers(batch, (B, 9000)) == 6  # type: ignore[arg-type]
        assert [server.recv(9) for _ in range(4)] == [b"bytes", b"array", b"filled", b"default"]
        assert [second.recv(9) for _ in range(2)] == [b"view", b"named"]
        assert "released" in repr(buffer) and lent(hosts[0]) == 0
    assert client.send_buffers([], (B, 9000)) == 0
    assert client.send_buffers(iter([b"1", b"2"]), (B, 9000)) == 2


def test_a_batch_stops_at_an_error(udp: Pair) -> None:
    client, server = udp
    kept = client.alloc_buffer(66_000)
    sent = client.alloc_buffer(10)
    after = client.alloc_buffer(10)
    assert client.send_buffers([b"a", sent, kept, after], (B, 9000)) == 2
    assert "released" in repr(sent) and len(kept) == 66_000 and len(after) == 10
    with pytest.raises(OSError) as caught:
        client.send_buffers([kept, after], (B, 9000))
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(OSError) as caught:
        client.send_buffers([after])
    assert caught.value.errno == errno.EDESTADDRREQ
    for bad in (["text"], [b"x", 5], [(b"x",)], [(b"x", "10.0.0.2:9000")], [(b"x", (B, 70000))], [after, after]):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            client.send_buffers(bad, (B, 9000))  # type: ignore[arg-type]
    assert len(after) == 10  # given back to the caller each time
    assert len(server.recv_buffers(9)) == 2


def test_batches_are_for_datagrams(joined: Pair) -> None:
    with pytest.raises(OSError, match="datagrams") as caught:
        joined[0].send_buffers([b"x"])
    assert caught.value.errno == errno.EOPNOTSUPP


def test_the_port_unreachable_comes_back(hosts: tuple[Embedded, Embedded]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM, host=hosts[0]) as sock:
        sock.connect((B, 9))
        sock.settimeout(5)
        buffer = sock.alloc_buffer(8)
        with pytest.raises(ConnectionRefusedError):
            for _ in range(1000):
                sock.send_buffers([b"x", b"y"])
                time.sleep(0.001)
            sock.send_buffers([buffer])
        assert len(buffer) == 8


# -- lifetimes ---------------------------------------------------------------------------------


def test_with_releases(joined: Pair) -> None:
    with joined[0].alloc_buffer(10) as buffer:
        assert lent(joined[0].host) == 1
    assert lent(joined[0].host) == 0
    with pytest.raises(ValueError):
        memoryview(buffer)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), joined[0].alloc_buffer(10):
        _ = 1 // 0
    assert lent(joined[0].host) == 0
    with joined[0].alloc_buffer(10) as buffer:
        joined[0].send_buffer(buffer)  # leaving the block afterwards is fine


def test_forgotten_ones_come_back(udp: Pair) -> None:
    client, server = udp
    client.send_buffers([b"x"] * 50, (B, 9000))
    buffers = server.recv_buffers(50)
    assert lent(server.host) == len(buffers) > 0
    del buffers
    assert lent(server.host) == 0


def test_they_outlive_socket_and_host() -> None:
    a, b = embedded.pair()
    with listening(b) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=a)
        server, _ = listener.accept()
    client.sendall(b"kept" * 5000)
    received = server.recv_buffers(50)
    filled = fill(client.alloc_buffer(5000), b"mine")
    client.close()
    server.close()
    a.shutdown(0.1)
    b.shutdown(0.1)
    del a, b, client, server, listener
    gc.collect()
    assert b"".join(map(data_of, received)).startswith(b"keptkept")
    assert data_of(filled).startswith(b"mine")
    for buffer in (*received, filled):
        buffer.release()


def test_sent_but_not_acknowledged_at_the_end() -> None:
    """The send queue's segments go with the engine."""
    a, b = embedded.pair()
    with listening(b) as listener:
        client = socket.create_connection(listener.getsockname(), 5, host=a)
        server, _ = listener.accept()
    client.settimeout(0)
    for _ in range(3):
        client.send_buffer(client.alloc_buffer(1 << 20))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    eventually(a, 0)
    server.close()
    a.shutdown(0.0)
    b.shutdown(0.0)


def test_handed_over_with_lent_segments_in_the_send_queue(hosts: tuple[Embedded, Embedded], joined: Pair) -> None:
    """A session that moves takes a copy along; what it had borrowed is free again."""
    client, server = joined
    data = random.Random(6).randbytes(3_000_000)
    client.send_buffer(fill(client.alloc_buffer(len(data)), data))
    assert client.session is not None
    engine = hosts[0].engine
    state = engine.export_session(client.session)
    assert lent(hosts[0]) == 0
    session = engine.new_session(6)
    engine.import_session(session, state, 99)
    got = b""
    while len(got) < len(data):
        got += server.recv(1 << 20)
    assert got == data


def test_any_thread_may_release(udp: Pair) -> None:
    client, server = udp
    rounds, most = 60, 32
    queue: list[Buffer] = []
    stop = threading.Event()

    def release_all() -> None:
        while not stop.is_set() or queue:
            try:
                buffer = queue.pop()
            except IndexError:
                time.sleep(0)
                continue
            buffer.release()

    with running(release_all), running(release_all), running(release_all):
        try:
            for i in range(rounds):
                client.send_buffers([b"%d" % i] * most, (B, 9000))
                got: list[Buffer] = []
                while len(got) < most:
                    got += server.recv_buffers(most)
                queue += got * 2  # each is released twice, maybe by two threads at once
        finally:
            stop.set()
    del got
    assert lent(server.host) == 0


def test_others_wait_while_it_is_being_sent(joined: Pair) -> None:
    client, server = joined
    _, buffer = fill_up(client)
    client.settimeout(10)
    with running(lambda: client.send_buffer(buffer)):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                len(buffer)
            except ValueError as e:
                assert "being sent" in str(e)
                break
        with pytest.raises(BufferError, match="being sent"):
            buffer.release()
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                server.recv(1 << 20)


# -- a real ring -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    bed = Bed(tmp_path_factory.mktemp("buffers"))
    yield bed
    bed.close()


@pytest.fixture
def proxy(bed: Bed) -> Iterator[Proxy]:
    proxy = bed.proxy()
    yield proxy
    gc.collect()
    proxy.shutdown()


@pytest.fixture
def kernel_peer(bed: Bed) -> Iterator[kernel.socket]:
    sock = bed.b.socket(type=kernel.SOCK_DGRAM)
    sock.setsockopt(kernel.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    sock.bind((PEER, 0))
    sock.settimeout(5)
    yield sock
    sock.close()


def test_the_kernel_takes_trains_apart(proxy: Proxy, kernel_peer: kernel.socket) -> None:
    sent = datagrams(random.Random(7))
    with socket.socket(type=socket.SOCK_DGRAM, host=proxy) as sock:
        sock.connect(kernel_peer.getsockname())
        done = 0
        while done < len(sent):
            done += sock.send_buffers(sent[done : done + 64])
        assert [kernel_peer.recv(65536) for _ in sent] == sent
        assert proxy.engine.counters()["udp_trains"] > 0


def test_trains_from_the_kernel(proxy: Proxy, kernel_peer: kernel.socket) -> None:
    """UDP_SEGMENT (103) at the kernel's end: one frame in the ring, many datagrams out of it, and back as trains."""
    with socket.socket(type=socket.SOCK_DGRAM, host=proxy) as sock:
        sock.bind(("", 0))
        sock.settimeout(5)
        kernel_peer.setsockopt(17, 103, 64)
        kernel_peer.sendto(b"".join(b"%064d" % i for i in range(60)), (proxy.address, sock.getsockname()[1]))
        got: list[Buffer] = []
        while len(got) < 60:
            got += sock.recv_buffers(100)
        assert [data_of(b) for b in got] == [b"%064d" % i for i in range(60)]
        assert sock.send_buffers(got, got[0].address) == 60  # type: ignore[arg-type]
        kernel_peer.setsockopt(17, 103, 0)
        assert [kernel_peer.recv(99) for _ in range(60)] == [b"%064d" % i for i in range(60)]
        assert lent(proxy) == 0 and proxy.engine.counters()["udp_trains"] > 0


def test_lending_too_much_degrades_to_copies(bed: Bed, proxy: Proxy) -> None:
    """All that is held stays readable and right while the ring goes round and round."""
    listener = bed.b.socket()
    listener.bind((PEER, 0))
    listener.listen(1)
    data = random.Random(8).randbytes(24_000_000)
    held = []
    with listener, socket.create_connection(listener.getsockname(), 5, host=proxy) as ours:
        theirs, _ = listener.accept()
        with theirs, running(lambda: theirs.sendall(data)):
            total = 0
            while total < len(data):
                held += ours.recv_buffers(8)
                total = sum(map(len, held))
        counters = proxy.engine.counters()
        assert counters["buf_lent"] == len(held)
        assert counters["buf_evacuated"] > 0 or counters["buf_slots_short"] > 0
        got = hashlib.sha256()
        for buffer in held:
            got.update(buffer)  # type: ignore[arg-type]
            buffer.release()
        assert got.digest() == hashlib.sha256(data).digest()
        assert lent(proxy) == 0


def test_echo_over_the_ring_without_a_copy(bed: Bed, proxy: Proxy) -> None:
    listener = bed.b.socket()
    listener.bind((PEER, 0))
    listener.listen(1)
    data = random.Random(9).randbytes(16_000_000)
    with listener, socket.create_connection(listener.getsockname(), 5, host=proxy) as ours:
        theirs, _ = listener.accept()

        def echo() -> None:
            while buffers := ours.recv_buffers(16):
                for buffer in buffers:
                    ours.send_buffer(buffer)
            ours.shutdown(socket.SHUT_WR)

        with theirs, running(echo), running(lambda: (theirs.sendall(data), theirs.shutdown(kernel.SHUT_WR))):
            theirs.settimeout(20)
            got = read_all(theirs)  # type: ignore[arg-type]
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        eventually(proxy, 0)
