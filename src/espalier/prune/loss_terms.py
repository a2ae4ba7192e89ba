r"""The terms of a composite loss: which of them pull the weights in a direction that the others give already.

Paper    none
Formula  L = sum_i c_i L_i,   g_i = c_i dL_i/dw stacked over batches;   cosine_ij = g_i g_j / (|g_i| |g_j|);
         contribution_i = |g_i| / sum_j |g_j|;   explained_i = cos(g_i, sum_j!=i x_j g_j) at the x >= 0 with the least
         |g_i - sum_j x_j g_j|;   dropped, in order of contribution, while explained by those that are left
Departs  A definition of this project. Whether the metric stays unchanged without a term is not tried. A task offers its
         terms by having a CompositeLoss as its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError, UsageError
from espalier.core.selection import Selection, weights
from espalier.train.looking import batches, derivative, finite, leaves, looking

Term = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class CompositeLoss:
    """``loss(output, target) = sum of factor * term(output, target)``; ``terms``: name -> (factor, term)."""

    terms: Mapping[str, tuple[float, Term]]

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("a composite loss needs at least one term; got none.")

    def __call__(self, output: Any, target: Any) -> Tensor:
        parts = [factor * term(output, target) for factor, term in self.terms.values()]
        return torch.stack(parts).sum()

    def without(self, names: tuple[str, ...]) -> CompositeLoss:
        """The loss redefined on the other terms."""
        return CompositeLoss({name: pair for name, pair in self.terms.items() if name not in names})


@dataclass(frozen=True)
class LossTerms:
    """What was found: ``cosine`` (terms, terms); ``contribution``, ``explained``: one number per term; what to drop."""

    names: tuple[str, ...]
    cosine: Tensor
    contribution: dict[str, float]
    explained: dict[str, float]
    redundant: tuple[str, ...]

    def details(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {
            "names": list(self.names), "cosine": self.cosine.tolist(), "contribution": self.contribution,
            "explained": self.explained, "dropped": list(self.redundant),
        }  # fmt: skip


def nonnegative(gram: Tensor, right: Tensor, sweeps: int = 1000) -> Tensor:
    """``argmin over x >= 0 of x^T gram x / 2 - right x`` by coordinate descent; ``gram`` (n, n), ``right`` (n,)."""
    x = torch.zeros_like(right)
    for _ in range(sweeps):
        before = x.clone()
        for i in range(len(x)):
            if gram[i, i] > 0:
                x[i] = (x[i] - (gram[i] @ x - right[i]) / gram[i, i]).clamp_min(0)
        if bool((x - before).abs().max() <= 1e-12 * x.abs().max().clamp_min(1e-30)):
            break
    return x


def explained(gram: Tensor, term: int, others: list[int]) -> float:
    """Cosine between a term's gradient and the nearest non-negative combination of the others'; 1 for a term of 0.

    ``gram`` (terms, terms): the products of the gradients.
    """
    if not gram[term, term] > 0:
        return 1.0
    if not others:
        return 0.0
    index = torch.tensor(others)
    scale = gram[index, index].clamp_min(1e-300).sqrt()
    inner = gram[index][:, index] / scale[:, None] / scale
    right = gram[index, term] / scale / gram[term, term].sqrt()
    x = nonnegative(inner, right)
    length = float(x @ inner @ x) ** 0.5
    return float(right @ x) / length if length > 0 else 0.0


def judge(names: tuple[str, ...], gram: Tensor, threshold: float) -> LossTerms:
    """The verdict from the products of the gradients, ``gram`` (terms, terms) in float64; one term stays at least."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    cosine = gram / norms.clamp_min(1e-300)[:, None] / norms.clamp_min(1e-300)
    share = norms / norms.sum().clamp_min(1e-300)
    everything = list(range(len(names)))
    left, dropped = list(everything), []
    for term in norms.argsort(stable=True).tolist():
        others = [other for other in left if other != term]
        if others and explained(gram, term, others) > threshold:
            left = others
            dropped.append(names[term])
    return LossTerms(
        names, cosine,
        dict(zip(names, share.tolist(), strict=True)),
        {name: explained(gram, i, [j for j in everything if j != i]) for i, name in enumerate(names)},
        tuple(dropped),
    )  # fmt: skip


def redundant_terms(
    model: nn.Module,
    loss: CompositeLoss,
    context: Context,
    *,
    selection: Selection | None = None,
    count: int = 8,
    threshold: float = 0.99,
) -> LossTerms:
    """Which terms of ``loss`` the others explain to a cosine above ``threshold``, over ``count`` training batches.

    ``selection``: the weights whose gradients count (default: all with two dimensions or more). The model is left as
    it was. Raises DataError without batches, ModelError where a term is no scalar, NumericError for NaN or infinity.
    """
    names = tuple(loss.terms)
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    chosen = selection if selection is not None else weights(model)
    if not chosen.count:
        raise DataError("no weight was chosen, so the terms of the loss have no gradients to compare.")
    with looking(model, context, batch_statistics=True), leaves(chosen) as leaf:
        for batch in batches(model, context, count, "loss terms"):
            output, target = context.data.predict(model, batch), context.data.target(batch)
            rows = []
            for name, (factor, term) in loss.terms.items():
                value = factor * term(output, target)
                if value.ndim:
                    raise ModelError(f"the loss term {name!r} must give a scalar; got shape {tuple(value.shape)}.")
                grads = derivative(value, list(leaf.values()), retain_graph=True)
                rows.append(finite(f"loss term {name}", torch.cat([grad.reshape(-1) for grad in grads]).double()))
            stacked = torch.stack(rows)
            gram += (stacked @ stacked.T).cpu()
    return judge(names, gram, threshold)
