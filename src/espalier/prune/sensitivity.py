r"""Sensitivity pruning: what the loss, or the output itself, depends on least goes.

Paper    Mozer, Smolensky. Using Relevance to Reduce Network Size Automatically. Connection Science 1(1), 1989;
         Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource Efficient Inference.
         ICLR 2017. arXiv:1611.06440; Molchanov, Mallya, Tyree, Frosio, Kautz. Importance Estimation for Neural Network
         Pruning. CVPR 2019. arXiv:1906.10771
Formula  gradient: s_i = mean_m |g_i,m|;   taylor: s_i = mean_m (g_i,m w_i)^2 (2019, eq. 8);   a group: sum of s_i
         g_i,m = d L_m / d w_i on mini-batch m;   output: L = mean_x ||f(x)||^2 / 2
Departs  Mozer and Smolensky take an attention coefficient of a whole unit and an exponential average while training;
         here absolute gradients of single weights are accumulated. Taylor of 2017 scores feature maps. The group form
         of 2019 squares the sum over a group; here the squares of its weights are summed. Masked weights score 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.forms import Form, Mask, Shared
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.train.looking import each_gradient, needs


def contribution(gradient: Tensor, weight: Tensor, form: Literal["gradient", "taylor"]) -> Tensor:
    """One batch's contribution, never negative so that batches cannot cancel: |g| or (g w)^2, any shape."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # squares of halves would underflow
    return wide.abs() if form == "gradient" else (wide * weight).square()


def gone(form: Form | None) -> Tensor | None:
    """Mask of the positions that a form holds at zero; None where it holds none there."""
    if isinstance(form, Mask):
        return ~form.mask
    return form.index == 0 if isinstance(form, Shared) and form.zero else None


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Criterion):
    """Score = mean absolute gradient, or mean square of gradient x weight: of the change to first order when it goes.

    ``against``: what is differentiated, so whose sensitivity is meant: the task's loss, or the output itself (half its
    mean squared norm), which needs no labels.
    """

    id: ClassVar[str] = "sensitivity"
    form: Literal["gradient", "taylor"] = "taylor"
    against: Literal["loss", "output"] = "loss"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.against)

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        sums: Scores = {}

        def add(name: str, gradient: Tensor, weight: Tensor) -> None:
            found = contribution(gradient, weight, self.form)
            sums[name] = sums[name] + found if name in sums else found

        done = each_gradient(
            model, selection, context, against=self.against, count=self.batches, fn=add, label="gradients"
        )
        means = {name: total / done for name, total in sums.items()}
        for slot in selection:
            if (zeros := gone(slot.form)) is not None:  # a gradient reaches what is gone too, which cannot go again
                means[slot.name].masked_fill_(zeros, 0)
        return means
