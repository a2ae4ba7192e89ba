r"""Any finite set of levels: given, equally spaced over a given range, or found by search.

Paper    Lloyd. Least squares quantization in PCM. IEEE Transactions on Information Theory 28, 1982 (the nearest level);
         Wang, Song. Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming. R Journal 2011
Formula  w^ = s argmin over q in Q of |w / s - q|;   s = 1, max|w| / max|Q|, or the s of least squares;
         ``overwrite``: w <- w^ after every optimizer step, else w stays latent and dw^/dw = 1
Departs  The search minimises the squared error over a histogram of 2048 bins, exactly there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.cluster import exact, histogram
from espalier.core.errors import UsageError
from espalier.core.fields import Level
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import TINY, straight_through
from espalier.quantize.level_sets import kept_values, look_up, midpoints

BINS = 2048
ALTERNATIONS = 20


def searched(values: Tensor, count: int) -> Tensor:
    """The ``count`` levels of least squared error for ``values`` (1-D), rising; the last repeats where fewer do."""
    means, weights, _ = histogram(np.sort(values.cpu().numpy().astype(np.float64)), BINS)
    found = exact(means, count, weights=weights)
    return torch.from_numpy(np.pad(found, (0, count - len(found)), mode="edge")).float()


def fitting_scale(values: Tensor, levels: Tensor, kind: Literal["none", "max", "l2"]) -> Tensor:
    """The scale (0-D, positive) of ``levels`` for ``values`` (1-D); 1 where either is all zero.

    ``l2`` alternates from ``max``: the nearest levels for the scale, the scale of least squares for those.
    """
    one = torch.ones((), device=values.device)
    extent = levels.abs().max()
    scale = values.abs().max() / extent
    if kind == "none" or not bool(scale > TINY) or not bool(torch.isfinite(scale)):
        return one
    if kind == "l2":
        thresholds = midpoints(levels)
        for _ in range(ALTERNATIONS):
            near = look_up(values / scale, levels, thresholds)
            better = (values * near).sum() / near.square().sum()
            if not bool(better > TINY) or bool(better == scale):
                break
            scale = better
    return scale


@dataclass(frozen=True, kw_only=True)
class Levels(WeightQuantizer):
    """``levels``: the set Q itself; or ``range``: 2^bits of them from its low to its high end; with neither, a search.

    ``mode``: a latent weight is trained, or the weight itself is overwritten. ``scale``: how a given set is fitted to
    the weights of a layer.
    """

    id: ClassVar[str] = "levels"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))
    levels: tuple[Level, ...] = ()
    range: tuple[Level, Level] | None = None
    mode: Literal["latent", "overwrite"] = "latent"
    scale: Literal["none", "max", "l2"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels:  # a given set has one width
            object.__setattr__(self, "widths", ((len(set(self.levels)) - 1).bit_length(),))

    def conflicts(self) -> list[str]:
        found = []
        if self.levels and self.range is not None:
            found.append("levels and range are both given: one of them says what the set is")
        if not all(isfinite(level) for level in (*self.levels, *(self.range or ()))):
            found.append("a level is infinite")
        if self.levels and len(set(self.levels)) < 2:
            found.append(f"levels={self.levels} is one value; two or more make a set to choose from")
        if self.range is not None and self.range[0] >= self.range[1]:
            found.append(f"range={self.range} is empty; give the low end first")
        if len(set(self.levels)) > 2 ** max(self.widths):
            found.append(f"{len(set(self.levels))} levels; {2 ** max(self.widths)} are allowed")
        return found

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        values = kept_values(weight, kept)
        if self.levels:
            levels = torch.tensor(sorted(set(self.levels)), dtype=torch.float32)
            if len(levels) > 2**bits:
                raise UsageError(
                    f"{self.name}: {len(levels)} levels need {(len(levels) - 1).bit_length()} bits, and {bits} were "
                    "given. Give more bits or fewer levels."
                )
        elif self.range is not None:
            levels = torch.linspace(*self.range, 2**bits)
        else:
            levels = searched(values, 2**bits)
        given = bool(self.levels) or self.range is not None
        levels = levels.to(weight.device)
        return {"levels": levels, "scale": fitting_scale(values, levels, self.scale if given else "none")}

    def quantize(self, w: Weight) -> Tensor:
        return straight_through(w.latent, self.project(w))

    def project(self, w: Weight) -> Tensor:
        """The nearest scaled level of each weight."""
        levels, scale = w.state["levels"], w.state["scale"]
        found = look_up(w.latent.detach().float() / scale, levels, midpoints(levels)) * scale
        return (found + 0).to(w.latent.dtype)

    def after_step(self, w: Weight, loop: Loop) -> None:
        if self.mode == "overwrite":
            w.latent.copy_(self.project(w))
