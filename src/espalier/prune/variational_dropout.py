r"""Sparse variational dropout: every weight learns its own noise; weights that are mostly noise go.

Paper    Molchanov, Ashukha, Vetrov. Variational Dropout Sparsifies Deep Neural Networks. ICML 2017. arXiv:1701.05369
Formula  w' = theta + sigma eps,   log_alpha = log sigma^2 - log theta^2;   L + anneal * KL / N, N samples,
         KL = -sum [k1 sigmoid(k2 + k3 log_alpha) - log(1 + 1/alpha) / 2 - k1]   (eq. 14);   log_alpha >= 3 is zero
Departs  Noise on the weights, drawn per batch (the paper samples a layer's output, per sample). log sigma^2 is stored
         divided by ``speed``, so that it moves faster than a weight at one learning rate, and starts 8 below
         log theta^2 for weights that are trained already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Fraction, Penalty, Positive
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.dropout_rule import DropoutRule
from espalier.prune.sparsifier import Noisy, Sparsifier, Transient

K1, K2, K3 = 0.63576, 1.87320, 1.48695
LOG_ALPHA = 8.0
"""log_alpha is kept within +-8, as by the authors: beyond, the gradient is nothing but rounding."""
THRESHOLD = 3.0
INITIAL = -8.0
TINY = 1e-8


def divergence(log_alpha: Tensor) -> Tensor:
    """-KL approximation of eq. 14 with its sign turned: what is added to the loss, entry by entry; any shape."""
    return -(K1 * torch.sigmoid(K2 + K3 * log_alpha) - 0.5 * F.softplus(-log_alpha) - K1)


class Variational(Transient):
    """``rho * speed`` is log sigma^2, of the weight's shape."""

    kind = "variational-dropout"
    kept: Tensor
    settled: Tensor

    def __init__(self, value: Tensor, kept: Tensor, speed: float) -> None:
        super().__init__()
        self.speed = speed
        self.rho = nn.Parameter((value.float().square() + TINY).log().add(INITIAL) / speed)
        self.register_buffer("kept", kept)
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=kept.device))

    def log_alpha(self, latent: Tensor) -> Tensor:
        """log(sigma^2 / theta^2), clipped."""
        found = self.rho * self.speed - (latent.float().square() + TINY).log()
        return found.clamp(-LOG_ALPHA, LOG_ALPHA)

    def forward(self, latent: Tensor) -> Tensor:
        stays, weight = self.kept, latent
        if not bool(self.settled):
            if self.training:
                sigma = (0.5 * self.rho * self.speed).exp().clamp_max(1.0)
                weight = latent + (sigma * self.normal(latent)).to(latent.dtype)
            else:
                stays = stays & (self.log_alpha(latent) < THRESHOLD)
        return torch.where(stays, weight, latent.new_zeros(()))

    def divergence(self, latent: Tensor) -> Tensor:
        """KL of all weights that are there."""
        return torch.where(self.kept, divergence(self.log_alpha(latent)), 0.0).sum()

    def settle(self, latent: Tensor) -> None:
        self.kept.logical_and_(self.log_alpha(latent) < THRESHOLD)
        self.settled.fill_(value=True)


@dataclass(frozen=True, kw_only=True)
class VariationalDropout(DropoutRule):
    """``strength``: weight of the divergence (the paper's 1); ``anneal``: the share of the steps in which it grows.

    ``speed``: how much faster the noise moves than the weights.
    """

    id: ClassVar[str] = "variational"
    strength: Penalty = 1.0
    anneal: Fraction = 0.4
    speed: Positive = 20.0

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Variation(self, selection)


class _Variation(Noisy):
    def __init__(self, rule: VariationalDropout, selection: Selection) -> None:
        self.rule = rule
        super().__init__(selection)

    def form(self, slot: Slot, value: Tensor, kept: Tensor) -> Transient:
        return Variational(value, kept, self.rule.speed)

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        costs = [form.divergence(slot.latent) for slot, form in self.forms()]
        if not costs:
            return loss
        samples = loop.steps_per_epoch * _size(batch)
        ramp = self.rule.anneal * loop.steps
        grown = min(1.0, loop.step / ramp) if ramp else 1.0
        return loss + self.rule.strength * grown / samples * torch.stack(costs).sum()


def _size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    sizes = (len(x) for x in _pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.ndim)
    return next(sizes, 1)
