"""Quantized weights: what a method supplies, and the training form that carries it.

A method is a frozen dataclass of pure functions over a :class:`Weight`: a latent tensor, its bits, and named state
(``start``). ``quantize`` gives the effective weight with its backward rule, ``freeze`` its representation, and the
hooks say what happens while it trains. Every method goes by the one form here, which also keeps what earlier steps
have fixed: pruned positions stay zero, and weights that share a value go on sharing it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.errors import ModelError
from espalier.core.forms import FORMS, Form, Mask, dense_representation, dtype_name, register_form, to_numpy
from espalier.core.method import Method
from espalier.core.representation import Affine, Codebook, Representation

if TYPE_CHECKING:
    from espalier.core.context import Context
    from espalier.core.inputs import ActivationQuantizer
    from espalier.core.parametrize import Slot

LARGEST_TABLE = 2**16
_WIDTHS: tuple[type[np.integer[Any]], ...] = (np.int8, np.uint8, np.int16, np.int32)


class State(nn.Module):
    """Named tensors of a quantizer: parameters are learned with the weights, buffers are not."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor.detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)  # noqa: S101 - nothing else is registered
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


@dataclass(frozen=True)
class Weight:
    """One weight as a quantizer sees it.

    ``latent``: the tensor that is trained. ``axis``: the dimension of the effective weight that holds the output
    channels; None for the 1-D table of a weight whose values are shared. ``kept``: bool of the weight's shape, False
    where an earlier step pruned; None where nothing is. ``state``: what ``start`` gave, as it is now.
    """

    name: str
    latent: Tensor
    bits: int
    axis: int | None
    kept: Tensor | None
    state: State
    training: bool

    def channels(self, values: Tensor) -> Tensor:
        """One value per output channel, shaped to broadcast against the weight; scalars stay scalars."""
        if self.axis is None or values.ndim == 0:
            return values
        return values.reshape([-1 if d == self.axis else 1 for d in range(self.latent.ndim)])


def by_channel(values: Tensor, axis: int | None) -> Tensor:
    """``values`` as (channels, entries of each); one row where ``axis`` is None."""
    return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).reshape(values.shape[axis], -1)


def mean_where(values: Tensor, kept: Tensor | None, axis: int | None) -> Tensor:
    """The mean of the kept ``values`` of each channel, shape (channels,); of all of them, shape (), without ``axis``.

    0 where nothing is kept.
    """
    if kept is not None:
        values = torch.where(kept, values, 0)
    rows = by_channel(values, axis)
    count = by_channel(kept, axis).sum(1).clamp_min(1).to(rows.dtype) if kept is not None else max(1, rows.shape[1])
    mean = rows.sum(1) / count
    return mean if axis is not None else mean[0]


