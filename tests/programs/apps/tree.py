"""An rsync-like transfer by processes: ``tree send HOST PORT FOLDER METHOD``, ``tree receive PORT FOLDER METHOD``.

METHOD: fork, spawn or forkserver. The sender walks the folder; half of its workers are given a connected socket, half
connect by themselves. The receiver accepts one connection a worker and passes it to a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
from pathlib import Path
from typing import Any

WORKERS = 4


def say(text: str) -> None:
    """One line in one write: several processes share the stream."""
    os.write(1, f"{text}\n".encode())


def send_files(number: int, sock: socket.socket | None, address: tuple[str, int], root: str, names: list[str]) -> None:
    """A sender's worker."""
    if sock is None:
        sock = socket.create_connection(address, 20)
    with sock, sock.makefile("rwb") as file:
        for name in names:
            data = (Path(root) / name).read_bytes()
            head = {"name": name, "size": len(data), "digest": hashlib.sha256(data).hexdigest()}
            file.write(json.dumps(head).encode() + b"\n" + data)
            file.flush()
            say(f"worker {number}: {name}: {file.readline().decode().strip()}")


def receive_files(given: multiprocessing.connection.Connection, root: str) -> None:
    """A receiver's worker: gets its connection by the pipe."""
    sock: socket.socket = given.recv()
    given.send("taken")
    with sock, sock.makefile("rwb") as file:
        while head := file.readline():
            facts = json.loads(head)
            data = file.read(facts["size"])
            right = hashlib.sha256(data).hexdigest() == facts["digest"]
            path = Path(root) / facts["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            file.write(b"ok\n" if right else b"DAMAGED\n")
            file.flush()
            say(f"{facts['name']}: {len(data)} bytes, {'right' if right else 'DAMAGED'}")


def send(host: str, port: str, root: str, method: str) -> int:
    context: Any = multiprocessing.get_context(method)
    names = sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())
    address = (host, int(port))
    workers = []
    for number in range(WORKERS):
        sock = socket.create_connection(address) if number % 2 else None
        arguments = (number, sock, address, root, names[number::WORKERS])
        workers.append(context.Process(target=send_files, args=arguments))
        workers[-1].start()
        if sock is not None:
            sock.close()
    return join(workers)


def receive(port: str, root: str, method: str) -> int:
    context: Any = multiprocessing.get_context(method)
    workers = []
    with socket.create_server(("", int(port))) as listener:
        say("ready")
        for _ in range(WORKERS):
            sock, _ = listener.accept()
            ours, theirs = context.Pipe()
            workers.append(context.Process(target=receive_files, args=(theirs, root)))
            workers[-1].start()
            theirs.close()
            with ours, sock:
                ours.send(sock)
                ours.poll(20)  # the worker says that it has it: a socket sent by pipe is fetched from the sender
    return join(workers)


def join(workers: list[multiprocessing.process.BaseProcess]) -> int:
    for worker in workers:
        worker.join(40)
    say(f"statuses {[worker.exitcode for worker in workers]}")
    return int(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    sys.exit(send(*sys.argv[2:]) if sys.argv[1] == "send" else receive(*sys.argv[2:]))
