"""Memory between two inaccessible pages: a single byte read or written outside of it kills the test run."""

import ctypes
import mmap
from types import TracebackType

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """``size`` usable bytes; ``at_end`` and ``at_start`` place data against the guard behind and before them."""

    def __init__(self, size: int = 65536 + 4096) -> None:
        page = mmap.PAGESIZE
        self.size = -(-size // page) * page
        self._map = mmap.mmap(-1, self.size + 2 * page)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(anchor) + page
        del anchor
        for address in (self._base - page, self._base + self.size):
            if _libc.mprotect(address, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def _view(self, address: int, data: bytes) -> memoryview:
        view = memoryview((ctypes.c_ubyte * len(data)).from_address(address)).cast("B")
        view[:] = data
        return view

    def at_end(self, data: bytes) -> memoryview:
        """The data's last byte is the last accessible one."""
        return self._view(self._base + self.size - len(data), data)

    def at_start(self, data: bytes) -> memoryview:
        """The data's first byte is the first accessible one."""
        return self._view(self._base, data)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        page = mmap.PAGESIZE
        for address in (self._base - page, self._base + self.size):
            _libc.mprotect(address, page, mmap.PROT_READ | mmap.PROT_WRITE)
        self._map.close()
