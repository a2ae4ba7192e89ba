"""Data-parallel and compiled wrappers come off; torch's pruning masks are read wherever a model comes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import espalier as es
from espalier.core.model import copy_model, unwrapped
from espalier.core.parametrize import slots
from espalier.data import standard


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def task() -> es.Task:
    data = standard("digits")
    return es.tasks.classification(data.train, data.val, data.test)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m)),
     lambda m: nn.Sequential(torch.compile(m[0]), *m[1:])],
    ids=["data-parallel", "compiled", "both", "inside"],
)  # fmt: skip
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    wrapped = wrap(model)
    copied = copy_model(wrapped)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert unwrapped(wrapped) is (wrapped if isinstance(wrapped, nn.Sequential) else model)
    step = es.prune.Prune(pattern=es.prune.Channels(), sparsity=0.5, layers=("0",))
    result = step(wrapped, es.Context(task=task()))
    assert result[0].weight.shape == (4, 1, 3, 3)
    assert model[0].weight.shape == (8, 1, 3, 3)


def test_a_run_starts_from_the_masks_of_torch(tmp_path: Path) -> None:
    model = net()
    torch_prune.l1_unstructured(model[3], "weight", amount=0.9)
    recipe = es.Recipe(steps=(es.train.Finetune(epochs=1),))
    result = es.compress(model, task(), recipe, out=tmp_path)
    weight = dict(result.model.named_parameters())["3.weight"]
    assert torch.equal(weight == 0, model[3].weight_mask == 0)
    assert torch_prune.is_pruned(es.prune.to_torch(copy_model(model)))
    assert {name: slot.phase for name, slot in slots(copy_model(model)).items()}["3.weight"] == "mask"
