"""What is said of an int8 file: its length, what of it is int8, how far it is from the model, and its speed."""

from __future__ import annotations

from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units
from espalier.report.fields import text, texts


def int8(found: Any) -> tuple[str, ...]:
    """One sentence a line, from what ``espalier quantize --int8`` left in the record; none where there is nothing."""
    size, name = number(at(found, "bytes")), text(at(found, "path"))
    if size is None or not name:
        return ()
    said = [f"{name}: {size:,.0f} bytes", text(at(found, "said"))]
    batches = number(at(found, "agreement", "batches"))
    for key, what in (("model", "the model in torch"), ("reference", "the original in fp32")):
        decibels = number(at(found, "agreement", key))
        if decibels is not None and batches is not None:
            said.append(f"{decibels:.1f} dB from {what}, over {int(batches)} calibration batches")
    said += _metric(at(found, "metric"))
    latency = at(found, "latency")
    said += [
        _timed(units.printable(key, 60), row) for key, row in (latency.items() if isinstance(latency, dict) else ())
    ]
    return tuple(line for line in (*said, *texts(at(found, "notes"))) if line)


def _metric(given: Any) -> list[str]:
    if not isinstance(given, dict):
        return []
    values = {key: v for key, item in given.items() if key != "stderr" and (v := number(item)) is not None}
    shown = ", ".join(f"{units.printable(key, 60)} {value:.2f}" for key, value in values.items())
    error = number(given.get("stderr"))
    return [f"{text(given.get('name'))} on val: {shown}" + ("" if error is None else f" (+- {error:.2f})")]


def _timed(name: str, row: Any) -> str:
    median, low, high = (number(at(row, key)) for key in ("median_ms", "p10_ms", "p90_ms"))
    threads, runs = number(at(row, "threads")), number(at(row, "runs"))
    if median is None or low is None or high is None or threads is None or runs is None:
        return ""
    return (
        f"{name}: {median:.3f} ms ({low:.3f} to {high:.3f}), {units.plural(int(threads), 'thread')}, batch 1, "
        f"{int(runs)} runs in turn"
    )
