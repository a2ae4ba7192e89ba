"""Record: what one step did. Plain data, written to the journal and shown by the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from espalier.core.parametrize import slots


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, and how many of them are not zero (each shared tensor counted once)."""

    parameters: int
    nonzero: int

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        """Count the effective parameters of ``model``."""
        values = [slot.value() for slot in slots(model).values()]
        return cls(sum(v.numel() for v in values), sum(int(torch.count_nonzero(v)) for v in values))


@dataclass
class Record:
    """One step: path and method, seconds, counts and metric before and after, what was skipped and why.

    ``metric`` values are on val; ``bytes`` is the length of the file this state would be written to, where measured.
    """

    path: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """Back from plain data."""
        return cls(**data)
