r"""Pruning: any criterion with any pattern, scope and schedule, one-shot or while training.

Paper    Han et al. 2015, arXiv:1506.02626 (prune, retrain); Zhu, Gupta 2018, arXiv:1710.01878 (while training)
Formula  m <- m * [score above the cut];   w <- w * m
Departs  Masks are computed from the effective weights: what is gone stays gone, so masks nest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Epochs, Sparsity, Steps
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, require_phase, slots
from espalier.core.selection import Selection, by_pattern, select
from espalier.prune.magnitude import Magnitude
from espalier.prune.parts import Criterion, CutCriterion, Pattern, Schedule, Scope, Scores
from espalier.prune.schedules import OneShot
from espalier.prune.scopes import Layer
from espalier.prune.weights import Weights
from espalier.train import Training


@dataclass(frozen=True, kw_only=True)
class Prune(Training):
    """Prune ``layers`` (patterns) to ``sparsity``; with ``epochs`` the schedule runs while training.

    ``sparsity``: one number, or pattern -> number for scope ``layer``. Without it the criterion or the schedule
    decides. ``every``: optimizer steps between two mask updates.
    """

    id: ClassVar[str] = "prune"
    epochs: Epochs = 0
    criterion: Criterion = field(default_factory=Magnitude)
    pattern: Pattern = field(default_factory=Weights)
    scope: Scope = field(default_factory=Layer)
    schedule: Schedule = field(default_factory=OneShot)
    sparsity: Sparsity | dict[str, Sparsity] | None = None
    layers: tuple[str, ...] = ("*",)
    every: Steps = 50
    densify: bool = False

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if isinstance(self.criterion, CutCriterion) and self.sparsity is not None:
            found.append(f"criterion {self.criterion.id} decides the sparsity itself; leave sparsity unset")
        if isinstance(self.sparsity, Mapping) and not isinstance(self.scope, Layer):
            found.append(f"a sparsity per pattern needs scope=layer; got scope={self.scope.id}")
        if self.schedule.final is not None and self.sparsity not in (None, self.schedule.final):
            found.append(
                f"schedule {self.schedule.id} ends at {self.schedule.final}; leave sparsity={self.sparsity} unset"
            )
        return found

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Mask, training on the way where ``epochs`` says so."""
        selection = self._choose(model, context)
        pruner = _Pruner(self, model, selection, context)
        if self.epochs:
            self.train(model, context, callbacks=(pruner,), settled=self._settled())
        pruner.update(1.0)
        context.record.details["sparsity"] = pruner.sparsities()
        return model

    def _settled(self) -> int:
        """Epochs until the schedule has reached its end: earlier weights are no candidates for the best."""
        at_end = self.schedule.sparsity(1.0, 1.0)
        return sum(self.schedule.sparsity(epoch / self.epochs, 1.0) < at_end for epoch in range(1, self.epochs + 1))

    def _choose(self, model: nn.Module, context: Context) -> Selection:
        selection = select(model, self.layers, who=self.name)
        for slot in selection:
            require_phase(slot, ("dense", "mask"), self.name, densify=self.densify)
            if not bool(torch.isfinite(slot.value()).all()):
                raise NumericError(
                    f"{slot.name} holds NaN or infinity; {self.name} cannot rank it. Train with a lower learning rate."
                )
        for name, slot in slots(model).items():
            if name not in selection.names and slot.latent.ndim >= 2:
                context.skip(name, "not among the chosen layers")
        return selection


class _Pruner(Callback):
    """Recomputes the masks as the schedule asks; the masks live in the forms, so a resume needs no more."""

    def __init__(self, method: Prune, model: nn.Module, selection: Selection, context: Context) -> None:
        self.method, self.model, self.selection, self.context = method, model, selection, context
        self.finals = self._final_sparsities()
        for slot in selection:
            if not isinstance(slot.form, Mask):
                attach(slot, Mask(torch.ones_like(slot.latent, dtype=torch.bool)))

    def _final_sparsities(self) -> dict[str, float]:
        method = self.method
        default = method.schedule.final if method.schedule.final is not None else method.criterion.default_sparsity
        table = method.sparsity if isinstance(method.sparsity, Mapping) else {}
        flat = default if isinstance(method.sparsity, Mapping) or method.sparsity is None else method.sparsity
        return by_pattern(self.model, self.selection, table, flat if flat is not None else 1.0, who=method.name)

    def on_epoch_start(self, loop: Loop) -> None:
        self.update(loop.step / loop.steps)

    def after_step(self, loop: Loop) -> None:
        if loop.step % self.method.every == 0:
            self.update(loop.step / loop.steps)

    def update(self, progress: float) -> None:
        """Bring every mask to the sparsity the schedule asks for at ``progress``."""
        method = self.method
        with torch.no_grad():
            scores = method.criterion.scores(self.model, self.selection, self.context)
            for slot in self.selection:
                scores[slot.name] = scores[slot.name].masked_fill(~_mask(slot.form), -torch.inf)
            for name, removed in self._removed(scores, progress).items():
                form = next(slot.form for slot in self.selection if slot.name == name)
                _mask(form).logical_and_(~method.pattern.spread(removed, _mask(form).shape))

    def _removed(self, scores: Scores, progress: float) -> dict[str, Tensor]:
        method = self.method
        pooled = {name: method.pattern.pool(score) for name, score in scores.items()}
        if isinstance(method.criterion, CutCriterion):
            return method.criterion.removed(pooled, method.schedule.sparsity(progress, 1.0))
        removed: dict[str, Tensor] = {}
        for final in sorted(set(self.finals.values())):
            group = {name: score for name, score in pooled.items() if self.finals[name] == final}
            removed |= method.scope.removed(group, method.schedule.sparsity(progress, final))
        return removed

    def sparsities(self) -> dict[str, float]:
        """Fraction of zeros of every pruned weight."""
        return {slot.name: 1 - float(_mask(slot.form).float().mean()) for slot in self.selection}


def _mask(form: object) -> Tensor:
    assert isinstance(form, Mask)  # noqa: S101 - attached in __init__
    return form.mask
