"""Peers that lie, send garbage or hoard: counted, refused, and nobody else is harmed."""

import array
import os
import random
import socket
import struct
import time

import pytest
import zmq
from ipc_world import ECHO, World, wait_for

from ulnet.ipc import KernReturn, Limits, MachError, MachMsgReturn, MsgType, PortRight, Task, wire
from ulnet.ipc.wire import Op


@pytest.fixture
def world(tmp_path):
    world = World(str(tmp_path / "hub"))
    yield world
    echo_works(world)
    world.end()


def echo_works(world):
    with Task(world.path) as task:
        assert task.rpc(task.look_up(ECHO), 1, b"well", timeout=5).inline == b"well"


class Peer:
    """A side channel and raw connections, without the library's manners."""

    def __init__(self, path):
        self.path = path
        self.side = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side.settimeout(5)
        self.side.connect(path + ".fd")
        _, _, _, self.task_id, self.token = wire.WELCOME.unpack(self.side.recv(100))
        self.context = zmq.Context()

    def connect(self, token=None, routing_id=None, kind=wire.KIND_CALLS):
        sock = self.context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, 3000)
        if routing_id is not None:
            sock.setsockopt(zmq.ROUTING_ID, routing_id)
        sock.connect(f"ipc://{self.path}")
        sock.send(wire.HELLO.pack(Op.HELLO, wire.VERSION, kind, self.token if token is None else token))
        return sock

    def send(self, sock, data, *buffers):
        sock.send_multipart([self.token[-wire.KEY_BYTES :] + data, *buffers])

    def ask(self, sock, method, *arguments):
        payload = ("[" + ", ".join([f'"{method}"', *map(str, arguments), "0"]) + "]").encode()
        self.send(sock, wire.SHORT.pack(Op.CALL, 5) + payload)
        return wire.STATUS.unpack_from(sock.recv())[2]

    def end(self):
        self.context.destroy(linger=0)
        self.side.close()


@pytest.fixture
def peer(world):
    peer = Peer(world.path)
    yield peer
    peer.end()


def request(op=Op.SEND, rdisp=0, ldisp=0, seq=1, remote=0, local=0, id=0, tag=0, nool=0, nfds=0, nrights=0):
    return wire.REQUEST.pack(op, rdisp, ldisp, 0, seq, remote, local, id, tag, nool, nfds, nrights)


def status(sock):
    return wire.STATUS.unpack_from(sock.recv())[2]


def test_a_wrong_token_opens_nothing(world, peer):
    sock = peer.connect(token=b"\0" * 32)
    sock.send(wire.SHORT.pack(Op.CALL, 1) + b'["allocate", 1, 0]')
    assert wait_for(lambda: world.counters().get("connection refused: wrong token") == 1)
    assert wait_for(lambda: world.counters().get("frame dropped: unknown peer") == 1)
    with pytest.raises(zmq.Again):
        sock.setsockopt(zmq.RCVTIMEO, 100)
        sock.recv()


def test_anothers_token_is_no_use_in_another_process(world):
    """The token leaks; the kernel's word about the connection's process does not match."""
    task = world.task()
    thief = world.spawn("""
import zmq
from ulnet.ipc import wire
token = bytes.fromhex(hear())
sock = zmq.Context().socket(zmq.DEALER)
sock.connect("ipc://" + PATH)
sock.send(wire.HELLO.pack(wire.Op.HELLO, wire.VERSION, 0, token))
sock.send(wire.SHORT.pack(wire.Op.CALL, 1) + b'["names", 0]')
say(sock.recv()[0])
""")
    thief.say(task._token.hex())
    assert int(thief.hear()) == Op.REFUSED
    assert world.counters()["connection refused: other credentials"] == 1


