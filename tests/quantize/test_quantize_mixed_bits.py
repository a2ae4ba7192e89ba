"""Mixed bits: the choice against brute force, sensitivities against exact ones, and budgets that are kept."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, UsageError
from espalier.core.model import copy_model
from espalier.core.parametrize import bake, slots
from espalier.core.recipe import Recipe
from espalier.core.record import Record
from espalier.core.task import Task, classification
from espalier.prune import Prune
from espalier.quantize import BWN, LSQ, TWN, AffineInput, Quantize, allocation, mixed_bits
from espalier.quantize.allocation import allocate
from espalier.quantize.hutchinson import mean_traces
from espalier.quantize.mixed_bits import MixedBits
from espalier.share import KMeans
from espalier.train import Finetune

INT8 = Quantize(activations=AffineInput(), ends="same")


@pytest.fixture(scope="module")
def trained(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return Finetune(epochs=4, lr=3e-3)(net, Context(task=task))


def recorded(method: MixedBits, model: nn.Module, task: Task) -> tuple[nn.Module, Record]:
    child = Context(task=task).child("mixed", method)
    result = method.transform(copy_model(model), child)
    return result, child.record


def run(method: MixedBits, model: nn.Module, task: Task) -> tuple[nn.Module, dict[str, Any]]:
    result, record = recorded(method, model, task)
    return result, record.details


# --- the choice ------------------------------------------------------------------------------------------------------


def brute(values, costs, budget):
    best = None
    for picked in itertools.product(*(range(len(v)) for v in values)):
        if sum(c[i] for c, i in zip(costs, picked, strict=True)) <= budget:
            worth = sum(v[i] for v, i in zip(values, picked, strict=True))
            best = worth if best is None else min(best, worth)
    return best


def problem(seed: int, layers: int, options: int):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(layers, options, generator=generator) - 0.1).tolist()
    costs = (torch.rand(layers, options, generator=generator) * 10).tolist()
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return values, costs, low + (high - low) * float(torch.rand((), generator=generator))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_there_is(seed):
    values, costs, budget = problem(seed, 1 + seed % 6, 1 + seed % 4)
    picked = allocate(values, costs, budget)
    assert sum(c[i] for c, i in zip(costs, picked, strict=True)) <= budget + 1e-9
    assert sum(v[i] for v, i in zip(values, picked, strict=True)) == pytest.approx(brute(values, costs, budget))
    assert allocate(values, costs, sum(map(min, costs)) * 0.99) is None


def test_a_thinned_front_keeps_the_budget_and_is_close(monkeypatch):
    monkeypatch.setattr(allocation, "LARGEST_FRONT", 40)
    for seed in range(10):
        values, costs, budget = problem(seed, 7, 4)
        picked = allocate(values, costs, budget)
        assert sum(c[i] for c, i in zip(costs, picked, strict=True)) <= budget + 1e-9
        found = sum(v[i] for v, i in zip(values, picked, strict=True))
        assert found - brute(values, costs, budget) < 0.2


def test_of_equal_values_the_cheaper():
    assert allocate([[1.0, 1.0, 1.0]], [[3.0, 2.0, 5.0]], 9) == [1]


# --- how sensitive a layer is ----------------------------------------------------------------------------------------


def test_traces_are_those_of_the_exact_second_derivatives():
    """Within five standard errors, which follow from the exact second derivatives as well: 2 sum_{i != j} H_ij^2."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = [(torch.randn(16, 4).double(), torch.randint(2, (16,))) for _ in range(2)]
    context = Context(task=classification(data, data))
    masked = Prune(sparsity=0.5, layers=("2",))(net, context)
    probes, clear = 400, 0
    for model in (net, masked):
        chosen = [slot for name, slot in slots(model).items() if name.endswith("weight")]
        found = mean_traces(model, chosen, context, count=2, probes=probes, against="loss")
        plain = copy_model(model)
        for slot in slots(plain).values():
            bake(slot)
        for slot in chosen:
            mask = slot.form.mask.flatten() if slot.form is not None else torch.ones(slot.shape.numel()).bool()
            blocks = [hessian_of(plain, slot.name, batch)[mask][:, mask] for batch in data]
            exact = sum(float(block.trace()) for block in blocks) / 2 / len(blocks[0])
            apart = sum(float((block - block.diagonal().diag()).square().sum()) for block in blocks)
            error = (2 * apart / probes) ** 0.5 / 2 / len(blocks[0])
            assert abs(found[slot.name] - exact) <= 5 * error
            clear += abs(exact) > 20 * error
    assert clear >= 2  # for these, 5 errors are less than a quarter of the trace


def hessian_of(model: nn.Module, name: str, batch: Any) -> torch.Tensor:
    x, y = batch
    weight = model.get_parameter(name).detach()

    def loss(w):
        return nn.functional.cross_entropy(torch.func.functional_call(model, {name: w}, (x,)), y)

    return torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel())


