r"""Spatial SVD: a convolution with vertical kernels, then one with horizontal kernels.

Paper    Jaderberg, Vedaldi, Zisserman. Speeding up Convolutional Neural Networks with Low Rank Expansions. BMVC 2014.
         arXiv:1405.3866 (scheme 2)
Formula  W as a matrix (I k_h) x (O k_w) = U S V^T ~ (U_r S_r^1/2) (S_r^1/2 V_r^T): k_h x 1, I -> r; 1 x k_w, r -> O
Departs  The optimum in the weights by one SVD (Tai et al. 2016, arXiv:1511.06067); the paper descends on the
         reconstruction of filters or responses. Of three axes, the first is taken apart from the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from espalier.core.context import Context
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.spectra import Decomposed
from espalier.factorize.split import Factors, Ranks, Split, Unfolding
from espalier.factorize.stages import Spec


class Spatial(Split):
    """Vertical, then horizontal."""

    @cached_property
    def decomposed(self) -> Decomposed:
        """(groups, inputs * k_h, outputs * k_w)."""
        tensor = self.layer.tensor.flatten(4)  # (groups, outputs, inputs, k_h, k_w)
        return Decomposed(tensor.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))

    @property
    def limits(self) -> Ranks:
        return (min(self.decomposed.matrix.shape[1:]),)

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        _, rows, columns = self.decomposed.matrix.shape
        return (Unfolding(self.decomposed.values, (rows, columns)),)

    def specs(self, ranks: Ranks) -> list[Spec]:
        layer, width = self.layer, self.layer.groups * ranks[0]
        rest = range(1, len(layer.kernel))
        return [
            layer.stage(layer.inputs, width, (0,)),
            layer.stage(width, layer.outputs, rest, bias=layer.bias is not None),
        ]

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        layer, tensor = self.layer, self.layer.tensor.flatten(4)
        vertical, horizontal = self.decomposed.balanced(ranks[0])
        groups, outputs, inputs, height, width = tensor.shape
        made = (vertical @ horizontal).reshape(groups, inputs, height, outputs, width).permute(0, 3, 1, 2, 4)
        first = vertical.reshape(groups, inputs, height, -1).permute(0, 3, 1, 2)  # (groups, rank, inputs, k_h)
        second = horizontal.reshape(groups, -1, outputs, width).transpose(1, 2)  # (groups, outputs, rank, k_w)
        biases = {} if layer.bias is None else {1: layer.bias}
        return Factors((first, second), biases, made.reshape(layer.tensor.shape))


@dataclass(frozen=True, kw_only=True)
class SpatialSVD(Factorization):
    """For convolutions with two axes or three."""

    id: ClassVar[str] = "spatial-svd"

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if len(layer.kernel) < 2:
            return "it has no two axes to take apart: factorize.svd or channel-svd split it"
        return Spatial(layer, grow_macs=self.grow_macs)
