"""Compare two measurements, as plain data: what the report's before/after table shows. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

LARGEST = 1e100
"""No measured quantity is larger; sums, ratios and scales of smaller ones cannot overflow."""

Kind = Literal["bytes", "count", "ms", "per_second", "metric"]


class HasJson(Protocol):
    """Anything that gives itself as plain data, such as a ``Measurement``."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""


@dataclass(frozen=True)
class Comparison:
    """One quantity before and after; ``ratio`` says how many times better (>1) or worse (<1) it became.

    ``kind`` says how to write the numbers; for a metric ``ratio`` is None and ``change`` = after - before counts.
    ``note`` states the conditions the numbers depend on (batch, threads, split).
    """

    key: str
    label: str
    kind: Kind
    unit: str
    before: float | None
    after: float | None
    ratio: float | None = None
    change: float | None = None
    better: bool | None = None
    spread: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    note: str = ""


def number(value: Any) -> float | None:
    """``value`` if it is a real number that can be a measurement, else None: nothing is shown for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= LARGEST else None  # also false for NaN


def at(data: Any, *keys: str) -> Any:
    """The value under a path of keys in nested mappings, or None."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


Where = tuple[str, ...]
_ROWS: tuple[tuple[str, str, Kind, str, Where], ...] = (
    ("file_bytes", "file", "bytes", "B", ("file_bytes",)),
    ("parameters", "parameters", "count", "", ("parameters",)),
    ("nonzero", "non-zero parameters", "count", "", ("nonzero",)),
    ("macs", "MACs per sample", "count", "", ("macs",)),
    ("latency", "latency", "ms", "ms", ("latency", "median_ms")),
    ("throughput", "throughput", "per_second", "samples/s", ("throughput", "per_second")),
    ("peak_memory", "peak tensor memory", "bytes", "B", ("peak_memory", "bytes")),
)


def compare(
    original: Mapping[str, Any] | HasJson | None, compressed: Mapping[str, Any] | HasJson | None
) -> list[Comparison]:
    """One row per quantity that at least one side has; both sides are ``Measurement``s or their plain data."""
    before, after = (_plain(side) for side in (original, compressed))
    rows = []
    for key, label, kind, unit, where in _ROWS:
        b, a = number(at(before, *where)), number(at(after, *where))
        if b is None and a is None:
            continue
        ratio = _times(b, a, larger_is_better=kind == "per_second")
        spread = (_spread(kind, at(before, key)), _spread(kind, at(after, key)))
        better = None if ratio is None or ratio == 1 else ratio > 1
        note = _note(at(before, key), at(after, key))
        rows.append(Comparison(key, label, kind, unit, b, a, ratio, None, better, spread, note))
    return rows + _metric_row(at(before, "metric"), at(after, "metric"))


def _plain(side: Mapping[str, Any] | HasJson | None) -> Mapping[str, Any]:
    if side is None:
        return {}
    return side if isinstance(side, Mapping) else side.to_json()


def _times(before: float | None, after: float | None, *, larger_is_better: bool) -> float | None:
    if before is None or after is None or before <= 0 or after <= 0:
        return None
    return after / before if larger_is_better else before / after


def _spread(kind: Kind, timing: Any) -> tuple[float, float] | None:
    """10th and 90th percentile of a timing, in the row's own unit."""
    low, high, batch = (number(at(timing, key)) for key in ("p10_ms", "p90_ms", "batch"))
    if low is None or high is None:
        return None
    if kind == "ms":
        return low, high
    return None if batch is None or low <= 0 or high <= 0 else (1e3 * batch / high, 1e3 * batch / low)


def _note(before: Any, after: Any) -> str:
    """Batch, threads and runs of a timing, where both sides agree on them."""
    say: dict[str, Callable[[float], str]] = {
        "batch": lambda n: f"batch {n:g}",
        "threads": lambda n: f"{n:g} thread{'s' if n != 1 else ''}",
        "runs": lambda n: f"median of {n:g}",
    }
    parts = []
    for key, words in say.items():
        found = {value for side in (before, after) if (value := number(at(side, key))) is not None}
        if len(found) == 1:
            parts.append(words(found.pop()))
    return ", ".join(parts)


def _metric_row(before: Any, after: Any) -> list[Comparison]:
    b, a = number(at(before, "value")), number(at(after, "value"))
    described = after if isinstance(after, Mapping) else before
    if b is None and a is None:
        return []
    name, unit, split = (at(described, key) for key in ("name", "unit", "split"))
    higher = at(described, "higher_is_better") is not False
    change = None if b is None or a is None else a - b
    better = None if not change else (change > 0) == higher
    errors = tuple(_error(side) for side in (before, after))
    label = f"{name or 'metric'}{f', {split}' if split else ''}"
    return [Comparison("metric", label, "metric", str(unit or ""), b, a, None, change, better, (errors[0], errors[1]))]


def _error(score: Any) -> tuple[float, float] | None:
    value, error = number(at(score, "value")), number(at(score, "stderr"))
    return None if value is None or error is None else (value - error, value + error)
