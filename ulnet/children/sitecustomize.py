"""Found by Python children of a patched program (ulnet/patch.py puts this folder on PYTHONPATH): patches them too.

It then runs the sitecustomize that it hides, if there is one. A child of another Python is left alone.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


def _patch() -> None:
    if os.environ.get("ULNET_PATCH") != (sys.implementation.cache_tag or sys.implementation.name):
        return
    root = os.path.dirname(os.path.dirname(_here))
    sys.path.append(root)  # last: it only matters where ulnet is not installed for this child
    try:
        import ulnet.patch  # noqa: F401
    except ImportError as error:
        print(f"ulnet: {sys.executable} (process {os.getpid()}) runs on the kernel's sockets: {error}", file=sys.stderr)
    finally:
        sys.path.remove(root)


def _chain() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != _here])
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_patch()
_chain()
