"""The command line: ``ulnet run``, ``netserver``, ``sessions``, ``counters``, ``table`` and ``demo``.

Every mistake gives one line on stderr, ``ulnet COMMAND: ...``, and exit status 1 (2: wrong usage).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ulnet
from ulnet.stack import protocol


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["run"]:  # the rest belongs to a program, its exceptions too
        from ulnet.run import main as run_program

        return run_program(words[1:])
    if "ulnet.patch" in sys.modules:
        sys.modules["ulnet.patch"].undo()  # a patched program started us: the server itself is the kernel's client
    arguments = _parser().parse_args(words)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads: no complaint at exit either
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ulnet", description=ulnet.__doc__.split("\n")[0] if ulnet.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"ulnet {ulnet.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    commands.add_parser("run", help="run a Python program, its libraries and children on ulnet's sockets")
    serve = commands.add_parser("netserver", help="serve an address of its own on an interface, in the foreground")
    serve.add_argument("--interface", required=True, metavar="IF", help="network interface, as in: eth0")
    serve.add_argument("--address", required=True, metavar="A/LEN", help="the address to serve, as in: 10.0.0.7/24")
    serve.add_argument("--gateway", metavar="G", help="next hop for everything beyond the address's network")
    serve.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    serve.add_argument("--no-probe", action="store_true", help="do not ask the wire first whether the address is free")
    serve.set_defaults(run=_netserver)
    sessions = commands.add_parser("sessions", help="show every session: endpoints, state, owner, figures")
    sessions.set_defaults(run=_sessions)
    counters = commands.add_parser("counters", help="show everything the server counts")
    counters.set_defaults(run=_counters)
    demo = commands.add_parser("demo", help="the main job on real traffic, on two test hosts made for it")
    demo.set_defaults(run=_demo)
    table = commands.add_parser("table", help="the experiment of 1993 on this machine, on two test hosts made for it")
    table.add_argument("--quick", action="store_true", help="less than a minute instead of less than ten")
    what = table.add_mutually_exclusive_group()
    what.add_argument("--targets", action="store_true", help="only the table of targets")
    what.add_argument("--layers", action="store_true", help="where the time of a message goes, and what it costs")
    what.add_argument("--loss", action="store_true", help="only the targets with 1 %% of the frames lost")
    table.add_argument("--json", metavar="FILE", help="store everything measured, for programs")
    table.add_argument("--html", metavar="FILE", help="store a page with the tables and plots")
    table.set_defaults(run=_table)
    for command in (serve, sessions, counters):
        command.add_argument(
            "--socket",
            metavar="PATH",
            help=f"the server's socket; otherwise ${protocol.PATH_VARIABLE} or {protocol.DEFAULT_PATH}",
        )
    for command in (sessions, counters):
        command.add_argument("--json", action="store_true", help="for programs")
    return parser


def _fail(command: str, reason: object) -> int:
    print(f"ulnet {command}: {reason}", file=sys.stderr)
    return 1


# -- netserver -------------------------------------------------------------------------------------


def _netserver(arguments: argparse.Namespace) -> int:
    from ulnet.netserver.preflight import SetupError
    from ulnet.netserver.server import NetServer

    logging.basicConfig(
        level=arguments.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("pyroute2", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # they tell every netlink attribute
    path = protocol.server_path(arguments.socket)
    try:
        server = NetServer(
            arguments.interface, arguments.address, gateway=arguments.gateway, path=path, probe=not arguments.no_probe
        )
    except SetupError as error:
        return _fail("netserver", error)
    except OSError as error:
        return _fail("netserver", error.strerror or error)
    with server:
        server.handle_signals()
        print(f"ulnet: serving {server.address} on {server.interface.name} at {path}", flush=True)
        return server.run()


def _demo(arguments: argparse.Namespace) -> int:
    from ulnet.demo.run import main as run_demo

    return run_demo()


def _table(arguments: argparse.Namespace) -> int:
    from ulnet.table import run as table
    from ulnet.table.bed import MeasureError

    try:
        return table.main(
            quick=arguments.quick,
            only_targets=arguments.targets,
            layers=arguments.layers,
            loss=arguments.loss,
            json_path=arguments.json,
            html_path=arguments.html,
        )
    except MeasureError as error:
        return _fail("table", error)
    except OSError as error:
        return _fail("table", error.strerror or error)


# -- sessions, counters ----------------------------------------------------------------------------


def _ask(arguments: argparse.Namespace, call: protocol.Call) -> Any:
    """What the server says, or SystemExit with one line."""
    from ulnet.stack.proxy import query

    try:
        return query(call, arguments.socket)
    except OSError as error:
        raise SystemExit(_fail(call.name.lower(), error.strerror or error)) from None


def _sessions(arguments: argparse.Namespace) -> int:
    rows = _ask(arguments, protocol.Call.SESSIONS)
    rows.sort(key=lambda row: (row["proto"], row["local"], row["remote"] or ""))
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (
        ("proto", "left"),
        ("local", "left"),
        ("remote", "left"),
        ("state", "left"),
        ("owner", "left"),
        ("bytes in", "right"),
        ("bytes out", "right"),
        ("retrans", "right"),
        ("RTT", "right"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        owner = row["owner"]
        table.add_row(
            row["proto"],
            row["local"],
            row["remote"] or "*",
            row["state"],
            f"{owner['pid']} {owner['name']}" if owner else "server",
            f"{row['bytes_in']:,}",
            f"{row['bytes_out']:,}",
            str(row["retransmits"]),
            _duration(row["srtt_ns"]),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # a file or a pipe has no edge to fold at
    console.print(table)
    return 0


def _duration(ns: int) -> str:
    if ns <= 0:
        return "-"
    if ns < 1_000_000:
        return f"{ns / 1000:.0f} us"
    return f"{ns / 1_000_000:.1f} ms" if ns < 1_000_000_000 else f"{ns / 1e9:.2f} s"


def _counters(arguments: argparse.Namespace) -> int:
    groups = _ask(arguments, protocol.Call.COUNTERS)
    if arguments.json:
        json.dump(groups, sys.stdout, indent=2)
        print()
        return 0
    for group, values in groups.items():
        for name, value in values.items():
            print(f"{group}.{name} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
