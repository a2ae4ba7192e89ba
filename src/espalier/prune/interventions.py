"""What a network still says when some of its units are cut out of the traced graph: run from a layer on, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.core.metric import first_tensor
from espalier.graph.channels import ChannelGroups, Group
from espalier.graph.channels.flow import all_labels
from espalier.graph.channels.reference import STATISTICS, SUMS, run_node
from espalier.graph.channels.rewrite import Gone
from espalier.graph.graph import Value, Weight, references
from espalier.graph.trees import fill

Units = NDArray[np.bool_]


@dataclass
class Interventions:
    """The graph of a model on fixed data, chunk by chunk. ``count``: interventions so far (each sees all the data).

    ``tensors``: every tensor of the graph by name; ``chunks``: inputs in the graph's order.
    """

    found: ChannelGroups
    tensors: Mapping[str, Tensor]
    chunks: Sequence[Sequence[Tensor]]
    count: int = 0
    start: int = 0
    held: list[dict[int, Any]] = field(default_factory=list)

    def first_reader(self, group: Group) -> int:
        """The first node that sums over, or takes statistics of, the group's channels."""
        flow = self.found.flow
        gone = self.found.removed_atoms({group.name: np.ones(group.size, dtype=np.bool_)})
        for number, node in enumerate(flow.graph.nodes):
            if node.op in SUMS | STATISTICS:
                values = [flow.values[arg.index] for arg in references(node) if isinstance(arg, Value)]
                if any(ids is not None and gone[ids].any() for x in all_labels(values) for ids in x.ids):
                    return number
        return len(flow.graph.nodes)

    def hold(self, start: int, gone: Gone) -> None:
        """Keep what the nodes from ``start`` on read; earlier nodes run once, with ``gone`` cut out."""
        graph = self.found.graph
        offset = len(graph.inputs)
        later = {arg.index for node in graph.nodes[start:] for arg in references(node) if isinstance(arg, Value)}
        fill(graph.output, lambda leaf: later.add(leaf.index) if isinstance(leaf, Value) else None)
        self.start, self.held = start, []
        for chunk in self.chunks:
            values = self._run(dict(enumerate(chunk)), 0, start, gone)
            self.held.append(
                {index: value for index, value in values.items() if index < offset + start and index in later}
            )

    def outputs(self, gone: Gone) -> Tensor:
        """The model's first output tensor on all the data with ``gone`` cut out; one intervention."""
        self.count += 1
        graph = self.found.graph
        found = []
        for held in self.held:
            values = self._run(dict(held), self.start, len(graph.nodes), gone)
            tree = fill(graph.output, partial(self._leaf, values))
            found.append(first_tensor(tree))
        return torch.cat(found)

    def _leaf(self, values: Mapping[int, Any], leaf: Value | Weight) -> Any:
        return values[leaf.index] if isinstance(leaf, Value) else self.tensors[leaf.name]

    def _run(self, values: dict[int, Any], first: int, end: int, gone: Gone) -> dict[int, Any]:
        flow = self.found.flow
        offset = len(flow.graph.inputs)
        device = next((x.device for chunk in self.chunks for x in chunk), torch.device("cpu"))
        with torch.no_grad():
            for number in range(first, end):
                values[offset + number] = run_node(flow, number, values, self.tensors, gone, device)
        return values