def test_routing_ids_are_not_capabilities(world, peer):
    """Somebody else takes over the routing id of a connection that has ended, and is not taken for its owner."""
    sock = peer.connect()
    assert peer.ask(sock, "allocate", 1) == 0
    (rid,) = world.call(lambda hub: list(hub._conns))
    for chosen_while_owner_is_there in (True, False):
        if not chosen_while_owner_is_there:
            sock.close()
            time.sleep(0.1)
        thief = Peer(world.path)
        forged = thief.connect(routing_id=rid)
        forged.send(thief.token[-16:] + wire.SHORT.pack(Op.CALL, 1) + b'["destroy", 257, 0]')
        forged.setsockopt(zmq.RCVTIMEO, 200)
        with pytest.raises(zmq.Again):
            forged.recv()
        thief.end()
    assert world.counters() == {"frame dropped: not the connection's key": 2}  # HELLO and CALL of the second
    names = world.call(lambda hub: [set(t.space.entries) for t in hub._tasks.values() if t.space.entries])
    assert names == [{257}]


def test_rights_of_others_cannot_be_named(world, peer):
    victim = world.task()
    port = victim.allocate()
    sock = peer.connect()
    assert peer.ask(sock, "destroy", port) == KernReturn.KERN_INVALID_NAME
    peer.send(sock, request(remote=port))
    assert status(sock) == MachMsgReturn.MACH_SEND_INVALID_DEST
    assert victim.get_attributes(port).msgcount == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_frames_are_counted_and_harm_nobody(world, peer, seed):
    rng = random.Random(seed)
    sock = peer.connect()
    own = [peer.ask(sock, "allocate", 1) for _ in range(2)]
    assert own == [0, 0]
    for _ in range(400):
        op = rng.choice([*map(int, Op), rng.randrange(256)])
        shape = rng.randrange(4)
        if shape == 0:
            data = bytes([op]) + rng.randbytes(rng.randrange(0, 80))
        elif shape == 1:
            numbers = [rng.choice([0, 1, 257, 258, 65535, 2**32 - 1]) for _ in range(4)]
            data = wire.REQUEST.pack(
                op, rng.randrange(25), rng.randrange(25), 0, rng.randrange(9), numbers[0], numbers[1], -1,
                rng.randrange(3), rng.randrange(3), rng.randrange(3), rng.choice([0, 1, 2, 2**32 - 1]),
            ) + rng.randbytes(rng.choice([0, 16, 32, 40]))  # fmt: skip
        elif shape == 2:
            payload = rng.choice([b"[", b"{}", b'["names"]', b'["__init__", 1]', b'["destroy", "x", 0]', b"[" * 5000,
                                  b'["get_refs", 257, -1, 0]', b'["mod_refs", 257, 77, 1, 0]', b'["check_in", "", 0]',
                                  b'["set_attributes", 257, 1e999, 0]', b'["rename", 257, 99999999999, 0]',
                                  b'["allocate", 3, 0]', b'["request_notification", 257, 70, 0, 257, 99, 0]',
                                  b'["insert_right", -5, 257, 20, 0]', b'["extract_right", 257, 16, 0]'])  # fmt: skip
            data = wire.SHORT.pack(Op.CALL, 1) + payload
        else:
            data = b""
        if data[:1] == bytes([Op.BYE]):
            continue
        peer.send(sock, data, *(rng.randbytes(rng.randrange(50)) for _ in range(rng.randrange(4))))
    sock.send(b"")
    sock.send(rng.randbytes(60))
    echo_works(world)
    assert wait_for(lambda: world.counters().get("frame dropped: not the connection's key") == 2)
    assert world.counters()["frame dropped: malformed"] > 20
    assert "task ended: internal error" not in world.counters()
    peer.end()
    assert wait_for(lambda: not world.call(lambda hub: hub._tasks))


