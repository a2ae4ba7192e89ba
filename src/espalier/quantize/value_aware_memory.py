r"""Value-aware training: what the backward pass needs of the activations is kept in a few bits, large values exactly.

Paper    Park, Yoo, Vajda. Value-Aware Quantization for Training and Inference of Neural Networks. ECCV 2018.
         arXiv:1804.07802 (section 4: quantized back-propagation)
Formula  forward in full precision;   kept for the backward pass: s round(x / s) in b bits where |x| <= T, x in 16 bits
         elsewhere;   T = the (1 - r) quantile of |x|, s = T / (2^b - 1), or T / (2^{b-1} - 1) where x has a sign
Departs  T is taken from an evenly spaced sample of 65,536 values of each tensor. All large tensors that the model keeps
         are packed, those that several layers keep once; parameters, the weights made from them, integers, and
         what the loss keeps stay as they are. In tensors without negative values, positive ones are kept as s at
         least: a ReLU takes its gradient from what is kept of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.fields import Count, Fraction, Range
from espalier.core.forms import Form
from espalier.quantize.parts import Scheme, Stage

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize

SAMPLE = 65_536
LARGEST = float(torch.finfo(torch.float16).max)
PackedBits = Annotated[int, Range(2, 8, "bits", "bits per activation kept for the backward pass")]


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) below ``2^bits`` as bit planes ``(bits, ceil(n / 8))`` of bytes."""
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -len(codes) % 8)).reshape(-1, 8)
    planes = []
    for bit in range(bits):
        plane = torch.zeros(len(padded), dtype=torch.uint8, device=codes.device)
        for place in range(8):
            plane |= ((padded[:, place] >> bit) & 1) << place
        planes.append(plane)
    return torch.stack(planes)


