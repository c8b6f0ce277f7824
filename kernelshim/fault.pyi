from ulnet.kernelshim.link import Link

class FaultLink(Link):
    seed: int
    def __init__(
        self,
        inner: Link,
        seed: int,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay_ns: int = 0,
        jitter_ns: int = 0,
        reorder_ns: int = 1_000_000,
        rate_bps: int = 0,
        queue_bytes: int = 262144,
        tx: bool = True,
        rx: bool = True,
        virtual: bool = False,
    ) -> None: ...
    def configure(
        self,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay_ns: int = 0,
        jitter_ns: int = 0,
        reorder_ns: int = 1_000_000,
        rate_bps: int = 0,
        queue_bytes: int = 262144,
        tx: bool = True,
        rx: bool = True,
    ) -> None: ...
    def advance(self, now_ns: int) -> None: ...
    def due(self) -> int | None: ...
