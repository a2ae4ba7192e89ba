"""What the report says, from a run's record: every number is computed here, nothing is drawn.

A key that is missing or holds no usable value shows nothing; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import at
from espalier.report.before_after import Row, rows
from espalier.report.budget import Budget, Layer, budget, layers
from espalier.report.fields import MODEL, size_of, text, texts, truth
from espalier.report.goals import File, Goal, files, goals
from espalier.report.headline import headline, paired
from espalier.report.int8 import int8
from espalier.report.settings import Settings, settings
from espalier.report.steps import Note, Skipped, Step, notes, skipped, steps
from espalier.report.tries import Try, tries


@dataclass(frozen=True)
class Info:
    """Everything the report shows."""

    model: str
    created: str
    status: str
    headline: str
    message: str
    verified: bool | None
    goals: tuple[Goal, ...]
    rows: tuple[Row, ...]
    paired: str
    files: tuple[File, ...]
    budget: Budget | None
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    tries: tuple[Try, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[Note, ...]
    notes: tuple[str, ...]
    int8: tuple[str, ...]
    settings: Settings
    metric: str
    unit: str


def summarise(record: Mapping[str, Any]) -> Info:
    """What is shown of a record (see ``espalier.report.load``)."""
    metric = at(record, "metric")
    name, unit = text(at(metric, "name")), text(at(metric, "unit"))
    verified = truth(at(record, "files", MODEL, "verified"))
    done = steps(at(record, "steps"), name, unit, higher=at(metric, "higher_is_better") is not False)
    info = at(record, "files", MODEL, "info")
    file = size_of(record, MODEL)
    return Info(
        model=text(at(record, "model", "class")),
        created=text(at(record, "created")).partition("T")[0],
        status=text(at(record, "status")),
        headline=headline(record),
        message=text(at(record, "message")),
        verified=verified,
        goals=goals(record),
        rows=rows(record),
        paired=paired(record),
        files=tuple(files(record)),
        budget=budget(info),
        layers=layers(at(record, "layers"), info),
        steps=done,
        tries=tries(at(record, "tries"), unit, file),
        skipped=skipped(done),
        warnings=notes(done) + tuple(Note("file", said) for said in texts(at(record, "warnings"))),
        notes=texts(at(record, "notes")),
        int8=int8(at(record, "int8")),
        settings=settings(record),
        metric=name,
        unit=unit,
    )
