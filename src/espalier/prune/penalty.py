"""Penalties that make weights exactly zero: a proximal step after every step of the optimizer.

The step size follows the optimizer, so that a strength means the same with each: the optimum of loss + penalty is a
fixed point. Gradient descent moves along -lr / (1 - momentum) g in the long run; Adam moves each weight by its own
lr / (sqrt(v) + eps), and the proximal step is taken in that metric (Yun, Lozano, Yang. ProxGen. NeurIPS 2021). A group
takes the mean of its weights' metrics, the harmonic mean of their steps: an input that is always 0 has no gradient and
a boundless step of its own, which must not decide for the others.

A layer never vanishes: where a penalty would leave it nothing, its largest group stays as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Penalty
from espalier.core.method import Method
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.grouping import Groups, best, group_dims, grouped, refusal, ungrouped
from espalier.prune.sparsifier import Masking, Sparsifier


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """The proximal map of ``threshold * |w|``: ``sign(w) max(|w| - threshold, 0)``, any shape."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


def largest_group(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``weight`` with all groups but the one of the largest norm at zero; groups span the dimensions ``dims``."""
    square = weight.square()
    return weight * best(square.sum(dims, keepdim=True) if dims else square)


def step_sizes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | float:
    """How far one unit of gradient moves each entry of ``parameter``: a number, or a tensor of its shape."""
    for group in optimizer.param_groups:
        if any(parameter is member for member in group["params"]):
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                step: Tensor = group["lr"] / (corrected.sqrt() + group["eps"])
                return step
            return float(group["lr"]) / max(1 - float(group.get("momentum") or 0), 1e-3)
    return 0.0


@dataclass(frozen=True, kw_only=True)
class SparsityPenalty(Method):
    """What pulls weights to zero in ``prune.regularize``."""

    kind: ClassVar[str] = "sparsity-penalty"

    @property
    def groups(self) -> Groups:
        """What becomes zero together."""
        return "weights"

    @property
    def outputs(self) -> bool:
        """Whether whole output units go: then the model's outputs are left alone."""
        return self.groups == "filters"

    def refuses(self, slot: Slot) -> str | None:
        """Why this weight has no such groups; None where it has."""
        return refusal(slot, self.groups)

    @abstractmethod
    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        """The running penalty on the selected weights, its forms attached."""


@dataclass(frozen=True, kw_only=True)
class ProximalPenalty(SparsityPenalty):
    """A penalty whose proximal map is known; its zeros are exact."""

    strength: Penalty = 1e-3

    @abstractmethod
    def proximal(self, weight: Tensor, step: Tensor | float) -> Tensor:
        """``argmin_u |u - weight|^2 / (2 step) + strength * penalty(u)``; ``step``: a number, or one for each weight.

        ``weight``: ``(groups, outputs, inputs, *kernel)``, outputs and inputs of one group of the convolution.
        """

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Proximal(self, selection)


class _Proximal(Masking):
    def __init__(self, penalty: ProximalPenalty, selection: Selection) -> None:
        super().__init__(selection)
        self.penalty = penalty

    def after_step(self, loop: Loop) -> None:
        for slot, form in self.weights():
            step, weight = step_sizes(loop.optimizer, slot.latent), grouped(slot, form(slot.latent))
            found = self.penalty.proximal(weight, grouped(slot, step) if isinstance(step, Tensor) else step)
            if not bool(found.any()):
                found = largest_group(weight, group_dims(weight.ndim, self.penalty.groups))
            slot.latent.copy_(ungrouped(slot, found))
