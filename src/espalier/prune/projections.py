"""Projections: the callback that replaces weights by the nearest ones that have less of something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.masks import as_stored, final_sparsities, outputs_first, ranked_sets
from espalier.prune.parts import Projection

if TYPE_CHECKING:
    from espalier.prune.prune import Prune


class Projections(Callback):
    """Projects the weights at every update. They live in the model, so a resume needs no more."""

    def __init__(
        self, method: Prune, pattern: Projection, model: nn.Module, selection: Selection, context: Context
    ) -> None:
        self.method, self.pattern, self.selection, self.context = method, pattern, selection, context
        self.sets = ranked_sets(method, selection, final_sparsities(method, model, selection))

    def on_epoch_start(self, loop: Loop) -> None:
        self.update(loop.step / loop.steps)

    def after_step(self, loop: Loop) -> None:
        if loop.step % self.method.every == 0:
            self.update(loop.step / loop.steps)

    def update(self, progress: float) -> dict[str, Tensor]:
        """Project every weight to what the schedule asks for at ``progress``; masks of what went."""
        weights = {slot.name: outputs_first(slot, slot.value()) for slot in self.selection}
        pooled = {name: self.pattern.pool(weight, "l2") for name, weight in weights.items()}
        removed: dict[str, Tensor] = {}
        for names, final in self.sets:
            group = {name: pooled[name] for name in names}
            removed |= self.method.scope.removed(group, self.method.schedule.sparsity(progress, final))
        with torch.no_grad():
            for slot in self.selection:
                if bool(removed[slot.name].any()):
                    projected = self.pattern.project(weights[slot.name], removed[slot.name])
                    slot.latent.copy_(as_stored(slot, projected))
        return removed

    def finish(self) -> None:
        """The last projection, and how much each weight lost."""
        removed = self.update(1.0)
        self.context.record.details["sparsity"] = {name: float(gone.float().mean()) for name, gone in removed.items()}
        self.context.note(f"{self.pattern.id}: sparsity is the share of the singular values that are zero.")
