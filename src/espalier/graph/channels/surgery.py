"""Channels really removed from a module, and the proof that nothing else changed.

The module's tensors are cut, its sizes updated, and it is run against the masked reference. Where its own Python code
cannot follow (head counts written into it, chunks of unequal size), the rewritten graph takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.edits import Edit
from espalier.core.errors import EspalierWarning, ModelError
from espalier.core.keep import Keep
from espalier.core.model import evaluating
from espalier.core.parametrize import plain, slots
from espalier.core.plan import Plan, applied
from espalier.graph.channels.attributes import attribute_edits
from espalier.graph.channels.flow import EXAMPLE_BATCH, Flow
from espalier.graph.channels.groups import ChannelGroups, channel_groups
from espalier.graph.channels.reference import masked_outputs
from espalier.graph.channels.rewrite import Gone, indices, without
from espalier.graph.edit import AsGraph, state_of
from espalier.graph.graph import CONSTANT_PREFIX, Graph, Input, Value
from espalier.graph.operators.foreign import shown
from espalier.graph.runner import Runner, inputs_of
from espalier.graph.trace import structural_copy, trace, user_hooks
from espalier.graph.trees import fill

TOLERANCE = 1e-4
"""Largest difference from the masked reference, relative to the largest output."""


@dataclass(frozen=True)
class Removed:
    """``model``: without the channels; ``plan``: what was done; ``kind``: its own code, or its graph and ``reason``.

    ``difference``: from the masked reference, relative to the largest output. ``graph``: of the new model.
    """

    model: nn.Module
    plan: Plan
    kind: Literal["module", "graph"]
    reason: str
    difference: float
    graph: Graph


def groups_of(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> ChannelGroups:
    """Channel groups of ``model`` called as ``model(*args, **kwargs)``.

    Data-parallel and compiled wrappers must be taken off before; training forms count by their effective weights.
    Operators the graph's table lacks are boundaries. Raises ModelError where the model cannot be traced.
    """
    bare = plain(model) if any(slot.form is not None for slot in slots(model).values()) else model
    return channel_groups(trace(bare, args, kwargs, foreign=True))


def cut(flow: Flow, gone: Gone) -> tuple[Edit, ...]:
    """Edits that take ``gone`` out of every parameter and buffer."""
    return tuple(
        Keep(tensor=name, dim=dim, index=tuple(int(i) for i in index))
        for name, dims in indices(flow, gone).items()
        if not name.startswith(CONSTANT_PREFIX)
        for dim, index in dims.items()
    )


def remove(
    model: nn.Module,
    groups: ChannelGroups,
    chosen: Mapping[str, np.ndarray[Any, np.dtype[np.bool_]]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Removed:
    """Take the ``chosen`` units (group name -> mask over its units) out of ``model``, in place where its code allows.

    ``args``, ``kwargs``: the call to check with. ``optimizer``: its state is cut along.
    Raises ModelError when the result differs from the masked reference, or when the graph would have to take the
    model's place and holds an operator that no file can; the model is then unusable.
    """
    flow, history = groups.flow, applied(model)
    gone = groups.removed_atoms(dict(chosen))
    graph = without(flow, gone)
    keywords = dict(kwargs or {})
    inputs = [
        _batched(x, item)
        for x, item in zip(inputs_of(groups.graph, tuple(args), keywords), groups.graph.inputs, strict=True)
    ]
    args, keywords = fill(groups.graph.call, lambda leaf: inputs[leaf.index] if isinstance(leaf, Value) else None)
    tensors = {**state_of(model), **groups.graph.constants}
    with _same_draws(inputs):
        expected = masked_outputs(flow, tensors, inputs, gone)
    cuts = cut(flow, gone)
    sizes = tuple(attribute_edits(model, groups.graph, graph))
    kind: Literal["module", "graph"] = "module"
    reason = ""
    if isinstance(model, Runner):
        kind, plan = "graph", Plan((*cuts, *sizes, AsGraph.of(graph)))
        model = plan.apply(model, optimizer)
        difference = _difference(model, args, keywords, expected)
    else:
        plan = Plan((*cuts, *sizes))
        model = plan.apply(model, optimizer)
        try:
            difference = _difference(model, args, keywords, expected)
            reason = "" if difference <= TOLERANCE else f"its outputs are off by {difference:.2g}"
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if reason and graph.foreign:
            uses = ", ".join(dict.fromkeys(shown(node.op, node.path) for node in graph.foreign))
            raise ModelError(
                f"the code of {type(model).__name__} does not follow the removal of channels ({reason}), and its graph "
                f"cannot take its place: it would need {uses}, which the graph's closed operator set does not have. "
                "Make the code take its sizes from its tensors, rewrite that operator with standard layers, or leave "
                "the layers between alone."
            )
        if reason:
            kind, plan = "graph", Plan((*cuts, AsGraph.of(graph)))
            if hooked := user_hooks(model):
                warnings.warn(
                    f"the result is a graph module; the hooks on {', '.join(hooked[:5])} stay behind, register them "
                    "again on its modules.",
                    EspalierWarning,
                    stacklevel=2,
                )
            model = Plan((AsGraph.of(graph),)).apply(model, optimizer)
            model.__dict__["_espalier_plan"] = history + plan
            difference = _difference(model, args, keywords, expected)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"after removing channels the outputs differ from the masked reference by {difference:.2g} (relative; "
            f"{TOLERANCE:g} is allowed). Please report the model."
        )
    return Removed(model, plan, kind, reason, difference, graph)


@contextmanager
def _same_draws(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Random numbers that a model draws itself come out the same in every run; the caller's generators stay."""
    cards = sorted({x.device.index for x in inputs if x.is_cuda})
    with torch.random.fork_rng(devices=cards):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[card] for card in cards)):
            generator.manual_seed(0)
        yield


def _difference(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], expected: Any) -> float:
    if user_hooks(model):  # of which the reference knows nothing
        model = structural_copy(model)
    with evaluating(model), _same_draws(_tensors([*args, kwargs])):
        found = model(*args, **kwargs)
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise ModelError(f"outputs of shape {[tuple(a.shape) for a, _ in pairs]}")
    worst = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if a.numel()]
    return float(np.max(worst)) if worst else 0.0


def _batched(x: Tensor, item: Input) -> Tensor:
    """``x`` at the batch size of the analysis, whose atoms of merged dimensions count samples too."""
    if None not in item.shape:
        return x
    dim = item.shape.index(None)
    return x.index_select(dim, torch.arange(EXAMPLE_BATCH, device=x.device) % x.shape[dim])


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]
