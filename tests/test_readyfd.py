"""The descriptor behind fileno(): what select, poll and epoll see of it is what it was told to show."""

import os
import random
import select
import socket
from collections.abc import Iterator

import pytest

from ulnet.stack.readyfd import ReadyFd

READABLE, WRITABLE, ERROR, HUP, RDHUP = 1, 2, 4, 8, 16
IN, OUT = select.POLLIN, select.POLLOUT
POLL_ALL = IN | OUT | select.POLLRDHUP


@pytest.fixture(params=[False, True], ids=["stream", "datagram"])
def ready(request: pytest.FixtureRequest) -> Iterator[ReadyFd]:
    fd = ReadyFd(datagram=request.param)
    yield fd
    fd.close()


def polled(fd: int) -> int:
    poller = select.poll()
    poller.register(fd, POLL_ALL)
    return dict(poller.poll(0)).get(fd, 0)


def selected(fd: int) -> tuple[bool, bool]:
    r, w, _ = select.select([fd], [fd], [], 0)
    return bool(r), bool(w)


def test_all_four_combinations_for_select_poll_epoll(ready: ReadyFd) -> None:
    epoll = select.epoll()
    epoll.register(ready.fileno(), IN | OUT)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 0, 1, 3, 2, 0, 2, 1, 0]):
        for mask in order:
            ready.show(mask)
            assert ready.shown == mask
            assert selected(ready.fileno()) == (bool(mask & 1), bool(mask & 2))
            want = (IN if mask & 1 else 0) | (OUT if mask & 2 else 0)
            assert polled(ready.fileno()) == want
            assert dict(epoll.poll(0)).get(ready.fileno(), 0) == want
    epoll.close()


def test_level_triggered_reports_again_and_again(ready: ReadyFd) -> None:
    ready.show(READABLE)
    with select.epoll() as epoll:
        epoll.register(ready.fileno(), IN)
        for _ in range(3):
            assert epoll.poll(0) == [(ready.fileno(), IN)]
        ready.show(0)
        assert epoll.poll(0) == []


def test_edge_triggered_one_event_an_edge(ready: ReadyFd) -> None:
    ready.show(0)
    with select.epoll() as epoll:
        epoll.register(ready.fileno(), IN | OUT | select.EPOLLET)
        assert epoll.poll(0) == []
        for mask, want in [(READABLE, IN), (0, None), (READABLE, IN), (3, IN | OUT), (READABLE, None), (3, IN | OUT)]:
            ready.show(mask)
            assert epoll.poll(0) == ([(ready.fileno(), want)] if want else [])
            ready.show(mask)  # the same again is no edge
            assert epoll.poll(0) == []


def test_edge_waits_for_who_was_not_looking(ready: ReadyFd) -> None:
    ready.show(0)
    with select.epoll() as epoll:
        epoll.register(ready.fileno(), IN | select.EPOLLET)
        ready.show(READABLE)
        ready.show(0)
        assert epoll.poll(0) == []  # gone again: level is checked at delivery
        ready.show(READABLE)
        assert epoll.poll(0) == [(ready.fileno(), IN)]


def test_nested_epoll(ready: ReadyFd) -> None:
    ready.show(0)
    with select.epoll() as inner, select.epoll() as outer:
        inner.register(ready.fileno(), IN | OUT | select.EPOLLET)
        outer.register(inner.fileno(), IN)
        assert outer.poll(0) == []
        ready.show(WRITABLE)
        assert outer.poll(0) == [(inner.fileno(), IN)]
        assert inner.poll(0) == [(ready.fileno(), OUT)]
        assert outer.poll(0) == []


def test_peer_end_of_file(ready: ReadyFd) -> None:
    for writable in (0, WRITABLE, 0):
        ready.show(RDHUP | READABLE | writable)
        assert polled(ready.fileno()) == IN | select.POLLRDHUP | (OUT if writable else 0)
    ready.show(HUP)
    assert polled(ready.fileno()) & ~OUT == IN | select.POLLRDHUP | select.POLLHUP
    assert selected(ready.fileno()) == (True, True)


@pytest.mark.parametrize("before", range(4))
def test_reset_looks_like_a_kernel_socket_reset(ready: ReadyFd, before: int) -> None:
    with select.epoll() as epoll:
        ready.show(before)
        epoll.register(ready.fileno(), IN | OUT | select.EPOLLRDHUP | select.EPOLLET)
        epoll.poll(0)
        ready.show(ERROR | HUP)
        all_of_it = IN | OUT | select.POLLRDHUP | select.POLLHUP | select.POLLERR
        assert epoll.poll(0) == [(ready.fileno(), all_of_it)]
        assert polled(ready.fileno()) == all_of_it
        ready.show(HUP)  # SO_ERROR was read
        assert polled(ready.fileno()) == all_of_it & ~select.POLLERR


