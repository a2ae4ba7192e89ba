r"""Activation-aware SVD: inputs that are large count for more.

Paper    Yuan, Shang, Song, Wu, Yan, Sun. ASVD: Activation-aware Singular Value Decomposition for Compressing Large
         Language Models. 2023. arXiv:2312.05821
Formula  S = diag(s), s_j = mean(|x_j|)^alpha:   W S = U D V^T,   W ~ (U_r D_r^1/2) (D_r^1/2 V_r^T S^-1)
Departs  Ranks by any rule here, on the scaled weight; the paper seeks them by the perplexity of each layer.
         ``by="rms"`` takes the root of the mean square. In convolutions the places of a kernel share the scale of their
         input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches, Fraction
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Pair, Split, flat
from espalier.factorize.statistics import inputs_of, watched

QUIET = 1e-4
"""Share of the largest scale that an input has at least: one that was never active keeps its weights."""


class Scaled(Pair):
    """The matrices with scaled columns; the scale is taken back from the first layer. ``scale``: (parts, columns)."""

    def __init__(self, layer: Layer, scale: Tensor, *, grow_macs: bool) -> None:
        super().__init__(layer, flat(layer) * scale[:, None], grow_macs=grow_macs)
        self.scale = scale

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        left, right = super().pair(rank)
        return left, right / self.scale[:, None]


@dataclass(frozen=True, kw_only=True)
class ActivationAwareSVD(Factorization):
    """For linear layers and convolutions; ``batches``: how many training batches are looked at."""

    id: ClassVar[str] = "activation-aware-svd"
    weights: ClassVar[bool] = True
    alpha: Fraction = 0.5
    by: Literal["mean", "rms"] = "mean"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        """Inputs to look at."""
        return super().needs | {"train"}

    def look(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> Any:
        """Name -> scale of each input."""
        found = inputs_of(model, [layer for layer in layers if watched(layer)], context, self.batches)
        scales: dict[str, Tensor] = {}
        for name, inputs in found.items():
            size = inputs.magnitude / inputs.count if self.by == "mean" else (inputs.square / inputs.count).sqrt()
            scales[name] = size.pow(self.alpha)
        return scales

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if not watched(layer):
            return "its inputs cannot be seen: factorize.svd splits it without them"
        if getattr(layer.module, "groups", 1) != layer.groups:
            return f"{layer.obstacle}, and its groups read different inputs: factorize.svd splits it without them"
        scale = seen.get(layer.name)
        if scale is None or not scale.any():
            return "nothing came in on the training batches: factorize.svd splits it without inputs"
        scale = scale.clamp(min=QUIET * float(scale.max())).to(layer.tensor.dtype)
        columns = flat(layer).shape[2] * layer.groups // len(scale)
        return Scaled(layer, scale.repeat_interleave(columns).reshape(layer.groups, -1), grow_macs=self.grow_macs)
