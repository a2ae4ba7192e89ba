r"""Prune-quantize-distill: a student learns from the uncompressed network and ends pruned and quantized.

Paper    Polino, Pascanu, Alistarh. Model compression via distillation and quantization. ICLR 2018. arXiv:1802.05668;
         Kim, Chang, Kwak. PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation. Interspeech
         2021. arXiv:2106.14681
Formula  S <- argmin L_distill(S, T);   S <- m * Q(S), m and Q trained together;   S <- argmin L_distill(m * Q(S), T)
Departs  The teacher is the uncompressed network, or the model as it came (``compressed``), where PQK makes one of the
         pruned weights. The training that prunes and quantizes follows the task's own loss; the teacher comes before
         it, where there is a student of its own, and after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.fields import Fraction
from espalier.core.method import Technique
from espalier.core.model import copy_model
from espalier.distill import Distill
from espalier.recipes.prune_quantize import PruneQuantize

COMPRESSED = "compressed"
"""The name of the model as it came, as a teacher."""


@dataclass(frozen=True, kw_only=True)
class PruneQuantizeDistill(Technique):
    """Distil the student, prune and quantize it, distil it again as it is then.

    ``student``: a named model; null makes the model at hand its own student, which begins with the second stage.
    ``teacher``: a named model; ``compressed`` is the model at hand as it comes, behind steps that compress it.
    ``strength``: that of ``compress``; with ``null`` its own fields stand.
    """

    id: ClassVar[str] = "prune-quantize-distill"
    strength: Fraction | None = 0.5
    teacher: str = "original"
    student: str | None = None
    distill: Distill = field(default_factory=lambda: Distill(epochs=20))
    compress: PruneQuantize = field(default_factory=PruneQuantize)
    recover: Distill = field(default_factory=lambda: Distill(epochs=5, lr=3e-4))

    @property
    def needs(self) -> frozenset[str]:
        """What the stages need, and the named models."""
        names = {self.student, self.teacher} - {None, COMPRESSED}
        return super().needs | {f"model:{name}" for name in names}

    def conflicts(self) -> list[str]:
        found = [
            f"{name}.teacher and {name}.student are set by the recipe: give teacher and student there"
            for name, stage in (("distill", self.distill), ("recover", self.recover))
            if stage.student is not None or stage.teacher != "original"
        ]
        try:
            self.compress.replace(strength=self.strength)
        except UsageError as error:
            found.append(f"compress: {str(error).rstrip('.')}")
        return found

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        if self.teacher == COMPRESSED:
            context = replace(context, models={**context.models, COMPRESSED: copy_model(model)})
        if self.student is not None:
            first = self.distill.replace(teacher=self.teacher, student=self.student)
            model = context.run(first, model, "01-distill")
        model = context.run(self.compress.replace(strength=self.strength), model, "02-prune-quantize")
        return context.run(self.recover.replace(teacher=self.teacher), model, "03-distill")
