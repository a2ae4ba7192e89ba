r"""Optimal Brain Damage: the weights whose removal raises the loss least, by its diagonal second derivatives.

Paper    LeCun, Denker, Solla. Optimal Brain Damage. NeurIPS 1989 (1990)
Formula  s_i = 1/2 |h_i| w_i^2
         hutchinson:   h = E_v [v * H v], v_i = +-1        (the exact diagonal in expectation)
         gauss-newton: h = E_v [v * J' H_L J v]            (H without the curvature of the network itself)
         fisher:       h = mean_x (dL(x) / dw)^2           (empirical Fisher: with the labels of the data)
Departs  The paper propagates the diagonal back layer by layer and drops the off-diagonal terms on the way; here the
         diagonal is estimated without that approximation. Negative estimates, which are noise or a sign that the loss
         is not at a minimum, count by their absolute value. Group scores are sums, as the paper's diagonal implies.
         With against=output the scalar is half the mean squared norm of the output, and needs no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches, Probes
from espalier.core.metric import first_tensor
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.train.looking import (
    batches,
    connected,
    derivative,
    each_gradient,
    finite,
    leaves,
    looking,
    needs,
    samples,
    scalar,
)


def damage(weight: Tensor, curvature: Tensor) -> Tensor:
    """1/2 |h| w^2, any shape."""
    return curvature.abs() * weight.square() / 2


def rademacher(weights: dict[str, Tensor], generator: torch.Generator) -> list[Tensor]:
    """One vector of +-1 per weight, drawn on the CPU."""
    return [
        (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight.device, weight.dtype)
        for weight in weights.values()
    ]


def hessian_product(value: Tensor, weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """H v: the derivative of (dL/dw) . v. ``value``: L with its graph."""
    grads = derivative(value, weights, create_graph=True)
    inner = torch.stack([(grad * vector).sum() for grad, vector in zip(grads, vectors, strict=True)]).sum()
    return derivative(inner, weights, retain_graph=True)


def gauss_newton_product(value: Tensor, output: Tensor, weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """J' H_L J v, where J = d output / dw and H_L is the Hessian of the loss in the output."""
    dummy = torch.zeros_like(output, requires_grad=True)
    pulled = derivative(output, weights, create_graph=True, grad_outputs=dummy)  # J'u, linear in u: d/du gives J v
    inner = torch.stack([(grad * vector).sum() for grad, vector in zip(pulled, vectors, strict=True)]).sum()
    (pushed,) = derivative(inner, [dummy], retain_graph=True)
    (slope,) = derivative(value, [output], create_graph=True)
    (curved,) = derivative((slope * pushed.detach()).sum(), [output], retain_graph=True)
    return derivative(output, weights, retain_graph=True, grad_outputs=curved)


@dataclass(frozen=True, kw_only=True)
class OptimalBrainDamage(Criterion):
    """Score = 1/2 w^2 h. ``curvature``: how the diagonal h is found; ``probes`` random vectors per batch.

    ``against``: what is differentiated twice: the task's loss, or the output itself (half its mean squared norm), which
    needs no labels. Fisher costs one backward pass per sample; the other two about three per probe.
    """

    id: ClassVar[str] = "obd"
    curvature: Literal["hutchinson", "gauss-newton", "fisher"] = "hutchinson"
    against: Literal["loss", "output"] = "loss"
    batches: Batches = 8
    probes: Probes = 4

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.against)

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        found = self.diagonal(model, selection, context)
        return {slot.name: damage(slot.value(), found[slot.name]) for slot in selection}

    def diagonal(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        """Weight name -> estimated diagonal second derivatives of the mean over the batches."""
        sums: Scores = {slot.name: torch.zeros_like(slot.value()) for slot in selection}
        if not sums:
            return sums
        if self.curvature == "fisher":

            def add(name: str, gradient: Tensor, _: Tensor) -> None:
                sums[name] += gradient.square()

            done = each_gradient(
                model, selection, context, against=self.against, count=self.batches, fn=add, label="Fisher",
                split=samples,
            )  # fmt: skip
            return {name: total / done for name, total in sums.items()}
        generator, done = context.generator("probes"), 0
        with looking(model, context), leaves(selection) as weights:
            for batch in batches(model, context, self.batches, "second derivatives"):
                output = context.data.predict(model, batch)
                value = scalar(output, batch, context, self.against)
                connected(value)
                for _ in range(self.probes):
                    vectors = rademacher(weights, generator)
                    products = self._product(value, output, list(weights.values()), vectors)
                    for name, vector, product in zip(weights, vectors, products, strict=True):
                        sums[name] += vector * finite(name, product.detach())
                    done += 1
        return {name: total / done for name, total in sums.items()}

    def _product(self, value: Tensor, output: Any, weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        if self.curvature == "hutchinson":
            return hessian_product(value, weights, vectors)
        return gauss_newton_product(value, first_tensor(output), weights, vectors)
