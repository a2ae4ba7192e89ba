r"""Transfer: a network trained on another task gets a new head and is compressed while it is fine-tuned.

Paper    Molchanov, Tyree, Karras, Aila, Kautz. Pruning Convolutional Neural Networks for Resource Efficient Inference.
         ICLR 2017. arXiv:1611.06440 (pruning while transferring); Sanh, Wolf, Rush. Movement Pruning: Adaptive Sparsity
         by Fine-Tuning. NeurIPS 2020. arXiv:2005.07683 (prune.criterion: movement)
Formula  h <- fresh;   (w, m) trained on the new task, zeros growing by the schedule;   k-means;   fine-tune
Departs  Single weights go, by magnitude, in place of feature maps by their Taylor score: criterion and pattern are
         fields. The values that are left are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Count, Fraction
from espalier.core.method import Technique
from espalier.prune import Cubic, Global, Prune
from espalier.recipes.deep_compression import refused, sparsity_at
from espalier.recipes.new_head import NewHead
from espalier.share import KMeans
from espalier.train import Finetune


@dataclass(frozen=True, kw_only=True)
class Transfer(Technique):
    """New head, prune while fine-tuning to the task, share, fine-tune the shared values.

    ``strength`` sets the sparsity of ``prune``; with ``null`` its own stands. ``head``, ``classes``, ``fresh_head``: as
    in recipes.new-head. A target's largest drop counts against the original, which was not made for this task.
    """

    id: ClassVar[str] = "transfer"
    changes_outputs: ClassVar[bool] = True
    strength: Fraction | None = 0.5
    head: str | None = None
    classes: Count = 0
    fresh_head: bool = True
    prune: Prune = field(default_factory=lambda: Prune(scope=Global(), schedule=Cubic(start=0.1), epochs=20, lr=1e-3))
    share: KMeans = field(default_factory=lambda: KMeans(bits=5))
    finetune: Finetune = field(default_factory=lambda: Finetune(epochs=5, lr=3e-4))

    @property
    def needs(self) -> frozenset[str]:
        """Labels of the new task."""
        return super().needs | {"train", "labels"}

    def conflicts(self) -> list[str]:
        return [] if self.strength is None else refused(self.prune, sparsity_at(self.strength), self.strength)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        head = NewHead(head=self.head, classes=self.classes, fresh=self.fresh_head)
        prune = self.prune if self.strength is None else self.prune.replace(sparsity=sparsity_at(self.strength))
        stages = (("01-new-head", head), ("02-prune", prune), ("03-kmeans", self.share), ("04-finetune", self.finetune))
        for name, stage in stages:
            model = context.run(stage, model, name)
        return model
