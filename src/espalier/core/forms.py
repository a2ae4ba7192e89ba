"""Training forms of a weight: latent tensor -> effective weight, and ``freeze`` to its representation.

A form is attached to a *parameter* by ``core/parametrize.py``. Two phases, in this order: ``mask`` (positions
fixed to zero) and ``codes`` (values fixed to a table or grid). The forms that several rooms share live here.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError, UsageError
from espalier.core.representation import DTYPES, Codebook, Dense, Masked, Representation

Phase = Literal["dense", "mask", "codes"]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the NumPy array that holds its bits (bfloat16 as uint16)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def from_numpy(values: np.ndarray[Any, Any], dtype: str) -> Tensor:
    """The tensor of dtype ``dtype`` with these values (bfloat16 comes as float32 values)."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(getattr(torch, dtype))


def dense_representation(tensor: Tensor) -> Dense:
    """``tensor`` stored as it is."""
    values = to_numpy(tensor)
    name = dtype_name(tensor.dtype)
    return Dense(shape=tuple(tensor.shape), dtype=name, values=values.astype(DTYPES[name], copy=True))


class Form(nn.Module):
    """Base of all training forms; a ``torch.nn.utils.parametrize`` module with a frozen form."""

    kind: ClassVar[str]
    phase: ClassVar[Phase]
    flat: ClassVar[bool] = False
    """Whether the latent tensor is a one-dimensional list of numbers that the weight is made from."""

    @abstractmethod
    def forward(self, latent: Tensor) -> Tensor:
        """The effective weight."""

    def in_use(self, latent: Tensor) -> Tensor:
        """The effective weight without chance: what it is when the model is used."""
        return self(latent)  # type: ignore[no-any-return]

    @abstractmethod
    def freeze(self, latent: Tensor) -> Representation:
        """How the effective weight is stored; ``dense()`` of it equals ``forward(latent)`` bit for bit."""

    def take(self, dim: int, index: Tensor) -> Form:
        """The form of the smaller weight that keeps ``index`` (1-D) along ``dim``.

        Attach it with the latent tensor that :meth:`take_latent` gives: ``attach(slot, form, latent)``.
        """
        raise ModelError(
            f"a weight in the form {self.kind!r} cannot be made smaller: {type(self).__name__} has no take(). "
            "Remove channels before the step that attaches this form."
        )

    def take_latent(self, latent: Tensor, dim: int, index: Tensor) -> Tensor:
        """The latent tensor that goes with :meth:`take`."""
        return latent.index_select(dim, index.to(latent.device))

    @property
    def cuts_latent(self) -> bool:
        """Whether the latent tensor is cut as the weight is; a form whose latent is a table keeps it whole."""
        return True

    def become(self, smaller: Form) -> None:
        """Take the tensors of ``smaller`` (from :meth:`take`) in place; parameters stay the same objects."""
        for path, module in self.named_modules():
            other = smaller.get_submodule(path)
            for name, buffer in other._buffers.items():
                module._buffers[name] = buffer
            for name, parameter in other._parameters.items():
                mine = module._parameters[name]
                if mine is not None and parameter is not None:
                    mine.grad, mine.data = None, parameter.data

    def spec(self) -> dict[str, Any]:
        """What :meth:`blank` needs beside the tensors of the state dict: plain data."""
        return {}

    @classmethod
    @abstractmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Form:
        """A form of the right shapes for ``weight``; its buffers are then filled from a state dict."""


class _Through(torch.autograd.Function):
    """The masked weight; backward is the identity."""

    @staticmethod
    def forward(_: Any, latent: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, latent, latent.new_zeros(()))

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Mask(Form):
    """Pruned positions are exactly zero, whatever the latent weight does. ``mask``: bool, the weight's shape.

    ``through``: pruned positions of the latent tensor receive the gradient of the effective weight as well, for the
    methods that watch it; switched on for the length of a training.
    """

    kind = "mask"
    phase = "mask"
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.through = False

    def forward(self, latent: Tensor) -> Tensor:
        if self.through:
            out = _Through.apply(latent, self.mask)  # type: ignore[no-untyped-call]
            assert isinstance(out, Tensor)  # noqa: S101 - torch leaves Function.apply untyped
            return out
        return torch.where(self.mask, latent, latent.new_zeros(()))

    def freeze(self, latent: Tensor) -> Representation:
        values = to_numpy(self(latent))
        mask = to_numpy(self.mask).astype(np.bool_)
        name = dtype_name(latent.dtype)
        kept = values[mask]
        return Masked(
            shape=tuple(mask.shape), dtype=name, mask=mask, inner=Dense(shape=kept.shape, dtype=name, values=kept)
        )

    def take(self, dim: int, index: Tensor) -> Mask:
        return Mask(self.mask.index_select(dim, index.to(self.mask.device)))

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Mask:
        return cls(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))


