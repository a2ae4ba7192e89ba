r"""Pruning before training: an untrained network loses what its loss does not depend on, and only the rest is trained.

Paper    Lee, Ajanthan, Torr. SNIP: Single-shot Network Pruning based on Connection Sensitivity. ICLR 2019.
         arXiv:1810.02340; Wang, Zhang, Grosse 2020, arXiv:2002.07376; Tanaka et al. 2020, arXiv:2006.05467
Formula  w_0 ~ the layers' own initialisation;   m = [score(w_0) among the top (1 - sparsity) of all layers];
         then min L(m * w) from w_0
Departs  Trained weights are given up: on them this would be no pruning before training. Layers that do not know how to
         initialise themselves, and frozen ones, keep their values. A composite loss may lose redundant terms first:
         see loss_terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import NeedError
from espalier.core.fields import Batches, Epochs, Fraction, Sparsity
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, require_phase, slots
from espalier.core.selection import Selection, select
from espalier.prune.connections import Connections
from espalier.prune.loss_terms import CompositeLoss, redundant_terms
from espalier.prune.snip import Snip
from espalier.train import Training
from espalier.train.fresh import initialise


@dataclass(frozen=True, kw_only=True)
class LossPrune(Training):
    """Re-initialises, prunes ``layers`` (patterns) to ``sparsity`` together by ``connections``, trains.

    ``terms``: a term of a CompositeLoss is dropped that the others explain to a cosine above it, judged on
    ``batches`` batches; None keeps all. ``densify``: what earlier steps have fixed may be given up.
    """

    id: ClassVar[str] = "loss-prune"
    epochs: Epochs = 10
    sparsity: Sparsity = 0.9
    connections: Connections = field(default_factory=Snip)
    layers: tuple[str, ...] = ("*",)
    terms: Fraction | None = None
    batches: Batches = 8
    densify: bool = False

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """A fresh network, masked, then trained."""
        for slot in slots(model).values():
            require_phase(slot, ("dense",), self.name, densify=self.densify)
        done, left = initialise(model, context)
        context.note(
            f"{self.name} gave {len(done)} layers fresh values: what the model had learned there is gone."
            + (f" Left as they were: {', '.join(path or 'the model itself' for path in left)}." if left else "")
        )
        selection = self._choose(model, context)
        with self._redefined(model, selection, context):
            kept = self.connections.kept(model, selection, self.sparsity, context)
            for slot in selection:
                if not bool(kept[slot.name].all()):
                    attach(slot, Mask(kept[slot.name].clone()))
            context.record.details["sparsity"] = {name: 1 - float(mask.float().mean()) for name, mask in kept.items()}
            self.train(model, context)
        return model

    def _choose(self, model: nn.Module, context: Context) -> Selection:
        selection = select(model, self.layers, who=self.name)
        for name, slot in slots(model).items():
            if name not in selection.names and slot.latent.ndim >= 2:
                context.skip(name, "not among the chosen layers")
            elif name in selection.names and not slot.latent.requires_grad:
                context.skip(name, "frozen: it was not initialised afresh")
        return selection.where(lambda slot: slot.latent.requires_grad)

    @contextmanager
    def _redefined(self, model: nn.Module, selection: Selection, context: Context) -> Iterator[None]:
        """Within the block the task's loss lacks its redundant terms."""
        if self.terms is None:
            yield
            return
        task = context.data
        if not isinstance(task.loss, CompositeLoss):
            raise NeedError(
                f"{self.name}: terms={self.terms:g} looks for redundant terms of the loss, but the task's loss is one "
                "function. Give Task(loss=espalier.prune.CompositeLoss({name: (factor, term)})), or leave terms unset."
            )
        found = redundant_terms(
            model, task.loss, context, selection=selection, count=self.batches, threshold=self.terms
        )
        context.record.details["loss terms"] = found.details()
        if found.redundant:
            context.note(f"dropped from the loss, as the other terms explain them: {', '.join(found.redundant)}.")
        try:
            context.task = dataclasses.replace(task, loss=task.loss.without(found.redundant))
            yield
        finally:
            context.task = task
