"""What the ipc tests stand on: a hub in a thread of its own, driven through fileno(), and programs in processes."""

import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ulnet.ipc import Hub, Sender, Task

ROOT = Path(__file__).resolve().parent.parent
ECHO = "test.echo"

PRELUDE = """
import os, signal, sys, time
from ulnet.ipc import *
PATH = sys.argv[1]
def say(*words):
    print(*words, flush=True)
def hear():
    return sys.stdin.readline().strip()
def code_of(call, *a, **k):
    try:
        call(*a, **k)
    except MachError as error:
        return getattr(error.code, "name", error.code)
    return "ok"
"""


class Program:
    """A Python program in a process of its own; `World.end` ends it."""

    def __init__(self, source: str, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + source, path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, word: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class World:
    """A hub with an echo service at a path, in a thread that waits in epoll for it and for us."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path = path
        self.dead: list[Sender] = []
        self.programs: list[Program] = []
        self.tasks: list[Task] = []
        self._calls: deque[tuple[Callable[[Hub], Any], list[Any], threading.Event]] = deque()
        self._wake = os.eventfd(0)
        self._stop = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(options, started), daemon=True)
        self._thread.start()
        assert started.wait(5)

    def _run(self, options: dict[str, Any], started: threading.Event) -> None:
        with Hub(self.path, **options) as hub:
            local = hub.local_task()
            hub.serve(local.check_in(ECHO), lambda m, s: local.reply(m, m.inline, ool=m.ool, fds=m.fds))
            hub.on_task_death(self.dead.append)
            epoll = select.epoll()
            epoll.register(hub.fileno(), select.EPOLLIN)
            epoll.register(self._wake, select.EPOLLIN)
            started.set()
            while not self._stop:
                for fd, _ in epoll.poll(5):
                    if fd == hub.fileno():
                        hub.poll(0)
                        continue
                    os.eventfd_read(self._wake)
                    while self._calls:
                        call, result, done = self._calls.popleft()
                        try:
                            result.append(call(hub))
                        except BaseException as error:
                            result.append(error)
                        done.set()
            epoll.close()

    def call(self, what: Callable[[Hub], Any]) -> Any:
        """Run what(hub) in the hub's thread."""
        result: list[Any] = []
        done = threading.Event()
        self._calls.append((what, result, done))
        os.eventfd_write(self._wake, 1)
        assert done.wait(10)
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def task(self) -> Task:
        task = Task(self.path)
        self.tasks.append(task)
        return task

    def spawn(self, source: str) -> Program:
        program = Program(source, self.path)
        self.programs.append(program)
        return program

    def counters(self) -> dict[str, int]:
        return dict(self.call(lambda hub: dict(hub.counters)))

    def end(self) -> None:
        for program in self.programs:
            program.end()
        for task in self.tasks:
            task.close()
        if self._thread.is_alive():
            self._stop = True
            os.eventfd_write(self._wake, 1)
            self._thread.join(10)
            assert not self._thread.is_alive()
        os.close(self._wake)


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """Poll until true; the last value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.005)


def at_end(fd: int) -> bool:
    """Has the last writer of this non-blocking pipe closed it?"""
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False
