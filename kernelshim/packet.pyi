from ulnet.kernelshim.link import Link

class PacketLink(Link):
    interface: str
    def __init__(
        self,
        fd: int,
        *,
        ifindex: int,
        loopback_ifindex: int,
        mac: bytes,
        mtu: int,
        interface: str = "ipf",
        slots: int = 0,
        slot_bytes: int = 0,
        features: int | None = None,
    ) -> None: ...
    @property
    def slots(self) -> int: ...
    def hold_frame(self) -> tuple[int | None, memoryview] | None: ...
    def release(self, slot: int) -> None: ...
    def evacuate(self, slot: int) -> None: ...
