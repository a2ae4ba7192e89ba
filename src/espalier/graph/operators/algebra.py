# ruff: noqa: ARG001 - every count has one signature
"""Operators that multiply and accumulate: convolutions, matrix products, attention, recurrence, lookup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.operators.schema import MAX_PIECES, Metas, Operator, row

_CONV = "input:T weight:T bias:T?=None stride:P={one} padding:G={zero} dilation:P={one} groups:p=1"
_TRANSPOSED = (
    "input:T weight:T bias:T?=None stride:P={one} padding:U={zero} output_padding:U={zero} groups:p=1 dilation:P={one}"
)
_RNN = (
    "input:T hx:{hidden} params:L has_biases:b num_layers:p dropout:f=0.0 train:b=False bidirectional:b=False "
    "batch_first:b=False"
)


def _signature(template: str, rank: int) -> str:
    return template.format(one=str([1] * rank).replace(" ", ""), zero=str([0] * rank).replace(" ", ""))


def _volume(shape: Sequence[int]) -> int:
    return math.prod(int(n) for n in shape)


def _conv_macs(args: Metas, out: Tensor) -> int:
    return out.numel() * _volume(args["weight"].shape[1:])


def _transposed_macs(args: Metas, out: Tensor) -> int:
    return int(args["input"].numel()) * _volume(args["weight"].shape[1:])


def _linear_macs(args: Metas, out: Tensor) -> int:
    return out.numel() * int(args["weight"].shape[-1])


def _product_macs(args: Metas, out: Tensor) -> int:
    first = args.get("mat1", args.get("batch1", args["self"]))
    return out.numel() * int(first.shape[-1])


def _outer_macs(args: Metas, out: Tensor) -> int:
    return out.numel()


def _bilinear_macs(args: Metas, out: Tensor) -> int:
    return out.numel() * _volume(args["weight"].shape[1:]) + out.numel() * int(args["weight"].shape[-1])


def _einsum_macs(args: Metas, out: Tensor) -> int:
    """Product of the extents of all labels (a contraction in one step); an ellipsis counts as its extents."""
    terms = str(args["equation"]).replace(" ", "").split("->")[0].split(",")
    extents: dict[str, int] = {}
    for term, tensor in zip(terms, args["tensors"], strict=True):
        head, dots, tail = term.partition("...")
        shape = list(tensor.shape)
        middle = shape[len(head) : len(shape) - len(tail)] if dots else []
        labels = [*head, *(f"...{len(middle) - k}" for k in range(len(middle))), *tail]
        for label, size in zip(labels, shape, strict=True):
            extents[label] = max(extents.get(label, 1), int(size))
    return math.prod(extents.values()) if len(terms) > 1 else 0


def _attention_macs(args: Metas, out: Tensor) -> int:
    query, key, value = args["query"], args["key"], args["value"]
    pairs = _volume(query.shape[:-1]) * int(key.shape[-2])
    return pairs * int(query.shape[-1] + value.shape[-1])


def _rnn_macs(args: Metas, out: Sequence[Tensor]) -> int:
    steps = int(args["input"].shape[0]) * int(args["input"].shape[1])
    return steps * sum(int(w.numel()) for w in args["params"] if w.dim() == 2)


def _rnn_shape(args: Metas) -> tuple[Tensor, ...]:
    """Output and last states without stepping through time (torch's own inference would)."""
    x, params = args["input"], args["params"]
    states = args["hx"] if isinstance(args["hx"], tuple) else (args["hx"],)
    if x.dim() != 3 or len(params) < 2 or any(p.dim() not in (1, 2) for p in params):
        raise RuntimeError(f"recurrence over {tuple(x.shape)} with {len(params)} weights")
    directions = 2 if args["bidirectional"] else 1
    batch = int(x.shape[0] if args["batch_first"] else x.shape[1])
    size = int(states[0].shape[-1])
    expected = (args["num_layers"] * directions, batch)
    if any(s.dim() != 3 or tuple(s.shape[:2]) != expected for s in states) or params[0].shape[-1] != x.shape[-1]:
        raise RuntimeError(f"recurrent states {[tuple(s.shape) for s in states]} for input {tuple(x.shape)}")
    out = x.new_empty((int(x.shape[0]), int(x.shape[1]), directions * size))
    return (out, *(s.new_empty(s.shape) for s in states))


def _rnn_guard(args: Metas) -> str | None:
    return f"{args['num_layers']} recurrent layers" if args["num_layers"] > MAX_PIECES else None


def _recurrence(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` (a torch recurrence) with the trailing arguments the graph leaves out."""

    def run(x: Tensor, hx: Any, params: Any, *rest: Any) -> Any:
        defaults = (True, 1, 0.0, False, False, False)
        return function(x, hx, params, *rest, *defaults[len(rest) :])

    return run


OPERATORS: tuple[Operator, ...] = (
    row(1, "conv1d", "conv1d conv1d.padding", _signature(_CONV, 1), torch.conv1d, macs=_conv_macs),
    row(2, "conv2d", "conv2d conv2d.padding", _signature(_CONV, 2), torch.conv2d, macs=_conv_macs),
    row(3, "conv3d", "conv3d conv3d.padding", _signature(_CONV, 3), torch.conv3d, macs=_conv_macs),
    row(
        4,
        "conv_transpose1d",
        "conv_transpose1d",
        _signature(_TRANSPOSED, 1),
        torch.conv_transpose1d,
        macs=_transposed_macs,
    ),
    row(
        5,
        "conv_transpose2d",
        "conv_transpose2d.input",
        _signature(_TRANSPOSED, 2),
        torch.conv_transpose2d,
        macs=_transposed_macs,
    ),
    row(
        6,
        "conv_transpose3d",
        "conv_transpose3d.input",
        _signature(_TRANSPOSED, 3),
        torch.conv_transpose3d,
        macs=_transposed_macs,
    ),
    row(7, "linear", "linear", "input:T weight:T bias:T?=None", F.linear, macs=_linear_macs),
    row(
        8,
        "matmul",
        "matmul mm bmm mv dot",
        "self:T other:T",
        torch.matmul,
        rename="mat2=other vec=other tensor=other",
        macs=_product_macs,
    ),
    row(9, "addmm", "addmm", "self:T mat1:T mat2:T *beta:#=1 *alpha:#=1", torch.addmm, macs=_product_macs),
    row(10, "baddbmm", "baddbmm", "self:T batch1:T batch2:T *beta:#=1 *alpha:#=1", torch.baddbmm, macs=_product_macs),
    row(
        11,
        "einsum",
        "einsum",
        "equation:e tensors:L",
        lambda equation, tensors: torch.einsum(equation, *tensors),
        macs=_einsum_macs,
    ),
    row(
        12,
        "attention",
        "scaled_dot_product_attention",
        "query:T key:T value:T attn_mask:T?=None dropout_p:f=0.0 is_causal:b=False *scale:f?=None *enable_gqa:b=False",
        lambda *args, **named: F.scaled_dot_product_attention(*args, **named),  # noqa: PLW0108 - looked up late
        macs=_attention_macs,
    ),
    row(13, "bilinear", "bilinear", "input1:T input2:T weight:T bias:T?=None", torch.bilinear, macs=_bilinear_macs),
    row(
        14,
        "embedding",
        "embedding",
        "weight:T indices:T padding_idx:i=-1 scale_grad_by_freq:b=False sparse:b=False",
        torch.embedding,
    ),
    row(25, "outer", "outer", "self:T vec2:T", torch.outer, macs=_outer_macs),
    row(19, "weight_norm", "_weight_norm", "v:T g:T dim:i=0", torch._weight_norm),
    row(
        15,
        "lstm",
        "lstm.input",
        _RNN.format(hidden="L"),
        _recurrence(torch.lstm),
        shape=_rnn_shape,
        guard=_rnn_guard,
        macs=_rnn_macs,
    ),
    row(
        16,
        "gru",
        "gru.input",
        _RNN.format(hidden="T"),
        _recurrence(torch.gru),
        shape=_rnn_shape,
        guard=_rnn_guard,
        macs=_rnn_macs,
    ),
    row(
        17,
        "rnn_tanh",
        "rnn_tanh.input",
        _RNN.format(hidden="T"),
        _recurrence(torch.rnn_tanh),
        shape=_rnn_shape,
        guard=_rnn_guard,
        macs=_rnn_macs,
    ),
    row(
        18,
        "rnn_relu",
        "rnn_relu.input",
        _RNN.format(hidden="T"),
        _recurrence(torch.rnn_relu),
        shape=_rnn_shape,
        guard=_rnn_guard,
        macs=_rnn_macs,
    ),
)
