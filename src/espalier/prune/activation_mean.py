r"""Activation mean: the units that answer least go.

Paper    Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource Efficient Inference.
         ICLR 2017. arXiv:1611.06440 (section 2.2, activation)
Formula  s_u = mean over samples and positions of |a_u|
Departs  The absolute value, so that activations of both signs (tanh, a layer without activation) do not cancel; the
         same as the paper's mean after a ReLU. The paper also proposes the standard deviation: see momentum, moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import averages


def mean_absolute(activation: Tensor) -> Tensor:
    """(samples, units, *positions) -> (samples, units): mean |a|."""
    return activation.flatten(2).abs().mean(2) if activation.ndim > 2 else activation.abs()


@dataclass(frozen=True, kw_only=True)
class ActivationMean(Criterion):
    """Score of an output unit = its mean absolute activation over ``batches`` training batches."""

    id: ClassVar[str] = "activation-mean"
    of = "units"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return averages(
            model, selection, context, lambda a, _: mean_absolute(a), count=self.batches, label="activations"
        )
