r"""LQ-Net: levels spanned by a basis that is learned to minimise the quantization error.

Paper    Zhang, Yang, Ye, Hua. LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks.
         ECCV 2018. arXiv:1807.10029
Formula  w^ = B v,   B (n, b) of -1 and 1 (of 0 and 1 for inputs without sign);   QEM: B* the nearest of the 2^b sums,
         v* = (B^T B)^-1 B^T w;   in training v <- 0.9 v + 0.1 v*, one QEM step for each optimizer step;
         dw^/dw = 1,   dx^/dx = 1 up to the largest level
Departs  v starts from QEM run on the trained weights or the calibration (the authors start from the deviation that the
         weights are initialised with). As in the authors' code 1e-4 I and 1e-4 v keep the system solvable; inputs have
         that too. Signed inputs take the codes of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.fields import Fraction, Steps
from espalier.core.forms import dtype_name, to_numpy
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, by_channel, tabled
from espalier.core.representation import Codebook, Representation
from espalier.quantize.grid import straight_through
from espalier.quantize.level_sets import look_up, midpoints

QUARTILE = 0.6745  # of the normal distribution
EPSILON = 1e-4


def binary_codes(bits: int, *, signed: bool) -> Tensor:
    """All 2^bits rows of ``bits`` entries, -1 and 1, or 0 and 1."""
    ones = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
    return (2 * ones - 1 if signed else ones).float()


def first_basis(rows: Tensor, counts: Tensor, bits: int, *, signed: bool) -> Tensor:
    """(rows, bits): levels equally spaced over the quartiles of a normal distribution of the rows' second moment."""
    spread = (rows.square().sum(1) / counts.sum(1).clamp_min(1)).sqrt()
    step = spread * QUARTILE / (2 ** (bits - 1)) if signed else spread * QUARTILE * 2 / (2**bits - 1)
    powers = torch.exp2(torch.arange(bits, device=rows.device))
    basis: Tensor = step[:, None] * powers
    return basis


