"""Operators that move, pick, join or make elements, and those that compute sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.operators.schema import MAX_PIECES, Metas, Operator, row

aten = torch.ops.aten


def _pieces(count: int) -> str | None:
    return f"{count} pieces, at most {MAX_PIECES} are allowed" if count > MAX_PIECES else None


def _unbind_guard(args: Metas) -> str | None:
    return _pieces(int(args["self"].shape[args["dim"]]))


def _split_guard(args: Metas) -> str | None:
    return _pieces(int(args["self"].shape[args["dim"]]) // max(1, int(args["split_size"])))


def _chunk_guard(args: Metas) -> str | None:
    return _pieces(int(args["chunks"]))


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _size(self: Tensor, dim: int) -> int:
    return self.shape[dim]


def _slice(self: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    where = [slice(None)] * self.dim()
    where[dim] = slice(start, end, step)
    return self[tuple(where)]


def _select_scatter(self: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    return torch.select_scatter(self, src, dim, index)


def _index(self: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    return self[tuple(slice(None) if item is None else item for item in indices)]


def _expand(self: Tensor, size: Sequence[int]) -> Tensor:
    return self.expand(*size)


def _squeeze(self: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    return torch.squeeze(self) if dim is None else torch.squeeze(self, tuple(dim))


def _flatten(self: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    return torch.flatten(self, start_dim, end_dim)


def _arange(end: float, start: float = 0, step: float = 1, **keywords: Any) -> Tensor:
    return torch.arange(start, end, step, **keywords)


def _new_zeros(self: Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
    return self.new_zeros(tuple(size), dtype=dtype or self.dtype)


def _new_ones(self: Tensor, size: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
    return self.new_ones(tuple(size), dtype=dtype or self.dtype)


def _new_full(self: Tensor, size: Sequence[int], fill_value: float, *, dtype: torch.dtype | None = None) -> Tensor:
    return self.new_full(tuple(size), fill_value, dtype=dtype or self.dtype)


def _full_like(self: Tensor, fill_value: float | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    blank = torch.zeros_like(self, dtype=dtype or self.dtype)
    return blank + fill_value if isinstance(fill_value, Tensor) else blank.fill_(fill_value)


def _expand_as(self: Tensor, other: Tensor) -> Tensor:
    return self.expand_as(other)


def _reshape_as(self: Tensor, other: Tensor) -> Tensor:
    return self.reshape(other.shape)


def _repeat(self: Tensor, repeats: Sequence[int]) -> Tensor:
    return self.repeat(*repeats)


def _meshgrid(tensors: Sequence[Tensor], *, indexing: str = "ij") -> tuple[Tensor, ...]:
    return torch.meshgrid(*tensors, indexing=indexing)


def _unfold(self: Tensor, dimension: int, size: int, step: int) -> Tensor:
    return self.unfold(dimension, size, step)


_MOVING: tuple[Operator, ...] = (
    row(150, "reshape", "reshape view _unsafe_view", "self:T shape:N", torch.reshape, rename="size=shape"),
    row(151, "flatten", "flatten.using_ints", "self:T start_dim:i=0 end_dim:i=-1", _flatten),
    row(152, "unflatten", "unflatten.int", "self:T dim:i sizes:N", torch.unflatten),
    row(153, "permute", "permute", "self:T dims:I", torch.permute),
    row(
        154,
        "transpose",
        "transpose.int swapaxes swapdims",
        "self:T dim0:i dim1:i",
        torch.transpose,
        rename="axis0=dim0 axis1=dim1",
    ),
    row(155, "movedim", "movedim.intlist movedim.int", "self:T source:I destination:I", torch.movedim),
    row(156, "squeeze", "squeeze squeeze.dim squeeze.dims", "self:T dim:I?=None", _squeeze),
    row(157, "unsqueeze", "unsqueeze", "self:T dim:i", torch.unsqueeze),
    row(158, "expand", "expand broadcast_to", "self:T size:N", _expand),
    row(159, "expand_as", "expand_as", "self:T other:T", _expand_as),
    row(160, "reshape_as", "reshape_as view_as", "self:T other:T", _reshape_as),
    row(161, "repeat", "repeat", "self:T repeats:N", _repeat),
    row(162, "tile", "tile", "self:T dims:N", torch.tile),
    row(
        163, "repeat_interleave", "repeat_interleave.self_int", "self:T repeats:n dim:i?=None", torch.repeat_interleave
    ),
    row(164, "roll", "roll", "self:T shifts:I dims:I=[]", torch.roll),
    row(165, "flip", "flip", "self:T dims:I", torch.flip),
    row(
        166,
        "pad",
        "pad constant_pad_nd",
        "input:T pad:N mode:{constant,reflect,replicate,circular}='constant' value:f?=None",
        F.pad,
        rename="self=input",
    ),
    row(167, "pixel_shuffle", "pixel_shuffle", "self:T upscale_factor:p", torch.pixel_shuffle),
    row(168, "pixel_unshuffle", "pixel_unshuffle", "self:T downscale_factor:p", torch.pixel_unshuffle),
    row(169, "channel_shuffle", "channel_shuffle", "self:T groups:p", torch.channel_shuffle),
    row(170, "unfold", "unfold", "self:T dimension:i size:u step:p", _unfold),
    row(171, "im2col", "im2col", "self:T kernel_size:P dilation:P padding:U stride:P", aten.im2col.default),
    row(
        172, "col2im", "col2im", "self:T output_size:N kernel_size:P dilation:P padding:U stride:P", aten.col2im.default
    ),
    row(173, "tril", "tril", "self:T diagonal:i=0", torch.tril),
    row(174, "triu", "triu", "self:T diagonal:i=0", torch.triu),
    row(175, "diagonal", "diagonal", "self:T offset:i=0 dim1:i=0 dim2:i=1", torch.diagonal),
)
_PICKING: tuple[Operator, ...] = (
    row(180, "cat", "cat concat concatenate", "tensors:L dim:i=0", torch.cat),
    row(181, "stack", "stack", "tensors:L dim:i=0", torch.stack),
    row(182, "split", "split.Tensor", "self:T split_size:n dim:i=0", torch.split, guard=_split_guard),
    row(
        183,
        "split_with_sizes",
        "split_with_sizes split.sizes",
        "self:T split_sizes:N dim:i=0",
        torch.split,
        rename="split_size=split_sizes",
    ),
    row(184, "chunk", "chunk", "self:T chunks:p dim:i=0", torch.chunk, guard=_chunk_guard),
    row(185, "unbind", "unbind.int", "self:T dim:i=0", torch.unbind, guard=_unbind_guard),
    row(186, "item", "", "values:V index:u", _item),
    row(187, "slice", "slice.Tensor", "self:T dim:i=0 start:n?=None end:n?=None step:p=1", _slice),
    row(188, "narrow", "narrow", "self:T dim:i start:n length:n", torch.narrow),
    row(189, "select", "select.int", "self:T dim:i index:n", torch.select),
    row(190, "index", "index.Tensor", "self:T indices:L?", _index),
    row(191, "index_select", "index_select", "self:T dim:i index:T", torch.index_select),
    row(192, "gather", "gather", "self:T dim:i index:T", torch.gather),
    row(193, "take_along_dim", "take_along_dim", "self:T indices:T dim:i?=None", torch.take_along_dim),
    row(194, "select_scatter", "select_scatter", "self:T src:T dim:i index:n", _select_scatter),
    row(
        195,
        "slice_scatter",
        "slice_scatter",
        "self:T src:T dim:i=0 start:n?=None end:n?=None step:p=1",
        torch.slice_scatter,
    ),
    row(196, "one_hot", "one_hot", "self:T num_classes:p", F.one_hot),
    row(283, "index_put", "index_put", "self:T indices:L? values:T accumulate:b=False", aten.index_put.default),
    row(284, "scatter", "scatter.src scatter.value", "self:T dim:i index:T src:O", torch.scatter, rename="value=src"),
    row(285, "scatter_add", "scatter_add", "self:T dim:i index:T src:T", torch.scatter_add),
    row(286, "index_add", "index_add", "self:T dim:i index:T source:T *alpha:#=1", torch.index_add),
    row(197, "meshgrid", "meshgrid meshgrid.indexing", "tensors:L *indexing:{ij,xy}='ij'", _meshgrid),
)
_MAKING: tuple[Operator, ...] = (
    row(200, "zeros", "zeros empty.memory_format", "size:N *dtype:d?=None", torch.zeros, creates=True),
    row(201, "ones", "ones", "size:N *dtype:d?=None", torch.ones, creates=True),
    row(202, "full", "full", "size:N fill_value:# *dtype:d?=None", torch.full, creates=True),
    row(
        203,
        "arange",
        "arange arange.start arange.start_step",
        "end:# start:#=0 step:#=1 *dtype:d?=None",
        _arange,
        creates=True,
    ),
    row(204, "linspace", "linspace", "start:# end:# steps:n *dtype:d?=None", torch.linspace, creates=True),
    row(205, "eye", "eye", "n:n *dtype:d?=None", torch.eye, creates=True),
    row(206, "scalar_tensor", "scalar_tensor", "s:# *dtype:d?=None", torch.scalar_tensor, creates=True),
    row(207, "zeros_like", "zeros_like empty_like", "self:T *dtype:d?=None", torch.zeros_like),
    row(208, "ones_like", "ones_like", "self:T *dtype:d?=None", torch.ones_like),
    row(
        209,
        "full_like",
        "full_like fill.Scalar fill.Tensor",
        "self:T fill_value:O *dtype:d?=None",
        _full_like,
        rename="value=fill_value",
    ),
    row(210, "new_zeros", "new_zeros new_empty", "self:T size:N *dtype:d?=None", _new_zeros),
    row(211, "new_ones", "new_ones", "self:T size:N *dtype:d?=None", _new_ones),
    row(212, "new_full", "new_full", "self:T size:N fill_value:# *dtype:d?=None", _new_full),
)
_SIZES: tuple[Operator, ...] = (
    row(220, "size", "sym_size.int", "self:T dim:i", _size),
    row(221, "numel", "sym_numel", "self:T", Tensor.numel),
    row(222, "size_add", "_operator.add", "a:n b:n", operator.add),
    row(223, "size_sub", "_operator.sub", "a:n b:n", operator.sub),
    row(224, "size_mul", "_operator.mul", "a:n b:n", operator.mul),
    row(225, "size_div", "_operator.floordiv", "a:n b:n", operator.floordiv),
    row(226, "size_mod", "_operator.mod", "a:n b:n", operator.mod),
    row(227, "size_neg", "_operator.neg", "a:n", operator.neg),
)
OPERATORS: tuple[Operator, ...] = (*_MOVING, *_PICKING, *_MAKING, *_SIZES)
