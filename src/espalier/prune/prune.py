r"""Pruning: any criterion with any pattern, scope and schedule, one-shot or while training.

Paper    Han et al. 2015, arXiv:1506.02626 (prune, retrain); Zhu, Gupta 2018, arXiv:1710.01878 (while training)
Formula  m <- m * [score above the cut];   w <- w * m
Departs  What is gone stays gone, so masks nest, except with ``regrow`` and for criteria that say otherwise.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Epochs, Fraction, Sparsity, Steps
from espalier.core.parametrize import Slot, require_phase, slots
from espalier.core.selection import Selection, matches, select
from espalier.prune.magnitude import Magnitude
from espalier.prune.masks import Masks, outputs_first
from espalier.prune.n_m import NM
from espalier.prune.parts import (
    Criterion,
    CutCriterion,
    FixedPattern,
    Pattern,
    Projection,
    Regrowth,
    Schedule,
    Scope,
    SolvingCriterion,
    WatchingCriterion,
)
from espalier.prune.projections import Projections
from espalier.prune.regrowth import MomentumRegrowth
from espalier.prune.removing import Removing
from espalier.prune.schedules import OneShot
from espalier.prune.scopes import Layer, Row
from espalier.prune.tensors import Tensors
from espalier.prune.weights import Weights
from espalier.train import SGD, Training
from espalier.train.restarted import Restarted


@dataclass(frozen=True, kw_only=True)
class Prune(Training):
    """Prune ``layers`` (patterns) to ``sparsity``; with ``epochs`` the schedule runs while training.

    ``sparsity``: one number, or pattern -> number for scope ``layer``. Without it the criterion, the pattern or the
    schedule decides. ``every``: optimizer steps between two mask updates. ``rewind``: after each jump of the schedule
    the kept weights go back to their values at the start of epoch ``rewind_epoch`` (counted from 0) and the learning
    rate starts anew, or (``lr``) only the latter. ``regrow``: the share of what is left that each mask update
    exchanges. ``densify``: codes fixed by an earlier step may be given up.
    """

    id: ClassVar[str] = "prune"
    epochs: Epochs = 0
    criterion: Criterion = field(default_factory=Magnitude)
    pattern: Pattern = field(default_factory=Weights)
    scope: Scope = field(default_factory=Layer)
    schedule: Schedule = field(default_factory=OneShot)
    sparsity: Sparsity | dict[str, Sparsity] | None = None
    layers: tuple[str, ...] = ("*",)
    every: Steps = 50
    rewind: Literal["none", "weights", "lr"] = "none"
    rewind_epoch: Epochs = 0
    regrow: Fraction = 0.0
    regrowth: Regrowth = field(default_factory=MomentumRegrowth)
    densify: bool = False

    def conflicts(self) -> list[str]:
        return [*super().conflicts(), *_amounts(self), *_combinations(self), *_training(self)]

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Mask, project or remove, training on the way where ``epochs`` says so."""
        if isinstance(self.pattern, Removing):
            return self.pattern.transform(self, model, context)
        selection = self._choose(model, context)
        pruner: Masks | Projections
        if isinstance(self.pattern, Projection):
            pruner = Projections(self, self.pattern, model, selection, context)
        else:
            pruner = Masks(self, model, selection, context)
        if self.epochs:
            watcher = pruner.watcher if isinstance(pruner, Masks) else None
            callbacks = (pruner,) if watcher is None else (watcher, pruner)
            self._paced().train(model, context, callbacks=callbacks, settled=self._settled())
        pruner.finish()
        return model

    def _paced(self) -> Training:
        """This technique with the learning rate of its rounds."""
        if self.rewind == "none":
            return self
        return self.replace(lr_schedule=Restarted(inner=self.lr_schedule, at=self.schedule.jumps))

    def _settled(self) -> int:
        """Epochs that begin before the schedule has reached its end: earlier weights are no candidates for the best.

        The masks of an epoch are those of an update inside it, so one that ends at the end of the schedule may still
        lack some. The last epoch always counts: :meth:`Masks.finish` brings it to the end.
        """
        asked = self.sparsity.values() if isinstance(self.sparsity, Mapping) else (self.sparsity,)
        finals = [final for final in asked if final is not None]

        def ended(progress: float) -> bool:
            there = (self.schedule.sparsity(progress, final) >= self.schedule.sparsity(1.0, final) for final in finals)
            return self.schedule.share(progress) >= 1 and all(there)

        return sum(not ended(epoch / self.epochs) for epoch in range(self.epochs - 1))

    def _choose(self, model: nn.Module, context: Context) -> Selection:
        asked = _with_vectors(model, self.layers, self.name) if self.pattern.vectors else None
        selection = asked if asked is not None else select(model, self.layers, who=self.name)
        last = selection.names[-1:] if self.pattern.units and self.layers == ("*",) and selection.count > 1 else ()
        chosen = []
        for slot in selection:
            reason = "its units are the model's outputs; name it in layers to prune them" if slot.name in last else None
            reason = reason or self._refusal(slot)
            if reason is not None:
                context.skip(slot.name, reason)
                continue
            require_phase(slot, self._phases(), self.name, densify=self.densify)
            if not bool(torch.isfinite(slot.value()).all()):
                raise NumericError(
                    f"{slot.name} holds NaN or infinity; {self.name} cannot rank it. Train with a lower learning rate."
                )
            chosen.append(slot)
        for name, slot in slots(model).items():
            if name not in selection.names and slot.latent.ndim >= 2:
                context.skip(name, "not among the chosen layers")
        return Selection(tuple(chosen))

    def _phases(self) -> tuple[Any, ...]:
        return ("dense",) if isinstance(self.pattern, Projection) else ("dense", "mask")

    def _refusal(self, slot: Slot) -> str | None:
        """Why pattern or criterion cannot take this weight."""
        reason = self.pattern.unfit(slot) or self.pattern.refuses(outputs_first(slot, slot.value()).shape)
        if reason is None and isinstance(self.criterion, SolvingCriterion):
            reason = self.criterion.refuses(slot)
        return reason


