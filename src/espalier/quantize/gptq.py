r"""GPTQ: one column after the other is rounded, and the columns that are left make up for its error.

Paper    Frantar, Ashkboos, Hoefler, Alistarh. GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
         Transformers. ICLR 2023. arXiv:2210.17323
Formula  H = 2 X X^T + lambda I, lambda = damping * mean diag H;   U = chol(H^-1)^T;   for column i:
         q_i = quant(w_i),   e = (w_i - q_i) / U_ii,   w_{i+1:} <- w_{i+1:} - e U_{i,i+1:};   in lazy blocks
Departs  The same numbers come without an inverse: with H = R D R^T, R unit upper triangular, U_{i,j} / U_ii is an entry
         of R^-1, and the column to round is w_j + sum_{i<j} R_ij (w_i - q_i). Pruned weights stay zero; what they would
         have become is an error like any other. With act_order the scales of groups are taken from the original
         weights, as groups are of neighbouring inputs; else when the group is reached. Convolutions are solved as
         matrices of patches. An input that was never active keeps its rounded weights (the paper's code clears them).
         The grid is symmetric, as integer kernels want it; symmetric=false is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Batches, Fraction, Group
from espalier.core.parametrize import Slot
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.affine import Affine, range_of
from espalier.quantize.grid import grid_for, integer_range
from espalier.quantize.parts import LayerSolver
from espalier.train.layers import PIVOT, damped, hessians, owners

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers that are a matrix of inputs, or of patches, times a matrix of weights."""

Ranges = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, entries of one group), and which of them were not pruned -> scale and zero, each (rows,)."""


def unit_upper(hessian: Tensor) -> Tensor | None:
    """R of H = R D R^T, unit upper triangular: the Cholesky factor of H with its order reversed, by columns.

    None where a pivot is lost in rounding errors, so that H has no inverse.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    factor = factor.flip(0, 1)
    if failed or not bool((factor.diagonal().square() > PIVOT * hessian.diagonal()).all()):
        return None
    upper: Tensor = factor / factor.diagonal()
    return upper


