r"""Low rank, then int8: layers become rows of thinner ones, the network is fine-tuned, then quantized.

Paper    Kim, Park, Yoo, Choi, Yang, Shin. Compression of Deep Convolutional Neural Networks for Fast and Low Power
         Mobile Applications. ICLR 2016. arXiv:1511.06530 (Tucker-2, then fine-tuning); Nagel, Fournarakis, Amjad,
         Bondarenko, van Baalen, Blankevoort. A White Paper on Neural Network Quantization. 2021. arXiv:2106.08295
Formula  W ~ C x A x B for convolutions, W ~ U V for matrices, at ranks that keep a share of the parameters;
         fine-tune;   fold;   int8 = ptq(M)
Departs  Ranks come from one budget for all layers, where Kim takes those of EVBMF.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.core.method import Technique, field_names
from espalier.factorize import Factorization, Tucker
from espalier.quantize import PTQInt8
from espalier.train import Finetune

MOST_KEPT, LEAST_KEPT = 0.8, 0.1
"""Share of the parameters that is kept at strength 0 and 1; between them it falls geometrically."""


@dataclass(frozen=True, kw_only=True)
class LowRankInt8(Technique):
    """Factorize convolutions and matrices, fine-tune, quantize. ``strength`` sets the share that the ranks keep; with
    ``null`` the stages' own stands.
    """

    id: ClassVar[str] = "low-rank-then-int8"
    strength: Fraction | None = 0.5
    factorize: Factorization = field(default_factory=lambda: Tucker(others="svd"))
    finetune: Finetune = field(default_factory=lambda: Finetune(epochs=15, lr=1e-3))
    ptq: PTQInt8 = field(default_factory=PTQInt8)

    def conflicts(self) -> list[str]:
        if self.strength is None or "keep" in field_names(type(self.factorize.rank)):
            return []
        stage = self.factorize
        says = f"strength sets what ranks keep, and rank={stage.rank.id} of {stage.id} decides that itself"
        return [f"{says}; take budget, or set strength to null"]

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        factorize = self.factorize
        if self.strength is not None:
            keep = MOST_KEPT * (LEAST_KEPT / MOST_KEPT) ** self.strength
            factorize = factorize.replace(rank=factorize.rank.replace(keep=keep))
        model = context.run(factorize, model, f"01-{factorize.id}")
        model = context.run(self.finetune, model, "02-finetune")
        return context.run(self.ptq, model, "03-ptq-int8")
