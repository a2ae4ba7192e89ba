r"""Filter basis: the filters of a layer as combinations of few basis filters.

Paper    Li, Gu, Van Gool, Timofte. Learning Filter Basis for Convolutional Neural Network Compression. ICCV 2019.
         arXiv:1908.08932
Formula  inputs divided in s parts, W_j (O x I/s x k x k) ~ sum_{b <= m} A_jb B_jb with m basis filters of I/s channels:
         k x k by B in s groups, I -> s m;   1 x 1 by A, s m -> O
Departs  Every part of the inputs has a basis of its own, so that plain layers do it (the paper's parts share one). The
         basis is the optimum for the trained weights, then fine-tuned with ``epochs``; the paper learns it from there
         on with a loss on the approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from espalier.core.context import Context
from espalier.core.fields import Group
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Pair, Split, flat


@dataclass(frozen=True, kw_only=True)
class BasisFilters(Factorization):
    """For convolutions. ``divide``: s; the rank is m, the basis filters of each part."""

    id: ClassVar[str] = "basis-filters"
    divide: Group = 2

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if layer.conv is None:
            return "it is no convolution: factorize.svd splits it"
        inputs = layer.inputs // layer.groups
        if inputs % self.divide:
            return f"its {inputs} inputs do not divide into {self.divide} parts"
        return Pair(layer, flat(layer, self.divide), grow_macs=self.grow_macs)
