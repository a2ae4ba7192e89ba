"""The masked reference: the full graph with channels zeroed where they are consumed.

Sums over channels see zeros in the place of what goes. Statistics over channels (layer norm, softmax, a mean) are those
of what is kept: there the operator runs on the kept positions alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.graph.channels.atoms import Labels
from espalier.graph.channels.flow import Flow, all_labels
from espalier.graph.channels.groups import kept_index
from espalier.graph.channels.rewrite import Gone, rewritten_node
from espalier.graph.check import resolve
from espalier.graph.graph import Value, Weight, references
from espalier.graph.operators import operator_of
from espalier.graph.operators.schema import call
from espalier.graph.trees import fill

SUMS = frozenset(
    {f"conv{rank}d" for rank in (1, 2, 3)}
    | {f"conv_transpose{rank}d" for rank in (1, 2, 3)}
    | {"linear", "matmul", "addmm", "baddbmm", "einsum", "attention", "bilinear", "sum", "vector_norm"}
    | {"lstm", "gru", "rnn_tanh", "rnn_relu", "cosine_similarity"}
)
"""Operators that sum over channels: zeros there are as good as nothing."""

STATISTICS = frozenset(
    {"layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "mean", "var", "std", "amax", "amin", "prod"}
    | {"logsumexp", "weight_norm", "batch_norm", "any", "all"}
)
"""Operators whose result depends on how many channels there are."""


def masked_outputs(flow: Flow, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], gone: Gone) -> Any:
    """The results of the full graph on ``inputs``, in the containers the model returns."""
    graph = flow.graph
    values: dict[int, Any] = dict(enumerate(inputs))
    last = {
        arg.index: number
        for number, node in enumerate(graph.nodes)
        for arg in references(node)
        if isinstance(arg, Value)
    }
    keep = {number: [index for index, when in last.items() if when == number] for number in set(last.values())}
    shown: set[int] = set()
    fill(graph.output, lambda leaf: shown.add(leaf.index) if isinstance(leaf, Value) else None)
    device = inputs[0].device if inputs else torch.device("cpu")
    with torch.no_grad():
        for number in range(len(graph.nodes)):
            values[len(inputs) + number] = run_node(flow, number, values, tensors, gone, device)
            for index in keep.get(number, ()):
                if index not in shown:
                    values.pop(index, None)
    return fill(graph.output, lambda leaf: values[leaf.index] if isinstance(leaf, Value) else tensors[leaf.name])


def run_node(
    flow: Flow, number: int, values: Mapping[int, Any], tensors: Mapping[str, Tensor], gone: Gone, device: torch.device
) -> Any:
    """Node ``number`` of the full graph on ``values`` and ``tensors``, with ``gone`` cut out of what it reads."""
    node = flow.graph.nodes[number]
    operator = operator_of(node)
    touched = any(ids is not None and gone[ids].any() for x in all_labels(flow.arguments(node)) for ids in x.ids)
    out = flow.values[len(flow.graph.inputs) + number]
    compact = touched and node.op in STATISTICS
    if compact:
        node = rewritten_node(flow, number, gone)
    look = values
    if touched and node.op in SUMS | STATISTICS:
        change = _compacted if compact else _zeroed
        refs = list(references(node))
        look = {r.index: change(values[r.index], flow.values[r.index], gone) for r in refs if isinstance(r, Value)}
        tensors = {r.name: change(tensors[r.name], flow.tensors[r.name], gone) for r in refs if isinstance(r, Weight)}
    positional, keywords = call(operator, resolve(operator, node, look, tensors))  # type: ignore[arg-type]
    if operator.creates:
        keywords["device"] = device
    result = operator.run(*positional, **keywords)
    if isinstance(result, list):
        result = tuple(result)
    return _scattered(result, out, gone) if compact else result


def _zeroed(x: Any, labels: Any, gone: Gone) -> Any:
    if not isinstance(x, Tensor):
        return x
    for dim, ids in enumerate(labels.ids):
        if ids is not None and gone[ids].any():
            view = [1] * x.dim()
            view[dim] = -1
            keep = torch.from_numpy(~gone[ids]).to(x.device).reshape(view)
            x = torch.where(keep, x, x.new_zeros(()))
    return x


def _compacted(x: Any, labels: Any, gone: Gone) -> Any:
    if not isinstance(x, Tensor):
        return x
    for dim, ids in enumerate(labels.ids):
        index = kept_index(ids, gone)
        if index is not None:
            x = x.index_select(dim, torch.from_numpy(index).to(x.device))
    return x


def _scattered(x: Any, labels: Any, gone: Gone) -> Any:
    """``x`` over kept positions put back in full size, zero elsewhere."""
    if not isinstance(x, Tensor) or not isinstance(labels, Labels):
        return x
    for dim, ids in enumerate(labels.ids):
        index = kept_index(ids, gone)
        if index is not None:
            assert ids is not None  # noqa: S101 - there is an index
            full = x.new_zeros((*x.shape[:dim], len(np.asarray(ids)), *x.shape[dim + 1 :]))
            x = full.index_copy(dim, torch.from_numpy(index).to(x.device), x)
    return x
