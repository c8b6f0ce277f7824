"""Base class of every link: owns the C table, shows it to Python."""


cdef class Link:
    """Something that carries Ethernet frames. Subclasses fill in ``ops``.

    Attributes: ``mtu`` (bytes), ``mac`` (6 bytes), ``features`` (UL_LINK_* bits).
    """

    @property
    def mtu(self) -> int:
        return self.ops.mtu_bytes

    @property
    def mac(self) -> bytes:
        return bytes(self.ops.mac[:6])

    @property
    def features(self) -> int:
        return self.ops.features

    def fileno(self) -> int:
        """Descriptor that polls readable when frames arrive; -1 when the link has none."""
        return self.ops.fd

    def counters(self) -> dict[str, int]:
        """Frames and bytes each way, and everything dropped, by reason."""
        return {}

    def close(self) -> None:
        """Give the link's resources back. Frames still held become invalid."""
