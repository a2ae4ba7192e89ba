"""Mixed bits: the choice against brute force, sensitivities against exact ones, and budgets that are kept."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NeedError, UsageError
from espalier.core.inputs import quantized_inputs
from espalier.core.model import copy_model
from espalier.core.parametrize import bake, freeze, slots
from espalier.core.recipe import Recipe
from espalier.core.record import Record
from espalier.core.task import Task, classification
from espalier.prune import Prune
from espalier.quantize import BWN, LSQ, TWN, AffineInput, BinaryInput, Quantize, allocation, mixed_bits
from espalier.quantize.allocation import allocate
from espalier.quantize.hutchinson import mean_traces
from espalier.quantize.input_trials import input_sensitivities, input_trials
from espalier.quantize.mixed_bits import MixedBits
from espalier.quantize.places import chosen
from espalier.quantize.trials import coded_bytes
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


def test_bytes_are_measured_after_the_step(trained, task):
    step = Quantize(weights=LSQ(), ends="same", epochs=3, lr=3e-2)
    method = MixedBits(measure="bytes", budget=3000, step=step)
    with pytest.warns(EspalierWarning, match=r"bytes after the step, above the budget of 3000; .* were predicted"):
        result, record = recorded(method, trained, task)
    found = record.details["mixed bits"]
    stored = freeze(result)[0]
    assert found["measured"]["bytes"] == sum(coded_bytes(stored[name]) for name in widths_of(result))
    assert found["measured"]["bytes"] > 3000 >= found["used"]
    _, details = run(method.replace(step=Quantize(ends="same")), trained, task)
    assert details["mixed bits"]["measured"]["bytes"] == details["mixed bits"]["used"]


def test_bit_operations_of_inputs_that_are_refused_count_in_fp32(trained, task):
    step = Quantize(activations=BinaryInput(), ends="same")
    result, details = run(MixedBits(measure="bops", budget=4e6, step=step), trained, task)
    macs = {"0.weight": 72 * 36, "3.weight": 1152 * 16, "6.weight": 8192, "8.weight": 320}
    assert list(quantized_inputs(result)) == ["0"]  # what a ReLU leaves is never negative
    bits = {"0.weight": 1, "3.weight": 32, "6.weight": 32, "8.weight": 32}
    used = sum(macs[name] * width * bits[name] for name, width in widths_of(result).items())
    assert details["mixed bits"]["used"] == used


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
    with pytest.raises(UsageError, match=r"measure=ms: the kernels have 8 bits.* put 8 among the widths"):
        MixedBits(measure="ms", widths=(2, 4), step=INT8)
    with pytest.raises(UsageError, match=r"step\.bits is what this step chooses"):
        MixedBits(step=Quantize(bits=4))
    with pytest.raises(UsageError, match=r"the step quantizes no weights"):
        MixedBits(step=Quantize(weights=None, activations=AffineInput()))
    with pytest.raises(UsageError, match=r"widths=\(4, 8\): bwn can do 1"):
        MixedBits(widths=(4, 8), step=Quantize(weights=BWN()))
    with pytest.raises(UsageError, match=r"a budget of 1\.5 bits cannot be met; the fewest bits take 2"):
        MixedBits(budget=1.5)(trained, Context(task=task))
    assert MixedBits(step=Quantize(weights=TWN())).allowed == (2,)
    with pytest.raises(UsageError, match=r"budget in bits does not count the bits of inputs; use measure=bops"):
        MixedBits(activation_widths=(4, 8), step=INT8)
    with pytest.raises(UsageError, match=r"the step quantizes no inputs: give it activations=affine-input"):
        MixedBits(measure="bops", activation_widths=(4, 8))
    with pytest.raises(UsageError, match=r"step\.activation_bits is what activation_widths choose"):
        MixedBits(measure="bops", activation_widths=(4, 8), step=INT8.replace(activation_bits=8))
    with pytest.raises(UsageError, match=r"activation_widths=\(4, 8\): binary-input can do 1"):
        MixedBits(measure="bops", activation_widths=(4, 8), step=Quantize(activations=BinaryInput(), ends="same"))


# --- milliseconds ----------------------------------------------------------------------------------------------------


class Clock:
    """In place of a timer's clock: a layer takes 1 ms in fp32 and 0.25 in int8, the network 10, and 6 in int8.

    Any call takes 0.5 ms; the network's times are with it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, files: Any, call: Any) -> dict[str, float]:
        self.calls.append(tuple(files))
        if tuple(files) != ("fp32", "int8"):
            return {"fp32": 10.0} if "fp32" in files else {"call": 0.5}
        return {"fp32": 10.0, "int8": 6.0} if call[0][0].shape[1:] == (1, 8, 8) else {"fp32": 1.5, "int8": 0.75}


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


