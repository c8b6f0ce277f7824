"""``ulnet run``: a whole program on ulnet's sockets, as ``python`` would run it.

Order: find the server, patch (ulnet/patch.py), make a fresh ``__main__``, run. What the program sees (sys.argv,
sys.path[0], ``__main__``, its exit status, tracebacks) is what python(1) gives it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any, Final, NoReturn, cast

from ulnet.stack import protocol

_USAGE: Final = "ulnet run [--server PATH] program.py ... | -m module ... | -c code ..."

_before: list[types.ModuleType] = []  # our own __main__, kept alive


def parser() -> argparse.ArgumentParser:
    """The options that come before the program, for parsing and for help."""
    made = argparse.ArgumentParser(
        prog="ulnet run",
        usage=_USAGE,
        description="Run a Python program, its libraries and Python children on ulnet's sockets.",
    )
    made.add_argument(
        "--server",
        metavar="PATH",
        help=f"the network server's socket; otherwise ${protocol.PATH_VARIABLE} or {protocol.DEFAULT_PATH}",
    )
    made.add_argument("-m", dest="module", metavar="MODULE", help="run a library module, as python -m does")
    made.add_argument("-c", dest="code", metavar="CODE", help="run a piece of code, as python -c does")
    made.add_argument("program", nargs="?", help="a file, or a folder or zip file with __main__.py")
    return made


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our options with the program's name, the program's own arguments)."""
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if word == "--server":
            at += 1
        elif word in ("-m", "-c", "--"):
            at += 1
            break
        elif word == "-" or not word.startswith("-") or word.startswith(("-m", "-c")):
            break
    return list(argv[:at]), list(argv[at:])


def main(argv: Sequence[str]) -> int:
    """Run ``ulnet run ARGV``; the program's exit status, unless it left by an exception of its own."""
    ours, theirs = split(argv)
    made = parser()
    chosen = made.parse_args(ours)
    if (chosen.module is None) + (chosen.code is None) + (chosen.program is None) != 2:
        made.error("say what to run: a program, -m module or -c code")
    if chosen.server is not None:
        os.environ[protocol.PATH_VARIABLE] = os.path.abspath(chosen.server)
    if chosen.program is not None and not os.path.exists(chosen.program):
        return _fail(f"no such file: {chosen.program}")
    problem = _server_problem()
    if problem:
        return _fail(problem)

    import ulnet.patch  # noqa: F401

    try:
        _run(chosen, theirs, _fresh_main())
    except SystemExit:
        raise
    except BaseException as error:
        _report(error)
    return 0


def _fresh_main() -> types.ModuleType:
    """An empty ``__main__``, as the interpreter makes one."""
    module = types.ModuleType("__main__")
    vars(module).update(__builtins__=sys.modules["builtins"], __annotations__={})
    _before.append(sys.modules["__main__"])
    sys.modules["__main__"] = module
    return module


def _fail(reason: object) -> int:
    print(f"ulnet run: {reason}", file=sys.stderr)
    return 1


def _server_problem() -> str | None:
    """None when a network server answers, otherwise one line that says what to do."""
    from ulnet.stack.proxy import query

    try:
        query(protocol.Call.COUNTERS)
    except OSError as error:
        return str(error.strerror or error)
    return None


def _run(chosen: argparse.Namespace, arguments: list[str], module: types.ModuleType) -> None:
    if chosen.module is not None:
        sys.argv = ["-m", *arguments]
        _set_path(os.getcwd())
        # What ``python -m`` itself calls; it fills in the __main__ that is in sys.modules, and argv[0].
        cast(Any, runpy)._run_module_as_main(chosen.module)
    elif chosen.code is not None:
        sys.argv = ["-c", *arguments]
        _set_path("")
        exec(compile(chosen.code, "<string>", "exec", dont_inherit=True), vars(module))
    elif os.path.isdir(chosen.program) or _is_archive(chosen.program):
        sys.argv = [chosen.program, *arguments]
        _set_path(os.path.abspath(chosen.program))
        cast(Any, runpy)._run_module_as_main("__main__", alter_argv=False)
    else:
        sys.argv = [chosen.program, *arguments]
        _set_path(os.path.dirname(os.path.realpath(chosen.program)))
        _run_file(chosen.program, module)


def _set_path(first: str) -> None:
    # Ours came from ``python -m ulnet`` or from the folder of the command; with -P or -I there is none.
    if sys.flags.safe_path:
        return
    sys.path[:1] = [first]


def _is_archive(path: str) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def _run_file(path: str, module: types.ModuleType) -> None:
    path = os.path.abspath(path)
    with io.open_code(path) as file:
        code = pkgutil.read_code(cast(Any, file))  # a .pyc
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    vars(module).update(
        __file__=path,
        __cached__=None,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
    )
    exec(code, vars(module))


def _report(error: BaseException) -> NoReturn:
    """Show an exception of the program without the frames that lead to it, and end as Python does."""
    trace = error.__traceback__
    ours = {__file__, "<frozen runpy>", runpy.__file__}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    if isinstance(error, KeyboardInterrupt):
        # Only the interpreter itself can end by SIGINT after its clean-up; it has shown the traceback already.
        sys.excepthook = lambda *_: None
        raise error
    raise SystemExit(1)