def _with_vectors(model: nn.Module, layers: tuple[str, ...], who: str) -> Selection | None:
    """What ``layers`` chooses where it names vectors by their own name (``conv1.bias``, ``*.bias``); else None."""
    everything = [slot for slot in slots(model).values() if slot.latent.is_floating_point()]
    exact = [pattern for pattern in layers if not pattern.startswith(("#", "type:")) and not pattern.endswith("*")]
    named = {
        slot.name for slot in everything if slot.latent.ndim < 2
        for pattern in exact if any(fnmatch.fnmatchcase(name, pattern) for name in slot.names)
    }  # fmt: skip
    if not named:
        return None
    others = [pattern for pattern in layers if pattern not in exact or not _only_vectors(everything, pattern)]
    found = set(select(model, tuple(others), who=who).names) if others else set[str]()
    return Selection(tuple(slot for slot in everything if slot.name in named | found))


def _only_vectors(everything: list[Slot], pattern: str) -> bool:
    return not any(slot.latent.ndim >= 2 and matches(pattern, slot, -1) for slot in everything) and any(
        matches(pattern, slot, -1) for slot in everything
    )


def _amounts(method: Prune) -> list[str]:
    """Who decides how much goes."""
    found = []
    if isinstance(method.criterion, CutCriterion) and method.sparsity is not None:
        found.append(f"criterion {method.criterion.id} decides the sparsity itself; leave sparsity unset")
    if isinstance(method.criterion, CutCriterion) and not isinstance(method.scope, Layer):
        found.append(
            f"criterion {method.criterion.id} cuts each layer at its own threshold, so scope={method.scope.id} has no "
            "say; give scope=layer, whose floor it keeps"
        )
    if isinstance(method.pattern, FixedPattern) and method.sparsity is not None:
        found.append(f"pattern {method.pattern.id} decides the sparsity itself; leave sparsity unset")
    if isinstance(method.pattern, FixedPattern) and not isinstance(method.scope, Layer):
        found.append(f"pattern {method.pattern.id} chooses inside its groups; scope={method.scope.id} has no say")
    if isinstance(method.sparsity, Mapping) and not isinstance(method.scope, (Layer, Row)):
        found.append(f"a sparsity per pattern needs scope=layer; got scope={method.scope.id}")
    if method.schedule.final is not None and method.sparsity not in (None, method.schedule.final):
        found.append(
            f"schedule {method.schedule.id} ends at {method.schedule.final:g}; leave sparsity={method.sparsity} unset"
        )
    return found


