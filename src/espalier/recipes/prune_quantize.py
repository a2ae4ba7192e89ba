r"""Prune-quantize: one training in which the mask grows while the quantizer learns.

Paper    Tung, Mori. CLIP-Q: Deep Network Compression Learning by In-Parallel Pruning-Quantization. CVPR 2018
Formula  w^ = m * Q(w);   m = 0 for the floor(s_t n) smallest |w|, chosen anew from the full-precision w every ``every``
         steps, and Q fitted anew to the w that m keeps;   dL/dw = m dL/dw^ where Q does not clip, without m: ``splice``
Departs  The pruned share grows on a schedule and over all layers together, in place of a share for each layer found by
         Bayesian optimisation. Q is a weight quantizer, by default with a learned step (LSQ), which is fitted anew
         while the share grows and learns from then on; the paper takes the means of equal intervals, anew in every
         step. A pruned weight gets no gradient, and comes back only where others fall below it, unless ``splice``, as
         in the paper, trains it on. The first and the last layer have 8 bits where others have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.fields import Epochs, Fraction, LearningRate, Sparsity, Steps
from espalier.core.forms import Mask
from espalier.core.parametrize import Slot, attach, bake, require_phase
from espalier.core.quantized import QuantizedWeight
from espalier.core.selection import Selection, select
from espalier.prune import Cubic, Global, Schedule, Scope
from espalier.prune.parts import Scores
from espalier.quantize import LSQ, Quantize
from espalier.quantize.parts import LayerSolver
from espalier.recipes.deep_compression import sparsity_at
from espalier.train import Training
from espalier.train.quantizers import does

MOST_BITS, FEWEST_BITS = 6, 2
"""Bits of the weights at strength 0 and 1."""
SPARSITY, BITS = 0.9, 4
"""The defaults, which say nothing beside a strength."""
OWN = ("finish", "restarts", "latent")
"""Hooks of a quantizer that has a training of its own, or no latent weight to prune by."""


@dataclass(frozen=True, kw_only=True)
class PruneQuantize(Training):
    """Prune to ``sparsity`` and quantize as ``quantize`` says, its layers, both in the same ``epochs``.

    ``strength`` sets sparsity and bits; with ``null`` the fields stand, and a schedule that ends at a sparsity of its
    own decides. ``every``: optimizer steps between two mask updates. ``splice``: pruned weights go on learning.
    """

    id: ClassVar[str] = "prune-quantize"
    epochs: Epochs = 20
    lr: LearningRate = 2e-3
    strength: Fraction | None = 0.5
    sparsity: Sparsity = SPARSITY
    quantize: Quantize = field(default_factory=lambda: Quantize(weights=LSQ(), bits=BITS))
    scope: Scope = field(default_factory=Global)
    schedule: Schedule = field(default_factory=lambda: Cubic(end=0.5))
    every: Steps = 10
    splice: bool = False

    def conflicts(self) -> list[str]:
        found, method = super().conflicts(), self.quantize.weights
        if not self.epochs:
            found.append("epochs=0 trains nothing, and both parts need the training; quantize.quantize works without")
        if self.quantize.epochs:
            found.append("quantize.epochs trains after the masks; leave it at 0, epochs is the one training there is")
        if method is None:
            found.append("quantize.weights is unset, so nothing is quantized; prune.prune prunes alone")
        elif isinstance(method, LayerSolver) or method.stacked or any(does(method, hook) for hook in OWN):
            found.append(f"{method.id} goes its own way through a training; take lsq, qat, affine, twn or ttq")
        elif self.strength is not None:
            asked, bits = {"sparsity": self.sparsity != SPARSITY}, self.quantize.bits
            asked["quantize.bits"] = bits not in (None, BITS) and len(method.widths) > 1
            found += [f"strength sets {name}: leave it out, or set strength to null" for name in asked if asked[name]]
        return found

    def goal(self) -> tuple[float, Quantize]:
        """The sparsity to end at, and the quantization with its bits."""
        sparsity, quantize, method = self.sparsity, self.quantize, self.quantize.weights
        if self.strength is not None and method is not None:
            asked = round(MOST_BITS + (FEWEST_BITS - MOST_BITS) * self.strength)
            bits = min(method.widths, key=lambda bits: (abs(bits - asked), bits))
            sparsity, quantize = sparsity_at(self.strength), quantize.replace(bits=bits)
        return sparsity if self.schedule.final is None else self.schedule.final, quantize

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Put a mask and a quantizer on every weight, train, and leave both."""
        sparsity, quantize = self.goal()
        layers = quantize.layers
        fresh = _masked(select(model, layers, who=self.name), self.name, densify=quantize.densify)
        model = quantize.transform(model, context)
        selection = select(model, layers, who=self.name).where(lambda slot: slot.latent.numel() > 0)
        pruning = Pruning(self, selection, sparsity)
        settled = sum(self.schedule.sparsity(e / self.epochs, sparsity) < sparsity for e in range(self.epochs - 1))
        self.train(model, context, callbacks=(pruning,), settled=settled)
        pruning.finish()
        for slot in selection:
            if slot.name in fresh and isinstance(slot.form, Mask) and bool(slot.form.mask.all()):
                bake(slot)
        details = context.record.details
        details["sparsity"] = {slot.name: 1 - float((slot.value() != 0).float().mean()) for slot in selection}
        details["bits"] = {slot.name: slot.form.bits for slot in selection if isinstance(slot.form, QuantizedWeight)}
        return model