def test_error_without_hangup_is_for_the_next_call(ready: ReadyFd) -> None:
    ready.show(ERROR)
    assert selected(ready.fileno()) == (True, True)
    ready.show(WRITABLE)
    assert selected(ready.fileno()) == (False, True)
    assert polled(ready.fileno()) == OUT


def test_same_number_after_reconnecting(ready: ReadyFd) -> None:
    number = ready.fileno()
    ready.show(ERROR | HUP)
    ready.show(0)
    assert ready.fileno() == number and polled(number) == 0
    assert not os.get_inheritable(number)
    ready.show(3)
    assert polled(number) == IN | OUT


def test_random_sequences(ready: ReadyFd) -> None:
    rng = random.Random(1993)
    poller = select.poll()
    poller.register(ready.fileno(), POLL_ALL)
    for step in range(5000):
        mask = rng.randrange(32) if rng.random() < 0.1 else rng.randrange(4)
        ready.show(mask)
        shown = ready.shown
        want = (IN if shown & READABLE else 0) | (OUT if shown & WRITABLE else 0)
        want |= (select.POLLRDHUP if shown & RDHUP else 0) | (select.POLLHUP if shown & HUP else 0)
        want |= select.POLLERR if shown & ERROR else 0
        assert dict(poller.poll(0)).get(ready.fileno(), 0) == want, (step, mask)
        assert shown & mask & 3 == mask & 3
        if not mask & (ERROR | HUP | RDHUP):
            assert shown == mask


def test_one_system_call_a_change_none_without(ready: ReadyFd) -> None:
    ready.show(0)
    for mask in (1, 0, 2, 0, 1, 0):
        before = ready.syscalls
        ready.show(mask)
        ready.show(mask)
        assert ready.syscalls == before + 1


def test_user_meddling_stays_the_users(ready: ReadyFd) -> None:
    """Whoever reads or writes the descriptor by hand confuses himself only until the next changes."""
    ready.show(READABLE)
    assert os.read(ready.fileno(), 100) == b"\0"
    ready.show(0)
    os.write(ready.fileno(), b"x")
    for mask in (2, 0, 3, 1, 0, 2):
        ready.show(mask)
    assert selected(ready.fileno()) == (False, True)


@pytest.mark.parametrize("before", [0, 1, 2, 3, RDHUP, HUP, ERROR | HUP])
def test_surrendered_it_carries_data(ready: ReadyFd, before: int) -> None:
    number = ready.fileno()
    ready.show(before)
    fresh = bool(before & (RDHUP | HUP))
    end = socket.socket(fileno=ready.surrender(fresh=fresh))
    end.setblocking(False)
    user = socket.socket(fileno=os.dup(number))
    user.setblocking(False)
    assert ready.fileno() == number and polled(number) == OUT  # empty, and nothing of the old show is left
    ready.show(3)
    assert polled(number) == OUT  # it shows nothing now
    for a, b in ((user, end), (end, user)):
        for size in (1, 100, 60_000):
            data = random.randbytes(size)
            assert a.send(data) == size
            assert b.recv(1 << 20) == data
    user.send(b"left behind")
    end.send(b"left behind")
    ready.regain(end.detach())
    assert ready.shown == WRITABLE and polled(number) == OUT
    for mask in (0, 3, 1, 2, 0, RDHUP, HUP):
        ready.show(mask)
        assert polled(number) & (IN | OUT) == (IN if mask & (1 | RDHUP | HUP) else 0) | (OUT if mask & (2 | HUP) else 0)
    user.close()


def test_regained_half_shut(ready: ReadyFd) -> None:
    with select.epoll() as epoll:
        epoll.register(ready.fileno(), IN | OUT | select.EPOLLRDHUP | select.EPOLLET)
        epoll.poll(0)
        end = socket.socket(fileno=ready.surrender())
        end.shutdown(socket.SHUT_WR)  # the peer has ended its direction meanwhile
        assert epoll.poll(0) == [(ready.fileno(), IN | OUT | select.EPOLLRDHUP)]
        ready.regain(end.detach())
        assert ready.shown == READABLE | WRITABLE | RDHUP
        epoll.poll(0)  # (the kernel takes a change of SO_SNDBUF for an edge)
        ready.show(ready.shown)
        assert epoll.poll(0) == []  # nothing has changed
        ready.show(HUP | RDHUP)
        assert epoll.poll(0)[0][1] & select.EPOLLHUP
    with pytest.raises(ValueError, match="not surrendered"):
        ready.regain(-1)


def test_a_new_pair_keeps_what_the_program_made_of_its_descriptor(ready: ReadyFd) -> None:
    os.set_inheritable(ready.fileno(), True)
    ready.show(HUP)
    ready.show(0)
    assert os.get_inheritable(ready.fileno())


def test_descriptors_come_back() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    fds = [ReadyFd() for _ in range(50)]
    assert count() == before + 100
    for i, fd in enumerate(fds):
        fd.show(i % 32)
        fd.close()
        fd.close()
    assert count() == before
    with pytest.raises(ValueError, match="closed"):
        fds[0].fileno()
