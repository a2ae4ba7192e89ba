r"""ADMM: train in floating point, pulled towards a discrete copy that follows the weights epoch by epoch.

Paper    Leng, Dou, Li, Zhu, Jin. Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM. AAAI 2018.
         arXiv:1707.09870
Formula  W <- argmin f(W) + rho/2 |W - G + lambda|^2;   V = W + lambda, alternating Q = nearest of the set to V / alpha
         and alpha = V'Q / Q'Q, G = alpha Q;   lambda <- lambda + W - G;   at the end W := G.
         Sets: {+-1}, {0, +-1}, {0, +-1, +-2, ..., +-2^N};   extragradient: W_p = W - lr g(W), W <- W - lr g(W_p)
Departs  The steps for W are the optimizer's: with the extragradient every second one starts again from W with the
         gradient at W_p, and both gradients enter the optimizer's memory; biases and norms take plain steps. rho is
         ours. alpha starts where it was, at the mean of |V| and at powers of two below; the best end is taken.
         Validation and files see G; batch norm, which has seen W, is best re-estimated by a step of its own after it.
         A later training has neither pull nor extragradient: it keeps alpha, and W goes on straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.errors import UsageError
from espalier.core.fields import Penalty, Rounds, Steps
from espalier.core.quantized import Weight, WeightQuantizer, affine, mean_where
from espalier.core.representation import Representation
from espalier.quantize.grid import straight_through

if TYPE_CHECKING:
    from espalier.core.context import Context

Levels = Literal["fitting", "binary", "ternary", "powers"]


def magnitudes(bits: int, levels: Levels) -> tuple[int, ...]:
    """The magnitudes of the set in rising order; with ``fitting``, of the set that ``bits`` bits hold.

    Raises ``UsageError`` for a set that needs more bits.
    """
    if levels == "fitting":
        levels = "binary" if bits == 1 else "ternary" if bits == 2 else "powers"
    needed = {"binary": 1, "ternary": 2, "powers": 3}[levels]
    if bits < needed:
        raise UsageError(f"admm: {levels} values need {needed} bits; got {bits}")
    if levels == "powers":
        return 0, *(2**k for k in range(2 ** (bits - 1) - 1))
    return (1,) if levels == "binary" else (0, 1)


def nearest(values: Tensor, alpha: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Q: for each value the nearest member of ``+-alpha sizes``, as an integer (int8); ``sgn(0) = 1``."""
    table = torch.tensor(sizes, dtype=torch.int8, device=values.device)
    limits = (table[:-1].double() + table[1:].double()) / 2 * alpha.double()
    index = torch.bucketize(values.detach().abs().double(), limits, right=True)
    found = torch.where(values < 0, -table[index], table[index])
    return found if bool(alpha > 0) else torch.full_like(found, sizes[0])


