"""What the graph tests share: tensors of a model, their specs, comparison of result trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from espalier.graph import Graph, Runner, dumps, loads


def tensors_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    return {**model.state_dict(), **graph.constants}


def specs_of(graph: Graph) -> dict[str, tuple[tuple[int, ...], str]]:
    specs = {name: (spec.shape, spec.dtype) for name, spec in graph.tensors.items()}
    return specs | {alias: specs[name] for alias, name in graph.aliases.items()}


def reloaded(graph: Graph) -> Graph:
    return loads(dumps(graph), tensors=specs_of(graph))


def runner_of(model: nn.Module, graph: Graph) -> Runner:
    runner = Runner(reloaded(graph), tensors_of(model, graph))
    runner.train(model.training)
    return runner


def assert_same(actual: Any, expected: Any) -> None:
    left, right = _pytree.tree_leaves(actual), _pytree.tree_leaves(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, equal_nan=True)
        else:
            assert a == b
