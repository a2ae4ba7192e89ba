"""Real torch modules for nodes whose tensors follow the standard layout ``PATH.weight``, ``PATH.bias``.

So that selection by type (``isinstance(m, nn.Linear)``) works on a graph's runner as on the original.
Modules are built on the meta device: their tensors are put in afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.graph.check import with_defaults
from espalier.graph.graph import Node, Weight
from espalier.graph.operators import TABLE

Factory = Callable[[Mapping[str, Any]], nn.Module | None]
"""From arguments with meta tensors to a module, or None when no module does the same."""


class ScaleShift(nn.Module):
    """``x * weight + bias`` per channel: what is left of a batch norm whose statistics were folded in."""

    def __init__(self, channels: int, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, ...)."""
        result: Tensor = TABLE["scale_shift"].run(x, self.weight, self.bias)
        return result


def _conv(cls: type[nn.Module], *, transposed: bool = False) -> Factory:
    def build(a: Mapping[str, Any]) -> nn.Module | None:
        weight, groups = a["weight"], a["groups"]
        first, second = int(weight.shape[0]), int(weight.shape[1]) * groups
        extra = {"output_padding": a["output_padding"]} if transposed else {}
        return cls(
            first if transposed else second,
            second if transposed else first,
            tuple(weight.shape[2:]),
            stride=a["stride"],
            padding=a["padding"],
            dilation=a["dilation"],
            groups=groups,
            bias=a["bias"] is not None,
            device="meta",
            **extra,
        )

    return build


def _linear(a: Mapping[str, Any]) -> nn.Module | None:
    weight = a["weight"]
    if weight.dim() != 2:
        return None
    return nn.Linear(int(weight.shape[1]), int(weight.shape[0]), bias=a["bias"] is not None, device="meta")


def _embedding(a: Mapping[str, Any]) -> nn.Module | None:
    if a["weight"].dim() != 2:
        return None
    rows, width = (int(n) for n in a["weight"].shape)
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    return nn.Embedding(
        rows, width, padding, scale_grad_by_freq=a["scale_grad_by_freq"], sparse=a["sparse"], device="meta"
    )


def _batch_norm(a: Mapping[str, Any]) -> nn.Module | None:
    affine = a["weight"] is not None
    if affine != (a["bias"] is not None) or a["running_mean"] is None or a["running_var"] is None or a["training"]:
        return None
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(a["input"].dim())
    channels = int(a["running_mean"].shape[0])
    return cls(channels, a["eps"], a["momentum"], affine=affine, device="meta") if cls else None


def _layer_norm(a: Mapping[str, Any]) -> nn.Module | None:
    if a["weight"] is None:
        return None
    return nn.LayerNorm(a["normalized_shape"], a["eps"], bias=a["bias"] is not None, device="meta")


def _group_norm(a: Mapping[str, Any]) -> nn.Module | None:
    if a["weight"] is None or a["bias"] is None or a["weight"].shape[0] % a["num_groups"]:
        return None
    return nn.GroupNorm(a["num_groups"], int(a["weight"].shape[0]), a["eps"], device="meta")


def _scale_shift(a: Mapping[str, Any]) -> nn.Module | None:
    return ScaleShift(int(a["weight"].shape[0]), device="meta")


FACTORIES: Mapping[str, Factory] = {
    "conv1d": _conv(nn.Conv1d),
    "conv2d": _conv(nn.Conv2d),
    "conv3d": _conv(nn.Conv3d),
    "conv_transpose1d": _conv(nn.ConvTranspose1d, transposed=True),
    "conv_transpose2d": _conv(nn.ConvTranspose2d, transposed=True),
    "conv_transpose3d": _conv(nn.ConvTranspose3d, transposed=True),
    "linear": _linear,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "scale_shift": _scale_shift,
}
_DROPOUTS: Mapping[tuple[str, int], type[nn.Module]] = {
    ("feature_dropout", 3): nn.Dropout1d,
    ("feature_dropout", 4): nn.Dropout2d,
    ("feature_dropout", 5): nn.Dropout3d,
    **{("dropout", rank): nn.Dropout for rank in range(17)},
    **{("alpha_dropout", rank): nn.AlphaDropout for rank in range(17)},
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def activation(node: Node) -> str:
    """Name of the argument a module for ``node`` is called with."""
    return "indices" if node.op == "embedding" else "input"


def candidate_paths(node: Node, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Module paths ``node`` may be a call of: under each, all its tensors are ``PATH.weight``, ``PATH.bias`` ...

    ``names`` maps every tensor to all its names (tied tensors have several).
    """
    if node.op not in FACTORIES or isinstance(node.args[activation(node)], Weight):
        return []
    found: list[str] | None = None
    for key in _TENSORS:
        arg = node.args.get(key)
        if arg is None:
            continue
        if not isinstance(arg, Weight):
            return []
        paths = [path for path, _, last in (n.rpartition(".") for n in names[arg.name]) if path and last == key]
        found = paths if found is None else [path for path in found if path in paths]
    return found or []


def build_module(node: Node, given: Mapping[str, Any]) -> nn.Module | None:
    """The torch module that computes ``node``; ``given`` are its arguments as meta tensors and literals."""
    return FACTORIES[node.op](with_defaults(TABLE[node.op], given))


def build_dropout(node: Node, rank: int) -> nn.Module | None:
    """The dropout module for ``node`` on a tensor of ``rank`` dimensions; None when it is always on."""
    cls = _DROPOUTS.get((node.op, rank))
    return None if cls is None or node.args.get("train", False) else cls(node.args.get("p", 0.5))


def configuration(node: Node, rank: int) -> tuple[Any, ...]:
    """What two calls must share to be calls of one module."""
    rest = tuple(sorted((key, repr(value)) for key, value in node.args.items() if key != activation(node)))
    return node.op, rest, max(rank, 3) if node.op == "batch_norm" else 0