def project(
    values: Tensor, sizes: tuple[int, ...], rounds: int, kept: Tensor | None, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(Q, alpha)`` by alternating minimisation of ``|values - alpha Q|^2`` over the kept values.

    ``alpha``: a scale to start from, () and float32. Others are the mean magnitude and, with more than one magnitude
    to choose from, the powers of two below it: the best end is taken.
    """
    wide = values.detach().double()
    wide = wide if kept is None else torch.where(kept, wide, 0)
    mean = mean_where(wide.abs(), kept, None).float()
    starts = [mean * 2.0**-k for k in range(max(1, sum(size > 0 for size in sizes)))]
    if alpha is not None:
        starts = [alpha, *starts]
    ends = [_alternate(wide, sizes, rounds, kept, start) for start in starts]
    return min(ends, key=lambda end: float((wide - end[1].double() * _counted(end[0], kept)).square().sum()))


def _alternate(
    wide: Tensor, sizes: tuple[int, ...], rounds: int, kept: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    codes = nearest(wide, alpha, sizes)
    for _ in range(rounds):
        counted = _counted(codes, kept)
        square = counted.square().sum()
        if not bool(square > 0):
            break
        alpha = ((wide * counted).sum() / square).float()
        codes = nearest(wide, alpha, sizes)
    return codes, alpha


def _counted(codes: Tensor, kept: Tensor | None) -> Tensor:
    """The codes in float64, 0 where an earlier step pruned."""
    return codes.double() if kept is None else torch.where(kept, codes, 0).double()


@dataclass(frozen=True, kw_only=True)
class Admm(WeightQuantizer):
    """``levels``: the set, ``fitting`` for the largest that the bits hold. ``rho``: the pull towards the copy.

    ``every``: optimizer steps between two updates of the copy, None for once an epoch; ``rounds`` alternations each.
    A step with the extragradient is two of the optimizer's: an update that is due between them follows the second.
    """

    id: ClassVar[str] = "admm"
    widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    levels: Levels = "fitting"
    rho: Penalty = 1.0
    every: Steps | None = None
    rounds: Rounds = 5
    extragradient: bool = True

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        codes, alpha = project(weight, magnitudes(bits, self.levels), self.rounds, kept)
        zeros = torch.zeros_like(weight)
        done = torch.zeros((), dtype=torch.bool, device=weight.device)
        return {"codes": codes, "alpha": alpha, "dual": zeros, "anchor": weight.clone(), "done": done}

    def copy(self, w: Weight) -> Tensor:
        """G, in the weight's dtype."""
        return (w.state["codes"].float() * w.state["alpha"]).to(w.latent.dtype)

    def quantize(self, w: Weight) -> Tensor:
        if bool(w.state["done"]):  # a later training keeps the scale and chooses the nearest values
            codes = nearest(w.latent, w.state["alpha"], magnitudes(w.bits, self.levels))
            return straight_through(w.latent, (codes.float() * w.state["alpha"]).to(w.latent.dtype))
        return w.latent if w.training else straight_through(w.latent, self.copy(w))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        codes = w.state["codes"]
        if bool(w.state["done"]):
            codes = nearest(w.latent, w.state["alpha"], magnitudes(w.bits, self.levels))
        return affine(w, values, codes, w.state["alpha"], torch.zeros((), dtype=torch.int32, device=codes.device))

    def update(self, w: Weight) -> None:
        """G and lambda for the weights as they are."""
        dual, sizes = w.state["dual"], magnitudes(w.bits, self.levels)
        codes, alpha = project(w.latent + dual, sizes, self.rounds, w.kept, w.state["alpha"])
        w.state["codes"].copy_(codes)
        w.state["alpha"].copy_(alpha)
        dual.add_(w.latent - self.copy(w))
        if w.kept is not None:
            dual.masked_fill_(~w.kept, 0)

    def penalty(self, w: Weight) -> Tensor | None:
        if bool(w.state["done"]):
            return None
        gap = w.latent - self.copy(w) + w.state["dual"]
        gap = gap if w.kept is None else torch.where(w.kept, gap, 0)
        return self.rho / 2 * gap.square().sum()

    def before_step(self, w: Weight, loop: Loop) -> None:
        if not self.extragradient or bool(w.state["done"]):
            return
        if loop.step % 2:
            w.latent.copy_(w.state["anchor"])
        else:
            w.state["anchor"].copy_(w.latent)

    def after_step(self, w: Weight, loop: Loop) -> None:
        length, steps, every = 2 if self.extragradient else 1, loop.step + 1, self.every or loop.steps_per_epoch
        if bool(w.state["done"]) or (steps % length and steps < loop.steps):  # W_p is no W, but for a lone last step
            return
        before = (steps - 1) // length * length
        if steps // every > before // every:
            self.update(w)

    def finish(self, w: Weight, context: Context) -> None:
        if bool(w.state["done"]):  # by an earlier step
            return
        w.latent.copy_(self.copy(w))
        w.state["done"].fill_(True)
