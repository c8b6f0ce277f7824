"""Mach semantics of names, rights, queues and notifications between tasks of one hub."""

import os
import select
import struct
import threading
import time

import pytest
from ipc_world import ECHO, World, at_end, wait_for

from ulnet.ipc import (
    PORT_DEAD,
    PORT_NULL,
    BootstrapReturn,
    KernReturn,
    MachError,
    MachMsgReturn,
    Message,
    MigReturn,
    MsgOption,
    MsgType,
    Notify,
    PortRight,
    Right,
    RightSet,
    Task,
)


@pytest.fixture
def world(tmp_path):
    world = World(str(tmp_path / "hub"))
    yield world
    world.end()


@pytest.fixture
def pair(world):
    """Tasks a and b, a's send right to b, b's receive right."""
    a, b = world.task(), world.task()
    inbox = b.check_in("test.inbox")
    return a, b, a.look_up("test.inbox"), inbox


def refused(code, call, *arguments, **options):
    with pytest.raises(MachError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    return caught.value


def give(a, b, to_b, inbox, name, disposition):
    """a sends a right to b; b's name for it."""
    a.send(to_b, 1, rights=[PortRight(name, disposition)], timeout=2)
    return b.receive(inbox, 2).rights[0].name


# -- messages ---------------------------------------------------------------------------------------------------------


def test_rpc_returns_inline_memory_and_descriptors(world):
    task = world.task()
    echo = task.look_up(ECHO)
    read, write = os.pipe()
    reply = task.rpc(echo, 7, b"hello", ool=[b"a" * 10, bytearray(100_000), memoryview(b"")], fds=[write], timeout=5)
    assert (reply.id, reply.inline, reply.sender.pid) == (107, b"hello", os.getpid())
    assert [len(b) for b in reply.ool] == [10, 100_000, 0] and bytes(reply.ool[0]) == b"a" * 10
    (got,) = reply.take_fds()
    os.write(got, b"x")
    assert os.read(read, 1) == b"x"
    os.close(got)
    os.close(write)
    os.set_blocking(read, False)
    assert wait_for(lambda: at_end(read))  # nobody else holds the write end any more
    os.close(read)


def test_descriptors_not_taken_are_closed_with_the_message(world):
    task = world.task()
    echo = task.look_up(ECHO)
    task.rpc(echo, 1, fds=[0], timeout=5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        task.rpc(echo, 1, fds=[0, 1], timeout=5)
    assert wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_one_way_messages_keep_their_order(pair):
    a, b, to_b, inbox = pair
    b.set_attributes(inbox, 1024)
    for number in range(300):
        (a.send if number % 50 == 49 else a.post)(to_b, number)
    assert [b.receive(inbox, 2).id for _ in range(300)] == list(range(300))
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, b.receive, inbox, 0.05)


def test_message_fields_are_swapped_on_receipt_and_reply_goes_back(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    a.msg(Message(remote=to_b, local=mine, id=5, inline=b"q"), MsgOption.SEND, 2)
    message = b.msg(Message(), MsgOption.RCV, 2, inbox)
    assert message.local == inbox and b.type(message.remote) == RightSet.SEND_ONCE
    b.reply(message, b"r")
    answer = a.receive(mine, 2)
    assert (answer.id, answer.inline, answer.local, answer.remote) == (105, b"r", mine, PORT_NULL)


def test_msg_does_not_receive_when_its_send_failed(pair):
    a, _, _, _ = pair
    mine = a.allocate()
    message = Message(remote=999, local=mine)
    both = MsgOption.SEND | MsgOption.RCV
    refused(MachMsgReturn.MACH_SEND_INVALID_DEST, a.msg, message, both, None, mine)


def test_remote_to_remote_rpc(pair):
    a, b, to_b, inbox = pair
    b.start_receiver(lambda message, sender: b.reply(message, message.inline.upper()), [inbox])
    assert a.rpc(to_b, 1, b"abc", timeout=5).inline == b"ABC"


# -- names and references ---------------------------------------------------------------------------------------------


def test_references_are_counted(world):
    task = world.task()
    port = task.allocate()
    assert task.type(port) == RightSet.RECEIVE and task.get_refs(port, Right.SEND) == 0
    task.insert_right(port, port, MsgType.MAKE_SEND)
    task.insert_right(port, port, MsgType.MAKE_SEND)
    assert task.type(port) == RightSet.RECEIVE | RightSet.SEND and task.get_refs(port, Right.SEND) == 2
    assert task.get_attributes(port).mscount == 2
    task.mod_refs(port, Right.SEND, 3)
    assert task.get_refs(port, Right.SEND) == 5
    refused(KernReturn.KERN_INVALID_VALUE, task.mod_refs, port, Right.SEND, -6)
    task.mod_refs(port, Right.SEND, -4)
    task.deallocate(port)
    assert task.type(port) == RightSet.RECEIVE
    refused(KernReturn.KERN_INVALID_RIGHT, task.deallocate, port)
    task.mod_refs(port, Right.RECEIVE, -1)
    refused(KernReturn.KERN_INVALID_NAME, task.type, port)
    assert port not in task.names()


def test_send_and_receive_share_a_name_and_send_once_has_its_own(world):
    task = world.task()
    port = task.allocate()
    assert task.extract_right(port, MsgType.MAKE_SEND) == port
    once = task.extract_right(port, MsgType.MAKE_SEND_ONCE)
    other = task.extract_right(port, MsgType.MAKE_SEND_ONCE)
    assert len({port, once, other}) == 3 and task.names()[once] == RightSet.SEND_ONCE
    status = task.get_attributes(port)
    assert status.sorights and status.srights and status.qlimit == 5


def test_rename_and_bad_arguments(world):
    task = world.task()
    port = task.allocate()
    task.rename(port, 7777)
    assert task.names() == {7777: RightSet.RECEIVE}
    refused(KernReturn.KERN_INVALID_VALUE, task.rename, 7777, PORT_NULL)
    refused(KernReturn.KERN_INVALID_VALUE, task.set_attributes, 7777, 1025)
    refused(KernReturn.KERN_INVALID_VALUE, task.allocate, Right.SEND)
    refused(KernReturn.KERN_INVALID_NAME, task.destroy, 1)
    refused(MachMsgReturn.MACH_RCV_INVALID_NAME, task.receive, task.look_up(ECHO), 0)


# -- rights in messages -----------------------------------------------------------------------------------------------


def test_a_send_right_received_twice_is_one_name_with_two_references(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    first = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    second = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    assert first == second and b.get_refs(first, Right.SEND) == 2
    b.send(first, 42, timeout=2)
    assert a.receive(mine, 2).id == 42


def test_a_right_sent_home_merges_with_the_receive_right(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    at_b = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    b.send(at_b, 1, rights=[PortRight(at_b, MsgType.COPY_SEND)], timeout=2)
    assert a.receive(mine, 2).rights == [PortRight(mine, MsgType.PORT_SEND)]
    assert a.type(mine) == RightSet.RECEIVE | RightSet.SEND


def test_a_moving_receive_right_takes_its_queue_along_in_order(pair, world):
    a, b, to_b, inbox = pair
    c = world.task()
    mine = a.allocate()
    a.register("test.moving", mine)
    to_mine = c.look_up("test.moving")
    for number in range(5):
        c.send(to_mine, number, rights=[PortRight(to_mine, MsgType.COPY_SEND)], timeout=2)
    assert a.receive(mine, 2).id == 0  # the others have been pushed to a as well, but nobody took them
    moved = give(a, b, to_b, inbox, mine, MsgType.MOVE_RECEIVE)
    assert b.type(moved) & RightSet.RECEIVE
    c.send(to_mine, 5, timeout=2)
    got = [b.receive(moved, 2) for _ in range(5)]
    assert [m.id for m in got] == [1, 2, 3, 4, 5]
    assert all(m.rights[0].name == moved for m in got[:4])  # names of b's space, not of a's
    with pytest.raises(MachError):
        a.receive(mine, 0.1)
    # And home again, with what came meanwhile.
    back = a.allocate()
    a.insert_right(back, back, MsgType.MAKE_SEND)
    to_a = give(a, b, to_b, inbox, back, MsgType.COPY_SEND)
    c.send(to_mine, 6, timeout=2)
    b.send(to_a, 0, rights=[PortRight(moved, MsgType.MOVE_RECEIVE)], timeout=2)
    home = a.receive(back, 2).rights[0].name
    assert a.receive(home, 2).id == 6


def test_a_send_once_right_yields_exactly_one_message(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    once = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND_ONCE)
    b.send(once, 3, timeout=2)
    assert a.receive(mine, 2).id == 3
    refused(MachMsgReturn.MACH_SEND_INVALID_DEST, b.send, once, 4)
    dropped = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND_ONCE)
    b.deallocate(dropped)
    assert a.receive(mine, 2).id == Notify.SEND_ONCE
    assert wait_for(lambda: not a.get_attributes(mine).sorights)


def test_rpc_ends_when_the_reply_right_is_destroyed(pair):
    a, b, to_b, inbox = pair
    b.start_receiver(lambda message, sender: b.deallocate(message.remote), [inbox])
    refused(MigReturn.SERVER_DIED, a.rpc, to_b, 1, timeout=5)


def test_a_refused_send_leaves_every_right_where_it_was(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    a.insert_right(mine, mine, MsgType.MAKE_SEND)
    a.send(mine, 7)
    assert a.receive(mine, 2).id == 7
    bad = PortRight(4242, MsgType.COPY_SEND)
    rights = [PortRight(mine, MsgType.MOVE_SEND), PortRight(mine, MsgType.MOVE_RECEIVE), bad]
    refused(MachMsgReturn.MACH_SEND_INVALID_RIGHT, a.send, to_b, 1, rights=rights)
    assert a.type(mine) == RightSet.RECEIVE | RightSet.SEND
    twice = [PortRight(mine, MsgType.MOVE_SEND)] * 2
    refused(MachMsgReturn.MACH_SEND_INVALID_RIGHT, a.send, to_b, 1, rights=twice)
    refused(MachMsgReturn.MACH_SEND_INVALID_TYPE, a.send, to_b, 1, rights=[PortRight(mine, 99)])
    refused(MachMsgReturn.MACH_SEND_INVALID_REPLY, a.send, to_b, 1, local=4242)
    assert a.get_refs(mine, Right.SEND) == 1
    a.send(mine, 8, timeout=2)  # its queue still works after the failed move
    assert a.receive(mine, 2).id == 8
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, b.receive, inbox, 0)


def test_a_receive_right_cannot_be_sent_to_itself(pair):
    a, *_ = pair
    mine = a.allocate()
    a.insert_right(mine, mine, MsgType.MAKE_SEND)
    error = MachMsgReturn.MACH_SEND_INVALID_RIGHT
    refused(error, a.send, mine, 1, rights=[PortRight(mine, MsgType.MOVE_RECEIVE)])
    # Nor by way of another port.
    other = a.allocate()
    a.insert_right(other, other, MsgType.MAKE_SEND)
    a.send(mine, 1, rights=[PortRight(other, MsgType.MOVE_RECEIVE)])
    refused(error, a.send, other, 1, rights=[PortRight(mine, MsgType.MOVE_RECEIVE)])


def test_a_right_whose_port_dies_on_the_way_arrives_dead(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    # b does not receive yet, so that nothing is copied out before the port dies.
    a.send(to_b, 1, rights=[PortRight(mine, MsgType.MAKE_SEND)])
    a.destroy(mine)
    assert b.receive(inbox, 2).rights == [PortRight(PORT_DEAD, MsgType.PORT_SEND)]


# -- death and notifications ------------------------------------------------------------------------------------------


def test_rights_to_a_dead_port_become_dead_names_with_their_references(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    at_b = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    once = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND_ONCE)
    note = b.allocate()
    assert b.request_notification(at_b, Notify.DEAD_NAME, 0, note) == PORT_NULL
    a.destroy(mine)
    assert b.type(at_b) == RightSet.DEAD_NAME and b.type(once) == RightSet.DEAD_NAME
    message = b.receive(note, 2)
    assert message.id == Notify.DEAD_NAME and struct.unpack("<I", message.inline)[0] == at_b
    assert b.get_refs(at_b, Right.DEAD_NAME) == 3  # two, and one from the notification
    refused(MachMsgReturn.MACH_SEND_INVALID_DEST, b.send, at_b, 1)
    b.mod_refs(at_b, Right.DEAD_NAME, -3)
    assert at_b not in b.names()


def test_a_notification_request_replaces_the_previous_one(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    at_b = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND)
    first, second = b.allocate(), b.allocate()
    b.request_notification(at_b, Notify.DEAD_NAME, 0, first)
    previous = b.request_notification(at_b, Notify.DEAD_NAME, 0, second)
    assert b.type(previous) == RightSet.SEND_ONCE
    a.destroy(mine)
    assert b.receive(second, 2).id == Notify.DEAD_NAME
    b.deallocate(previous)
    assert b.receive(first, 2).id == Notify.SEND_ONCE
    refused(KernReturn.KERN_INVALID_ARGUMENT, b.request_notification, at_b, Notify.DEAD_NAME, 0, first)
    b.request_notification(at_b, Notify.DEAD_NAME, 1, first)  # sync: tell at once
    assert b.receive(first, 2).id == Notify.DEAD_NAME


def test_no_senders_carries_the_make_send_count_and_sync_removes_the_race(pair):
    a, b, to_b, inbox = pair
    mine, note = a.allocate(), a.allocate()
    a.request_notification(mine, Notify.NO_SENDERS, 1, note)
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, a.receive, note, 0.05)  # the count has not reached sync
    a.send(to_b, 1, rights=[PortRight(mine, MsgType.MAKE_SEND)])
    at_b = b.receive(inbox, 2).rights[0].name
    b.deallocate(at_b)
    message = a.receive(note, 2)
    assert message.id == Notify.NO_SENDERS and struct.unpack("<I", message.inline)[0] == 1
    a.request_notification(mine, Notify.NO_SENDERS, 1, note)  # none there, and count 1 has been reached: at once
    assert a.receive(note, 2).id == Notify.NO_SENDERS


def test_rights_in_queued_messages_count_as_senders(pair):
    a, b, to_b, inbox = pair
    mine, note = a.allocate(), a.allocate()
    a.request_notification(mine, Notify.NO_SENDERS, 1, note)
    a.send(to_b, 1, rights=[PortRight(mine, MsgType.MAKE_SEND)])
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, a.receive, note, 0.05)
    b.destroy(inbox)  # the message dies with the right in it
    assert a.receive(note, 2).id == Notify.NO_SENDERS


def test_port_destroyed_gives_the_receive_right_back(pair):
    a, b, to_b, inbox = pair
    mine, note = a.allocate(), a.allocate()
    a.request_notification(mine, Notify.PORT_DESTROYED, 0, note)
    a.insert_right(mine, mine, MsgType.MAKE_SEND)
    a.send(mine, 77)
    moved = give(a, b, to_b, inbox, mine, MsgType.MOVE_RECEIVE)
    b.destroy(moved)
    message = a.receive(note, 2)
    assert message.id == Notify.PORT_DESTROYED and message.rights == [PortRight(mine, MsgType.PORT_RECEIVE)]
    assert a.receive(mine, 2).id == 77


def test_closing_a_task_destroys_its_rights(pair, world):
    a, b, to_b, inbox = pair
    note = a.allocate()
    a.request_notification(to_b, Notify.DEAD_NAME, 0, note)
    b.close()
    assert a.receive(note, 2).id == Notify.DEAD_NAME
    assert wait_for(lambda: [s.task for s in world.dead] == [b.task_id])


# -- queue limit ------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_after_the_time_and_moves_nothing(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    a.insert_right(mine, mine, MsgType.MAKE_SEND)
    for number in range(5):
        a.send(to_b, number, timeout=2)
    begun = time.monotonic()
    rights = [PortRight(mine, MsgType.MOVE_SEND)]
    refused(MachMsgReturn.MACH_SEND_TIMED_OUT, a.send, to_b, 5, rights=rights, fds=[0], timeout=0.1)
    assert 0.09 < time.monotonic() - begun < 1
    refused(MachMsgReturn.MACH_SEND_TIMED_OUT, a.rpc, to_b, 6, timeout=0.05)
    assert a.get_refs(mine, Right.SEND) == 1
    assert b.get_attributes(inbox).msgcount == 5
    assert [b.receive(inbox, 2).id for _ in range(5)] == [0, 1, 2, 3, 4]
    a.send(to_b, 7, timeout=2)
    assert b.receive(inbox, 2).id == 7


def test_the_limit_also_counts_messages_pushed_but_not_taken(pair):
    a, b, to_b, inbox = pair
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, b.receive, inbox, 0)  # b has its receiver now: messages are pushed
    for number in range(5):
        a.send(to_b, number, timeout=2)
    refused(MachMsgReturn.MACH_SEND_TIMED_OUT, a.send, to_b, 5, timeout=0.05)
    assert b.receive(inbox, 2).id == 0
    a.send(to_b, 6, timeout=2)
    refused(MachMsgReturn.MACH_SEND_TIMED_OUT, a.send, to_b, 7, timeout=0.05)
    b.set_attributes(inbox, 6)
    a.send(to_b, 8, timeout=2)


def test_blocked_senders_go_on_in_their_order_when_there_is_room(pair, world):
    a, b, to_b, inbox = pair
    b.set_attributes(inbox, 1)
    a.send(to_b, 0)
    done = []

    def sender(first):
        task = world.task()
        right = task.look_up("test.inbox")
        for number in range(first, first + 3):
            task.send(right, number)
            done.append(number)

    threads = [threading.Thread(target=sender, args=(first,)) for first in (10, 20)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert done == []
    got = [b.receive(inbox, 2).id for _ in range(7)]
    for thread in threads:
        thread.join(5)
    assert [n for n in got if 10 <= n < 20] == [10, 11, 12] and [n for n in got if n >= 20] == [20, 21, 22]


def test_a_send_once_right_needs_no_room(pair):
    a, b, to_b, inbox = pair
    mine = a.allocate()
    once = give(a, b, to_b, inbox, mine, MsgType.MAKE_SEND_ONCE)
    a.insert_right(mine, mine, MsgType.MAKE_SEND)
    for number in range(5):
        a.send(mine, number, timeout=2)
    b.send(once, 99, timeout=1)
    assert [a.receive(mine, 2).id for _ in range(6)] == [0, 1, 2, 3, 4, 99]


def test_posts_block_when_their_window_is_full_and_refusals_are_counted(pair):
    a, b, to_b, inbox = pair
    posted = []

    def flood():
        for number in range(200):
            a.post(to_b, number)
            posted.append(number)

    thread = threading.Thread(target=flood)
    thread.start()
    time.sleep(0.2)
    assert 60 <= len(posted) < 80
    assert [b.receive(inbox, 2).id for _ in range(200)] == list(range(200))
    thread.join(5)
    for _ in range(64):
        a.post(31337, 1)
    a.send(to_b, 1, timeout=2)
    assert a.posts_refused() >= 32


def test_a_blocked_sender_learns_that_the_port_died(pair):
    a, b, to_b, inbox = pair
    for number in range(5):
        a.send(to_b, number)
    codes = []
    invalid = MachMsgReturn.MACH_SEND_INVALID_DEST
    thread = threading.Thread(target=lambda: codes.append(refused(invalid, a.send, to_b, 6)))
    thread.start()
    time.sleep(0.1)
    b.destroy(inbox)
    thread.join(5)
    assert len(codes) == 1


# -- time-outs, threads, receivers ------------------------------------------------------------------------------------


def test_rpc_time_out_and_late_reply(pair):
    a, b, to_b, inbox = pair
    refused(MachMsgReturn.MACH_RCV_TIMED_OUT, a.rpc, to_b, 1, timeout=0.05)
    late = b.receive(inbox, 2)
    b.reply(late, b"too late")
    assert b.counters["reply dropped: caller is gone"] == 1
    b.start_receiver(lambda message, sender: b.reply(message, b"in time"), [inbox])
    assert a.rpc(to_b, 2, timeout=2).inline == b"in time"


def test_each_thread_gets_its_own_replies(world):
    task = world.task()
    echo = task.look_up(ECHO)
    wrong = []

    def work(number):
        for turn in range(40):
            body = b"%d %d" % (number, turn)
            if task.rpc(echo, turn, body, timeout=10).inline != body:
                wrong.append(body)

    for _ in range(2):  # the second set of threads takes over the connections of the first
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert wrong == []
    assert len(task._channels) <= 9


def test_several_threads_receive_from_different_ports(pair):
    a, b, to_b, inbox = pair
    other = b.allocate()
    b.register("test.other", other)
    to_other = a.look_up("test.other")
    got = {}

    def receive(name):
        got[name] = b.receive(name, 5).id

    threads = [threading.Thread(target=receive, args=(name,)) for name in (inbox, other)]
    for thread in threads:
        thread.start()
    a.send(to_other, 2)
    a.send(to_b, 1)
    for thread in threads:
        thread.join(5)
    assert got == {inbox: 1, other: 2}


def test_drain_in_a_loop_of_ones_own(pair):
    a, b, to_b, inbox = pair
    got = []
    poll = select.poll()
    poll.register(b.fileno(), select.POLLIN)
    a.send(to_b, 1)
    while len(got) < 3:
        assert poll.poll(2000)
        if b.drain(lambda message, sender: got.append((message.id, sender.task))):
            a.send(to_b, len(got) + 1)
    assert got == [(n, a.task_id) for n in (1, 2, 3)]
    time.sleep(0.05)
    b.drain(lambda message, sender: None)
    assert poll.poll(50) == []


def test_receiver_thread_survives_a_handler_that_raises(pair):
    a, b, to_b, inbox = pair
    got = []

    def handler(message, sender):
        got.append(message.id)
        if message.id == 1:
            raise ValueError("on purpose")

    b.start_receiver(handler)
    a.send(to_b, 1)
    a.send(to_b, 2)
    assert wait_for(lambda: got == [1, 2])
    assert b.counters["handler failed"] == 1


# -- bootstrap --------------------------------------------------------------------------------------------------------


def test_look_up_before_check_in_queues_the_requests(world):
    client, server = world.task(), world.task()
    right = client.look_up("test.later")
    client.send(right, 11, timeout=2)
    port = server.check_in("test.later")
    assert server.receive(port, 2).id == 11
    refused(BootstrapReturn.BOOTSTRAP_SERVICE_ACTIVE, client.check_in, "test.later")
    server.close()
    assert wait_for(lambda: client.type(right) == RightSet.DEAD_NAME)
    assert client.type(client.check_in("test.later")) & RightSet.RECEIVE


def test_register_publishes_and_withdraws(pair):
    a, b, _, _ = pair
    port = b.allocate()
    b.register("test.published", port)
    refused(BootstrapReturn.BOOTSTRAP_NAME_IN_USE, a.register, "test.published", a.allocate())
    a.send(a.look_up("test.published"), 5)
    assert b.receive(port, 2).id == 5
    b.register("test.published", PORT_NULL)
    refused(BootstrapReturn.BOOTSTRAP_UNKNOWN_SERVICE, b.register, "test.published", PORT_NULL)
    refused(KernReturn.KERN_INVALID_ARGUMENT, a.look_up, "x" * 129)


# -- local task -------------------------------------------------------------------------------------------------------


def test_deferred_reply_and_messages_from_the_local_task(world):
    waiting = []

    def serve(hub):
        port = hub.local_task().check_in("test.slow")
        hub.serve(port, lambda message, sender: waiting.append(message))

    world.call(serve)
    task = world.task()
    slow = task.look_up("test.slow")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(task.rpc(slow, 1, timeout=5)))
    thread.start()
    assert wait_for(lambda: waiting)
    assert not answers
    world.call(lambda hub: hub.local_task().reply(waiting[0], b"now"))
    thread.join(5)
    assert answers[0].inline == b"now"
    mine = task.allocate()
    task.register("test.mine", mine)
    world.call(lambda hub: hub.local_task().send(hub.local_task().look_up("test.mine"), 9, fds=[0]))
    message = task.receive(mine, 2)
    assert message.id == 9 and message.sender.task == 0 and len(message.fds) == 1
    message.close()


def test_a_failing_handler_ends_the_rpc_and_not_the_server(world):
    def serve(hub):
        port = hub.local_task().check_in("test.bug")
        hub.serve(port, lambda message, sender: 1 // 0)

    world.call(serve)
    task = world.task()
    refused(MigReturn.SERVER_DIED, task.rpc, task.look_up("test.bug"), 1, timeout=5)
    assert world.counters()["handler failed"] == 1
    task.rpc(task.look_up(ECHO), 1, timeout=5)


def test_local_task_never_blocks(world):
    def check(hub):
        local = hub.local_task()
        port = local.allocate()
        for number in range(5):
            local.send(port, number)
        refused(MachMsgReturn.MACH_SEND_TIMED_OUT, local.send, port, 5)
        assert [local.receive(port).id for _ in range(5)] == [0, 1, 2, 3, 4]
        refused(MachMsgReturn.MACH_RCV_TIMED_OUT, local.receive, port, 1)

    world.call(check)


def test_nothing_is_left_in_the_hub(world):
    task = Task(world.path)
    echo = task.look_up(ECHO)
    before = world.call(lambda hub: len(hub.local_task().names()))
    for _ in range(30):
        task.rpc(echo, 1, bytes(1000), ool=[bytes(1000)], fds=[0], timeout=5)
    assert set(task.names()) == {echo}
    assert world.call(lambda hub: len(hub.local_task().names())) == before
    held = world.call(lambda hub: [(t.space.held_bytes, t.space.held_fds, t.side_count) for t in hub._tasks.values()])
    assert held == [(0, 0, 0)]
    task.close()
    assert wait_for(lambda: not world.call(lambda hub: hub._tasks or hub._conns or hub._tokens))
