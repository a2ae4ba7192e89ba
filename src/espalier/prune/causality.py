r"""Causality pruning: intervene instead of correlate, from the last layer back to the first.

Paper    none (the form of this project's method list); related, not the same: the average causal effect of
         Chattopadhyay, Manupriya, Sarkar, Balasubramanian. Neural Network Attributions: A Causal Perspective. ICML
         2019. arXiv:1902.02302
Formula  remove the set S if agreement(do(a_u = 0 for u in S and all removed before)) >= agreement - tolerance;
         units of a layer are ordered by |sum_x a_u(x) . dL/da_u(x)| and tested in groups by bisection
Departs  do(a_u = 0) only. The order is that of the sum over all weights into and out of a unit of mean_m (g_m w)^2, g_m
         the gradient on mini-batch m (see sensitivity): what goes is what the interventions say, the order only says
         what they try first. The tolerance is spent evenly: after k of n layers k / n of it at most. Coupled layers
         are one layer. The early end of the walk is an option, until_agreement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError
from espalier.core.fields import Count, Fraction
from espalier.core.method import Technique
from espalier.core.metric import first_tensor
from espalier.core.model import device_of
from espalier.core.selection import select, weights
from espalier.core.task import capture_call, to_device
from espalier.graph.channels import Group
from espalier.graph.channels.rewrite import Gone
from espalier.graph.channels.surgery import groups_of, remove
from espalier.graph.edit import state_of
from espalier.graph.runner import inputs_of
from espalier.prune.channels import default_groups
from espalier.prune.decisions import decided, single, wanted
from espalier.prune.interventions import Interventions, Units
from espalier.prune.sensitivity import Sensitivity
from espalier.prune.unit_scores import unit_scores
from espalier.train.looking import batches, looking


def bisect(order: NDArray[np.int64], allowed: Callable[[NDArray[np.int64]], bool]) -> NDArray[np.int64]:
    """The positions of ``order`` that can go, tested in halves, each on top of all that were accepted.

    A set that is refused is split; a single one that is refused stays. At most 2 n tests, one if all can go.
    """
    if not len(order):
        return order
    if allowed(order):
        return order
    if len(order) == 1:
        return order[:0]
    middle = (len(order) + 1) // 2
    first = bisect(order[:middle], allowed)
    return np.concatenate([first, bisect(order[middle:], allowed)])


def said(world: Interventions, gone: Gone) -> Tensor:
    """All decisions on the data with ``gone`` cut out, (decisions,)."""
    return torch.cat([decided(answer).reshape(-1) for answer in world.each(gone)])


@dataclass(frozen=True, kw_only=True)
class Causality(Technique):
    """Removes units of ``layers`` (patterns) that the output's decisions do not need.

    A decision is the class of greatest logit along dimension 1, at every position if there are several, or the sign of
    a single logit. ``against``: the labels, or the model's own first answers (no labels needed). ``tolerance``: the
    share of the decisions on ``samples`` samples on which agreement may be lost. ``floor``: the smallest share of a
    group that stays. ``until_agreement``: end after the first layer that leaves right what was right before.
    """

    id: ClassVar[str] = "causality"
    against: Literal["labels", "predictions"] = "labels"
    tolerance: Fraction = 0.005
    samples: Count = 1000
    floor: Fraction = 0.0
    layers: tuple[str, ...] = ("*",)
    until_agreement: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Data, and labels to agree with."""
        return frozenset({"train", "labels"} if self.against == "labels" else {"train"})

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Walk back through the layers, then remove for real."""
        task = context.data
        with looking(model, context, grad=False):
            args, kwargs = capture_call(task, model, to_device(task.example(), device_of(model)))
        found = groups_of(model, args, kwargs)
        chunks, labels = self._data(model, context, found.graph)
        world = Interventions(found, {**state_of(model), **found.graph.constants}, chunks)
        nothing = np.zeros(found.flow.atoms.count, dtype=np.bool_)
        world.hold(0, nothing)
        first, goal = self._goal(world, nothing, labels)
        right, compared = first == goal, int((goal >= 0).sum())
        groups = sorted(self._groups(model, found), key=world.first_reader, reverse=True)
        scores = self._order(model, groups, context)
        chosen: dict[str, Units] = {}
        for number, group in enumerate(groups, 1):
            spare = int(self.tolerance * compared * number / len(groups))
            world.hold(world.first_reader(group), found.removed_atoms(chosen))
            needed = int(right.sum()) - spare
            chosen[group.name] = self._walk(world, group, scores[group.name], chosen, goal, needed)
            now = said(world, found.removed_atoms(chosen)) == goal
            gone = sum(int(mask.sum()) for mask in chosen.values())
            context.progress("layers", number, len(groups), removed=gone, agreement=int(now.sum()) / compared)
            if self.until_agreement and gone and bool(now[right].all()):
                break
            if context.out_of_time():
                context.note(f"stopped after {number} of {len(groups)} layers: the time is up.")
                break
        world.hold(0, nothing)
        after = said(world, found.removed_atoms(chosen)) == goal
        context.record.details |= {
            "interventions": world.count,
            "agreement": {
                "before": int(right.sum()) / compared,
                "after": int(after.sum()) / compared,
                "samples": sum(len(first_tensor(chunk)) for chunk in chunks),
                "decisions": compared,
            },
            "groups": [
                {
                    "name": g.name,
                    "before": g.size,
                    "after": g.size - int(chosen[g.name].sum()) if g.name in chosen else g.size,
                }
                for g in groups
            ],
        }
        if not any(mask.any() for mask in chosen.values()):
            return model
        return remove(model, found, chosen, args, kwargs).model

    def _walk(
        self, world: Interventions, group: Group, scores: Tensor, chosen: dict[str, Units], goal: Tensor, needed: int
    ) -> Units:
        """The units of one group that can go."""
        gone = np.zeros(group.size, dtype=np.bool_)
        most = group.size - max(1, int(np.ceil(self.floor * group.size)))

        def allowed(more: NDArray[np.int64]) -> bool:
            trial = gone.copy()
            trial[more] = True
            if trial.sum() > most:
                return False
            atoms = world.found.removed_atoms({**chosen, group.name: trial})
            held = int((said(world, atoms) == goal).sum()) >= needed
            if held:
                gone[more] = True
            return held

        bisect(torch.argsort(scores, stable=True).numpy(), allowed)
        return gone

    def _groups(self, model: nn.Module, found: Any) -> list[Group]:
        groups = default_groups(found)
        if self.layers == ("*",):
            return list(groups)
        names = set(select(model, self.layers, who=self.name).names)
        return [group for group in groups if any(p.dim == 0 and p.tensor in names for p in group.places)]

    def _order(self, model: nn.Module, groups: list[Group], context: Context) -> dict[str, Tensor]:
        """First-order effect of every unit; without labels of the model's own output."""
        criterion = Sensitivity(form="taylor", against="loss" if self.against == "labels" else "output")
        found = unit_scores(groups, criterion.scores(model, weights(model), context), criterion)
        return {group.name: torch.zeros(group.size) for group in groups} | found  # as they come where nothing scores

    def _data(self, model: nn.Module, context: Context, graph: Any) -> tuple[list[list[Tensor]], list[Any]]:
        """Inputs of the graph for the first ``samples`` of train, batch by batch, and their labels."""
        task, seen = context.data, 0
        chunks: list[list[Tensor]] = []
        labels: list[Any] = []
        with looking(model, context, grad=False):
            for batch in batches(model, context, self.samples, "samples"):
                args, kwargs = capture_call(task, model, batch)
                chunks.append(inputs_of(graph, args, kwargs))
                labels.append(task.target(batch))
                seen += len(first_tensor(chunks[-1]))
                if seen >= self.samples:
                    break
        return chunks, labels

    def _goal(self, world: Interventions, nothing: Gone, labels: list[Any]) -> tuple[Tensor, Tensor]:
        """The decisions of the whole model, and those to agree with; both (decisions,)."""
        first, goal, signs = list[Tensor](), list[Tensor](), False
        for answer, label in zip(world.each(nothing), labels, strict=True):
            first.append(decided(answer).reshape(-1))
            goal.append(wanted(label, answer).reshape(-1) if self.against == "labels" else first[-1])
            signs = single(answer)
        before, after = torch.cat(first), torch.cat(goal)
        if signs and bool((before == before[0]).all()):
            where = "above 0" if before[0] else "0 or below"
            raise ModelError(
                f"{self.name}: all {len(before)} single logits of the model are {where}, so they decide nothing and "
                "every unit would go. Let the model return the logit in place of the probability, give more samples of "
                "both kinds, or, for a regression, use prune.prune."
            )
        if not bool((after >= 0).any()):
            raise DataError(f"{self.name}: no label of train names a class; give labels, or against=predictions.")
        return before, after
