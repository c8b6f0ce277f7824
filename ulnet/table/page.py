"""A finished measurement as one HTML file that needs nothing else; with plots where matplotlib is installed."""

from __future__ import annotations

import html
import io
from typing import Any

from ulnet.table import report
from ulnet.table.report import Document

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 2em } caption { text-align: left; font-weight: 600; padding: .3em 0 }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: right; vertical-align: top } th { background: #f4f4f4 }
th:first-child, td:first-child { text-align: left } small { color: #666; display: block }
.good { background: #dff2df } .bad { background: #f7dede } .none { color: #999 } svg { max-width: 100%; height: auto }
"""
NO_PLOTS = "No plots: matplotlib is not installed (pip install 'ulnet[plots]')."
CLASSES = {"moonshot": "good", "reached": "good", "not reached": "bad", "not measured": "none", "shown": ""}


def _escaped(text: object) -> str:
    return html.escape(str(text))


def _row(cells: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(cell if cell.startswith("<td") else f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _grid(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    body = "\n".join(_row(cells) for cells in rows)
    return (
        f"<table><caption>{_escaped(caption)}</caption>\n{_row([_escaped(h) for h in heads], 'th')}\n{body}\n</table>"
    )


def _cell(cell: dict[str, Any]) -> str:
    first, *more = report.cell_lines(cell)
    return _escaped(first) + "".join(f"<small>{_escaped(line)}</small>" for line in more if line)


def _tables(table: Document) -> list[str]:
    parts = []
    for title, columns in report.groups(table):
        rows = []
        for row in table["rows"]:
            if row["skipped"]:
                what = f'<td class="none" colspan="{len(columns)}">skipped: {_escaped(row["skipped"])}</td>'
                rows.append([_escaped(row["name"]), what])
                continue
            cells = table["cells"][row["key"]]
            rows.append([_escaped(row["name"]), *(_cell(cells[column["key"]]) for column in columns)])
        parts.append(_grid(title, ["", *(report.heading(column) for column in columns)], rows))
    parts.append(f"<p>{_escaped(report.EXPLANATION)} {table['passes']} passes.</p>")
    return parts


def _targets(targets: list[Document]) -> str:
    rows = []
    for target in targets:
        word = report.verdict(target)
        rows.append(
            [
                f"{_escaped(target['name'])}<small>{_escaped(target['how'])}</small>",
                *(_escaped(text) for text in (target["year_1993"] or "-", target["target"], target["moonshot"])),
                _escaped(report.measured(target)),
                f'<td class="{CLASSES[word]}">{_escaped(word)}</td>',
            ]
        )
    return _grid("Targets", ["what", "1993", "target", "moonshot", "measured", ""], rows)


def _layers(layers: Document) -> list[str]:
    ways = layers["ways"]
    rows = []
    for layer in layers["layers"]:
        figures = ["-" if way["us"].get(layer["key"]) is None else f"{way['us'][layer['key']]:.2f}" for way in ways]
        rows.append([_escaped(layer["name"]), *figures, layer["tcp_1993"], layer["udp_1993"]])
    rows.append(["all", *(f"{way['sum_us']:.2f}" for way in ways), *layers["all_1993"]])
    old = [f"1993, {proto}: library/kernel/server" for proto in ("TCP", "UDP")]
    heads = ["layer", *(way["name"] for way in ways), *old]
    parts = [_grid("One way of a 1-byte message, by layer, in us", heads, rows)]
    for title, table in report.counted_tables(layers):
        rows = [[_escaped(name), *(report.amount(value) for value in row.values())] for name, row in table.items()]
        parts.append(_grid(title, ["", *next(iter(table.values()), {})], rows))
    return parts + [f"<p>{_escaped(note)}</p>" for note in layers["notes"]]


# -- plots -----------------------------------------------------------------------------------------


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _plots(document: Document) -> list[str]:
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return [f"<p>{_escaped(NO_PLOTS)}</p>"]
    parts = []
    if "table" in document:
        table = document["table"]
        rows = [row for row in table["rows"] if not row["skipped"]]
        for proto in ("tcp", "udp"):
            columns = [c for c in table["columns"] if c["proto"] == proto and c["size"]]
            if not columns:
                continue
            figure = Figure(figsize=(9, 4.5))
            axes = figure.subplots()
            for row in rows:
                cells = [table["cells"][row["key"]][column["key"]] for column in columns]
                medians = [cell["median"] for cell in cells]
                spread = [
                    [m - cell["q1"] for m, cell in zip(medians, cells, strict=True)],
                    [cell["q3"] - m for m, cell in zip(medians, cells, strict=True)],
                ]
                sizes = [column["size"] for column in columns]
                axes.errorbar(sizes, medians, yerr=spread, label=row["name"], marker="o", markersize=3, linewidth=1.2)
            axes.set(title=f"{proto.upper()} round trip", xlabel="bytes", ylabel="us", yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
            parts.append(_svg(figure))
        if any(not column["size"] for column in table["columns"]):
            figure = Figure(figsize=(9, 3.5))
            axes = figure.subplots()
            cells = [table["cells"][row["key"]]["bulk"] for row in rows]
            medians = [cell["median"] for cell in cells]
            low = [m - cell["q1"] for m, cell in zip(medians, cells, strict=True)]
            high = [cell["q3"] - m for m, cell in zip(medians, cells, strict=True)]
            axes.barh([row["name"] for row in rows], medians, xerr=[low, high], color="#4477aa")
            axes.invert_yaxis()
            axes.set(title="Bulk TCP", xlabel="Gbit/s")
            parts.append(_svg(figure))
    if document.get("layers", {}).get("ways"):
        layers = document["layers"]
        figure = Figure(figsize=(9, 3.5))
        axes = figure.subplots()
        names = [way["name"] for way in layers["ways"]]
        left = [0.0] * len(names)
        for layer in layers["layers"]:
            widths = [way["us"].get(layer["key"]) or 0.0 for way in layers["ways"]]
            axes.barh(names, widths, left=left, label=layer["name"])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(title="One way of a 1-byte message", xlabel="us")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        parts.append(_svg(figure))
    return parts


def render(document: Document) -> str:
    """The page."""
    machine = document["machine"]
    parts = ["<h1>ulnet: the experiment of 1993 on this machine</h1>"]
    parts.append(
        f"<p>ulnet {_escaped(document['ulnet'])}, {_escaped(document['date'])}: {_escaped(machine['cpu'])}, "
        f"{machine['processors']} processors, Linux {_escaped(machine['kernel'])}, {_escaped(machine['python'])}. "
        + " ".join(_escaped(note) for note in document["notes"])
        + "</p>"
    )
    if "table" in document:
        parts += _tables(document["table"])
    if "targets" in document:
        parts.append(_targets(document["targets"]))
    if "layers" in document:
        parts += _layers(document["layers"])
    parts += _plots(document)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>ulnet table</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
