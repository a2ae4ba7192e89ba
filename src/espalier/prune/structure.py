"""Removing units for real: which groups, how their units are scored, which go, and the surgery.

Used by the structural patterns (channels, heads). A unit's score gathers the contributions of every weight that goes
with it, across all the layers it couples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from espalier import encode
from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError, UsageError
from espalier.core.fields import Multiple
from espalier.core.model import device_of
from espalier.core.parametrize import freeze, plain, slots
from espalier.core.plan import Keep
from espalier.core.selection import Selection, select
from espalier.core.task import capture_call, to_device
from espalier.deploy.check import resized
from espalier.graph import Runner
from espalier.graph.channels import ChannelGroups, Group, Place, channel_groups, cost
from espalier.graph.channels.rewrite import Gone, indices, taken, without
from espalier.graph.channels.surgery import Removed, groups_of, remove
from espalier.graph.edit import state_of
from espalier.measure.speed import latency
from espalier.prune.folding import fold_means
from espalier.prune.parts import Criterion, Pattern, Reduction, Scope, Scores, Watcher, WatchingCriterion
from espalier.train.batch_norm import reestimate

if TYPE_CHECKING:
    from espalier.prune.prune import Prune

Measure = Literal["units", "parameters", "macs", "bytes", "ms"]
Chosen = dict[str, NDArray[np.bool_]]
"""Group name -> mask over its units: what goes."""

BISECTIONS, FEW_BISECTIONS = 24, 6
REESTIMATED = 32
"""Batches that batch-norm statistics are estimated on after a one-shot removal."""


@dataclass(frozen=True, kw_only=True)
class Removing(Pattern):
    """A pattern whose groups are removed, not masked: it does the whole work of ``prune.prune`` itself."""

    rows: ClassVar[bool] = False

    @abstractmethod
    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """What ``method`` does to ``model``, a copy it owns."""

    def misfits(self, method: Prune) -> list[str]:
        """Fields of ``method`` that mean nothing where something is removed."""
        found = []
        if method.rewind != "none":
            found.append(f"rewind={method.rewind} goes back to earlier weights; pattern {self.id} has removed some")
        if isinstance(method.sparsity, Mapping):
            found.append(f"pattern {self.id} takes one sparsity, not one per layer")
        return found

    def no_say(self, method: Prune, *, criterion: bool, scope: bool) -> list[str]:
        """Sentences about parts that were chosen but would not be asked."""
        found = []
        if criterion and type(method.criterion).id != "magnitude":
            found.append(f"pattern {self.id} judges by itself; criterion {method.criterion.id} has no say")
        if scope and method.scope.id != "layer":
            found.append(f"pattern {self.id} ranks over the whole model; scope={method.scope.id} has no say")
        return found

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        """There are no masks to pool scores for."""
        raise UsageError(f"{self.name} removes; it has no masks.")

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        """There are no masks to spread."""
        raise UsageError(f"{self.name} removes; it has no masks.")


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


def unit_scores(
    groups: Sequence[Group], scores: Scores, criterion: Criterion, transposed: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Scores of the units of every group, shape (size,), from scores of weights or of output units.

    A group with a unit that nothing scores is left out. Layers that share units and are scored by the unit count alike,
    whatever the scale of their scores. ``transposed``: weight -> convolution groups where inputs are stored first.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        parts: list[tuple[Tensor, Tensor, int]] = []
        for place in group.places:
            score = scores.get(place.tensor)
            vector, each = (None, 0) if score is None else _along(score, place, criterion, transposed or {})
            if vector is not None:
                parts.append((torch.from_numpy(place.unit), vector[torch.from_numpy(place.index)], each))
        if criterion.of == "units" and len(parts) > 1:
            sizes = [float(vector.abs().mean().clamp_min(1e-30)) for _, vector, _ in parts]
            usual = sum(sizes) / len(sizes)
            parts = [(unit, vector * (usual / size), n) for (unit, vector, n), size in zip(parts, sizes, strict=True)]
        total = torch.zeros(group.size, dtype=torch.float64)
        count = torch.zeros(group.size, dtype=torch.float64)
        for unit, vector, each in parts:
            total.index_add_(0, unit, vector)
            count.index_add_(0, unit, torch.full((len(unit),), float(each), dtype=torch.float64))
        if bool((count > 0).all()):
            found[group.name] = _reduced(total, count, "mean" if criterion.of == "units" else criterion.reduction)
    return found


def transposed_weights(model: nn.Module) -> dict[str, int]:
    """Weight name -> groups of every transposed convolution."""
    return {
        slot.name: int(slot.module.groups)
        for slot in slots(model).values()
        if isinstance(slot.module, _ConvTransposeNd) and slot.owners[0][2] == "weight"
    }


def _along(
    score: Tensor, place: Place, criterion: Criterion, transposed: Mapping[str, int]
) -> tuple[Tensor | None, int]:
    """Contributions summed over every dimension but the place's, and how many weights each sum holds."""
    score, dim = score.detach().double().cpu(), place.dim
    if criterion.of == "units":
        if place.tensor in transposed:  # (inputs, outputs / groups, ...): one column stands for a unit of every group
            return (score.reshape(transposed[place.tensor], -1).mean(0), 1) if dim == 1 else (None, 0)
        return (score, 1) if dim == 0 else (None, 0)
    if criterion.reduction == "l1":
        score = score.abs()
    elif criterion.reduction == "l2":
        score = score.square()
    others = [n for n in range(score.ndim) if n != dim]
    return (score.sum(others) if others else score), score.numel() // max(1, score.shape[dim])


