"""The written files, and the target: what was asked beside what was reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units
from espalier.report.before_after import mapping, ratio_words
from espalier.report.fields import MODEL, WEIGHTS, size_of, text, truth


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


def files(record: Mapping[str, Any]) -> Iterable[File]:
    """The files written, the self-contained one first."""
    meaning = {
        MODEL: "self-contained: the architecture travels in the file",
        WEIGHTS: "architecture known to the reader",
    }
    given = mapping(at(record, "files"))
    before, unit = number(at(record, "original", "file_bytes")), text(at(record, "metric", "unit"))
    for name in sorted(given, key=lambda name: (name != MODEL, name != WEIGHTS, name)):
        length = size_of(record, name)
        scores = tuple(
            f"{split} {units.value(value, unit, number(at(score, 'stderr')))}"
            for split, score in mapping(at(given, name, "metric")).items()
            if (value := _score(score)) is not None and split in ("val", "test")
        )
        verified = truth(at(given, name, "verified"))
        yield File(
            units.printable(name), meaning.get(name, ""), length, ratio_words(before, length, "bytes"), verified, scores
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
        reached = "" if drop is None else units.drop(drop, unit)
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
