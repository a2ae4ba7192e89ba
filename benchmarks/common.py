"""Results as JSON rows, and what a reader must know about the machine."""

from __future__ import annotations

import datetime as dt
import json
import os
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