@pytest.mark.parametrize(("budget", "int8"), [(9.25, 1), (8.0, 3)])
def test_a_budget_in_ms_leaves_in_fp32_what_it_can(budget: float, int8: int, clock: Clock, task: Task) -> None:
    method = MixedBits(measure="ms", budget=budget, widths=(8,), step=INT8)
    result, record = quietly(method, stack(), task)
    found = record.details["mixed bits"]
    assert found["used"] == found["predicted"]["int8 ms"] == pytest.approx(10 - 0.75 * int8)
    assert found["predicted"]["rest ms"] == pytest.approx(6)
    assert [row["bits"] for row in found["layers"]].count(8) == int8 == len(widths_of(result)) == len(inputs_of(result))
    assert all(row["sensitivity"] == 0 and row["bytes"] == 4 * row["parameters"] for row in found["layers"]
               if row["bits"] == 32)  # fmt: skip
    assert all((row["fp32 ms"], row["int8 ms"]) == (1.0, 0.25) for row in found["layers"])
    assert clock.calls.count(("fp32", "int8")) == 3 + 1, "equal layers once, and the finished network"
    assert clock.calls.count(("call",)) == 1
    assert (found["measured"]["fp32 ms"], found["measured"]["int8 ms"]) == (10.0, 6.0)
    assert {f"{name}.weight" for name in found["measured"]["keep_fp32"]} == {
        row["layer"] for row in found["layers"] if row["bits"] == 32
    }


def test_a_network_that_is_fast_enough_stays_in_fp32(clock: Clock, task: Task) -> None:
    net = stack()
    result, record = quietly(MixedBits(measure="ms", budget=10.0, step=INT8), net, task)
    assert "takes 10 ms in fp32, which is fast enough for 10 ms" in record.warnings[0]
    assert record.details["mixed bits"]["used"] == record.details["mixed bits"]["measured"]["fp32 ms"] == 10.0
    assert not widths_of(result)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in result.state_dict().items())
    assert clock.calls == [("fp32",)]


