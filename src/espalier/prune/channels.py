r"""Channels, filters and neurons removed for real, across every layer they couple.

Paper    Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning. CVPR 2023. arXiv:2301.12900
Formula  unit = the smallest set of indices that can go together;   score = reduction over all weights of the unit
Departs  Coupling follows from one rule per operator on the exported graph, not from gradients; operators without a rule
         are boundaries. Training with a group penalty is a step of its own (see regularize).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from espalier.graph.channels import ChannelGroups, Group
from espalier.prune.structure import Structural

COARSE = 4
"""Fewer own channels than this in every convolution group are left whole, where more convolution groups can go."""


def default_groups(found: ChannelGroups) -> tuple[Group, ...]:
    """Channels and heads; the width of heads, and whole convolution groups, only where these offer little."""
    heads = [group for group in found.groups if group.kind == "heads"]
    many = [group for group in found.groups if group.kind == "groups" and group.size >= COARSE]
    channels = [
        group
        for group in found.groups
        if group.kind == "channels" and not (group.size < COARSE and any(_overlap(group, other) for other in many))
    ]
    width = [g for g in found.groups if g.kind == "width" and not any(_overlap(g, other) for other in heads)]
    whole = [g for g in found.groups if g.kind == "groups" and not any(_overlap(g, other) for other in channels)]
    chosen = {group.name for group in (*channels, *heads, *width, *whole)}
    return tuple(group for group in found.groups if group.name in chosen)


def _overlap(a: Group, b: Group) -> bool:
    """Whether two groups take indices of the same dimension of a tensor."""
    mine = {(place.tensor, place.dim): place.index for place in a.places}
    return any(
        (place.tensor, place.dim) in mine and bool(np.isin(place.index, mine[place.tensor, place.dim]).any())
        for place in b.places
    )


@dataclass(frozen=True, kw_only=True)
class Channels(Structural):
    """Every channel that can go, attention heads included where ``heads``."""

    id: ClassVar[str] = "channels"
    heads: bool = True

    def groups(self, found: ChannelGroups) -> tuple[Group, ...]:
        groups = default_groups(found)
        return groups if self.heads else tuple(group for group in groups if group.kind not in ("heads", "width"))
