r"""Deep Compression: prune while training, share the weights that are left, fine-tune the shared values.

Paper    Han, Mao, Dally. Deep Compression. ICLR 2016. arXiv:1510.00149
Formula  prune -> retrain -> k-means (conv wide, fully connected narrow) -> fine-tune centroids -> entropy-code
Departs  Pruning is gradual (cubic) and global instead of one threshold per layer; zero is a symbol of its own, so
         positions and values are coded together; the coder is chosen per tensor, Huffman being one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.fields import Fraction
from espalier.core.method import Technique
from espalier.core.selection import weights
from espalier.prune import Cubic, Global, Prune
from espalier.share import KMeans
from espalier.train import Finetune

WEAKEST, STRONGEST = 0.5, 0.985
"""Sparsity at strength 0 and 1; between them the share that is kept falls geometrically."""


def sparsity_at(strength: float) -> float:
    """Strength 0..1 -> sparsity."""
    kept: float = (1 - WEAKEST) * ((1 - STRONGEST) / (1 - WEAKEST)) ** strength
    return 1 - kept


def bits_at(strength: float, *, convolution: bool) -> int:
    """Strength 0..1 -> bits per shared weight: 8 to 4 for convolutions, 6 to 3 for everything else."""
    high, low = (8, 4) if convolution else (6, 3)
    return round(high + (low - high) * strength)


def refused(prune: Prune, sparsity: float, strength: float) -> list[str]:
    """What is wrong where ``strength`` asks ``prune`` for ``sparsity``; empty where it can do that."""
    try:
        prune.replace(sparsity=sparsity)
    except UsageError as error:
        return [f"strength={strength} sets the sparsity ({str(error).rstrip('.')}); or set strength to null"]
    return []


@dataclass(frozen=True, kw_only=True)
class DeepCompression(Technique):
    """Prune, share, fine-tune. ``strength`` sets the sparsity and the bits; with ``null`` the stages' own stand."""

    id: ClassVar[str] = "deep-compression"
    strength: Fraction | None = 0.5
    prune: Prune = field(default_factory=lambda: Prune(scope=Global(), schedule=Cubic(), epochs=20, lr=1e-3))
    share: KMeans = field(default_factory=KMeans)
    finetune: Finetune = field(default_factory=lambda: Finetune(epochs=5, lr=3e-4))

    def conflicts(self) -> list[str]:
        return [] if self.strength is None else refused(self.prune, sparsity_at(self.strength), self.strength)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        prune, share = self.prune, self.share
        if self.strength is not None:
            bits = {
                slot.name: bits_at(self.strength, convolution=isinstance(slot.module, nn.modules.conv._ConvNd))
                for slot in weights(model)
            }
            prune, share = prune.replace(sparsity=sparsity_at(self.strength)), share.replace(bits=bits)
        for name, stage in (("01-prune", prune), ("02-kmeans", share), ("03-finetune", self.finetune)):
            model = context.run(stage, model, name)
        return model
