"""A user's model: copied whole or refused with a reason, its modes kept, its state summed up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from espalier.core.errors import ModelError, NumericError
from espalier.core.forms import Mask
from espalier.core.model import (
    check_finite,
    copy_model,
    device_of,
    digest,
    evaluating,
    keep_mode,
    modes,
    set_modes,
    tensor_bytes,
)
from espalier.core.parametrize import attach, slots
from espalier.core.record import Counts, Record
from espalier.testing import EXAMPLES, Example, bits


def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    model = nn.Linear(2, 2)
    model.cache = model(torch.ones(1, 2))  # a tensor with a graph
    with pytest.raises(ModelError, match=r"Linear cannot be copied.*detach"):
        copy_model(model)
    with pytest.raises(ModelError, match="got str"):
        copy_model("model")  # type: ignore[arg-type]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_a_copy_is_equal_and_apart(example: Example) -> None:
    model = example.build()
    copy = copy_model(model)
    assert bits(copy.state_dict()) == bits(model.state_dict())
    assert digest(copy) == digest(model)
    assert modes(copy) == modes(model)
    with torch.no_grad():
        next(copy.parameters()).add_(1)
    assert digest(copy) != digest(model)


def test_new_modules_take_the_mode_of_their_parent() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    model[0].eval()
    before = modes(model)
    model[0][0] = nn.Sequential(nn.Linear(2, 2))
    model.append(nn.Tanh())
    model.train()
    set_modes(model, before)
    assert modes(model) == {"": True, "0": False, "0.0": False, "0.0.0": False, "1": True, "2": True}


def test_modes_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.ReLU().eval())
    before = modes(model)
    for manager in (evaluating, keep_mode):
        with pytest.raises(KeyError), manager(model):  # type: ignore[operator]
            model.eval()
            raise KeyError
        assert modes(model) == before
    with evaluating(model) as same:
        assert same is model
        assert not torch.is_grad_enabled()
        assert not model.training


def test_keep_mode_hands_the_modes_to_another_model() -> None:
    model, other = nn.Sequential(nn.ReLU().eval()), nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    with keep_mode(model) as give:
        assert modes(give(other)) == {"": True, "0": False, "1": True}


def test_device_of() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    assert len(bytes(tensor_bytes(tensor))) == tensor.numel() * tensor.element_size()
    assert bytes(tensor_bytes(torch.arange(6).reshape(2, 3).t())) == bytes(
        tensor_bytes(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    )


def test_digest_sees_values_and_structure() -> None:
    def changed(change: Any) -> bool:
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        with torch.no_grad():
            model[0].weight.fill_(0.5)
            model[0].bias.fill_(0.0)
        before = digest(model)
        change(model)
        return digest(model) != before

    def negate(model: nn.Sequential) -> None:
        with torch.no_grad():
            model[0].bias.neg_()  # -0.0 is another value to a file

    def replace(model: nn.Sequential) -> None:
        model[1] = nn.Tanh()

    def mask(model: nn.Sequential) -> None:
        attach(slots(model)["0.weight"], Mask(torch.ones(2, 2, dtype=torch.bool)))

    def nothing(model: nn.Sequential) -> None:
        model.eval()
        model.zero_grad()

    assert changed(negate)
    assert changed(replace)
    assert changed(mask)
    assert not changed(nothing)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found(bad: float) -> None:
    model = nn.BatchNorm1d(3)
    check_finite(model, "now")
    model.running_var[1] = bad
    with pytest.raises(NumericError, match="running_var holds 1 NaN or infinite of 3 values after epoch 2"):
        check_finite(model, "after epoch 2")


def test_a_mask_may_hold_infinities() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    check_finite(model, "now")
    model.mask[0, 0] = float("nan")
    with pytest.raises(NumericError, match="mask holds 1 NaN"):
        check_finite(model, "now")
    model.mask[0, 0] = 0
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(NumericError, match="weight holds 1 NaN or infinite"):
        check_finite(model, "now")


def test_counts_see_the_weights_in_force() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().t().clone())
    assert Counts.of(model) == Counts(45, 45)
    attach(slots(model)["0.weight"], Mask(torch.eye(5, 4, dtype=torch.bool)))
    assert Counts.of(model) == Counts(45, 29)
    tied = next(e for e in EXAMPLES if e.name == "tied").build()
    assert Counts.of(tied).parameters == 88


def test_a_record_travels_as_plain_data() -> None:
    record = Record("01-prune", "prune.prune", fields={"sparsity": 0.5}, notes=["x"])
    record.skipped.append({"name": "a", "reason": "b"})
    assert Record.from_json(record.to_json()) == record


class Remembering(nn.Linear):
    """A layer whose state dict holds more than tensors."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_entries_that_are_no_tensors_are_left_out() -> None:
    model = nn.Sequential(Remembering(2, 2), nn.ReLU())
    check_finite(model, "now")
    assert digest(copy_model(model)) == digest(model)
    before = digest(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert digest(model) != before


@pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager quantization
def test_a_quantized_model_is_refused_with_its_layers() -> None:
    float_model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    quantized = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear})
    for refuse in (copy_model, lambda model: check_finite(model, "now")):
        with pytest.raises(ModelError, match=r"quantized already: 0\.0 \(torch.*\.Linear\), 1 .*give the float model"):
            refuse(quantized)
    holder = nn.Module()
    holder.register_buffer("codes", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with pytest.raises(ModelError, match="the model itself"):
        copy_model(holder)


@pytest.mark.filterwarnings("ignore")
def test_a_model_prepared_for_quantization_is_float() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.ao.quantization.QuantStub())
    model.add = torch.ao.nn.quantized.FloatFunctional()
    check_finite(copy_model(model), "now")
