"""Operators over neighbourhoods and whole dimensions: pooling, resizing, statistics, normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.graph.operators.schema import MAX_PIECES, Metas, Operator, row

aten = torch.ops.aten

_MAX = "self:T kernel_size:P stride:P=[] padding:U={zero} dilation:P={one} ceil_mode:b=False"
_AVERAGE = "self:T kernel_size:P stride:P=[] padding:U={zero} ceil_mode:b=False count_include_pad:b=True"
_DIM = "self:T dim:I?=None keepdim:b=False *dtype:d?=None"


def _ranked(template: str, rank: int) -> str:
    return template.format(one=str([1] * rank).replace(" ", ""), zero=str([0] * rank).replace(" ", ""))


def _window_guard(args: Metas) -> str | None:
    wide = [k for k in (*args["kernel_size"], *args["stride"]) if k > MAX_PIECES]
    return f"a pooling window of {wide[0]}" if wide else None


def _mean(
    self: Tensor, dim: tuple[int, ...] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.mean(self, dim, keepdim, dtype=dtype)


def _sum(
    self: Tensor, dim: tuple[int, ...] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.sum(self, dim, keepdim, dtype=dtype)


def _prod(self: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.prod(self, dtype=dtype) if dim is None else torch.prod(self, dim, keepdim, dtype=dtype)


def _any(self: Tensor, dim: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.any(self) if dim is None else torch.any(self, dim, keepdim)


def _all(self: Tensor, dim: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    return torch.all(self) if dim is None else torch.all(self, dim, keepdim)


def _max_dim(self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return tuple(torch.max(self, dim, keepdim))  # type: ignore[return-value]


def _min_dim(self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return tuple(torch.min(self, dim, keepdim))  # type: ignore[return-value]


def _batch_norm(x: Tensor, *rest: object) -> Tensor:
    defaults = (None, None, None, None, False, 0.1, 1e-5)
    values = (*rest, *defaults[len(rest) :])
    momentum = 0.1 if values[5] is None else values[5]
    return torch.batch_norm(x, *values[:5], momentum, values[6], False)  # type: ignore[arg-type,call-arg]


def _instance_norm(x: Tensor, *rest: object) -> Tensor:
    defaults = (None, None, None, None, True, 0.1, 1e-5)
    return torch.instance_norm(x, *rest, *defaults[len(rest) :], False)  # type: ignore[arg-type,call-arg]


OPERATORS: tuple[Operator, ...] = (
    row(
        20,
        "batch_norm",
        "batch_norm",
        "input:T weight:T?=None bias:T?=None running_mean:T?=None running_var:T?=None training:b=False "
        "momentum:f?=0.1 eps:f=1e-5",
        _batch_norm,
    ),
    row(
        21,
        "layer_norm",
        "layer_norm",
        "input:T normalized_shape:P weight:T?=None bias:T?=None eps:f=1e-5",
        torch.layer_norm,
    ),
    row(
        22, "group_norm", "group_norm", "input:T num_groups:p weight:T?=None bias:T?=None eps:f=1e-5", torch.group_norm
    ),
    row(
        23,
        "instance_norm",
        "instance_norm",
        "input:T weight:T?=None bias:T?=None running_mean:T?=None running_var:T?=None use_input_stats:b=True "
        "momentum:f=0.1 eps:f=1e-5",
        _instance_norm,
    ),
    row(24, "rms_norm", "rms_norm", "input:T normalized_shape:P weight:T?=None eps:f?=None", torch.rms_norm),
    row(230, "max_pool1d", "max_pool1d", _ranked(_MAX, 1), torch.max_pool1d, guard=_window_guard),
    row(231, "max_pool2d", "max_pool2d", _ranked(_MAX, 2), torch.max_pool2d, guard=_window_guard),
    row(232, "max_pool3d", "max_pool3d", _ranked(_MAX, 3), torch.max_pool3d, guard=_window_guard),
    row(
        233,
        "max_pool2d_indices",
        "max_pool2d_with_indices",
        _ranked(_MAX, 2),
        aten.max_pool2d_with_indices.default,
        guard=_window_guard,
    ),
    row(234, "avg_pool1d", "avg_pool1d", _ranked(_AVERAGE, 1), aten.avg_pool1d.default, guard=_window_guard),
    row(
        235,
        "avg_pool2d",
        "avg_pool2d",
        _ranked(_AVERAGE, 2) + " divisor_override:p?=None",
        aten.avg_pool2d.default,
        guard=_window_guard,
    ),
    row(
        236,
        "avg_pool3d",
        "avg_pool3d",
        _ranked(_AVERAGE, 3) + " divisor_override:p?=None",
        aten.avg_pool3d.default,
        guard=_window_guard,
    ),
    row(237, "adaptive_avg_pool1d", "adaptive_avg_pool1d", "self:T output_size:P", aten.adaptive_avg_pool1d.default),
    row(238, "adaptive_avg_pool2d", "adaptive_avg_pool2d", "self:T output_size:P", aten.adaptive_avg_pool2d.default),
    row(239, "adaptive_avg_pool3d", "adaptive_avg_pool3d", "self:T output_size:P", aten.adaptive_avg_pool3d.default),
    row(240, "adaptive_max_pool1d", "adaptive_max_pool1d", "self:T output_size:P", aten.adaptive_max_pool1d.default),
    row(241, "adaptive_max_pool2d", "adaptive_max_pool2d", "self:T output_size:P", aten.adaptive_max_pool2d.default),
    row(
        245,
        "upsample_nearest1d",
        "upsample_nearest1d.vec",
        "input:T output_size:N? scale_factors:F?",
        aten.upsample_nearest1d.vec,
    ),
    row(
        246,
        "upsample_nearest2d",
        "upsample_nearest2d.vec",
        "input:T output_size:N? scale_factors:F?",
        aten.upsample_nearest2d.vec,
    ),
    row(
        247,
        "upsample_nearest3d",
        "upsample_nearest3d.vec",
        "input:T output_size:N? scale_factors:F?",
        aten.upsample_nearest3d.vec,
    ),
    row(
        248,
        "upsample_linear1d",
        "upsample_linear1d.vec",
        "input:T output_size:N? align_corners:b scale_factors:F?",
        aten.upsample_linear1d.vec,
    ),
    row(
        249,
        "upsample_bilinear2d",
        "upsample_bilinear2d.vec",
        "input:T output_size:N? align_corners:b scale_factors:F?",
        aten.upsample_bilinear2d.vec,
    ),
    row(
        250,
        "upsample_bicubic2d",
        "upsample_bicubic2d.vec",
        "input:T output_size:N? align_corners:b scale_factors:F?",
        aten.upsample_bicubic2d.vec,
    ),
    row(
        251,
        "upsample_trilinear3d",
        "upsample_trilinear3d.vec",
        "input:T output_size:N? align_corners:b scale_factors:F?",
        aten.upsample_trilinear3d.vec,
    ),
    row(
        252,
        "grid_sample",
        "grid_sampler",
        "input:T grid:T interpolation_mode:u padding_mode:u align_corners:b",
        torch.grid_sampler,
    ),
    row(260, "mean", "mean mean.dim", _DIM, _mean),
    row(261, "sum", "sum sum.dim_IntList", _DIM, _sum),
    row(262, "prod", "prod prod.dim_int", "self:T dim:i?=None keepdim:b=False *dtype:d?=None", _prod),
    row(263, "amax", "amax max", "self:T dim:I=[] keepdim:b=False", torch.amax),
    row(264, "amin", "amin min", "self:T dim:I=[] keepdim:b=False", torch.amin),
    row(265, "max_dim", "max.dim", "self:T dim:i keepdim:b=False", _max_dim),
    row(266, "min_dim", "min.dim", "self:T dim:i keepdim:b=False", _min_dim),
    row(267, "argmax", "argmax", "self:T dim:i?=None keepdim:b=False", torch.argmax),
    row(268, "argmin", "argmin", "self:T dim:i?=None keepdim:b=False", torch.argmin),
    row(269, "var", "var var.dim var.correction", "self:T dim:I?=None *correction:#=1 *keepdim:b=False", torch.var),
    row(270, "std", "std std.dim std.correction", "self:T dim:I?=None *correction:#=1 *keepdim:b=False", torch.std),
    row(271, "any", "any any.dim any.dims", "self:T dim:I?=None keepdim:b=False", _any),
    row(272, "all", "all all.dim all.dims", "self:T dim:I?=None keepdim:b=False", _all),
    row(273, "softmax", "softmax.int", "self:T dim:i dtype:d?=None", torch.softmax),
    row(274, "log_softmax", "log_softmax.int", "self:T dim:i dtype:d?=None", torch.log_softmax),
    row(275, "logsumexp", "logsumexp", "self:T dim:I keepdim:b=False", torch.logsumexp),
    row(
        276,
        "vector_norm",
        "linalg_vector_norm norm.Scalar norm.ScalarOpt_dim",
        "self:T ord:#=2 dim:I?=None keepdim:b=False *dtype:d?=None",
        torch.linalg.vector_norm,
        rename="p=ord",
    ),
    row(277, "cumsum", "cumsum", "self:T dim:i *dtype:d?=None", torch.cumsum),
    row(278, "cumprod", "cumprod", "self:T dim:i *dtype:d?=None", torch.cumprod),
    row(279, "topk", "topk", "self:T k:n dim:i=-1 largest:b=True sorted:b=True", aten.topk.default),
    row(280, "sort", "sort", "self:T dim:i=-1 descending:b=False", aten.sort.default),
    row(281, "argsort", "argsort", "self:T dim:i=-1 descending:b=False", torch.argsort),
    row(282, "cosine_similarity", "cosine_similarity", "x1:T x2:T dim:i=1 eps:f=1e-8", torch.cosine_similarity),
)
