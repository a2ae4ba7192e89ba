r"""Singular value decomposition: a matrix becomes the product of two thin ones.

Paper    Denton, Zaremba, Bruna, LeCun, Fergus. Exploiting Linear Structure Within Convolutional Networks for Efficient
         Evaluation. NeurIPS 2014. arXiv:1404.0736. Xue, Li, Gong. Restructuring of Deep Neural Network Acoustic Models
         with Singular Value Decomposition. Interspeech 2013
Formula  W = U S V^T ~ (U_r S_r^1/2) (S_r^1/2 V_r^T): in -> r without bias, r -> out with the bias
Departs  The singular values are shared evenly by both factors. Weights that their module reads itself (recurrent
         layers, attention, tied weights) stay where they are, kept as the two factors: smaller, not faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from espalier.core.context import Context
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Pair, Split, flat


@dataclass(frozen=True, kw_only=True)
class SVD(Factorization):
    """For linear layers, embeddings, recurrent layers, attention and convolutions of kernel 1."""

    id: ClassVar[str] = "svd"
    weights: ClassVar[bool] = True

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if layer.places > 1:
            return "its kernel is no matrix: factorize.channel-svd, spatial-svd, tucker or cp split it"
        return Pair(layer, flat(layer), grow_macs=self.grow_macs)
