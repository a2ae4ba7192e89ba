"""What a network still says when some of its units are cut out of the traced graph: run from a layer on, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from espalier.graph.graph import Value, Weight, leaves, references
from espalier.graph.trees import fill

Units = NDArray[np.bool_]


@dataclass
class Interventions:
    """The graph of a model on fixed data, chunk by chunk. ``count``: interventions so far (each sees all the data).

    ``tensors``: every tensor of the graph by name; ``chunks``: inputs in the graph's order; ``limit``: how many bytes
    of what earlier nodes gave are held. Chunks beyond it run from the start each time, one after the other.
    """

    found: ChannelGroups
    tensors: Mapping[str, Tensor]
    chunks: Sequence[Sequence[Tensor]]
    count: int = 0
    limit: int = 2**31
    held: list[tuple[int, dict[int, Any]]] = field(default_factory=list)
    last: dict[int, int] = field(init=False)  # value -> its last reader; the number of nodes for the graph's output

    def __post_init__(self) -> None:
        graph = self.found.graph
        self.last = {
            arg.index: number
            for number, node in enumerate(graph.nodes)
            for arg in references(node)
            if isinstance(arg, Value)
        }
        shown = {leaf.index for leaf in leaves(graph.output) if isinstance(leaf, Value)}
        self.last |= dict.fromkeys(shown, len(graph.nodes))

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
        self.held, used = [], 0
        for chunk in self.chunks:
            inputs = dict(enumerate(chunk))
            if used <= self.limit:
                values = self._run(dict(inputs), 0, start, gone)
                values = {index: value for index, value in values.items() if self.last.get(index, -1) >= start}
                used += sum(_bytes(value) for index, value in values.items() if index not in inputs)
            self.held.append((start, values) if used <= self.limit else (0, inputs))

    def each(self, gone: Gone) -> Iterator[Tensor]:
        """The model's first output tensor with ``gone`` cut out, chunk by chunk; all chunks are one intervention."""
        self.count += 1
        graph = self.found.graph
        for start, held in self.held:
            values = self._run(dict(held), start, len(graph.nodes), gone)
            yield first_tensor(fill(graph.output, partial(self._leaf, values)))

    def outputs(self, gone: Gone) -> Tensor:
        """What :meth:`each` gives, as one tensor."""
        return torch.cat(list(self.each(gone)))

    def _leaf(self, values: Mapping[int, Any], leaf: Value | Weight) -> Any:
        return values[leaf.index] if isinstance(leaf, Value) else self.tensors[leaf.name]

    def _run(self, values: dict[int, Any], first: int, end: int, gone: Gone) -> dict[int, Any]:
        """``values`` after the nodes from ``first`` to ``end``, without those that no later node reads."""
        flow = self.found.flow
        offset = len(flow.graph.inputs)
        device = next((x.device for chunk in self.chunks for x in chunk), torch.device("cpu"))
        with torch.no_grad():
            for number in range(first, end):
                values[offset + number] = run_node(flow, number, values, self.tensors, gone, device)
                read = [arg.index for arg in references(flow.graph.nodes[number]) if isinstance(arg, Value)]
                for index in (*read, offset + number):
                    if self.last.get(index, -1) <= number:
                        values.pop(index, None)
        return values


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(_bytes(item) for item in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
