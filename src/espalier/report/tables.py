"""The tables of the page."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from espalier.report import units
from espalier.report.budget import Budget, Layer, largest
from espalier.report.charts import stacked
from espalier.report.markup import Markup, el

MAX_ROWS = 1000
MAX_NAMES = 12


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Container[int] = ()) -> Markup:
    """A table; columns in ``numbers`` are set flush right. A column that is empty throughout is left out."""
    used = [k for k in range(len(heads)) if any(row[k] not in ("", None) for row in rows)]

    def css(k: int) -> str | None:
        return "n" if k in numbers else None

    head = el("thead", el("tr", (el("th", heads[k], class_=css(k), scope="col") for k in used)))
    body = (el("tr", (el("td", row[k], class_=css(k)) for k in used)) for row in rows[:MAX_ROWS])
    more = el("p", f"and {len(rows) - MAX_ROWS:,} more", class_="quiet") if len(rows) > MAX_ROWS else None
    bare = not any(heads[k] for k in used)
    return el("div", el("table", None if bare else head, el("tbody", body)), more, class_="scroll")


def verdict(truth: bool | None, yes: str, no: str) -> Markup | str:
    """``yes`` or ``no`` in words and colour; nothing for what is not known."""
    if truth is None:
        return ""
    return el("span", yes if truth else no, class_="good" if truth else "bad")


def name_list(names: Sequence[str]) -> Iterable[object]:
    """Layer names, cut after ``MAX_NAMES``."""
    for place, name in enumerate(names[:MAX_NAMES]):
        yield ", " if place else None
        yield el("span", name, class_="name")
    if len(names) > MAX_NAMES:
        yield f" and {len(names) - MAX_NAMES:,} more"


def share_rows(found: Budget, top: int) -> Markup | None:
    """Per tensor: name, how it is coded, a stacked bar on a common scale, bytes, share of the file."""
    shares = largest(found.shares, top)
    if not shares:
        return None
    scale = max(share.total for share in shares if not share.several)
    rows = []
    for share in shares:
        words = " · ".join(part for part in (share.shape, share.coding) if part)
        said = ", ".join(f"{kind} {size:,} bytes" for kind, size in share.parts)
        bar = None if share.several else stacked(share.parts, scale, f"{share.name}: {said}")
        rows.append(
            el(
                "tr",
                el("td", el("span", share.name, class_="name"), el("span", words, class_="note") if words else None),
                el("td", bar, class_="bar-cell"),
                el("td", f"{share.total:,} B", class_="n"),
                el("td", units.percent(share.total / found.total), class_="n"),
            )
        )
    heads = (("tensor", None), ("", None), ("bytes", "n"), ("of the file", "n"))
    head = el("thead", el("tr", (el("th", text, class_=css, scope="col") for text, css in heads)))
    return el("div", el("table", head, el("tbody", rows)), class_="scroll")


def layer_rows(layers: Sequence[Layer]) -> Markup:
    """Per layer: shape, counts, density, bits, bytes."""

    def whole(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    rows = [
        [
            el("span", layer.name, class_="name"),
            layer.shape,
            whole(layer.parameters),
            whole(layer.nonzero),
            "" if layer.density is None else units.percent(layer.density),
            "" if layer.bits is None else f"{layer.bits:g}",
            whole(layer.bytes),
            "" if layer.bits_per_weight is None else units.significant(layer.bits_per_weight),
            layer.coding,
        ]
        for layer in layers
    ]
    heads = ["layer", "shape", "parameters", "non-zero", "kept", "bits", "bytes", "bits per weight", "coding"]
    return table(heads, rows, numbers=range(1, 8))
