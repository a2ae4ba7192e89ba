r"""CP decomposition: a convolution as a sum of separable ones.

Paper    Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky. Speeding-up Convolutional Neural Networks Using Fine-tuned
         CP-Decomposition. ICLR 2015. arXiv:1412.6553. Phan, Sobolev, Sozykin, Ermilov, Gusak, Tichavsky, Glukhov,
         Oseledets, Cichocki. Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network.
         ECCV 2020. arXiv:2008.05441 (why terms must stay small)
Formula  W[o, i, x, y] ~ sum_r A[o, r] B[i, r] V[x, r] H[y, r]: 1 x 1 by B, depthwise k_h x 1 by V and 1 x k_w by H,
         1 x 1 by A with the bias;   with modes=3 V H is one kernel C[x y, r]
         min ||W - sum_r T_r||^2 + penalty e^2 sum_r ||T_r||^2, e the share of ||W|| that is missed
Departs  Alternating least squares (the paper: nonlinear least squares), and three modes by default, which fits faster
         and at least as well with as many numbers. Terms that grow against each other, which fine-tuning cannot
         follow, are held by a penalty; Phan et al. lower their sensitivity at a given error. Each term is spread
         evenly over its factors. What a rank loses is read off fits at a few ranks, with straight lines between.
         Groups of a convolution are split one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.core.fields import Penalty, Rounds
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.spectra import singular_values
from espalier.factorize.split import Factors, Ranks, Split, Unfolding
from espalier.factorize.stages import Spec

PROBE_SWEEPS = 10
"""Sweeps of the fits that a rank is chosen by."""
RIDGE = 1e-9
"""Share of a Gram matrix's largest diagonal entry by which factors are held where they were, so that they are found."""
CLEAR, CLOSE = 1e-4, 1e-2
"""float32 does while the squared diagonal of a Gram matrix's Cholesky factor spans less and the error is larger."""
SETTLED = 1e-8
"""A sweep that lowers the error by less is the last."""


def cp(
    tensor: Tensor, rank: int, generator: torch.Generator, *, sweeps: int = 100, starts: int = 1, penalty: float = 0.0
) -> list[Tensor]:
    """Factors (n_k, rank), one for each dimension of ``tensor``; each term spread evenly over them.

    From several ``starts`` by chance, that which is best after a few sweeps goes on. ``penalty``: of the squared norms
    of the terms.
    """
    norm = float(tensor.double().norm())
    if not norm:
        return [tensor.new_zeros(n, rank) for n in tensor.shape]
    unit = tensor.detach() / norm
    tries = [[torch.randn(n, rank, generator=generator).to(unit) for n in unit.shape] for _ in range(starts)]
    if starts > 1:
        tries = [least_squares(unit, factors, min(sweeps, PROBE_SWEEPS), penalty) for factors in tries]
        tries.sort(key=lambda factors: float((composed(factors) - unit).norm()))
    factors = [factor.double() for factor in least_squares(unit, tries[0], sweeps, penalty)]
    lengths = torch.stack([factor.norm(dim=0) for factor in factors]).clamp(min=torch.finfo(torch.float32).tiny)
    size = norm ** (1 / len(factors)) * lengths.log().mean(0).exp()
    return [(factor / length * size).to(tensor.dtype) for factor, length in zip(factors, lengths, strict=True)]


def least_squares(tensor: Tensor, factors: list[Tensor], sweeps: int, penalty: float) -> list[Tensor]:
    """Alternating least squares from ``factors``, on a tensor of norm 1; every other sweep is tried to go further.

    Where float32 would not do, the rest is done, and returned, in float64.
    """
    factors, errors, square = [factor.to(tensor) for factor in factors], [1.0], float(tensor.double().square().sum())
    for sweep in range(sweeps):
        before = list(factors)
        for mode in range(tensor.ndim):
            gram = products(factors, mode)
            shrink = penalty * errors[-1] ** 2 * gram.diagonal()
            held = RIDGE * gram.diagonal().max().clamp(min=torch.finfo(torch.float32).tiny)
            root, _ = torch.linalg.cholesky_ex(gram + torch.diag(shrink + held))
            spread = root.diagonal().square()
            if tensor.dtype != torch.float64 and (spread.min() < CLEAR * spread.max() or errors[-1] < CLOSE):
                tensor, factors = tensor.double(), [factor.double() for factor in factors]
            found = along(tensor, factors, mode)
            solved = torch.cholesky_solve((found + held * factors[mode]).double().T, root).T
            factors[mode] = solved.to(tensor.dtype)
        if sweep > 5 and sweep % 2 == 0:
            further = [old + (new - old) * sweep**0.5 for old, new in zip(before, factors, strict=True)]
            error = missed(square, further, along(tensor, further, tensor.ndim - 1))
            if error < errors[-1]:
                factors = further
                continue
        errors.append(missed(square, factors, found))
        if abs(errors[-2] - errors[-1]) < SETTLED:
            break
    return factors


def products(factors: list[Tensor], mode: int | None = None) -> Tensor:
    """(rank, rank) float64: the inner products of the terms, without the factors of ``mode``."""
    wide = [factor.double() for number, factor in enumerate(factors) if number != mode]
    return torch.stack([factor.T @ factor for factor in wide]).prod(0)


