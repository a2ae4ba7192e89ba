r"""Channel SVD: a convolution into fewer channels, and one of kernel 1 back to all.

Paper    Zhang, Zou, He, Sun. Accelerating Very Deep Convolutional Networks for Classification and Detection. TPAMI
         2016. arXiv:1505.06798. Denton et al. NeurIPS 2014. arXiv:1404.0736
Formula  W as a matrix O x (I k_h k_w) = U S V^T ~ (U_r S_r^1/2) (S_r^1/2 V_r^T): k x k, I -> r; 1 x 1, r -> O
Departs  The weight is approximated, not the responses (factorize.autoencoder does that), and layers do not make up for
         the errors of those before them. Groups of a convolution are split one by one, at one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from espalier.core.context import Context
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Pair, Split, flat


@dataclass(frozen=True, kw_only=True)
class ChannelSVD(Factorization):
    """For convolutions."""

    id: ClassVar[str] = "channel-svd"

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if layer.conv is None:
            return "it is no convolution: factorize.svd splits it"
        return Pair(layer, flat(layer), grow_macs=self.grow_macs)