def test_hessian_sensitivity_is_trace_times_distance(trained, task):
    _, details = run(MixedBits(widths=(2, 4)), trained, task)
    for row in details["mixed bits"]["layers"]:
        weight = slots(trained)[row["layer"]].value()
        for width, value in row["tried"].items():
            alone = Quantize(bits=int(width), ends="same", layers=(row["layer"],))(trained, Context(task=task))
            apart = float((slots(alone)[row["layer"]].value().double() - weight.double()).square().sum())
            assert value == pytest.approx(abs(row["trace"]) * apart, rel=1e-6)
        assert row["sensitivity"] == row["tried"][str(row["bits"])]


def test_a_negative_trace_counts_by_its_size(trained, task, monkeypatch):
    monkeypatch.setattr(mixed_bits, "mean_traces", lambda _, chosen, *__, **___: {slot.name: -2.0 for slot in chosen})
    _, details = run(MixedBits(widths=(2, 4)), trained, task)
    assert all(row["tried"]["2"] > row["tried"]["4"] > 0 for row in details["mixed bits"]["layers"])


@pytest.mark.parametrize("against", ["loss", "output"])
def test_loss_sensitivity_is_what_the_network_loses(against, trained, task):
    shown = list(itertools.islice(iter(task.data("train")), 4))
    fixed = classification(shown, task.val)
    _, details = run(MixedBits(by="loss", against=against, widths=(2, 4), batches=3), trained, fixed)

    def mean_loss(model):
        model, reference = copy_model(model).eval(), copy_model(trained).eval()
        with torch.no_grad():
            if against == "loss":
                return sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in shown[:3]) / 3
            return sum(float((model(x) - reference(x)).square().sum(1).mean() / 2) for x, _ in shown[:3]) / 3

    for row in details["mixed bits"]["layers"]:
        for width, value in row["tried"].items():
            alone = Quantize(bits=int(width), ends="same", layers=(row["layer"],))(trained, Context(task=task))
            assert value == pytest.approx(mean_loss(alone) - mean_loss(trained), abs=1e-5)


# --- budgets ---------------------------------------------------------------------------------------------------------


def widths_of(model: nn.Module) -> dict[str, int]:
    return {name: slot.form.bits for name, slot in slots(model).items() if slot.form is not None}


@pytest.mark.parametrize("by", ["hessian", "loss"])
@pytest.mark.parametrize("budget", [2.5, 4.0, 6.0])
def test_bits_per_weight(by, budget, trained, task):
    result, details = run(MixedBits(by=by, budget=budget), trained, task)
    found = details["mixed bits"]
    widths = widths_of(result)
    assert widths == {row["layer"]: row["bits"] for row in found["layers"]}
    sizes = {name: trained.get_parameter(name).numel() for name in widths}
    mean = sum(widths[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(found["used"])
    assert mean <= budget
    assert len(set(widths.values())) > 1 or budget == 6.0
    assert set(widths.values()) <= {2, 3, 4, 6, 8}


def test_bytes_and_bit_operations(trained, task):
    result, details = run(MixedBits(measure="bytes", budget=4000), trained, task)
    found = details["mixed bits"]
    assert sum(row["bytes"] for row in found["layers"]) == found["used"] <= 4000
    assert found["used"] > 3000
    step = Quantize(ends="same", activations=AffineInput(), activation_bits=4)
    result, details = run(MixedBits(measure="bops", budget=3e5, step=step), trained, task)
    macs = {"0.weight": 72 * 36, "3.weight": 1152 * 16, "6.weight": 8192, "8.weight": 320}
    widths = widths_of(result)
    used = sum(macs[name] * bits * 4 for name, bits in widths.items())
    assert used == details["mixed bits"]["used"] <= 3e5
    assert set(widths.values()) != {2}


def test_more_budget_costs_less(trained, task):
    sums = [
        sum(row["sensitivity"] for row in run(MixedBits(budget=b), trained, task)[1]["mixed bits"]["layers"])
        for b in (2.2, 3.0, 5.0, 8.0)
    ]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] > sums[-1]


def test_the_ends_keep_their_policy(trained, task):
    result, details = run(MixedBits(budget=2.5, step=Quantize(ends=8)), trained, task)
    widths = widths_of(result)
    assert (widths["0.weight"], widths["8.weight"]) == (8, 8)
    assert details["mixed bits"]["used"] <= 2.5
    result, details = run(MixedBits(budget=2.5, step=Quantize(ends="float")), trained, task)
    assert set(widths_of(result)) == {"3.weight", "6.weight"}


def test_pruned_and_shared_weights(trained, task):
    context = Context(task=task)
    pruned = Prune(sparsity=0.6)(trained, context)
    before = {name: slot.form.mask.clone() for name, slot in slots(pruned).items() if slot.form is not None}
    result = MixedBits(budget=3.0)(pruned, context)
    for name, mask in before.items():
        assert not slots(result)[name].value()[~mask].any()
        assert "forward" not in vars(slots(pruned)[name].form)  # trials leave the forms as they were
    shared = KMeans(bits=4, layers=("6",))(trained, context)
    result = MixedBits(budget=4.0, by="loss")(shared, context)
    assert len(slots(result)["6.weight"].value().unique()) <= 16


def test_it_travels_and_trains(trained, task):
    step = MixedBits(budget=2.5, step=Quantize(weights=LSQ(), ends="same", epochs=2, lr=1e-3))
    context = Context(task=task)
    before = context.measure(MixedBits(budget=2.5)(trained, context)).value
    after = context.measure(step(trained, context)).value
    assert after >= before
    assert after > 85
    from espalier.api import fill_registry
    from espalier.core.registry import methods

    fill_registry()
    if MixedBits in set(methods()):
        recipe = Recipe(steps=(step,))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_analysis_is_in_the_record(trained, task):
    result, details = run(MixedBits(budget=2.5, analyse=True), trained, task)
    found = details["quantization sensitivity"]
    assert {row["name"]: row["bits"] for row in found["layers"]} == widths_of(result)
    assert found["all"] == Context(task=task).measure(result).value


def test_refusals(trained, task):
    with pytest.raises(UsageError, match=r"measure=ms: int8 kernels .* activations=affine-input"):
        MixedBits(measure="ms")
    with pytest.raises(UsageError, match=r"measure=ms: no kernel has more than 8 bits"):
        MixedBits(measure="ms", widths=(8, 16), step=INT8)
    with pytest.raises(UsageError, match=r"step\.bits is what this step chooses"):
        MixedBits(step=Quantize(bits=4))
    with pytest.raises(UsageError, match=r"the step quantizes no weights"):
        MixedBits(step=Quantize(weights=None, activations=AffineInput()))
    with pytest.raises(UsageError, match=r"widths=\(4, 8\): bwn can do 1"):
        MixedBits(widths=(4, 8), step=Quantize(weights=BWN()))
    with pytest.raises(UsageError, match=r"a budget of 1\.5 bits cannot be met; the fewest bits take 2"):
        MixedBits(budget=1.5)(trained, Context(task=task))
    assert MixedBits(step=Quantize(weights=TWN())).allowed == (2,)


# --- milliseconds ----------------------------------------------------------------------------------------------------


class Clock:
    """In place of a timer's clock: a layer takes 1 ms in fp32 and 0.25 in int8, the network 10, and 6 in int8."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, files: Any, call: Any) -> dict[str, float]:
        self.calls.append(tuple(files))
        if tuple(files) == ("fp32",):
            return {"fp32": 10.0}
        return {"fp32": 10.0, "int8": 6.0} if call[0][0].shape[1:] == (1, 8, 8) else {"fp32": 1.0, "int8": 0.25}


def quietly(method: MixedBits, model: nn.Module, task: Task) -> tuple[nn.Module, Record]:
    """Warnings are in the record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EspalierWarning)
        return recorded(method, model, task)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install espalier[deploy]")
    from espalier.quantize.layer_times import Timer

    made = Clock()
    monkeypatch.setattr(Timer, "timed", lambda _, files, call: made(files, call))
    return made


