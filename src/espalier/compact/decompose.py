"""Weights of convolutions as products of smaller ones: what blocks start from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-8
"""Share of the mean diagonal that keeps normal equations solvable; everything here is computed in float64."""
STARTS, WIDE = 5, 128
"""Random starts of a stack of convolutions; from so many channels between them one, and few sweeps, must do."""


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """``X`` of ``gram X = right`` for a positive semi-definite ``gram``."""
    n = len(gram)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(n, dtype=gram.dtype, device=gram.device), right)
    return found


def slices(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` form of each input channel's slice ``(out, taps)`` (Eckart-Young).

    ``weight``: (out, in, taps). Returns kernels (in, rank, taps) and mixing weights (out, in, rank); missing ranks
    are zero.
    """
    u, s, v = torch.linalg.svd(weight.double().transpose(0, 1), full_matrices=False)
    rank_there = min(rank, s.shape[1])
    root = s[:, :rank_there].sqrt()
    kernels = weight.new_zeros(weight.shape[1], rank, weight.shape[2], dtype=torch.float64)
    mixing = weight.new_zeros(weight.shape[1], weight.shape[0], rank, dtype=torch.float64)
    kernels[:, :rank_there] = root[:, :, None] * v[:, :rank_there]
    mixing[:, :, :rank_there] = root[:, None, :] * u[:, :, :rank_there]
    return kernels.to(weight.dtype), mixing.transpose(0, 1).to(weight.dtype)


def canonical(weight: Tensor, rank: int, sweeps: int = 40, tolerance: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """CP-3 by alternating least squares: ``weight[o, i, k] ~ sum_r a[o, r] b[i, r] c[k, r]``.

    ``weight``: (out, in, taps). Starts from the largest terms of the rank-1 slices, whose sum is exact where there are
    enough of them, and ends when a sweep lowers the squared error by less than ``tolerance`` of it. The norms of a
    term's three vectors are equal at the end.
    """
    w = weight.double()
    outputs, inputs, taps = w.shape
    kernels, mixing = slices(w, min(-(-rank // inputs), outputs, taps))
    per = kernels.shape[1]
    terms = (kernels.norm(dim=2) * mixing.norm(dim=0)).flatten().argsort(descending=True, stable=True)[:rank]
    channel, place = terms // per, terms % per
    factors = [
        mixing[:, channel, place],
        torch.eye(inputs, dtype=w.dtype, device=w.device)[:, channel],
        kernels[channel, place].T,
    ]
    short = rank - len(terms)
    factors = [torch.cat([f, f.new_zeros(len(f), short)], 1) if short else f for f in factors]
    views = [w.flatten(1), w.transpose(0, 1).flatten(1), w.permute(2, 0, 1).flatten(1)]
    missed, energy = torch.inf, float(w.square().sum())
    for _ in range(sweeps):
        for mode in (2, 1, 0):
            one, two = (factors[m] for m in range(3) if m != mode)
            right = views[mode] @ (one[:, None] * two[None]).flatten(0, 1)
            factors[mode] = solve((one.T @ one) * (two.T @ two), right.T).T
            if mode:  # the last factor keeps the size
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-30)
        before, missed = missed, energy - float((factors[0] * right).sum())
        if before - missed < tolerance * before or missed <= RIDGE * energy:
            break
    size = factors[0].norm(dim=0).clamp_min(1e-30)
    root = size.pow(1 / 3)
    a, b, c = factors[0] / size * root, factors[1] * root, factors[2] * root
    return a.to(weight.dtype), b.to(weight.dtype), c.to(weight.dtype)


def channel_basis(weight: Tensor, rank: int, dim: int) -> Tensor:
    """An orthonormal basis (channels, rank) of the ``rank`` directions of dimension ``dim`` with the most energy."""
    flat = weight.double().movedim(dim, 0).flatten(1)
    vectors: Tensor = torch.linalg.eigh(flat @ flat.T).eigenvectors
    return vectors[:, -rank:].flip(1).to(weight.dtype)


def separable(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``weight[o, i, y, x] ~ sum_m columns[m, i, y] rows[o, m, x]``, best in the Frobenius norm (truncated SVD).

    ``weight``: (out, in, height, width). Ranks beyond the full one are zero.
    """
    outputs, inputs, height, width = weight.shape
    flat = weight.double().permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    there = min(rank, len(s))
    root = s[:there].sqrt()
    columns = weight.new_zeros(rank, inputs, height, dtype=torch.float64)
    rows = weight.new_zeros(rank, outputs, width, dtype=torch.float64)
    columns[:there] = (root * u[:, :there]).T.reshape(there, inputs, height)
    rows[:there] = (root[:, None] * v[:there]).reshape(there, outputs, width)
    return columns.to(weight.dtype), rows.transpose(0, 1).to(weight.dtype)


def composed(second: Tensor, first: Tensor) -> Tensor:
    """The kernel of two convolutions in a row: ``sum_m second[o, m] * first[m, i]``, (out, in, height, width)."""
    pads = [side for size in reversed(second.shape[2:]) for side in (size - 1, size - 1)]
    spread = torch.nn.functional.pad(first.transpose(0, 1), pads)  # (in, middle, ...)
    found: Tensor = torch.nn.functional.conv2d(spread, second.flip(2, 3))
    return found.transpose(0, 1)


def stacked(
    weight: Tensor, middle: int, small: Sequence[int], rng: torch.Generator, sweeps: int = 40
) -> tuple[Tensor, Tensor]:
    """``weight ~ second * first`` by alternating least squares; the second has a kernel of ``small`` taps.

    ``weight``: (out, in, height, width). Of a few random starts the best after a quarter of the ``sweeps`` is pursued.
    Returns first (middle, in, ...) and second (out, middle, *small).
    """
    w = weight.double()
    large = [k - s + 1 for k, s in zip(w.shape[2:], small, strict=True)]
    starts = STARTS if middle < WIDE else 1
    firsts = [
        torch.randn(middle, w.shape[1], *large, generator=rng, dtype=torch.float64).to(w.device) for _ in range(starts)
    ]
    tried = [_alternate(w, first, small, large, -(-sweeps // 4)) for first in firsts]
    first, _ = min(tried, key=lambda pair: float((composed(pair[1], pair[0]) - w).norm()))
    first, second = _alternate(w, first, small, large, sweeps if middle < WIDE else 0)
    balance = (second.norm() / first.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    return (first * balance).to(weight.dtype), (second / balance).to(weight.dtype)


def _alternate(
    w: Tensor, first: Tensor, small: Sequence[int], large: Sequence[int], sweeps: int
) -> tuple[Tensor, Tensor]:
    """``sweeps`` rounds from ``first``; returns first and the second that suits it."""
    for _ in range(sweeps):
        second = _other(w, first, small)
        first = _other(w.transpose(0, 1), second.transpose(0, 1), large).transpose(0, 1)
    return first, _other(w, first, small)


def _other(w: Tensor, known: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` (a, m, *size) of least squares in ``w[a, b] = sum_m x[a, m] * known[m, b]``, kernels convolved."""
    (middle, count), (height, width) = known.shape[:2], w.shape[2:]
    design = w.new_zeros(count, height, width, middle, *size)
    for y, x in itertools.product(range(size[0]), range(size[1])):
        design[:, y : y + known.shape[2], x : x + known.shape[3], :, y, x] = known.permute(1, 2, 3, 0)
    matrix = design.reshape(count * height * width, -1)
    found = solve(matrix.T @ matrix, matrix.T @ w.flatten(1).T)
    return found.T.reshape(len(w), middle, *size)
