"""The tries of a search: what each strength gave, which were kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import number
from espalier.report import units
from espalier.report.budget import objects, whole


@dataclass(frozen=True)
class Try:
    """One try; ``final`` marks the kept one whose length is that of the written file."""

    number: int
    strength: str
    bytes: int | None
    metric: float | None
    drop: str
    seconds: float | None
    kept: bool
    final: bool
    reason: str


def tries(given: Any, unit: str, file: int | None) -> tuple[Try, ...]:
    """The tries in the order they were made; ``file``: length of the file that was written."""
    found = []
    for place, item in enumerate(objects(given), 1):
        strength, drop, size = number(item.get("strength")), number(item.get("drop")), whole(item.get("bytes"))
        kept = item.get("kept") is True
        reason = item.get("reason")
        found.append(
            Try(
                number=place,
                strength="" if strength is None else f"{strength:.4g}",
                bytes=size,
                metric=number(item.get("metric")),
                drop="" if drop is None else units.drop(drop, unit),
                seconds=number(item.get("seconds")),
                kept=kept,
                final=kept and size is not None and size == file,
                reason=units.printable(reason, 300) if isinstance(reason, str) else "",
            )
        )
    return tuple(found)