def solve_columns(
    w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, codes: tuple[int, int], *, kept: Tensor | None = None,
    group: int | None = None, ranges: Ranges | None = None, block: int = 128,
) -> Tensor:  # fmt: skip
    """``w`` (rows, n) on its grid, column by column; ``upper``: see :func:`unit_upper`, in the order of the columns.

    ``scale``, ``zero``: (rows, 1), or (rows, groups) with ``group`` columns each, or (rows, n). With ``ranges`` they
    are set, in place, when a group is reached. ``kept``: False where the result is zero.
    """
    n = w.shape[1]
    low, high = codes
    w = w.T.contiguous()
    goal = w.clone()  # goal[j]: w_j with the errors of all blocks before
    solved, error = torch.empty_like(goal), torch.empty_like(goal)
    upper = upper.to(w.dtype)
    scales, zeros = scale.T.to(w.dtype).contiguous(), zero.T.to(w.dtype).contiguous()
    alive = None if kept is None else kept.T.contiguous()
    for start in range(0, n, block):
        end = min(n, start + block)
        for j in range(start, end):
            if group is not None and ranges is not None and j % group == 0:
                last = min(n, j + group)
                moved = goal[j:last] - w[j:last] + upper[start:j, j:last].T @ error[start:j]
                within = upper[j:last, j:last].T  # what the columns of the group would take over from each other
                moved = torch.linalg.solve_triangular(within, moved, upper=False, unitriangular=True)
                present = torch.ones_like(moved, dtype=torch.bool) if alive is None else alive[j:last]
                scale[:, j // group], zero[:, j // group] = ranges((w[j:last] + moved).T, present.T)
                scales[j // group], zeros[j // group] = (
                    scale[:, j // group].to(w.dtype),
                    zero[:, j // group].to(w.dtype),
                )
            place = j // group if group is not None else min(j, len(scales) - 1)
            now = torch.addmv(goal[j], error[start:j].T, upper[start:j, j]) if j > start else goal[j]
            step, middle = scales[place], zeros[place]
            value = now.div(step).round_().add_(middle).clamp_(low, high).sub_(middle).mul_(step)
            if alive is not None:
                value.mul_(alive[j])
            solved[j] = value
            torch.sub(w[j], value, out=error[j])
        if end < n:
            goal[end:].addmm_(upper[start:end, end:].T, error[start:end])
    return solved.T


def unsolved(slot: Slot, axis: int | None) -> str:
    """Why there is no matrix of inputs to solve a weight with; empty where there is."""
    layers = owners(slot)
    if axis == 0 and slot.owners[0][2] == "weight" and all(isinstance(layer, MATRICES) for layer in layers):
        return ""
    return f"only Linear, Conv1d and Conv2d are solved; this is a {type(layers[0]).__name__}"


@dataclass(frozen=True, kw_only=True)
class GPTQ(Affine, LayerSolver):
    """Solves on ``batches`` of train data. ``act_order``: inputs of the largest second moment first.

    ``block``: columns between two updates of all that follow; it changes the time, not the result.
    """

    id: ClassVar[str] = "gptq"
    batches: Batches = 16
    damping: Fraction = 0.01
    act_order: bool = False
    block: Group = 128

    def solve(self, model: nn.Module, slot: Slot, bits: int, axis: int | None, context: Context) -> Tensor:
        weight = slot.latent.detach()
        reason = unsolved(slot, axis)
        found = [] if reason else hessians(model, slot, context, self.batches)
        if not found:
            context.note(f"{slot.name} was rounded to nearest: {reason or 'the model does not call its layer'}.")
            return weight
        return self.solve_on(slot, weight, [natural(hessian, slot.shape) for hessian in found], bits)

    def solve_on(self, slot: Slot, weight: Tensor, hessians: list[Tensor], bits: int) -> Tensor:
        """``weight`` solved with the ``hessians`` of its groups of channels, in the order of its entries.

        Scales taken on the way go into the state of the form. Raises NumericError where a Hessian has no inverse.
        """
        form = slot.form
        assert isinstance(form, QuantizedWeight)  # noqa: S101 - the caller has put it there
        matrix = weight.flatten(1)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        kept = form.kept.flatten(1) if form.kept is not None else None
        scale, zero = (form.state[name].clone() for name in ("scale", "zero"))
        grouped = scale.ndim == 2
        scale, zero = (value if grouped else value.reshape(-1, 1).expand(len(matrix), 1) for value in (scale, zero))
        solved = torch.empty_like(matrix)
        size = len(matrix) // len(hessians)
        for number, hessian in enumerate(hessians):
            part = slice(number * size, (number + 1) * size)
            mask = kept[part] if kept is not None else None
            solved[part] = self._matrix(matrix[part], hessian, scale[part], zero[part], mask, bits, grouped, slot.name)
        if grouped:
            with torch.no_grad():
                form.state["scale"].copy_(scale)
                form.state["zero"].copy_(zero)
        return solved.reshape(weight.shape).to(weight.dtype)

    def _matrix(
        self, w: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, kept: Tensor | None, bits: int, grouped: bool,
        name: str,
    ) -> Tensor:  # fmt: skip
        metric = damped(hessian.to(w.device), self.damping)
        order = metric.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        upper = unit_upper(metric if order is None else metric[order][:, order])
        if upper is None:
            raise NumericError(
                f"some inputs of {name} are combinations of others in what was seen of the training data, so with "
                f"damping={self.damping:g} there is no best way to make up for an error. Give a larger damping, such "
                f"as 0.01, or more than batches={self.batches}."
            )
        codes = integer_range(bits, symmetric=self.symmetric, narrow=True)
        if order is None:
            return solve_columns(
                w, upper, scale, zero, codes, kept=kept, group=self.group if grouped else None,
                ranges=self._ranges(bits) if grouped else None, block=self.block,
            )  # fmt: skip
        if grouped:
            scale, zero = (value.repeat_interleave(self.group, 1)[:, order] for value in (scale, zero))
        mask = None if kept is None else kept[:, order]
        solved = solve_columns(w[:, order], upper, scale, zero, codes, kept=mask, block=self.block)
        return torch.empty_like(solved).index_copy_(1, order, solved)

    def _ranges(self, bits: int) -> Ranges:
        def scales(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
            low, high = range_of(self.observer, values.float(), present, bits, symmetric=self.symmetric)
            return grid_for(low, high, bits, symmetric=self.symmetric)

        return scales


def natural(hessian: Tensor, shape: torch.Size) -> Tensor:
    """A Hessian of patches (kernel, inputs) in the order in which a weight holds its entries: (inputs, kernel)."""
    kernel = int(torch.Size(shape[2:]).numel())
    if kernel == 1:
        return hessian
    order = torch.arange(len(hessian), device=hessian.device).reshape(kernel, -1).T.reshape(-1)
    return hessian[order][:, order]
