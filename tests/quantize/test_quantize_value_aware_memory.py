"""Packed activations: bit planes exactly, values to half a step, gradients near, memory small, weights untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantize.incremental_digits import accuracy, digits, network, trained
from torch import Tensor, nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.registry import register
from espalier.quantize.affine import Affine
from espalier.quantize.quantize import Quantize
from espalier.quantize.value_aware_memory import (
    Packed,
    ValueAwareMemory,
    from_planes,
    packed_activations,
    to_planes,
)
from espalier.train import fit


@settings(max_examples=60)
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=40), width=st.integers(2, 8))
def test_planes_hold_the_codes(codes: list[int], width: int) -> None:
    low = torch.tensor([code % 2**width for code in codes], dtype=torch.uint8)
    planes = to_planes(low, width)
    assert planes.shape == (width, -(-len(codes) // 8))
    assert from_planes(planes, len(codes)).tolist() == low.tolist()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("width", [2, 3, 8])
def test_values_come_back_to_half_a_step(signed: bool, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 20, 20)
    x = x if signed else x.relu()
    packed = Packed(x, width, 0.02)
    found = packed.values()
    assert found.shape == x.shape
    limit = x.abs().reshape(-1).sort().values[-1 - int(0.02 * x.numel())]
    large = x.abs() > limit
    assert int(large.sum()) == len(packed.where) == int(0.02 * x.numel())
    assert torch.equal(found[large], x[large].half().float())
    step = limit / (2 ** (width - 1) - 1 if signed else 2**width - 1)
    expected = (x / step).round() * step
    if not signed:
        expected = torch.where((x > 0) & (expected == 0), step, expected)
    assert torch.allclose(found[~large], expected[~large], atol=1e-6)
    assert signed or torch.equal(found > 0, x > 0)
    assert packed.nbytes < x.nbytes * (width / 32 + 0.02 * 6 / 4) + 32


def test_odd_tensors_come_back() -> None:
    for x in (torch.zeros(3, 500), torch.full((2, 600), -2.5), torch.eye(40)):
        assert torch.allclose(Packed(x, 3, 0.02).values(), x)
    x = torch.randn(2, 700, dtype=torch.bfloat16)
    assert Packed(x, 8, 0.02).values().dtype == torch.bfloat16


def gradients(model: nn.Module, x: Tensor, y: Tensor, width: int | None) -> dict[str, Tensor]:
    model.zero_grad()
    if width is None:
        loss = nn.functional.cross_entropy(model(x), y)
    else:
        with packed_activations(width, 0.02, model=model):
            output = model(x)
        loss = nn.functional.cross_entropy(output, y)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_forward_is_exact_and_gradients_come_nearer_with_bits() -> None:
    torch.manual_seed(0)
    model, (x, y) = trained().train(), next(iter(digits().data("train")))
    exact = gradients(model, x, y, None)
    near = []
    for width in (2, 4, 8):
        found = gradients(model, x, y, width)
        flat = [torch.cat([g.reshape(-1) for g in grads.values()]) for grads in (exact, found)]
        near.append(float(torch.nn.functional.cosine_similarity(*flat, dim=0)))
    assert near == sorted(near)
    assert near[1] > 0.95, near
    assert near[-1] > 0.999


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each memory once, without the parameters."""
    own, keep = {p.untyped_storage().data_ptr() for p in model.parameters()}, list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        keep.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in keep}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_memory_and_each_tensor_once() -> None:
    x = torch.rand(32, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )
    with packed_activations(3, 0.02, model=model) as packing:
        output = model(x)
    assert packing.tensors == 3  # the image, and each ReLU's output once, though the next layer keeps it too
    assert 0.08 * kept(model, x) < packing.nbytes < 0.14 * kept(model, x)  # 3 / 32, and 2 % in 6 bytes each
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_stay_exact_also_those_of_forms() -> None:
    """With the input exact in few bits, only packed weights could change a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    Quantize(weights=Affine(), bits=8, ends="same").transform(model, Context())
    x = torch.randint(0, 2, (20, 64)).float().requires_grad_()
    found = []
    for width in (None, 2):
        x.grad = None
        if width is None:
            output = model(x)
        else:
            with packed_activations(width, 0.0, model=model):
                output = model(x)
        output.sum().backward()
        assert x.grad is not None
        found.append(x.grad.clone())
    assert torch.equal(*found)


class Inside(Callback):
    """Notes when the forward's block is open."""

    def __init__(self) -> None:
        self.open, self.notes = False, list[tuple[str, bool]]()

    def around(self, loop):  # type: ignore[no-untyped-def]
        from contextlib import contextmanager

        @contextmanager
        def block():  # type: ignore[no-untyped-def]
            self.open = True
            yield
            self.open = False

        return block()

    def loss(self, loop, batch, output, loss):  # type: ignore[no-untyped-def]
        self.notes.append(("loss", self.open))
        return loss

    def before_step(self, loop):  # type: ignore[no-untyped-def]
        self.notes.append(("step", self.open))


def test_the_loop_opens_around_for_the_training_forward_only() -> None:
    model, inside = network(), Inside()
    model.register_forward_hook(lambda m, *_: inside.notes.append(("train" if m.training else "eval", inside.open)))
    fit(model, Context(task=digits()), epochs=1, callbacks=[inside])
    assert set(inside.notes) == {("train", True), ("loss", False), ("step", False), ("eval", False)}


def test_the_scheme_trains_and_changes_the_gradients_alone() -> None:
    register("quantize", (ValueAwareMemory,))
    found = {}
    for name, schemes in (("plain", ()), ("packed", (ValueAwareMemory(),)), ("fine", (ValueAwareMemory(bits=8),))):
        step = Quantize(weights=Affine(), bits=4, epochs=3, lr=3e-3, schemes=schemes)
        found[name] = step.transform(copy.deepcopy(trained()), Context(task=digits(), seed=1))
    weights = {name: model[9].bias.detach() for name, model in found.items()}  # type: ignore[index]
    far = float((weights["packed"] - weights["plain"]).norm())
    near = float((weights["fine"] - weights["plain"]).norm())
    assert 0 < near < far
    assert accuracy(found["packed"]) > 0.93


def test_one_bit_is_refused() -> None:
    with pytest.raises(UsageError, match="bits"):
        ValueAwareMemory(bits=1)