def _masked(selection: Selection, who: str, *, densify: bool) -> set[str]:
    """Give every weight without a mask one that keeps all; the names of these."""
    fresh = set()
    for slot in selection:
        require_phase(slot, ("dense", "mask"), who, densify=densify)
        if not isinstance(slot.form, Mask):
            attach(slot, Mask(torch.ones_like(slot.latent, dtype=torch.bool)))
            fresh.add(slot.name)
    return fresh


def mask_of(slot: Slot) -> Mask:
    """The mask of a weight, beneath its quantizer where it has one."""
    form = slot.form.inner if isinstance(slot.form, QuantizedWeight) else slot.form
    assert isinstance(form, Mask)  # noqa: S101 - attached before the training
    return form


def fit_anew(form: QuantizedWeight, latent: Tensor) -> None:
    """Start the quantizer again from the weights that are kept now."""
    for name, tensor in form.method.start(latent.detach(), form.bits, form.axis, form.kept).items():
        form.state[name].copy_(tensor)


class Pruning(Callback):
    """Chooses the masks anew from the latent weights; what earlier steps have pruned stays out."""

    def __init__(self, method: PruneQuantize, selection: Selection, sparsity: float) -> None:
        self.method, self.selection, self.final = method, selection, sparsity
        self.fence = {slot.name: mask_of(slot).mask.clone() for slot in selection}
        self.reached = -1.0

    def masks(self) -> Iterator[tuple[Slot, Mask]]:
        """The weights with their masks."""
        for slot in self.selection:
            yield slot, mask_of(slot)

    def on_start(self, loop: Loop) -> None:
        for _, form in self.masks():
            form.through = self.method.splice

    def on_epoch_start(self, loop: Loop) -> None:
        self.update(loop.step / loop.steps)

    def after_step(self, loop: Loop) -> None:
        if (loop.step + 1) % self.method.every == 0:
            self.update((loop.step + 1) / loop.steps)

    def update(self, progress: float) -> None:
        """Bring the masks to what the schedule asks for at ``progress``."""
        grows, self.reached = self.reached < self.final, self.method.schedule.sparsity(progress, self.final)
        with torch.no_grad():
            scores: Scores = {
                slot.name: slot.latent.abs().masked_fill(~self.fence[slot.name], -torch.inf) for slot, _ in self.masks()
            }
            removed: dict[str, Tensor] = {}
            for names in self.method.scope.apart(self.selection):
                removed |= self.method.scope.removed({name: scores[name] for name in names}, self.reached)
            for slot, form in self.masks():
                form.mask.copy_(~removed[slot.name] & self.fence[slot.name])
                if grows and isinstance(slot.form, QuantizedWeight):
                    fit_anew(slot.form, slot.latent)

    def finish(self) -> None:
        """Masks that have reached the end stay, so that the best epoch's weights keep the masks they had."""
        if self.reached < self.method.schedule.sparsity(1.0, self.final):
            self.update(1.0)
        for _, form in self.masks():
            form.through = False

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]
