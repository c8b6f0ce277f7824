"""Ports between real processes: transfer, death of tasks and hubs, fork, credentials, errors of set-up."""

import os
import resource
import signal
import stat
import threading
import time

import pytest
from ipc_world import ECHO, Program, World, at_end, wait_for

from ulnet.ipc import Hub, MachError, MachMsgReturn, MigReturn, MsgType, Notify, PortRight, Right, RightSet, Task

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
NOBODY = 65534


@pytest.fixture
def world(tmp_path):
    world = World(str(tmp_path / "hub"))
    yield world
    world.end()


@pytest.fixture
def open_world(tmp_path):
    """A hub that any user may reach."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    world = World(str(tmp_path / "hub"), mode=0o666)
    yield world
    world.end()


def test_eight_mebibytes_out_of_line_there_and_back(world):
    program = world.spawn("""
with Task(PATH) as task:
    echo = task.look_up("test.echo")
    block = os.urandom(8 << 20)
    reply = task.rpc(echo, 1, ool=[block], timeout=20)
    say(bytes(reply.ool[0]) == block, reply.sender.pid == os.getppid())
""")
    assert program.hear() == "True True"


def test_rights_move_between_three_processes(world):
    holder = world.spawn("""
task = Task(PATH)
inbox = task.check_in("test.holder")
say("ready")
right = task.receive(inbox, 10).rights[0]
say(right.disposition.name if right.disposition != 16 else "PORT_RECEIVE")
say([task.receive(right.name, 10).inline for _ in range(4)])
once = task.receive(inbox, 10).rights[0].name
task.send(once, 9, b"once")
say(code_of(task.send, once, 9, b"twice"))
""")
    assert holder.hear() == "ready"
    sender = world.spawn("""
task = Task(PATH)
out = task.look_up("test.mover")
for n in range(4):
    task.send(out, n, b"%d" % n)
say("sent")
hear()
""")
    task = world.task()
    moving = task.check_in("test.mover")
    assert sender.hear() == "sent"
    out = task.look_up("test.holder")
    task.send(out, 1, rights=[PortRight(moving, MsgType.MOVE_RECEIVE)], timeout=5)
    assert holder.hear() in ("MOVE_RECEIVE", "PORT_RECEIVE")
    assert holder.hear() == "[b'0', b'1', b'2', b'3']"
    mine = task.allocate()
    task.send(out, 1, rights=[PortRight(mine, MsgType.MAKE_SEND_ONCE)], timeout=5)
    assert task.receive(mine, 5).inline == b"once"
    assert holder.hear() == "MACH_SEND_INVALID_DEST"


def test_descriptors_cross_from_process_to_process(world):
    program = world.spawn("""
task = Task(PATH)
inbox = task.check_in("test.files")
say("ready")
message = task.receive(inbox, 10)
for fd, word in zip(message.take_fds(), (b"one", b"two")):
    os.write(fd, word)
    os.close(fd)
hear()
""")
    assert program.hear() == "ready"
    task = world.task()
    (read1, write1), (read2, write2) = os.pipe(), os.pipe()
    task.post(task.look_up("test.files"), 1, fds=[write1, write2])
    os.close(write1)
    os.close(write2)
    assert [os.read(read1, 9), os.read(read2, 9)] == [b"one", b"two"]
    os.set_blocking(read1, False)
    assert wait_for(lambda: at_end(read1))
    os.close(read1)
    os.close(read2)


def test_a_task_dropped_in_a_cycle_is_collected_without_waiting(world):
    """As by an exception that is kept: its traceback holds the task, and the task's frames hold it."""
    program = world.spawn("""
import gc
def lose():
    task = Task(PATH)
    task.check_in("test.lost")
    cycle = [task]
    cycle.append(cycle)
lose()
gc.collect()
say("collected")
hear()
""")
    assert program.hear() == "collected"


def test_a_message_posted_just_before_the_end_arrives(world):
    task = world.task()
    inbox = task.check_in("test.last")
    task.set_attributes(inbox, 100)
    program = world.spawn("""
task = Task(PATH)
out = task.look_up("test.last")
for n in range(50):
    task.post(out, n, ool=[bytes(100_000)])
""")
    assert [task.receive(inbox, 10).id for _ in range(50)] == list(range(50))
    assert program.process.wait(10) == 0


