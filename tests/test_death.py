"""An application killed while it sends: its peer is reset at once, wherever the status page stood in that moment."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.netserver_bed import PEER, Bed
from ulnet.kernelshim.testbed import can_testbed

pytestmark = pytest.mark.skipif(can_testbed() is not None, reason=str(can_testbed()))


@pytest.fixture
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("death"))
    yield bed
    bed.close()


def test_killed_while_it_sends(bed: Bed) -> None:
    """Most of these kills fall between a segment and its entry in the status page: the first RST is then too old."""
    with bed.b.socket() as listener:
        listener.bind((PEER, 0))
        listener.listen(1)
        listener.settimeout(10)
        for turn in range(8):
            program = bed.program(
                "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\nwhile True: s.sendall(bytes(100_000))",
                PEER,
                str(listener.getsockname()[1]),
            )
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(2)
                until = time.monotonic() + 0.005 * turn
                while time.monotonic() < until:
                    peer.recv(1 << 20)
                program.kill()
                with pytest.raises(ConnectionResetError):
                    while peer.recv(1 << 20):
                        pass
            program.wait()
    bed.expect_empty()
