r"""Causality pruning: intervene instead of correlate, from the last layer back to the first.

Paper    none (the form of this project's method list); related, not the same: the average causal effect of
         Chattopadhyay, Manupriya, Sarkar, Balasubramanian. Neural Network Attributions: A Causal Perspective. ICML
         2019. arXiv:1902.02302
Formula  remove the set S if agreement(do(a_u = 0 for u in S and all removed before)) >= agreement - tolerance;
         units of a layer are ordered by |sum_x a_u(x) . dL/da_u(x)| and tested in groups by bisection
Departs  do(a_u = 0) only. The tolerance is spent evenly: after k of n layers k / n of it at most. Coupled layers are
         one layer. The early end of the walk is an option, until_agreement.
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
from espalier.core.errors import DataError
from espalier.core.fields import Count, Fraction
from espalier.core.method import Technique
from espalier.core.metric import first_tensor
from espalier.core.model import device_of
from espalier.core.parametrize import slots
from espalier.core.selection import Selection, select
from espalier.core.task import capture_call, to_device
from espalier.graph.channels import Group
from espalier.graph.channels.surgery import groups_of, remove
from espalier.graph.edit import state_of
from espalier.graph.runner import inputs_of
from espalier.prune.channels import default_groups
from espalier.prune.interventions import Interventions, Units
from espalier.prune.sensitivity import Sensitivity
from espalier.prune.structure import unit_scores


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


@dataclass(frozen=True, kw_only=True)
class Causality(Technique):
    """Removes units of ``layers`` (patterns) that the output does not need.

    ``against``: the labels, or the model's own first answers (no labels needed). ``tolerance``: the share of the
    ``samples`` on which agreement may be lost. ``floor``: the smallest share of a group that stays.
    ``until_agreement``: end after the first layer that leaves the output right wherever it was right before.
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
        args, kwargs = capture_call(task, model, to_device(task.example(), device_of(model)))
        found = groups_of(model, args, kwargs)
        chunks, labels = self._data(model, context, found.graph)
        world = Interventions(found, {**state_of(model), **found.graph.constants}, chunks)
        nothing = np.zeros(found.flow.atoms.count, dtype=np.bool_)
        world.hold(0, nothing)
        first = world.outputs(nothing).argmax(1)
        goal = first if self.against == "predictions" or labels is None else labels
        right = first == goal
        groups = sorted(self._groups(model, found), key=world.first_reader, reverse=True)
        scores = self._order(model, groups, context)
        chosen: dict[str, Units] = {}
        for number, group in enumerate(groups, 1):
            spare = int(self.tolerance * len(goal) * number / len(groups))
            world.hold(world.first_reader(group), found.removed_atoms(chosen))
            needed = int(right.sum()) - spare
            chosen[group.name] = self._walk(world, group, scores[group.name], chosen, goal, needed)
            now = world.outputs(found.removed_atoms(chosen)).argmax(1) == goal
            gone = sum(int(mask.sum()) for mask in chosen.values())
            context.progress("layers", number, len(groups), removed=gone, agreement=float(now.float().mean()))
            if self.until_agreement and gone and bool(now[right].all()):
                break
            if context.out_of_time():
                context.note(f"stopped after {number} of {len(groups)} layers: the time is up.")
                break
        world.hold(0, nothing)
        after = world.outputs(found.removed_atoms(chosen)).argmax(1) == goal
        context.record.details |= {
            "interventions": world.count,
            "agreement": {
                "before": float(right.float().mean()),
                "after": float(after.float().mean()),
                "samples": len(goal),
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
            held = bool(int((world.outputs(atoms).argmax(1) == goal).sum()) >= needed)
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
        selection = Selection(tuple(slot for slot in slots(model).values() if slot.latent.ndim > 1))
        return unit_scores(groups, criterion.scores(model, selection, context), criterion)

    def _data(self, model: nn.Module, context: Context, graph: Any) -> tuple[list[list[Tensor]], Tensor | None]:
        """Inputs of the graph for the first ``samples`` of train, batch by batch, and their labels."""
        task, device = context.data, device_of(model)
        chunks: list[list[Tensor]] = []
        labels: list[Tensor] = []
        seen = 0
        for batch in task.data("train"):
            args, kwargs = capture_call(task, model, to_device(batch, device))
            chunks.append(inputs_of(graph, args, kwargs))
            target = task.target(to_device(batch, device))
            if target is not None:
                labels.append(target)
            seen += len(first_tensor(chunks[-1]))
            if seen >= self.samples:
                break
        if not seen:
            raise DataError(f"{self.name}: the train loader gave no batch to intervene on.")
        return chunks, torch.cat(labels) if labels else None
