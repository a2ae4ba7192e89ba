"""``record.json``: everything the report shows, from the journal and the measurements, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import espalier
from espalier.core.metric import Metric
from espalier.measure.zeros import Zeros
from espalier.runs.strength import Outcome, plain_tries

SCHEMA = 1


def readable_bytes(count: float) -> str:
    """Bytes as a person reads them; kB = 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{int(count)} B"


def summarise(
    *,
    begun: Mapping[str, Any],
    file: Mapping[str, Any],
    outcome: Outcome,
    measured: Mapping[str, dict[str, Any]],
    test: Mapping[str, dict[str, Any]],
    pairs: Mapping[str, Any],
    steps: list[dict[str, Any]],
    tries: list[dict[str, Any]],
    metric: Metric,
    model: str,
    zeros: Zeros | None = None,
) -> dict[str, Any]:
    """Assemble the record. Every figure in it was measured on the re-loaded file."""
    environment = dict(begun.get("environment", {}))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "espalier": espalier.__version__,
        "created": begun.get("created"),
        "model": {"class": model, "parameters": measured["original"]["parameters"]},
        "recipe": begun.get("recipe"),
        "target": begun.get("target") or None,
        "status": "done" if outcome.met else "target-missed",
        "message": _message(measured, test, metric, outcome),
        "metric": {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
        "environment": environment,
        "original": measured["original"],
        "compressed": measured["compressed"],
        "files": file.get("files", {}),
        "floats": file.get("floats"),
        "notes": [*file.get("notes", ()), *([outcome.message] if outcome.message else [])],
        "warnings": list(file.get("warnings", ())),
        "steps": steps,
        "layers": _layers(file),
    }
    if measured["compressed"]["file_bytes"] >= measured["original"]["file_bytes"]:
        record["warnings"].append("the file is not smaller than the original saved as fp32 safetensors.")
    if tries:
        record["tries"] = plain_tries(tries, outcome)
    if test:
        record["test"] = dict(test)
    if pairs:
        record["paired"] = dict(pairs)
    if zeros is not None:
        record["zeros"] = zeros.to_json()
        record["notes"].append(zeros.sentence())
    return record


def _message(
    measured: Mapping[str, dict[str, Any]], test: Mapping[str, dict[str, Any]], metric: Metric, outcome: Outcome
) -> str:
    before, after = measured["original"], measured["compressed"]
    ratio = before["file_bytes"] / after["file_bytes"]
    old_size, new_size = readable_bytes(before["file_bytes"]), readable_bytes(after["file_bytes"])
    text = f"{old_size} became {new_size}, {ratio:.1f} times smaller"
    split, scores = ("test", test) if test else ("val", {k: m.get("metric") for k, m in measured.items()})
    if scores.get("original") and scores.get("compressed"):
        old, new = scores["original"], scores["compressed"]
        assert old is not None and new is not None  # noqa: S101, PT018 - just asked
        unit = metric.unit
        text += (
            f"; {metric.name} on {split} {old['value']:.2f} {unit} -> {new['value']:.2f} {unit} (± {new['stderr']:.2f})"
        )
    return f"{text}. {outcome.message}".strip()


def _layers(file: Mapping[str, Any]) -> list[dict[str, Any]]:
    info = file.get("files", {}).get("model.espalier", {}).get("info", {})
    return list(info.get("tensors", []))
