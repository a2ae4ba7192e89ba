r"""Soft targets: the student learns the teacher's probabilities, softened by a temperature.

Paper    Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. NIPS 2014 workshop. arXiv:1503.02531
Formula  L = (1 - alpha) CE(z_s, y) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)), a mean over the samples
Departs  The paper leaves alpha and T open; these are the customary ones for CIFAR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Fraction, Positive
from espalier.distill.parts import OutputLoss, Rows


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of logits (m, classes), the mean over the rows."""
    log_p = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, p, reduction="batchmean")


@dataclass(frozen=True, kw_only=True)
class SoftTargets(OutputLoss):
    """``alpha``: the weight of the soft targets; the task's own loss has the rest."""

    id: ClassVar[str] = "soft-targets"
    alpha: Fraction = 0.9
    temperature: Positive = 4.0

    @property
    def leaves(self) -> float:
        """``1 - alpha``."""
        return 1.0 - self.alpha

    @property
    def softness(self) -> float:
        """Teachers are averaged at the loss's own temperature."""
        return self.temperature

    def value(self, rows: Rows) -> Tensor:
        """``alpha T^2 KL``."""
        return self.alpha * soft_targets(rows.student, rows.teacher, self.temperature)
