r"""Stochastic BinaryConnect: a weight is drawn as +H or -H for every pass, so that on average it is itself.

Paper    Courbariaux, Bengio, David. BinaryConnect: Training Deep Neural Networks with binary weights during
         propagations. NeurIPS 2015. arXiv:1511.00363 (stochastic form)
Formula  P(w^ = +H) = clip((w / H + 1) / 2, 0, 1), else -H, in training;   w as in deterministic BinaryConnect
Departs  Outside training the signs of the weights are used, because the file must be small; the paper evaluates the
         stochastic form with the real weights, which ``evaluate=real`` does, and then nothing is saved in the file.
         Start and learning rate as in quantize.binary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.quantized import Weight, tabled
from espalier.core.representation import Representation
from espalier.quantize.binary import Binary
from espalier.quantize.grid import straight_through


def hard_sigmoid(values: Tensor) -> Tensor:
    """clip((x + 1) / 2, 0, 1)."""
    return ((values + 1) / 2).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class BinaryStochastic(Binary):
    """``evaluate``: what is used and stored outside training, the signs or the real weights."""

    id: ClassVar[str] = "binary-stochastic"
    evaluate: Literal["binary", "real"] = "binary"

    def quantize(self, w: Weight) -> Tensor:
        if not w.training:
            return w.latent if self.evaluate == "real" else super().quantize(w)
        height = w.state["scale"].float()
        chance = hard_sigmoid(w.latent.detach().float() / height)
        drawn = torch.rand(chance.shape, device=chance.device) < chance
        values = torch.where(drawn, height, -height).to(w.latent.dtype)
        return straight_through(w.latent, values)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return tabled(values) if self.evaluate == "real" else super().freeze(w, values)
