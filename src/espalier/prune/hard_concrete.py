r"""L0 regularisation: every weight or group has a gate that is open with a learned probability.

Paper    Louizos, Welling, Kingma. Learning Sparse Neural Networks through L0 Regularization. ICLR 2018.
         arXiv:1712.01312
Formula  s = sigmoid((log u - log(1-u) + log_alpha) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),   w' = z w;
         L + strength * sum_g n_g sigmoid(log_alpha_g - beta log(-gamma / zeta));
         at the end z = clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1)
Departs  Gates start open (the paper's may start at any rate), for weights that are trained already; log_alpha is stored
         divided by speed, so that it can move faster than a weight at one learning rate. One gate multiplies a weight
         for the whole batch, not per sample. A group never reaches across the groups of a convolution; depthwise layers
         have no channels to lose, embeddings no units. Where all gates of a layer are shut at the end, the best opens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Penalty, Positive
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.grouping import Groups, best, group_dims, grouped, ungrouped
from espalier.prune.penalty import SparsityPenalty
from espalier.prune.sparsifier import Noisy, Sparsifier, Transient

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
OPEN = 3.0
"""Where log_alpha starts: the deterministic gate is 1, the noisy one mostly."""


def gate(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """The hard concrete gate (eqs. 10, 11) for uniform ``noise``, or the deterministic one (eq. 13) without."""
    logits = log_alpha if noise is None else (noise.log() - (-noise).log1p() + log_alpha) / BETA
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(gate != 0) (eq. 12)."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


class Gated(Transient):
    """``theta * speed`` is log_alpha, shape ``(groups, outputs, inputs, *kernel)`` with size 1 inside what goes."""

    kind = "hard-concrete"
    kept: Tensor
    fixed: Tensor
    settled: Tensor

    def __init__(self, slot: Slot, kept: Tensor, log_alpha: Tensor, speed: float) -> None:
        super().__init__()
        self.slot, self.speed = slot, speed
        self.theta = nn.Parameter(log_alpha / speed)
        self.register_buffer("kept", kept)
        self.register_buffer("fixed", torch.ones_like(log_alpha))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=kept.device))

    def forward(self, latent: Tensor) -> Tensor:
        if bool(self.settled):
            z = self.fixed
        else:
            log_alpha = self.theta * self.speed
            z = gate(log_alpha, self.uniform(log_alpha) if self.training else None)
        spread = ungrouped(self.slot, z.to(latent.dtype).expand(grouped(self.slot, self.kept).shape))
        return torch.where(self.kept, latent, latent.new_zeros(())) * spread

    def expected(self) -> Tensor:
        """Expected number of weights whose gate is open."""
        members = self.kept.numel() / self.theta.numel()
        return members * open_probability(self.theta * self.speed).sum()

    def settle(self, latent: Tensor) -> None:
        there = grouped(self.slot, self.kept & (latent != 0)).float().sum_to_size(self.theta.shape) > 0
        z = gate(self.theta * self.speed)
        if not bool((z * there).any()) and bool(there.any()):  # a layer never vanishes
            z = best(self.theta.masked_fill(~there, -torch.inf)).to(z.dtype)
        self.fixed.copy_(z)
        self.settled.fill_(value=True)


@dataclass(frozen=True, kw_only=True)
class HardConcrete(SparsityPenalty):
    """``strength``: the cost of a weight that is not zero; ``speed``: how much faster log_alpha moves than weights."""

    id: ClassVar[str] = "l0"
    of: Literal["weights", "filters", "channels"] = "weights"
    strength: Penalty = 1e-5
    speed: Positive = 20.0

    @property
    def groups(self) -> Groups:
        return self.of

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Gates(self, selection, context)


class _Gates(Noisy):
    def __init__(self, penalty: HardConcrete, selection: Selection, context: Context) -> None:
        self.penalty, self.context = penalty, context
        super().__init__(selection)

    def form(self, slot: Slot, value: Tensor, kept: Tensor) -> Transient:
        whole = grouped(slot, value).shape
        dims = group_dims(len(whole), self.penalty.groups)
        shape = [1 if dim in dims else size for dim, size in enumerate(whole)]
        jitter = torch.randn(shape, generator=self.context.generator(slot.name)) * 0.01
        return Gated(slot, kept, (OPEN + jitter).to(value.device), self.penalty.speed)

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        costs = [form.expected() for _, form in self.forms()]
        return loss + self.penalty.strength * torch.stack(costs).sum() if costs else loss
