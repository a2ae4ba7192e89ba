r"""Group lasso: whole filters, channels or kernel positions become zero.

Paper    Wen, Wu, Wang, Chen, Li. Learning Structured Sparsity in Deep Neural Networks. NeurIPS 2016. arXiv:1608.03665;
         the factor of the group size: Yuan, Lin. J. R. Stat. Soc. B 68, 2006
Formula  L + strength * sum_g sqrt(n_g) |w_g|_2:   w_g <- w_g max(1 - step * strength * sqrt(n_g) / |w_g|_2, 0)
Departs  The paper adds the subgradient to the loss and thresholds at the end. One kind of group at a time; the paper's
         depth-wise groups are whole layers and need a shortcut. step is the harmonic mean of the optimizer's over the
         group. Adam's steps are longest where gradients are small; SGD keeps more accuracy at one sparsity. A group
         never reaches across the groups of a convolution; depthwise layers have no channels to lose, embeddings no
         units. The largest group of a layer stays where all others are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.prune.grouping import Groups, group_dims
from espalier.prune.penalty import ProximalPenalty


def block_soft_threshold(weight: Tensor, threshold: Tensor | float, dims: tuple[int, ...]) -> Tensor:
    """The proximal map of ``threshold * |w_g|_2`` for groups that span the dimensions ``dims``.

    ``threshold``: one number, or one per group (shape of the weight with size 1 along ``dims``).
    """
    norm = weight.square().sum(dims, keepdim=True).sqrt()
    return weight * (1 - threshold / norm.clamp_min(torch.finfo(weight.dtype).tiny)).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class GroupLasso(ProximalPenalty):
    """``of``: outputs (``filters``), inputs (``channels``) or positions across the outputs (``shapes``)."""

    id: ClassVar[str] = "group-lasso"
    of: Literal["filters", "channels", "shapes"] = "filters"

    @property
    def groups(self) -> Groups:
        return self.of

    def proximal(self, weight: Tensor, step: Tensor | float) -> Tensor:
        dims = group_dims(weight.ndim, self.of)
        size = weight.numel() / max(weight.square().sum(dims).numel(), 1)
        if isinstance(step, Tensor):
            step = 1 / (1 / step).mean(dims, keepdim=True)
        return block_soft_threshold(weight, step * self.strength * size**0.5, dims)
