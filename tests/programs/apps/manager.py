"""multiprocessing's manager over TCP, its connections plain descriptors: ``manager serve PORT``, ``use HOST PORT``."""

from __future__ import annotations

import signal
import sys
import threading
from multiprocessing.managers import BaseManager
from typing import Any

from tests.programs.apps.clients import error_of, say
from tests.programs.apps.site import pattern


class Store:
    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def put(self, name: str, data: bytes) -> int:
        self.kept[name] = data
        return len(self.kept)

    def get(self, name: str) -> bytes:
        return self.kept[name]


class Manager(BaseManager):
    pass


store = Store()
Manager.register("store", callable=lambda: store)


def serve(port: int) -> None:
    server: Any = Manager(("0.0.0.0", port), b"secret").get_server()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    server.serve_forever()


def use(host: str, port: int) -> None:
    manager: Any = Manager((host, port), b"secret")
    manager.connect()
    remote = manager.store()
    for size in (0, 1, 1448, 100_000, 3_000_000):
        say("put", count=remote.put(f"k{size}", pattern(size)))
        say("got", data=remote.get(f"k{size}"))
    say("missing", error=error_of(remote.get, "nothing")[0])

    def many(number: int) -> None:
        for turn in range(10):
            remote.put(f"{number}", pattern(turn * 1000))

    threads = [threading.Thread(target=many, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("threads", sizes=[len(remote.get(f"{number}")) for number in range(6)])
    say("wrong key", error=error_of(Manager((host, port), b"other").connect)[0])
    say("refused", error=error_of(Manager((host, 1), b"secret").connect)[0])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        use(sys.argv[2], int(sys.argv[3]))
