r"""Sensitivity pruning: what the loss, or the output itself, depends on least goes.

Paper    Mozer, Smolensky. Using Relevance to Reduce Network Size Automatically. Connection Science 1(1), 1989;
         Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource Efficient Inference.
         ICLR 2017. arXiv:1611.06440; Molchanov, Mallya, Tyree, Frosio, Kautz. Importance Estimation for Neural Network
         Pruning. CVPR 2019. arXiv:1906.10771
Formula  gradient: s_i = mean_b |g_i,b|;   taylor: s_i = mean_b g_i,b w_i, |sum| over a group
         g_i,b = d L_b / d w_i;   output: L = mean_x ||f(x)||^2 / 2
Departs  Gradients are those of batches, not of single samples. Mozer and Smolensky take an attention coefficient of a
         whole unit and an exponential average while training. The Taylor groups of 2017 are feature maps; here a
         group's score is |sum of g w| over its weights as in 2019 (there squared).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.gradients import each_gradient, needs
from espalier.prune.parts import Criterion, Reduction, Scores


def contribution(gradient: Tensor, weight: Tensor, form: Literal["gradient", "taylor"]) -> Tensor:
    """One batch's contribution: |g| or g w, any shape."""
    return gradient.abs() if form == "gradient" else gradient * weight


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Criterion):
    """Score = mean absolute gradient, or gradient x weight (first-order change of the loss when the weight goes).

    ``against``: the task's loss, or the output itself, which needs no labels.
    """

    id: ClassVar[str] = "sensitivity"
    form: Literal["gradient", "taylor"] = "taylor"
    against: Literal["loss", "output"] = "loss"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.against)

    @property
    def reduction(self) -> Reduction:
        return "sum" if self.form == "gradient" else "abs-sum"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        sums: Scores = {}

        def add(name: str, gradient: Tensor, weight: Tensor) -> None:
            found = contribution(gradient, weight, self.form)
            sums[name] = sums[name] + found if name in sums else found

        done = each_gradient(
            model, selection, context, against=self.against, count=self.batches, fn=add, label="gradients"
        )
        return {name: total / done for name, total in sums.items()}
