"""One layer and the ways a method can split it: ranks, what they cost, what they lose, and the factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from espalier.core.context import Context
from espalier.factorize.layer import Layer
from espalier.factorize.spectra import Decomposed
from espalier.factorize.stages import Cost, Spec

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Unfolding:
    """Singular values (parts, n) of the matrices of ``shape`` (rows, columns) that a rank is read off."""

    values: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Factors:
    """Weights of the layers in the row, one after the other, and biases by place.

    ``approximation``: what they make together, shape of ``Layer.tensor``; None where they make no weight. ``facts``:
    more for the record, plain data.
    """

    weights: tuple[Tensor, ...]
    biases: dict[int, Tensor] = field(default_factory=dict)
    approximation: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Split(ABC):
    """A layer with one rank or more. The row of layers costs less as a rank falls, and loses more."""

    def __init__(self, layer: Layer, *, grow_macs: bool = False) -> None:
        self.layer, self.grow_macs = layer, grow_macs

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.layer.name

    @property
    @abstractmethod
    def limits(self) -> Ranks:
        """The highest ranks: with these nothing is lost."""

    @property
    def floor(self) -> float:
        """The share of the squared norm that is lost even at the limits."""
        return 0.0

    @property
    @abstractmethod
    def unfoldings(self) -> tuple[Unfolding, ...]:
        """What each rank is read off."""

    @property
    def losses(self) -> tuple[Tensor, ...]:
        """For each rank: the share of the squared norm that each step up from rank 0 brings, (limit,) float64."""
        shares = []
        for unfolding in self.unfoldings:
            energy = unfolding.values.double().square().sum(0)
            shares.append(energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny))
        return tuple(shares)

    @abstractmethod
    def specs(self, ranks: Ranks) -> list[Spec]:
        """The layers in a row."""

    @abstractmethod
    def factors(self, ranks: Ranks, context: Context) -> Factors:
        """Their values."""

    def cost(self, ranks: Ranks) -> Cost:
        """What the row costs."""
        return self.layer.cost(self.specs(ranks))

    def gains(self, ranks: Ranks) -> bool:
        """Whether the row is smaller than the layer, and, for a convolution, computes no more."""
        new, old = self.cost(ranks), self.layer.dense
        more = self.layer.conv is not None and not self.grow_macs and new.macs > old.macs
        return new.parameters < old.parameters and not more


class Pair(Split):
    """Two layers in a row: a matrix for each group of the layer as the product of two.

    ``matrices``: (parts, rows, columns); several parts of a group, as ``parts / groups``, share the group's outputs
    and divide its inputs.
    """

    def __init__(self, layer: Layer, matrices: Tensor, *, grow_macs: bool = False) -> None:
        super().__init__(layer, grow_macs=grow_macs)
        self.matrices, self.decomposed = matrices, Decomposed(matrices)

    @property
    def limits(self) -> Ranks:
        return (min(self.matrices.shape[1:]),)

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        return (Unfolding(self.decomposed.values, (self.matrices.shape[1], self.matrices.shape[2])),)

    def specs(self, ranks: Ranks) -> list[Spec]:
        layer, width = self.layer, len(self.matrices) * ranks[0]
        second = layer.stage(width, layer.outputs, bias=self.has_bias)
        if layer.embedding:
            return [layer.lookup(width), second]
        axes = range(len(layer.kernel))
        return [layer.stage(layer.inputs, width, axes, groups=len(self.matrices)), second]

    def cost(self, ranks: Ranks) -> Cost:
        if self.layer.obstacle:  # the weight is made of its factors each time, and used as before
            return Cost(ranks[0] * sum(self.matrices.shape[1:]), self.layer.dense.macs)
        return super().cost(ranks)

    @property
    def has_bias(self) -> bool:
        """Whether the last layer has a bias."""
        return self.layer.bias is not None

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """(parts, rows, rank) and (parts, rank, columns)."""
        return self.decomposed.balanced(rank)

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        layer, (left, right) = self.layer, self.pair(ranks[0])
        biases = {} if layer.bias is None else {1: layer.bias}
        return Factors((right, self.rows(left)), biases, self.product(left, right))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """What the two make, shape of ``Layer.tensor``."""
        layer = self.layer
        product = left @ right
        divided = product.reshape(layer.groups, -1, *product.shape[1:])  # (groups, parts of a group, rows, columns)
        return divided.transpose(1, 2).reshape(layer.tensor.shape)

    def rows(self, left: Tensor) -> Tensor:
        """(groups, rows, parts of a group * rank): the weight of the last layer."""
        return left.reshape(self.layer.groups, -1, *left.shape[1:]).transpose(1, 2).flatten(2)


def flat(layer: Layer, parts: int = 1) -> Tensor:
    """(groups * parts, outputs, inputs * places / parts): the matrices of a layer, its inputs divided in ``parts``."""
    tensor = layer.tensor.flatten(3) if layer.places > 1 else layer.tensor.flatten(2)[..., None]
    groups, outputs, inputs, places = tensor.shape
    divided = tensor.reshape(groups, outputs, parts, inputs // parts * places)
    return divided.transpose(1, 2).flatten(0, 1)


def relative_error(split: Split, ranks: Ranks) -> float:
    """The share of the squared norm that is lost at ``ranks``: exact for one rank, a bound for several."""
    return split.floor + float(sum(share[rank:].sum() for share, rank in zip(split.losses, ranks, strict=True)))


def first_gain(split: Split, start: Sequence[int] | None = None) -> Ranks | None:
    """The highest ranks at or below ``start`` that make the layer smaller, by the path of least loss; None if none."""
    return next((step.ranks for step in path(split, start) if split.gains(step.ranks)), None)


@dataclass(frozen=True)
class Step:
    """Ranks, what they cost, and the share of the squared norm that they lose."""

    ranks: Ranks
    cost: Cost
    error: float


def path(split: Split, start: Sequence[int] | None = None) -> list[Step]:
    """Down from ``start`` (the limits) to rank 1: each step lowers the rank that loses least per number saved."""
    ranks = tuple(start or split.limits)
    losses = [share.tolist() for share in split.losses]
    steps = [Step(ranks, split.cost(ranks), relative_error(split, ranks))]
    while max(ranks) > 1:
        best: tuple[float, float, Step] | None = None
        for mode, rank in enumerate(ranks):
            if rank == 1:
                continue
            lower = (*ranks[:mode], rank - 1, *ranks[mode + 1 :])
            loss, cost = losses[mode][rank - 1], split.cost(lower)
            saved = steps[-1].cost.parameters - cost.parameters
            price = loss / saved if saved > 0 else float("inf")
            if best is None or (price, loss) < best[:2]:
                best = price, loss, Step(lower, cost, steps[-1].error + loss)
        assert best is not None  # noqa: S101 - some rank is above 1
        steps.append(best[2])
        ranks = best[2].ranks
    return steps
