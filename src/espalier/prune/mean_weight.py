r"""Mean weight: the units whose incoming or outgoing weights are small on average go.

Paper    none
Formula  in: s_u = mean |W[u, :]|;   out: s_u = mean |W_next[:, u]| over all weights that read unit u
         both: s_u = (in + out) / 2
Departs  Absolute values are averaged, so a unit of a wide layer is comparable to one of a narrow layer. Readers are
         found by running one training batch: the linear and convolutional layers reached through batch norm,
         activations, pooling and flattening. What lies behind an addition or a concatenation is not followed. Units
         that no such layer reads have no score with side=out and are judged by their incoming weights with side=both.
         Embeddings have no scores: their rows are words.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.grouping import looked_up
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import FOLLOWED, unit_layers, unit_rows
from espalier.train.looking import batches, looking

_KEY = "_espalier_source"
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
_FLATTEN = frozenset({"flatten", "view", "reshape", "squeeze"})


def mean_absolute(rows: Tensor) -> Tensor:
    """(units, weights) -> (units,): mean |w|."""
    return rows.abs().mean(1)


def mean_read(weight: Tensor, units: int, groups: int, *, transposed: bool) -> Tensor:
    """Mean |w| over the weights that read each of ``units`` inputs; inputs flattened from maps come in blocks."""
    if transposed:  # (in, out / groups, *kernel)
        return weight.abs().flatten(1).mean(1)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.abs().mean((1, 3)).reshape(units, -1).mean(1)


@dataclass(frozen=True, kw_only=True)
class MeanWeight(Criterion):
    """Score of an output unit = mean absolute weight into it, out of it, or the mean of both (``side``)."""

    id: ClassVar[str] = "mean-weight"
    of = "units"
    side: Literal["in", "out", "both"] = "in"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.side == "in" else frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        for slot in selection.where(looked_up):
            context.skip(slot.name, "its rows are looked up, as words are; they are not units of a layer")
        selection = selection.where(lambda slot: not looked_up(slot))
        incoming = {slot.name: mean_absolute(unit_rows(slot)) for slot in selection}
        if self.side == "in":
            return incoming
        outgoing = _outgoing(model, selection, context)
        found: Scores = {}
        for name, score in incoming.items():
            if name in outgoing:
                found[name] = outgoing[name] if self.side == "out" else (score + outgoing[name]) / 2
            elif self.side == "both":
                found[name] = score
            else:
                context.skip(name, "no layer was seen to read its units directly; side=in needs none")
        return found


def _outgoing(model: nn.Module, selection: Selection, context: Context) -> Scores:
    """Weight name -> mean |w| of what reads its units, over all readers together."""
    wiring = _Wiring({id(module): slot.name for slot in selection for module in unit_layers(slot)})
    sizes = {slot.name: len(unit_rows(slot)) for slot in selection}
    with looking(model, context, grad=False), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | _ConvNd):
                stack.callback(module.register_forward_pre_hook(wiring.read).remove)
                stack.callback(module.register_forward_hook(wiring.mark).remove)
        for batch in batches(model, context, 1, "wiring"):
            with wiring:
                context.data.predict(model, batch)
        found: dict[str, list[tuple[Tensor, float]]] = {}
        for name, reader in wiring.readers.values():
            weight = reader.weight
            assert isinstance(weight, Tensor)  # noqa: S101 - a linear or convolutional layer
            groups = reader.groups if isinstance(reader, _ConvNd) else 1
            transposed = isinstance(reader, _ConvTransposeNd)
            read = mean_read(weight.detach(), sizes[name], groups, transposed=transposed)
            found.setdefault(name, []).append((read, weight.numel() / sizes[name]))
    return {
        name: torch.stack([read * share for read, share in parts]).sum(0) / sum(share for _, share in parts)
        for name, parts in found.items()
    }


class _Wiring(TorchFunctionMode):
    """Marks layer outputs with (weight's name, units along dimension 1 or the last) and sees which layers read them."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.readers: dict[tuple[str, int], tuple[str, nn.Module]] = {}

    def mark(self, module: nn.Module, _: Any, output: Any) -> None:
        """Forward hook of the layers."""
        if isinstance(output, Tensor):
            vars(output).pop(_KEY, None)
            if id(module) in self.layers:
                vars(output)[_KEY] = (self.layers[id(module)], 1 if isinstance(module, _ConvNd) else -1)

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the layers."""
        source = vars(args[0]).get(_KEY) if args and isinstance(args[0], Tensor) else None
        if source is not None:
            name, axis = source
            if args[0].ndim == 2 or axis == (1 if isinstance(module, _ConvNd) else -1):
                self.readers[name, id(module)] = (name, module)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = getattr(func, "__name__", "").strip("_")
        source = vars(args[0]).get(_KEY) if args and isinstance(args[0], Tensor) else None
        if source is not None and isinstance(result, Tensor):
            if op in FOLLOWED or (source[1] == 1 and _keeps_channels(op, args, kwargs or {}, result)):
                vars(result)[_KEY] = source
            elif result is args[0]:
                vars(result).pop(_KEY, None)
        return result


def _keeps_channels(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    """Whether a map's channels are still dimension 1, one by one or as blocks of a flat row."""
    x: Tensor = args[0]
    if op == "mean":
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        found = {dims} if isinstance(dims, int) else set(dims or ())
        return bool(found) and {dim % x.ndim for dim in found} == set(range(2, x.ndim))
    flat = op in _FLATTEN and result.ndim == 2 and len(result) == len(x) and result.numel() == x.numel()
    return flat or op.startswith(_POOLS)
