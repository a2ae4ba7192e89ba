"""Tracing alone: seconds, nodes, and whether the runner computes what the model does."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.zoo_parts.checks import Row, attempt, output_of, within
from benchmarks.zoo_parts.models import relative
from torch import Tensor, nn

from espalier.graph import Runner, trace


def prune(row: Row, model: nn.Module, x: Tensor, seconds: float) -> Any:  # noqa: ARG001 - one signature for all tools
    """Nothing is pruned: the graph."""
    started = time.perf_counter()
    graph = trace(model, (x,))
    row["seconds"]["trace"] = round(time.perf_counter() - started, 2)
    row["nodes"], row["free_batch"] = len(graph.nodes), graph.dynamic
    return graph


def check(row: Row, model: nn.Module, graph: Any, x: Tensor) -> None:
    """The runner equals the model at the traced batch size and, where that is free, at another."""
    runner = Runner(graph, {**model.state_dict(), **graph.constants}).eval()

    def agrees(name: str, x: Tensor) -> bool:
        return within(row, name, relative(output_of(runner, x), output_of(model, x)), 1e-5)

    attempt(row, "runner", lambda: agrees("runner", x))
    if graph.dynamic:
        attempt(row, "other_batch", lambda: agrees("other_batch", torch.cat([x, x[:1] / 2])))
