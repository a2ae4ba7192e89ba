r"""HashedNets: a hash of each weight's position says which of few numbers it is, and with which sign.

Paper    Chen, Wilson, Tyree, Weinberger, Chen. Compressing Neural Networks with the Hashing Trick. ICML 2015.
         arXiv:1504.04788
Formula  V_ij = w_{h(i,j)} xi(i,j);   dL/dw_k = sum over h(i,j) = k of xi(i,j) dL/dV_ij;
         nearest: w_k = mean over h(i,j) = k of xi(i,j) V_ij
Departs  Starts from a trained layer; the paper trains from scratch. The hash is the finaliser of SplitMix64 (the paper:
         xxHash). Biases are not hashed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.core.parametrize import Slot
from espalier.core.structures import Hashed as Rule
from espalier.share.circulant import bucket_means, seed_of
from espalier.share.sharing import Sharing


@dataclass(frozen=True, kw_only=True)
class Hashed(Sharing):
    """The file holds a seed and the numbers; the hashes are computed when it is read."""

    id: ClassVar[str] = "hashed"

    def structure(self, slot: Slot, context: Context) -> Rule:
        """As many buckets as ``keep`` allows, one at least."""
        buckets = max(1, math.floor(self.keep * slot.latent.numel()))
        return Rule(shape=tuple(slot.shape), buckets=buckets, seed=seed_of(slot, context))

    def project(self, structure: Rule, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """The mean of what falls into each bucket, signs undone."""
        signed = weight * torch.from_numpy(structure.signs)
        return {"buckets": bucket_means(signed, torch.from_numpy(structure.index), structure.count)}
