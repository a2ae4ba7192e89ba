"""The steps of a run: what each one gained and cost, what it left alone and why, how training went."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units
from espalier.report.before_after import ratio_words
from espalier.report.budget import objects
from espalier.report.fields import items, name_of
from espalier.report.per_layer import PerLayer, per_layer

MAX_POINTS = 400
MAX_DEPTH = 6


@dataclass(frozen=True)
class Delta:
    """One quantity before and after a step, in words; ``better`` is None for a change within a standard error."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class Curve:
    """One quantity over the epochs: (epoch, value) in order; ``unit`` of the value."""

    label: str
    unit: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Sensitivity:
    """How a metric falls as one group after another loses units: (group, units, values at ``levels``)."""

    label: str
    levels: tuple[float, ...]
    full: float
    unit: str
    higher: bool
    groups: tuple[tuple[str, int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class QuantizationSensitivity:
    """A metric with one layer alone quantized and with all but it: (layer, its bits in words, on, off)."""

    label: str
    full: float
    everything: float
    unit: str
    higher: bool
    layers: tuple[tuple[str, str, float, float], ...]


@dataclass(frozen=True)
class Skipped:
    """Layers a step left alone for one reason."""

    step: str
    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """A sentence a step left behind."""

    step: str
    text: str


@dataclass(frozen=True)
class Step:
    """One step; ``depth`` is how many composites it stands in."""

    name: str
    path: str
    depth: int
    method: str
    fields: tuple[tuple[str, str], ...]
    seconds: float | None
    deltas: tuple[Delta, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    curves: tuple[Curve, ...]
    per_layer: tuple[PerLayer, ...]
    sensitivity: Sensitivity | None = None
    quantization: QuantizationSensitivity | None = None


def steps(given: Any, metric: str, unit: str, *, higher: bool) -> tuple[Step, ...]:
    """The steps in the order they ran; ``metric``, ``unit`` and ``higher`` (is better) describe the metric on val."""
    done = [_step(item, metric or "metric", unit, higher=higher) for item in objects(given)]
    outermost = min((step.depth for step in done), default=0)
    return tuple(replace(step, depth=min(step.depth - outermost, MAX_DEPTH)) for step in done)


def _step(item: Mapping[str, Any], metric: str, unit: str, *, higher: bool) -> Step:
    path = name_of(item.get("path"))
    last = path.rpartition("/")[2]
    name = re.sub(r"^\d+-", "", last) or last or name_of(item.get("method"))
    fields = item.get("fields")
    return Step(
        name=name,
        path=path,
        depth=path.count("/"),
        method=name_of(item.get("method")),
        fields=tuple((units.printable(key, 60), _plain(v)) for key, v in items(fields) if v not in (None, [], {})),
        seconds=number(item.get("seconds")),
        deltas=_deltas(item.get("before"), item.get("after"), metric, unit, higher=higher),
        skipped=_skipped(path, item.get("skipped")),
        notes=_strings(item.get("notes")),
        warnings=_strings(item.get("warnings")),
        curves=_curves(at(item, "details", "history"), metric, unit),
        per_layer=per_layer(item.get("details")),
        sensitivity=_sensitivity(at(item, "details", "sensitivity")),
        quantization=_quantization(at(item, "details", "quantization sensitivity")),
    )


def _strings(value: Any) -> tuple[str, ...]:
    found = (units.printable(item, 2000) for item in value if isinstance(item, str)) if isinstance(value, list) else ()
    return tuple(dict.fromkeys(found))


def _plain(value: Any, depth: int = 0) -> str:
    """A field's value in one short line: ``cubic(start 0, end 0.7)`` for a part, ``[a, b]`` for a list."""
    if depth > 4:
        return "…"
    if isinstance(value, Mapping):
        named = list(value.items())[:20]
        if len(named) == 1 and isinstance(named[0][1], Mapping):
            inner = ", ".join(
                f"{units.printable(k, 40)} {_plain(v, depth + 1)}" for k, v in list(named[0][1].items())[:20]
            )
            return units.printable(f"{named[0][0]}({inner})" if inner else named[0][0], 160)
        return units.printable(", ".join(f"{k}: {_plain(v, depth + 1)}" for k, v in named), 160)
    if isinstance(value, (list, tuple)):
        return units.printable(f"[{', '.join(_plain(item, depth + 1) for item in value[:20])}]", 160)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    found = number(value)
    return units.printable(value if found is None else f"{found:.6g}", 160)


def _deltas(before: Any, after: Any, metric: str, unit: str, *, higher: bool) -> tuple[Delta, ...]:
    found = []
    for key, label, show in (
        ("bytes", "file", units.size),
        ("parameters", "parameters", units.count),
        ("nonzero", "non-zero", units.count),
    ):
        b, a = number(at(before, key)), number(at(after, key))
        if a is None or (key == "parameters" and a == b):
            continue
        change = "same" if a == b else ratio_words(b, a, "bytes" if key == "bytes" else "count")
        better = None if b is None or a == b else a < b
        found.append(Delta(label, "" if b is None else show(b), show(a), change, better))
    b, a = (number(at(side, "metric")) for side in (before, after))
    if a is not None:
        b_error, a_error = (number(at(side, "metric_stderr")) for side in (before, after))
        change = "" if b is None else units.signed(a - b, unit, a)
        noise = math.hypot(b_error or 0, a_error or 0)
        better = None if b is None or abs(a - b) <= noise else (a > b) == higher
        shown = "" if b is None else units.value(b, unit, b_error)
        found.append(Delta(f"{metric}, val", shown, units.value(a, unit, a_error), change, better))
    return tuple(found)


def _skipped(step: str, given: Any) -> tuple[Skipped, ...]:
    """Grouped by reason, in order of appearance."""
    groups: dict[str, list[str]] = {}
    for item in objects(given):
        groups.setdefault(name_of(item.get("reason")) or "no reason recorded", []).append(name_of(item.get("name")))
    return tuple(Skipped(step, reason, tuple(names)) for reason, names in groups.items())


def skipped(done: tuple[Step, ...]) -> tuple[Skipped, ...]:
    """What every step left alone."""
    return tuple(entry for step in done for entry in step.skipped)


def notes(done: tuple[Step, ...]) -> tuple[Note, ...]:
    """Every step's warnings."""
    return tuple(Note(step.path, text) for step in done for text in step.warnings)


def _curves(history: Any, metric: str, unit: str) -> tuple[Curve, ...]:
    series = (
        (("train_loss", "loss"), "training loss", ""),
        (("val", "score"), f"{metric}, val", unit),
        (("lr",), "learning rate", ""),
    )
    found = []
    for keys, label, of in series:
        points = []
        for place, epoch in enumerate(objects(history)):
            value = next((epoch[key] for key in keys if key in epoch), None)
            y = number(at(value, "value") if isinstance(value, Mapping) else value)
            x = number(epoch.get("epoch"))
            if y is not None:
                points.append((float(place if x is None else x), float(y)))
        if len(points) > 1 and not (label == "learning rate" and len({y for _, y in points}) == 1):
            found.append(Curve(label, of, _thinned(points)))
    return tuple(found)


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most ``MAX_POINTS``, evenly, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return tuple(points)
    last = len(points) - 1
    return tuple(points[round(k * last / (MAX_POINTS - 1))] for k in range(MAX_POINTS))


def _sensitivity(given: Any) -> Sensitivity | None:
    levels = tuple(x for x in map(number, at(given, "levels") or ()) if x is not None)
    groups = []
    for group in objects(at(given, "groups")):
        values = tuple(x for x in map(number, group.get("values") or ()) if x is not None)
        if len(values) == len(levels):
            groups.append((name_of(group.get("name")), int(number(group.get("size")) or 0), values))
    full = number(at(given, "full"))
    if full is None or not groups:
        return None
    label = f"{name_of(at(given, 'metric'))} on {name_of(at(given, 'split'))}"
    return Sensitivity(
        label, levels, full, name_of(at(given, "unit")), at(given, "higher_is_better") is not False, tuple(groups)
    )


def _quantization(given: Any) -> QuantizationSensitivity | None:
    layers = []
    for layer in objects(at(given, "layers")):
        on, off = number(layer.get("on")), number(layer.get("off"))
        widths = [(number(layer.get("bits")), "weight"), (number(layer.get("input_bits")), "input")]
        words = ", ".join(f"{what} {units.plural(int(n), 'bit')}" for n, what in widths if n is not None)
        if on is not None and off is not None:
            layers.append((name_of(layer.get("name")), words, float(on), float(off)))
    full, everything = number(at(given, "full")), number(at(given, "all"))
    if full is None or everything is None or not layers:
        return None
    label = f"{name_of(at(given, 'metric'))} on {name_of(at(given, 'split'))}"
    higher = at(given, "higher_is_better") is not False
    return QuantizationSensitivity(label, full, everything, name_of(at(given, "unit")), higher, tuple(layers))
