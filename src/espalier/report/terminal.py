"""The report in the terminal. Names are shown as plain text: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from espalier.report import units
from espalier.report.before_after import Cell
from espalier.report.budget import Budget, Parts, largest
from espalier.report.info import Info, summarise
from espalier.report.source import load
from espalier.report.steps import Step

TOP = 12
LINE = 300
BAR = 28
COLOURS = {
    "values": "#0072b2",
    "positions": "#e69f00",
    "codebooks": "#009e73",
    "floats": "#cc79a7",
    "graph": "#56b4e9",
    "plans": "#d55e00",
    "header": "#8b9297",
}
# without colour the kinds still differ
LETTERS = {"values": "v", "positions": "p", "codebooks": "c", "floats": "f", "graph": "g", "plans": "l", "header": "h"}
_STYLE = {True: "green", False: "yellow", None: ""}


def render_terminal(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the report of a record. Raises ``RunError`` for what is no record."""
    (console or Console()).print(renderable(summarise(load(record))))


def renderable(info: Info) -> Group:
    """The whole report as one ``rich`` renderable."""
    return Group(*_parts(info))


def _parts(info: Info) -> Iterable[RenderableType]:
    yield Text(info.headline, style="bold")
    if info.status in {"target-missed", "interrupted"}:
        told = f": {info.message}" if info.message != info.headline else ""
        yield Text(info.status.replace("-", " ") + told, style="yellow")
    if info.verified is False:
        yield Text("The file that was re-loaded did not give what was written: do not use it.", style="bold red")
    for goal in info.goals:
        met = {True: "reached", False: "missed", None: ""}[goal.met]
        said = [f"target {goal.label}: {goal.asked}", goal.reached, met]
        yield Text(", ".join(part for part in said if part), style=_STYLE[goal.met])
    if info.rows:
        rows = [
            [row.label, _cell(row.before), _cell(row.after), Text(_line(row.change), style=_STYLE[row.better])]
            for row in info.rows
        ]
        yield _titled("before and after", _table(["", "before", "after", "change"], rows, right={1, 2}))
    if info.paired:
        yield Text(info.paired, style="dim")
    if info.steps:
        yield _titled("steps", _steps(info.steps))
    notes = [[step.path, units.printable(note, LINE)] for step in info.steps for note in step.notes]
    if notes:
        yield _titled("notes", _table(["", ""], notes))
    if info.budget is not None:
        yield _titled("where the bytes are", _budget(info.budget))
    if info.tries:
        yield _titled("tries", _tries(info))
    if info.skipped:
        rows = [[s.step, _names(s.names), units.printable(s.reason, LINE)] for s in info.skipped]
        yield _titled("left alone", _table(["step", "layers", "why"], rows))
    if info.int8:
        yield _titled("int8 file", Group(*(Text(line) for line in info.int8)))
    if info.warnings:
        yield _titled("warnings", Group(*(Text(f"{n.step}: {n.text}", style="yellow") for n in info.warnings)))


def _cell(cell: Cell) -> str:
    return cell.text + (f"\n{cell.note}" if cell.note else "")


def _line(cell: Cell) -> str:
    return ", ".join(part for part in (cell.text, cell.note) if part)


def _titled(title: str, body: RenderableType) -> Padding:
    return Padding(Group(Text(title, style="bold dim"), body), (1, 0, 0, 0))


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], right: Iterable[int] = ()) -> Table:
    """A quiet table; a column that is empty throughout is left out."""
    aligned = set(right)
    used = [k for k in range(len(heads)) if any(str(row[k]) for row in rows)]
    drawn = Table(box=None, pad_edge=False, show_header=any(heads), header_style="dim", padding=(0, 2, 0, 0))
    for k in used:
        drawn.add_column(Text(heads[k]), justify="right" if k in aligned else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for k in used for cell in [row[k]]))
    return drawn


def _steps(steps: Sequence[Step]) -> Table:
    labels = list(dict.fromkeys(delta.label for step in steps for delta in step.deltas))
    rows: list[list[object]] = []
    for step in steps:
        by_label = {delta.label: delta for delta in step.deltas}
        row: list[object] = ["  " * step.depth + step.name]
        for label in labels:
            delta = by_label.get(label)
            shown = f"{delta.before} → {delta.after}" if delta and delta.before else delta.after if delta else ""
            row.append(Text(shown, style=_STYLE[delta.better if delta else None]))
        rows.append([*row, "" if step.seconds is None else units.duration(step.seconds)])
    return _table(["step", *labels, "time"], rows, right=range(1, len(labels) + 2))


def _budget(found: Budget) -> Group:
    shares = largest(found.shares, TOP)
    scale = max((share.total for share in shares if not share.several), default=0)
    legend = []
    for kind, size in found.parts:
        entry = Text(f"{LETTERS.get(kind, '?')} ", style=COLOURS.get(kind, ""))
        legend.append(entry.append(f"{kind} {units.size(size)} ({units.percent(size / found.total)})", style="default"))
    rows = [
        [
            share.name,
            share.coding,
            "" if share.several else bar(share.parts, scale),
            f"{share.total:,} B",
            units.percent(share.total / found.total),
        ]
        for share in shares
    ]
    table = _table(["tensor", "coding", "", "bytes", "of the file"], rows, right={3, 4})
    return Group(Text(f"model.espalier, {found.total:,} bytes"), Columns(legend, padding=(0, 3)), table)


def bar(parts: Parts, scale: float, width: int = BAR) -> Text:
    """A stacked bar, ``scale`` bytes = ``width`` cells: edges are rounded, so the cells add up to the whole."""
    drawn, done, edge = Text(), 0, 0
    for kind, size in parts:
        done += size
        end = round(width * done / scale) if scale > 0 else 0
        drawn.append(LETTERS.get(kind, "?") * (end - edge), style=f"{COLOURS.get(kind, 'default')} reverse")
        edge = end
    return drawn


def _tries(info: Info) -> Table:
    rows = [
        [
            str(t.number),
            t.strength,
            "" if t.bytes is None else units.size(t.bytes),
            "" if t.metric is None else units.value(t.metric, info.unit),
            t.drop,
            "" if t.seconds is None else units.duration(t.seconds),
            Text("the file" if t.final else "kept" if t.kept else "", style="green"),
            t.reason,
        ]
        for t in info.tries
    ]
    heads = ["try", "strength", "file", f"{info.metric or 'metric'}, val", "drop", "time", "", "why"]
    return _table(heads, rows, right=range(6))


def _names(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