def _combinations(method: Prune) -> list[str]:
    """Criteria, patterns and scopes that make no sense together."""
    criterion, pattern, scope = method.criterion, method.pattern, method.scope
    found = pattern.misfits(method) if isinstance(pattern, Removing) else []
    if criterion.of == "units" and not pattern.units:
        found.append(f"criterion {criterion.id} scores output units; pattern {pattern.id} does not group by them")
    if isinstance(criterion, CutCriterion) and not isinstance(pattern, Weights):
        found.append(f"criterion {criterion.id} cuts single weights; it needs pattern=weights, got {pattern.id}")
    if isinstance(scope, Row) and not pattern.rows:
        found.append(f"scope row ranks inside each output; the groups of pattern {pattern.id} are not parts of one")
    if isinstance(pattern, Tensors) and isinstance(scope, Layer):
        found.append("pattern tensors ranks whole weights against each other; give scope=global or apart")
    if isinstance(pattern, Projection) and not isinstance(criterion, Magnitude):
        found.append(
            f"pattern {pattern.id} ranks singular values by their magnitude; criterion {criterion.id} has no say"
        )
    if isinstance(criterion, SolvingCriterion):
        if not isinstance(pattern, (Weights, NM)) or not isinstance(scope, Layer):
            found.append(f"criterion {criterion.id} solves layer by layer: pattern=weights or n-m, scope=layer")
        elif isinstance(pattern, NM) and not isinstance(method.schedule, OneShot):
            found.append(f"criterion {criterion.id} finds all groups of {pattern.id} at once: schedule=one-shot")
    return found + _floors(method)


def _floors(method: Prune) -> list[str]:
    """Who keeps no floor."""
    criterion, pattern, floor = method.criterion, method.pattern, f"floor={method.scope.floor:g}"
    if not method.scope.floor:
        return []
    found = []
    if isinstance(criterion, SolvingCriterion):
        found.append(f"criterion {criterion.id} removes what is asked of each layer; {floor} has no say, leave it at 0")
    if isinstance(pattern, FixedPattern):
        found.append(f"pattern {pattern.id} keeps its own share of every group; {floor} has no say, leave it at 0")
    if pattern.empties:
        found.append(f"pattern {pattern.id} removes layers as a whole; {floor} has no say, leave it at 0")
    return found


def _training(method: Prune) -> list[str]:
    """What only makes sense in a training, or not in this one."""
    criterion, found = method.criterion, []
    if isinstance(criterion, WatchingCriterion) and (not method.epochs or method.schedule.share(0.0) > 0):
        found.append(
            f"criterion {criterion.id} judges by what it saw in training: give epochs, and a schedule that starts "
            f"at 0 (linear, cubic); got epochs={method.epochs}, schedule={method.schedule.id}"
        )
    since = method.rewind_epoch if method.rewind == "weights" else 0
    if method.epochs and since >= method.epochs:
        found.append(
            f"rewind_epoch={since} never comes: epochs={method.epochs} count from 0; give {method.epochs - 1} at most"
        )
    elif method.rewind != "none" and not any(at * method.epochs > since + 1e-9 for at in method.schedule.jumps):
        found.append(
            f"rewind={method.rewind} goes back after every round that begins later than epoch {since}, and there is "
            "none: give epochs and a schedule of several rounds (percentile, listed); "
            f"got epochs={method.epochs}, schedule={method.schedule.id}"
        )
    if method.rewind == "weights" and isinstance(method.pattern, Projection):
        found.append(f"rewind=weights needs masks; pattern {method.pattern.id} has none")
    if method.regrow:
        if not isinstance(method.pattern, Weights) or isinstance(criterion, (CutCriterion, SolvingCriterion)):
            found.append("regrow exchanges single weights: it needs pattern=weights and a criterion that ranks")
        if not method.epochs:
            found.append("regrow needs epochs: connections come back during training")
        if isinstance(method.regrowth, MomentumRegrowth) and isinstance(method.optimizer, SGD):
            found += [] if method.optimizer.momentum else ["momentum-regrowth needs an optimizer with momentum"]
    return found
