"""A layer as a matrix, and the second moments of its inputs: what layer-wise solvers share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.parametrize import Slot
from espalier.train.looking import batches, looking

DEAD = 1e-8  # share of the mean diagonal that stands for an input that was never active
PIVOT = 1e-12  # an input of which less than this share is not a combination of others leaves no digit to solve with


def owners(slot: Slot) -> list[nn.Module]:
    """The layers that own the weight, each once."""
    return list({id(module): module for _, module, _ in slot.owners}.values())


def as_matrix(weight: Tensor) -> Tensor:
    """``(out, in, *kernel)`` -> ``(out, kernel * in)``."""
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`as_matrix`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def columns(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of ``module`` as (samples, columns), once for each group of a convolution."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))  # noqa: S101 - see refuses()
    flat = isinstance(module, nn.Conv1d)
    spatial = module.weight.ndim - 2
    x = x if x.ndim == spatial + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes: list[Any] = [
        (1, *value) if flat else value for value in (module.kernel_size, module.dilation, module.stride)
    ]
    patches = F.unfold(x[:, :, None] if flat else x, sizes[0], dilation=sizes[1], stride=sizes[2])
    parts = patches.reshape(len(x), module.groups, x.shape[1] // module.groups, -1, patches.shape[-1])
    for group in range(module.groups):  # (samples, inputs, kernel, places) -> (samples * places, kernel * inputs)
        yield parts[:, group].permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def in_order(model: nn.Module, selection: Iterable[Slot], context: Context) -> tuple[Slot, ...]:
    """The weights as the model first comes to them on one batch, so that what feeds a layer is solved before it.

    Weights that it does not come to are last.
    """
    slots, calls = list(selection), dict[str, int]()

    def note(name: str, *_: Any) -> None:
        calls.setdefault(name, len(calls))

    with ExitStack() as stack:
        for slot in slots:
            for module in owners(slot):
                stack.callback(module.register_forward_pre_hook(partial(note, slot.name)).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, 1, "order of the layers"):
            context.data.predict(model, batch)
    return tuple(sorted(slots, key=lambda slot: calls.get(slot.name, len(calls))))


def hessians(model: nn.Module, slot: Slot, context: Context, count: int) -> list[Tensor]:
    """2 X X^T / samples over the layer's inputs (float64), one for each group; none where it is never called.

    ``count``: training batches. Raises ``NumericError`` where the inputs hold NaN or infinity.
    """
    found: list[Tensor] = []
    samples = 0

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal samples
        for group, x in enumerate(columns(module, args[0] if args else kwargs["input"])):
            if group == len(found):
                found.append(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device))
            found[group] += 2 * (x.T.double() @ x.double())
        samples += len(x)

    with ExitStack() as stack:
        for module in owners(slot):
            stack.callback(module.register_forward_pre_hook(gather, with_kwargs=True).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, count, f"inputs of {slot.name}"):
            context.data.predict(model, batch)
    for hessian in found:
        hessian /= max(1, samples)
        if not bool(hessian.isfinite().all()):
            raise NumericError(f"the inputs of {slot.name} hold NaN or infinity; nothing can be solved on them.")
    return found


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` with ``damping`` times its mean diagonal added; the identity where no input was ever active.

    An input that was never active gets ``DEAD`` times the mean at least: its weights cost next to nothing.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not mean:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    share = torch.where(diagonal > 0, damping, max(damping, DEAD))
    return hessian + torch.diag(share.to(hessian.dtype) * mean)


def solvable(hessian: Tensor) -> bool:
    """Whether ``hessian`` has an inverse that holds more than rounding errors."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    return not failed and bool((factor.diagonal().square() > PIVOT * hessian.diagonal()).all())
