r"""Low-rank training: weights are drawn to low rank while they train, then split.

Paper    Alvarez, Salzmann. Compression-aware Training of Deep Networks. NeurIPS 2017. arXiv:1711.02638 (nuclear norm).
         Xu, Li, Zhang, Wen, Wang, Dai, Qi, Chen, Lin, Xiong. Trained Rank Pruning for Efficient Deep Neural Networks.
         2018. arXiv:1812.02402 (truncated while training)
Formula  nuclear: W <- U max(S - lr strength every, 0) V^T, the proximal step of strength ||W||_*;
         truncated: W <- U_r S_r V_r^T with the ranks of ``rank``;   each ``every`` steps, W as (out) x (in k_h k_w)
Departs  One penalty for all layers, with the learning rate of the step. After the training the layers are split as by
         factorize.svd and channel-svd, at the ranks of ``rank``; there is no further training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.fields import Epochs, Penalty, Steps
from espalier.core.record import Record
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Pair, Split, flat


def shrunk(matrix: Tensor, threshold: float) -> Tensor:
    """(parts, m, n) with all singular values lowered by ``threshold``, none below 0."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    made: Tensor = (u * (s - threshold).clamp(min=0)[..., None, :]) @ vh
    return made.to(matrix.dtype)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """(parts, m, n) without all but the ``rank`` largest singular values."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    made: Tensor = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return made.to(matrix.dtype)


class TowardsLowRank(Callback):
    """Lowers the rank of the weights, each ``every`` steps and after the last."""

    def __init__(self, method: LowRankTraining, layers: Sequence[Layer]) -> None:
        self.method, self.layers = method, layers

    def after_step(self, loop: Loop) -> None:
        """One step towards low rank."""
        method = self.method
        if loop.step % method.every != method.every - 1 and loop.step != loop.steps - 1:
            return
        splits = [Pair(fresh, flat(fresh), grow_macs=method.grow_macs) for fresh in map(_again, self.layers)]
        if method.form == "nuclear":
            threshold = loop.optimizer.param_groups[0]["lr"] * method.strength * method.every
            made = [shrunk(split.matrices, threshold) for split in splits]
        else:
            quiet = replace(loop.context, record=Record("", ""))  # the ranks of every update are no news
            chosen = method.rank.choose(splits, loop.model, quiet)
            kept = [(split, ranks[0]) for split, ranks in zip(splits, chosen, strict=True) if ranks is not None]
            splits = [split for split, _ in kept]
            made = [truncated(split.matrices, rank) for split, rank in kept]
        with torch.no_grad():
            for split, matrix in zip(splits, made, strict=True):
                layer = split.layer
                weight = matrix.reshape(layer.tensor.shape)
                weight = weight[0].T if layer.embedding else weight.reshape(layer.slot.latent.shape)
                layer.slot.latent.copy_(weight)


def _again(layer: Layer) -> Layer:
    """The layer with its weight as it is now."""
    return Layer(layer.slot, layer.obstacle, layer.size)


@dataclass(frozen=True, kw_only=True)
class LowRankTraining(Factorization):
    """``epochs`` of training under ``form``; ``strength`` of the nuclear norm."""

    id: ClassVar[str] = "low-rank-training"
    weights: ClassVar[bool] = True
    epochs: Epochs = 5
    form: Literal["nuclear", "truncated"] = "nuclear"
    strength: Penalty = 1.0
    every: Steps = 10

    def conflicts(self) -> list[str]:
        """The training comes first, in one piece."""
        found = super().conflicts()
        if self.per_round:
            found.append("per_round fine-tunes between the layers; the training here comes before all of them")
        return found

    def prepare(self, model: nn.Module, context: Context) -> list[Layer]:
        """The layers, trained to low rank."""
        layers = super().prepare(model, context)
        trainable = [layer for layer in layers if layer.slot.latent.requires_grad]
        self.train(model, context, callbacks=(TowardsLowRank(self, trainable),), settled=max(0, self.epochs - 1))
        return layers

    def tune(self, model: nn.Module, context: Context, number: int) -> None:
        """The training is over."""

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        return Pair(layer, flat(layer), grow_macs=self.grow_macs)
