r"""Saliency: the units whose activation, times what the output makes of it, matters least go - layer by layer.

Paper    Simonyan, Vedaldi, Zisserman. Deep Inside Convolutional Networks: Visualising Image Classification Models and
         Saliency Maps. ICLR 2014 workshop. arXiv:1312.6034; Molchanov, Tyree, Karras, Aila, Kautz. Pruning
         Convolutional Neural Networks for Resource Efficient Inference. ICLR 2017. arXiv:1611.06440
Formula  s_u = mean_x sum over positions of |a_u(x) dL/da_u(x)|;   s <- s / ||s||_2 of the layer
Departs  Simonyan's map is of the input's pixels; here of every layer's units. Molchanov takes the absolute value after
         the mean over positions, where opposite signs cancel; here before. Divided by the layer's norm, so that every
         layer is judged by its own units. Form input differentiates the largest logit and needs no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import averages
from espalier.train.looking import needs


def saliency(activation: Tensor, gradient: Tensor) -> Tensor:
    """(samples, units, *positions) twice -> (samples, units): |a g| summed over the positions."""
    product = (activation * gradient).abs()
    return product.flatten(2).sum(2) if product.ndim > 2 else product


@dataclass(frozen=True, kw_only=True)
class Saliency(Criterion):
    """Score of an output unit = mean |activation x gradient| over ``batches``, normalised inside its layer.

    ``form``: gradients of the loss (labels), or of the largest logit (input).
    """

    id: ClassVar[str] = "saliency"
    of = "units"
    form: Literal["labels", "input"] = "labels"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return needs("loss" if self.form == "labels" else "top")

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        found = averages(
            model,
            selection,
            context,
            saliency,
            count=self.batches,
            label="saliency",
            against="loss" if self.form == "labels" else "top",
        )
        return {name: score / score.norm().clamp_min(1e-30) for name, score in found.items()}
