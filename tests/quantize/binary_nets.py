"""What the tests of binary weights and inputs share: views of a weight, nets on digits, what must hold after a run."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from tests.prune.sparse_training import accuracy, digits, trained
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.forms import to_numpy
from espalier.core.model import evaluating
from espalier.core.parametrize import plain, slots
from espalier.core.quantized import QuantizedWeight, State, Weight, WeightQuantizer
from espalier.graph import Runner, trace
from espalier.prune import Prune
from espalier.quantize import Quantize
from espalier.share import KMeans
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

__all__ = ["accuracy", "digits", "trained"]


def view(
    method: WeightQuantizer, weight: Tensor, *, axis: int | None = 0, kept: Tensor | None = None, training: bool = False
) -> Weight:
    """``weight`` as the latent tensor of ``method``, its state as it starts."""
    state = State(method.start(weight.detach(), 1, axis, kept))
    return Weight("w", weight, 1, axis, kept, state, training)


def loop(optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, step: int = 0, steps: int = 10) -> Loop:
    """A loop that has got to ``step``."""
    parameter = nn.Parameter(torch.zeros(1))
    return Loop(nn.Identity(), optimizer([parameter], lr=0.1), Context(), torch.Generator(), 1, steps, step=step)


def awkward() -> list[tuple[Tensor, int | None, Tensor | None]]:
    """Weights of every shape and dtype, masked and not: (weight, axis, kept)."""
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, int | None, Tensor | None]] = [
        (torch.zeros(3, 4), 0, None), (torch.zeros(2, 3, 3, 3), 0, torch.zeros(2, 3, 3, 3, dtype=torch.bool)),
        (torch.randn(7, generator=generator), None, None), (torch.randn(1, 1, generator=generator), 0, None),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float32).to(dtype) / 9
        kept = torch.rand(weight.shape, generator=generator) < 0.5
        found += [(weight, 0, None), (weight, 1, None), (weight, None, None), (weight * kept, 0, kept)]
    return found


def freezes_bit_for_bit(method: WeightQuantizer) -> None:
    """The form freezes to its own values, pruned positions to zero, without NaN."""
    from espalier.core.forms import Mask

    for weight, axis, kept in awkward():
        inner = None if kept is None else Mask(kept)
        form = QuantizedWeight(method, weight, 1, axis=axis, inner=inner)
        form.eval()
        latent = form.right_inverse(weight)
        values = form(latent).detach()
        assert bool(values.isfinite().all())
        assert values.dtype == weight.dtype
        shown = to_numpy(values.float() if values.dtype == torch.bfloat16 else values)
        assert np.array_equal(form.freeze(latent).dense(), shown)
        if kept is not None:
            assert not bool(values[~kept].any())


@cache
def pruned() -> nn.Module:
    """A net with half of its weights masked."""
    return Prune(sparsity=0.5)(trained("cnn"), Context(task=digits()))


@cache
def shared() -> nn.Module:
    """A net whose weights share 16 values."""
    return KMeans(bits=4)(trained("cnn"), Context(task=digits()))


@cache
def without_relu() -> nn.Module:
    """A trained net whose inner layers see batch-normalised values of both signs."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32)]
    third = [nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*first, *second, *third, nn.Linear(128, 10))
    return Finetune(epochs=1, lr=3e-3)(model, Context(task=digits()))


def run(model: nn.Module, **fields: object) -> nn.Module:
    """``model`` quantized with ``fields``; the file gives the same answers bit for bit."""
    result = Quantize(**fields)(model, Context(task=digits()))  # type: ignore[arg-type]
    assert bits(outputs(frozen_copy(result, through_file=True), digits())) == bits(outputs(result, digits()))
    return result


def traces(model: nn.Module, tolerance: float = 0.0) -> None:
    """The graph of ``model`` with a free batch gives what the model gives."""
    simple, x = plain(model), torch.randn(3, 1, 8, 8)
    with evaluating(simple), torch.no_grad():
        graph = trace(simple, (x[:2],))
        assert graph.dynamic
        assert torch.allclose(Runner(graph, dict(simple.state_dict())).eval()(x), simple(x), rtol=0, atol=tolerance)


def keeps_masks_and_tables(method: WeightQuantizer) -> None:
    """After pruning the zeros stay; after k-means what shares a value goes on sharing it."""
    before = {name: slot.value() == 0 for name, slot in slots(pruned()).items() if slot.latent.ndim > 1}
    result = run(pruned(), weights=method, epochs=1, lr=3e-3, ends="same")
    for name, zero in before.items():
        value = slots(result)[name].value()
        assert not bool(value[zero].any())
        assert bool(value[~zero].any())
    tables = {name: slot.value() for name, slot in slots(shared()).items() if slot.latent.ndim == 1 and slot.form}
    result = run(shared(), weights=method, epochs=1, lr=3e-3, ends="same")
    assert tables
    for name, old in tables.items():
        new = slots(result)[name].value()
        for value in old.unique():
            assert len(new[old == value].unique()) == 1