def test_what_the_step_does_not_choose_is_in_fp32_in_the_file_too(
    clock: Clock, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.quantize import layer_times

    files, write = [], layer_times.to_int8
    monkeypatch.setattr(layer_times, "to_int8", lambda *a, **k: files.append(write(*a, **k)) or files[-1])
    method = MixedBits(measure="ms", budget=9.5, widths=(8,), step=INT8.replace(layers=("3", "5")))
    result, record = quietly(method, stack(), task)
    left = record.details["mixed bits"]["measured"]["keep_fp32"]
    assert len(widths_of(result)) == 1
    assert {"1", "7"} < set(left)
    assert len(left) == 3
    assert {f"{name}.weight" for name in files[-1].bits} == set(widths_of(result))


def test_fewer_bits_take_the_same_time_and_that_is_said(clock: Clock, task: Task) -> None:
    result, record = quietly(MixedBits(measure="ms", budget=7.0, widths=(4, 8), step=INT8), stack(), task)
    assert set(widths_of(result).values()) == {8}
    assert any("weights of fewer bits take the time of 8" in text for text in record.notes)
    assert any("6 ms in onnxruntime with 1 thread, beside 10 ms in fp32; 7 ms" in text for text in record.notes)
    assert not record.warnings


def test_a_file_above_the_budget_is_said(clock: Clock, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.quantize.layer_times import Finished, Timer

    monkeypatch.setattr(Timer, "finished", lambda *_: Finished(10.0, 9.0, ()))
    _, record = quietly(MixedBits(measure="ms", budget=8.0, step=INT8), stack(), task)
    (text,) = record.warnings
    assert re.search(r"takes 9 ms in onnxruntime, above the budget of 8; 7.75 ms were predicted", text)


def test_a_layer_without_a_kernel_stays_in_fp32(clock: Clock, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.quantize.layer_times import LayerTime, Timer

    monkeypatch.setattr(Timer, "_measured", lambda _, layer, __: (
        LayerTime(1.5, why="no kernel") if layer.in_features == 64 else LayerTime(1.5, 0.75)
    ))  # fmt: skip
    result, record = quietly(MixedBits(measure="ms", budget=7.75, widths=(8,), step=INT8), stack(), task)
    assert {"name": "1.weight", "reason": "it stays in fp32: no kernel"} in record.skipped
    assert set(widths_of(result)) == {"3.weight", "5.weight", "7.weight"}
    assert record.details["mixed bits"]["measured"]["keep_fp32"] == ["1"]


def test_the_runtime_that_is_missing_is_named(trained: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(NeedError, match=r"espalier\[deploy\]"):
        run(MixedBits(measure="ms", budget=1.0, runtime="openvino", step=INT8), trained, task)


def test_no_kernel_is_fast_enough(clock: Clock, task: Task) -> None:
    with pytest.raises(UsageError, match=r"budget of 6.9 ms cannot be met; the fastest kernels .* take 7\. Raise"):
        run(MixedBits(measure="ms", budget=6.9, step=INT8), stack(), task)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_budget_in_ms_measured_for_real(
    runtime: str, trained: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are written and timed; then the clock is set so that each layer is worth it, whatever the machine."""
    for package in {"onnxruntime", runtime}:
        pytest.importorskip(package, reason=f"{package} is not installed; pip install espalier[deploy]")
    from espalier.quantize.layer_times import LayerTime, Timer

    measured = Timer._measured

    def set_(timer: Timer, layer: nn.Module, x: torch.Tensor) -> LayerTime:
        found = measured(timer, layer, x)
        assert min(found.fp32, found.int8) > 0
        assert not found.why
        return LayerTime(timer.call + 1e3, timer.call + 1.0)

    monkeypatch.setattr(Timer, "_measured", set_)
    monkeypatch.setattr(Timer, "whole", lambda *_: 4e3)
    step = {"quantize.quantize": {"activations": "affine-input", "ends": "same"}}
    fields = {"measure": "ms", "budget": 2.5e3, "runtime": runtime, "threads": 1, "step": step}
    method = Recipe.from_data({"steps": [{"quantize.mixed-bits": fields}]}).steps[0]
    assert isinstance(method, MixedBits)
    result, record = quietly(method, trained, task)
    found = record.details["mixed bits"]
    assert len(widths_of(result)) == 2
    assert found["used"] == pytest.approx(2e3 + 2)
    assert found["measured"]["runtime"] == runtime
    assert min(found["measured"]["fp32 ms"], found["measured"]["int8 ms"]) > 0
    assert len(found["measured"]["keep_fp32"]) == 2
    assert not record.warnings


# --- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module) -> dict[str, int]:
    return {path: quantizer.bits for path, quantizer in quantized_inputs(model).items()}


@pytest.mark.parametrize("by", ["hessian", "loss"])
def test_bits_of_inputs_are_chosen_with_those_of_weights(by: Any, trained: nn.Module, task: Task) -> None:
    method = MixedBits(by=by, measure="bops", budget=6e5, widths=(2, 4, 8), activation_widths=(2, 4, 8), step=INT8)
    result, record = recorded(method, trained, task)
    found = record.details["mixed bits"]
    macs = {"0": 72 * 36, "3": 1152 * 16, "6": 8192, "8": 320}
    widths, inputs = widths_of(result), inputs_of(result)
    used = sum(count * widths[f"{path}.weight"] * inputs[path] for path, count in macs.items())
    assert used == found["used"] <= 6e5
    assert used > 4e5
    assert len(set(inputs.values())) > 1
    for row in found["layers"]:
        assert (row["bits"], row["input_bits"]) == (widths[row["layer"]], inputs[row["layer"].removesuffix(".weight")])
        assert row["sensitivity"] == row["tried"][f"{row['bits']}/{row['input_bits']}"]
        assert len(row["tried"]) == 9
        assert ("input trace" in row) == (by == "hessian")
    assert not quantized_inputs(trained)


def test_the_loss_with_weight_and_input_of_one_layer(trained: nn.Module, task: Task) -> None:
    shown = list(itertools.islice(iter(task.data("train")), 3))
    fixed = classification(shown, task.val)
    method = MixedBits(by="loss", measure="bops", budget=1e9, widths=(3,), activation_widths=(2, 5), step=INT8)
    _, details = run(method, trained, fixed)

    def mean_loss(model: nn.Module) -> float:
        model = copy_model(model).eval()
        with torch.no_grad():
            return sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in shown) / 3

    for row in details["mixed bits"]["layers"]:
        for said, value in row["tried"].items():
            bits, input_bits = map(int, said.split("/"))
            alone = INT8.replace(bits=bits, activation_bits=input_bits, layers=(row["layer"],))
            assert value == pytest.approx(
                mean_loss(alone(trained, Context(task=fixed))) - mean_loss(trained), abs=1e-5
            )  # fmt: skip


class Both(nn.Module):
    """One tensor goes into a layer and past it, so the layer's own input is not the tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def tail(self, into: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(into)) + past

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.tail(h, h)


def test_traces_of_inputs_are_those_of_the_exact_second_derivatives() -> None:
    """As for weights, within five standard errors; one sample's second derivatives, averaged over the samples."""
    net = Both().double()
    data = [(torch.randn(16, 4).double(), torch.randint(3, (16,))) for _ in range(2)]
    context = Context(task=classification(data, data))
    step, probes = INT8.replace(layers=("last",)), 400
    places = chosen(net, step.layers, None, context, "test", densify=False)
    trials = input_trials(net, places, step, (3, 5), context)
    assert list(trials) == ["last.weight"]
    found = input_sensitivities(net, trials, context, count=2, probes=probes, against="loss")["last.weight"]
    exact, apart, errors = 0.0, 0.0, {3: 0.0, 5: 0.0}
    for x, y in data:
        h = torch.tanh(net.first(x)).detach()
        for row, label in zip(h, y, strict=True):
            block = torch.autograd.functional.hessian(
                lambda a, row=row, label=label: nn.functional.cross_entropy(net.tail(a, row), label), row
            )
            exact += float(block.trace()) / 32
            apart += float((block - block.diagonal().diag()).square().sum()) / 32**2
        for trial in trials["last.weight"]:
            errors[trial.bits] += float((trial.quantizers["last"](h) - h).square().mean()) / 2
    error = (2 * apart / probes) ** 0.5
    assert abs(found.trace - exact) <= 5 * error
    assert abs(exact) > 10 * error
    assert found.values == pytest.approx({bits: abs(found.trace) * value for bits, value in errors.items()})
    assert found.values[3] > found.values[5] > 0


def test_ends_and_dead_inputs_keep_theirs(trained: nn.Module, task: Task) -> None:
    method = MixedBits(
        measure="bops", budget=8e5, widths=(4, 8), activation_widths=(4, 8), step=INT8.replace(ends=8)
    )  # fmt: skip
    result, record = recorded(method, trained, task)
    inputs, rows = inputs_of(result), {row["layer"]: row for row in record.details["mixed bits"]["layers"]}
    assert inputs["0"] == inputs["8"] == 8
    assert list(rows["0.weight"]["tried"]) == ["8/8"]
    dead = copy_model(trained)
    with torch.no_grad():
        dead[3].weight.zero_()
        dead[3].bias.fill_(-1.0)
    result, record = recorded(method.replace(budget=2e6), dead, task)
    rows = {row["layer"]: row for row in record.details["mixed bits"]["layers"]}
    assert "input_bits" not in rows["6.weight"]
    macs = {"0.weight": 72 * 36, "3.weight": 1152 * 16, "6.weight": 8192, "8.weight": 320}
    used = sum(count * rows[name]["bits"] * rows[name].get("input_bits", 32) for name, count in macs.items())
    assert record.details["mixed bits"]["used"] == used
    assert "6" not in inputs_of(result)
