r"""Tied weights: neurons, filters, kernels or whole layers that are constrained to be equal.

Paper    Nowlan, Hinton. Simplifying Neural Networks by Soft Weight-Sharing. Neural Computation 1992 (equal weights);
         whole layers: Lan et al. ALBERT. ICLR 2020. arXiv:1909.11942; cropped kernels: Cai et al. Once-for-All.
         ICLR 2020. arXiv:1908.09791 (section 3.3)
Formula  neurons: W[o] = R[z(o)], R and z by k-means over rows;   kernels: W[o, i] = s[o, i] K[o], the singular vectors
         of W[o];   layers: W_a = W_b, their mean;   crops: W_a = the middle of W_b, each entry the mean of those layers
         that have it
Departs  Constraints are hard and are put on a trained network by least squares; ALBERT trains with them from the start,
         Nowlan and Hinton by a penalty. A cropped kernel is used as it is (Once-for-All adds a learned transformation).
         Biases stay their layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.core.context import Context
from espalier.core.crop import CROPPED, KERNEL, Crop, margins, middle
from espalier.core.edits import Tie
from espalier.core.parametrize import Slot, require_phase
from espalier.core.plan import Plan
from espalier.core.selection import select
from espalier.core.structures import TiedKernels, TiedRows
from espalier.share.sharing import Sharing, finite

SWEEPS = 100  # of k-means at most


@dataclass(frozen=True, kw_only=True)
class Tied(Sharing):
    """``what`` is tied, among the weights of ``layers``.

    ``neurons``: rows of a matrix, filters of a convolution, words of an embedding; so few different ones stay as
    ``keep`` says. In an output layer that makes classes equal: leave it out. ``kernels``: one kernel for each filter,
    scaled for each input channel; ``keep`` does not matter here nor below. ``layers``: layers of one type and shape
    have one weight. ``crops``: convolutions of the same channels have the middle of the largest kernel among them.
    """

    id: ClassVar[str] = "tied"
    what: Literal["neurons", "kernels", "layers", "crops"] = "neurons"

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Tie, fine-tune."""
        if self.what in ("neurons", "kernels"):
            return super().transform(model, context)
        chosen = list(select(model, self.layers, who=self.name))
        for slot in chosen:
            require_phase(slot, ("dense",), self.name, densify=self.densify)
        ways = tying(chosen, context) if self.what == "layers" else cropping(chosen, context)
        for first, others in ways:
            tie(model, first, others, self.name, context)
        self.train(model, context)
        return model

    def structure(self, slot: Slot, context: Context) -> TiedRows | TiedKernels | str:
        """Rows by cluster, or a kernel for each filter."""
        shape = tuple(slot.shape)
        if self.what == "kernels":
            return TiedKernels(shape=shape) if len(shape) > KERNEL else "it has no kernel"
        rows = finite(slot, self.name).flatten(1)
        found = cluster(rows, max(1, math.floor(self.keep * len(rows))), context.generator(slot.name))
        return TiedRows(shape=shape, index=found)

    def project(self, structure: TiedRows | TiedKernels, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """Means of the rows of each cluster; leading singular vectors of each filter."""
        if isinstance(structure, TiedRows):
            return {"rows": row_means(weight.flatten(1), torch.tensor(structure.index))}
        left, values, right = torch.linalg.svd(weight.flatten(2), full_matrices=False)
        root = values[:, :1].sqrt()
        return {"scales": left[:, :, 0] * root, "kernels": right[:, 0] * root}


def row_means(rows: Tensor, index: Tensor) -> Tensor:
    """Mean of the ``rows`` (n, d) of each cluster (clusters, d)."""
    counts = torch.bincount(index)
    total = torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype).index_add_(0, index, rows)
    return total / counts[:, None]


