r"""SNIP: of an untrained network the connections stay that the loss is most sensitive to.

Paper    Lee, Ajanthan, Torr. SNIP: Single-shot Network Pruning based on Connection Sensitivity. ICLR 2019.
         arXiv:1810.02340
Formula  s = |g|, g = dL/dc at c = 1 of c * w = w dL/dw, summed over the batches;   the top (1 - sparsity) stay
Departs  The paper takes one batch; here ``batches``. s is not divided by its sum, which changes no ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.connections import Connections, lowest_removed
from espalier.train.looking import each_gradient, needs


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w dL/dw|, any shape."""
    return (weight * gradient).abs()


@dataclass(frozen=True, kw_only=True)
class Snip(Connections):
    """Connection sensitivity over ``batches`` training batches."""

    id: ClassVar[str] = "snip"
    batches: Batches = 1

    @property
    def needs(self) -> frozenset[str]:
        return needs("loss")

    def kept(self, model: nn.Module, selection: Selection, sparsity: float, context: Context) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}

        def add(name: str, gradient: Tensor, _: Tensor) -> None:
            total[name] = total[name] + gradient if name in total else gradient.clone()

        each_gradient(
            model, selection, context, against="loss", count=self.batches, fn=add, label="connection sensitivity",
            batch_statistics=True,
        )  # fmt: skip
        scores = {slot.name: sensitivity(slot.value(), total[slot.name]) for slot in selection}
        return lowest_removed(scores, sparsity)
