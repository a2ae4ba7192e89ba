r"""Tucker-2: fewer channels in, fewer channels out, and a small core between them.

Paper    Kim, Park, Yoo, Choi, Yang, Shin. Compression of Deep Convolutional Neural Networks for Fast and Low Power
         Mobile Applications. ICLR 2016. arXiv:1511.06530. Algorithm: De Lathauwer, De Moor, Vandewalle. On the Best
         Rank-1 and Rank-(R1, ..., RN) Approximation of Higher-order Tensors. SIAM J. Matrix Anal. Appl. 21, 2000
Formula  W ~ C x_O A x_I B with orthonormal A (O, r_o), B (I, r_i) and C = W x_O A^T x_I B^T (r_o, r_i, k, k), by
         alternating A <- leading left vectors of W x_I B^T and B <- those of W x_O A^T;
         1 x 1 by B^T, k x k by C, 1 x 1 by A with the bias
Departs  Ranks by any rule; the paper's is rank=evbmf. Groups of a convolution are split one by one, at the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.core.fields import Positive, Rounds
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.spectra import gram_vectors, singular_values
from espalier.factorize.split import Factors, Ranks, Split, Unfolding
from espalier.factorize.stages import Spec


def tucker2(tensor: Tensor, ranks: Ranks, *, sweeps: int = 10, tolerance: float = 1e-4) -> tuple[Tensor, ...]:
    """``A`` (..., O, r_o), ``C`` (..., r_o, r_i, K), ``B`` (..., I, r_i) of ``tensor`` (..., O, I, K).

    Begins with the leading vectors of the inputs' unfolding (HOSVD) and stops when a sweep lowers the relative error by
    less than ``tolerance``.
    """
    r_o, r_i = ranks
    total = tensor.double().square().sum()
    B = leading(tensor.transpose(-3, -2), r_i)
    before = torch.inf
    for _ in range(sweeps):
        A = leading(torch.einsum("...oik,...ir->...ork", tensor, B), r_o)
        narrow = torch.einsum("...oik,...or->...rik", tensor, A)
        B = leading(narrow.transpose(-3, -2), r_i)
        C = torch.einsum("...oik,...ir->...ork", narrow, B)
        error = float((1 - C.double().square().sum() / total).clamp(min=0).sqrt()) if total > 0 else 0.0
        if before - error < tolerance:
            break
        before = error
    return A, C, B


def leading(tensor: Tensor, rank: int) -> Tensor:
    """(..., n, *, K) -> (..., n, rank): leading left singular vectors of the unfolding along n."""
    matrix = tensor.flatten(-2)
    return gram_vectors(matrix @ matrix.mT)[..., :rank]


class Tucker2(Split):
    """Ranks of outputs and of inputs."""

    def __init__(self, layer: Layer, *, grow_macs: bool, sweeps: int, tolerance: float) -> None:
        super().__init__(layer, grow_macs=grow_macs)
        self.sweeps, self.tolerance = sweeps, tolerance

    @cached_property
    def tensor(self) -> Tensor:
        """(groups, outputs, inputs, places)."""
        return self.layer.tensor.flatten(3)

    @property
    def limits(self) -> Ranks:
        _, outputs, inputs, places = self.tensor.shape
        return min(outputs, inputs * places), min(inputs, outputs * places)

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        both = (self.tensor.flatten(2), self.tensor.transpose(1, 2).flatten(2))
        return tuple(Unfolding(singular_values(m), (m.shape[1], m.shape[2])) for m in both)

    def specs(self, ranks: Ranks) -> list[Spec]:
        layer, (r_o, r_i) = self.layer, ranks
        groups, axes = layer.groups, range(len(layer.kernel))
        return [
            layer.stage(layer.inputs, groups * r_i),
            layer.stage(groups * r_i, groups * r_o, axes),
            layer.stage(groups * r_o, layer.outputs, bias=layer.bias is not None),
        ]

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        A, C, B = tucker2(self.tensor, ranks, sweeps=self.sweeps, tolerance=self.tolerance)
        made = torch.einsum("gor,grsk,gis->goik", A, C, B).reshape(self.layer.tensor.shape)
        biases = {} if self.layer.bias is None else {2: self.layer.bias}
        return Factors((B.mT, C, A), biases, made)


@dataclass(frozen=True, kw_only=True)
class Tucker(Factorization):
    """For convolutions. ``sweeps``: at most so many; they end when the error falls by less than ``tolerance``."""

    id: ClassVar[str] = "tucker"
    sweeps: Rounds = 10
    tolerance: Positive = 1e-4

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """Two ranks."""
        if layer.conv is None:
            return "it is no convolution: factorize.svd splits it"
        return Tucker2(layer, grow_macs=self.grow_macs, sweeps=self.sweeps, tolerance=self.tolerance)
