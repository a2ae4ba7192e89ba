r"""Growing regularisation: an L2 penalty that grows on the least important weights until they can go without harm.

Paper    Wang, Qin, Zhang, Fu. Neural Pruning via Growing Regularization. ICLR 2021. arXiv:2012.09243 (GReg-1)
Formula  R = the groups with the smallest |w_g|_1 of each layer at the start;   lambda_g grows by delta every k steps to
         ceiling for g in R;   w_g <- w_g / (1 + step * lambda_g) after every step; at the end R is removed
Departs  The penalty acts as a proximal step instead of through the gradient; lambda grows by an equal amount per step
         so as to reach the ceiling in the last step before the zeros are fixed, whatever the number of epochs. One
         group of each layer stays at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Positive, Sparsity
from espalier.core.parametrize import Slot
from espalier.core.ranking import smallest
from espalier.core.selection import Selection
from espalier.prune.grouping import Groups, group_dims, grouped, ungrouped
from espalier.prune.penalty import SparsityPenalty
from espalier.prune.sparsifier import Masking, Sparsifier
from espalier.train.proximal import step_sizes


def unimportant(weight: Tensor, sparsity: float, dims: tuple[int, ...]) -> Tensor:
    """Mask (bool, the weight's shape) of the ``floor(sparsity * groups)`` groups with the smallest L1 norm.

    Groups span the dimensions ``dims``; one at least is left.
    """
    norm = weight.abs().sum(dims, keepdim=True) if dims else weight.abs()
    return smallest(norm, min(int(sparsity * norm.numel() + 1e-9), norm.numel() - 1)).expand_as(weight)


@dataclass(frozen=True, kw_only=True)
class Growing(SparsityPenalty):
    """``sparsity``: share of the groups of each layer to remove; ``ceiling``: the penalty they end at."""

    id: ClassVar[str] = "growing"
    of: Literal["weights", "filters"] = "weights"
    sparsity: Sparsity = 0.5
    ceiling: Positive = 1.0

    @property
    def groups(self) -> Groups:
        return self.of

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Growing(self, selection)


class _Growing(Masking):
    def __init__(self, penalty: Growing, selection: Selection) -> None:
        super().__init__(selection)
        self.penalty = penalty
        self.going = {slot.name: self.chosen(slot) for slot in selection}
        self.norms = {slot.name: self.norm(slot.name, slot.value()) for slot in selection}
        self.left: dict[str, float] = {}

    def chosen(self, slot: Slot) -> Tensor:
        """Mask of what is to go, of the weight's shape."""
        weight = grouped(slot, slot.value())
        found = unimportant(weight, self.penalty.sparsity, group_dims(weight.ndim, self.penalty.groups))
        return ungrouped(slot, found).clone()

    def norm(self, name: str, weight: Tensor) -> float:
        """Norm of what is to go."""
        return float(weight[self.going[name]].float().norm())

    def after_step(self, loop: Loop) -> None:
        grown = (loop.step + 1) / max(1, self.acting(loop))  # the loop counts this step when its callbacks are done
        strength = self.penalty.ceiling * min(1.0, grown)
        for slot, _ in self.weights():
            shrink = 1 / (1 + strength * step_sizes(loop.optimizer, slot.latent))
            slot.latent.copy_(torch.where(self.going[slot.name], slot.latent * shrink, slot.latent))

    def settle(self) -> None:
        for slot, form in self.weights():
            if self.norms[slot.name]:
                self.left[slot.name] = self.norm(slot.name, slot.value()) / self.norms[slot.name]
            form.mask.logical_and_(~self.going[slot.name])

    def details(self) -> dict[str, Any]:
        return {"norm left of what was removed": self.left}

    def state_dict(self) -> dict[str, Any]:
        return {"going": self.going, "norms": self.norms, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.going = {name: mask.to(self.going[name].device) for name, mask in state["going"].items()}
        self.norms, self.left = state["norms"], state["left"]
