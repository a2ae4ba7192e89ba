# ruff: noqa: ARG001 - every rule has one signature
"""Operators that multiply and accumulate: what is summed over meets, what is left over is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.graph.channels.atoms import Ids, Labels
from espalier.graph.channels.flow import Flow
from espalier.graph.channels.rules.rule import Rule

KERNEL = "it is a place of the kernel"
"""Why the last dimensions of a convolution's weight stay: too plain to be listed."""


def _sizes(out: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in out.shape)


def _bias(flow: Flow, a: Mapping[str, Any], ids: Ids | None) -> None:
    if isinstance(a.get("bias"), Labels):
        flow.tie(ids, a["bias"].ids[0])


def linear(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Weight (out, in)."""
    x, weight = a["input"], a["weight"]
    flow.tie(x.ids[-1], weight.ids[-1])
    rows = weight.ids[0] if len(weight.shape) == 2 else None
    _bias(flow, a, rows)
    return Labels(_sizes(out), x.ids[:-1] if len(weight.shape) == 1 else (*x.ids[:-1], rows))


def convolution(rank: int) -> Rule:
    """Weight (out, in / groups, kernel...)."""

    def rule(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
        x, weight, groups = a["input"], a["weight"], a["groups"]
        at = len(x.shape) - rank - 1
        for place in x.ids[at + 1 :]:
            flow.pin(place)
        for place in weight.ids[2:]:
            flow.pin(place, KERNEL)
        inputs, outputs = x.ids[at], weight.ids[0]
        if groups == 1:
            flow.tie(inputs, weight.ids[1])
        else:
            _groups(flow, inputs, weight.ids[1], outputs, None, groups)
        _bias(flow, a, outputs)
        return Labels(_sizes(out), (*x.ids[:at], outputs, *[None] * rank))

    return rule


def transposed(rank: int) -> Rule:
    """Weight (in, out / groups, kernel...)."""

    def rule(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
        x, weight, groups = a["input"], a["weight"], a["groups"]
        at = len(x.shape) - rank - 1
        for place in x.ids[at + 1 :]:
            flow.pin(place)
        for place in weight.ids[2:]:
            flow.pin(place, KERNEL)
        flow.tie(x.ids[at], weight.ids[0])
        outputs = weight.ids[1]
        if groups > 1:
            outputs = flow.atoms.fresh(_sizes(out)[at])
            _groups(flow, weight.ids[0], None, outputs, weight.ids[1], groups)
        _bias(flow, a, outputs)
        return Labels(_sizes(out), (*x.ids[:at], outputs, *[None] * rank))

    return rule


def _groups(
    flow: Flow, inputs: Ids | None, inner: Ids | None, outputs: Ids | None, outer: Ids | None, groups: int
) -> None:
    """Both sides are (groups, own channels); the groups are the same, a group's own axes may be a weight's."""
    if inputs is None or outputs is None:
        for ids in (inputs, inner, outputs, outer):
            flow.pin(ids)
        return
    first = flow.atoms.split(inputs, (groups, len(inputs) // groups), "groups")
    second = flow.atoms.split(outputs, (groups, len(outputs) // groups), "groups")
    flow.tie(first[0], second[0])
    if inner is not None:
        flow.tie(first[1], inner)
    if outer is not None:
        flow.tie(second[1], outer)


def matmul(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """(..., m, k) x (..., k, n); vectors as torch treats them."""
    return _product(flow, a["self"], a["other"], _sizes(out))


def _product(flow: Flow, x: Labels, y: Labels, sizes: tuple[int, ...]) -> Labels:
    flow.tie(x.ids[-1], y.ids[-2] if len(y.shape) > 1 else y.ids[-1])
    rows = [x.ids[-2]] if len(x.shape) > 1 else []
    columns = [y.ids[-1]] if len(y.shape) > 1 else []
    lead = sizes[: len(sizes) - len(rows) - len(columns)]
    met = flow.broadcast([Labels(x.shape[:-2], x.ids[:-2]), Labels(y.shape[:-2], y.ids[:-2])], lead)
    return Labels(sizes, (*met.ids, *rows, *columns))


def added_product(left: str, right: str) -> Rule:
    """beta * self + alpha * left @ right."""

    def rule(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
        return flow.broadcast([_product(flow, a[left], a[right], _sizes(out)), a["self"]], out.shape)

    return rule


def einsum(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """One letter, one dimension; an ellipsis broadcasts."""
    equation = str(a["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    found: dict[str, Ids | None] = {}
    leads: list[Labels] = []
    for term, x in zip(left.split(","), a["tensors"], strict=True):
        head, dots, tail = term.partition("...")
        middle = x.ids[len(head) : len(x.ids) - len(tail)] if dots else ()
        if dots:
            leads.append(Labels(x.shape[len(head) : len(x.shape) - len(tail)], middle))
        for letter, ids, size in zip(
            head + tail, (*x.ids[: len(head)], *x.ids[len(x.ids) - len(tail) :]),
            (*x.shape[: len(head)], *x.shape[len(x.shape) - len(tail) :]), strict=True,
        ):  # fmt: skip
            if size > 1 and letter in found:
                flow.tie(found[letter], ids)
                found[letter] = None if ids is None else found[letter]
            elif size > 1:
                found[letter] = ids
    if not arrow:
        letters = "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
        right = ("..." if leads else "") + letters
    head, dots, tail = right.partition("...")
    count = len(_sizes(out)) - len(head) - len(tail)
    lead = flow.broadcast(leads, _sizes(out)[len(head) : len(head) + count]).ids if dots else ()
    return Labels(_sizes(out), (*(found.get(c) for c in head), *lead, *(found.get(c) for c in tail)))


def attention(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Query and key meet in the width of a head, key and value in their places; heads meet, grouped or one to one."""
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    flow.tie(query.ids[-1], key.ids[-1])
    flow.tie(key.ids[-2], value.ids[-2])
    sizes = _sizes(out)
    lead = sizes[:-2]
    heads = [Labels(x.shape[:-2], x.ids[:-2]) for x in (query, key, value)]
    if len(lead) and query.shape[-3:-2] != key.shape[-3:-2] and key.shape[-3] > 1:
        share = query.shape[-3] // key.shape[-3]
        for other in (key, value):
            _shared_heads(flow, query.ids[-3], other.ids[-3], share)
        heads = [Labels(x.shape[:-1], x.ids[:-1]) for x in heads]
        met = (*flow.broadcast(heads, lead[:-1]).ids, query.ids[-3])
    else:
        met = flow.broadcast(heads, lead).ids
    if isinstance(mask, Labels):
        flow.broadcast([mask, Labels((*lead, query.shape[-2], key.shape[-2]), (*met, query.ids[-2], key.ids[-2]))],
                       (*lead, query.shape[-2], key.shape[-2]))  # fmt: skip
    if a["is_causal"]:
        flow.pin(query.ids[-2])
        flow.pin(key.ids[-2])
    return Labels(sizes, (*met, query.ids[-2], value.ids[-1]))


def _shared_heads(flow: Flow, many: Ids | None, few: Ids | None, share: int) -> None:
    """Each head of ``few`` serves ``share`` heads of ``many`` in a row; they go together."""
    if many is None or few is None:
        flow.pin(many)
        flow.pin(few)
        return
    rows = many.reshape(-1, share)
    for column in range(share):
        flow.tie(few, rows[:, column])


def bilinear(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Weight (out, in1, in2)."""
    x, y, weight = a["input1"], a["input2"], a["weight"]
    flow.tie(x.ids[-1], weight.ids[1])
    flow.tie(y.ids[-1], weight.ids[2])
    _bias(flow, a, weight.ids[0])
    met = flow.broadcast([Labels(v.shape[:-1], v.ids[:-1]) for v in (x, y)], _sizes(out)[:-1])
    return Labels(_sizes(out), (*met.ids, weight.ids[0]))


def embedding(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Rows are looked up, the width stays."""
    weight, indices = a["weight"], a["indices"]
    flow.pin(weight.ids[0], f"{flow.here} looks up its rows")
    return Labels(_sizes(out), (*indices.ids, weight.ids[1]))


def outer(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """Every pair."""
    return Labels(_sizes(out), (a["self"].ids[0], a["vec2"].ids[0]))


def weight_norm(flow: Flow, a: Mapping[str, Any], out: Any) -> Labels:
    """g * v / |v|, the norm over every dimension but ``dim``: of what is kept."""
    direction, scale = a["v"], a["g"]
    dim = a["dim"] % len(direction.shape)
    flow.tie(direction.ids[dim], scale.ids[dim if len(scale.shape) > 1 else 0])
    return Labels(_sizes(out), direction.ids)


def recurrence(gates: int) -> Rule:
    """Weights (gates * hidden, in) and (gates * hidden, hidden); one hidden size for all layers and directions."""

    def rule(flow: Flow, a: Mapping[str, Any], out: Sequence[Any]) -> tuple[Labels, ...]:
        x: Labels = a["input"]
        states = a["hx"] if isinstance(a["hx"], tuple) else (a["hx"],)
        directions = 2 if a["bidirectional"] else 1
        params = list(a["params"])
        each = len(params) // (a["num_layers"] * directions)
        projected = each in (3, 5)
        hidden = states[-1].ids[-1]
        shown = states[0].ids[-1]
        if not projected:
            flow.tie(hidden, shown)
        for state in states:
            for ids in state.ids[:-1]:
                flow.pin(ids, f"{flow.here} keeps one state per layer")
        incoming = x.ids[-1]
        for layer in range(a["num_layers"]):
            for way in range(directions):
                own = params[(layer * directions + way) * each :][:each]
                flow.tie(incoming, own[0].ids[1])
                flow.tie(shown, own[1].ids[1])
                for weight in own[: 4 if a["has_biases"] else 2]:
                    _gated(flow, weight.ids[0], hidden, gates)
                if projected:
                    flow.tie(shown, own[-1].ids[0])
                    flow.tie(hidden, own[-1].ids[1])
            incoming = flow.atoms.merge((directions, states[0].shape[-1]), (None, shown))
        time = [None, None]
        result = Labels(_sizes(out[0]), (*time, incoming))
        return (result, *(Labels(state.shape, (None, None, state.ids[-1])) for state in states))

    return rule


def _gated(flow: Flow, rows: Ids | None, hidden: Ids | None, gates: int) -> None:
    if rows is None or len(rows) == gates:  # one unit: nothing may go, the gates least of all
        flow.pin(hidden)
        flow.pin(rows)
        return
    for gate in rows.reshape(gates, -1):
        flow.tie(hidden, gate)


RULES: dict[str, Rule] = {
    **{f"conv{rank}d": convolution(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": transposed(rank) for rank in (1, 2, 3)},
    "linear": linear,
    "matmul": matmul,
    "addmm": added_product("mat1", "mat2"),
    "baddbmm": added_product("batch1", "batch2"),
    "einsum": einsum,
    "attention": attention,
    "bilinear": bilinear,
    "embedding": embedding,
    "outer": outer,
    "weight_norm": weight_norm,
    "lstm": recurrence(4),
    "gru": recurrence(3),
    "rnn_tanh": recurrence(1),
    "rnn_relu": recurrence(1),
}
