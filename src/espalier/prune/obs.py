r"""Optimal Brain Surgeon, layer by layer: what stays makes up for what goes.

Paper    Hassibi, Stork. Second Order Derivatives for Network Pruning: Optimal Brain Surgeon. NIPS 1992; Dong, Chen,
         Pan. Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon. NeurIPS 2017.
         arXiv:1705.07565; Frantar, Alistarh. Optimal Brain Compression. NeurIPS 2022. arXiv:2208.11580 (exact);
         Frantar, Alistarh. SparseGPT. ICML 2023. arXiv:2301.00774 (sparsegpt)
Formula  H = 2 X X^T;   the q of least w_q^2 / (2 [H^-1]_qq) goes;   w <- w - w_q / [H^-1]_qq H^-1_{:,q}, and so on
         with what is left;   sparsegpt: columns from left to right, the error of each goes to the columns after it
Departs  Each layer sees the inputs that the layers pruned before it produce, of the same batches. The exact form
         removes along each row to its end and picks the cheapest beginnings over all rows (as Optimal Brain Compression
         does); the weights that stay are then solved for at once, which equals the steps. Damping is added to the
         diagonal in both forms; an input that was never active has 1e-8 of the mean diagonal at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Fraction, Group, Rounds
from espalier.core.parametrize import Slot
from espalier.core.ranking import smallest
from espalier.core.selection import Selection
from espalier.prune.parts import Scores, SolvingCriterion
from espalier.train.layers import as_matrix, damped, from_matrix, hessians, in_order, solvable

CHUNK = 2**24  # numbers held for inverse Hessians of single rows at a time
Groups = tuple[int, int] | None

# --- kernels: w (rows, n), hessian (n, n), kept (rows, n); groups (n,): number of each column's group, -1 for none ---


def eliminate(w: Tensor, hessian: Tensor, kept: Tensor, groups: Tensor | None, stay: int) -> tuple[Tensor, Tensor]:
    """Remove one weight after the other from every row: ``(order, saliency)``, both (rows, steps).

    What is not ``kept`` goes first, at saliency -1. With ``groups`` a row ends, at saliency inf, when ``stay`` are
    left in each of its groups, else when nothing is left.
    """
    rows, n = w.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).expand(rows, n, n).clone()
    w, active, every = w.clone(), torch.ones_like(kept), torch.arange(rows, device=w.device)
    order, saliency = [], []
    for _ in range(n):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost = (w.square() / (2 * diagonal.clamp_min(1e-30))).masked_fill(~kept, -1)
        if groups is not None:
            left = torch.zeros(rows, int(groups.max()) + 2, dtype=torch.long, device=w.device)
            left.scatter_add_(1, (groups + 1).expand(rows, n), active.long())
            full = (left.gather(1, (groups + 1).expand(rows, n)) <= stay) | (groups < 0)
            cost = cost.masked_fill(full & kept, torch.inf)
        cost = cost.masked_fill(~active, torch.inf)
        lowest, q = cost.min(dim=1)
        if not bool(lowest.isfinite().any()):
            break
        line = inverse[every, q]
        pivot = line[every, q].clamp_min(1e-30)
        line = line.masked_fill(lowest.isinf()[:, None], 0)  # rows that have ended stay as they are
        w -= (w[every, q] / pivot)[:, None] * line
        inverse -= (line / pivot[:, None])[:, :, None] * line[:, None, :]
        going = lowest.isfinite()
        w[every[going], q[going]] = 0
        active[every[going], q[going]] = False
        order.append(q)
        saliency.append(lowest)
    if not order:
        return torch.zeros(rows, 0, dtype=torch.long), w.new_zeros(rows, 0)
    return torch.stack(order, 1), torch.stack(saliency, 1)


def refit(w: Tensor, hessian: Tensor, stays: Tensor) -> Tensor:
    """The weights on ``stays`` that change ``X w`` least: w_S = H_SS^-1 (H w)_S, row by row."""
    out, target = torch.zeros_like(w), w @ hessian
    for row in range(len(w)):
        index = stays[row].nonzero().reshape(-1)
        if len(index) == w.shape[1]:
            out[row] = w[row]
        elif len(index):
            factor = torch.linalg.cholesky(hessian[index][:, index])
            out[row, index] = torch.cholesky_solve(target[row, index, None], factor)[:, 0]
    return out


def exact(
    w: Tensor, hessian: Tensor, kept: Tensor, sparsity: float, groups: Tensor | None, stay: int
) -> tuple[Tensor, Tensor]:
    """``(weights, stays)`` at ``sparsity`` of the whole matrix, or ``stay`` in every group."""
    size = max(1, CHUNK // max(1, hessian.numel()))
    traces = [
        eliminate(w[i : i + size], hessian, kept[i : i + size], groups, stay) for i in range(0, len(w), size)
    ]  # fmt: skip
    steps = max(order.shape[1] for order, _ in traces)
    order = torch.cat([F.pad(order, (0, steps - order.shape[1])) for order, _ in traces]).to(w.device)
    saliency = torch.cat([F.pad(cost, (0, steps - cost.shape[1]), value=torch.inf) for _, cost in traces]).to(w.device)
    if groups is not None:
        going = saliency.isfinite()
    else:  # a step is at least as dear as those before it, so that each row loses a beginning of its order
        going = smallest(saliency.cummax(dim=1).values, int(sparsity * w.numel() + 1e-9))
    stays = kept.clone()
    for row in range(len(w)):
        stays[row, order[row][going[row]]] = False
    return refit(w, hessian, stays), stays


def sparsegpt(
    w: Tensor, hessian: Tensor, kept: Tensor, sparsity: float, groups: Tensor | None, stay: int, block: int
) -> tuple[Tensor, Tensor]:
    """``(weights, stays)``: one pass over the columns; what goes is chosen block by block, or group by group."""
    (rows, n), w, gone = w.shape, w.clone(), ~kept
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    diagonal, removed, start = upper.diagonal(), torch.zeros_like(kept), 0
    while start < n:
        end = min(n, start + block)
        while groups is not None and end < n and groups[end] >= 0 and groups[end] == groups[end - 1]:
            end += 1  # a group is never cut
        if groups is None:
            score = (w[:, start:end] / diagonal[start:end]).square().masked_fill(gone[:, start:end], -1)
            want = int(sparsity * rows * end + 1e-9) - int(removed[:, :start].sum())
            removed[:, start:end] = smallest(score, want) | gone[:, start:end]
        errors = torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            if groups is not None and groups[i] >= 0 and (i == 0 or groups[i] != groups[i - 1]):
                last = i + int((groups == groups[i]).sum())
                score = (w[:, i:last] / diagonal[i:last]).square().masked_fill(gone[:, i:last], -1)
                lowest = score.argsort(dim=1, stable=True)[:, : last - i - stay]
                removed[:, i:last] = torch.zeros_like(kept[:, i:last]).scatter_(1, lowest, value=True)
            removed[:, i] |= gone[:, i]
            error = w[:, i].masked_fill(~removed[:, i], 0) / diagonal[i]
            w[:, i:end] -= error[:, None] * upper[i, i:end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
        start = end
    return w.masked_fill(removed, 0), ~removed


@dataclass(frozen=True, kw_only=True)
class OBS(SolvingCriterion):
    """Chooses and solves on ``batches`` of train data; ``block``: columns between two lazy updates of ``sparsegpt``.

    ``exact`` costs rows * inputs^3; weights of more than ``largest`` inputs take ``sparsegpt``, and that is noted.
    """

    id: ClassVar[str] = "obs"
    form: Literal["exact", "sparsegpt"] = "exact"
    batches: Rounds = 16
    damping: Fraction = 0.01
    block: Group = 128
    largest: Group = 512

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def refuses(self, slot: Slot) -> str | None:
        if isinstance(slot.module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and slot.owners[0][2] == "weight":
            return None
        return f"criterion {self.id} solves Linear, Conv1d and Conv2d; this is a {type(slot.module).__name__}"

    def order(self, model: nn.Module, selection: Selection, context: Context) -> tuple[Slot, ...]:
        return in_order(model, selection, context)

    def metric(self, hessian: Tensor, name: str) -> Tensor:
        """The damped Hessian of the weight ``name``. Raises NumericError where it has no inverse."""
        found = damped(hessian, self.damping)
        if not solvable(found):
            raise NumericError(
                f"some inputs of {name} are combinations of others in what was seen of the training data, so with "
                f"damping={self.damping:g} there is no best way to make up for a weight that goes. Give a larger "
                f"damping, such as 0.01, or more than batches={self.batches}."
            )
        return found

    def hessians(self, model: nn.Module, slot: Slot, context: Context) -> list[Tensor]:
        """2 X X^T / samples over the layer's inputs, one for each group; none where the layer is never called."""
        return hessians(model, slot, context, self.batches)

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        """The saliency of each weight if it went alone, w^2 / (2 [H^-1]_qq)."""
        scores = {}
        for slot in selection.where(lambda slot: self.refuses(slot) is None):
            parts = as_matrix(slot.value().double()).chunk(len(found := self.hessians(model, slot, context)) or 1)
            costs = [
                part.square() / (2 * torch.linalg.inv(self.metric(hessian, slot.name)).diagonal())
                for part, hessian in zip(parts, found, strict=False)
            ]
            if costs:
                scores[slot.name] = from_matrix(torch.cat(costs), slot.shape).to(slot.latent.dtype)
        return scores

    def solve(
        self, model: nn.Module, slot: Slot, kept: Tensor, sparsity: float, groups: Groups, context: Context
    ) -> tuple[Tensor, Tensor]:
        hessians = self.hessians(model, slot, context)
        if not hessians:
            context.skip(
                slot.name, f"{type(slot.module).__name__} was not called by the model: it has no inputs to see"
            )
            return slot.value(), kept
        weight, shape = as_matrix(slot.value().double()), slot.shape
        form = self.form if weight.shape[1] <= self.largest else "sparsegpt"
        if form != self.form:
            context.note(f"{slot.name}: {weight.shape[1]} inputs are more than largest={self.largest}; took sparsegpt.")
        numbers, stay = _groups(shape, groups, weight.device) if groups is not None else (None, 0)
        solved = []
        for hessian, w, mask in zip(
            hessians, weight.chunk(len(hessians)), as_matrix(kept).chunk(len(hessians)), strict=True
        ):
            metric = self.metric(hessian.to(weight.device), slot.name)
            if form == "exact":
                solved.append(exact(w, metric, mask, sparsity, numbers, stay))
            else:
                solved.append(sparsegpt(w, metric, mask, sparsity, numbers, stay, self.block))
        new, stays = (torch.cat(parts) for parts in zip(*solved, strict=True))
        return from_matrix(new, shape).to(slot.latent.dtype), from_matrix(stays, shape)


def _groups(shape: torch.Size, groups: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
    """The number of each column's group of m inputs (-1 beyond the last whole one), and how many stay in each."""
    stay, m = groups
    inside = torch.arange(shape[1], device=device) // m
    inside = inside.masked_fill(inside >= shape[1] // m, -1)
    per = shape[1] // m
    return torch.cat([inside.where(inside < 0, inside + per * k) for k in range(shape[2:].numel())]), stay
