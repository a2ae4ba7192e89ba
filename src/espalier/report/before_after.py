"""The before/after table: every measured quantity of both models, and what the change is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import Comparison, at, compare
from espalier.report import units
from espalier.report.fields import WEIGHTS, size_of

_WORDS = {
    "bytes": ("smaller", "larger"),
    "count": ("fewer", "more"),
    "ms": ("faster", "slower"),
    "per_second": ("higher", "lower"),
}


@dataclass(frozen=True)
class Cell:
    """A figure, and in smaller type its spread or its doubt."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; ``better`` is None where the change is none or within the spread."""

    label: str
    note: str
    before: Cell
    after: Cell
    change: Cell
    better: bool | None


def rows(record: Mapping[str, Any]) -> tuple[Row, ...]:
    """The before/after table."""
    original, compressed = (at(record, side) for side in ("original", "compressed"))
    before = dict(original) if isinstance(original, Mapping) else {}
    after = dict(compressed) if isinstance(compressed, Mapping) else {}
    after["file_bytes"] = size_of(record)
    found = compare(before, after)
    weights = size_of(record, WEIGHTS)
    if weights is not None:
        sides = compare({"file_bytes": before.get("file_bytes")}, {"file_bytes": weights})
        found[1:1] = [_relabelled(row, "file, architecture known") for row in sides]
    if at(after, "metric", "split") != "test":
        test = [{"metric": {**mapping(at(record, "metric")), **mapping(at(record, "test", side)), "split": "test"}}
                for side in ("original", "compressed")]  # fmt: skip
        found += compare(test[0], test[1])
    return tuple(row(line) for line in found)


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _relabelled(line: Comparison, label: str) -> Comparison:
    return Comparison(line.key, label, line.kind, line.unit, line.before, line.after, line.ratio, better=line.better)


def row(line: Comparison) -> Row:
    """A comparison in words."""
    before, after = (
        _cell(line, value, spread) for value, spread in zip((line.before, line.after), line.spread, strict=True)
    )
    if line.kind == "metric":
        change = "" if line.change is None else units.signed(line.change, units.printable(line.unit), line.after)
    else:
        change = ratio_words(line.before, line.after, line.kind)
    doubt = ""
    if change and _within_noise(line):
        doubt = "within one standard error" if line.kind == "metric" else "within the spread"
    label, note = units.printable(line.label), line.note
    if line.key == "file_bytes":
        label, note = ("file, self-contained" if label == "file" else label), "before: as fp32 safetensors"
    return Row(label, note, before, after, Cell(change, doubt), None if doubt else line.better)


def _cell(line: Comparison, value: float | None, spread: tuple[float, float] | None) -> Cell:
    if value is None:
        return Cell("")
    if line.kind == "bytes":
        return Cell(units.size(value))
    if line.kind == "count":
        return Cell(units.count(value))
    if line.kind == "metric":
        return Cell(units.value(value, units.printable(line.unit), None if spread is None else spread[1] - value))
    note = "" if spread is None else f"{units.significant(spread[0])} – {units.significant(spread[1])}"
    return Cell(f"{units.significant(value)} {line.unit}", note)


def _within_noise(line: Comparison) -> bool:
    """Whether the change is smaller than what a repetition would change by."""
    left, right = line.spread
    if line.better is None or left is None or right is None or line.before is None or line.after is None:
        return False
    if line.kind == "metric":
        error = math.hypot(left[1] - line.before, right[1] - line.after)
        return abs(line.after - line.before) <= error
    return left[0] <= right[1] and right[0] <= left[1]


def ratio_words(before: float | None, after: float | None, kind: str) -> str:
    """``59.6x smaller``, ``1.25x slower``, ``slightly fewer``, ``same``."""
    if not before or not after or before < 0 or after < 0:
        return ""
    if before == after:
        return "same"
    ratio = after / before if kind == "per_second" else before / after
    times = units.times(max(ratio, 1 / ratio))
    return f"{'slightly' if times == '1.00x' else times} {_WORDS[kind][ratio < 1]}"
