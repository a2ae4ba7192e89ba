r"""Label smoothing: part of the target is spread evenly over all classes.

Paper    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision. CVPR 2016.
         arXiv:1512.00567
Formula  q'(k) = (1 - amount) [k = y] + amount / K;   L = -sum_k q'(k) log p(k)
Departs  None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import UsageError
from espalier.core.fields import Fraction
from espalier.core.method import Method
from espalier.core.task import Task


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Method):
    """Cross-entropy against class indices, smoothed by ``amount``."""

    id: ClassVar[str] = "label-smoothing"
    kind: ClassVar[str] = "loss"
    amount: Fraction = 0.1

    @property
    def needs(self) -> frozenset[str]:
        """Labels to smooth."""
        return frozenset({"train", "labels"})

    def loss(self, task: Task) -> Callable[[Any, Any], Tensor]:
        """``(output, batch) -> scalar``. Raises ``UsageError`` where the task's loss is no cross-entropy on indices."""
        options: dict[str, Any] = {}
        if type(task.loss) is nn.CrossEntropyLoss:  # what is derived from it is another loss
            given = task.loss
            options = {"weight": given.weight, "ignore_index": given.ignore_index, "reduction": given.reduction}
            if given.label_smoothing:
                raise UsageError(
                    f"the task's loss smooths labels by {given.label_smoothing:g} already; "
                    "leave smoothing out of the step, or out of the task's loss."
                )
        elif task.loss not in (None, F.cross_entropy):
            raise UsageError(
                f"label smoothing needs cross-entropy; the task's loss is {_name(task.loss)}. Give the task "
                "loss=torch.nn.functional.cross_entropy (or none), or leave smoothing out of the step."
            )
        target = task.target(task.example())
        if not isinstance(target, Tensor) or target.is_floating_point():
            got = (
                f"{target.dtype} of shape {tuple(target.shape)}"
                if isinstance(target, Tensor)
                else type(target).__name__
            )
            raise UsageError(
                f"label smoothing needs class indices (an integer tensor) as labels; got {got}. "
                "Leave smoothing out of the step, or let Task.target return class indices."
            )

        def smoothed(output: Any, batch: Any) -> Tensor:
            return F.cross_entropy(output, task.target(batch), label_smoothing=self.amount, **options)

        return smoothed


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
