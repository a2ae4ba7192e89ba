r"""Tensor train: a weight as a chain of small cores.

Paper    Oseledets. Tensor-Train Decomposition. SIAM J. Sci. Comput. 33, 2011. Novikov, Podoprikhin, Osokin, Vetrov.
         Tensorizing Neural Networks. NeurIPS 2015. arXiv:1509.06569. Garipov, Podoprikhin, Novikov, Vetrov. Ultimate
         Tensorization. 2016. arXiv:1611.03214
Formula  T[j_1, ..., j_d] ~ G_1[j_1] G_2[j_2] ... G_d[j_d], core k (r_k-1, n_k, r_k) from the leading left singular
         vectors of what is left;   ||T - TT||^2 <= sum_k sum_{i > r_k} s_i(unfolding k)^2
Departs  A convolution has the modes (in, k_h, k_w, out) and becomes 1 x 1, k_h x 1, 1 x k_w, 1 x 1 (Garipov et al. take
         channels apart as well). A linear layer with the modes (in_k out_k) becomes products of kernel 1 with
         reshapings between; its bias, which no core has, stands in a last layer with a scale per output.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.spectra import left_vectors, singular_values
from espalier.factorize.split import Factors, Ranks, Split, Unfolding
from espalier.factorize.stages import Cost, Spec, linear


def tt_svd(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Cores (parts, r_k-1, n_k, r_k) of ``tensor`` (parts, n_1, ..., n_d); ``ranks`` r_1 .. r_d-1, r_0 = r_d = 1.

    All cores but the last have orthonormal columns. Each rank must be at most r_k-1 n_k.
    """
    parts, *modes = tensor.shape
    rest, cores, before = tensor.reshape(parts, 1, -1), [], 1
    for mode, rank in zip(modes[:-1], ranks, strict=True):
        matrix = rest.reshape(parts, before * mode, -1)
        left = left_vectors(matrix, rank)
        cores.append(left.reshape(parts, before, mode, rank))
        rest, before = left.mT @ matrix, rank
    cores.append(rest.reshape(parts, before, modes[-1], 1))
    return cores


def chained(cores: list[Tensor]) -> Tensor:
    """The tensor (parts, n_1, ..., n_d) that ``cores`` make."""
    made = cores[0].flatten(1, 2)  # (parts, n_1 ... n_k, r_k)
    for core in cores[1:]:
        made = (made @ core.flatten(2)).reshape(len(made), -1, core.shape[-1])
    return made.reshape(len(made), *(core.shape[2] for core in cores))


class Train(Split):
    """The chain of a tensor (parts, n_1, ..., n_d): a rank between each two modes."""

    @property
    @abstractmethod
    def modes(self) -> Tensor:
        """The weight as the tensor that is taken apart."""

    @cached_property
    def limits(self) -> Ranks:
        sizes = self.modes.shape[1:]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        found = []
        for place in range(1, self.modes.ndim - 1):
            matrix = self.modes.flatten(1, place).flatten(2)
            found.append(Unfolding(singular_values(matrix), (matrix.shape[1], matrix.shape[2])))
        return tuple(found)

    def fitting(self, ranks: Ranks) -> Ranks:
        """``ranks``, none above what the core before it can carry."""
        found: list[int] = []
        for mode, rank in zip(self.modes.shape[1:-1], ranks, strict=True):
            found.append(min(rank, (found[-1] if found else 1) * mode))
        return tuple(found)


class ConvTrain(Train):
    """Modes (in, k_1, ..., out) of each group."""

    @cached_property
    def modes(self) -> Tensor:
        return self.layer.tensor.movedim(1, -1)

    def specs(self, ranks: Ranks) -> list[Spec]:
        layer = self.layer
        widths = [layer.groups * rank for rank in self.fitting(ranks)]
        between = [layer.stage(a, b, (axis,)) for axis, (a, b) in enumerate(pairwise(widths))]
        last = layer.stage(widths[-1], layer.outputs, bias=layer.bias is not None)
        return [layer.stage(layer.inputs, widths[0]), *between, last]

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        cores = tt_svd(self.modes, self.fitting(ranks))
        weights = [core.permute(0, 3, 1, 2) for core in cores[:-1]]  # (groups, out, in, places)
        weights[0] = cores[0].squeeze(1).mT
        last = cores[-1].squeeze(3).mT
        biases = {} if self.layer.bias is None else {len(weights): self.layer.bias}
        return Factors((*weights, last), biases, chained(cores).movedim(-1, 1))


