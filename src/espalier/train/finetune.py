r"""Fine-tuning: train what there is for a few epochs; masks and shared codes hold.

Paper    Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015.
         arXiv:1506.02626
Formula  w <- w - lr dL/dw on the kept weights; a shared centroid moves by the summed gradients of its members
Departs  Optimizer and schedule are the user's. The paper lowers the dropout rate after pruning; here train.dropout with
         mode=rescale does, as a step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Epochs
from espalier.train.training import Training


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Trains every parameter that is not frozen, through its form."""

    id: ClassVar[str] = "finetune"
    epochs: Epochs = 5

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """The model, trained in place."""
        self.train(model, context)
        return model
