"""Interfaces in the manner of MIG, and the examples of the package's documentation."""

import errno
import re
import threading

import pytest
from ipc_world import Program, World, wait_for

import ulnet.ipc
from ulnet.ipc import DEFERRED, MachError, MachMsgReturn, MigReturn, Subsystem


def interface():
    calc = Subsystem("calc", 5000)
    calc.routine("add")
    calc.skip()
    calc.routine("fail")
    calc.routine("later")
    calc.simpleroutine("note")
    return calc


@pytest.fixture
def world(tmp_path):
    world = World(str(tmp_path / "hub"))
    yield world
    world.end()


@pytest.fixture
def calc(world):
    """A client of a served interface; `world.notes` and `world.later` show what the server saw."""
    world.notes, world.later = [], []

    def fail(call, kind):
        if kind == "mach":
            raise MachError(MachMsgReturn.MACH_SEND_NO_BUFFER, "none left")
        if kind == "errno":
            raise OSError(errno.EADDRINUSE, "port 80 is taken")
        return {}[kind]

    functions = {
        "add": lambda call, a, b=1: a + b,
        "fail": fail,
        "later": lambda call: world.later.append(call) or DEFERRED,
        "note": lambda call, text: world.notes.append((text, call.sender.pid)),
    }

    def serve(hub):
        local = hub.local_task()
        hub.serve(local.check_in("test.calc"), interface().server(local, functions))

    world.call(serve)
    task = world.task()
    return interface().client(task, task.look_up("test.calc"))


def refused(code, call, *arguments, **options):
    with pytest.raises(MachError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    return caught.value


def test_ids_are_consecutive_and_bounded():
    calc = interface()
    assert calc.ids == {"add": 5000, "fail": 5002, "later": 5003, "note": 5004}
    with pytest.raises(ValueError, match="defined twice"):
        calc.routine("add")
    full = Subsystem("full", 1)
    for number in range(100):
        full.routine(str(number))
    with pytest.raises(ValueError, match="at most 100"):
        full.routine("one more")
    with pytest.raises(ValueError, match="no routine"):
        calc.server(None, {"nothing": print})


def test_values_and_errors_come_back_as_themselves(calc):
    assert calc.call("add", a=1, b=2, timeout=5).value == 3
    assert calc.call("add", a=1, timeout=5).value == 2
    assert refused(MachMsgReturn.MACH_SEND_NO_BUFFER, calc.call, "fail", kind="mach", timeout=5).what == "none left"
    with pytest.raises(OSError, match="port 80 is taken") as caught:
        calc.call("fail", kind="errno", timeout=5)
    assert caught.value.errno == errno.EADDRINUSE
    assert "KeyError" in refused(MigReturn.EXCEPTION, calc.call, "fail", kind="bug", timeout=5).what


def test_bad_requests_get_stub_errors(calc, world):
    refused(MigReturn.BAD_ARGUMENTS, calc.call, "add", timeout=5)
    refused(MigReturn.BAD_ARGUMENTS, calc.call, "add", a=1, c=2, timeout=5)
    code = ulnet.ipc.subsystem._CODE
    for body in (b"not json", b"[1]", b"[" * 100_000, b"\xff"):
        assert code.unpack_from(calc.task.rpc(calc.port, 5000, body, timeout=5).inline)[0] == MigReturn.BAD_ARGUMENTS
    assert code.unpack_from(calc.task.rpc(calc.port, 5001, b"{}", timeout=5).inline)[0] == MigReturn.BAD_ID
    with pytest.raises(ValueError, match="has a reply"):
        calc.post("add", a=1)
    assert calc.call("add", a=4, timeout=5).value == 5


def test_a_client_that_meets_another_interface_notices(calc, world):
    other = Subsystem("other", 1)
    other.routine("add")
    refused(MigReturn.BAD_ID, other.client(calc.task, calc.port).call, "add", a=1, timeout=5)
    echo = interface().client(calc.task, calc.task.look_up("test.echo"))
    refused(MigReturn.TYPE_ERROR, echo.call, "add", a=1, timeout=5)


def test_one_way_and_deferred(calc, world):
    calc.post("note", text="hello")
    assert wait_for(lambda: world.notes) and world.notes[0][0] == "hello"
    values = []
    thread = threading.Thread(target=lambda: values.append(calc.call("later", timeout=5).value))
    thread.start()
    assert wait_for(lambda: world.later) and not values
    world.call(lambda hub: world.later[0].reply([1, "two"]))
    world.call(lambda hub: world.later[0].reply("ignored"))
    thread.join(5)
    assert values == [[1, "two"]]


def test_a_remote_task_can_serve_too(world):
    server, client = world.task(), world.task()
    server.start_receiver(
        interface().server(server, {"add": lambda call, a, b: a + b}), [server.check_in("test.remote")]
    )
    assert interface().client(client, client.look_up("test.remote")).call("add", a=2, b=3, timeout=5).value == 5


def test_the_examples_of_the_documentation_work(tmp_path):
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", ulnet.ipc.__doc__)
    path = str(tmp_path / "hub")
    server, client = (block.replace("\n    ", "\n").strip().replace("/run/demo.sock", path) for block in blocks[:2])
    assert "Hub(" in server and "Task(" in client
    one = Program(server.replace("while True", "say('up')\nwhile True"), path)
    try:
        assert one.hear() == "up"
        two = Program(client, path)
        printed = two.process.stdout.read()
        assert printed.startswith(f"b'you are pid {two.process.pid}'")
        two.end()
        one.process.kill()
    finally:
        one.end()
