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

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Fraction, Group, Rounds
from espalier.core.parametrize import Slot
from espalier.core.ranking import smallest
from espalier.core.selection import Selection
from espalier.prune.gradients import batches, looking
from espalier.prune.parts import Scores, SolvingCriterion

CHUNK = 2**24  # numbers held for inverse Hessians of single rows at a time
DEAD = 1e-8  # share of the mean diagonal that stands for an input that was never active
PIVOT = 1e-12  # an input of which less than this share is not a combination of others leaves no digit to solve with
Groups = tuple[int, int] | None

# --- kernels: w (rows, n), hessian (n, n), kept (rows, n); groups (n,): number of each column's group, -1 for none ---


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` with ``damping`` times its mean diagonal added; the identity where no input was ever active.

    An input that was never active gets ``DEAD`` times the mean at least: its weights cost next to nothing.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not mean:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    share = torch.where(diagonal > 0, damping, max(damping, DEAD))
    return hessian + torch.diag(share.to(hessian.dtype) * mean)


def solvable(hessian: Tensor) -> bool:
    """Whether ``hessian`` has an inverse that holds more than rounding errors."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    return not failed and bool((factor.diagonal().square() > PIVOT * hessian.diagonal()).all())


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


# --- a layer as a matrix: columns run over kernel positions, inside them over inputs ----------------------------------


def as_matrix(weight: Tensor) -> Tensor:
    """``(out, in, *kernel)`` -> ``(out, kernel * in)``."""
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`as_matrix`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def columns(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of ``module`` as (samples, columns), once for each group of a convolution."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))  # noqa: S101 - see refuses()
    flat = isinstance(module, nn.Conv1d)
    spatial = module.weight.ndim - 2
    x = x if x.ndim == spatial + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes: list[Any] = [
        (1, *value) if flat else value for value in (module.kernel_size, module.dilation, module.stride)
    ]
    patches = F.unfold(x[:, :, None] if flat else x, sizes[0], dilation=sizes[1], stride=sizes[2])
    parts = patches.reshape(len(x), module.groups, x.shape[1] // module.groups, -1, patches.shape[-1])
    for group in range(module.groups):  # (samples, inputs, kernel, places) -> (samples * places, kernel * inputs)
        yield parts[:, group].permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


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
        """The weights as the model first comes to them on one batch, so that what feeds a layer is solved before it.

        Weights that it does not come to are last.
        """
        calls: dict[str, int] = {}

        def note(name: str, *_: Any) -> None:
            calls.setdefault(name, len(calls))

        with ExitStack() as stack:
            for slot in selection:
                for module in _layers(slot):
                    stack.callback(module.register_forward_pre_hook(partial(note, slot.name)).remove)
            stack.enter_context(looking(model, context, grad=False))
            for batch in batches(model, context, 1, "order of the layers"):
                context.data.predict(model, batch)
        return tuple(sorted(selection, key=lambda slot: calls.get(slot.name, len(calls))))

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
        found: list[Tensor] = []
        samples = 0

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal samples
            for group, x in enumerate(columns(module, args[0] if args else kwargs["input"])):
                if group == len(found):
                    found.append(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device))
                found[group] += 2 * (x.T.double() @ x.double())
            samples += len(x)

        with ExitStack() as stack:
            for module in _layers(slot):
                stack.callback(module.register_forward_pre_hook(gather, with_kwargs=True).remove)
            stack.enter_context(looking(model, context, grad=False))
            for batch in batches(model, context, self.batches, f"inputs of {slot.name}"):
                context.data.predict(model, batch)
        for hessian in found:
            hessian /= max(1, samples)
            if not bool(hessian.isfinite().all()):
                raise NumericError(f"the inputs of {slot.name} hold NaN or infinity; {self.name} cannot solve for it.")
        return found

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


def _layers(slot: Slot) -> list[nn.Module]:
    return list({id(module): module for _, module, _ in slot.owners}.values())


def _groups(shape: torch.Size, groups: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
    """The number of each column's group of m inputs (-1 beyond the last whole one), and how many stay in each."""
    stay, m = groups
    inside = torch.arange(shape[1], device=device) // m
    inside = inside.masked_fill(inside >= shape[1] // m, -1)
    per = shape[1] // m
    return torch.cat([inside.where(inside < 0, inside + per * k) for k in range(shape[2:].numel())]), stay