def test_malformed_sends_get_a_code(world, peer):
    sock = peer.connect()
    assert peer.ask(sock, "allocate", 1) == 0
    cases = [
        (request(remote=257, nrights=3) + b"short", MachMsgReturn.MACH_SEND_MSG_TOO_SMALL),
        (request(remote=257, nool=2), MachMsgReturn.MACH_SEND_MSG_TOO_SMALL),
        (request(remote=257, nrights=2**31), MachMsgReturn.MACH_SEND_TOO_LARGE),
        (request(remote=257, nfds=65535), MachMsgReturn.MACH_SEND_TOO_LARGE),
        (request(remote=257, nfds=1, tag=77), MachMsgReturn.MACH_SEND_INVALID_DATA),
        (request(remote=257, rdisp=19), MachMsgReturn.MACH_SEND_INVALID_DEST),
        (request(remote=257, rdisp=77), MachMsgReturn.MACH_SEND_INVALID_TYPE),
        (request(remote=257) + bytes((1 << 20) + 1), MachMsgReturn.MACH_SEND_TOO_LARGE),
    ]
    for data, code in cases:
        peer.send(sock, data)
        assert status(sock) == code


def test_a_frame_beyond_the_largest_message_cuts_the_connection_only(tmp_path):
    world = World(str(tmp_path / "hub"), limits=Limits(message_bytes=1 << 20))
    try:
        with Task(world.path) as task:
            echo = task.look_up(ECHO)
            peer = Peer(world.path)
            sock = peer.connect()
            peer.send(sock, request(remote=257) + bytes(2 << 20))
            with pytest.raises(zmq.Again):
                sock.setsockopt(zmq.RCVTIMEO, 200)
                sock.recv()
            assert task.rpc(echo, 1, timeout=5).id == 101
            peer.end()
            with pytest.raises(MachError) as caught:
                task.rpc(echo, 1, ool=[bytes(600_000), bytes(600_000)], timeout=5)
            assert caught.value.code == MachMsgReturn.MACH_SEND_TOO_LARGE
    finally:
        world.end()


def test_a_million_buffers_are_dropped(world, peer):
    sock = peer.connect()
    assert peer.ask(sock, "allocate", 1) == 0
    peer.send(sock, request(remote=257, nool=20_000), *[b"x"] * 20_000)
    assert status(sock) == MachMsgReturn.MACH_SEND_TOO_LARGE


def test_what_a_task_makes_the_hub_hold_is_bounded(tmp_path):
    limits = Limits(names_per_task=50, held_bytes_per_task=1 << 20, held_fds_per_task=8, bootstrap_names=10, tasks=3)
    world = World(str(tmp_path / "hub"), limits=limits)
    task, other = world.task(), world.task()
    try:
        port = task.allocate()
        task.insert_right(port, port, MsgType.MAKE_SEND)
        code(MachMsgReturn.MACH_SEND_NO_BUFFER, lambda: [task.send(port, 1, ool=[bytes(400_000)]) for _ in range(3)])
        files = task.allocate()
        code(MachMsgReturn.MACH_SEND_NO_BUFFER, lambda: [task.send(files, 1, fds=[0, 1, 2]) for _ in range(4)])
        code(KernReturn.KERN_NO_SPACE, lambda: [task.allocate() for _ in range(60)])
        with pytest.raises(MachError, match="BOOTSTRAP_NO_MEMORY"):
            for number in range(20):
                other.look_up(f"test.squat.{number}")
        world.task()
        with pytest.raises(OSError, match="too many tasks"):
            Task(world.path)
        assert world.counters()["task refused: too many"] == 1
    finally:
        world.end()


def code(expected, call):
    with pytest.raises(MachError) as caught:
        call()
    assert caught.value.code == expected


def test_stray_descriptors_are_closed(world, peer):
    before = len(os.listdir("/proc/self/fd"))
    for tag in (0, 1, 1, 2):
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))]
        peer.side.sendmsg([struct.pack("<Q", tag)], ancillary)
    peer.side.send(b"rubbish that is no tag")
    assert wait_for(lambda: world.counters().get("descriptors dropped") == 4)  # tag 0, and tag 1 again
    assert len(os.listdir("/proc/self/fd")) == before + 4
    peer.end()
    assert wait_for(lambda: len(os.listdir("/proc/self/fd")) < before)