def sorted_levels(basis: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """``(levels, codes)`` of ``basis`` (rows, bits): (rows, 2^bits) rising, and (rows, 2^bits, bits)."""
    codes = binary_codes(basis.shape[1], signed=signed).to(basis.device)
    levels, order = torch.sort((codes * basis[:, None]).sum(-1) + 0, dim=1)  # + 0: no -0.0
    return levels, codes[order]


def nearest_index(rows: Tensor, levels: Tensor) -> Tensor:
    """(rows, n): the index of the nearest level of each row's own; ties go to the lower one."""
    return torch.searchsorted(midpoints(levels), rows.contiguous())


def qem(rows: Tensor, present: Tensor, basis: Tensor, *, signed: bool) -> Tensor:
    """One step of quantization error minimisation: the basis (rows, bits) of least squares for the present codes.

    ``rows`` (rows, n) float32, zero where ``present`` (same shape, 0 or 1) is. B itself is never made: all that is
    needed of it are each level's number and sum of values.
    """
    levels, codes = sorted_levels(basis, signed=signed)
    index = nearest_index(rows, levels)
    count = torch.zeros_like(levels).scatter_add_(1, index, present)
    total = torch.zeros_like(levels).scatter_add_(1, index, rows)
    transposed = codes.transpose(1, 2).double()
    gram = (transposed * count[:, None].double()) @ codes.double()
    right = (transposed @ total[..., None].double())[..., 0] + EPSILON * basis.double()
    eye = EPSILON * torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    best: Tensor = torch.linalg.solve(gram + eye, right)
    return best.float()


def fitted(rows: Tensor, present: Tensor, bits: int, iterations: int, *, signed: bool) -> Tensor:
    """The basis (rows, bits) after ``iterations`` steps of QEM."""
    basis = first_basis(rows, present, bits, signed=signed)
    for _ in range(iterations):
        basis = qem(rows, present, basis, signed=signed)
    return basis


def rows_of(values: Tensor, kept: Tensor | None, axis: int | None) -> tuple[Tensor, Tensor]:
    """``values`` as (channels, n) float32, zero where pruned, and 1.0 where they are not."""
    rows = by_channel(values.detach().float(), axis)
    present = torch.ones_like(rows) if kept is None else by_channel(kept, axis).to(rows.dtype)
    return rows * present, present


@dataclass(frozen=True, kw_only=True)
class LQNet(WeightQuantizer):
    """A basis, one column of ``bits``, for each output channel.

    Up to the paper's 4 bits, for a file holds the 2^bits levels of every channel. ``momentum``: what stays of the basis
    in a step; ``iterations`` of QEM at the start.
    """

    id: ClassVar[str] = "lq-net"
    widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    per_channel: ClassVar[frozenset[str]] = frozenset({"basis"})
    momentum: Fraction = 0.9
    iterations: Steps = 20

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        rows, present = rows_of(weight, kept, axis)
        return {"basis": fitted(rows, present, bits, self.iterations, signed=True)[..., None]}

    def quantize(self, w: Weight) -> Tensor:
        index, levels = self.codes(w)
        found = levels.gather(1, index)
        latent = w.latent
        if w.axis is None:
            return straight_through(latent, found.reshape(latent.shape).to(latent.dtype))
        moved = latent.movedim(w.axis, 0)
        return straight_through(latent, found.reshape(moved.shape).movedim(0, w.axis).to(latent.dtype))

    def codes(self, w: Weight) -> tuple[Tensor, Tensor]:
        """Index (channels, n) and levels (channels, 2^bits) of the weight."""
        levels, _ = sorted_levels(w.state["basis"][..., 0], signed=True)
        return nearest_index(by_channel(w.latent.detach().float(), w.axis), levels), levels

    def before_step(self, w: Weight, loop: Loop) -> None:
        rows, present = rows_of(w.latent, w.kept, w.axis)
        basis = w.state["basis"][..., 0]
        basis.lerp_(qem(rows, present, basis, signed=True), 1 - self.momentum)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        if w.axis is None:
            return tabled(values)
        index, levels = self.codes(w)
        if w.kept is not None:
            levels = torch.cat([torch.zeros_like(levels[:, :1]), levels], 1)
            index = torch.where(by_channel(w.kept, w.axis), index + 1, 0)
        moved = values.movedim(w.axis, 0)
        index = index.reshape(moved.shape).movedim(0, w.axis)
        return Codebook(
            shape=tuple(values.shape), dtype=dtype_name(values.dtype),
            indices=to_numpy(index).astype(np.uint8 if levels.shape[1] <= 256 else np.uint16),
            centroids=to_numpy(levels), axis=w.axis,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LQNetInput(ActivationQuantizer):
    """One basis for the input of a layer, which follows the batches while training."""

    id: ClassVar[str] = "lq-net-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))
    momentum: Fraction = 0.9
    iterations: Steps = 20

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        rows = observed.sample.float().reshape(1, -1)
        basis = fitted(rows, torch.ones_like(rows), bits, self.iterations, signed=signed)
        levels = sorted_levels(basis, signed=signed)[0][0]
        return {"basis": basis[0], "levels": levels, "thresholds": midpoints(levels)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        levels, thresholds = a.state["levels"], a.state["thresholds"]
        found = look_up(x, levels, thresholds)
        if not a.training:
            return found
        last = levels[-1]
        passes = (x.detach() <= last) & (x.detach() >= -last) if a.signed else x.detach() <= last
        if x.numel():
            self.follow(x.detach(), a)
        return straight_through(x, found, passes)

    def follow(self, x: Tensor, a: Input) -> None:
        """One step of QEM on a batch; the levels of this batch are found already."""
        rows = x.float().reshape(1, -1)
        basis = a.state["basis"]
        basis.lerp_(qem(rows, torch.ones_like(rows), basis[None], signed=a.signed)[0], 1 - self.momentum)
        levels = sorted_levels(basis[None], signed=a.signed)[0][0]
        a.state["levels"].copy_(levels)
        a.state["thresholds"].copy_(midpoints(levels))