class _Gather(torch.autograd.Function):
    """table[index]; backward sums the gradients of each centroid's members (Deep Compression, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = table.numel()
        return table.index_select(0, index.reshape(-1)).reshape(index.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0]
        total = torch.zeros(ctx.size, dtype=grad.dtype, device=grad.device)
        return total.scatter_add_(0, index.reshape(-1), grad.reshape(-1)), None


class Shared(Form):
    """Weight sharing: the latent tensor is the centroids ``(k,)``, the weight is ``centroids[index]``.

    ``index``: int32, the weight's shape. With ``zero`` the symbol 0 is an exact zero that is never trained
    and the latent centroids are the symbols 1..k.
    """

    kind = "shared"
    phase = "codes"
    flat = True
    index: Tensor

    def __init__(self, index: Tensor, centroids: Tensor | None, *, zero: bool) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.zero = zero
        self._initial = centroids

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The centroids to start from; asked once, when the form is attached."""
        initial, self._initial = self._initial, None
        return weight.new_zeros(0) if initial is None else initial.to(weight)

    def table(self, latent: Tensor) -> Tensor:
        """All symbols' values, zero included."""
        return torch.cat([latent.new_zeros(1), latent]) if self.zero else latent

    def forward(self, latent: Tensor) -> Tensor:
        out = _Gather.apply(self.table(latent), self.index)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)  # noqa: S101 - torch leaves Function.apply untyped
        return out

    def freeze(self, latent: Tensor) -> Representation:
        wide = torch.float64 if latent.dtype == torch.float64 else torch.float32  # holds every narrower value exactly
        table = to_numpy(self.table(latent).to(wide))
        order = np.argsort(table, kind="stable")
        if self.zero:  # zero stays symbol 0; the others in order of value
            order = np.concatenate([[0], order[order != 0]])
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        indices = rank[to_numpy(self.index)]
        width = np.uint8 if len(order) <= 256 else np.uint16 if len(order) <= 65536 else np.uint32
        return Codebook(
            shape=tuple(self.index.shape),
            dtype=dtype_name(latent.dtype),
            indices=indices.astype(width),
            centroids=table[order],
        )

    def take(self, dim: int, index: Tensor) -> Shared:
        return Shared(self.index.index_select(dim, index.to(self.index.device)), None, zero=self.zero)

    @property
    def cuts_latent(self) -> bool:
        return False

    def take_latent(self, latent: Tensor, dim: int, index: Tensor) -> Tensor:
        """The centroids, unchanged: pass the very tensor on where several weights share it."""
        return latent

    def spec(self) -> dict[str, Any]:
        return {"zero": self.zero}

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Shared:
        return cls(torch.zeros(weight.shape, dtype=torch.int32), torch.zeros(int(spec["k"])), zero=bool(spec["zero"]))


class Stored(Form):
    """A weight exactly as a file stores it, codes and all: for handing it on, not for training."""

    kind = "stored"
    phase = "codes"
    values: Tensor

    def __init__(self, representation: Representation) -> None:
        super().__init__()
        self.representation = representation
        self.register_buffer("values", from_numpy(np.array(representation.dense()), representation.dtype))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """There is nothing to train."""
        return weight.new_zeros(0)

    @property
    def cuts_latent(self) -> bool:
        return False

    def forward(self, latent: Tensor) -> Tensor:
        return self.values

    def freeze(self, latent: Tensor) -> Representation:
        return self.representation

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Stored:
        return cls(dense_representation(weight))


FORMS: dict[str, type[Form]] = {form.kind: form for form in (Mask, Shared)}

F = TypeVar("F", bound=Form)


def register_form(form: type[F]) -> type[F]:
    """Let checkpoints rebuild ``form``; usable as a decorator. Raises ``UsageError`` where its ``kind`` is taken."""
    known = FORMS.get(form.kind)
    if known is not None and known.__qualname__ != form.__qualname__:
        raise UsageError(
            f"the form kind {form.kind!r} of {form.__module__}.{form.__qualname__} is taken by "
            f"{known.__module__}.{known.__qualname__}; give it another kind."
        )
    FORMS[form.kind] = form
    return form
