r"""GraSP: of an untrained network the connections go whose removal costs the gradient flow least.

Paper    Wang, Zhang, Grosse. Picking Winning Tickets Before Training by Preserving Gradient Flow. ICLR 2020.
         arXiv:2002.07376
Formula  S = -w (H g), g = dL/dw, H the Hessian:   the change of g^T g / 2 when w is removed;   the largest S go
Departs  No temperature on the logits, as the loss is the user's. g and H are means over ``batches`` batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.connections import Connections, lowest_removed
from espalier.train.looking import (
    batches,
    connected,
    derivative,
    each_gradient,
    finite,
    leaves,
    looking,
    needs,
    scalar,
)


def flow(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """``-w (H g)``, any shape: positive where removing the weight raises the gradient flow."""
    return -weight * hessian_gradient


@dataclass(frozen=True, kw_only=True)
class Grasp(Connections):
    """Gradient signal preservation over ``batches`` training batches."""

    id: ClassVar[str] = "grasp"
    batches: Batches = 1

    @property
    def needs(self) -> frozenset[str]:
        return needs("loss")

    def kept(self, model: nn.Module, selection: Selection, sparsity: float, context: Context) -> dict[str, Tensor]:
        if not selection.count:
            return {}
        products = self.products(model, selection, context)
        scores = {slot.name: -flow(slot.value(), products[slot.name]) for slot in selection}  # low goes first
        return lowest_removed(scores, sparsity)

    def products(self, model: nn.Module, selection: Selection, context: Context) -> dict[str, Tensor]:
        """H g of every selected weight, both from means over the batches."""
        gradient: dict[str, Tensor] = {}

        def add(name: str, grad: Tensor, _: Tensor) -> None:
            gradient[name] = gradient[name] + grad if name in gradient else grad.clone()

        total: dict[str, Tensor] = {}
        count = each_gradient(
            model, selection, context, against="loss", count=self.batches, fn=add, label="gradients",
            batch_statistics=True,
        )  # fmt: skip
        with looking(model, context, batch_statistics=True), leaves(selection) as weights:
            for batch in batches(model, context, self.batches, "Hessian products"):
                value = scalar(context.data.predict(model, batch), batch, context, "loss")
                connected(value)
                grads = derivative(value, list(weights.values()), create_graph=True)
                against = [(grad * gradient[name] / count).sum() for name, grad in zip(weights, grads, strict=True)]
                found = derivative(torch.stack(against).sum(), list(weights.values()))
                for name, product in zip(weights, found, strict=True):
                    total[name] = total.get(name, 0) + finite(name, product) / count
        return total
