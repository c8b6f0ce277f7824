"""A finished measurement (the document that ``--json`` writes) as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Document = dict[str, Any]


def number(value: float | None) -> str:
    """Three digits are what repeated runs have in common."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def amount(value: float | None) -> str:
    """A count, whole where it is whole."""
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def cell_lines(cell: dict[str, Any]) -> tuple[str, str, str]:
    """``("9.0 x0.62", "8.8-9.3", "'93 x1.23")``."""
    ratio, old = cell["ratio"], cell["ratio_1993"]
    return (
        number(cell["median"]) + ("" if ratio is None else f" x{ratio:.2f}"),
        f"{number(cell['q1'])}-{number(cell['q3'])}",
        "" if old is None else f"'93 x{old:.2f}",
    )


def groups(table: Document) -> list[tuple[str, list[Document]]]:
    """Columns by what stands together on the page."""
    columns = table["columns"]
    chosen = (
        ("TCP: bulk in Gbit/s, round trips in us", [c for c in columns if c["proto"] == "tcp"]),
        ("UDP: round trips in us", [c for c in columns if c["proto"] == "udp"]),
    )
    return [(title, group) for title, group in chosen if group]


def heading(column: Document) -> str:
    return f"{column['size']} B" if column["size"] else "bulk"


EXPLANATION = (
    "Each cell: median and ratio to the kernel row (round trips: spinning; bulk: sendall and recv_into); below it the "
    "quartiles over the passes, and the ratio of 1993 (DECstation 5000/200, Mach 2.5 in the kernel). Bulk: more is "
    "better."
)


def table_view(table: Document) -> RenderableType:
    shown: list[RenderableType] = []
    for title, columns in groups(table):
        out = Table(title=title, title_justify="left", show_lines=True, pad_edge=False)
        out.add_column("", no_wrap=True)
        for column in columns:
            out.add_column(heading(column), justify="right", no_wrap=True)
        for row in table["rows"]:
            if row["skipped"]:
                out.add_row(row["name"], *([""] * len(columns)), style="dim")
                continue
            cells = table["cells"][row["key"]]
            out.add_row(row["name"], *("\n".join(cell_lines(cells[c["key"]])) for c in columns))
        shown.append(out)
    shown += [Text(f"{row['name']}: skipped: {row['skipped']}") for row in table["rows"] if row["skipped"]]
    shown.append(Text(EXPLANATION))
    return Group(*shown)


def verdict(target: Document) -> str:
    if target["value"] is None:
        return "not measured"
    if target["reached"] is None:
        return "shown"  # nothing to reach, or too few of what it is about
    if not target["reached"]:
        return "not reached"
    return "moonshot" if target["moonshot_reached"] else "reached"


STYLES = {"moonshot": "bold green", "reached": "green", "not reached": "red"}


def measured(target: Document) -> str:
    if target["value"] is None:
        return "-"
    text = number(target["value"]) + (f" {target['unit']}" if target["unit"] != "x" else "")
    return text + (f" ({number(target['q1'])}-{number(target['q3'])})" if target["q1"] is not None else "")


def targets_view(targets: list[Document]) -> RenderableType:
    out = Table(
        title="Targets: ratios to kernel sockets in the same run unless said", title_justify="left", pad_edge=False
    )
    for title in ("what", "1993", "target", "moonshot", "measured", ""):
        out.add_column(title, justify="left" if title == "what" else "right")
    for target in targets:
        word = verdict(target)
        text = Text(target["name"])
        text.append(f"\n  {target['how']}", style="dim")
        out.add_row(
            text,
            target["year_1993"] or "-",
            target["target"],
            target["moonshot"],
            measured(target),
            Text(word, style=STYLES.get(word, "yellow")),
        )
    return out


def layers_view(layers: Document) -> RenderableType:
    shown: list[RenderableType] = []
    ways = layers["ways"]
    out = Table(title="One way of a 1-byte message, by layer, in us", title_justify="left", pad_edge=False)
    out.add_column("", no_wrap=True)
    for way in ways:
        out.add_column(way["name"].replace(", ", "\n").replace(" ", "\n"), justify="right", no_wrap=True)
    out.add_column("1993, TCP:\nlibrary/\nkernel/server", justify="right", no_wrap=True)
    out.add_column("1993, UDP:\nlibrary/\nkernel/server", justify="right", no_wrap=True)
    for layer in layers["layers"]:
        cells = ["-" if way["us"].get(layer["key"]) is None else f"{way['us'][layer['key']]:.2f}" for way in ways]
        out.add_row(layer["name"], *cells, layer["tcp_1993"], layer["udp_1993"])
    out.add_section()
    out.add_row("all", *(f"{way['sum_us']:.2f}" for way in ways), *layers["all_1993"])
    out.add_row("half a round trip", *(f"{way['half_us']:.2f}" for way in ways), "", "")
    out.add_row("the same, stamps off", *(f"{way['plain_half_us']:.2f}" for way in ways), "", "")
    shown.append(out)
    shown += [Text(note) for note in layers["notes"]]
    for title, table in counted_tables(layers):
        counts = Table(title=title, title_justify="left", pad_edge=False)
        counts.add_column("", no_wrap=True)
        for what in next(iter(table.values()), {}):
            counts.add_column(what, justify="right")
        for name, row in table.items():
            counts.add_row(name, *(amount(value) for value in row.values()))
        shown.append(counts)
    return Group(*shown)


def counted_tables(layers: Document) -> list[tuple[str, dict[str, dict[str, float | None]]]]:
    """Two tables: what happened while messages passed between two hosts, and what two stacks in one thread count."""
    names = dict.fromkeys(name for row in layers["counts"].values() for name in row)
    turned = {name: {what: row.get(name) for what, row in layers["counts"].items()} for name in names}
    return [
        ("A 1-byte message between two hosts: programs and servers of both ends together", layers["crossings"]),
        ("Counted exactly, in the library", turned),
    ]


def machine_view(document: Document) -> RenderableType:
    machine = document["machine"]
    lines = [
        f"ulnet {document['ulnet']}, {document['date']}: {machine['cpu']}, {machine['processors']} processors, "
        f"Linux {machine['kernel']}, Python {machine['python']}",
        *document["notes"],
    ]
    return Group(*(Text(line) for line in lines))


def demo_view(table: Document) -> RenderableType:
    """Only kernel sockets against the library: what the demo shows."""
    out = Table(title="From Python, medians; kernel sockets spin for round trips", title_justify="left")
    for title in ("", "kernel", "ulnet", "ratio", "ulnet from/to"):
        out.add_column(title, justify="right" if title else "left", no_wrap=True)
    for column in table["columns"]:
        key = column["key"]
        kernel = table["cells"]["kernel-spinning" if column["size"] else "kernel-blocking"][key]
        ulnet = table["cells"]["ipf"][key]
        name = f"{column['proto'].upper()} " + (f"{heading(column)} round trip" if column["size"] else "bulk")
        low, high = min(ulnet["samples"]), max(ulnet["samples"])
        figures = (number(kernel["median"]), number(ulnet["median"]), f"{ulnet['ratio']:.2f}")
        out.add_row(f"{name}, {column['unit']}", *figures, f"{number(low)} to {number(high)}")
    return out
