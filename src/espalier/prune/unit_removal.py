"""One model on its way to fewer units: its groups, their scores, what goes, and the surgery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from espalier import encode
from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError
from espalier.core.keep import Keep
from espalier.core.model import copy_model, device_of
from espalier.core.norms import Normalise
from espalier.core.parametrize import freeze, plain, slots
from espalier.core.selection import Selection, select
from espalier.core.task import capture_call, to_device
from espalier.deploy.check import resized
from espalier.graph import Runner
from espalier.graph.channels import ChannelGroups, Group, channel_groups, cost
from espalier.graph.channels.rewrite import Gone, indices, taken, without
from espalier.graph.channels.surgery import Removed, groups_of, remove
from espalier.graph.edit import state_of
from espalier.measure.speed import latency
from espalier.prune.folding import fold_means
from espalier.prune.parts import Scores
from espalier.prune.removing import final_sparsity
from espalier.prune.unit_choice import Chosen, between, bisected, in_multiples, ranked_together
from espalier.prune.unit_scores import transposed_weights, unit_scores
from espalier.train.batch_norm import reestimate

if TYPE_CHECKING:
    from espalier.prune.prune import Prune
    from espalier.prune.structure import Structural

Measure = Literal["units", "parameters", "macs", "bytes", "ms"]

BISECTIONS, FEW_BISECTIONS = 24, 6
REESTIMATED = 32
"""Batches that batch-norm statistics are estimated on after a one-shot removal."""


@dataclass
class Removal:
    """One model on its way to fewer units. ``removed``: what was taken so far.

    What there was at the ``start`` of the step (and ``before``, in the unit of the pattern's measure) is found out when
    this is made, of the model that was given: a training that goes on later makes it of the same one.
    """

    method: Prune
    pattern: Structural
    model: nn.Module
    context: Context
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: ChannelGroups
    removed: list[Removed]
    folded: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, method: Prune, pattern: Structural, model: nn.Module, context: Context) -> Removal:
        """Trace and analyse ``model``. Raises ModelError where it cannot be traced or nothing can be removed."""
        task = context.data
        args, kwargs = capture_call(task, model, to_device(task.example(), device_of(model)))
        return cls(method, pattern, model, context, args, kwargs, groups_of(model, args, kwargs), [])

    def __post_init__(self) -> None:
        flow = self.found.flow
        nothing = np.zeros(flow.atoms.count, dtype=np.bool_)
        self.whole = self.candidates()
        self.start = {group.name: group.size for group in self.whole}
        self.parameters = cost.parameters(flow, nothing)
        self.macs = cost.multiply_adds(flow, nothing)
        if not self.start:
            why = "; ".join(f"{p.tensor} dimension {p.dim}: {p.reason}" for p in self.found.protected[:6])
            raise ModelError(
                f"{self.method.name}: pattern {self.pattern.id} finds nothing it may remove in "
                f"{type(self.model).__name__}. Protected: {why or 'no parameter with two channels or more'}."
            )
        self.before = self.left()

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
        """The lowest units at ``sparsity`` of the units there were at the start, floor and multiple kept.

        The scope sees all of those, what is gone lowest of all: share and floor are of the start, in every round.
        """
        there = {group.name: group for group in self.candidates()}
        down_to_one = [group for group in self.whole if group.name not in there]
        scored = [group for group in there.values() if group.name in scores]
        only = torch.full((1,), torch.inf, dtype=torch.float64)
        ever = {group.name: self._with_the_gone(group.name, scores[group.name]) for group in scored}
        ever |= {group.name: self._with_the_gone(group.name, only) for group in down_to_one}
        chosen: Chosen = {}
        for names in ranked_together(self.method.scope, self.model, [*scored, *down_to_one]):
            picked = self.method.scope.removed({name: ever[name] for name in names}, min(sparsity, 1 - 1e-9))
            for name in names:
                if name in there:
                    gone = picked[name][: len(scores[name])]
                    chosen[name] = in_multiples(gone, scores[name], self.pattern.multiple)
        return chosen

    def _with_the_gone(self, name: str, score: Tensor) -> Tensor:
        """The scores of a group, and ``-inf`` for every unit it has lost since the start."""
        lost = max(0, self.start.get(name, len(score)) - len(score))
        return torch.cat([score, score.new_full((lost,), -torch.inf)])

    def _solved(self, scores: dict[str, Tensor], sparsity: float) -> Chosen:
        """The least removal that leaves no more than asked: bisected over the ranking, then group by group."""
        target = (1 - sparsity) * self.before
        rounds = BISECTIONS if self.pattern.measure in ("parameters", "macs") else FEW_BISECTIONS
        less, more = bisected(lambda share: self._ranked(scores, share), self.left, target, rounds)
        if sparsity >= final_sparsity(self.method) and (least := self.left(more)) > target * 1.02:
            self.context.note(
                f"the {self.pattern.measure} asked for cannot be reached: {least / self.before:.1%} is the least that "
                "floor and protected layers allow."
            )
        if self.pattern.measure in ("bytes", "ms"):
            return more
        order = sorted(more, key=lambda name: -self.start.get(name, 0))
        return between(less, more, order, self.left, target)

    def left(self, chosen: Chosen | None = None) -> float:
        """What there is without the chosen units, in the unit of the pattern's measure."""
        chosen, flow = chosen or {}, self.found.flow
        match self.pattern.measure:
            case "units":
                return float(sum(self.sizes().values()) - sum(mask.sum() for mask in chosen.values()))
            case "parameters":
                return float(cost.parameters(flow, self.gone(chosen)))
            case "macs":
                return cost.multiply_adds(flow, self.gone(chosen))
            case "bytes":
                return self._bytes(chosen)
            case "ms":
                return self._milliseconds(chosen)

    def sizes(self) -> dict[str, int]:
        """Units of every group as it is now; one where a group has only its last left."""
        return dict.fromkeys(self.start, 1) | {group.name: group.size for group in self.candidates()}

    def measured(self, chosen: Chosen | None = None) -> dict[str, Any]:
        """The measure's ``name``, what there was ``before`` the step, is ``after`` it, and may be left as ``asked``."""
        return {
            "name": self.pattern.measure, "before": self.before, "after": self.left(chosen),
            "asked": (1 - final_sparsity(self.method)) * self.before,
        }  # fmt: skip

    def _bytes(self, chosen: Chosen) -> float:
        """Length of the weights if they were written now (floats as fp16, the portable coders)."""
        model, normalise = self.model, Normalise()
        statistics = normalise.statistics(model)
        if statistics:  # a file holds a scale and a shift in their place
            model = copy_model(model)
            normalise.apply(model)
        tensors, aliases = freeze(model)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in statistics}
        aliases = {name: target for name, target in aliases.items() if name not in statistics}
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
        now = self.sizes()
        reasons = [done.reason for done in self.removed if done.reason]
        return {
            "groups": [{"name": name, "before": size, "after": now[name]} for name, size in self.start.items()],
            "parameters": {"before": self.parameters, "after": cost.parameters(flow, nothing)},
            "macs": {"before": round(self.macs), "after": round(cost.multiply_adds(flow, nothing))},
            "protected": [vars(p) for p in self.found.protected],
            "boundaries": list(self.found.boundaries),
            "measure": self.measured(),
            "folded": sorted(self.folded),
            "form": self.removed[-1].kind if self.removed else "module",
            "form_reason": reasons[-1] if reasons else "",
            "difference": max((done.difference for done in self.removed), default=0.0),
        }