class LinearTrain(Train):
    """Modes (in_k out_k): inputs and outputs are taken apart into as many factors as there are cores."""

    def __init__(self, layer: Layer, inputs: list[int], outputs: list[int], *, grow_macs: bool) -> None:
        super().__init__(layer, grow_macs=grow_macs)
        self.n, self.m = inputs, outputs

    @cached_property
    def modes(self) -> Tensor:
        d = len(self.n)
        pairs = self.layer.tensor[0].reshape(*self.m, *self.n).permute(*(k + s for k in range(d) for s in (d, 0)))
        return pairs.reshape(1, *(n * m for n, m in zip(self.n, self.m, strict=True)))

    def specs(self, ranks: Ranks) -> list[Spec]:
        ranks, last = (1, *self.fitting(ranks)), len(self.n) - 1
        row: list[Spec] = []
        for k, (n, m) in enumerate(zip(self.n, self.m, strict=True)):
            width, rest = ranks[k] * n, math.prod(self.n[k + 1 :])
            if k:  # (batch, m_k-1 r_k, n_k rest) -> (batch, m_k-1, r_k n_k, rest)
                row += [flatten(1), unflatten(1, [self.m[k - 1], width, *([rest] if k < last else [])])]
                row += [flatten(0, 1)] if k < last else []
            else:
                row.append(unflatten(1, [width, rest]))
            row.append(pointwise(width, m * ranks[k + 1]) if k < last else linear(width, m, bias=False))
        row.append(flatten(1))
        for k in reversed(range(last - 1)):
            row += [unflatten(0, [-1, self.m[k]]), flatten(1)]
        if self.layer.bias is not None:
            outputs = self.layer.outputs
            row += [unflatten(1, [outputs, 1]), pointwise(outputs, outputs, groups=outputs, bias=True), flatten(1)]
        return row

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        cores = tt_svd(self.modes, self.fitting(ranks))
        weights, shaped = [], []
        for core, n, m in zip(cores, self.n, self.m, strict=True):
            _, before, _, after = core.shape
            shaped.append(core.reshape(before, n, m, after))
            weights.append(shaped[-1].permute(2, 3, 0, 1).reshape(m * after, before * n))
        d = len(cores)
        pairs = chained(cores).reshape(*(size for pair in zip(self.n, self.m, strict=True) for size in pair))
        made = pairs.permute(*range(1, 2 * d, 2), *range(0, 2 * d, 2)).reshape(self.layer.tensor.shape)
        if self.layer.bias is None:
            return Factors(tuple(weights), {}, made)
        return Factors((*weights, torch.ones(self.layer.outputs)), {d: self.layer.bias}, made)

    def cost(self, ranks: Ranks) -> Cost:
        """Numbers as ever; multiplications from the places that each core works at."""
        return Cost(super().cost(ranks).parameters, self._macs((1, *self.fitting(ranks), 1)))

    def _macs(self, ranks: Ranks) -> int:
        total = self.layer.outputs if self.layer.bias is not None else 0
        for k, (n, m) in enumerate(zip(self.n, self.m, strict=True)):
            places = math.prod(self.m[:k]) * math.prod(self.n[k + 1 :])
            total += places * ranks[k] * n * m * ranks[k + 1]
        return total


def flatten(start: int, end: int = -1) -> Spec:
    """A Flatten."""
    return {"class": "Flatten", "args": {"start_dim": start, "end_dim": end}}


def unflatten(dim: int, sizes: list[int]) -> Spec:
    """An Unflatten."""
    return {"class": "Unflatten", "args": {"dim": dim, "unflattened_size": sizes}}


def pointwise(inputs: int, outputs: int, *, groups: int = 1, bias: bool = False) -> Spec:
    """A Conv1d of kernel 1."""
    args = {
        "in_channels": inputs, "out_channels": outputs, "kernel_size": [1], "stride": [1], "padding": [0],
        "dilation": [1], "groups": groups, "bias": bias,
    }  # fmt: skip
    return {"class": "Conv1d", "args": args}


def near_equal(n: int, count: int) -> list[int]:
    """``count`` factors of ``n`` as equal as its divisors allow, in rising order."""
    if count == 1:
        return [n]
    goal = n ** (1 / count)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    first = min(divisors, key=lambda d: abs(math.log(d / goal)))
    return sorted([first, *near_equal(n // first, count - 1)])


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Factorization):
    """For convolutions, and linear layers whose inputs are (batch, features), with so many ``cores``.

    The chain of a linear layer computes more than the layer unless its ranks are very low; a note says how much.
    """

    id: ClassVar[str] = "tensor-train"
    cores: Literal[2, 3, 4] = 3

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """A rank between each two cores."""
        if layer.conv is not None:
            return ConvTrain(layer, grow_macs=self.grow_macs)
        if layer.embedding:
            return "it is a table: factorize.svd splits it"
        if layer.size is None:
            return "the task's example does not come by, so the dimensions of its inputs are not known"
        if layer.size:
            return f"its inputs have {len(layer.size) + 2} dimensions; chains of cores take (batch, features)"
        inputs, outputs = near_equal(layer.inputs, self.cores), near_equal(layer.outputs, self.cores)
        if min(*inputs, *outputs) < 2:
            return f"{layer.inputs} inputs and {layer.outputs} outputs have no {self.cores} factors each"
        return LinearTrain(layer, inputs, outputs[::-1], grow_macs=self.grow_macs)
