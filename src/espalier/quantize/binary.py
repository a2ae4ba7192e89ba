r"""BinaryConnect: weights are +H or -H while they are used, and real while they are updated.

Paper    Courbariaux, Bengio, David. BinaryConnect: Training Deep Neural Networks with binary weights during
         propagations. NeurIPS 2015. arXiv:1511.00363 (deterministic form)
Formula  w^ = H sign(w), sign(0) = +1;   w <- clip(w - f step, -H, H), step: what the optimizer does with dL/dw^;
         c = sqrt(1.5 / (n_in + n_out)) (Glorot);   H = 1 or c;   f = 1/c with Adam, 1/c^2 with plain SGD, or 1
Departs  Training starts from the trained weight, as H clip(w / c, -1, 1); the paper starts from uniform noise in
         [-H, H]. The sums of inputs and outputs count the whole kernel, as in the authors' code. A table of shared
         values counts as the inputs of one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.grid import straight_through


def signs(values: Tensor) -> Tensor:
    """+1 where ``values`` >= 0, else -1, in float32."""
    return torch.where(values >= 0, 1.0, -1.0)


def glorot(shape: Sequence[int]) -> float:
    """sqrt(1.5 / (n_in + n_out)) of a weight, the positions of its kernel counted on both sides."""
    units, inputs, *kernel = (1, *shape) if len(shape) < 2 else tuple(shape)
    return math.sqrt(1.5 / max(1, (units + inputs) * math.prod(kernel)))


@dataclass(frozen=True, kw_only=True)
class Binary(WeightQuantizer):
    """``scale``: H; ``lr_scale``: by what the optimizer's steps are multiplied (``glorot``: f of the formula)."""

    id: ClassVar[str] = "binary"
    widths: ClassVar[tuple[int, ...]] = (1,)
    scale: Literal["one", "glorot"] = "one"
    lr_scale: Literal["one", "glorot"] = "glorot"

    def height(self, shape: Sequence[int]) -> float:
        """H of a weight of this shape."""
        return glorot(shape) if self.scale == "glorot" else 1.0

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        state = {"scale": torch.tensor(self.height(weight.shape), device=weight.device)}
        return state | ({"before": torch.zeros_like(weight)} if self.lr_scale == "glorot" else {})

    def latent(self, weight: Tensor, bits: int) -> Tensor:
        return (weight / glorot(weight.shape)).clamp(-1, 1) * self.height(weight.shape)

    def quantize(self, w: Weight) -> Tensor:
        values = signs(w.latent.detach()) * w.state["scale"].float()
        return straight_through(w.latent, values.to(w.latent.dtype))

    def before_step(self, w: Weight, loop: Loop) -> None:
        if self.lr_scale == "glorot":
            w.state["before"].copy_(w.latent)

    def after_step(self, w: Weight, loop: Loop) -> None:
        if self.lr_scale == "glorot":
            factor = 1 / glorot(w.latent.shape) ** (2 if isinstance(loop.optimizer, torch.optim.SGD) else 1)
            before = w.state["before"]
            w.latent.copy_(before + factor * (w.latent - before))
        height = float(w.state["scale"])
        w.latent.clamp_(-height, height)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        codes = signs(w.latent).to(torch.int32)
        return affine(w, values, codes, w.state["scale"].float(), torch.zeros((), dtype=torch.int32))