def stack() -> nn.Module:
    """Three linear layers of which two are equal; the first sees the image."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("budget", "int8"), [(10.0, 0), (9.5, 1), (7.0, 4)])
def test_a_budget_in_ms_leaves_in_fp32_what_it_can(budget: float, int8: int, clock: Clock, task: Task) -> None:
    method = MixedBits(measure="ms", budget=budget, widths=(8,), step=INT8)
    result, record = quietly(method, stack(), task)
    found = record.details["mixed bits"]
    assert any("fast enough in fp32" in text for text in record.warnings) == (not int8)
    assert found["used"] == pytest.approx(10 - 0.75 * int8)
    assert [row["bits"] for row in found["layers"]].count(8) == int8 == len(widths_of(result))
    assert clock.calls.count(("fp32", "int8")) == 3 + bool(int8), "equal layers once, and the finished network"
    if int8:
        assert (found["measured"]["fp32 ms"], found["measured"]["int8 ms"]) == (10.0, 6.0)


def test_a_file_above_the_budget_is_said(clock: Clock, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.quantize.layer_times import Timer

    monkeypatch.setattr(Timer, "both", lambda *_: {"fp32": 10.0, "int8": 9.0})
    _, record = quietly(MixedBits(measure="ms", budget=8.0, step=INT8), stack(), task)
    (text,) = record.warnings
    assert re.search(r"takes 9 ms in onnxruntime, above the budget of 8; .* promised 7.75 ms", text)


def test_no_kernel_is_fast_enough(clock: Clock, task: Task) -> None:
    with pytest.raises(UsageError, match=r"budget of 6.9 ms cannot be met; the int8 kernels .* take 7\. Raise"):
        run(MixedBits(measure="ms", budget=6.9, step=INT8), stack(), task)


def test_a_budget_in_ms_measured_for_real(trained: nn.Module, task: Task) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install espalier[deploy]")
    step = {"quantize.quantize": {"activations": "affine-input", "ends": "same"}}
    data = {
        "steps": [{"quantize.mixed-bits": {"measure": "ms", "budget": 1e3, "runtime": "onnxruntime", "step": step}}]
    }
    method = Recipe.from_data(data).steps[0]
    _, record = quietly(method, trained, task)
    assert 0 < record.details["mixed bits"]["used"] < 1e3
    assert "fast enough in fp32" in record.warnings[0]
