"""What the report says, from a run's record: every number is computed here, nothing is drawn.

A key that is missing or holds no usable value shows nothing; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import Comparison, at, compare, number
from espalier.report import units
from espalier.report.budget import Budget, Layer, budget, layers
from espalier.report.settings import Settings, settings
from espalier.report.steps import Note, Skipped, Step, notes, skipped, steps
from espalier.report.tries import Try, tries

MODEL, WEIGHTS = "model.espalier", "model.weights.espalier"
_WORDS = {
    "bytes": ("smaller", "larger"),
    "count": ("fewer", "more"),
    "ms": ("faster", "slower"),
    "per_second": ("higher", "lower"),
}


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; ``better`` is None where the change is none or within the spread."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None
    note: str = ""


@dataclass(frozen=True)
class File:
    """One written file: length in bytes, whether its re-loading was verified, the metric of what was re-loaded."""

    name: str
    meaning: str
    bytes: int | None
    smaller: str
    verified: bool | None
    scores: tuple[str, ...]


@dataclass(frozen=True)
class Goal:
    """One part of the target: what was asked and what was reached."""

    label: str
    asked: str
    reached: str
    met: bool | None


@dataclass(frozen=True)
class Info:
    """Everything the report shows."""

    model: str
    created: str
    status: str
    headline: str
    message: str
    verified: bool | None
    goals: tuple[Goal, ...]
    rows: tuple[Row, ...]
    paired: str
    files: tuple[File, ...]
    budget: Budget | None
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    tries: tuple[Try, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[Note, ...]
    settings: Settings
    metric: str
    unit: str


def text(value: Any) -> str:
    """A string of the record made safe to show; empty for anything that is no string."""
    return units.printable(value, 2000) if isinstance(value, str) else ""


def summarise(record: Mapping[str, Any]) -> Info:
    """What is shown of a record (see ``espalier.report.load``)."""
    metric = at(record, "metric")
    name, unit = text(at(metric, "name")), text(at(metric, "unit"))
    verified = _truth(at(record, "files", MODEL, "verified"))
    done = steps(at(record, "steps"), name, unit, higher=at(metric, "higher_is_better") is not False)
    info = at(record, "files", MODEL, "info")
    file = size_of(record, MODEL)
    return Info(
        model=text(at(record, "model", "class")),
        created=text(at(record, "created")),
        status=text(at(record, "status")),
        headline=headline(record),
        message=text(at(record, "message")),
        verified=verified,
        goals=goals(record),
        rows=rows(record),
        paired=paired(record),
        files=tuple(files(record)),
        budget=budget(info),
        layers=layers(at(record, "layers"), info),
        steps=done,
        tries=tries(at(record, "tries"), unit, file),
        skipped=skipped(done),
        warnings=notes(done),
        settings=settings(record),
        metric=name,
        unit=unit,
    )


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def size_of(record: Mapping[str, Any], name: str = MODEL) -> int | None:
    """Length of a written file in bytes; the self-contained one also stands in the measurement."""
    found = number(at(record, "files", name, "bytes"))
    if found is None and name == MODEL:
        found = number(at(record, "compressed", "file_bytes"))
    return None if found is None else int(found)


# --- the sentence on top -----------------------------------------------------------------------------


def headline(record: Mapping[str, Any]) -> str:
    """``1.07 MB became 17.9 kB: 59.6x smaller, 1.62 ± 0.13 % test error instead of 1.58 ± 0.12 %; verified by ...``."""
    before, after = number(at(record, "original", "file_bytes")), size_of(record)
    parts = []
    if before is not None and after is not None:
        change = _ratio(before, after, "bytes")
        parts.append(f"{units.size(before)} became {units.size(after)}{f': {change}' if change else ''}")
    elif after is not None:
        parts.append(f"The file takes {units.size(after)}")
    quality = _quality(record)
    parts += [quality] if quality else []
    if not parts:
        return text(at(record, "message")) or "Nothing was measured yet."
    verified = _truth(at(record, "files", MODEL, "verified"))
    proof = {True: "; verified by re-loading the file", False: "; the re-loaded file was NOT verified", None: ""}[
        verified
    ]
    sentence = ", ".join(parts) + proof + "."
    return sentence[0].upper() + sentence[1:]


def _quality(record: Mapping[str, Any]) -> str:
    before, after, split = deciding(record)
    value = number(at(after, "value"))
    if value is None:
        return ""
    metric = at(record, "metric")
    name, unit = text(at(metric, "name")) or "metric", text(at(metric, "unit"))
    error = name.endswith("accuracy") and unit == "%"  # the literature quotes errors
    name = f"{name[: -len('accuracy')]}error" if error else name

    def show(score: Any) -> str:
        found = number(at(score, "value"))
        assert found is not None  # noqa: S101 - both callers looked
        return units.value(100 - found if error else found, unit, number(at(score, "stderr")))

    words = " ".join(part for part in (show(after), split, name) if part)
    return words if number(at(before, "value")) is None else f"{words} instead of {show(before)}"


def deciding(record: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """The scores to quote and their split: test where both were measured on it, else those of the measurements."""
    before, after = at(record, "test", "original"), at(record, "test", "compressed")
    if number(at(after, "value")) is not None:
        return before, after, "test"
    before, after = at(record, "original", "metric"), at(record, "compressed", "metric")
    if at(before, "split") != at(after, "split"):
        before = None
    return before, after, text(at(after, "split"))


# --- before and after --------------------------------------------------------------------------------


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
        test = [{"metric": {**_mapping(at(record, "metric")), **_mapping(at(record, "test", side)), "split": "test"}}
                for side in ("original", "compressed")]  # fmt: skip
        found += compare(test[0], test[1])
    return tuple(row(line) for line in found)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _relabelled(line: Comparison, label: str) -> Comparison:
    return Comparison(line.key, label, line.kind, line.unit, line.before, line.after, line.ratio, better=line.better)


def row(line: Comparison) -> Row:
    """A comparison in words."""
    cells = [_cell(line, value, spread) for value, spread in zip((line.before, line.after), line.spread, strict=True)]
    noise = _within_noise(line)
    if line.kind == "metric":
        change = "" if line.change is None else units.signed(line.change, units.printable(line.unit), line.after)
        words = ", within one standard error"
    else:
        change = _ratio(line.before, line.after, line.kind) if line.ratio is not None else ""
        words = ", within the spread"
    label, note = units.printable(line.label), line.note
    if line.key == "file_bytes":
        label, note = ("file, self-contained" if line.label == "file" else label), "before: as fp32 safetensors"
    return Row(
        label, cells[0], cells[1], change + (words if change and noise else ""), None if noise else line.better, note
    )


def _cell(line: Comparison, value: float | None, spread: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    if line.kind == "bytes":
        return units.size(value)
    if line.kind == "count":
        return units.count(value)
    if line.kind == "metric":
        return units.value(value, units.printable(line.unit), None if spread is None else spread[1] - value)
    shown = f"{units.significant(value)} {line.unit}"
    if spread is None:
        return shown
    return f"{shown} ({units.significant(spread[0])}–{units.significant(spread[1])})"


def _within_noise(line: Comparison) -> bool:
    """Whether the change is smaller than what a repetition would change by."""
    left, right = line.spread
    if line.better is None or left is None or right is None or line.before is None or line.after is None:
        return False
    if line.kind == "metric":
        error = math.hypot(left[1] - line.before, right[1] - line.after)
        return abs(line.after - line.before) <= error
    return left[0] <= right[1] and right[0] <= left[1]


def _ratio(before: float | None, after: float | None, kind: str) -> str:
    """``59.6x smaller``, ``1.25x slower``, ``same``."""
    if not before or not after or before < 0 or after < 0:
        return ""
    if before == after:
        return "same"
    ratio = after / before if kind == "per_second" else before / after
    return f"{units.times(max(ratio, 1 / ratio))} {_WORDS[kind][ratio < 1]}"


def paired(record: Mapping[str, Any]) -> str:
    """The comparison on the same samples (``espalier.measure.paired``) as one sentence."""
    data, unit = at(record, "paired"), text(at(record, "metric", "unit"))
    names = ("drop", "low", "high", "lost", "gained", "count", "p")
    found = {name: value for name in names if (value := number(at(data, name))) is not None}
    if len(found) != len(names):
        return ""
    low, high = (units.signed(found[name], "", found["drop"]) for name in ("low", "high"))
    return (
        f"On the same {units.plural(int(found['count']), 'sample')}, {found['lost']:,.0f} came out worse and "
        f"{found['gained']:,.0f} better: a drop of {units.value(found['drop'], 'points' if unit == '%' else unit)} "
        f"(95 % interval {low} to {high}; McNemar p = {units.significant(found['p'], 2)})."
    )


# --- files and target --------------------------------------------------------------------------------


def files(record: Mapping[str, Any]) -> Iterable[File]:
    """The files written, the self-contained one first."""
    meaning = {
        MODEL: "self-contained: the architecture travels in the file",
        WEIGHTS: "architecture known to the reader",
    }
    given = _mapping(at(record, "files"))
    before, unit = number(at(record, "original", "file_bytes")), text(at(record, "metric", "unit"))
    for name in sorted(given, key=lambda name: (name != MODEL, name != WEIGHTS, name)):
        length = size_of(record, name)
        scores = tuple(
            f"{split} {units.value(value, unit, number(at(score, 'stderr')))}"
            for split, score in _mapping(at(given, name, "metric")).items()
            if (value := _score(score)) is not None and split in ("val", "test")
        )
        verified = _truth(at(given, name, "verified"))
        yield File(
            units.printable(name), meaning.get(name, ""), length, _ratio(before, length, "bytes"), verified, scores
        )


def _score(score: Any) -> float | None:
    return number(at(score, "value")) if isinstance(score, Mapping) else number(score)


def goals(record: Mapping[str, Any]) -> tuple[Goal, ...]:
    """What was asked for beside what was reached."""
    target, metric = at(record, "target"), at(record, "metric")
    before, after = number(at(record, "original", "file_bytes")), size_of(record)
    found = []
    asked = number(at(target, "size"))
    if asked is not None:
        reached = "" if after is None else units.size(after)
        found.append(Goal("size", f"at most {units.size(asked)}", reached, None if after is None else after <= asked))
    asked = number(at(target, "times"))
    if asked is not None:
        ratio = before / after if before and after else None
        met = None if ratio is None else ratio >= asked
        found.append(Goal("ratio", f"at least {asked:g}x smaller", "" if ratio is None else units.times(ratio), met))
    asked = number(at(target, "max_drop"))
    if asked is not None:
        unit = text(at(metric, "unit"))
        drop = drop_on_val(record)
        met = None if drop is None else drop <= asked
        points = "points" if unit == "%" else unit
        reached = "" if drop is None else units.value(drop, points)
        found.append(Goal("drop on val", f"at most {asked:g} {points}".strip(), reached, met))
    asked = number(at(target, "minutes"))
    if asked is not None:
        found.append(Goal("time", f"at most {asked:g} min", "", None))
    return tuple(found)


def drop_on_val(record: Mapping[str, Any]) -> float | None:
    """How much worse the re-loaded file is on val, in the metric's unit; None unless both were measured on val."""
    before = at(record, "original", "metric")
    after = _score(at(record, "files", MODEL, "metric", "val"))
    if after is None and at(record, "compressed", "metric", "split") == "val":
        after = number(at(record, "compressed", "metric", "value"))
    value = number(at(before, "value"))
    if value is None or after is None or at(before, "split") != "val":
        return None
    return value - after if at(record, "metric", "higher_is_better") is not False else after - value
