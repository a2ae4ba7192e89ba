"""Masks of torch.nn.utils.prune come in and go out, and mean the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from espalier.core.errors import ModelError
from espalier.core.forms import Mask
from espalier.core.parametrize import plain, slots
from espalier.prune import Prune
from espalier.prune.torch_masks import copy_from_torch, from_torch, has_torch_masks, to_torch
from espalier.testing import effective
from espalier.testing.models import EXAMPLES


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def pruned_by_torch() -> nn.Sequential:
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.random_unstructured(model[0], "weight", amount=0.2)  # a container of two methods
    torch_prune.ln_structured(model[2], "weight", amount=1, n=2, dim=0)
    torch_prune.l1_unstructured(model[2], "bias", amount=1)
    return model


def test_reading() -> None:
    model = pruned_by_torch()
    x = torch.randn(4, 6)
    expected, names = model(x), list(net().state_dict())
    zeros = {name: int((model.get_submodule(name[0]).__dict__[name[2:]] == 0).sum()) for name in ("0.weight", "2.bias")}
    assert has_torch_masks(model)
    assert from_torch(model) is model
    assert not has_torch_masks(model)
    assert torch.equal(model(x), expected)
    assert {name: slot.phase for name, slot in slots(model).items()} == {
        "0.weight": "mask", "0.bias": "dense", "2.weight": "mask", "2.bias": "mask",
    }  # fmt: skip
    assert {name: int((effective(model)[name] == 0).sum()) for name in zeros} == zeros
    assert list(plain(model).state_dict()) == names
    copy.deepcopy(model)


def test_the_copy_leaves_the_argument_as_it_is() -> None:
    model = pruned_by_torch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 6)
    copied = copy_from_torch(model)
    assert torch.equal(copied(x), model(x))
    assert has_torch_masks(model)
    assert not has_torch_masks(copied)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_round_trip_keeps_values_under_the_mask() -> None:
    model = pruned_by_torch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 6)
    expected = model(x)
    to_torch(from_torch(model))
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(x), expected)
    loaded = pruned_by_torch()
    loaded.load_state_dict(after)


def test_ours_goes_out_and_trains_on_in_torch() -> None:
    model = to_torch(Prune(sparsity=0.5)(net()))
    assert isinstance(model[0], nn.Linear)
    assert "weight_orig" in dict(model[0].named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    model(torch.randn(4, 6))
    assert int((model[0].weight == 0).sum()) == 15


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name in ("recurrent", "tied", "convolution")],
                         ids=lambda e: e.name)  # fmt: skip
def test_round_trip_of_other_layers(example: Any) -> None:
    model = Prune(sparsity=0.5)(example.build())
    task = example.task()
    model.eval()
    batch = task.example()
    expected = task.predict(model, batch)
    to_torch(model)
    assert torch.equal(torch.as_tensor(task.predict(model, batch)), torch.as_tensor(expected))
    from_torch(model)
    assert torch.equal(torch.as_tensor(task.predict(model, batch)), torch.as_tensor(expected))
    assert any(isinstance(slot.form, Mask) for slot in slots(model).values())


def test_what_has_no_form_of_ours_is_refused() -> None:
    model = net()
    torch_prune.custom_from_mask(model[0], "weight", torch.full((5, 6), 0.5))
    with pytest.raises(ModelError, match=r"0.weight carries a torch pruning mask with values other than 0 and 1"):
        from_torch(model)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    torch_prune.l1_unstructured(tied[0], "weight", amount=2)
    with pytest.raises(ModelError, match="tied"):
        from_torch(tied)
