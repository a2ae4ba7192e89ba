r"""Mixup: images and labels are blended in pairs.

Paper    Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. ICLR 2018. arXiv:1710.09412
Formula  x' = s x_i + (1 - s) x_j;   L = s L(f(x'), y_i) + (1 - s) L(f(x'), y_j);   s from Beta(alpha, alpha)
Departs  None. As in the paper's experiments, the batch has one share and the partners come from it; for cross-entropy
         the two losses are the loss on the blended label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import UsageError
from espalier.core.fields import Positive
from espalier.core.task import Task
from espalier.train.augmentation import Mixing


@dataclass(frozen=True, kw_only=True)
class Mixup(Mixing):
    """``alpha``: small values blend little (the share is near 0 or 1), 1 makes every share as likely as another.

    Callbacks see the blended images with the labels of the first ones; other inputs stay those of the first ones.
    """

    id: ClassVar[str] = "mixup"
    alpha: Positive = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Labels to blend."""
        return frozenset({"train", "labels"})

    def check(self, task: Task) -> None:
        """Class labels only: indices, or probabilities that the task's cross-entropy reads."""
        target = task.target(task.example())
        if isinstance(target, Tensor) and not target.is_floating_point():
            return
        if isinstance(target, Tensor) and (task.loss is F.cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss)):
            return
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        loss = getattr(task.loss, "__name__", type(task.loss).__name__)
        raise UsageError(
            f"mixup blends class labels (integer indices, or probabilities with cross-entropy); got {got} with the "
            f"loss {loss}, which looks like regression. Leave mixup out of augment."
        )

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A permutation of the batch, and one share for all of it."""
        alpha = torch.tensor(self.alpha, device=images.device)
        share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        return torch.randperm(len(images), device=images.device), share
