"""uvloop in a patched program (ulnet/patch.py): its loop is asyncio's, and so reaches ulnet's sockets.

libuv opens sockets by itself, past the socket module: a server of uvloop's would listen on the kernel's addresses, and
nobody would be told. Its own loop takes ulnet's sockets by ``loop.sock_*`` and ``add_reader`` where nothing is patched.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

_NAME: Final = "uvloop"


class _Loader(importlib.abc.Loader):
    """Loads uvloop as its own loader does, and then takes its loop's place."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _take_place(module)

    def __getattr__(self, name: str) -> Any:  # get_data, get_source, ...
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds uvloop when it is imported after the patch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


_finder: Final = _Finder()
_before: dict[str, Any] = {}


def _take_place(module: ModuleType) -> None:
    # uvloop's functions and its policy all make what its name Loop says.
    _before["Loop"] = vars(module)["Loop"]
    vars(module)["Loop"] = asyncio.SelectorEventLoop


def install() -> None:
    """From now on, whether uvloop is imported already or comes later."""
    sys.meta_path.insert(0, _finder)
    module = sys.modules.get(_NAME)
    if module is not None:
        _take_place(module)


def undo() -> None:
    """uvloop has its own loop again."""
    with contextlib.suppress(ValueError):
        sys.meta_path.remove(_finder)
    module = sys.modules.get(_NAME)
    if module is not None and _before:
        vars(module).update(_before)
    _before.clear()
