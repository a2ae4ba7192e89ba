r"""Ternary network: every inner layer has three values, trained as such, and the file codes where the zeros are.

Paper    Zhu, Han, Mao, Dally. Trained Ternary Quantization. ICLR 2017. arXiv:1612.01064;
         Li, Zhang, Liu. Ternary Weight Networks. 2016. arXiv:1605.04711 (weights: twn)
Formula  w^ in {-W_n, 0, W_p};   the floor(s n) smallest |w| of a layer are 0;   entropy-coded: H(s) bits for each
         position and one for each sign, H the binary entropy
Departs  The threshold is the magnitude that leaves a share s of zeros, the strength, where the paper takes 0.05 max|w|
         (it offers the share as well). First and last layer get 8 bits, the paper leaves them in floating point.
         ``finetune`` follows at a lower rate; no teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.core.method import Technique
from espalier.quantize import TTQ, Quantize
from espalier.train import Finetune

FEWEST_ZEROS, MOST_ZEROS = 0.3, 0.95
"""Share of zeros at strength 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class TernaryNetwork(Technique):
    """Train three values, fine-tune them. ``strength`` sets the share of zeros of TTQ; with ``null`` the stages' own
    fields stand.
    """

    id: ClassVar[str] = "ternary-network"
    strength: Fraction | None = 0.5
    quantize: Quantize = field(
        default_factory=lambda: Quantize(weights=TTQ(), bits=2, epochs=15, lr=1e-3, reestimate=True)
    )
    finetune: Finetune = field(default_factory=lambda: Finetune(epochs=5, lr=1e-4))

    def conflicts(self) -> list[str]:
        method = self.quantize.weights
        if method is None or 2 not in method.widths:
            return [f"quantize.weights={method.id if method else None} has no three values; take ttq, twn or ternary"]
        if self.strength is not None and not isinstance(method, TTQ):
            return [f"strength sets the zeros of ttq; with weights={method.id} set strength to null"]
        if self.strength is not None and isinstance(method, TTQ) and method.threshold == "learned":
            return ["strength sets the threshold, which threshold=learned of ttq learns; set strength to null"]
        return []

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        quantize, method = self.quantize, self.quantize.weights
        if self.strength is not None and isinstance(method, TTQ):
            zeros = FEWEST_ZEROS + (MOST_ZEROS - FEWEST_ZEROS) * self.strength
            quantize = quantize.replace(weights=method.replace(threshold="sparsity", sparsity=zeros))
        model = context.run(quantize, model, "01-quantize")
        return context.run(self.finetune, model, "02-finetune")