def along(tensor: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """(n_mode, rank): the sums of ``tensor`` with each term's factors of all modes but ``mode``, the longest first."""
    others = [other for other in range(tensor.ndim) if other != mode]
    longest = max(others, key=lambda other: tensor.shape[other])
    found: Tensor = torch.tensordot(tensor, factors[longest], ([longest], [0]))
    for other in reversed(others):
        if other != longest:
            found = (found.movedim(other - (other > longest), -2) * factors[other]).sum(-2)
    return found


def missed(square: float, factors: list[Tensor], found: Tensor) -> float:
    """The error on a tensor of this ``square`` norm, ``found`` :func:`along` the last mode."""
    error = square + products(factors).sum() - 2 * (found.double() * factors[-1].double()).sum()
    return float(error.clamp(min=0).sqrt())


def composed(factors: list[Tensor]) -> Tensor:
    """The tensor that ``factors`` make."""
    made = factors[0]  # (n_1, ..., n_k, rank)
    for factor in factors[1:-1]:
        made = made[..., None, :] * factor
    return made @ factors[-1].T


class Separable(Split):
    """One rank for all modes."""

    def __init__(self, layer: Layer, method: CP, context: Context) -> None:
        super().__init__(layer, grow_macs=method.grow_macs)
        self.method, self.context = method, context

    @cached_property
    def tensor(self) -> Tensor:
        """(groups, outputs, inputs, places) or (groups, outputs, inputs, *kernel)."""
        return self.layer.tensor.flatten(3) if self.method.modes == 3 else self.layer.tensor

    @property
    def limits(self) -> Ranks:
        """The highest rank that makes the layer smaller, 1 at least."""
        one, two = (self.cost((rank,)).parameters for rank in (1, 2))
        return (max(1, (self.layer.dense.parameters - 1 - (2 * one - two)) // (two - one)),)

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        both = (self.tensor.flatten(2), self.tensor.transpose(1, 2).flatten(2))
        return tuple(Unfolding(singular_values(m), (m.shape[1], m.shape[2])) for m in both)

    @cached_property
    def errors(self) -> Tensor:
        """(limit + 1,): the share of the squared norm lost at each rank from 0."""
        limit = self.limits[0]
        probes = sorted({limit, *(2**k for k in range(limit.bit_length()))})
        points = [(0, 1.0)]
        for rank in probes:
            made = self.approximate(self.fit(rank, PROBE_SWEEPS, 1))
            lost = float((made - self.tensor).square().sum() / self.tensor.square().sum().clamp(min=1e-30))
            points.append((rank, min(lost, points[-1][1])))
        errors = torch.zeros(limit + 1, dtype=torch.float64)
        for (r0, e0), (r1, e1) in pairwise(points):
            errors[r0 : r1 + 1] = torch.linspace(e0, e1, r1 - r0 + 1, dtype=torch.float64)
        return errors

    @property
    def losses(self) -> tuple[Tensor, ...]:
        return (self.errors[:-1] - self.errors[1:],)

    @property
    def floor(self) -> float:
        return float(self.errors[-1])

    def fit(self, rank: int, sweeps: int, starts: int) -> list[list[Tensor]]:
        """The factors of each group."""
        generator, penalty = self.context.generator(f"{self.name}/{rank}"), self.method.penalty
        return [cp(part, rank, generator, sweeps=sweeps, starts=starts, penalty=penalty) for part in self.tensor]

    def approximate(self, fits: list[list[Tensor]]) -> Tensor:
        """What the factors make, shape of :attr:`tensor`."""
        return torch.stack([composed(factors) for factors in fits])

    def specs(self, ranks: Ranks) -> list[Spec]:
        layer, width = self.layer, self.layer.groups * ranks[0]
        axes = range(len(layer.kernel))
        between = [tuple(axes)] if self.method.modes == 3 else [(axis,) for axis in axes]
        return [
            layer.stage(layer.inputs, width),
            *(layer.stage(width, width, along, groups=width) for along in between),
            layer.stage(width, layer.outputs, bias=layer.bias is not None),
        ]

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        fits = self.fit(ranks[0], self.method.sweeps, self.method.starts)
        outputs, inputs, *kernels = (torch.stack(factors) for factors in zip(*fits, strict=True))
        weights = (inputs.mT, *(kernel.mT for kernel in kernels), outputs)
        biases = {} if self.layer.bias is None else {len(weights) - 1: self.layer.bias}
        return Factors(weights, biases, self.approximate(fits).reshape(self.layer.tensor.shape))


@dataclass(frozen=True, kw_only=True)
class CP(Factorization):
    """For convolutions. ``modes``: 3, or ``"all"`` with each axis of the kernel apart.

    ``sweeps`` of least squares from the best of ``starts`` by chance. ``penalty``: of the squared norms of the terms,
    times the squared relative error, so that a weight of low rank is still found exactly.
    """

    id: ClassVar[str] = "cp"
    modes: Literal[3, "all"] = 3
    sweeps: Rounds = 100
    starts: Rounds = 3
    penalty: Penalty = 0.03

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if layer.conv is None:
            return "it is no convolution: factorize.svd splits it"
        return Separable(layer, self, context)
