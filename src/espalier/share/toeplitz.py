r"""Toeplitz-like weights: matrices of low displacement rank.

Paper    Sindhwani, Sainath, Kumar. Structured Transforms for Small-Footprint Deep Learning. NeurIPS 2015.
         arXiv:1510.01722. Thomas, Gu, Dao, Rudra, Re. Learning Compressed Transforms with Low Displacement Rank.
         NeurIPS 2018. arXiv:1810.02309
Formula  W - Z_1 W Z_{-1}^T = sum_r g_r h_r^T;   W = 1/2 sum_r Z_1(g_r) Z_{-1}(h_r)^T, 2 n r numbers
         nearest: F W (F S)^T = C * sum_r outer(F g_r, F S h_r) entry by entry, with S = diag(e^{-pi i k / n}) and
         C = F S F^T / 2, so that g and h follow alternately from one small weighted system for each frequency
Departs  Starts from a trained layer; the papers train from scratch. The shifts are fixed (Thomas et al. also learn
         them). The displacement is stored divided by a power of two near sqrt(n r), or a step of an optimizer would
         move the weight too far. A matrix that is not square is a row or column of square blocks with vectors of their
         own; the last one, where it is cut off, is fitted in turn with what is missing of it. The product is computed
         densely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.core.fields import Count, Rank
from espalier.core.parametrize import Slot
from espalier.core.structures import Toeplitz as Rule
from espalier.share.sharing import Sharing

SETTLED = 1e-3
"""A sweep that lowers the squared error by less than this share is the last."""

RIDGE, TINY = 1e-13, 1e-100
"""Added to the diagonal of the small systems, as a share of it and as it is, so that all have a solution."""


@dataclass(frozen=True, kw_only=True)
class Toeplitz(Sharing):
    """A convolution is the matrix (out, in * kernel). A plain Toeplitz matrix has rank 2.

    ``rank``: in place of ``keep``. ``sweeps``: of alternating least squares, which start from the displacement cut
    to its rank.
    """

    id: ClassVar[str] = "toeplitz"
    rank: Rank | None = None
    sweeps: Count = 10

    def structure(self, slot: Slot, context: Context) -> Rule:
        """With ``rank``, or with the highest that keeps few enough numbers."""
        shape = tuple(slot.shape)
        smaller = min(shape[0], slot.latent.numel() // max(1, shape[0]))

        def made(rank: int) -> Rule:
            return Rule(shape=shape, rank=rank)

        if self.rank is not None:
            return made(min(self.rank, smaller))
        return self.largest(made, smaller, slot, context)

    def project(self, structure: Rule, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """g and h whose weight is near."""
        matrix = weight.reshape(structure.matrix).numpy()
        blocks = torch.from_numpy(structure.cut(matrix))
        real = torch.from_numpy(structure.cut(np.ones_like(matrix))).bool()
        whole = bool(real.all())
        g, h = displaced(blocks, structure.rank)
        target, best, n = spectrum(blocks), float("inf"), structure.side
        for sweep in range(self.sweeps):
            if not whole:  # what is cut off may be anything: it is what it has become
                target = spectrum(torch.where(real, blocks, structure.summed(g.mT @ h)))
            g = torch.fft.irfft(solve(target[:, : n // 2 + 1], twisted(h)), n)
            h = untwisted(mirrored(solve(target.mT[:, : (n + 1) // 2], torch.fft.fft(g)), n))
            gap = float(torch.where(real, structure.summed(g.mT @ h) - blocks, 0).square().sum())
            context.progress("sweeps", sweep + 1, self.sweeps, squared_error=gap)
            if gap >= (1 - SETTLED) * best:
                break
            best = gap
        return balanced(g, h, structure.scale)


def displaced(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """g, h (blocks, rank, n): the leading part of ``W - Z_1 W Z_{-1}^T``; ``blocks``: (blocks, n, n)."""
    moved = blocks.roll((1, 1), (-2, -1))
    moved[..., 0] *= -1
    left, values, right = torch.linalg.svd(blocks - moved)
    root = values[:, :rank, None].sqrt()
    return left.mT[:, :rank] * root, right[:, :rank] * root


def turns(angles: Tensor) -> Tensor:
    """``e^{-i angle}``."""
    return torch.polar(torch.ones_like(angles), -angles)


def twist(n: int) -> Tensor:
    """The diagonal of S."""
    return turns(torch.pi / n * torch.arange(n, dtype=torch.float64))


def twisted(h: Tensor) -> Tensor:
    """F S h, over the last dimension."""
    answer: Tensor = torch.fft.fft(twist(h.shape[-1]) * h)
    return answer


def untwisted(h_hat: Tensor) -> Tensor:
    """Inverse of :func:`twisted`."""
    answer: Tensor = (twist(h_hat.shape[-1]).conj() * torch.fft.ifft(h_hat)).real
    return answer


def mirrored(h_hat: Tensor, n: int) -> Tensor:
    """All n entries of ``F S h`` from the first half of them: those of a real h come in conjugate pairs."""
    return torch.cat([h_hat, h_hat[..., : n - h_hat.shape[-1]].flip(-1).conj()], -1)


def spectrum(blocks: Tensor) -> Tensor:
    """F W (F S)^T of each block: ``C * sum_r outer(F g_r, F S h_r)``, entry by entry, where W is Toeplitz-like."""
    return twisted(torch.fft.fft(blocks, dim=-2))


def kernel(n: int) -> Tensor:
    """C[k, l] = F S F^T / 2, which depends on (k + l) mod n: its first row."""
    return (1 - turns(2 * torch.pi / n * (torch.arange(n, dtype=torch.float64) + 0.5))).reciprocal()


def solve(target: Tensor, other: Tensor) -> Tensor:
    """v (blocks, rank, rows) with least ``|target - C * sum_r outer(v_r, other_r)|``, all complex.

    ``target``: (blocks, rows, n), the first rows. Each is a system of ``rank`` unknowns, weighted by |C[k, :]|^2. As C
    depends on k + l alone, the matrices of all these systems together are a correlation.
    """
    rows, n, rank = target.shape[-2], target.shape[-1], other.shape[1]
    c = kernel(n)
    pairs = torch.fft.ifft(other[:, :, None].conj() * other[:, None])  # (blocks, rank, rank, n)
    gram = torch.fft.ifft(n * torch.fft.fft(c.abs().square()) * pairs)[..., :rows].permute(0, 3, 1, 2)
    spread = c[(torch.arange(rows)[:, None] + torch.arange(n)) % n]
    right = (spread.conj() * target) @ other.mT.conj()  # (blocks, rows, rank)
    size = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    gram = gram + (RIDGE * size + TINY) * torch.eye(rank)
    answer: Tensor = torch.linalg.solve(gram, right[..., None])[..., 0].mT
    return answer


def balanced(g: Tensor, h: Tensor, scale: float) -> dict[str, Tensor]:
    """The same weight from vectors of equal length, whose product is scaled."""
    ratio = (h.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True).clamp_min(1e-150)).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1)
    return {"g": g * ratio / scale**0.5, "h": h / ratio / scale**0.5}