@dataclass(frozen=True, kw_only=True)
class WeightQuantizer(Method):
    """How the weights of a layer become values of a small set.

    ``widths``: the bits it can do. ``per_channel``: names of the state that has one entry per output channel, which
    goes along when channels are removed. ``stacked``: dimensions of the latent tensor before those of the weight.
    """

    kind: ClassVar[str] = "weight quantizer"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 17))
    per_channel: ClassVar[frozenset[str]] = frozenset()
    stacked: ClassVar[int] = 0

    @property
    def by_group(self) -> bool:
        """Whether the state of a channel has entries for groups of its inputs, so that those cannot be removed."""
        return False

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        """The state to begin with: ``nn.Parameter`` for what is learned. Shapes depend on shapes and ``bits`` alone."""
        return {}

    def latent(self, weight: Tensor, bits: int) -> Tensor:
        """The latent tensor to begin with, from the weight; by default the weight."""
        return weight

    @abstractmethod
    def quantize(self, w: Weight) -> Tensor:
        """The effective weight, differentiable by the method's rule. Without chance where not ``w.training``."""

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        """How the effective weight ``values`` (eval mode, pruned positions zero) is stored, bit for bit."""
        return tabled(values)

    def refuses(self, slot: Slot) -> str | None:
        """Why this weight cannot be quantized so; None where it can."""
        return None

    def refuses_inputs(self, method: ActivationQuantizer) -> str | None:
        """Why the input of the same layer cannot be quantized by ``method``; None where it can."""
        return None

    def restarts(self, bits: int) -> tuple[float, ...]:
        """The shares of a training at which the learning rate starts anew."""
        return ()

    # --- while it trains; empty by default. ``w.latent`` is the parameter itself: change it under ``no_grad`` -----

    def on_start(self, w: Weight, loop: Loop) -> None:
        """Before the first step, and again after a resume."""

    def penalty(self, w: Weight) -> Tensor | None:
        """A term of the loss, or None."""
        return None

    def before_step(self, w: Weight, loop: Loop) -> None:
        """The gradient is there (``w.latent.grad``), the optimizer has not stepped."""

    def after_step(self, w: Weight, loop: Loop) -> None:
        """The optimizer has stepped."""

    def on_epoch(self, w: Weight, loop: Loop) -> None:
        """After an epoch, before it is validated."""

    def respond(self, w: Weight, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output of the layer in place of ``output``, in training."""
        return output

    def finish(self, w: Weight, context: Context) -> None:
        """After the last epoch: fix what is still open."""


def tabled(values: Tensor) -> Representation:
    """``values`` as a codebook of its distinct values in rising order; dense where there are too many."""
    name = dtype_name(values.dtype)
    array = to_numpy(values.float() if values.dtype == torch.bfloat16 else values)
    array = array + 0  # -0.0 is 0.0
    table, indices = np.unique(array, return_inverse=True)
    if len(table) > LARGEST_TABLE or (len(table) > 256 and len(table) * 4 > array.size) or not array.size:
        return dense_representation(values)
    width = np.uint8 if len(table) <= 256 else np.uint16
    return Codebook(
        shape=tuple(values.shape), dtype=name, indices=indices.reshape(array.shape).astype(width),
        centroids=table.astype(np.float64 if name == "float64" else np.float32),
    )  # fmt: skip


def affine(
    w: Weight, values: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, *, group: int | None = None
) -> Representation:
    """``(codes - zero) * scale`` as it is stored; pruned positions get the code of zero.

    ``codes``: the weight's shape; ``scale`` (float32) and ``zero`` (integers): () or (channels,), with ``group``
    (channels, groups of so many inputs). Where codes and values differ, as with weights that are not float32, the
    values are tabled.
    """
    axis = w.axis if scale.ndim else None
    if w.kept is not None:
        wide = zero if axis is None or group is not None else w.channels(zero)
        if group is not None:
            wide = spread(zero, values.shape, group)
        codes = torch.where(w.kept, codes, wide.to(codes.dtype))
    low, high = int(codes.min()) if codes.numel() else 0, int(codes.max()) if codes.numel() else 0
    width = next(w for w in _WIDTHS if np.iinfo(w).min <= low and high <= np.iinfo(w).max)
    found = Affine(
        shape=tuple(values.shape), dtype=dtype_name(values.dtype), codes=to_numpy(codes).astype(width),
        scale=to_numpy(scale.float()), zero_point=to_numpy(zero).astype(np.int32), bits_per_code=w.bits, axis=axis,
        group=group,
    )  # fmt: skip
    same = np.array_equal(found.dense(), to_numpy(values.float() if values.dtype == torch.bfloat16 else values))
    return found if same else tabled(values)


def spread(values: Tensor, shape: torch.Size, group: int) -> Tensor:
    """(rows, groups) -> the weight's ``shape``: each value at the ``group`` inputs of its row that it stands for."""
    per_row = int(np.prod(shape[1:]))
    return values.repeat_interleave(group, 1)[:, :per_row].reshape(shape)


@register_form
class QuantizedWeight(Form):
    """The form of every quantized weight: ``inner(method.quantize(latent))``.

    ``inner``: the :class:`Mask` or flat form (:class:`Shared`, structured) of an earlier step, kept as it is; with a
    flat one the numbers that the weight is made from are quantized. ``trained``: whether the model has been trained
    with this form in place.
    """

    kind = "quantized"
    phase = "codes"
    trained = False

    def __init__(
        self, method: WeightQuantizer, weight: Tensor, bits: int, *, axis: int | None = 0, inner: Form | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        """``weight``: the effective weight so far, or with a flat ``inner`` the numbers it is made from."""
        super().__init__()
        self.method, self.bits, self.name = method, bits, name
        self.axis = None if inner is not None and inner.flat else axis
        self.inner = inner
        self.state = State(method.start(weight.detach(), bits, self.axis, self.kept))
        self._initial = method.latent(weight.detach(), bits)

    @property
    def kept(self) -> Tensor | None:
        """False where an earlier step pruned."""
        return self.inner.mask if isinstance(self.inner, Mask) else None

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The latent tensor to start from; asked once, when the form is attached."""
        initial, self._initial = self._initial, torch.empty(0)
        return initial.to(weight).clone()

    def view(self, latent: Tensor) -> Weight:
        """The weight as the method sees it."""
        return Weight(self.name, latent, self.bits, self.axis, self.kept, self.state, self.training)

    def forward(self, latent: Tensor) -> Tensor:
        values = self.method.quantize(self.view(latent))
        if self.inner is None:
            return values
        kept: Tensor = self.inner(values)
        return kept

    @contextmanager
    def _used(self) -> Iterator[None]:
        """In eval mode: no chance, no gradients."""
        before = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(before)

    def in_use(self, latent: Tensor) -> Tensor:
        with self._used():
            return self(latent)  # type: ignore[no-any-return]

    def freeze(self, latent: Tensor) -> Representation:
        with self._used():
            if self.inner is not None and self.inner.flat:
                return self.inner.freeze(self.method.quantize(self.view(latent)))
            return self.method.freeze(self.view(latent), self(latent))

    def take(self, dim: int, index: Tensor) -> QuantizedWeight:
        made = QuantizedWeight.__new__(QuantizedWeight)
        Form.__init__(made)
        made.method, made.bits, made.name, made.axis = self.method, self.bits, self.name, self.axis
        made.trained = self.trained
        made.inner = self.inner.take(dim, index) if self.inner is not None else None
        made._initial = torch.empty(0)
        made.state = State({name: self._cut(name, tensor, dim, index) for name, tensor in self.state.tensors().items()})
        return made

    def _cut(self, name: str, tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        if self.method.by_group and name in self.method.per_channel and tensor.ndim and dim != self.axis:
            raise ModelError(
                f"{self.name or 'a weight'} has a scale for every group of inputs, so its inputs cannot be removed. "
                "Remove channels before the step that quantizes, or quantize per channel."
            )
        if name in self.method.per_channel:
            cut = tensor.index_select(0, index.to(tensor.device)) if dim == self.axis and tensor.ndim else tensor
        else:
            cut = tensor.index_select(dim, index.to(tensor.device)) if tensor.ndim > max(1, dim) else tensor
        return nn.Parameter(cut.detach().clone(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut

    @property
    def cuts_latent(self) -> bool:
        return self.inner is None or not self.inner.flat

    def take_latent(self, latent: Tensor, dim: int, index: Tensor) -> Tensor:
        if not self.cuts_latent:
            return latent
        return latent.index_select(dim + self.method.stacked, index.to(latent.device))

    def spec(self) -> dict[str, Any]:
        from espalier.core.recipe import fields_to_data

        inner = {} if self.inner is None else {"inner": {"kind": self.inner.kind, **self.inner.spec()}}
        method = {"name": self.method.name, "fields": fields_to_data(self.method)}
        own = {"method": method, "bits": self.bits, "axis": self.axis, "called": self.name, "trained": self.trained}
        return {**own, **inner}

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> QuantizedWeight:
        inner = None
        if "inner" in spec:
            inner = FORMS[spec["inner"]["kind"]].blank({**spec["inner"], "k": spec["k"]}, weight)
        method, bits = method_of(WeightQuantizer, spec["method"]), int(spec["bits"])
        per_value = method.latent(torch.zeros(1), bits).numel()
        start = (
            torch.zeros(int(spec["k"]) // per_value, dtype=weight.dtype) if inner is not None and inner.flat else weight
        )
        made = cls(method, start, bits, axis=spec["axis"], inner=inner, name=str(spec["called"]))
        made.trained = bool(spec.get("trained", False))
        return made


def method_of(base: type[Any], data: Mapping[str, Any]) -> Any:
    """A part from ``{"name": "verb.id", "fields": {...}}``; raises ``UsageError`` for anything else."""
    from espalier.core.recipe import method_from_data
    from espalier.core.registry import part

    return method_from_data(part(base, str(data["name"])), data["fields"])
