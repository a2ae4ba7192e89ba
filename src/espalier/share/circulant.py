r"""Circulant weights: every block is given by its first column, and each row is the one above turned by one.

Paper    Cheng, Yu, Feris, Kumar, Choudhary, Chang. An Exploration of Parameter Redundancy in Deep Networks with
         Circulant Projections. ICCV 2015. arXiv:1502.03436. Blocks: Ding et al. CirCNN. MICRO 2017. arXiv:1708.08917
Formula  W[i, j] = c[(i - j) mod b] d[j] in each block, d = +-1 at random;   nearest: c[k] = mean of W[i, j] d[j] over
         (i - j) mod b = k;   W x = F^-1 (F c * F (d * x))
Departs  Starts from a trained layer; both papers train from scratch. Training computes the weight and multiplies by
         it; ``share.by_fft`` gives the model that multiplies by FFT. The smallest block that keeps few enough numbers
         is taken; Cheng's is the whole layer (``block`` as large as its larger side). No signs are flipped unless asked
         for; Cheng et al. always flip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.core.fields import Group
from espalier.core.parametrize import Slot
from espalier.core.structures import Circulant as Rule
from espalier.share.sharing import Sharing

SEEDS = 2**32


def seed_of(slot: Slot, context: Context) -> int:
    """The seed that the file keeps for a weight."""
    return context.generator(slot.name).initial_seed() % SEEDS


@dataclass(frozen=True, kw_only=True)
class Circulant(Sharing):
    """Blocks over outputs and inputs, at every kernel position of a convolution; edges are cut, as if padded.

    ``block``: rows and columns of a block, in place of ``keep``; at most the layer's larger side. ``flips``: random
    signs of the inputs, remade from a seed.
    """

    id: ClassVar[str] = "circulant"
    block: Group | None = None
    flips: bool = False

    def structure(self, slot: Slot, context: Context) -> Rule:
        """With ``block``, or with the smallest one that keeps few enough numbers."""
        shape = tuple(slot.shape)
        largest = max(shape[:2])
        flips, seed = int(self.flips), seed_of(slot, context) if self.flips else 0

        def made(block: int) -> Rule:
            return Rule(shape=shape, block=block, flips=flips, seed=seed)

        if self.block is not None:
            return made(min(self.block, largest))
        rules = [made(block) for block in range(1, largest + 1)]
        allowed = self.keep * slot.latent.numel()
        found = next((rule for rule in rules if rule.count <= allowed), None)
        if found is None:
            found = min(rules, key=lambda rule: rule.count)
            self.tell(slot, found, context)
        return found

    def project(self, structure: Rule, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """The mean over each diagonal of each block."""
        entries = weight.reshape(*weight.shape[:2], -1)
        if structure.signs is not None:
            entries = entries * torch.from_numpy(structure.signs)
        return {"columns": bucket_means(entries, torch.from_numpy(structure.index), structure.count)}


def bucket_means(values: Tensor, index: Tensor, buckets: int) -> Tensor:
    """Mean of the ``values`` of each bucket (buckets,); 0 where there is none."""
    flat = index.reshape(-1)
    total = torch.zeros(buckets, dtype=values.dtype).index_add_(0, flat, values.reshape(-1))
    return total / torch.bincount(flat, minlength=buckets).clamp_min(1)