def test_a_peer_that_never_reads_hurts_only_itself(world, peer):
    sock = peer.connect()
    assert peer.ask(sock, "allocate", 1) == 0
    for number in range(20_000):
        peer.send(sock, wire.SHORT.pack(Op.CALL, number) + b'["names", 0]')
        if number % 5000 == 0:
            echo_works(world)
    echo_works(world)


def test_requests_behind_a_blocked_one_are_bounded(world, peer):
    sock = peer.connect()
    assert peer.ask(sock, "allocate", 1) == 0
    for number in range(400):
        peer.send(sock, request(op=Op.POST, remote=257, rdisp=MsgType.MAKE_SEND, seq=number))
    assert wait_for(lambda: world.counters().get("request dropped: too many outstanding", 0) > 100)


def test_rights_nested_in_messages_as_deep_as_one_likes(world):
    """Each port's receive right lies in the next one's queue: destroying the outermost must not recurse."""
    task = world.task()
    receiver = world.task()
    receiver.allocate()
    ports = [task.allocate() for _ in range(600)]
    refusals = 0
    for inner, outer in zip(ports, ports[1:], strict=False):
        try:
            task.send(outer, 1, rights=[PortRight(inner, MsgType.MOVE_RECEIVE)], timeout=5)
        except MachError:
            refusals += 1
    task.destroy(ports[-1])
    task.allocate()
    task.close()
    assert wait_for(lambda: world.call(lambda hub: len(hub._tasks)) == 1)


def test_nested_rights_pushed_and_never_taken_are_recalled_without_recursion(world):
    a, b = world.task(), world.task()
    outer = b.check_in("test.nest")
    with pytest.raises(MachError):
        b.receive(outer, 0)
    send = a.look_up("test.nest")
    for _ in range(1500):
        port = a.allocate()
        a.insert_right(port, port, MsgType.MAKE_SEND)
        a.send(send, 1, rights=[PortRight(port, MsgType.MOVE_RECEIVE)], timeout=5)
        a.deallocate(send)
        send = port
    b.close()  # the chain unwinds in the hub
    assert wait_for(lambda: len(world.call(lambda hub: hub.tasks())) == 1)
    a.close()
    assert wait_for(lambda: len(world.call(lambda hub: hub.tasks())) == 0)


def test_a_program_cannot_fill_the_hub_with_notifications_to_itself(tmp_path):
    world = World(str(tmp_path / "hub"), limits=Limits(notifications_per_port=50, held_bytes_per_task=1 << 20))
    try:
        task = world.task()
        port = task.allocate()
        for _ in range(60):
            task.deallocate(task.extract_right(port, MsgType.MAKE_SEND_ONCE))
        assert task.get_attributes(port).msgcount == 50
        assert world.counters()["notification dropped: receiver does not read"] == 10
        other = task.allocate()
        once = MsgType.MAKE_SEND_ONCE
        with pytest.raises(MachError) as caught:  # send-once rights pass the queue limit, but not this one
            for _ in range(1100):
                task.send(other, 1, remote_disposition=once)
        assert caught.value.code == MachMsgReturn.MACH_SEND_NO_BUFFER
    finally:
        world.end()


def test_a_hole_in_the_checks_costs_only_the_peer_that_found_it(world, peer, monkeypatch):
    from ulnet.ipc import remote

    monkeypatch.setattr(remote.RemoteTask, "taken", lambda self, name, serial: 1 // 0)
    sock = peer.connect()
    peer.send(sock, wire.TAKEN.pack(Op.TAKEN, 1, 1))
    assert wait_for(lambda: [s.task for s in world.dead] == [peer.task_id])
    assert world.counters()["task ended: internal error"] == 1


def test_tasks_that_come_and_go_quickly(world):
    before = len(os.listdir("/proc/self/fd"))
    begun = time.monotonic()
    for _ in range(50):
        peer = Peer(world.path)
        peer.connect()
        peer.end()
    assert wait_for(lambda: not world.call(lambda hub: hub._tasks))
    assert wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)
    assert time.monotonic() - begun < 20
