"""Linear layers that meet made one layer, where that is smaller or measured faster; each decision goes on record."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.merge import Merge, unmergeable
from espalier.core.model import copy_model, device_of
from espalier.core.norms import BATCH_NORMS, Fold
from espalier.core.parametrize import plain, slots
from espalier.core.plan import Plan
from espalier.core.task import capture_call, to_device
from espalier.graph import trace
from espalier.graph.graph import Graph, Node, Value, Weight, references
from espalier.measure.speed import Latency, latency

Rule = Literal["smaller", "faster"]
Pair = tuple[str, str, str]
"""Path of the first layer, of the batch norm between or "", of the second layer."""

REPEATS, SECONDS = 50, 3.0
"""How often a pair and its merged layer are run in turn, and for how long at most."""


def graph_of(model: nn.Module, context: Context) -> Graph:
    """The model traced on the task's example."""
    bare = plain(model)
    args, kwargs = capture_call(context.data, bare, to_device(context.data.example(), device_of(bare)))
    return trace(bare, args, kwargs, foreign=True)


def merge_linear(model: nn.Module, context: Context, rule: Rule = "smaller") -> list[str]:
    """Merge, in place, every pair of layers that meets where ``rule`` says so; batch norms between are folded first.

    ``smaller``: one weight with fewer entries than the two have; ``faster``: see :func:`clearly_faster`.
    """
    merged: list[str] = []
    judged: set[Pair] = set()
    decisions: list[dict[str, Any]] = context.record.details.setdefault("pairs", [])
    while True:
        for pair in meeting(graph_of(model, context), model):
            if pair in judged:
                continue
            judged.add(pair)
            if reason := obstacle(model, pair):
                context.skip(pair[2], f"not merged with {pair[0]}: {reason}")
                continue
            decision = judge(model, pair, context, rule)
            decisions.append(decision)
            if decision["merged"]:
                plan = plan_of(pair)
                plan.apply(model)
                merged.append(str(plan.edits[-1]))
                judged = {other for other in judged if pair[2] not in other}  # it is another layer now
                break
        else:
            return merged


def meeting(graph: Graph, model: nn.Module) -> list[Pair]:
    """The layers of which the second alone reads the first; each runs once, or it would be missed elsewhere."""
    producers = {len(graph.inputs) + number: node for number, node in enumerate(graph.nodes)}
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for arg in references(node):
            if isinstance(arg, Value):
                readers.setdefault(arg.index, []).append(node)
    runs = Counter(_layer(node, model) or (node.path if node.op == "batch_norm" else "") for node in graph.nodes)
    found = []
    for node in graph.nodes:
        second = _layer(node, model)
        source = node.args.get("input")
        norm = ""
        if second and isinstance(source, Value) and len(readers[source.index]) == 1:
            before = producers.get(source.index)
            behind = before.args.get("input") if before is not None and before.op == "batch_norm" else None
            if before is not None and isinstance(behind, Value):
                if not before.path:  # called as a function: there is no module to fold
                    continue
                norm = before.path
                before = producers.get(behind.index) if len(readers[behind.index]) == 1 else None
            first = _layer(before, model) if before is not None else ""
            if first and all(runs[path] == 1 for path in (first, norm, second) if path):
                found.append((first, norm, second))
    return found


def _layer(node: Node, model: nn.Module) -> str:
    weight = node.args.get("weight")
    if node.op in ("linear", "conv2d") and isinstance(weight, Weight):
        path = weight.name.rpartition(".")[0]
        if isinstance(model.get_submodule(path), nn.Linear | nn.Conv2d):
            return path
    return ""


def obstacle(model: nn.Module, pair: Pair) -> str:
    """Why the two cannot be one layer; empty where they can."""
    first, norm, second = pair
    between = model.get_submodule(norm) if norm else None
    if between is not None and (not isinstance(between, BATCH_NORMS) or between.running_mean is None):
        return f"{norm} between them has no running statistics to fold"
    known = slots(model)
    for path in (first, second):
        slot = known.get(f"{path}.weight")
        if slot is None or len(slot.owners) > 1:
            return f"{path} shares its weight"
        if slot.phase != "dense":
            return f"{path} carries a form ({slot.phase}), which a product of both would give up"
    return unmergeable(model.get_submodule(first), model.get_submodule(second))


def plan_of(pair: Pair) -> Plan:
    """The edits that merge a pair."""
    first, norm, second = pair
    fold = (Fold(norm=norm, into=first),) if norm else ()
    return Plan((*fold, Merge(first=first, second=second)))


def judge(model: nn.Module, pair: Pair, context: Context, rule: Rule) -> dict[str, Any]:
    """Whether ``pair`` becomes one layer, and by what numbers: plain data for the record."""
    first, _, second = pair
    one: Any = model.get_submodule(first)
    two: Any = model.get_submodule(second)
    size = 1
    if isinstance(one, nn.Conv2d):
        size = (one.kernel_size[0] + two.kernel_size[0] - 1) * (one.kernel_size[1] + two.kernel_size[1] - 1)
    before, after = one.weight.numel() + two.weight.numel(), one.weight.shape[1] * two.weight.shape[0] * size
    found: dict[str, Any] = {"first": first, "second": second, "weights": [before, after], "merged": after < before}
    if rule == "faster":
        apart, whole = timed(model, pair, context)
        found |= {"ms": [apart.to_json(), whole.to_json()], "merged": clearly_faster(whole, apart)}
    return found


def timed(model: nn.Module, pair: Pair, context: Context) -> tuple[Latency, Latency]:
    """Latency of the two layers, a batch norm between them folded, and of the merged one, on what reaches them."""
    first, norm, second = pair
    held: list[Tensor] = []

    def hold(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        held.append(next(iter((*args, *kwargs.values()))).detach())

    handle = model.get_submodule(first).register_forward_pre_hook(hold, with_kwargs=True)
    try:
        capture_call(context.data, model, context.data.example())
    finally:
        handle.remove()
    layers = [model.get_submodule(path) for path in (first, norm, second) if path]
    apart = copy_model(nn.Sequential(*layers))
    last = str(len(layers) - 1)
    if norm:
        Plan((Fold(norm="1", into="0"),)).apply(apart)
    whole = Plan((Merge(first="0", second=last),)).apply(copy_model(apart))
    both = latency(
        {"apart": apart, "whole": whole}, lambda layer: layer(held[0]),
        batch=len(held[0]), repeats=REPEATS, seconds=SECONDS,
    )  # fmt: skip
    return both["apart"], both["whole"]


def clearly_faster(one: Latency, other: Latency) -> bool:
    """Whether ``one`` is faster beyond the spread: each median lies outside the other's 10th to 90th percentile."""
    return one.p90_ms < other.median_ms and one.median_ms < other.p10_ms
