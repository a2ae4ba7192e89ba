"""Penalties that make weights exactly zero: a proximal step after every step of the optimizer.

The step size follows the optimizer, weight by weight (``train/proximal.py``). A group takes the mean of its weights'
metrics, the harmonic mean of their steps: an input that is always 0 has no gradient and a boundless step of its own,
which must not decide for the others.

A layer never vanishes: where a penalty would leave it nothing, its largest group stays as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Penalty
from espalier.core.method import Method
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.grouping import Groups, best, group_dims, grouped, refusal, ungrouped
from espalier.prune.sparsifier import Masking, Sparsifier
from espalier.train.proximal import step_sizes


def largest_group(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``weight`` with all groups but the one of the largest norm at zero; groups span the dimensions ``dims``."""
    square = weight.square()
    return weight * best(square.sum(dims, keepdim=True) if dims else square)


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
