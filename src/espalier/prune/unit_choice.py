"""Which units go: what is ranked together, whole multiples, and the least removal that fits a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.core.parametrize import slots
from espalier.core.selection import Selection
from espalier.graph.channels import Group
from espalier.prune.parts import Scope

Chosen = dict[str, NDArray[np.bool_]]
"""Group name -> mask over its units: what goes."""


def ranked_together(scope: Scope, model: nn.Module, groups: Sequence[Group]) -> list[list[str]]:
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


def in_multiples(gone: Tensor, scores: Tensor, multiple: int) -> NDArray[np.bool_]:
    """The mask with the number of kept units at the nearest multiple; a group of one multiple or less stays whole."""
    size, kept = len(gone), int((~gone).sum())
    if multiple > 1 and kept < size:
        wanted = min(size, max(multiple, int(kept / multiple + 0.5) * multiple))
        order = torch.argsort(torch.where(gone, scores - scores.abs().max() * 2 - 1, scores), stable=True)
        gone = torch.zeros_like(gone)
        gone[order[: size - wanted]] = True
    return gone.cpu().numpy().astype(np.bool_)


def bisected(
    rank: Callable[[float], Chosen], cost: Callable[[Chosen], float], target: float, rounds: int
) -> tuple[Chosen, Chosen]:
    """The two removals around ``target`` after ``rounds`` halvings: one that leaves more, and one that does not.

    ``rank``: what goes at a sparsity; ``cost``: what that leaves. Where ``target`` is out of reach the second is all
    that can go.
    """
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(rank(middle)) > target else (low, middle)
    return rank(low), rank(high)


def between(less: Chosen, more: Chosen, order: Sequence[str], cost: Callable[[Chosen], float], target: float) -> Chosen:
    """The least removal that leaves no more than ``target``: from ``less`` towards ``more``, group by group.

    ``order``: the groups, in the order they are tried.
    """
    chosen = less
    for name in order:
        trial = {**chosen, name: more[name]}
        if cost(trial) >= target:
            chosen = trial
    if cost(chosen) > target:
        trials = [{**chosen, name: more[name]} for name in order]
        fitting = [trial for trial in trials if cost(trial) <= target]
        chosen = max(fitting, key=cost, default=more)
    return chosen
