"""What all methods on uniform grids and short floats share: exact files, kept zeros and clusters, learning."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.api import fill_registry
from espalier.core.context import Context
from espalier.core.forms import Mask, Shared
from espalier.core.inputs import ActivationQuantizer, quantized_inputs
from espalier.core.parametrize import freeze, plain, slots
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.core.representation import Affine as StoredAffine
from espalier.core.representation import Codebook, Dense
from espalier.core.task import Task
from espalier.graph import trace
from espalier.prune import Prune
from espalier.quantize import Quantize
from espalier.quantize.dorefa import DoReFa, DoReFaInput
from espalier.quantize.fixed_point import FixedPoint, FixedPointInput
from espalier.quantize.half import Half, HalfInput
from espalier.quantize.lsq import LSQ, LSQInput
from espalier.quantize.pact import PACT
from espalier.quantize.qat import QAT, QATInput
from espalier.quantize.sawb import SAWB
from espalier.runs.checkpoint import load_model, save_model
from espalier.share import KMeans
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

fill_registry()

WEIGHTS: list[WeightQuantizer] = [
    FixedPoint(every=5), FixedPoint(mode="static", rounding="stochastic"), Half(), Half(format="bf16"),
    Half(format="e4m3"), Half(format="e5m2"), QAT(), QAT(symmetric=True, per="tensor"), LSQ(), LSQ(per="channel"),
    LSQ(plus=True), SAWB(), DoReFa(),
]  # fmt: skip
INPUTS: list[tuple[ActivationQuantizer, int]] = [
    (FixedPointInput(every=5), 4), (FixedPointInput(rounding="stochastic"), 4), (HalfInput(), 16),
    (HalfInput(format="bf16"), 16), (HalfInput(format="e4m3"), 8), (HalfInput(format="e5m2"), 8), (QATInput(), 3),
    (LSQInput(), 3), (LSQInput(plus=True), 3), (PACT(), 4), (PACT(alpha=None), 3), (DoReFaInput(), 3),
]  # fmt: skip


def named(item: object) -> str:
    method = item[0] if isinstance(item, tuple) else item
    return str(method).replace(" ", "")[:60]


def few(method: WeightQuantizer) -> int:
    return next((b for b in (3, 8, 16) if b in method.widths), 3)


@pytest.fixture(scope="module")
def trained(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10)
    )
    return Finetune(epochs=8)(net, Context(task=task))


def forms(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {name: slot.form for name, slot in slots(model).items() if isinstance(slot.form, QuantizedWeight)}


@pytest.mark.parametrize("method", WEIGHTS, ids=named)
def test_frozen_values_are_the_values_bit_for_bit(method):
    generator = torch.Generator().manual_seed(0)
    widths = [b for b in method.widths if b in {1, 2, 3, 5, 8, 16}]
    shapes: list[tuple[tuple[int, ...], int | None]] = [((6, 5), 0), ((4, 3, 3, 3), 1), ((7,), None), ((3, 1), 0)]
    cases = itertools.product(widths, (torch.float32, torch.float64, torch.bfloat16), shapes, (0.0, 1.0), (True, False))
    for width, dtype, (shape, axis), size, masked in cases:
        weight = (torch.randn(shape, generator=generator) * size).to(dtype)
        mask = torch.rand(shape, generator=generator) < 0.5
        form = QuantizedWeight(
            method, weight, width, axis=axis, inner=Mask(mask) if masked and axis is not None else None
        )
        latent = form.right_inverse(weight).requires_grad_()
        values = form.eval()(latent)
        assert values.dtype == dtype
        assert bool(torch.isfinite(values).all())
        dense = form.freeze(latent).dense()
        assert np.array_equal(
            dense, values.detach().float().numpy() if dtype == torch.bfloat16 else values.detach().numpy()
        )
        if form.inner is not None:
            assert not bool(values[~mask].any())
        form.train()
        again = form(latent)
        if getattr(method, "rounding", "nearest") == "nearest":
            assert torch.equal(again, values)
        again.sum().backward()
        assert latent.grad is not None
        assert bool(torch.isfinite(latent.grad).all())


@pytest.mark.parametrize("method", WEIGHTS, ids=named)
def test_networks_learn_and_the_file_answers_as_they_do(method, task, trained, tmp_path):
    context = Context(task=task)
    result = Quantize(weights=method, bits=few(method), ends="same", epochs=4)(trained, context)
    assert task.measure(result, "val").value > 65
    stored = freeze(result)[0]
    for name, form in forms(result).items():
        found = stored[name]
        if isinstance(found, StoredAffine):
            assert len(np.unique(found.codes)) <= 2**form.bits
        elif isinstance(found, Codebook):
            assert found.centroids.size <= 2**form.bits
        else:
            assert isinstance(found, Dense)
            assert found.bits() == form.bits * found.numel
    save_model(result, tmp_path / "kept")
    for other in (frozen_copy(result), load_model(trained, tmp_path / "kept"), copy.deepcopy(result)):
        assert bits(outputs(other, task)) == bits(outputs(result, task))


@pytest.mark.parametrize("method", WEIGHTS, ids=named)
def test_zeros_and_clusters_are_kept(method, task, trained):
    context = Context(task=task)
    pruned = Prune(sparsity=0.6)(trained, context)
    result = Quantize(weights=method, bits=few(method), epochs=1)(pruned, context)
    for name, form in forms(result).items():
        assert isinstance(form.inner, Mask)
        assert not bool(slots(result)[name].value()[~form.inner.mask].any())
    assert bits(outputs(frozen_copy(result), task)) == bits(outputs(result, task))
    clustered = KMeans(bits=3, layers=("4",))(trained, context)
    result = Quantize(weights=method, bits=few(method), layers=("4",), epochs=1)(clustered, context)
    form, before = forms(result)["4.weight"], slots(clustered)["4.weight"].form
    assert isinstance(form.inner, Shared)
    assert isinstance(before, Shared)
    assert torch.equal(form.inner.index, before.index)
    assert len(slots(result)["4.weight"].value().unique()) <= 8
    assert bits(outputs(frozen_copy(result), task)) == bits(outputs(result, task))


@pytest.mark.parametrize("given", INPUTS, ids=named)
def test_quantized_inputs_learn_are_traced_and_come_back(given, task, trained, tmp_path):
    method, width = given
    context = Context(task=task)
    step = Quantize(weights=None, activations=method, activation_bits=width, ends="same", epochs=4)
    result = step(trained, context)
    assert task.measure(result, "val").value > 65
    x: Tensor = next(iter(task.data("val")))[0]
    for path, quantizer in quantized_inputs(result.eval()).items():
        if width < 16:
            assert len(quantizer(torch.randn(4000) * 3).unique()) <= 2**width, path
    graph = trace(plain(result), (x[:4],))
    kinds = [node.op for node in graph.nodes]
    uniform = not isinstance(method, HalfInput)
    assert kinds.count("fake_quantize") == (3 if uniform else 0)
    assert kinds.count("bucketize") == (3 if not uniform and width == 8 else 0)
    assert kinds.count("to") == (6 if width == 16 else 0)
    save_model(result, tmp_path / "kept")
    for other in (load_model(trained, tmp_path / "kept"), copy.deepcopy(result)):
        assert bits(outputs(other, task)) == bits(outputs(result, task))
        found = {path: q.state.tensors() for path, q in quantized_inputs(other).items()}
        assert bits(found) == bits({path: q.state.tensors() for path, q in quantized_inputs(result).items()})


def test_the_same_seed_makes_the_same_weights(task, trained):
    step = Quantize(weights=FixedPoint(rounding="stochastic"), bits=4, epochs=1)
    first, second = (step(trained, Context(task=task, seed=3)) for _ in range(2))
    assert bits(outputs(first, task)) == bits(outputs(second, task))
    other = step(trained, Context(task=task, seed=4))
    assert bits(outputs(first, task)) != bits(outputs(other, task))
