"""Operators that work element by element: arithmetic, comparisons, activations, dropout, dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.operators.schema import Operator, row

aten = torch.ops.aten


def _rsub(self: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    return other - self if alpha == 1 else torch.rsub(self, other, alpha=alpha)


def _to(self: Tensor, dtype: torch.dtype) -> Tensor:
    return self.to(dtype)


def _scale_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x * weight + bias`` per channel (dimension 1); ``weight`` and ``bias`` have shape (channels,)."""
    view = (-1,) + (1,) * (x.dim() - 2)
    return x * weight.view(view) + bias.view(view)


def _dropout(function: Callable[[Tensor, float, bool], Tensor]) -> Callable[..., Tensor]:
    """``function`` with the defaults of the table; the runner holds a module that knows train from eval."""

    def run(x: Tensor, p: float = 0.5, train: bool = False) -> Tensor:
        return function(x, p, train)

    return run


def _clamp(self: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    return torch.clamp(self, low, high)  # type: ignore[arg-type]


_UNARY = (
    "neg",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "square",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "tanh",
    "sigmoid",
    "abs",
    "sign",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "erf",
    "erfc",
    "isnan",
    "isinf",
    "isfinite",
    "relu",
    "selu",
    "logical_not",
    "bitwise_not",
)
_BINARY = (
    ("maximum", "maximum max.other"),
    ("minimum", "minimum min.other"),
    ("fmod", "fmod.Tensor fmod.Scalar"),
    ("atan2", "atan2"),
    ("logical_and", "logical_and"),
    ("logical_or", "logical_or"),
    ("logical_xor", "logical_xor"),
)
_COMPARISON = ("eq", "ne", "lt", "le", "gt", "ge")
_BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")

OPERATORS: tuple[Operator, ...] = (
    row(30, "add", "add.Tensor add.Scalar", "self:O other:O *alpha:#=1", torch.add),
    row(31, "sub", "sub.Tensor sub.Scalar", "self:O other:O *alpha:#=1", torch.sub),
    row(32, "rsub", "rsub.Tensor rsub.Scalar", "self:T other:O *alpha:#=1", _rsub),
    row(33, "mul", "mul.Tensor mul.Scalar", "self:O other:O", torch.mul),
    row(
        34,
        "div",
        "div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode true_divide.Tensor",
        "self:O other:O *rounding_mode:{floor,trunc}?=None",
        torch.div,
    ),
    row(35, "floor_divide", "floor_divide floor_divide.Scalar", "self:O other:O", torch.floor_divide),
    row(
        36, "remainder", "remainder.Tensor remainder.Scalar remainder.Scalar_Tensor", "self:O other:O", torch.remainder
    ),
    row(37, "pow", "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar", "self:O exponent:O", torch.pow),
    row(38, "lerp", "lerp.Scalar lerp.Tensor", "self:T end:T weight:O", torch.lerp),
    row(39, "addcmul", "addcmul", "self:T tensor1:T tensor2:T *value:#=1", torch.addcmul),
    row(40, "addcdiv", "addcdiv", "self:T tensor1:T tensor2:T *value:#=1", torch.addcdiv),
    row(
        41,
        "clamp",
        "clamp clamp.Tensor clamp_min clamp_max clamp_min.Tensor clamp_max.Tensor",
        "self:T min:O?=None max:O?=None",
        _clamp,
    ),
    row(
        42,
        "where",
        "where.self where.ScalarSelf where.ScalarOther where.Scalar",
        "condition:T self:O other:O",
        torch.where,
    ),
    row(43, "masked_fill", "masked_fill.Scalar masked_fill.Tensor", "self:T mask:T value:O", torch.masked_fill),
    row(44, "nan_to_num", "nan_to_num", "self:T nan:f?=None posinf:f?=None neginf:f?=None", torch.nan_to_num),
    row(45, "to", "", "self:T dtype:d", _to),
    row(46, "scale_shift", "", "input:T weight:T bias:T", _scale_shift),
    row(47, "dropout", "dropout", "input:T p:f=0.5 train:b=False", _dropout(torch.dropout), rename="self=input"),
    row(
        48,
        "feature_dropout",
        "feature_dropout",
        "input:T p:f=0.5 train:b=False",
        _dropout(torch.feature_dropout),
        rename="self=input",
    ),
    row(
        49,
        "alpha_dropout",
        "alpha_dropout",
        "input:T p:f=0.5 train:b=False",
        _dropout(torch.alpha_dropout),
        rename="self=input",
    ),
    row(50, "relu6", "relu6", "self:T", F.relu6),
    row(51, "leaky_relu", "leaky_relu", "self:T negative_slope:#=0.01", F.leaky_relu),
    row(52, "elu", "elu", "self:T alpha:#=1 scale:#=1 input_scale:#=1", aten.elu.default),
    row(53, "celu", "celu", "self:T alpha:#=1.0", torch.celu),
    row(54, "gelu", "gelu", "self:T *approximate:{none,tanh}='none'", F.gelu),
    row(55, "silu", "silu", "self:T", F.silu),
    row(56, "mish", "mish", "self:T", F.mish),
    row(57, "hardswish", "hardswish", "self:T", F.hardswish),
    row(58, "hardsigmoid", "hardsigmoid", "self:T", F.hardsigmoid),
    row(59, "hardtanh", "hardtanh", "self:T min_val:#=-1 max_val:#=1", F.hardtanh),
    row(60, "softplus", "softplus", "self:T beta:#=1 threshold:#=20", F.softplus),
    row(61, "log_sigmoid", "log_sigmoid", "self:T", F.logsigmoid),
    row(62, "prelu", "prelu", "self:T weight:T", torch.prelu),
    row(63, "threshold", "threshold", "self:T threshold:# value:#", torch.threshold),
    row(64, "hardshrink", "hardshrink", "self:T lambd:#=0.5", F.hardshrink),
    row(65, "softshrink", "softshrink", "self:T lambd:#=0.5", F.softshrink),
    row(
        67,
        "fake_quantize",
        "fake_quantize_per_tensor_affine.tensor_qparams fake_quantize_per_tensor_affine",
        "self:T scale:O zero_point:O quant_min:i quant_max:i",
        torch.fake_quantize_per_tensor_affine,
        shape=lambda a: torch.empty_like(a["self"]),  # torch has no meta kernel
    ),
    row(68, "bucketize", "bucketize.Tensor", "self:T boundaries:T *out_int32:b=False *right:b=False", torch.bucketize),
    row(66, "glu", "glu", "self:T dim:i=-1", F.glu),
    *(row(70 + k, name, name, "self:T", getattr(torch, name)) for k, name in enumerate(_UNARY)),
    *(row(120 + k, name, targets, "self:T other:O", getattr(torch, name)) for k, (name, targets) in enumerate(_BINARY)),
    *(
        row(130 + k, name, f"{name}.Tensor {name}.Scalar", "self:T other:O", getattr(torch, name))
        for k, name in enumerate(_COMPARISON)
    ),
    *(
        row(
            140 + k,
            name,
            f"{name}.Tensor {name}.Scalar __{name[8:]}__.Tensor __{name[8:]}__.Scalar",
            "self:T other:O",
            getattr(torch, name),
        )
        for k, name in enumerate(_BITWISE)
    ),
)
