r"""Several teachers: the student learns from the average of what they say.

Paper    You, Xu, Xu, Tao. Learning from Multiple Teacher Networks. KDD 2017; Fukuda et al. Efficient Knowledge
         Distillation from an Ensemble of Teachers. Interspeech 2017; Kwon, Na, Lee, Kim. Adaptive Knowledge
         Distillation Based on Entropy. ICASSP 2020
Formula  probabilities: p = sum_m w_m softmax(z_m / T);   logits: z = sum_m w_m z_m;   sum_m w_m = 1;
         uniform: w_m = 1 / M;   metric: w_m ~ the metric on val;   entropy: w_m ~ exp(-H(softmax(z_m))), per sample
Departs  Of You et al. only the averaged soft targets. Kwon et al. weigh by entropy in another form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.distill.parts import CURRENT, Teacher, Teaching

if TYPE_CHECKING:
    from espalier.distill.distill import Distill


def entropy_shares(logits: Tensor) -> Tensor:
    """(teachers, m) of logits (teachers, m, classes): the surer a teacher is of a sample, the more it has to say."""
    log_p = F.log_softmax(logits, dim=-1)
    return (log_p.exp() * log_p).sum(-1).softmax(dim=0)


def averaged(logits: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """The logits (m, classes) whose softmax at ``temperature`` is the average of the teachers' (teachers, m, classes).

    ``shares``: (teachers, 1) or (teachers, m).
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return temperature * (log_p + shares.log()[..., None]).logsumexp(dim=0)


@dataclass(frozen=True, kw_only=True)
class MultiTeacher(Teaching):
    """``beside``: further named models beside the step's teacher. ``average``: of what, where outputs are classes.

    Losses over features are averaged over the teachers, each with adapters of its own; entropy weighs them alike.
    """

    id: ClassVar[str] = "multi-teacher"
    beside: tuple[str, ...] = ()
    weights: Literal["uniform", "metric", "entropy"] = "uniform"
    average: Literal["probabilities", "logits"] = "probabilities"

    @property
    def needs(self) -> frozenset[str]:
        """The teachers, and labelled val data to weigh them by the metric."""
        return (
            super().needs
            | {f"model:{name}" for name in self.beside if name != CURRENT}
            | ({"val", "labels"} if self.weights == "metric" else set())
        )

    def problems(self, method: Distill) -> list[str]:
        """Nobody teaches twice."""
        names = (method.teacher, *self.beside)
        twice = sorted({name for name in names if names.count(name) > 1})
        return [f"multi-teacher names {', '.join(twice)} more than once"] if twice else []

    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """One lesson with all of them."""
        if not self.beside:
            context.warn(f"{self.name} has the step's teacher alone; name others: beside=('name', ...).")
        teachers = (*teachers, *(method.hired(name, student, context) for name in self.beside))
        shares = self.shares(teachers, context)
        context.record.details["shares"] = {t.name: s for t, s in zip(teachers, shares, strict=True)}
        teachers = tuple(replace(teacher, share=share) for teacher, share in zip(teachers, shares, strict=True))
        return method.learn(student, teachers, context, combine=partial(self.combined, torch.tensor(shares)))

    def shares(self, teachers: Sequence[Teacher], context: Context) -> list[float]:
        """What part each teacher has; of samples, where the entropy decides, only in the losses over features."""
        if self.weights != "metric":
            return [1 / len(teachers)] * len(teachers)
        higher = context.data.scorer().higher_is_better
        scores = [max(0.0, context.measure(teacher.model).value) for teacher in teachers]
        merits = scores if higher else [1 / score if score else math.inf for score in scores]
        best = [merit == math.inf for merit in merits]
        merits = [float(perfect) for perfect in best] if any(best) else merits
        total = sum(merits)
        return [merit / total if total else 1 / len(merits) for merit in merits]

    def combined(self, shares: Tensor, rows: Tensor, temperature: float | None, classes: bool) -> Tensor:
        """The rows (m, columns) that stand for those of all teachers (teachers, m, columns)."""
        weights = shares.to(rows.device)[:, None]
        if self.weights == "entropy" and classes:
            weights = entropy_shares(rows)
        if self.average == "logits" or temperature is None or not classes:
            return (weights[..., None] * rows).sum(dim=0)
        return averaged(rows, weights, temperature)
