r"""INQ: powers of two, portion by portion: what is quantized stays, the rest trains on to make up for it.

Paper    Zhou, Yao, Guo, Xu, Chen. Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights.
         ICLR 2017. arXiv:1702.03044
Formula  n1 = floor(log2(4 s / 3)), s = max|w|;   n2 = n1 + 1 - 2^{b-1} / 2;   P = {0, +-2^n2, ..., +-2^n1};
         w^ = b sgn(w) where (a + b) / 2 <= |w| < 3 b / 2 for neighbours a < b of P, else 0;
         w <- w - lr dL/dw T, T = 0 for the share sigma of the weights that is quantized
Departs  Every portion gets an equal share of the epochs, as far as whole epochs allow, the last (everything is
         quantized, biases and norms train on) too, and the learning rate runs through its schedule in each. Weights
         that training has made larger than 3/2 of the largest level get that level. Validation sees every weight
         quantized, as the file would hold it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.fields import Fraction
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import straight_through

if TYPE_CHECKING:
    from espalier.core.context import Context

Partition = Literal["large", "random", "small"]

PORTIONS: dict[int, tuple[float, ...]] = {
    5: (0.5, 0.75, 0.875, 1),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1),
}
"""Bits -> the accumulated shares of the paper's experiments with ResNet-18 (section 3.2 and table 3)."""


def power_levels(weight: Tensor, bits: int, kept: Tensor | None = None) -> Tensor:
    """The magnitudes of P in rising order, ``0, 2^n2, ..., 2^n1`` (float32), for a weight of any shape."""
    sizes = weight.detach().abs() if kept is None else torch.where(kept, weight.detach().abs(), 0)
    largest = float(sizes.max()) if sizes.numel() else 0.0
    n1 = int(torch.tensor(largest * 4 / 3).log2().floor().clamp(-100, 100)) if largest > 0 else 0
    if largest > 0 and 0.75 * 2.0 ** (n1 + 1) <= largest:  # the rounding of the logarithm
        n1 += 1
    exponents = torch.arange(n1 + 1 - 2 ** (bits - 2), n1 + 1, device=weight.device)
    return torch.cat([torch.zeros(1, device=weight.device), torch.exp2(exponents.float())])


def to_powers(weight: Tensor, levels: Tensor) -> Tensor:
    """``weight`` on ``+-levels`` (eq. 4), in its dtype."""
    limits = (levels[:-1] + levels[1:]) / 2
    index = torch.bucketize(weight.detach().abs().to(torch.float64).contiguous(), limits.double(), right=True)
    return torch.where(weight < 0, -levels[index], levels[index]).to(weight.dtype)


def portion(epoch: int, epochs: int, shares: tuple[float, ...]) -> float:
    """The share that is quantized in ``epoch`` (from 0) of ``epochs``; the portions' lengths differ by one at most."""
    return shares[min(len(shares) - 1, epoch * len(shares) // max(1, epochs))]


def chosen_next(weight: Tensor, fixed: Tensor, kept: Tensor | None, share: float, how: Partition) -> Tensor:
    """Mask of the weights to fix now, so that ``share`` of the kept ones is fixed; equal ones by position.

    ``fixed``: bool, those fixed already; they count and are not chosen again.
    """
    free = (~fixed if kept is None else ~fixed & kept).reshape(-1).nonzero().reshape(-1)
    done = int((fixed if kept is None else fixed & kept).sum())
    count = min(len(free), round(share * (len(free) + done)) - done)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    if count <= 0:
        return mask.reshape(weight.shape)
    if how == "random":
        order = torch.randperm(len(free)).to(free.device)
    else:
        order = weight.detach().abs().reshape(-1)[free].argsort(descending=how == "large", stable=True)
    mask[free[order[:count]]] = True
    return mask.reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class Incremental(WeightQuantizer):
    """What the methods share that quantize a weight portion by portion.

    ``partition``: which weights go first: the large ones, a random choice, or the small ones. ``portions``: the
    accumulated shares, the last one 1; None for those of the paper. ``fixed`` (bool) and ``values`` are the state.
    """

    partition: Partition = "large"
    portions: tuple[Fraction, ...] | None = None

    def conflicts(self) -> list[str]:
        """Portions rise to 1."""
        shares = self.portions
        if shares is None or (shares and list(shares) == sorted(set(shares)) and shares[0] > 0 and shares[-1] == 1):
            return []
        return [f"portions must rise from above 0 to 1; got {shares}"]

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {"fixed": torch.zeros_like(weight, dtype=torch.bool), "values": torch.zeros_like(weight)}

    @abstractmethod
    def project(self, w: Weight) -> Tensor:
        """The latent weight on its levels, whatever is fixed."""

    def restarts(self, bits: int) -> tuple[float, ...]:
        return tuple(n / len(self.shares(bits)) for n in range(1, len(self.shares(bits))))

    def shares(self, bits: int) -> tuple[float, ...]:
        """The accumulated shares."""
        return self.portions or PORTIONS.get(bits, PORTIONS[2])

    def quantize(self, w: Weight) -> Tensor:
        fixed, values = w.state["fixed"], w.state["values"]
        if w.training:
            return torch.where(fixed, values, w.latent)
        return straight_through(w.latent, torch.where(fixed, values, self.project(w)), ~fixed)

    def fix(self, w: Weight, mask: Tensor) -> None:
        """Quantize the weights of ``mask`` for good."""
        fixed, values = w.state["fixed"], w.state["values"]
        values.copy_(torch.where(mask & ~fixed, self.project(w), values))
        fixed.logical_or_(mask)
        w.latent.copy_(torch.where(fixed, values, w.latent))

    def advance(self, w: Weight, loop: Loop, epoch: int) -> None:
        """Quantize what is due in ``epoch``."""
        share = portion(epoch, loop.epochs, self.shares(w.bits))
        self.fix(w, chosen_next(w.latent, w.state["fixed"], w.kept, share, self.partition))

    def on_start(self, w: Weight, loop: Loop) -> None:
        if loop.epoch < loop.epochs:
            self.advance(w, loop, loop.epoch)

    def on_epoch(self, w: Weight, loop: Loop) -> None:
        if loop.epoch + 1 < loop.epochs:
            self.advance(w, loop, loop.epoch + 1)

    def before_step(self, w: Weight, loop: Loop) -> None:
        if w.latent.grad is not None:
            w.latent.grad.masked_fill_(w.state["fixed"], 0)

    def after_step(self, w: Weight, loop: Loop) -> None:
        w.latent.copy_(torch.where(w.state["fixed"], w.state["values"], w.latent))  # undoes momentum and decay

    def finish(self, w: Weight, context: Context) -> None:
        self.fix(w, torch.ones_like(w.state["fixed"]))


@dataclass(frozen=True, kw_only=True)
class Inq(Incremental):
    """Powers of two; the levels come from the weights as they are when the step starts."""

    id: ClassVar[str] = "inq"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {**super().start(weight, bits, axis, kept), "levels": power_levels(weight, bits, kept)}

    def project(self, w: Weight) -> Tensor:
        return to_powers(w.latent, w.state["levels"])
