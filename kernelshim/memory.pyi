from ulnet.kernelshim.link import Link

class MemoryLink(Link):
    def waiting(self) -> int: ...

def memory_pair(
    mtu: int = 1500,
    features: int = 7,
    mac_a: bytes = b"\x02\x75\x6c\x00\x00\x01",
    mac_b: bytes = b"\x02\x75\x6c\x00\x00\x02",
    queue_frames: int = 1024,
) -> tuple[MemoryLink, MemoryLink]: ...