def cluster(rows: Tensor, k: int, generator: torch.Generator) -> tuple[int, ...]:
    """Cluster of each of ``rows`` (n, d), at most ``k`` of them: k-means from seeds drawn by squared distance."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < k and bool(nearest.any()):
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    means, before = rows[chosen], None
    for _ in range(SWEEPS):
        index = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        index = torch.from_numpy(np.unique(index.numpy(), return_inverse=True)[1])
        if before is not None and torch.equal(index, before):
            break
        means, before = row_means(rows, index), index
    return tuple(index.tolist())


Ways = Iterable[tuple[Slot, list[Slot]]]
"""A weight and those that become it, or its middle."""


def tying(chosen: list[Slot], context: Context) -> Ways:
    """Weights of one type of layer, of one shape."""
    groups: dict[Any, list[Slot]] = {}
    for slot in chosen:
        if any(isinstance(module, nn.RNNBase) for _, module, _ in slot.owners):
            context.skip(slot.name, "recurrent layers hold on to a list of their own weights")
            continue
        kind = type(slot.module).__name__, slot.owners[0][2]
        settled = tuple(slot.shape), slot.latent.dtype, slot.latent.device, slot.latent.requires_grad
        groups.setdefault((kind, settled), []).append(slot)
    for first, *others in groups.values():
        if others:
            yield first, others
        else:
            context.skip(first.name, "no other layer of its type has a weight of its shape")


def cropping(chosen: list[Slot], context: Context) -> Ways:
    """Convolutions of the same channels; the largest kernel is the first."""
    groups: dict[Any, list[Slot]] = {}
    for slot in chosen:
        if reason := uncropped(slot):
            context.skip(slot.name, reason)
            continue
        settled = tuple(slot.shape[:KERNEL]), slot.latent.dtype, slot.latent.device, slot.latent.requires_grad
        groups.setdefault((type(slot.module), settled), []).append(slot)
    for members in groups.values():
        first = max(members, key=lambda slot: slot.latent.numel())
        others = []
        for slot in members:
            if slot is not first and slot.shape != first.shape and margins(first.shape[KERNEL:], slot.shape[KERNEL:]):
                others.append(slot)
            elif slot is not first:
                context.skip(slot.name, f"its kernel is not the middle of that of {first.name}, and smaller")
        if others:
            yield first, others
        else:
            context.skip(first.name, "no other layer of its channels has a smaller kernel that could be its middle")


def uncropped(slot: Slot) -> str | None:
    """Why the layer cannot be given another one's kernel; None where it can."""
    module = slot.module
    if len({id(owner) for _, owner, _ in slot.owners}) > 1:
        return "its weight belongs to several layers"
    if not isinstance(module, _ConvNd) or type(module) not in CROPPED:
        return "only Conv1d, Conv2d and Conv3d have kernels that can be cropped"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or list(module.children()) or not slot.path:
        return "it is the whole model, or has hooks or modules of its own that would be lost"
    return None


def tie(model: nn.Module, first: Slot, others: list[Slot], who: str, context: Context) -> None:
    """Give ``first`` the mean of all where they meet, and make the others it, or its middle."""
    before = {slot.name: finite(slot, who) for slot in (first, *others)}
    total, count = torch.zeros_like(before[first.name]), torch.zeros_like(before[first.name])
    for weight in before.values():
        middle_of(total, weight).add_(weight)
        middle_of(count, weight).add_(1)
    with torch.no_grad():
        first.latent.copy_(total / count)
    same = first.shape
    edits = [
        Tie(tensor=slot.name, to=first.name) if slot.shape == same else Crop(path=slot.path, to=first.name)
        for slot in others
    ]
    Plan(tuple(edits)).apply(model)
    now = first.value().cpu().double()
    for name, weight in before.items():
        error = float((middle_of(now, weight) - weight).norm() / weight.norm().clamp_min(1e-300))
        context.record.details.setdefault("layers", {})[name] = {
            "structure": "tied-layers" if weight.shape == same else "cropped-kernel",
            "numbers": weight.numel() if name == first.name else 0, "weights": weight.numel(), "relative_error": error,
        }  # fmt: skip


def middle_of(large: Tensor, small: Tensor) -> Tensor:
    """The middle of ``large`` that has the shape of ``small``; all of it where that is its own."""
    return large if large.shape == small.shape else middle(large, tuple(small.shape[KERNEL:]))
