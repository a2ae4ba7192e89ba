r"""Decoupled distillation: how sure the teacher is of the right class, and how it ranks the wrong ones, weighted apart.

Paper    Zhao, Cui, Song, Qiu, Liang. Decoupled Knowledge Distillation. CVPR 2022. arXiv:2203.08679
Formula  b = (p_y, 1 - p_y),  q = softmax over the classes other than y, both of z / T;
         L = CE + min(epoch / warmup, 1) T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)), epochs from 1
Departs  None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.errors import DataError
from espalier.core.fields import Count, Penalty, Positive
from espalier.distill.parts import OutputLoss, Rows


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``T^2`` times the divergence of the right class, and of the others, of logits (m, classes); means of the rows."""
    sides = []
    for logits in (teacher, student):
        log_p = F.log_softmax(logits / temperature, dim=1)
        wrong = torch.ones_like(log_p, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
        others = log_p[wrong].reshape(len(log_p), -1)
        right = log_p.gather(1, labels[:, None])
        sides.append((torch.cat([right, others.logsumexp(1, keepdim=True)], dim=1), F.log_softmax(others, dim=1)))
    (b_t, q_t), (b_s, q_s) = sides
    target = F.kl_div(b_s, b_t, reduction="batchmean", log_target=True)
    other = F.kl_div(q_s, q_t, reduction="batchmean", log_target=True)
    return temperature**2 * target, temperature**2 * other


@dataclass(frozen=True, kw_only=True)
class DKD(OutputLoss):
    """``alpha``: weight of the right class; ``beta``: of the others; ``warmup``: epochs in which both weights rise."""

    id: ClassVar[str] = "dkd"
    by_label: ClassVar[bool] = True
    alpha: Penalty = 1.0
    beta: Penalty = 8.0
    temperature: Positive = 4.0
    warmup: Count = 20

    @property
    def needs(self) -> frozenset[str]:
        """Labels, to tell the right class from the others."""
        return super().needs | {"labels"}

    @property
    def softness(self) -> float:
        """Teachers are averaged at the loss's own temperature."""
        return self.temperature

    def value(self, rows: Rows) -> Tensor:
        """The weighted sum. Raises ``DataError`` without integer labels, or with some that are no class."""
        if rows.labels is None:
            raise DataError(
                f"{self.name} needs one integer label (a class index) for each row of the output; this batch has none. "
                "Let Task.target return class indices, or use soft-targets, which needs no labels."
            )
        classes, (low, high) = rows.student.shape[1], (int(n) for n in rows.labels.aminmax())
        if low < 0 or high >= classes:
            raise DataError(
                f"{self.name} needs labels in 0 .. {classes - 1} for an output of {classes} classes; this batch has "
                f"{low} .. {high}. Where one of them marks rows that do not count, give the task's loss as "
                "torch.nn.CrossEntropyLoss(ignore_index=...), which is seen here."
            )
        target, other = decoupled(rows.student, rows.teacher, rows.labels, self.temperature)
        risen = min((rows.epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return risen * (self.alpha * target + self.beta * other)
