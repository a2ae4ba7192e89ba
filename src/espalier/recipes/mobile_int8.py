r"""Mobile int8: fewer channels, fine-tuned, then static int8 of weights and inputs, ready for a runtime.

Paper    Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning. CVPR 2023. arXiv:2301.12900 (channels);
         Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort. A White Paper on Neural Network Quantization.
         2021. arXiv:2106.08295 (section 3.6, int8 after training)
Formula  M <- M without the channels of least mean |w| of their coupled weights;   fine-tune;   fold;   int8 = ptq(M)
Departs  ``strength`` is the share of the multiply-adds that goes. Channels are rounded to a multiple of 4, which int8
         kernels are built for, in layers that have as many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.fields import Fraction
from espalier.core.method import Technique
from espalier.core.model import copy_model
from espalier.prune import Channels, Global, Prune
from espalier.quantize import PTQInt8
from espalier.recipes.deep_compression import refused
from espalier.train import Finetune

STRONGEST = 0.9
"""Share of the multiply-adds that goes at strength 1."""
MULTIPLE = 4


@dataclass(frozen=True, kw_only=True)
class MobileInt8(Technique):
    """Remove channels, fine-tune, quantize. ``strength`` sets the sparsity of ``prune``; with ``null`` its own stands.

    ``espalier export RUN --to int8`` writes the file for a runtime.
    """

    id: ClassVar[str] = "mobile-int8"
    strength: Fraction | None = 0.5
    prune: Prune = field(
        default_factory=lambda: Prune(pattern=Channels(measure="macs", multiple=MULTIPLE), scope=Global())
    )
    finetune: Finetune = field(default_factory=lambda: Finetune(epochs=15, lr=1e-3))
    ptq: PTQInt8 = field(default_factory=PTQInt8)

    def conflicts(self) -> list[str]:
        return [] if self.strength is None else refused(self.prune, STRONGEST * self.strength, self.strength)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``; a model without channels that can go keeps them."""
        prune = self.prune if self.strength is None else self.prune.replace(sparsity=STRONGEST * self.strength)
        try:
            model = context.run(prune, copy_model(model), "01-prune")
        except ModelError as error:  # there is still int8
            context.warn(f"{self.name} goes on with all channels: {error}")
        model = context.run(self.finetune, model, "02-finetune")
        return context.run(self.ptq, model, "03-ptq-int8")
