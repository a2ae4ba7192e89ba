"""Removing units for real, at once or while training: what the structural patterns (channels, heads) share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.fields import Multiple
from espalier.core.model import copy_model
from espalier.core.plan import Plan
from espalier.core.selection import select
from espalier.graph import Runner
from espalier.graph.channels import ChannelGroups, Group
from espalier.graph.channels.surgery import remove
from espalier.graph.edit import AsGraph
from espalier.prune.analysis import analyse
from espalier.prune.parts import Watcher, WatchingCriterion
from espalier.prune.removing import Removing, final_sparsity, settled
from espalier.prune.unit_removal import Measure, Removal

if TYPE_CHECKING:
    from espalier.prune.prune import Prune


@dataclass(frozen=True, kw_only=True)
class Structural(Removing):
    """A pattern that removes units of channel groups.

    ``measure``: what ``sparsity`` is a fraction of: units in every group, or parameters, multiply-adds, bytes of the
    encoded weights (floats as fp16) or measured milliseconds (torch, one sample) of the whole model. ``multiple``: unit
    counts are rounded to it. ``normalise``: divide the scores of a group by their mean, so that groups of different
    cost compare. ``fold``: add the mean of what goes to the biases of what reads it. ``analyse``: first measure on val
    how the metric falls as each group alone loses units, for the report.
    """

    units: ClassVar[bool] = True
    measure: Measure = "units"
    multiple: Multiple = 1
    normalise: bool = True
    fold: bool = False
    analyse: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Data to take the means over, where they are folded."""
        return super().needs | ({"train"} if self.fold else set())

    @abstractmethod
    def groups(self, found: ChannelGroups) -> tuple[Group, ...]:
        """The groups this pattern takes units from."""

    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """Score, choose, remove."""
        return remove_units(method, model, context)


def remove_units(method: Prune, model: nn.Module, context: Context) -> nn.Module:
    """The structural path of ``prune.prune``."""
    assert isinstance(method.pattern, Structural)  # noqa: S101 - dispatched on it
    removal = Removal.of(method, method.pattern, model, context)
    final = final_sparsity(method)
    if method.pattern.analyse:
        context.record.details["sensitivity"] = analyse(removal, store=context.epochs("sensitivity"))
    if method.epochs:
        removal.model = _followable(removal)
        watcher = None
        if isinstance(method.criterion, WatchingCriterion):
            selection = select(removal.model, method.layers, who=method.name)
            watcher = method.criterion.watcher(removal.model, selection)
        remover = Remover(removal, watcher)
        callbacks = (remover,) if watcher is None else (watcher, remover)
        method.train(removal.model, context, callbacks=callbacks, settled=settled(method))
        if remover.reached < final:
            context.note(
                f"the training ended before the schedule; from {remover.reached:.1%} to {final:.1%} was removed after "
                "it. A train.finetune step would repair that."
            )
            remover.remove(final)
            removal.settle()
    else:
        removal.take(removal.choose(final, removal.scores()))
        removal.settle()
    details = removal.report()
    context.record.details |= details
    for name in details["boundaries"]:
        context.skip(name, "no channel rule for this operator; the channels that reach it stay whole")
    floors = [group["name"] for group in details["groups"] if group["after"] == 1 and group["before"] > 1]
    if floors:
        context.note(f"kept at one unit, the least there can be: {', '.join(floors[:8])}.")
    if details["form"] == "graph" and details["form_reason"]:
        context.note(f"the model's own code cannot follow ({details['form_reason']}); its rewritten graph is returned.")
    return removal.model


class Remover(Callback):
    """Removes units as the schedule asks, at the start of every epoch; the optimizer's state is cut along."""

    def __init__(self, removal: Removal, watcher: Watcher | None) -> None:
        self.removal, self.watcher, self.reached = removal, watcher, 0.0

    def on_epoch_start(self, loop: Loop) -> None:
        method = self.removal.method
        if self.watcher is None or loop.step:
            progress, final = method.schedule.at_epoch(loop.epoch, loop.epochs), final_sparsity(method)
            share = method.schedule.sparsity(progress, final)
            self.remove(share if share < final - 1e-9 else final, loop.optimizer)  # no last round for a rounding error

    def remove(self, share: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove until ``share`` is gone; nothing where that much is gone already."""
        if share <= self.reached:
            return
        trained = self.removal.model
        given = self.watcher.scores(trained) if self.watcher is not None else None
        cuts = self.removal.take(self.removal.choose(share, self.removal.scores(given)), optimizer)
        if optimizer is not None and self.removal.model is not trained:
            raise ModelError(
                f"{self.removal.method.name}: without the units of this round the code of {type(trained).__name__} "
                f"fails ({self.removal.removed[-1].reason}), and its graph cannot take its place while it trains. "
                "Remove them at once (epochs=0) and train in a step of its own (train.finetune)."
            )
        for cut in cuts:
            if self.watcher is not None:
                self.watcher.keep(cut.tensor, cut.take)
        self.reached = share

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]
        self.removal.look_again()  # the model was cut as it had been, from the plan


def _followable(removal: Removal) -> nn.Module:
    """The model, or its graph where its code cannot follow a removal: decided once, on trials, before training.

    Without half of every group sizes may still fit each other (half the width, half the heads); without the fewest that
    may go of each they do not.
    """
    if isinstance(removal.model, Runner):
        return removal.model
    rng = np.random.default_rng(0)
    for few in (True, False):
        chosen = {}
        for group in removal.candidates():
            multiple = min(removal.pattern.multiple, group.size)
            kept = (group.size - 1 if few else group.size // 2) // multiple * multiple or multiple
            mask = np.zeros(group.size, dtype=np.bool_)
            mask[rng.permutation(group.size)[: group.size - kept]] = True
            chosen[group.name] = mask
        trial = remove(copy_model(removal.model), removal.found, chosen, removal.args, removal.kwargs)
        if trial.kind == "graph":
            removal.context.note(f"the model's own code cannot follow ({trial.reason}); its graph is trained instead.")
            return Plan((AsGraph.of(removal.found.graph),)).apply(removal.model)
    return removal.model