def test_sigkill_destroys_the_rights_of_a_task_promptly(world):
    victim = world.spawn("""
task = Task(PATH)
inbox = task.check_in("test.victim")
message = task.receive(inbox, 10)      # holds its reply right and a send-once right, never answers
say("holding")
time.sleep(60)
""")
    task = world.task()
    to_victim = task.look_up("test.victim")
    mine, note = task.allocate(), task.allocate()
    ends = []

    def call():
        try:
            task.rpc(to_victim, 1, rights=[PortRight(mine, MsgType.MAKE_SEND_ONCE)], timeout=20)
        except MachError as error:
            ends.append((error.code, time.monotonic()))

    thread = threading.Thread(target=call)
    thread.start()
    assert victim.hear() == "holding"
    task.request_notification(to_victim, Notify.DEAD_NAME, 0, note)
    task.insert_right(mine, mine, MsgType.MAKE_SEND)
    killed = time.monotonic()
    victim.kill()
    thread.join(5)
    assert ends[0][0] == MigReturn.SERVER_DIED and ends[0][1] - killed < 1
    assert task.receive(mine, 2).id == Notify.SEND_ONCE
    assert task.receive(note, 2).id == Notify.DEAD_NAME
    assert task.type(to_victim) == RightSet.DEAD_NAME
    assert wait_for(lambda: [s.pid for s in world.dead] == [victim.process.pid])
    assert time.monotonic() - killed < 2


def test_death_is_noticed_although_a_child_keeps_the_side_channel_open(world):
    victim = world.spawn("""
task = Task(PATH)
os.set_inheritable(task._side.fileno(), True)
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False, stdout=2)
say(child.pid)
time.sleep(60)
""")
    child = int(victim.hear())
    try:
        victim.kill()
        assert wait_for(lambda: [s.pid for s in world.dead] == [victim.process.pid], 2)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_task_cannot_be_used_after_fork_but_the_parent_goes_on(world):
    task = world.task()
    echo = task.look_up(ECHO)
    program = world.spawn("""
task = Task(PATH)
echo = task.look_up("test.echo")
task.rpc(echo, 1)
pid = os.fork()
if pid == 0:
    try:
        task.rpc(echo, 2)
    except RuntimeError as error:
        say("child:", "forked child makes its own" in str(error))
    with Task(PATH) as own:
        say("child:", own.rpc(own.look_up("test.echo"), 3, b"own", timeout=5).inline)
    os._exit(0)
os.waitpid(pid, 0)
say("parent:", task.rpc(echo, 4, b"still", timeout=5).inline)
""")
    assert [program.hear() for _ in range(3)] == ["child: True", "child: b'own'", "parent: b'still'"]
    assert task.rpc(echo, 1, timeout=5).id == 101


SERVER = """
hub = Hub(PATH)
task = hub.local_task()
hub.serve(task.check_in("test.echo"), lambda m, s: task.reply(m, m.inline))
hub.serve(task.check_in("test.mute"), lambda m, s: None)
say("up")
while True:
    hub.poll(None)
"""


def test_the_hubs_death_ends_calls_promptly_and_a_new_hub_takes_the_path(tmp_path):
    path = str(tmp_path / "hub")
    server = Program(SERVER, path)
    died = threading.Event()
    try:
        assert server.hear() == "up"
        task = Task(path)
        task.on_server_death(died.set)
        task.start_receiver(lambda message, sender: None)
        mute, ends = task.look_up("test.mute"), []

        def call():
            with pytest.raises(MachError) as caught:
                task.rpc(mute, 1, timeout=20)
            ends.append((caught.value.code, time.monotonic()))

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.2)
        killed = time.monotonic()
        server.kill()
        thread.join(5)
        assert ends[0][0] == MigReturn.SERVER_DIED and ends[0][1] - killed < 1
        assert died.wait(2) and not task.alive
        with pytest.raises(MachError) as caught:
            task.rpc(mute, 1)
        assert caught.value.code == MigReturn.SERVER_DIED
        with pytest.raises(ConnectionRefusedError, match="gone.*hub"):
            Task(path)
        server.end()
        server = Program(SERVER, path)  # the dead one's files are replaced
        assert server.hear() == "up"
        with pytest.raises(MachError):
            task.rpc(mute, 1, timeout=2)  # the old task does not wake up at the new hub
        begun = time.monotonic()
        task.close()
        assert time.monotonic() - begun < 1.5
        with Task(path) as fresh:
            assert fresh.rpc(fresh.look_up(ECHO), 1, b"new", timeout=5).inline == b"new"
    finally:
        server.end()


