r"""Movement pruning: weights that training moves towards zero go, however large they are.

Paper    Sanh, Wolf, Rush. Movement Pruning: Adaptive Sparsity by Fine-Tuning. NeurIPS 2020. arXiv:2005.07683
Formula  S <- S - w dL/dw', w' the masked weight (straight-through: pruned weights go on collecting, with the value they
         had when they went);   the top (1 - sparsity) of S stay
Departs  S has no learning rate and no optimizer of its own, which changes no ranking under plain gradient descent; the
         gradient is that of the loss without weight decay, and neither decay nor momentum moves a pruned weight. Among
         scores that are equal, as all are before the first step, the lower position goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.selection import Selection
from espalier.prune.parts import Scores, Watcher, WatchingCriterion


def movement(scores: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """One step of eq. 4: ``scores - weight * gradient`` (latent weight, gradient of the effective one; any shape)."""
    return scores - weight * gradient


class _Movement(Watcher):
    """S of every weight, kept in float32."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.moved = {slot.name: torch.zeros_like(slot.latent, dtype=torch.float32) for slot in selection}

    def before_step(self, loop: Loop) -> None:
        for slot in self.selection:
            if slot.latent.grad is not None:
                weight, gradient = slot.latent.detach().float(), slot.latent.grad.float()
                self.moved[slot.name] = movement(self.moved[slot.name], weight, gradient)

    def scores(self, model: nn.Module) -> Scores:
        return {name: moved.clone() for name, moved in self.moved.items()}

    def keep(self, name: str, take: Callable[[Tensor], Tensor]) -> None:
        if name in self.moved:
            self.moved[name] = take(self.moved[name])

    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.moved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moved = {name: moved.to(self.moved[name].device) for name, moved in state["moved"].items()}


@dataclass(frozen=True, kw_only=True)
class Movement(WatchingCriterion):
    """Score = how far the weight has moved away from zero while training; needs epochs."""

    id: ClassVar[str] = "movement"
    revives: ClassVar[bool] = True

    def watcher(self, model: nn.Module, selection: Selection) -> Watcher:
        return _Movement(selection)
