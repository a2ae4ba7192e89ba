# ruff: noqa: ARG001 - every rule has one signature
"""Operators over neighbourhoods and whole dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.graph.channels.atoms import Labels
from espalier.graph.channels.flow import Flow
from espalier.graph.channels.rules.rule import Rule


def batch_norm(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One mean, variance, scale and shift per channel (dimension 1)."""
    x: Labels = a["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a[name], Labels):
            flow.tie(x.ids[1], a[name].ids[0])
    return x


def layer_norm(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Scale and shift lie along the last dimensions; the statistics are those of what is kept."""
    x: Labels = a["input"]
    for name in ("weight", "bias"):
        vector = a.get(name)
        if isinstance(vector, Labels):
            for back in range(1, len(vector.shape) + 1):
                flow.tie(x.ids[-back], vector.ids[-back])
    return x


def group_norm(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Channels are laid out as (groups, channels of a group): whole groups, or the same channels of every group."""
    x: Labels = a["input"]
    ids = x.ids[1]
    if ids is not None:
        groups = a["num_groups"]
        flow.atoms.split(ids, (groups, len(ids) // groups), "groups")
        for name in ("weight", "bias"):
            if isinstance(a[name], Labels):
                flow.tie(ids, a[name].ids[0])
    return x


def _dims(a: Mapping[str, Any], rank: int) -> set[int]:
    dim = a.get("dim")
    if dim is None or dim == ():
        return set(range(rank))
    return {n % rank for n in (dim if isinstance(dim, tuple) else (dim,))} if rank else set()


def _reduced(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    x: Labels = a["self"] if "self" in a else a["input"]
    gone = _dims(a, len(x.shape))
    kept = [None if n in gone else ids for n, ids in enumerate(x.ids)]
    if not a.get("keepdim"):
        kept = [ids for n, ids in enumerate(kept) if n not in gone]
    return Labels(tuple(out.shape), tuple(kept))


def reduce(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """The other dimensions stay what they are."""
    return _reduced(flow, a, out)


def by_position(flow: Flow, a: Mapping[str, Any], out: Any) -> Any:
    """The result names positions of the dimension: it may not shrink."""
    x: Labels = a["self"]
    for n in _dims(a, len(x.shape)):
        flow.pin(x.ids[n])
    if isinstance(out, tuple):
        return tuple(_reduced(flow, a, item) for item in out)
    return _reduced(flow, a, out)


def sorted_by_value(flow: Flow, a: Mapping[str, Any], out: Any) -> Any:
    """The dimension is put into another order: it may not shrink."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape) if x.shape else 0
    flow.pin(x.ids[dim])
    kept = x.replaced(dim, None)
    results = out if isinstance(out, tuple) else (out,)
    labels = tuple(Labels(tuple(item.shape), kept.ids) for item in results)
    return labels if isinstance(out, tuple) else labels[0]


def same(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Every dimension stays (softmax and sums along a dimension count what is kept)."""
    x: Labels = a["self"]
    return x


def cumulative(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A running sum depends on order and on what comes before: that dimension may not shrink."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    flow.pin(x.ids[dim])
    return x.replaced(dim, None)


def _windows(rank: int) -> Rule:
    def rule(flow: Flow, a: Mapping[str, Any], out: Any) -> Any:
        """The last ``rank`` dimensions are places, the others stay."""
        x: Labels = a["self"] if "self" in a else a["input"]
        for ids in x.ids[-rank:]:
            flow.pin(ids)
        kept = (*x.ids[:-rank], *[None] * rank)
        if isinstance(out, tuple):
            return tuple(Labels(tuple(item.shape), kept) for item in out)
        return Labels(tuple(out.shape), kept)

    return rule


def grid_sample(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Places are looked up; channels stay."""
    x: Labels = a["input"]
    flow.pin_all((Labels(x.shape[2:], x.ids[2:]), a["grid"]))
    return Labels(tuple(out.shape), (*x.ids[:2], *[None] * (len(out.shape) - 2)))


def cosine_similarity(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A product over ``dim`` of two tensors that broadcast."""
    x, y = a["x1"], a["x2"]
    rank = max(len(x.shape), len(y.shape))
    shape = [max(u, v) for u, v in zip(_padded(x.shape, rank), _padded(y.shape, rank), strict=True)]
    met = flow.broadcast([x, y], shape)
    dim = a["dim"] % rank
    return Labels(tuple(out.shape), (*met.ids[:dim], *met.ids[dim + 1 :]))


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


RULES: dict[str, Rule] = {
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    **dict.fromkeys(("mean", "sum", "prod", "amax", "amin", "var", "std"), reduce),
    **dict.fromkeys(("any", "all", "logsumexp", "vector_norm"), reduce),
    **dict.fromkeys(("max_dim", "min_dim", "argmax", "argmin"), by_position),
    **dict.fromkeys(("topk", "sort", "argsort"), sorted_by_value),
    **dict.fromkeys(("softmax", "log_softmax"), same),
    **dict.fromkeys(("cumsum", "cumprod"), cumulative),
    **{
        f"{name}{rank}d": _windows(rank)
        for rank in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest")
    },
    "adaptive_max_pool1d": _windows(1),
    "adaptive_max_pool2d": _windows(2),
    "max_pool2d_indices": _windows(2),
    "upsample_linear1d": _windows(1),
    "upsample_bilinear2d": _windows(2),
    "upsample_bicubic2d": _windows(2),
    "upsample_trilinear3d": _windows(3),
    "grid_sample": grid_sample,
    "cosine_similarity": cosine_similarity,
}  # fmt: skip
