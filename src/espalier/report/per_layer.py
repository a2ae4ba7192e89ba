"""What a step decided layer by layer, and whatever else it did one by one: teachers, rounds, tries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units
from espalier.report.budget import objects
from espalier.report.fields import items, name_of


@dataclass(frozen=True)
class PerLayer:
    """What a step decided layer by layer: (layer, as text) and the range in words."""

    label: str
    range: str
    entries: tuple[tuple[str, str], ...]


def per_layer(details: Any) -> tuple[PerLayer, ...]:
    """All that the details of a step say about single layers, teachers, clients or tries."""
    found = []
    for key, show in (("sparsity", units.percent), ("bits", lambda n: units.plural(int(n), "bit"))):
        values = [(units.printable(name), n) for name, v in items(at(details, key)) if (n := number(v)) is not None]
        if not values:
            continue
        low, high = (show(pick(n for _, n in values)) for pick in (min, max))
        span = low if low == high else f"{low} to {high}"
        text = f"{span} over {units.plural(len(values), 'layer')}"
        found.append(PerLayer(key, text, tuple((name, show(n)) for name, n in values)))
    found += _codebooks(at(details, "codebooks")) + _groups(details) + _protected(at(details, "protected"))
    found += _mixed(at(details, "mixed bits")) + _coverage(at(details, "coverage"))
    found += _numbers(details) + _teachers(at(details, "before")) + _rounds(at(details, "rounds"))
    return tuple(found + _tries(at(details, "tries")))


def _coverage(given: Any) -> list[PerLayer]:
    """What is quantized, by what and in how many bits: weights with their share, and inputs."""
    found = []
    for key in ("weights", "inputs"):
        entries = [
            (units.printable(name), f"{name_of(at(item, 'method')).rpartition('.')[2]}, {units.plural(int(n), 'bit')}")
            for name, item in items(at(given, key)) if (n := number(at(item, "bits"))) is not None
        ]  # fmt: skip
        share, macs = number(at(given, "parameters")), number(at(given, "macs"))
        text = units.plural(len(entries), "layer")
        if key == "weights" and share is not None:
            text = f"{name_of(at(given, 'layers'))} layers, {units.percent(share)} of the parameters"
            text += f" and {units.percent(macs)} of the multiply-adds" if macs is not None else ""
        if entries:
            found.append(PerLayer(f"{key} quantized", text, tuple(entries)))
    return found


def _groups(details: Any) -> list[PerLayer]:
    """Units of every channel group, before and after."""
    entries, total = [], [0.0, 0.0]
    for group in objects(at(details, "groups")):
        before, after = number(group.get("before")), number(group.get("after"))
        if before is None or after is None:
            continue
        entries.append((name_of(group.get("name")), f"{before:,.0f} → {after:,.0f}"))
        total = [total[0] + before, total[1] + after]
    if not entries:
        return []
    text = f"{total[0]:,.0f} → {total[1]:,.0f} in {units.plural(len(entries), 'coupled group')}"
    return [PerLayer("units kept", text, tuple(entries))]


def _protected(given: Any) -> list[PerLayer]:
    """Dimensions that had to stay whole, and why."""
    entries = [
        (f"{name_of(item.get('tensor'))}, dimension {number(item.get('dim')) or 0:g}", name_of(item.get("reason")))
        for item in objects(given)
    ]
    return [PerLayer("protected", units.plural(len(entries), "dimension"), tuple(entries))] if entries else []


def _mixed(given: Any) -> list[PerLayer]:
    """The bits chosen for every layer, with what they cost in bytes and in the measure of sensitivity."""
    entries = []
    for layer in objects(at(given, "layers")):
        bits, size, value = (number(layer.get(key)) for key in ("bits", "bytes", "sensitivity"))
        if bits is None or size is None or value is None:
            continue
        words = f"{units.plural(int(bits), 'bit')}, {units.size(size)}, {name_of(at(given, 'by'))} {value:.3g}"
        entries.append((name_of(layer.get("layer")), words))
    used, budget = number(at(given, "used")), number(at(given, "budget"))
    if not entries or used is None or budget is None:
        return []
    text = f"{used:,.4g} of {budget:,.4g} {name_of(at(given, 'measure'))} in {units.plural(len(entries), 'layer')}"
    return [PerLayer("mixed bits", text, tuple(entries))]


def _codebooks(given: Any) -> list[PerLayer]:
    """Shared codebooks: bits and distinct values of each."""
    entries, widths = [], []
    for name, book in items(given):
        bits, symbols = number(at(book, "bits")), number(at(book, "symbols"))
        if bits is None:
            continue
        widths.append(bits)
        values = "" if symbols is None else f", {units.plural(int(symbols), 'value')}"
        entries.append((units.printable(name), f"{units.plural(int(bits), 'bit')}{values}"))
    if not entries:
        return []
    low, high = units.plural(int(min(widths)), "bit"), units.plural(int(max(widths)), "bit")
    span = low if low == high else f"{low} to {high}"
    return [PerLayer("codebooks", f"{span} in {units.plural(len(entries), 'codebook')}", tuple(entries))]


def _numbers(details: Any) -> list[PerLayer]:
    """Layers that are made from fewer numbers now: factors, structures, blocks; with how far they are off."""
    rows: list[tuple[str, str, Any, Any, str]] = []  # layer, what it is now, numbers before and after, how far off
    for row in objects(at(details, "factors")):
        before, after = _pair(row.get("parameters"))
        ranks = ", ".join(f"{n:g}" for n in _listed(row.get("ranks")) if n is not None)
        rows.append((name_of(row.get("name")), f"rank {ranks}", before, after, _off(row.get("error"))))
    for layer, row in items(at(details, "layers")):
        kind, off = name_of(at(row, "structure")), _off(at(row, "relative_error"))
        rows.append((units.printable(layer), kind, number(at(row, "weights")), number(at(row, "numbers")), off))
    for row in objects(at(details, "swapped")):
        before, after = _pair(row.get("numbers"))
        start, now = (number(at(row, "error", key)) for key in ("start", "regressed"))
        off = "" if start is None or now is None else f"; misses {start:.1%} of the outputs, {now:.1%} after regression"
        rows.append((name_of(row.get("layer")), name_of(row.get("block")), before, after, off))
    good = [row for row in rows if row[2] is not None and row[3] is not None]
    if not good:
        return []
    before, after = sum(row[2] for row in good), sum(row[3] for row in good)
    text = f"{before:,.0f} → {after:,.0f} in {units.plural(len(good), 'layer')}"
    entries = tuple((layer, f"{what}: {old:,.0f} → {new:,.0f}{off}") for layer, what, old, new, off in good)
    return [PerLayer("numbers kept", text, entries)]


def _listed(value: Any) -> list[float | None]:
    return [number(item) for item in value] if isinstance(value, list) else []


def _pair(value: Any) -> tuple[float | None, float | None]:
    found = _listed(value)
    return (found[0], found[1]) if len(found) == 2 else (None, None)


def _off(value: Any) -> str:
    share = number(value)
    return "" if share is None else f"; {share:.1%} off"


def _teachers(given: Any) -> list[PerLayer]:
    """How good student and teachers were before the lesson."""
    entries = [
        (units.printable(who), f"{value:.4g}")
        for row in objects(given) for who, item in row.items() if (value := number(item)) is not None
    ]  # fmt: skip
    text = f"the student and {units.plural(len(entries) - 1, 'teacher')} on val before"
    return [PerLayer("teachers", text, tuple(entries))] if len(entries) > 1 else []


def _rounds(given: Any) -> list[PerLayer]:
    """Bytes that travelled in each round of a federation, and the metric after it."""
    entries, total = [], 0.0
    for row in objects(given):
        up, down, metric = (number(row.get(key)) for key in ("bytes_up", "bytes_down", "metric"))
        if up is None or down is None:
            continue
        total += up + down
        after = "" if metric is None else f"; {metric:.4g} after it"
        entries.append(
            (f"round {number(row.get('round')) or 0:g}", f"{units.size(up)} up, {units.size(down)} down{after}")
        )
    text = f"{units.size(total)} in {units.plural(len(entries), 'round')}"
    return [PerLayer("rounds", text, tuple(entries))] if entries else []


def _tries(given: Any) -> list[PerLayer]:
    """What was tried on the way to a target, and what became of it."""
    entries = []
    for row in objects(given):
        size, drop = number(row.get("bytes")), number(row.get("drop"))
        words = [] if size is None or drop is None else [f"{units.size(size)}, drop {drop:.2f}"]
        words.append("kept" if row.get("kept") is True else name_of(row.get("reason")) or "not kept")
        entries.append((name_of(row.get("name")), "; ".join(words)))
    kept = sum(row.get("kept") is True for row in objects(given))
    return [PerLayer("tries", f"{kept} of {len(entries)} kept", tuple(entries))] if entries else []
