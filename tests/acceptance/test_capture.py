"""A whole session on the wire, judged by tshark: nothing malformed, no bad checksum, nothing sent twice.

Checksum and segmentation offload are off on both ends, so that what is captured is what a plain wire would carry.
"""

from __future__ import annotations

import os
import shutil
import socket as ksocket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.beds import ADDRESS, PEER, Hosts, meanwhile, one_processor
from tests.acceptance.shell import digest_of, receive_exactly, receive_into, send_stream
from ulnet.kernelshim.testbed import Host, can_testbed

TSHARK = shutil.which("tshark")
BULK = 4 << 20
PORT = 5001
UDP_PORT = 5002
# The payload is random: nothing above the transport may guess what it is (and then call it malformed).
ONLY = ["-d", f"tcp.port=={PORT},data", "-d", f"udp.port=={UDP_PORT},data"]

_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA = 263, 6, 8

pytestmark = pytest.mark.skipif(TSHARK is None, reason="tshark is not installed")


class Capture:
    """Everything that passes a host's interface, both ways, into a pcap file (nanosecond form)."""

    def __init__(self, host: Host, path: Path) -> None:
        self.path = path
        with host:
            self.sock = ksocket.socket(ksocket.AF_PACKET, ksocket.SOCK_RAW, ksocket.htons(3))
        self.sock.setsockopt(ksocket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self.sock.setsockopt(ksocket.SOL_SOCKET, 64, 1)  # SO_TIMESTAMPNS_NEW: when the kernel saw it
        self.sock.bind((host.interface.name, 3))
        self.sock.settimeout(0.2)
        self.ended = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with self.path.open("wb") as out:
            out.write(struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
            while True:
                try:
                    frame, ancillary, _, _ = self.sock.recvmsg(70000, 256)
                except TimeoutError:
                    if self.ended:
                        return
                    continue
                except OSError:  # its host is gone: the test has failed already
                    return
                seconds, ns = struct.unpack("=qq", ancillary[0][2][:16])
                out.write(struct.pack("=IIII", seconds, ns, len(frame), len(frame)) + frame)

    def end(self) -> None:
        self.ended = True
        self.thread.join(30)
        _, drops = struct.unpack("=II", self.sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self.sock.close()
        assert drops == 0, f"the capture itself lost {drops} frames"

    def count(self, filters: list[str]) -> dict[str, int]:
        """How many frames match each display filter."""
        out = self._tshark("-q", "-z", "io,stat,0," + ",".join(filters))
        (row,) = (line for line in out.splitlines() if "<>" in line)
        # | 0.0 <> 1.9 | frames | bytes | frames | bytes ...
        columns = [int(text) for text in row.split("|")[2:-1]]
        return dict(zip(filters, columns[::2], strict=True))

    def show(self, display_filter: str) -> str:
        """tshark's lines of the first frames that match."""
        return "\n".join(self._tshark("-Y", display_filter).splitlines()[:20])

    def _tshark(self, *arguments: str) -> str:
        assert TSHARK is not None
        checks = [f"-o{what}.check_checksum:TRUE" for what in ("ip", "tcp", "udp")]
        out = subprocess.run(
            [TSHARK, "-n", *ONLY, "-r", str(self.path), *checks, *arguments], capture_output=True, text=True, timeout=60
        )
        assert out.returncode == 0, out.stderr
        return out.stdout


def echo_request(payload: bytes) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, 0x756C, 7)
    data = head + payload
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return data[:2] + struct.pack("!H", ~total & 0xFFFF) + data[4:]


def ping(host: Host, size: int) -> None:
    """Echo request and reply by a raw socket (there may be no ping program)."""
    with host.socket(ksocket.AF_INET, ksocket.SOCK_RAW, ksocket.IPPROTO_ICMP) as sock:
        sock.settimeout(5)
        payload = os.urandom(size)
        sock.sendto(echo_request(payload), (ADDRESS, 0))
        while True:
            packet = sock.recv(65535)
            if packet[20] == 0:
                assert packet[28:] == payload
                return


def talk(hosts: Hosts) -> None:
    """Both ways of opening, small messages, bulk both ways, both ways of closing, datagrams, echo, refusals."""
    app = hosts.app()
    for size in (0, 56, 1400, 4000):
        ping(hosts.b, size)

    app.do(f"l = socket.create_server(('', {PORT}))")
    peer = hosts.dial(PORT)
    app.do("s, _ = l.accept(); s.settimeout(30)")
    for size in (1, 2, 99, 536, 1447, 1448, 1449, 5000):
        peer.sendall(bytes(size))
        app.do(f"s.sendall(receive_exactly(s, {size}))")
        assert receive_exactly(peer, size) == bytes(size)
    with meanwhile(send_stream, peer, BULK, 1):
        assert app.value(f"receive_into(s, {BULK})") == digest_of(BULK, 1)
    with meanwhile(receive_into, peer, BULK) as got:
        app.do(f"send_stream(s, {BULK}, 2)")
    assert got == [digest_of(BULK, 2)]
    app.do("s.close()")
    assert peer.recv(1) == b""
    peer.close()

    with hosts.listener() as listener:
        app.do(f"s = socket.create_connection(('{PEER}', {listener.getsockname()[1]}), timeout=30)")
        peer, _ = listener.accept()
    app.do("s.sendall(b'half'); s.shutdown(socket.SHUT_WR)")
    assert receive_exactly(peer, 5) == b"half"
    peer.sendall(b"other half")
    peer.close()
    assert app.value("receive_exactly(s, 100).decode()") == "other half"
    app.do("s.close()")

    app.do(f"u = udp_socket({UDP_PORT})")
    with hosts.datagrams() as sock:
        for size in (0, 1, 18, 512, 1472, 1473, 2960, 9001, 30000):
            data = os.urandom(size)
            sock.sendto(data, (ADDRESS, UDP_PORT))
            app.do("data, who = u.recvfrom(65535); u.sendto(data, who)")
            assert sock.recv(65535) == data

    # Refusals are packets, too: RST from the server, ICMP port unreachable from the server.
    with hosts.b.socket() as sock:
        sock.settimeout(5)
        assert sock.connect_ex((ADDRESS, 9)) == 111
    with hosts.b.socket(type=ksocket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((ADDRESS, 9))
        sock.send(b"nobody there")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)
    app.do("l.close(); u.close()")
    assert app.end() == 0
    time.sleep(0.2)  # delayed acknowledgements


@pytest.fixture(scope="module")
def captured() -> Iterator[Capture]:
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    with one_processor():
        hosts = Hosts()
        try:
            hosts.a.offload(False)
            hosts.b.offload(False)
            capture = Capture(hosts.b, hosts.folder / "wire.pcap")
            talk(hosts)
            hosts.tidy()
            capture.end()
            yield capture
        finally:
            hosts.close()


EXPECTED = [
    f"tcp.port == {PORT} && tcp.flags.syn == 1 && tcp.flags.ack == 1 && tcp.options.mss && tcp.options.wscale",
    f"tcp.port == {PORT} && tcp.flags.fin == 1 && ip.src == {ADDRESS}",
    f"tcp.flags.syn == 1 && tcp.flags.ack == 0 && ip.src == {ADDRESS}",
    f"ip.src == {ADDRESS} && tcp.len == 1448",
    f"ip.src == {PEER} && tcp.len == 1448",
    f"ip.src == {ADDRESS} && ip.flags.mf == 1",
    f"ip.src == {PEER} && ip.flags.mf == 1",
    f"udp.length == 30008 && ip.src == {ADDRESS}",
    f"arp.opcode == 2 && arp.src.proto_ipv4 == {ADDRESS}",
    f"icmp.type == 0 && ip.src == {ADDRESS}",
    f"icmp.type == 3 && icmp.code == 3 && ip.src == {ADDRESS}",
    f"tcp.flags.reset == 1 && ip.src == {ADDRESS}",
]

UNWANTED = [
    "_ws.malformed",
    "_ws.expert.severity == error",
    "ip.checksum.status == 0",
    "tcp.checksum.status == 0",
    "udp.checksum.status == 0",
    "icmp.checksum.status == 0",
    "tcp.analysis.retransmission",
    "tcp.analysis.fast_retransmission",
    "tcp.analysis.spurious_retransmission",
    "tcp.analysis.lost_segment",
    "tcp.analysis.ack_lost_segment",
    "tcp.analysis.out_of_order",
    "tcp.analysis.duplicate_ack",
    "tcp.analysis.keep_alive",
    "tcp.analysis.reused_ports",
    "frame.len > 1514",
    f"tcp.flags.reset == 1 && tcp.port == {PORT}",
    "ip.fragment.error || ip.fragment.overlap || ip.fragment.toolongfragment",
    "arp.duplicate-address-detected",
]
# The kernel's tail loss probe (RFC 8985 7) when our process got no processor for some milliseconds, and its answer.
PROBE = {
    "tcp.analysis.retransmission",
    "tcp.analysis.spurious_retransmission",
    "tcp.analysis.duplicate_ack",
}
PROBES = 4


def test_everything_was_there(captured: Capture) -> None:
    counts = captured.count(EXPECTED)
    assert all(counts.values()), counts


def test_nothing_unwanted(captured: Capture) -> None:
    counts = captured.count(UNWANTED)
    found = [what for what, count in counts.items() if count > (PROBES if what in PROBE else 0)]
    assert not found, "\n".join(f"{what}: {counts[what]}\n{captured.show(what)}" for what in found)
