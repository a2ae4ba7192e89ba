"""Wanda: input norms against unfolded inputs, for every kind of layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.data import standard
from espalier.prune import Global, Magnitude, Prune, Row, Wanda
from espalier.prune.wanda import input_squares, typical, wanda
from espalier.testing import EXAMPLES, effective
from espalier.train import Finetune


def scores(model: nn.Module, *batches: Tensor) -> tuple[dict[str, Tensor], Context]:
    context = Context(task=Task(train=[(x,) for x in batches]))
    return Wanda(batches=len(batches)).scores(model, select(model, ("*",)), context), context


def test_linear_by_numpy_over_batches_and_positions() -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(5, 3).double(), [torch.randn(4, 2, 5).double() for _ in range(3)]
    found, _ = scores(model, *batches)
    inputs = np.concatenate([x.numpy().reshape(-1, 5) for x in batches])
    expected = np.abs(model.weight.detach().numpy()) * np.linalg.norm(inputs, axis=0)
    assert np.allclose(found["weight"].numpy(), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "same", 1), (2, 1, 1), (1, 2, 2), (3, 0, 1)])
def test_convolution_by_unfolding(groups: int, mode: str, stride: int, padding: int | str, dilation: int) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(
        4, 8, 3, stride, padding, dilation, groups, padding_mode=mode, bias=False
    ).double()  # fmt: skip
    x = torch.randn(2, 4, 7, 6).double()
    wide = 1 if padding == "same" else int(padding)
    padded = F.pad(x, [wide] * 4, mode="constant" if mode == "zeros" else mode)
    columns = F.unfold(padded, 3, dilation=dilation, stride=stride).square().sum((0, 2)).reshape(4, 3, 3)
    per_group = columns.reshape(groups, 4 // groups, 3, 3).sqrt()
    expected = torch.cat([model.weight[i : i + 1].abs() * per_group[i * groups // 8] for i in range(8)])
    found, context = scores(model, x)
    assert torch.allclose(found["weight"], expected)
    assert not context.record.skipped


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dims](2, 3, 2).double()
    x = torch.randn(2, 2, *[4] * dims).double()
    squares = input_squares(layer, x)
    corner = x[(slice(None), slice(None), *[slice(0, 3)] * dims)]  # what kernel position 0 meets
    assert torch.allclose(squares[(0, slice(None), *[0] * dims)], corner.square().sum(dim=(0, *range(2, 2 + dims))))


def test_transposed_and_embedding() -> None:
    layer = nn.ConvTranspose2d(2, 6, 3, groups=2).double()
    x = torch.randn(2, 2, 4, 4).double()
    found, _ = scores(layer, x)
    assert torch.allclose(found["weight"][1], layer.weight[1].abs() * x[:, 1].norm())
    words = torch.tensor([[0, 2, 2], [2, 0, 3]])
    embedding = nn.Embedding(5, 4)
    found, _ = scores(embedding, words)
    times = torch.tensor([2.0, 0, 3, 1, 0]).sqrt().unsqueeze(1)
    assert torch.allclose(found["weight"], embedding.weight.abs() * times)


def test_kernel() -> None:
    assert wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([4.0, 9.0])).tolist() == [[4, 3]]


@pytest.mark.parametrize("name", ["recurrent", "attention"])
def test_unseen_inputs_rank_by_magnitude_and_that_is_said(name: str) -> None:
    example = next(e for e in EXAMPLES if e.name == name)
    model, context = example.build(), Context(task=example.task())
    found = Wanda().scores(model, select(model, ("*",)), context)
    unseen = [entry["name"] for entry in context.record.skipped]
    assert len(unseen) == 2
    weights = effective(model)
    seen = [(found[name] / weights[name].abs()).double().square().mean() for name in found if name not in unseen]
    norm = torch.stack(seen).mean().sqrt().to(found[unseen[0]].dtype)
    for name in unseen:
        assert torch.allclose(found[name], weights[name].abs() * norm), "as if its inputs were average ones"


def test_unseen_inputs_do_not_go_first_under_scope_global() -> None:
    """Weights of one size behind inputs of one size: what a hook cannot see is worth as much as what it can."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(6, 6, bias=False), nn.Parameter(torch.empty(6, 6))
            for weight in self.parameters():
                nn.init.uniform_(weight, -1, 1, generator=torch.Generator().manual_seed(weight.ndim))

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(x) + x @ self.hidden

    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(400) % 6)]
    pruned = effective(Prune(criterion=Wanda(), scope=Global(), sparsity=0.5)(Twice(), Context(task=Task(train=data))))
    gone = {name: float((weight == 0).double().mean()) for name, weight in pruned.items()}
    assert all(0.4 < share < 0.6 for share in gone.values()), gone
    assert typical([torch.tensor([1.0, 3.0]), torch.tensor([[6.0]])]) == 4
    assert typical([]) == typical([torch.zeros(3)]) == 1


def test_scale_of_the_inputs_does_not_change_the_ranking_and_scale_of_one_does() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(8, 6)
    one, other = scores(model, x)[0]["weight"], scores(model, 10 * x)[0]["weight"]
    assert torch.equal(one.argsort(1), other.argsort(1))
    x[:, 2] = 0
    silent = scores(model, x)[0]["weight"]
    assert not silent[:, 2].any(), "a weight that meets nothing goes first"


def test_keeps_more_of_a_trained_net_than_magnitude_where_inputs_differ() -> None:
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    model = Finetune(epochs=4, lr=0.1)(model, context)
    kept = {
        criterion.id: context.measure(
            Prune(criterion=criterion, scope=Row(), layers=("1",), sparsity=0.7)(model, context)
        ).value
        for criterion in (Wanda(), Magnitude())
    }
    assert kept["wanda"] > kept["magnitude"], kept