def from_planes(planes: Tensor, count: int) -> Tensor:
    """The ``count`` codes (uint8) that :func:`to_planes` packed."""
    codes = torch.zeros((planes.shape[1], 8), dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        for place in range(8):
            codes[:, place] |= ((plane >> place) & 1) << bit
    return codes.reshape(-1)[:count]


class Packed:
    """A tensor in ``bits`` bits, the ``ratio`` of its values that are largest in 16."""

    def __init__(self, values: Tensor, bits: int, ratio: float) -> None:
        flat = values.detach().reshape(-1)
        self.shape, self.dtype, self.bits = values.shape, values.dtype, bits
        sizes = flat.abs()
        sample = sizes[:: max(1, len(sizes) // SAMPLE)].float()
        limit = torch.kthvalue(sample, max(1, len(sample) - int(ratio * len(sample)))).values
        limit = limit if bool(limit > 0) else sizes.max().float()
        large = sizes > limit
        self.where = large.nonzero().reshape(-1).to(torch.int32)
        self.exact = flat[self.where.long()].clamp(-LARGEST, LARGEST).half()
        signed = bool((flat < 0).any())
        self.zero = 2 ** (bits - 1) if signed else 0
        last = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.scale = torch.where(limit > 0, limit / last, 1.0)
        codes = (flat.float() / self.scale).round_().clamp_(-last if signed else 0, last)
        if not signed:  # a ReLU must still know where it let something through
            codes = torch.maximum(codes, (flat > 0).to(codes.dtype))
        codes += self.zero
        self.planes = to_planes(codes, bits)

    @property
    def nbytes(self) -> int:
        """Bytes it takes, positions of the large values included."""
        return sum(t.nbytes for t in (self.planes, self.where, self.exact, self.scale))

    def values(self) -> Tensor:
        """The tensor, in its shape and dtype."""
        codes = from_planes(self.planes, self.shape.numel())
        flat = ((codes.float() - self.zero) * self.scale).to(self.dtype)
        flat[self.where.long()] = self.exact.to(self.dtype)
        return flat.reshape(self.shape)


def _watched(storage: torch.UntypedStorage) -> StorageWeakRef:
    """The memory of a tensor, without keeping it."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _gone(storage: StorageWeakRef) -> bool:
    """Whether the memory has been freed, so that its address may be another tensor's."""
    return bool(storage.expired())  # type: ignore[no-untyped-call]


class Packing:
    """Packs what one forward pass keeps; each tensor once, however many operators keep it.

    ``tensors``, ``nbytes``: how many were packed, and the bytes they take.
    """

    def __init__(self, bits: int, ratio: float, least: int, model: nn.Module | None) -> None:
        self.bits, self.ratio, self.least = bits, ratio, least
        self.tensors = self.nbytes = 0
        self.done: dict[tuple[object, ...], tuple[StorageWeakRef, Packed]] = {}
        self.weights: list[StorageWeakRef] = []
        self.forms = [m for m in model.modules() if isinstance(m, Form)] if model is not None else []
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()} if model is not None else set[int]()

    def weight(self, _: nn.Module, __: object, output: object) -> None:
        """A forward hook of forms: what they give is a weight."""
        if isinstance(output, Tensor):
            self.weights.append(_watched(output.untyped_storage()))

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, a weight made from one, or a view of such."""
        if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in self.own:
            return True
        storage = _watched(tensor.untyped_storage())
        return any(storage.cdata == weight.cdata for weight in self.weights if not _gone(weight))

    def pack(self, tensor: Tensor) -> Tensor | Packed:
        """For ``saved_tensors_hooks``."""
        if not tensor.is_floating_point() or tensor.numel() < self.least or tensor.ndim < 2 or self.is_weight(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        known = self.done.get(key)
        if known is not None and not _gone(known[0]):
            return known[1]
        made = Packed(tensor, self.bits, self.ratio)
        self.done[key] = _watched(storage), made
        self.tensors, self.nbytes = self.tensors + 1, self.nbytes + made.nbytes
        return made

    @staticmethod
    def unpack(kept: Tensor | Packed) -> Tensor:
        """For ``saved_tensors_hooks``."""
        return kept.values() if isinstance(kept, Packed) else kept


@contextmanager
def packed_activations(
    bits: int = 3, ratio: float = 0.02, *, least: int = 1024, model: nn.Module | None = None
) -> Iterator[Packing]:
    """Within: the tensors that autograd keeps are packed. Run the forward pass in it, and the backward pass after it.

    ``least``: tensors with fewer elements stay. ``model``: its weights stay, those of its forms too.
    """
    packing = Packing(bits, ratio, least, model)
    handles = [form.register_forward_hook(packing.weight) for form in packing.forms]
    wrapped: AbstractContextManager[object] = torch.autograd.graph.saved_tensors_hooks(packing.pack, packing.unpack)
    try:
        with wrapped:
            yield packing
    finally:
        packing.done.clear()
        for handle in handles:
            handle.remove()


class PackedForward(Callback):
    """Every training forward keeps its activations packed."""

    def __init__(self, make: Callable[[nn.Module], AbstractContextManager[Packing]]) -> None:
        self.make = make

    def around(self, loop: Loop) -> AbstractContextManager[object]:
        return self.make(loop.model)


@dataclass(frozen=True, kw_only=True)
class ValueAwareMemory(Scheme):
    """``bits``, ``ratio``: of the activations kept. Tensors with fewer than ``least`` elements stay as they are."""

    id: ClassVar[str] = "value-aware-memory"
    bits: PackedBits = 3
    ratio: Fraction = 0.02
    least: Count = 1024

    def stages(self, before: Sequence[Stage], method: Quantize) -> tuple[Stage, ...]:
        return tuple(stage.replace(guides=(*stage.guides, self)) for stage in before)

    def callback(self, model: nn.Module, context: Context) -> Callback:
        return PackedForward(lambda net: packed_activations(self.bits, self.ratio, least=self.least, model=net))
