"""Channel removal in one call, without a task: for a model and an example of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.plan import Plan
from espalier.graph.channels import Protected, cost
from espalier.graph.channels.surgery import groups_of, remove
from espalier.prune.channels import Channels
from espalier.prune.magnitude import Magnitude
from espalier.prune.parts import Criterion, Scope
from espalier.prune.prune import Prune
from espalier.prune.scopes import Layer
from espalier.prune.structure import Structural
from espalier.prune.unit_removal import Measure, Removal


@dataclass(frozen=True)
class Slimmed:
    """``model`` without the channels, and how it came to be.

    ``plan``: replays the removal on the original; ``kind``: the model's own code, or its graph and the ``reason``;
    ``difference``: to the masked reference, relative to the largest output; ``kept``: share of the parameters left.
    """

    model: nn.Module
    plan: Plan
    kind: Literal["module", "graph"]
    reason: str
    difference: float
    kept: float
    boundaries: tuple[str, ...]
    protected: tuple[Protected, ...]


def remove_channels(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sparsity: float = 0.5,
    measure: Measure = "units",
    criterion: Criterion | None = None,
    scope: Scope | None = None,
    pattern: Structural | None = None,
) -> Slimmed:
    """A smaller copy of ``model``, which is called as ``model(*args, **kwargs)``.

    ``sparsity``: the share of ``measure`` (channels of every group, parameters, macs, ms) that goes. Recover accuracy
    by a ``train.finetune`` step. Raises ModelError where the model cannot be traced or nothing can go.
    """
    chosen = pattern or Channels(measure=measure)
    method = Prune(criterion=criterion or Magnitude(norm=2), pattern=chosen, scope=scope or Layer(), sparsity=sparsity)
    work = copy_model(model)
    found = groups_of(work, args, kwargs)
    removal = Removal(method, chosen, work, Context(), tuple(args), dict(kwargs or {}), found, [])
    chosen_units = removal.choose(sparsity, removal.scores())
    done = remove(work, found, chosen_units, args, kwargs)
    return Slimmed(
        done.model, done.plan, done.kind, done.reason, done.difference,
        cost.parameters(found.flow, removal.gone(chosen_units)) / max(1, removal.parameters),
        found.boundaries, found.protected,
    )  # fmt: skip
