r"""Targeted dropout: dropout for the weights or units that would be pruned now, so that the rest does not need them.

Paper    Gomez, Zhang, Kamalakara, Madaan, Swersky, Gal, Hinton. Learning Sparse Networks Using Targeted Dropout. 2019.
         arXiv:1905.13678
Formula  T = the floor(sparsity * n) smallest |w_io| of each unit o, or smallest |w_o|_2 of the layer (``of``);
         in training w' = w except 0 with probability ``rate`` in T;   at the end T is removed
Departs  The share targeted grows linearly over the first ``ramp`` of the steps (the paper's ramping form; 0: at once).
         Noise is drawn per batch, not per sample. Nothing is rescaled, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Fraction, Sparsity
from espalier.core.parametrize import Slot
from espalier.core.ranking import smallest
from espalier.core.selection import Selection
from espalier.prune.dropout_rule import DropoutRule
from espalier.prune.masks import as_stored, outputs_first
from espalier.prune.sparsifier import Noisy, Sparsifier, Transient


def targets(rows: Tensor, sparsity: float, of: Literal["weights", "units"]) -> Tensor:
    """Mask of what is targeted in a weight seen as ``(units, incoming)``: inside every row, or whole rows."""
    if of == "units":
        norms = rows.square().sum(1)
        return smallest(norms, min(int(sparsity * len(norms) + 1e-9), len(norms) - 1))[:, None].expand_as(rows)
    order = rows.abs().argsort(dim=1, stable=True)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    return chosen.scatter_(1, order[:, : int(sparsity * rows.shape[1] + 1e-9)], value=True)


class Targeted(Transient):
    """``share``: what is targeted now; ``kept``: what earlier steps, and at last this one, have left."""

    kind = "targeted-dropout"
    kept: Tensor
    settled: Tensor

    def __init__(self, slot: Slot, kept: Tensor, rule: TargetedDropout) -> None:
        super().__init__()
        self.slot = slot
        self.rule, self.share = rule, 0.0
        self.register_buffer("kept", kept)
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=kept.device))

    def targeted(self, latent: Tensor, share: float) -> Tensor:
        """Mask of the weight's shape."""
        first = outputs_first(self.slot, torch.where(self.kept, latent, latent.new_zeros(())).detach())
        found = targets(first.flatten(1), share, self.rule.of).reshape(first.shape)
        return as_stored(self.slot, found)

    def forward(self, latent: Tensor) -> Tensor:
        stays = self.kept
        if self.training and not bool(self.settled):
            stays = stays & ~(self.targeted(latent, self.share) & self.dropped(latent))
        return torch.where(stays, latent, latent.new_zeros(()))

    def dropped(self, latent: Tensor) -> Tensor:
        """Where the coin says no: per weight, or per unit."""
        if self.rule.of == "weights":
            return self.uniform(latent) < self.rule.rate
        slot = self.slot
        first = outputs_first(slot, latent.detach())
        coins = self.uniform(first.flatten(1)[:, :1]) < self.rule.rate
        return as_stored(slot, coins.reshape(-1, *[1] * (first.ndim - 1)).expand_as(first))

    def settle(self, latent: Tensor) -> None:
        self.kept.logical_and_(~self.targeted(latent, self.rule.sparsity))
        self.settled.fill_(value=True)


@dataclass(frozen=True, kw_only=True)
class TargetedDropout(DropoutRule):
    """``rate``: how often a targeted weight (or unit) is dropped; ``sparsity``: the share targeted, then removed."""

    id: ClassVar[str] = "targeted"
    of: Literal["weights", "units"] = "weights"
    sparsity: Sparsity = 0.5
    rate: Fraction = 0.5
    ramp: Fraction = 0.5

    @property
    def outputs(self) -> bool:
        return self.of == "units"

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Targeting(self, selection)


class _Targeting(Noisy):
    def __init__(self, rule: TargetedDropout, selection: Selection) -> None:
        self.rule = rule
        super().__init__(selection)

    def form(self, slot: Slot, value: Tensor, kept: Tensor) -> Transient:
        return Targeted(slot, kept, self.rule)

    def on_epoch_start(self, loop: Loop) -> None:
        super().on_epoch_start(loop)
        self.grow(loop.step, loop)

    def after_step(self, loop: Loop) -> None:
        self.grow(loop.step + 1, loop)

    def grow(self, step: int, loop: Loop) -> None:
        """Set the share that is targeted at ``step``."""
        ramp = self.rule.ramp * loop.steps
        for _, form in self.forms():
            form.share = self.rule.sparsity * (min(1.0, step / ramp) if ramp else 1.0)
