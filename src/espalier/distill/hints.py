r"""Hints: a layer of the student, seen through a regressor, learns to give what a layer of the teacher gives.

Paper    Romero, Ballas, Kahou, Chassang, Gatta, Bengio. FitNets: Hints for Thin Deep Nets. ICLR 2015. arXiv:1412.6550
Formula  H = 1/2 ||h_t(x) - r(g_s(x))||^2;   two-stage: H alone, then all the student by the other losses (soft targets
         where there are none);   joint: CE + weight H
Departs  The squared norm is the mean over all entries, so that the weight means the same for small and large maps; the
         joint form is CE + 100 times the mean square. The regressor is a 1x1 convolution (linear for vectors) after
         averaging the larger map down. The second stage keeps alpha as it is; the paper lets it fall.
         The first has no penalties, ema or stopping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.fields import Epochs, Penalty
from espalier.distill.parts import FeatureLoss
from espalier.distill.places import Pair, Seen


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of features of one shape."""
    return (student - teacher).square().mean() / 2


@dataclass(frozen=True, kw_only=True)
class Hints(FeatureLoss):
    """``epochs``: of the first stage; ``weight``: of the joint form. By default the middle pair of all that match."""

    id: ClassVar[str] = "hints"
    mode: Literal["two-stage", "joint"] = "two-stage"
    epochs: Epochs = 5
    weight: Penalty = 200.0

    @property
    def ahead(self) -> int:
        """The epochs of the first stage."""
        return self.epochs if self.mode == "two-stage" else 0

    def conflicts(self) -> list[str]:
        """A first stage takes time."""
        return ["two-stage needs epochs of 1 or more"] if self.mode == "two-stage" and not self.epochs else []

    @property
    def adapts(self) -> Literal["always"]:
        """The regressor."""
        return "always"

    def found(self, student: Sequence[Seen], teacher: Sequence[Seen]) -> list[Pair]:
        """The middle one of the matching pairs."""
        pairs = super().found(student, teacher)
        return pairs[(len(pairs) - 1) // 2 :][:1]

    def value(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the pairs."""
        weight = 1.0 if self.ahead else self.weight
        return weight * torch.stack([hint(student, teacher) for student, teacher in pairs]).sum()
