"""One end of a comparison with PyTCP 2.7, over a packet socket instead of its TAP device; peers.py runs it (python -O).

Usage and output are those of ``peer_lwip.c``. PyTCP reads and writes frames on any descriptor it is given, so this one
is on the same cable as everything else that is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket as kernel
import statistics
import sys
import threading
import time
from typing import Any

from pytcp import config

PORT = 7007
WARM = 10
AHEAD = 32_768  # PyTCP's send buffer has no limit: so much is given to it at a time
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23  # linux/socket.h, linux/if_packet.h
ETH_P_ALL = 3  # linux/if_ether.h


def device(interface: str) -> tuple[int, str]:
    """Descriptor and hardware address."""
    sock = kernel.socket(kernel.AF_PACKET, kernel.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.bind((interface, ETH_P_ALL))
    mac: bytes = sock.getsockname()[4]
    return sock.detach(), mac.hex(":")


def start(interface: str, address: str) -> Any:
    """PyTCP's threads, on the interface; its module ``stack``."""
    config.LOG_CHANEL = set()
    config.IP6_SUPPORT = config.IP4_HOST_DHCP = False
    fd, config.MAC_ADDRESS = device(interface)
    from pytcp.lib import stack
    from pytcp.lib.ip4_address import Ip4Host

    for part in (stack.timer, stack.arp_cache, stack.packet_handler):
        part.start()
    for part in (stack.rx_ring, stack.tx_ring):
        part.start(fd)
    stack.packet_handler.ip4_host.append(Ip4Host(f"{address}/24"))  # without the seconds of probing
    return stack


def exactly(sock: Any, size: int) -> None:
    while size:
        piece = sock.recv(size)
        if not piece:
            raise ConnectionError("the other end closed in the middle")
        size -= len(piece)


def answer(sock: Any, bulk: bool, amount: int) -> None:
    if bulk:
        exactly(sock, amount)
        sock.send(b"k")
        return
    for _ in range(amount + WARM):
        exactly(sock, 1)
        sock.send(b"a")


def ask(sock: Any, bulk: bool, amount: int) -> float:
    if bulk:
        begin = time.perf_counter()
        for at in range(0, amount, AHEAD):
            sock.send(bytes(min(AHEAD, amount - at)))
        exactly(sock, 1)
        return amount * 8 / (time.perf_counter() - begin) / 1e9
    times = []
    for _ in range(amount + WARM):
        begin = time.perf_counter()
        sock.send(b"q")
        exactly(sock, 1)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times[WARM:])


def main() -> None:
    interface, address, what, amount, limit_s, *peer = sys.argv[1:]
    late = threading.Timer(float(limit_s), os._exit, (3,))
    late.daemon = True
    late.start()
    start(interface, address)
    from pytcp.lib import socket

    sock = socket.socket(socket.AF_INET4, socket.SOCK_STREAM)
    if peer:
        sock.connect((peer[0], PORT))
        print(f"{ask(sock, what == 'bulk', int(amount)):.6f}", flush=True)
    else:
        sock.bind((address, PORT))
        sock.listen()
        print("ready", flush=True)
        connection, _ = sock.accept()
        answer(connection, what == "bulk", int(amount))
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(float(limit_s))  # its threads send what is left; peers.py ends this process
    os._exit(0)  # PyTCP's threads would go on


if __name__ == "__main__":
    main()
