"""Results as JSON rows, and what a reader must know about the machine."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and versions; no host name, no path."""
    from espalier.runs.run import versions

    return {**versions(), "cores": os.cpu_count()}


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Put ``rows`` into ``results/NAME.json``, each with the date and the machine.

    A row replaces the earlier one of the same ``id`` and ``row``; the other rows of the file stay.
    """
    stamp = {"date": dt.datetime.now(dt.UTC).date().isoformat(), "machine": machine()}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    kept = {(row["id"], row.get("row")): row for row in (json.loads(path.read_text()) if path.exists() else ())}
    kept |= {(row["id"], row.get("row")): {**row, **stamp} for row in rows}
    path.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    return path


def kept(name: str, setting: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of ``results/NAME.json`` that are there in this setting: (id, row) -> what was measured."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    alike = json.loads(json.dumps(dict(setting)))
    return {(r["id"], r["row"]): r["measured"] for r in rows if r["setting"].items() >= alike.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": statistics.mean(values), **({"stderr": error} if len(values) > 1 else {})}


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every benchmark of trainings takes; its own options are added to it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    return parser


def begin(given: argparse.Namespace) -> Path:
    """Threads, warnings and the registry as all of them want it; the folder of the data."""
    import torch

    from espalier import api
    from espalier.core.errors import EspalierWarning

    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", EspalierWarning)
    api.fill_registry()
    return Path(given.data_dir or os.environ["ESPALIER_DATA"])
