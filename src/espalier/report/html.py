"""The report as one offline HTML file: no script, no network, everything escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from espalier.core.files import write_atomic
from espalier.report import units
from espalier.report.before_after import Cell
from espalier.report.charts import kind_class, scatter, stacked
from espalier.report.info import Info, summarise
from espalier.report.markup import Markup, el, join
from espalier.report.source import load
from espalier.report.story import steps_section
from espalier.report.tables import layer_rows, name_list, share_rows, table, verdict

TOP = 24
FOLDED_LINES = 40
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_html(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of a record to ``path``, complete or not at all. Raises ``RunError`` if it cannot be written."""
    return write_atomic(path, page(record))


def page(record: Mapping[str, Any]) -> str:
    """The whole page of a record."""
    info = summarise(load(record))
    style = resources.files("espalier.report").joinpath("page.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"espalier: {info.model or 'report'}"),
        el("style", Markup(style)),
    )
    body = el("body", el("main", _sections(info), _footer()))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _sections(info: Info) -> Iterable[Markup | None]:
    yield _header(info)
    yield _before_after(info)
    yield _bytes(info)
    yield steps_section(info)
    yield _tries(info)
    yield _left_alone(info)
    yield _warnings(info)
    yield _layers(info)
    yield _files(info)
    yield _int8(info)
    yield _settings(info)


def section(title: str, *children: object, lead: str = "") -> Markup:
    """A titled part of the page."""
    return el("section", el("h2", title), el("p", lead, class_="lead") if lead else None, children)


def _header(info: Info) -> Markup:
    headline = re.sub(r"(?<=\d) (?=[%kMGTB±])|(?<=±) ", "\N{NO-BREAK SPACE}", info.headline)
    eyebrow = " · ".join(part for part in ("espalier", info.model, info.created) if part)
    banner = None
    if info.status in {"target-missed", "interrupted"}:
        said = {"target-missed": "The target was not reached.", "interrupted": "Interrupted: this is the best so far."}
        told = info.message if info.message != info.headline else ""
        banner = el("p", el("strong", said[info.status]), " ", told, class_="banner")
    if info.verified is False:
        warning = el("strong", "The file that was re-loaded did not give what was written: do not use it.")
        banner = join([el("p", warning, class_="banner"), banner])
    return el("header", el("p", eyebrow, class_="eyebrow"), el("h1", headline), banner, _goals(info))


def _goals(info: Info) -> Markup | None:
    if not info.goals:
        return None
    rows = [[goal.label, goal.asked, goal.reached, verdict(goal.met, "reached", "missed")] for goal in info.goals]
    return table(["target", "asked", "reached", ""], rows)


def _before_after(info: Info) -> Markup | None:
    if not info.rows:
        return None
    rows = [
        [
            cell(Cell(row.label, row.note)),
            cell(row.before),
            cell(row.after),
            el("span", cell(row.change), class_={True: "good", False: "bad", None: None}[row.better]),
        ]
        for row in info.rows
    ]
    paired = el("p", info.paired, class_="quiet") if info.paired else None
    return section("Before and after", table(["", "before", "after", "change"], rows, numbers=(1, 2)), paired)


def cell(shown: Cell) -> object:
    """A figure with its note below it."""
    return [shown.text, el("span", shown.note, class_="note") if shown.note else None] if shown.text else ""


def _bytes(info: Info) -> Markup | None:
    found = info.budget
    if found is None:
        return None
    legend = [
        el(
            "li",
            el(
                "svg", el("rect", width=12, height=12, class_=kind_class(kind)), viewBox="0 0 12 12", aria_hidden="true"
            ),
            kind,
            el("span", f"{units.size(size)}, {units.percent(size / found.total)}"),
        )
        for kind, size in found.parts
    ]
    whole = stacked(found.parts, found.total, "the whole file by what the bytes are spent on", "bar whole")
    odd = None
    if found.unexplained:
        words = "are not itemised" if found.unexplained > 0 else "are itemised twice"
        odd = el("p", f"{units.size(abs(found.unexplained))} of the file's length {words}.", class_="quiet")
    return section(
        "Where the bytes are", whole, el("ul", legend, class_="legend"), odd, share_rows(found, TOP),
        lead=f"model.espalier, {found.total:,} bytes.",
    )  # fmt: skip


def _tries(info: Info) -> Markup | None:
    if not info.tries:
        return None
    rows = [
        [
            str(t.number),
            t.strength,
            "" if t.bytes is None else units.size(t.bytes),
            "" if t.metric is None else units.value(t.metric, info.unit),
            t.drop,
            "" if t.seconds is None else units.duration(t.seconds),
            verdict(True if t.kept else None, "the file" if t.final else "kept", ""),
            t.reason,
        ]
        for t in info.tries
    ]
    heads = ["try", "strength", "file", f"{info.metric or 'metric'}, val", "drop", "time", "", "why"]
    lead = "Filled: kept. Ringed: the file that was written."
    return section(
        "Tries", scatter(info.tries, info.metric, info.unit), table(heads, rows, numbers=range(6)), lead=lead
    )


def _left_alone(info: Info) -> Markup | None:
    if not info.skipped:
        return None
    rows = [[el("span", s.step, class_="name"), name_list(s.names), s.reason] for s in info.skipped]
    return section("Left alone", table(["step", "layers", "why"], rows))


def _warnings(info: Info) -> Markup | None:
    if not info.warnings:
        return None
    rows = [[el("span", note.step, class_="name"), note.text] for note in info.warnings]
    return section("Warnings", table(["step", "warning"], rows))


def _layers(info: Info) -> Markup | None:
    if not info.layers:
        return None
    drawn = layer_rows(info.layers)
    if len(info.layers) > TOP:
        drawn = el("details", el("summary", f"Show all {units.plural(len(info.layers), 'layer')}"), drawn)
    return section("Layers", drawn)


def _files(info: Info) -> Markup | None:
    if not info.files:
        return None
    notes = [el("p", note, class_="quiet") for note in info.notes]
    rows = [
        [
            [el("span", file.name, class_="name"), el("span", file.meaning, class_="note") if file.meaning else None],
            "" if file.bytes is None else f"{file.bytes:,} B",
            file.smaller,
            verdict(file.verified, "re-loaded, the same", "NOT verified"),
            "; ".join(file.scores),
        ]
        for file in info.files
    ]
    return section("Files", table(["file", "length", "", "verified", "metric, re-loaded"], rows, numbers=(1, 2)), notes)


def _int8(info: Info) -> Markup | None:
    return section("Int8 file", [el("p", line) for line in info.int8]) if info.int8 else None


def _settings(info: Info) -> Markup | None:
    found = info.settings
    if not found.recipe and not found.environment:
        return None
    rows: Sequence[Sequence[object]] = [[name, value] for name, value in found.environment]
    recipe = el("pre", el("code", found.recipe)) if found.recipe else None
    if recipe and found.recipe.count("\n") > FOLDED_LINES:
        recipe = el("details", el("summary", "Show the recipe"), recipe)
    return section("Settings", recipe, table(["", ""], rows) if rows else None)


def _footer() -> Markup:
    return el("footer", "Every figure on this page was measured in this run; none is quoted from a publication. "
                        "kB = 1000 bytes. ± is one standard error.")  # fmt: skip
