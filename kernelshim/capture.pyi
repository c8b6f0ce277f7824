import os
from types import TracebackType
from typing import BinaryIO

from ulnet.kernelshim.link import Link

class CaptureLink(Link):
    def __init__(
        self,
        inner: Link,
        path_or_file: str | bytes | os.PathLike[str] | BinaryIO,
        *,
        snaplen: int = 262144,
        raw: bool = False,
        virtual: bool = False,
    ) -> None: ...
    def flush(self) -> None: ...
    def stop(self) -> None: ...
    def __enter__(self) -> CaptureLink: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
