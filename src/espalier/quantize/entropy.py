r"""The range that loses the least information: the smallest KL divergence between the values and their codes.

Paper    Migacz. 8-bit Inference with TensorRT. GPU Technology Conference 2017
Formula  h = histogram of |x|;   P_i = h_1..h_i, its last bin with all beyond;   Q_i = h_1..h_i merged into L levels,
         each spread over its bins that hold anything;   clip = (i* + 1/2) width,   i* = argmin KL(P_i || Q_i)
Departs  L is 2^{b-1} where the values have a sign, as the talk's 128, else 2^b. Zeros are left out, for they have a
         code of their own under every clip. The clip is never beyond the largest value, the last of equal i wins, and
         with more levels than half the bins nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Bins
from espalier.quantize.parts import Observer

CHUNK = 2**22
"""So many entries of (rows, clips, levels) are worked on at once."""


def histograms(sizes: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Counts (rows, bins; float64) of ``sizes`` >= 0 (rows, n), zeros left out, and the width of a bin (rows,)."""
    width = sizes.amax(1) / bins
    safe = torch.where(width > 0, width, 1)
    places = (sizes / safe[:, None]).long().clamp_max(bins - 1)
    counts = torch.zeros(len(sizes), bins, dtype=torch.float64, device=sizes.device)
    return counts.scatter_add_(1, places, (sizes > 0).double()), width


def divergences(counts: Tensor, levels: int) -> Tensor:
    """(rows, bins - levels + 1): KL(P_i || Q_i), i = levels..bins, of ``counts`` (rows, bins); inf where undefined."""
    bins = counts.shape[1]
    kept = torch.arange(levels, bins + 1, device=counts.device)
    bounds = -(-kept[:, None] * torch.arange(levels + 1, device=counts.device) // levels)  # level k: bins k*i/L and on
    mass, filled = (_sums(values)[:, bounds].diff(dim=-1) for values in (counts, (counts > 0).double()))
    spread = mass / filled.clamp_min(1)  # Q of each bin that holds anything
    inside, total = mass.sum(-1), counts.sum(1, keepdim=True)
    last, beyond = counts[:, kept - 1], total - inside
    entropy = _sums(torch.xlogy(counts, counts))[:, kept] - torch.xlogy(last, last)
    entropy = entropy + torch.xlogy(last + beyond, last + beyond)
    cross = torch.xlogy(mass, spread).sum(-1) + torch.xlogy(beyond, spread[..., -1])
    found = (entropy - cross) / total - total.log() + inside.log()
    possible = (inside > 0) & ((last > 0) | (beyond <= 0))
    return torch.where(possible, found, torch.inf)


def _sums(counts: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... entries of each row."""
    return torch.nn.functional.pad(counts.cumsum(1), (1, 0))


def clip(sizes: Tensor, levels: int, bins: int) -> Tensor:
    """(rows,): where each row of ``sizes`` >= 0 is clipped; infinity where nothing is."""
    if 2 * levels > bins:
        return torch.full_like(sizes[:, 0], torch.inf)
    counts, width = histograms(sizes, bins)
    rows = max(1, CHUNK // ((bins - levels + 1) * levels))
    found = torch.cat([divergences(part, levels) for part in torch.split(counts, rows)])
    least = found.amin(1, keepdim=True)
    best = found.shape[1] - 1 - (found <= least + 1e-12).flip(1).to(torch.uint8).argmax(1)
    return torch.where(best == found.shape[1] - 1, torch.inf, (levels + best + 0.5) * width)


@dataclass(frozen=True, kw_only=True)
class Entropy(Observer):
    """``bins`` of the histogram. Needs many values: rows of a few hundred tell little about a distribution."""

    id: ClassVar[str] = "entropy"
    bins: Bins = 2048

    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        low, high = extremes[..., 0].amin(-1).float(), extremes[..., 1].amax(-1).float()
        signed, limit = (low < 0) | symmetric, torch.empty_like(low)
        for sign in (False, True):
            chosen = signed == sign
            if bool(chosen.any()):
                levels = 2 ** (bits - 1) if sign else 2**bits
                limit[chosen] = clip(rows[chosen].float().abs(), levels, self.bins).to(limit)
        return torch.maximum(low, -limit), torch.minimum(high, limit)