def test_a_stopped_hub_ends_in_the_callers_time_out(tmp_path):
    server = Program(SERVER, str(tmp_path / "hub"))
    try:
        assert server.hear() == "up"
        with Task(tmp_path / "hub") as task:
            echo = task.look_up(ECHO)
            os.kill(server.process.pid, signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(MachError) as caught:
                task.rpc(echo, 1, timeout=0.2)
            assert caught.value.code == MachMsgReturn.MACH_RCV_TIMED_OUT and time.monotonic() - begun < 2
            os.kill(server.process.pid, signal.SIGCONT)
            assert task.rpc(echo, 2, b"again", timeout=5).inline == b"again"
    finally:
        server.end()


def test_closing_a_task_wakes_its_waiting_threads(world):
    task = world.task()
    port = task.allocate()
    ends = []

    def wait():
        try:
            task.receive(port)
        except MachError as error:
            ends.append(error.code)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    task.close()
    thread.join(3)
    assert ends == [MachMsgReturn.MACH_RCV_PORT_DIED]
    with pytest.raises(RuntimeError, match="closed"):
        task.allocate()


def test_nobody_uses_the_processor_when_idle(world):
    task = world.task()
    task.start_receiver(lambda message, sender: None)
    task.rpc(task.look_up(ECHO), 1, timeout=5)
    time.sleep(0.1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.02
    assert after.ru_nvcsw - before.ru_nvcsw < 20


# -- credentials ------------------------------------------------------------------------------------------------------


@ROOT_ONLY
def test_credentials_are_the_kernels(open_world):
    seen = []

    def serve(hub):
        local = hub.local_task()
        hub.serve(local.check_in("test.who"), lambda m, s: (seen.append(s), local.reply(m)))

    open_world.call(serve)
    program = open_world.spawn(f"""
os.setgid({NOBODY}); os.setuid({NOBODY})
task = Task(PATH)
task.rpc(task.look_up("test.who"), 1, timeout=5)
say(code_of(task.check_in, "test.echo2"), code_of(task.register, "net.server", task.allocate()))
say(code_of(task.check_in, "user.{NOBODY}.mine"))
""")
    assert program.hear() == "BOOTSTRAP_NOT_PRIVILEGED BOOTSTRAP_NOT_PRIVILEGED"
    assert program.hear() == "ok"
    assert seen[0][1:] == (program.process.pid, NOBODY, NOBODY)


@ROOT_ONLY
def test_a_process_that_changes_its_user_loses_new_connections(open_world):
    program = open_world.spawn(f"""
task = Task(PATH)
os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    task.look_up("test.echo")
except PermissionError as error:
    say(error)
""")
    assert "refused this process" in program.hear()
    assert open_world.counters()["connection refused: other credentials"] == 1


@ROOT_ONLY
def test_a_user_without_permission_gets_one_clear_error(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    world = World(str(tmp_path / "hub"))
    try:
        assert stat.S_IMODE(os.stat(world.path).st_mode) == stat.S_IMODE(os.stat(world.path + ".fd").st_mode) == 0o600
        program = world.spawn(f"""
os.setgid({NOBODY}); os.setuid({NOBODY})
for call in (Task, Hub):
    try:
        call(PATH)
    except PermissionError as error:
        say(error)
""")
        assert f"no permission to use the hub: '{world.path}'" in program.hear()
        assert world.path in program.hear()
    finally:
        world.end()


# -- set-up errors ----------------------------------------------------------------------------------------------------


def test_errors_of_connecting_name_the_path(tmp_path):
    path = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"no hub serves this path: '{path}'"):
        Task(path)
    with pytest.raises(OSError, match="socket path longer than"):
        Task("/tmp/" + "x" * 110)


def test_errors_of_serving_name_the_path(world, tmp_path):
    with pytest.raises(OSError, match=f"already served at {world.path} by pid {os.getpid()}"):
        Hub(world.path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Hub(tmp_path / "nowhere" / "hub")
    plain = tmp_path / "plain"
    plain.write_text("keep me")
    with pytest.raises(FileExistsError, match="is not a socket: .*plain"):
        Hub(plain)
    assert plain.read_text() == "keep me"
    with pytest.raises(OSError, match="socket path longer than"):
        Hub("/tmp/" + "x" * 110)
    task = world.task()
    task.rpc(task.look_up(ECHO), 1, timeout=5)  # the living hub was not disturbed


def test_closing_a_hub_removes_its_files_and_ends_its_clients(tmp_path):
    path = tmp_path / "hub"
    with Hub(path):
        assert {p.name for p in tmp_path.iterdir()} == {"hub", "hub.fd"}
    assert list(tmp_path.iterdir()) == []
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Hub(path) as hub:
            hub.poll(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_disconnect_ends_a_task_as_if_it_had_died(world):
    task = world.task()
    echo = task.look_up(ECHO)
    world.call(lambda hub: hub.disconnect(task.task_id))
    # What the hub had already read may still be answered; after the death nothing is.
    assert wait_for(lambda: [s.task for s in world.dead] == [task.task_id])
    with pytest.raises(MachError) as caught:
        task.rpc(echo, 1, timeout=5)
    assert caught.value.code == MigReturn.SERVER_DIED


def test_references_survive_many_processes(world):
    """Tasks that come and go leave the others' rights alone."""
    task = world.task()
    echo = task.look_up(ECHO)
    for _ in range(20):
        with Task(world.path) as other:
            other.rpc(other.look_up(ECHO), 1, timeout=5)
    assert task.get_refs(echo, Right.SEND) == 1
    assert wait_for(lambda: len(world.call(lambda hub: hub.tasks())) == 1)
