def siphash(key: bytes, data: bytes) -> int:
    """SipHash-2-4 of ``data`` under a 16-byte ``key``, as an unsigned 64-bit number."""

def isn(secret: bytes, flow: bytes, now_ns: int) -> int:
    """Initial sequence number of ``flow`` at ``now_ns`` under a 16-byte ``secret`` (RFC 6528 3)."""
