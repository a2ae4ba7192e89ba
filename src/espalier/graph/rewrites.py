# ruff: noqa: ARG001 - every rewrite has one signature
"""What the normaliser changes besides names: sizes that follow from the batch, casts, legacy overloads.

``REWRITES`` map an exported overload to a value (None: go on as usual); ``FILL`` correct the arguments of a
table operator, or return a reference when the operator does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from espalier.graph.exported import Builder, is_free
from espalier.graph.graph import Arg, Value, Weight
from espalier.graph.operators.schema import MAX_INT, dtype_name
from espalier.graph.runner import Runner

Arguments = dict[str, Arg]


def _meta(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node


def _cast(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    """A change of dtype, or nothing: device and layout are not part of a graph."""
    before, after = _meta(node.args[0]), _meta(node)
    source: Any = next(iter(given.values()))
    if before.dtype == after.dtype:
        return source
    return builder.emit("to", {"self": source, "dtype": dtype_name(after.dtype)})


def _copy(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    """``self.copy_(src)``: the source in the shape and dtype of ``self``."""
    target, source = _meta(node.args[0]), _meta(node.args[1])
    value = given["src"]
    if target.dtype != source.dtype:
        value = builder.emit("to", {"self": value, "dtype": dtype_name(target.dtype)})
    if tuple(target.shape) != tuple(source.shape):
        value = builder.emit("expand_as", {"self": value, "other": given["self"]})
    return value


def _transpose(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    """``x.t()``, ``x.mT``, ``x.T``."""
    if _meta(node).dim() < 2:
        return given["self"]
    return builder.emit("transpose", {"self": given["self"], "dim0": -2, "dim1": -1})


def _unbiased(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    given["correction"] = 1 if given.pop("unbiased", True) else 0


def _correction(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    given["correction"] = 1 if given.get("correction") is None else given["correction"]


def _padding_value(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    given["value"] = given["value"] or None


def _joined(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    """``hstack`` and ``vstack`` of tensors that need no new dimension."""
    full = str(node.target)
    rank = _meta(node).dim()
    if any(_meta(item).dim() != rank for item in node.args[0]):  # type: ignore[union-attr]
        return None
    return builder.emit("cat", {"tensors": given["tensors"], "dim": int("hstack" in full and rank > 1)})


def _at_least(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    """``atleast_2d`` and the like of a tensor that has the dimensions already."""
    return given["self"] if _meta(node.args[0]).dim() == _meta(node).dim() else None


def _zero(builder: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    return builder.emit("zeros_like", {"self": given["self"]})


REWRITES: dict[str, Callable[[Builder, fx.Node, dict[str, Any]], Any]] = {
    **dict.fromkeys(
        (
            "to.dtype",
            "to.dtype_layout",
            "to.device",
            "to.other",
            "_to_copy.default",
            "type_as.default",
            "to.prim_Device",
        ),
        _cast,
    ),
    **dict.fromkeys(("t.default", "mT.default", "numpy_T.default", "adjoint.default", "mH.default"), _transpose),
    **dict.fromkeys(("var.default", "var.dim", "std.default", "std.dim"), _unbiased),
    **dict.fromkeys(("var.correction", "std.correction"), _correction),
    **dict.fromkeys(("hstack.default", "vstack.default"), _joined),
    **dict.fromkeys(("atleast_1d.default", "atleast_2d.default", "atleast_3d.default"), _at_least),
    "copy.default": _copy,
    "constant_pad_nd.default": _padding_value,
    "zero.default": _zero,
}


def _reshape(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """One unknown extent becomes -1, so that the batch may be any."""
    shape = arguments["shape"]
    result = _meta(node).shape
    if not isinstance(shape, tuple):
        return arguments
    full: list[Arg] = [ours if is_free(n) else int(n) for n, ours in zip(result, shape, strict=True)]
    free = [k for k, n in enumerate(result) if is_free(n)]
    if len(free) == 1 and 0 not in full:
        full[free[0]] = -1
    return {**arguments, "shape": tuple(full)}


def _unflatten(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    sizes = arguments["sizes"]
    if isinstance(sizes, tuple) and -1 not in sizes:
        free = [k for k, n in enumerate(sizes) if isinstance(n, Value)]
        if len(free) == 1:
            arguments = {**arguments, "sizes": tuple(-1 if k == free[0] else n for k, n in enumerate(sizes))}
    return arguments


def _expand(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """Extents that are kept become -1; an expansion that keeps them all is nothing."""
    before, after = _meta(node.args[0]).shape, _meta(node).shape
    size = arguments["size"]
    if not isinstance(size, tuple):
        return arguments
    offset = len(after) - len(before)
    kept: list[Arg] = [
        -1 if k >= offset and str(before[k - offset]) == str(n) else given
        for k, (n, given) in enumerate(zip(after, size, strict=True))
    ]
    if offset == 0 and set(kept) == {-1}:
        return _reference(arguments["self"])
    return {**arguments, "size": tuple(kept)}


def _slice(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """Open ends as None; a slice that keeps everything is nothing."""
    if "start" not in arguments and "end" not in arguments:
        return arguments
    start, end = arguments.get("start"), arguments.get("end")
    start = None if start == 0 or start is None else start
    end = None if isinstance(end, int) and end > MAX_INT else end
    if start is None and end is None and arguments.get("step", 1) == 1:
        return _reference(arguments["self"])
    return {**arguments, "start": start, "end": end}


def _pool(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """A stride equal to the window is the default."""
    same = arguments.get("stride") == arguments["kernel_size"]
    return {**arguments, "stride": ()} if same else arguments


def _module(builder: Builder) -> nn.Module | None:
    try:
        return builder.model.get_submodule(builder.path)
    except AttributeError:
        return None


def _batch_norm(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """A cumulative average (momentum None) is traced as momentum 0: take it back from the module."""
    module = _module(builder)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        momentum = module.momentum
        return {**arguments, "momentum": None if momentum is None else float(momentum)}
    return arguments


def _attention(builder: Builder, node: fx.Node, arguments: Arguments) -> Arguments | Value | Weight:
    """In eval mode attention is traced without its dropout: take it back from the module or the traced runner."""
    module = _module(builder)
    if isinstance(builder.model, Runner):
        before = sum(done.op == "attention" for done in builder.nodes)
        nodes = [known for known in builder.model.graph.nodes if known.op == "attention"]
        return (
            {**arguments, "dropout_p": nodes[before].args.get("dropout_p", 0.0)} if before < len(nodes) else arguments
        )
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return {**arguments, "dropout_p": float(module.dropout)}
    return arguments


def _reference(arg: Arg) -> Value | Weight:
    if not isinstance(arg, Value | Weight):
        raise TypeError(f"{arg!r} is no reference")
    return arg


FILL: dict[str, Callable[[Builder, fx.Node, Arguments], Arguments | Value | Weight]] = {
    "reshape": _reshape,
    "unflatten": _unflatten,
    "expand": _expand,
    "slice": _slice,
    "batch_norm": _batch_norm,
    "attention": _attention,
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        _pool,
    ),
}
