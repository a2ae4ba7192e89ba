"""What a structural step would do, found out without doing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.graph.channels import cost
from espalier.prune.removing import final_sparsity
from espalier.prune.structure import Structural
from espalier.prune.unit_removal import Removal

if TYPE_CHECKING:
    from espalier.prune.prune import Prune


@dataclass(frozen=True)
class Preview:
    """What a structural step would do, without doing it; plain data by :meth:`to_json`."""

    groups: tuple[dict[str, Any], ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    protected: tuple[dict[str, Any], ...]
    boundaries: tuple[str, ...]
    measure: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"groups": list(self.groups), "protected": list(self.protected)}


def preview(method: Prune, model: nn.Module, context: Context) -> Preview:
    """The plan of ``method`` on ``model``: groups, sizes before and after, what is protected and why."""
    if not isinstance(method.pattern, Structural):
        raise UsageError(f"pattern {method.pattern.id} masks weights; only structural patterns have a plan to show.")
    removal = Removal.of(method, method.pattern, model, context)
    chosen = removal.choose(final_sparsity(method), removal.scores())
    flow, gone = removal.found.flow, removal.gone(chosen)
    rows = tuple(
        {
            "name": group.name,
            "kind": group.kind,
            "before": group.size,
            "after": group.size - int(chosen.get(group.name, np.zeros(0)).sum()),
            "tensors": group.tensors,
        }
        for group in removal.candidates()
    )
    return Preview(
        rows, (removal.parameters, cost.parameters(flow, gone)),
        (round(removal.macs), round(cost.multiply_adds(flow, gone))),
        tuple(vars(p) for p in removal.found.protected), removal.found.boundaries,
        removal.measured(chosen),
    )  # fmt: skip
