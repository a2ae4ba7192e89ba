r"""Kernel patterns: every kernel keeps n entries, in one of a few shapes that all kernels of the layer share.

Paper    Niu, Ma, Lin, Wang, Qian, Lin, Wang, Ren. PatDNN: Achieving Real-Time DNN Execution on Mobile Devices with
         Pattern-based Weight Pruning. ASPLOS 2020. arXiv:2001.00138
Formula  P_k = the n highest scores of kernel k;   D = the most frequent of all P_k, ``patterns`` of them at most;
         kernel k keeps argmax_{P in D} sum_{i in P} s_i
Departs  The highest scores by any criterion in place of ADMM on magnitudes; the centre of a kernel is not forced into
         its pattern. One dictionary for each layer, not one for the model. Whole kernels go by a step with pattern
         kernel-parts. On a schedule kernels take their pattern one after the other, those that lose least first, and
         keep it. What an earlier step has removed stays away, so a kernel may keep a part of a pattern only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Group, Range
from espalier.core.parametrize import Slot
from espalier.core.ranking import smallest
from espalier.prune.grouping import convolution
from espalier.prune.n_m import lowest
from espalier.prune.parts import FixedPattern, Reduction
from espalier.prune.weights import reduce

Patterns = Annotated[int, Range(1, 65_536, "patterns", "shapes that the kernels of a layer share")]


def dictionary(kernels: Tensor, n: int, size: int) -> Tensor:
    """Scores (kernels, positions), -inf: gone -> the ``size`` most frequent patterns of ``n`` entries at most, bool.

    The patterns of kernels that have just ``n`` entries left come first: they are in use.
    """
    left = (kernels > -torch.inf).sum(1)
    voting = left >= min(n, int(left.max()))
    wanted = ~lowest(kernels[voting], n, kernels.shape[1])
    found: tuple[Tensor, Tensor, Tensor] = torch.unique(wanted, dim=0, return_inverse=True, return_counts=True)
    shapes, choice, votes = found
    used = torch.bincount(choice[left[voting] == n], minlength=len(shapes))
    order = (used * (len(kernels) + 1) + votes).argsort(descending=True, stable=True)
    return shapes[order[:size]]


def fitted(kernels: Tensor, shapes: Tensor) -> Tensor:
    """(kernels, positions), (patterns, positions) -> the pattern of each kernel, (kernels, positions).

    The one that keeps most of the entries that are there, and among those the highest sum of scores.
    """
    there = kernels > -torch.inf
    table = shapes.T.to(kernels.dtype)
    count = there.to(kernels.dtype) @ table
    kept = kernels.masked_fill(~there, 0) @ table
    return shapes[kept.masked_fill(count < count.amax(1, keepdim=True), -torch.inf).argmax(1)]


@dataclass(frozen=True, kw_only=True)
class KernelPatterns(FixedPattern):
    """``n`` entries kept of every kernel, in one of at most ``patterns`` shapes."""

    id: ClassVar[str] = "patterns"
    n: Group = 4
    patterns: Patterns = 8

    def unfit(self, slot: Slot) -> str | None:
        """Why the slot has no kernels, whatever its shape; None where it has."""
        return None if convolution(slot) else "it has no kernel: patterns belong to convolutions"

    def refuses(self, shape: torch.Size) -> str | None:
        if len(shape) < 3:
            return "it has no kernel: patterns belong to convolutions"
        positions = shape[2:].numel()
        if positions <= self.n:
            return f"its kernels have {positions} positions, and n={self.n} of each stay"
        return None

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        return reduce(scores, (), reduction)

    def removed(self, scores: Tensor, share: float) -> Tensor:
        """All outside the patterns; below ``share`` 1, in the ``share`` of the kernels that lose least by it."""
        kernels = scores.flatten(2).flatten(0, 1).float().clamp(max=1e30)  # infinity times nothing is no number
        keep = fitted(kernels, dictionary(kernels, self.n, self.patterns))
        gone = ~keep
        if share < 1:
            loses = gone & (kernels > -torch.inf)
            lost = kernels.masked_fill(~loses, 0).sum(1).masked_fill(~loses.any(1), -torch.inf)
            gone = gone & smallest(lost, int(share * len(lost) + 1e-9))[:, None]
        return gone.reshape(scores.shape)

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.reshape(shape)
