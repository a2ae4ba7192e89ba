"""Shape functions of torch operators that torch itself gives none for, so that what uses them can be exported."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = ("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "fake_quantize_per_tensor_affine_cachemask")
_LIBRARIES: list[torch.library.Library] = []
"""What a library entered goes with it."""


def _fake_quantize(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The quantized values and where they were not clipped, both of the shape of ``x``."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def register() -> None:
    """Enter them, once per process, where torch has none."""
    for name in _NAMES:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
            library.impl(name, _fake_quantize, "Meta")  # type: ignore[no-untyped-call]
            _LIBRARIES.append(library)


register()
