# ruff: noqa: ARG001 - every rule has one signature
"""Operators that move, pick, join or make elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.graph.channels.atoms import Ids, Labels
from espalier.graph.channels.flow import Flow, blank
from espalier.graph.channels.rules.rule import Rule


def _sizes(out: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in out.shape)


def reshape(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """The same elements in other dimensions."""
    return flow.reshape(a["self"], out.shape)


def permute(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Dimensions in another order."""
    x: Labels = a["self"]
    order = [n % len(x.shape) for n in a["dims"]]
    return Labels(_sizes(out), tuple(x.ids[n] for n in order))


def transpose(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Two dimensions change places."""
    x: Labels = a["self"]
    order = list(range(len(x.shape)))
    if order:
        first, second = a["dim0"] % len(order), a["dim1"] % len(order)
        order[first], order[second] = order[second], order[first]
    return Labels(_sizes(out), tuple(x.ids[n] for n in order))


def movedim(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Some dimensions go elsewhere, the others keep their order."""
    x: Labels = a["self"]
    rank = len(x.shape)
    moved = {d % rank: s % rank for s, d in zip(a["source"], a["destination"], strict=True)}
    others = iter(n for n in range(rank) if n not in moved.values())
    return Labels(_sizes(out), tuple(x.ids[moved[n] if n in moved else next(others)] for n in range(rank)))


def unsqueeze(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A dimension of extent 1 more."""
    x: Labels = a["self"]
    dim = a["dim"] % (len(x.shape) + 1)
    return Labels(_sizes(out), (*x.ids[:dim], None, *x.ids[dim:]))


def expand(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Repeats along dimensions of extent 1, which carry no channels."""
    x: Labels = a["self"]
    sizes = _sizes(out)
    lead = len(sizes) - len(x.shape)
    ids = tuple(x.ids[n - lead] if n >= lead and x.shape[n - lead] == size else None for n, size in enumerate(sizes))
    return Labels(sizes, ids)


def expand_as(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Takes the other's shape, and so its channels."""
    x, other = a["self"], a["other"]
    met = flow.broadcast([x, other], out.shape)
    return Labels(met.shape, tuple(ids if ids is not None else other.ids[n] for n, ids in enumerate(met.ids)))


def reshape_as(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A reshape whose sizes follow the other's."""
    x = flow.reshape(a["self"], out.shape)
    for mine, theirs in zip(x.ids, a["other"].ids, strict=True):
        flow.tie(mine, theirs)
    return x


def repeat(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Whole copies one after the other."""
    x: Labels = a["self"]
    sizes = _sizes(out)
    lead = len(sizes) - len(x.shape)
    found: list[Ids | None] = [None] * len(sizes)
    for n, ids in enumerate(x.ids):
        if ids is not None:
            found[lead + n] = np.tile(ids, sizes[lead + n] // len(ids))
    return Labels(sizes, tuple(found))


def repeat_interleave(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Every element several times in a row."""
    x: Labels = a["self"]
    if a["dim"] is None:
        flow.pin_all(x)
        return Labels.fixed(out.shape)
    dim = a["dim"] % len(x.shape)
    ids = x.ids[dim]
    repeated = None if ids is None else np.repeat(ids, _sizes(out)[dim] // len(ids))
    return Labels(_sizes(out), (*x.ids[:dim], repeated, *x.ids[dim + 1 :]))


def in_place_of(*names: str) -> Rule:
    """A rule for operators that reorder positions along the dimensions named by ``names``: they may not shrink."""

    def rule(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
        x: Labels = a["self"]
        dims: list[int] = []
        for name in names:
            given = a[name]
            dims += list(given) if isinstance(given, tuple) else [given]
        for dim in dims or range(len(x.shape)):
            flow.pin(x.ids[dim])
            x = x.replaced(dim, None)
        return Labels(_sizes(out), x.ids)

    return rule


def last_two(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A triangle is cut by position."""
    x: Labels = a["self"]
    for ids in x.ids[-2:]:
        flow.pin(ids)
    return Labels(x.shape, (*x.ids[:-2], None, None))


def pad(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Constant channels around the others may go as well; other paddings repeat what is there."""
    x: Labels = a["input"]
    found = list(x.ids)
    sizes = _sizes(out)
    for number in range(len(a["pad"]) // 2):
        before, after = a["pad"][2 * number : 2 * number + 2]
        dim = len(x.shape) - 1 - number
        ids = found[dim]
        if ids is None or not (before or after):
            continue
        if a["mode"] != "constant" or before < 0 or after < 0:
            flow.pin(ids)
            found[dim] = None
            continue
        ends = [_several(flow, size) for size in (before, after)]
        found[dim] = np.concatenate([ends[0], ids, ends[1]])
    return Labels(sizes, tuple(found))


def _several(flow: Flow, size: int) -> Ids:
    """Fresh atoms, also for a single one."""
    first = flow.atoms.count
    flow.atoms.count += size
    return np.arange(first, first + size, dtype=np.int64)


def pixel_shuffle(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Each channel comes from factor x factor channels, which go together."""
    x: Labels = a["self"]
    ids, area = x.ids[-3], a["upscale_factor"] ** 2
    for place in x.ids[-2:]:
        flow.pin(place)
    kept = None
    if ids is not None:
        rows = ids.reshape(-1, area)
        for other in range(1, area):
            flow.tie(rows[:, 0], rows[:, other])
        kept = rows[:, 0] if len(rows) > 1 else None
        if kept is None:
            flow.pin(ids)
    return Labels(_sizes(out), (*x.ids[:-3], kept, None, None))


def pixel_unshuffle(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Each channel becomes factor x factor channels, which go together."""
    x: Labels = a["self"]
    ids, area = x.ids[-3], a["downscale_factor"] ** 2
    for place in x.ids[-2:]:
        flow.pin(place)
    return Labels(_sizes(out), (*x.ids[:-3], None if ids is None else np.repeat(ids, area), None, None))


def channel_shuffle(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """(groups, channels) -> (channels, groups): the same channels of every group go together."""
    x: Labels = a["self"]
    ids, groups = x.ids[1], a["groups"]
    if ids is None:
        return x
    flow.atoms.split(ids, (groups, len(ids) // groups), "groups")
    return x.replaced(1, ids.reshape(groups, -1).T.reshape(-1))


def im2col(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Every channel becomes one row per kernel position."""
    x: Labels = a["self"]
    ids = x.ids[1]
    for place in x.ids[2:]:
        flow.pin(place)
    return Labels(
        _sizes(out), (x.ids[0], None if ids is None else np.repeat(ids, int(np.prod(a["kernel_size"]))), None)
    )


def col2im(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One channel per kernel-size rows, which go together."""
    x: Labels = a["self"]
    ids = x.ids[1]
    kept = None
    if ids is not None:
        rows = ids.reshape(_sizes(out)[1], -1)
        for other in range(1, rows.shape[1]):
            flow.tie(rows[:, 0], rows[:, other])
        kept = rows[:, 0] if len(rows) > 1 else None
    return Labels(_sizes(out), (x.ids[0], kept, None, None))


def cat(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One after the other along ``dim``; the other dimensions meet."""
    sizes = _sizes(out)
    items = [x for x in a["tensors"] if len(x.shape) == len(sizes)]  # torch lets an empty vector pass
    dim = a["dim"] % len(sizes)
    found: list[Ids | None] = []
    for n in range(len(sizes)):
        if n != dim:
            first = next((x.ids[n] for x in items if x.ids[n] is not None), None)
            for x in items:
                flow.tie(first, x.ids[n])
            found.append(None if any(x.ids[n] is None for x in items) else first)
        elif all(x.ids[n] is None for x in items):
            found.append(None)
        else:
            found.append(np.concatenate([_or_fixed(x.ids[n], x.shape[n]) for x in items]))
    return Labels(sizes, tuple(found))


def _or_fixed(ids: Ids | None, size: int) -> Ids:
    return np.zeros(size, dtype=np.int64) if ids is None else ids


def stack(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Equal tensors side by side in a new dimension."""
    sizes = _sizes(out)
    dim = a["dim"] % len(sizes)
    met = flow.broadcast(list(a["tensors"]), (*sizes[:dim], *sizes[dim + 1 :]))
    return Labels(sizes, (*met.ids[:dim], None, *met.ids[dim:]))


def pieces(flow: Flow, a: Mapping[str, Any], out: Any) -> tuple[Labels, ...]:
    """Runs along ``dim``. Runs of one size are cut by counting, so they lose the same positions."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    ids = x.ids[dim]
    if ids is None:
        return tuple(Labels(_sizes(item), x.ids) for item in out)
    sizes = [_sizes(item)[dim] for item in out]
    runs = np.split(ids, np.cumsum(sizes)[:-1])
    if "split_sizes" not in a:
        for run in runs[1:]:
            if len(run) == len(runs[0]):
                flow.tie(runs[0], run)
            else:
                flow.pin(ids, f"{flow.here} cuts it into pieces of different size by counting")
    for run in runs:
        if len(run) == 1:
            flow.pin(run)
    return tuple(
        Labels(_sizes(item), x.replaced(dim, run if len(run) > 1 else None).ids)
        for item, run in zip(out, runs, strict=True)
    )


def unbind(flow: Flow, a: Mapping[str, Any], out: Any) -> tuple[Labels, ...]:
    """One tensor per position of ``dim``, which may not shrink."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    flow.pin(x.ids[dim])
    ids = (*x.ids[:dim], *x.ids[dim + 1 :])
    return tuple(Labels(_sizes(item), ids) for item in out)


def item(flow: Flow, a: Mapping[str, Any], out: Any) -> Any:
    """One of several results."""
    return a["values"][a["index"]]


def slice_(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A run of positions; one with a step is cut by position."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    ids = x.ids[dim]
    if ids is None or _sizes(out)[dim] == x.shape[dim]:
        return Labels(_sizes(out), x.ids)
    if a["step"] != 1:
        flow.pin(ids)
        return Labels(_sizes(out), x.replaced(dim, None).ids)
    kept = ids[slice(a["start"], a["end"])]
    if len(kept) == 1:
        flow.pin(kept)
    return Labels(_sizes(out), x.replaced(dim, kept if len(kept) > 1 else None).ids)


def narrow(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A run of positions by start and length."""
    return slice_(flow, {**a, "end": a["start"] + a["length"], "step": 1}, out)


def select(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One position of ``dim``, which may not shrink."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    flow.pin(x.ids[dim])
    return Labels(_sizes(out), (*x.ids[:dim], *x.ids[dim + 1 :]))


def index(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Positions looked up in some dimensions; the others stay."""
    x: Labels = a["self"]
    given = list(a["indices"])
    looked = [n for n, item in enumerate(given) if item is not None]
    for n in looked:
        flow.pin(x.ids[n])
    for item in given:
        if item is not None:
            flow.pin_all(item, f"{flow.here} looks up positions")
    others = [ids for n, ids in enumerate(x.ids) if n not in looked]
    new = len(_sizes(out)) - len(others)
    adjacent = looked == list(range(looked[0], looked[-1] + 1)) if looked else True
    at = looked[0] if looked and adjacent else 0
    return Labels(_sizes(out), (*others[:at], *[None] * new, *others[at:]))


def index_select(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Positions of one dimension looked up."""
    x: Labels = a["self"]
    dim = a["dim"] % len(x.shape)
    flow.pin(x.ids[dim])
    flow.pin_all(a["index"], f"{flow.here} looks up positions")
    return Labels(_sizes(out), x.replaced(dim, None).ids)


def gather(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Positions of ``dim`` looked up element by element: the other dimensions meet those of the index."""
    x: Labels = a["self"]
    where: Labels = a["index"] if "index" in a else a["indices"]
    if a["dim"] is None or x.shape[: a["dim"]] != where.shape[: a["dim"]]:
        flow.pin_all((x, where))
        return Labels.fixed(out.shape)
    dim = a["dim"] % len(x.shape)
    found: list[Ids | None] = []
    for n, (mine, theirs) in enumerate(zip(x.ids, where.ids, strict=True)):
        if n == dim or x.shape[n] != where.shape[n]:
            flow.pin(mine)
            flow.pin(theirs)
            found.append(None)
        else:
            flow.tie(mine, theirs)
            found.append(None if mine is None or theirs is None else mine)
    return Labels(_sizes(out), tuple(found))


def slice_scatter(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A run of positions is overwritten by another tensor's."""
    x: Labels = a["self"]
    source: Labels = a["src"]
    dim = a["dim"] % len(x.shape)
    for n, (mine, theirs) in enumerate(zip(x.ids, source.ids, strict=True)):
        if n != dim:
            flow.tie(mine, theirs)
        elif a["step"] != 1 or mine is None or theirs is None:
            flow.pin(mine)
            flow.pin(theirs)
        else:
            flow.tie(mine[slice(a["start"], a["end"])], theirs)
    return x


def select_scatter(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One position of ``dim`` is overwritten: that dimension may not shrink."""
    x: Labels = a["self"]
    source: Labels = a["src"]
    dim = a["dim"] % len(x.shape)
    flow.pin(x.ids[dim])
    for mine, theirs in zip((*x.ids[:dim], *x.ids[dim + 1 :]), source.ids, strict=True):
        flow.tie(mine, theirs)
    return x.replaced(dim, None)


def made(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Every element is the same number: dimensions follow what they meet."""
    return Labels(_sizes(out), tuple(flow.atoms.fresh(n) for n in _sizes(out)))


def like(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """A tensor of one number in the shape of another."""
    x: Labels = a["self"]
    return Labels(_sizes(out), x.ids)


def counted(flow: Flow, a: Mapping[str, Any], out: Any) -> Any:
    """Elements follow from their position: nothing may shrink."""
    return blank(out)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "flatten", "unflatten", "squeeze"), reshape),
    "permute": permute,
    "transpose": transpose,
    "movedim": movedim,
    "unsqueeze": unsqueeze,
    "expand": expand,
    "expand_as": expand_as,
    "reshape_as": reshape_as,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "roll": in_place_of("dims"),
    "flip": in_place_of("dims"),
    "tril": last_two,
    "triu": last_two,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "im2col": im2col,
    "col2im": col2im,
    "cat": cat,
    "stack": stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), pieces),
    "unbind": unbind,
    "item": item,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "take_along_dim": gather,
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), made),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), like),
    **dict.fromkeys(("arange", "linspace", "eye", "scalar_tensor", "one_hot", "meshgrid"), counted),
}
