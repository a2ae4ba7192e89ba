"""Every registered method has a measured row: CONTRIBUTING, "Add a method", point 6."""

from __future__ import annotations

import json
from pathlib import Path

from espalier import api
from espalier.core import registry

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
BARE = ("unstructured", "cifar_channels", "causality")
"""Benchmarks of methods of ``prune`` only: their rows carry the id alone."""


def measured() -> set[str]:
    """``verb.id`` of every row that holds a measurement."""
    found = set()
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text()):
            if row.get("measured"):
                found.add(f"prune.{row['id']}" if path.stem in BARE else row["id"])
    return found


def test_every_method_has_a_measured_row() -> None:
    api.fill_registry()
    there = measured()
    ours = [cls for cls in registry.methods() if cls.__module__.startswith("espalier.")]
    missing = [f"{cls.verb}.{cls.id}" for cls in ours if f"{cls.verb}.{cls.id}" not in there]
    assert not missing, (
        f"{len(missing)} methods have no measured row in benchmarks/results: {', '.join(missing)}. "
        "python benchmarks/methods.py --quick measures what is missing, row by row."
    )
