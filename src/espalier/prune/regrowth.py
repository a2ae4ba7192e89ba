r"""Regrowth: after each mask update connections come back where the network asks for them most.

Paper    Dettmers, Zettlemoyer. Sparse Networks from Scratch: Faster Training without Losing Performance. 2019.
         arXiv:1907.04840 (momentum); Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery. ICML 2020.
         arXiv:1911.11134 (gradient)
Formula  the mask update removes a share ``regrow`` of what is left on top;   as many come back, with value 0, where
         |momentum| (or |dL/dw|) is largest;   momentum: layer l receives its share of sum_l mean|momentum of kept|
Departs  The share is constant up to ``until`` of the training and 0 after. Momentum moves weights between layers only
         where the scope ranks across layers.
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
