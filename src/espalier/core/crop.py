"""The edit that gives a convolution the middle of another one's kernel, as one parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.core.edits import Edit, put_module
from espalier.core.errors import ModelError, UnknownNameError, did_you_mean
from espalier.core.parametrize import require_phase, slots

KERNEL = 2  # the dimension of a convolution's weight at which its kernel begins


def margins(larger: Iterable[int], smaller: Iterable[int]) -> list[int] | None:
    """How much lies before the middle of each side; None where there is no middle."""
    pairs = list(zip(larger, smaller, strict=True))
    if any(large < small or (large - small) % 2 for large, small in pairs):
        return None
    return [(large - small) // 2 for large, small in pairs]


def middle(weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The entries of ``weight`` (out, in, *larger kernel) at a ``kernel`` in its middle."""
    starts = margins(weight.shape[KERNEL:], kernel)
    if starts is None:
        raise ModelError(f"a kernel of {tuple(weight.shape[KERNEL:])} has no middle of {kernel}.")
    for dim, (start, size) in enumerate(zip(starts, kernel, strict=True), KERNEL):
        weight = weight.narrow(dim, start, size)
    return weight


class _Cropped(_ConvNd):
    """A convolution with the middle of its weight, which belongs to another one with a larger kernel."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self._conv_forward(x, middle(self.weight, self.kernel_size), self.bias)
        return answer


class CroppedConv1d(_Cropped, nn.Conv1d):
    """See ``_Cropped``."""


class CroppedConv2d(_Cropped, nn.Conv2d):
    """See ``_Cropped``."""


class CroppedConv3d(_Cropped, nn.Conv3d):
    """See ``_Cropped``."""


CROPPED: dict[type[nn.Module], type[_Cropped]] = {
    nn.Conv1d: CroppedConv1d, nn.Conv2d: CroppedConv2d, nn.Conv3d: CroppedConv3d,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Crop(Edit):
    """The convolution at ``path`` computes with the middle of the weight ``to``."""

    kind = "crop"
    path: str
    to: str

    def apply(self, model: nn.Module) -> None:
        """Put a convolution of the same settings at every place of the old one, with its bias and that weight."""
        known = {name: slot for slot in slots(model).values() for name in slot.names}
        for name in (self.to, f"{self.path}.weight"):
            if name not in known:
                raise UnknownNameError(f"the plan names {name!r}.{did_you_mean(name, known)}")
            require_phase(known[name], ("dense",), "cropping")
        old, weight = known[f"{self.path}.weight"].module, known[self.to].latent
        cls = CROPPED.get(type(old))
        if cls is None or not isinstance(old, _ConvNd):
            raise ModelError(f"{self.path} is a {type(old).__name__}; a plan crops kernels of convolutions.")
        if weight.ndim != old.weight.ndim or weight.shape[:KERNEL] != old.weight.shape[:KERNEL]:
            raise ModelError(f"{self.to} {tuple(weight.shape)} has no middle like {tuple(old.weight.shape)}.")
        middle(weight, old.kernel_size)
        made = _of(cls, old)
        made._parameters.update(weight=weight, bias=old._parameters["bias"])
        for path, _, _ in known[f"{self.path}.weight"].owners:
            put_module(model, path, made)


def _of(cls: type[_Cropped], old: _ConvNd) -> _Cropped:
    settings: dict[str, Any] = {
        name: getattr(old, name)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        )
    }  # fmt: skip
    made = cls(**settings, bias=False, device="meta")
    made.train(old.training)
    return made
