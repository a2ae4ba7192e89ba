r"""Attention heads, and the other dimensions of a transformer, removed for real.

Paper    Michel, Levy, Neubig. Are Sixteen Heads Really Better than One? NeurIPS 2019. arXiv:1905.10650
Formula  heads: all weights of a head in the query, key, value and output projections;   width: the same place of
         every head;   feed-forward: a hidden neuron of an MLP;   hidden: a channel of the residual stream
Departs  Ranked by any criterion; the paper's gate gradient is criterion sensitivity with form taylor. Heads are
         found in the graph, also in fused projections, and grouped queries go with their key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from espalier.graph.channels import ChannelGroups, Group
from espalier.prune.structure import Structural


@dataclass(frozen=True, kw_only=True)
class Heads(Structural):
    """``part``: which dimension. Whole heads, their width, the width of the MLPs, or the residual stream."""

    id: ClassVar[str] = "heads"
    part: Literal["heads", "width", "feed-forward", "hidden"] = "heads"

    def groups(self, found: ChannelGroups) -> tuple[Group, ...]:
        if self.part in ("heads", "width"):
            return tuple(group for group in found.groups if group.kind == self.part)
        channels = [group for group in found.groups if group.kind == "channels"]
        attention = {
            place.tensor for group in found.groups if group.kind in ("heads", "width") for place in group.places
        }
        hidden = {group.name for group in channels if attention & set(group.tensors)}
        return tuple(group for group in channels if (group.name in hidden) == (self.part == "hidden"))
