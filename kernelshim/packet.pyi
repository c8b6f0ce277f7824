from collections.abc import Sequence

from ulnet.kernelshim.link import Link

SLOT_OVERHEAD_BYTES: int

class PacketLink(Link):
    interface: str
    def __init__(
        self,
        fds: Sequence[int],
        *,
        ifindex: int,
        loopback_ifindex: int,
        mac: bytes,
        mtu: int,
        interface: str = "ipf",
        small: tuple[int, int] = (0, 0),
        large: tuple[int, int] = (0, 0),
        features: int | None = None,
    ) -> None: ...
    @property
    def slots(self) -> int: ...
    def hold_frame(self) -> tuple[int | None, memoryview] | None: ...
    def release(self, slot: int) -> None: ...
    def evacuate(self, slot: int) -> None: ...
