r"""Network slimming: an L1 penalty on the scales of batch norms makes whole channels zero.

Paper    Liu, Li, Shen, Huang, Yan, Zhang. Learning Efficient Convolutional Networks through Network Slimming. ICCV
         2017. arXiv:1708.06519
Formula  L + strength * sum |gamma|:   gamma <- sign(gamma) max(|gamma| - step * strength, 0) after every step;
         [gamma_c = 0] fixes gamma_c and filter c of the layer before at zero
Departs  The paper adds the subgradient and cuts the smallest gammas at the end, over the whole network; here the zeros
         are exact and nothing else goes (rank with criterion ``scale`` to reach a given sparsity). A channel of gamma 0
         still adds the batch norm's beta: remove channels with ``fold=true``. The largest gamma of a layer stays where
         all others are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.fields import Penalty
from espalier.core.forms import Mask
from espalier.core.parametrize import Slot, attach, bake
from espalier.core.selection import Selection
from espalier.prune.masks import as_stored, outputs_first
from espalier.prune.penalty import SparsityPenalty, largest_group
from espalier.prune.scale import batch_norms
from espalier.prune.sparsifier import Sparsifier
from espalier.train.proximal import soft_threshold, step_sizes


@dataclass(frozen=True, kw_only=True)
class Slimming(SparsityPenalty):
    """Channels, by the batch norm that follows; ``strength`` is compared with the gradient of a gamma."""

    id: ClassVar[str] = "slimming"
    strength: Penalty = 1e-3

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return _Slimming(self, model, selection, context)


class _Slimming(Sparsifier):
    def __init__(self, penalty: Slimming, model: nn.Module, selection: Selection, context: Context) -> None:
        self.penalty = penalty
        self.pairs: list[tuple[Slot, Slot]] = []
        gammas = batch_norms(model, selection, context)
        for slot in selection:
            gamma = gammas.get(slot.name)
            if gamma is not None and gamma.latent.requires_grad and gamma.phase in ("dense", "mask"):
                self.pairs.append((slot, gamma))
            elif gamma is not None:
                context.skip(slot.name, f"{gamma.name} does not train, so nothing makes it zero")
        self.gammas = list({id(gamma): gamma for _, gamma in self.pairs}.values())
        for member in (*(slot for slot, _ in self.pairs), *self.gammas):
            if not isinstance(member.form, Mask):
                attach(member, Mask(torch.ones_like(member.latent, dtype=torch.bool)))

    def after_step(self, loop: Loop) -> None:
        for gamma in self.gammas:
            step, value = step_sizes(loop.optimizer, gamma.latent), gamma.value()
            shrunk = soft_threshold(value, step * self.penalty.strength)
            gamma.latent.copy_(shrunk if bool(shrunk.any()) else largest_group(value, ()))

    def settle(self) -> None:
        for gamma in self.gammas:
            _mask(gamma).logical_and_(gamma.value() != 0)
        for slot, gamma in self.pairs:
            rows = outputs_first(slot, _mask(slot))
            stays = rows & _mask(gamma).reshape(-1, *[1] * (rows.ndim - 1))
            _mask(slot).copy_(as_stored(slot, stays))

    def finish(self) -> None:
        for member in (*(slot for slot, _ in self.pairs), *self.gammas):
            if bool(_mask(member).all()):
                bake(member)


def _mask(slot: Slot) -> torch.Tensor:
    assert isinstance(slot.form, Mask)  # noqa: S101 - attached in __init__
    return slot.form.mask