def _reduced(total: Tensor, count: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "l2":
        return total.sqrt()
    return total / count.clamp_min(1) if reduction == "mean" else total


@dataclass
class Removal:
    """One model on its way to fewer units. ``done``: what was taken so far."""

    method: Prune
    pattern: Structural
    model: nn.Module
    context: Context
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: ChannelGroups
    removed: list[Removed]
    folded: set[str] = field(default_factory=set)
    before: float | None = None

    @classmethod
    def of(cls, method: Prune, pattern: Structural, model: nn.Module, context: Context) -> Removal:
        """Trace and analyse ``model``. Raises ModelError where it cannot be traced or nothing can be removed."""
        task = context.data
        args, kwargs = capture_call(task, model, to_device(task.example(), device_of(model)))
        return cls(method, pattern, model, context, args, kwargs, groups_of(model, args, kwargs), [])

    def __post_init__(self) -> None:
        flow = self.found.flow
        nothing = np.zeros(flow.atoms.count, dtype=np.bool_)
        self.start = {group.name: group.size for group in self.candidates()}
        self.parameters = cost.parameters(flow, nothing)
        self.macs = cost.multiply_adds(flow, nothing)
        if not self.start:
            why = "; ".join(f"{p.tensor} dimension {p.dim}: {p.reason}" for p in self.found.protected[:6])
            raise ModelError(
                f"{self.method.name}: pattern {self.pattern.id} finds nothing it may remove in "
                f"{type(self.model).__name__}. Protected: {why or 'no parameter with two channels or more'}."
            )

    def candidates(self) -> tuple[Group, ...]:
        """The groups of the pattern whose layers were chosen."""
        groups = self.pattern.groups(self.found)
        if self.method.layers == ("*",):
            return groups
        chosen = set(select(self.model, self.method.layers, who=self.method.name).names)
        return tuple(
            group for group in groups if any(place.dim == 0 and place.tensor in chosen for place in group.places)
        )

    def scores(self, given: Scores | None = None) -> dict[str, Tensor]:
        """Unit scores by group. Raises NumericError for scores that are NaN."""
        method, groups = self.method, self.candidates()
        if given is None:
            selection = Selection(
                tuple(
                    slot
                    for slot in slots(self.model).values()
                    if slot.latent.is_floating_point() and slot.latent.ndim > 1
                )
            )
            with torch.no_grad():
                given = method.criterion.scores(self.model, selection, self.context)
        for name, score in given.items():
            if not bool(torch.isfinite(score).all()):
                raise NumericError(
                    f"criterion {method.criterion.id} gives NaN or infinity for {name}; its units cannot be ranked. "
                    "Look at that weight and at the data; a lower learning rate keeps weights finite."
                )
        found = unit_scores(groups, given, method.criterion, transposed_weights(self.model))
        for group in groups:
            if group.name not in found:
                self.context.skip(
                    group.name, f"criterion {method.criterion.id} has no scores for its units; left whole"
                )
        if groups and not found:
            raise ModelError(
                f"{method.name}: criterion {method.criterion.id} scores no group of {type(self.model).__name__} as a "
                "whole. Use one that scores weights (magnitude, sensitivity), or name other layers."
            )
        if self.pattern.normalise:
            found = {name: score / score.abs().mean().clamp_min(1e-30) for name, score in found.items()}
        return found

    def choose(self, sparsity: float, scores: dict[str, Tensor]) -> Chosen:
        """What goes so that ``sparsity`` of the start is gone, measured as the pattern says."""
        if self.pattern.measure == "units":
            return self._ranked(scores, sparsity)
        return self._solved(scores, sparsity)

    def _ranked(self, scores: dict[str, Tensor], sparsity: float) -> Chosen:
        """The lowest units at ``sparsity`` of the units there were at the start, floor and multiple kept."""
        groups = {group.name: group for group in self.candidates() if group.name in scores}
        chosen: Chosen = {}
        for names in _sets(self.method.scope, self.model, list(groups.values())):
            now = sum(groups[name].size for name in names)
            ever = sum(self.start.get(name, groups[name].size) for name in names)
            share = 1 - (1 - sparsity) * ever / now + 1e-9  # counts are rounded down: not one less by rounding error
            picked = self.method.scope.removed({name: scores[name] for name in names}, min(max(share, 0.0), 1 - 1e-9))
            for name, gone in picked.items():
                chosen[name] = _rounded(gone, scores[name], self.pattern.multiple)
        return chosen

    def _solved(self, scores: dict[str, Tensor], sparsity: float) -> Chosen:
        """The least removal that leaves no more than asked: bisected over the ranking, then group by group."""
        measure, costs = self._cost(), dict[float, float]()
        self.before = measure.start if self.before is None else self.before
        target = (1 - sparsity) * measure.start
        low, high = 0.0, 1.0
        rounds = BISECTIONS if self.pattern.measure in ("parameters", "macs") else FEW_BISECTIONS
        for _ in range(rounds):
            middle = (low + high) / 2
            costs[middle] = measure.of(self._ranked(scores, middle))
            low, high = (middle, high) if costs[middle] > target else (low, middle)
        chosen, further = self._ranked(scores, low), self._ranked(scores, high)
        if measure.of(further) > target * 1.02:
            self.context.note(
                f"the {self.pattern.measure} asked for cannot be reached: {measure.of(further) / measure.start:.1%} is "
                "the least that floor and protected layers allow."
            )
        if self.pattern.measure in ("bytes", "ms"):
            return further
        left = sorted(further, key=lambda name: -self.start.get(name, 0))
        for name in left:
            trial = {**chosen, name: further[name]}
            if measure.of(trial) >= target:
                chosen = trial
        if measure.of(chosen) > target:
            trials = [{**chosen, name: further[name]} for name in left]
            fitting = [trial for trial in trials if measure.of(trial) <= target]
            chosen = max(fitting, key=measure.of, default=further)
        return chosen

    def start_of(self, measure: Measure) -> float:
        """How much of ``measure`` there is before anything goes."""
        return float(sum(self.start.values())) if measure == "units" else self._cost().start

    def measured(self, chosen: Chosen, sparsity: float) -> dict[str, float]:
        """``before``, ``after`` and what was ``asked`` for, in the unit of the pattern's measure."""
        if self.pattern.measure == "units":
            before = float(sum(group.size for group in self.candidates()))
            after = before - float(sum(mask.sum() for mask in chosen.values()))
        else:
            found = self._cost()
            before, after = found.start, found.of(chosen)
        return {"before": before, "after": after, "asked": (1 - sparsity) * before}

    def _reached(self) -> dict[str, Any]:
        """What was asked for and what is left, in the unit of the pattern's measure."""
        name, final = self.pattern.measure, final_sparsity(self.method)
        if name == "units":
            before, after = float(sum(self.start.values())), float(sum(group.size for group in self.candidates()))
        else:
            after = self._cost().start
            before = after if self.before is None else self.before
        return {"name": name, "before": before, "after": after, "asked": (1 - final) * before}

    def _cost(self) -> _Cost:
        flow = self.found.flow
        if self.pattern.measure == "parameters":
            return _Cost(lambda chosen: cost.parameters(flow, self.gone(chosen)), self.parameters)
        if self.pattern.measure == "macs":
            return _Cost(lambda chosen: cost.multiply_adds(flow, self.gone(chosen)), self.macs)
        if self.pattern.measure == "bytes":
            return _Cost(self._bytes, self._bytes({}))
        return _Cost(self._milliseconds, self._milliseconds({}))

    def _bytes(self, chosen: Chosen) -> float:
        """Length of the weights if they were written now (floats as fp16, the portable coders)."""
        tensors, aliases = freeze(self.model)
        for name, dims in indices(self.found.flow, self.gone(chosen)).items():
            for dim, index in dims.items():
                if name in tensors:
                    tensors[name] = tensors[name].take(dim, index)
        return float(len(encode.encode(tensors, aliases=aliases, floats="fp16")))

    def _milliseconds(self, chosen: Chosen) -> float:
        call = (self.args, self.kwargs)
        args, kwargs = resized(call, 1) if self.found.graph.dynamic else call
        timed = latency({"": self.small(chosen)}, lambda model: model(*args, **kwargs), repeats=15, seconds=5.0)
        return timed[""].median_ms

    def small(self, chosen: Chosen) -> Runner:
        """The graph without the chosen units, to try it out; the model stays as it is."""
        gone = self.gone(chosen)
        bare = plain(self.model) if any(slot.form is not None for slot in slots(self.model).values()) else self.model
        tensors = {**state_of(bare), **self.found.graph.constants}
        graph = without(self.found.flow, gone)
        return Runner(graph, {name: taken(self.found.flow, name, tensors[name], gone) for name in graph.tensors})

    def gone(self, chosen: Chosen) -> Gone:
        """The atoms that go with the chosen units."""
        return self.found.removed_atoms(chosen)

    def take(self, chosen: Chosen, optimizer: torch.optim.Optimizer | None = None) -> tuple[Keep, ...]:
        """Remove for real; the model may become the runner of its graph. Returns what was cut, tensor by tensor."""
        if not any(mask.any() for mask in chosen.values()):
            return ()
        if self.pattern.fold:
            self.folded |= set(fold_means(self.model, indices(self.found.flow, self.gone(chosen)), self.context))
        done = remove(self.model, self.found, chosen, self.args, self.kwargs, optimizer=optimizer)
        self.model = done.model
        self.removed.append(done)
        self.found = channel_groups(done.graph)
        return tuple(edit for edit in done.plan.edits if isinstance(edit, Keep))

    def look_again(self) -> None:
        """Analyse the model as it is now; ``start`` stays."""
        self.found = groups_of(self.model, self.args, self.kwargs)

    def settle(self) -> None:
        """Batch-norm statistics of what is left, where there is data."""
        if self.context.task is not None and self.context.task.train is not None:
            reestimate(self.model, self.context, REESTIMATED)
        elif any(isinstance(m, _NormBase) and m.running_mean is not None for m in self.model.modules()):
            self.context.note(
                "batch-norm statistics are those of the whole network, because the task has no training data to "
                "estimate them on; with Task(train=...) the metric would usually be better."
            )

    def report(self) -> dict[str, Any]:
        """What was done, as plain data for the record."""
        flow = self.found.flow
        nothing = np.zeros(flow.atoms.count, dtype=np.bool_)
        now = {group.name: group.size for group in self.candidates()}
        reasons = [done.reason for done in self.removed if done.reason]
        return {
            "groups": [{"name": name, "before": size, "after": now.get(name, 1)} for name, size in self.start.items()],
            "parameters": {"before": self.parameters, "after": cost.parameters(flow, nothing)},
            "macs": {"before": round(self.macs), "after": round(cost.multiply_adds(flow, nothing))},
            "protected": [vars(p) for p in self.found.protected],
            "boundaries": list(self.found.boundaries),
            "measure": self._reached(),
            "folded": sorted(self.folded),
            "form": self.removed[-1].kind if self.removed else "module",
            "form_reason": reasons[-1] if reasons else "",
            "difference": max((done.difference for done in self.removed), default=0.0),
        }


@dataclass(frozen=True)
class Preview:
    """What a structural step would do, without doing it; plain data by :meth:`to_json`."""

    groups: tuple[dict[str, Any], ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    protected: tuple[dict[str, Any], ...]
    boundaries: tuple[str, ...]
    measure: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"groups": list(self.groups), "protected": list(self.protected)}


def preview(method: Prune, model: nn.Module, context: Context) -> Preview:
    """The plan of ``method`` on ``model``: groups, sizes before and after, what is protected and why."""
    if not isinstance(method.pattern, Structural):
        raise UsageError(f"pattern {method.pattern.id} masks weights; only structural patterns have a plan to show.")
    removal = Removal.of(method, method.pattern, model, context)
    final = final_sparsity(method)
    chosen = removal.choose(final, removal.scores())
    flow, gone = removal.found.flow, removal.gone(chosen)
    measure: dict[str, Any] = {"name": method.pattern.measure, **removal.measured(chosen, final)}
    rows = tuple(
        {
            "name": group.name,
            "kind": group.kind,
            "before": group.size,
            "after": group.size - int(chosen.get(group.name, np.zeros(0)).sum()),
            "tensors": group.tensors,
        }
        for group in removal.candidates()
    )
    return Preview(
        rows, (removal.parameters, cost.parameters(flow, gone)),
        (round(removal.macs), round(cost.multiply_adds(flow, gone))),
        tuple(vars(p) for p in removal.found.protected), removal.found.boundaries, measure,
    )  # fmt: skip


@dataclass(frozen=True)
class _Cost:
    of: Callable[[Chosen], float]
    start: float


def _sets(scope: Scope, model: nn.Module, groups: Sequence[Group]) -> list[list[str]]:
    """The groups that are ranked together: by the scope's own notion, or by the layers their units come out of."""
    together = getattr(scope, "together", None)
    if together is None:
        known = slots(model)
        source = {group.name: _source(group) for group in groups}
        selection = Selection(tuple(known[name] for name in dict.fromkeys(source.values()) if name in known))
        where = {name: number for number, names in enumerate(scope.apart(selection)) for name in names}
        key: dict[str, Any] = {group.name: where.get(source[group.name], 0) for group in groups}
    else:
        key = {group.name: together(group) for group in groups}
    sets: dict[Any, list[str]] = {}
    for group in groups:
        sets.setdefault(key[group.name], []).append(group.name)
    return list(sets.values())


def _source(group: Group) -> str:
    """The first weight whose outputs are the group's units."""
    return next((place.tensor for place in group.places if place.dim == 0), group.places[0].tensor)


def _rounded(gone: Tensor, scores: Tensor, multiple: int) -> NDArray[np.bool_]:
    """The mask with the number of kept units at the nearest multiple; a group of one multiple or less stays whole."""
    size, kept = len(gone), int((~gone).sum())
    if multiple > 1 and kept < size:
        wanted = min(size, max(multiple, int(kept / multiple + 0.5) * multiple))
        order = torch.argsort(torch.where(gone, scores - scores.abs().max() * 2 - 1, scores), stable=True)
        gone = torch.zeros_like(gone)
        gone[order[: size - wanted]] = True
    return gone.cpu().numpy().astype(np.bool_)


class Remover(Callback):
    """Removes units as the schedule asks, at the start of every epoch; the optimizer's state is cut along."""

    def __init__(self, removal: Removal, watcher: Watcher | None) -> None:
        self.removal, self.watcher, self.reached = removal, watcher, 0.0

    def on_epoch_start(self, loop: Loop) -> None:
        method = self.removal.method
        if self.watcher is None or loop.step:
            progress = method.schedule.at_epoch(loop.epoch, loop.epochs)
            self.remove(method.schedule.sparsity(progress, final_sparsity(method)), loop.optimizer)

    def remove(self, share: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove until ``share`` is gone; nothing where that much is gone already."""
        if share <= self.reached:
            return
        given = self.watcher.scores(self.removal.model) if self.watcher is not None else None
        for cut in self.removal.take(self.removal.choose(share, self.removal.scores(given)), optimizer):
            if self.watcher is not None:
                self.watcher.keep(cut.tensor, cut.take)
        self.reached = share

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]
        self.removal.look_again()  # the model was cut as it had been, from the plan


def final_sparsity(method: Prune) -> float:
    """The share that is gone at the end."""
    if isinstance(method.sparsity, Mapping):
        raise UsageError(f"{method.name}: pattern {method.pattern.id} takes one sparsity, not one per layer.")
    default = method.schedule.final if method.schedule.final is not None else method.criterion.default_sparsity
    return float(method.sparsity if method.sparsity is not None else default if default is not None else 0.5)


def remove_units(method: Prune, model: nn.Module, context: Context) -> nn.Module:
    """The structural path of ``prune.prune``."""
    assert isinstance(method.pattern, Structural)  # noqa: S101 - dispatched on it
    removal = Removal.of(method, method.pattern, model, context)
    final = final_sparsity(method)
    if method.pattern.analyse:
        from espalier.prune.analysis import analyse  # which builds on this file

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


def settled(method: Prune) -> int:
    """Epochs until the schedule has reached its end: earlier structures are no candidates for the best."""
    schedule, epochs = method.schedule, method.epochs
    return sum(schedule.share(schedule.at_epoch(epoch, epochs)) < 1 for epoch in range(epochs))


def _followable(removal: Removal) -> nn.Module:
    """The model, or its graph where its code cannot follow a removal: decided once, on a trial, before training."""
    from espalier.core.model import copy_model
    from espalier.core.plan import Plan
    from espalier.graph.edit import AsGraph

    if isinstance(removal.model, Runner):
        return removal.model
    rng = np.random.default_rng(0)
    chosen = {}
    for group in removal.candidates():
        mask = np.zeros(group.size, dtype=np.bool_)
        mask[rng.permutation(group.size)[: group.size // 2]] = True
        chosen[group.name] = mask
    trial = remove(copy_model(removal.model), removal.found, chosen, removal.args, removal.kwargs)
    if trial.kind == "module":
        return removal.model
    removal.context.note(f"the model's own code cannot follow ({trial.reason}); its graph is trained instead.")
    return Plan((AsGraph.of(removal.found.graph),)).apply(removal.model)
