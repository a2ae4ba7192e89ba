r"""Regression on the teacher's outputs: logits, probabilities, or the numbers of a regression.

Paper    Ba, Caruana. Do Deep Nets Really Need to be Deep? NIPS 2014. arXiv:1312.6184
Formula  L = weight / 2 mean_n ||z_s - z_t||^2;   predictions: the same of softmax(z)
Departs  Logits are compared as they are; the paper normalises them over the training set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from espalier.core.fields import Penalty
from espalier.distill.parts import OutputLoss, Rows


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared distance of rows (m, columns), the mean over the rows."""
    return (student - teacher).square().sum(dim=1).mean() / 2


@dataclass(frozen=True, kw_only=True)
class Logits(OutputLoss):
    """``space``: what is compared; the outputs of a regression are predictions already. No labels unless ``hard``."""

    id: ClassVar[str] = "logits"
    classes_only: ClassVar[bool] = False
    space: Literal["logits", "predictions"] = "logits"
    weight: Penalty = 1.0

    @property
    def leaves(self) -> float:
        """Nothing: the paper's student sees no labels."""
        return 0.0

    @property
    def softness(self) -> float | None:
        """Predictions are averaged as the probabilities they are."""
        return 1.0 if self.space == "predictions" else None

    def value(self, rows: Rows) -> Tensor:
        """``weight / 2 mean ||.||^2``."""
        both = (rows.student, rows.teacher)
        if self.space == "predictions" and rows.classes:
            both = (rows.student.softmax(dim=1), rows.teacher.softmax(dim=1))
        return self.weight * squared(*both)
