"""The exported file is run and its outputs are compared with the model's: no export succeeds without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from espalier.core.errors import EspalierError, ModelError
from espalier.core.inputs import quantized_inputs
from espalier.core.model import evaluating
from espalier.deploy.runtimes import Session, first_line
from espalier.deploy.signature import tensors_in
from espalier.graph import Runner

TOLERANCE = 1e-4
"""Largest allowed difference of an output, relative to its largest value: two orders above what another order of
fp32 sums makes in deep networks, far below what a wrong operator makes."""

ROUNDED_DB = 25.0
"""Least SQNR of an output of a model that rounds its activations: a tie that another order of sums breaks the other way
is a whole step, so the largest difference says little there."""

Array = NDArray[Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """``difference``: largest relative difference of any output of ``runtime`` at ``batch`` samples from the model."""

    runtime: str
    batch: int | None
    difference: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def difference(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|; NaN and infinities must stand in the same places, else infinity."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    a, b = got.detach().cpu().double(), wanted.detach().cpu().double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    gap = (a - b)[finite].abs()
    if not gap.numel() or not float(gap.max()):
        return 0.0
    return float(gap.max() / b[finite].abs().max().clamp_min(1e-30))


def sqnr(wanted: Sequence[Tensor | Array], got: Sequence[Tensor | Array]) -> float:
    """10 log10(sum wanted^2 / sum (wanted - got)^2) over all tensors together, in dB; infinity where equal."""
    pairs = [(_wide(w), _wide(g)) for w, g in zip(wanted, got, strict=True)]
    signal = sum(float((w**2).sum()) for w, _ in pairs)
    noise = sum(float(((w - g) ** 2).sum()) for w, g in pairs)
    if not np.isfinite(noise):
        return float("-inf")
    return float("inf") if noise == 0 else float(10 * np.log10(signal / noise)) if signal else float("-inf")


def _wide(values: Tensor | Array) -> Array:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    return array.astype(np.float64, copy=False)


def rounds(model: nn.Module) -> bool:
    """Whether activations are rounded on the way, by input quantizers or in a graph that has them traced."""
    graph = model.graph.nodes if isinstance(model, Runner) else ()
    return bool(quantized_inputs(model)) or any(node.op in ("fake_quantize", "bucketize") for node in graph)


def resized(call: Call, batch: int) -> Call:
    """``call`` with its samples repeated or cut to ``batch``; tensors as long as the first one have the batch axis."""
    length = batch_of(call)

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != length or not length:
            return leaf
        return leaf.repeat(-(-batch // length), *[1] * (leaf.ndim - 1))[:batch].clone()

    args, kwargs = tree_map(fit, call)
    return args, kwargs


def batch_of(call: Call) -> int | None:
    """Samples in a call: the first axis of its first tensor that has one."""
    return next((int(x.shape[0]) for x in tree_leaves(call) if isinstance(x, Tensor) and x.ndim), None)


def check(
    model: nn.Module, session: Session, call: Call, *, batches: Sequence[int] = (), tolerance: float = TOLERANCE
) -> list[Check]:
    """Compare ``session`` with ``model`` on ``call`` as it is and cut or repeated to each of ``batches``.

    Batches that the model itself refuses are left out. Outputs of a model that rounds its activations may differ by
    more where their SQNR is ``ROUNDED_DB`` or more. Raises ``ModelError`` naming the output that differs by more
    than ``tolerance`` (relative to its largest value), with both shapes.
    """
    found = []
    for batch in (None, *batches):
        args, kwargs = call if batch is None else resized(call, batch)
        try:
            with evaluating(model):
                wanted = tensors_in(model(*args, **kwargs))
        except Exception:
            if batch is None:
                raise
            continue
        got = _run(session, args, kwargs, batch)
        worst = _worst(session, got, wanted, model, tolerance, batch or batch_of(call))
        found.append(Check(session.runtime, batch or batch_of(call), worst))
    return found


def _run(session: Session, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int | None) -> list[Tensor]:
    try:
        with torch.no_grad():
            return tensors_in(session.module()(*args, **kwargs))
    except EspalierError:
        raise
    except Exception as error:
        where = "the example" if batch is None else f"{batch} samples"
        raise ModelError(
            f"the exported file does not run on {where} in {session.runtime}: {first_line(error)} "
            "No file was written. Try another runtime, or report the model."
        ) from error


def _worst(
    session: Session, got: Sequence[Tensor], wanted: Sequence[Tensor], model: nn.Module, tolerance: float, batch: Any
) -> float:
    if len(got) != len(wanted):
        raise ModelError(
            f"the exported file gives {len(got)} outputs in {session.runtime}, the model {len(wanted)}. "
            "Please report the model."
        )
    worst = 0.0
    for name, a, b in zip(session.signature.outputs, got, wanted, strict=True):
        gap = difference(a, b)
        worst = max(worst, gap)
        if gap <= tolerance or (gap < float("inf") and rounds(model) and sqnr([b], [a]) >= ROUNDED_DB):
            continue
        shapes = f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}".replace("torch.", "")
        why = " Forward hooks are not exported: put what they compute into forward." if _hooked(model) else ""
        raise ModelError(
            f"the exported file disagrees with the model in {session.runtime}: output {name!r} differs by {gap:.2g} of "
            f"its largest value at batch {batch} ({shapes}); {tolerance:.2g} is allowed. No file was written.{why}"
        )
    return worst


def _hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks for module in model.modules())


def largest(checks: Sequence[Check]) -> float:
    """The largest difference of all checks."""
    return float(np.max([check.difference for check in checks])) if checks else 0.0
