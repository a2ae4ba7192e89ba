r"""Regrowth: after each mask update connections come back where the network asks for them most.

Paper    Dettmers, Zettlemoyer. Sparse Networks from Scratch: Faster Training without Losing Performance. 2019.
         arXiv:1907.04840 (momentum); Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery. ICML 2020.
         arXiv:1911.11134 (gradient)
Formula  the mask update removes a share ``regrow`` of what is left on top;   as many come back, with value 0, where
         |momentum| (or |dL/dw|) is largest;   momentum: layer l receives its share of sum_l mean|momentum of kept|
Departs  The share is constant up to ``until`` of the training and 0 after. Momentum moves weights between layers only
         where the scope ranks across layers; with scope row each row gets back what it lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.parametrize import Slot
from espalier.prune.parts import Regrowth

BUFFERS = ("momentum_buffer", "exp_avg")


def shares(total: int, wants: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """``total`` split in proportion to ``wants``, no part above its ``room``; the rest goes to those with room left."""
    given = dict.fromkeys(wants, 0)
    left = min(total, sum(room.values()))
    while left > 0:
        free = [name for name in wants if given[name] < room[name]]
        whole = sum(wants[name] for name in free)
        moved = 0
        for name in free:
            part = wants[name] / whole if whole > 0 else 1 / len(free)
            extra = min(room[name] - given[name], int(left * part + 1e-9))
            given[name] += extra
            moved += extra
        if not moved:  # less than one each: to those who want most
            for name in sorted(free, key=lambda n: -wants[n])[:left]:
                given[name] += 1
                moved += 1
        left -= moved
    return given


def row_by_row(wanted: Tensor, kept: Tensor, fence: Tensor, sparsity: float) -> Tensor:
    """Mask of what comes back so that ``floor(sparsity * n)`` of each row, along dimension 0, are gone (same shapes).

    The most wanted come first, ties by position, out of what is not ``kept`` now and lies inside ``fence``.
    """
    free = fence & ~kept
    rows = wanted.masked_fill(~free, -torch.inf).flatten(1)
    lacking = (~kept).flatten(1).sum(1, keepdim=True) - int(sparsity * rows.shape[1] + 1e-9)
    order = rows.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(rows.shape[1], device=rows.device) < lacking
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, first).reshape(wanted.shape) & free


@dataclass(frozen=True, kw_only=True)
class MomentumRegrowth(Regrowth):
    """By the optimizer's first moment: SGD's velocity or Adam's running mean."""

    id: ClassVar[str] = "momentum-regrowth"
    redistributes: ClassVar[bool] = True

    def scores(self, slot: Slot, optimizer: torch.optim.Optimizer) -> Tensor | None:
        state = optimizer.state.get(slot.latent, {})
        found = next((state[name] for name in BUFFERS if state.get(name) is not None), None)
        return None if found is None else found.abs()


@dataclass(frozen=True, kw_only=True)
class GradientRegrowth(Regrowth):
    """By the gradient of the last batch."""

    id: ClassVar[str] = "gradient-regrowth"

    def scores(self, slot: Slot, optimizer: torch.optim.Optimizer) -> Tensor | None:
        return None if slot.latent.grad is None else slot.latent.grad.abs()
