"""The sentence on top of the report, and the comparison on the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units
from espalier.report.before_after import ratio_words
from espalier.report.fields import MODEL, size_of, text, truth


def headline(record: Mapping[str, Any]) -> str:
    """``1.07 MB became 17.9 kB: 59.6x smaller, 1.62 ± 0.13 % test error instead of 1.58 ± 0.12 %; verified by ...``."""
    before, after = number(at(record, "original", "file_bytes")), size_of(record)
    parts = []
    if before is not None and after is not None:
        change = ratio_words(before, after, "bytes")
        parts.append(f"{units.size(before)} became {units.size(after)}{f': {change}' if change else ''}")
    elif after is not None:
        parts.append(f"The file takes {units.size(after)}")
    quality = _quality(record)
    parts += [quality] if quality else []
    if not parts:
        return text(at(record, "message")) or "Nothing was measured yet."
    verified = truth(at(record, "files", MODEL, "verified"))
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
    name = text(at(metric, "name")) or text(at(after, "name")) or "metric"
    unit = text(at(metric, "unit")) or text(at(after, "unit"))
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


def paired(record: Mapping[str, Any]) -> str:
    """The comparison on the same samples (``espalier.measure.paired``) as one sentence."""
    data, unit = at(record, "paired"), text(at(record, "metric", "unit"))
    names = ("drop", "low", "high", "lost", "gained", "count", "p")
    found = {name: value for name in names if (value := number(at(data, name))) is not None}
    if len(found) != len(names):
        return ""
    low, high = (units.drop(found[name], unit) for name in ("low", "high"))
    return (
        f"On the same {units.plural(int(found['count']), 'sample')}, {found['lost']:,.0f} came out worse and "
        f"{found['gained']:,.0f} better: a drop of {units.drop(found['drop'], unit)} "
        f"(95 % interval {low} to {high}; McNemar p = {units.significant(found['p'], 2)})."
    )
