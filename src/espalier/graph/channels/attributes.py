# ruff: noqa: ARG001, ARG005 - every entry of the table has one signature
"""Sizes that modules keep as plain attributes, brought to what is left after surgery.

torch's own layers are known by class. Of the others, attributes that hold a size their module's traced calls have baked
in are set to the new one: a guess, which the caller checks by running the module against the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from espalier.core.edits import SetAttribute
from espalier.graph.graph import Graph, Weight

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Shapes of one module's own tensors, by their last name."""


def _weight(new: Shapes) -> Shape:
    """The shape of a layer's weight, also where it is held as direction and length."""
    return new["weight"] if "weight" in new else new["weight_v"]


def _linear(new: Shapes, groups: int) -> dict[str, Any]:
    return {"in_features": _weight(new)[1], "out_features": _weight(new)[0]}


def _convolution(new: Shapes, groups: int) -> dict[str, Any]:
    return {"in_channels": _weight(new)[1] * groups, "out_channels": _weight(new)[0], "groups": groups}


def _transposed(new: Shapes, groups: int) -> dict[str, Any]:
    return {"in_channels": _weight(new)[0], "out_channels": _weight(new)[1] * groups, "groups": groups}


def _batch_norm(new: Shapes, groups: int) -> dict[str, Any]:
    return {"num_features": next(iter(new.values()))[0]}


def _layer_norm(new: Shapes, groups: int) -> dict[str, Any]:
    return {"normalized_shape": _weight(new)}


def _group_norm(new: Shapes, groups: int) -> dict[str, Any]:
    return {"num_channels": _weight(new)[0], "num_groups": groups}


def _embedding(new: Shapes, groups: int) -> dict[str, Any]:
    return {"num_embeddings": _weight(new)[0], "embedding_dim": _weight(new)[1]}


def _recurrent(new: Shapes, groups: int) -> dict[str, Any]:
    sizes = {"input_size": new["weight_ih_l0"][1]}
    if "weight_hr_l0" in new:
        return {**sizes, "hidden_size": new["weight_hr_l0"][1], "proj_size": new["weight_hr_l0"][0]}
    return {**sizes, "hidden_size": new["weight_hh_l0"][1]}


STANDARD: tuple[tuple[Any, Callable[[Shapes, int], dict[str, Any]]], ...] = (
    (nn.Linear, _linear),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, lambda new, groups: {"num_parameters": _weight(new)[0]}),
    (nn.RNNBase, _recurrent),
    (nn.Bilinear, lambda new, groups: {"out_features": _weight(new)[0], "in1_features": _weight(new)[1],
                                       "in2_features": _weight(new)[2]}),
)  # fmt: skip


def attribute_edits(model: nn.Module, old: Graph, new: Graph) -> Iterator[SetAttribute]:
    """Edits that bring the attributes of ``model`` (traced as ``old``) to the sizes of ``new``."""
    owned: dict[str, dict[str, tuple[Shape, Shape]]] = {}
    for name in (*old.tensors, *old.aliases):
        first = old.aliases.get(name, name)
        path, _, last = name.rpartition(".")
        owned.setdefault(path, {})[last] = (old.tensors[first].shape, new.tensors[first].shape)
    groups = _groups(old, new)
    baked = _baked(old, new)
    for path, module in model.named_modules(remove_duplicate=False):
        shapes = owned.get(path, {})
        known = next((sizes for cls, sizes in STANDARD if isinstance(module, cls)), None)
        wanted: dict[str, Any] = {}
        if known is not None and any(a != b for a, b in shapes.values()):
            wanted = known({last: b for last, (_, b) in shapes.items()}, groups.get(path, 1))
        elif known is None or path in baked:
            changes = dict(baked.get(path, {}))
            for before, after in shapes.values():
                changes |= {a: b for a, b in zip(before, after, strict=True) if a != b}
            wanted = dict(_guessed(module, changes))
        for name, value in wanted.items():
            if getattr(module, name, None) != value and name in module.__dict__:
                yield SetAttribute(path=path, name=name, value=value)


def _groups(old: Graph, new: Graph) -> dict[str, int]:
    """Groups of the convolutions and group norms, by the path of the module that holds the weight or makes the call."""
    found: dict[str, int] = {}
    for node in new.nodes:
        count = node.args.get("num_groups" if node.op == "group_norm" else "groups", 1)
        if node.op.startswith("conv") or node.op == "group_norm":
            weight = node.args.get("weight")
            assert isinstance(count, int)  # noqa: S101 - the table says so
            if isinstance(weight, Weight):
                for name in (weight.name, *(alias for alias, first in old.aliases.items() if first == weight.name)):
                    found[name.rpartition(".")[0]] = count
            found.setdefault(node.path, count)
    return found


Changes = dict[Any, Any]
"""Sizes, and whole tuples of sizes, that have changed: old -> new."""


def _baked(old: Graph, new: Graph) -> dict[str, Changes]:
    """Path -> what has changed in the arguments of its calls."""
    found: dict[str, Changes] = {}
    for before, after in zip(old.nodes, new.nodes, strict=True):
        if before is after:
            continue
        for name, value in after.args.items():
            was = before.args.get(name)
            both = isinstance(was, tuple) and isinstance(value, tuple)
            pairs: Any = zip(was, value, strict=False) if both else [(was, value)]  # type: ignore[arg-type]
            changed: Changes = {a: b for a, b in pairs if type(a) is int and type(b) is int and a != b}
            if isinstance(was, tuple) and was != value:
                changed[was] = value
            if changed:
                found[before.path] = {**changed, **found.get(before.path, {})}
    return found


def _guessed(module: nn.Module, changes: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if type(value) is int and value in changes:
            yield name, changes[value]
        elif isinstance(value, tuple | list) and value and all(type(item) is int for item in value):
            whole = changes.get(tuple(value))
            replaced = type(value)(whole if whole is not None else (changes.get(item, item) for item in value))
            if replaced != value:
                yield name, replaced
