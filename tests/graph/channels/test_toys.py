"""Every operator pattern: what is found, and that removing it leaves exactly the masked network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.graph.channels.toys import TOYS, Toy
from torch import Tensor, nn
from torch.utils import _pytree

from espalier.core.plan import Plan, applied
from espalier.graph.channels import ChannelGroups
from espalier.graph.channels.rules import RULES
from espalier.graph.channels.surgery import groups_of, remove
from espalier.graph.operators import TABLE

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")
WIDE = [toy for toy in TOYS if toy.expected]


def some(found: ChannelGroups, seed: int, share: float) -> dict[str, NDArray[np.bool_]]:
    """Random units of every group; one at least stays."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for group in found.groups:
        mask = np.zeros(group.size, dtype=np.bool_)
        mask[rng.permutation(group.size)[: min(group.size - 1, max(1, round(share * group.size)))]] = True
        chosen[group.name] = mask
    return chosen


def outputs(model: nn.Module, call: tuple[Any, ...]) -> list[Tensor]:
    """Tensors of the result, without gradients."""
    with torch.no_grad():
        return [leaf for leaf in _pytree.tree_leaves(model(*call)) if isinstance(leaf, Tensor)]


def batch_of(call: tuple[Any, ...], size: int) -> Any:
    """The call at another batch size."""
    return _pytree.tree_map_only(Tensor, lambda x: x[torch.arange(size) % len(x)], call)


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_what_is_found(toy: Toy) -> None:
    found = groups_of(toy.build(), toy.call)
    assert tuple(sorted((group.kind, group.size) for group in found.groups)) == toy.expected
    assert len(found.boundaries) == toy.boundaries


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("toy", WIDE, ids=lambda toy: toy.name)
def test_removal_equals_the_masked_network(toy: Toy, share: float) -> None:
    model = toy.build()
    found = groups_of(model, toy.call)
    before = sum(p.numel() for p in model.parameters())
    shapes = [y.shape for y in outputs(model, toy.call)]
    for seed in range(2):
        done = remove(copy.deepcopy(model), found, some(found, seed, share), toy.call)
        assert done.difference < 1e-5
        assert sum(p.numel() for p in done.model.parameters()) < before
        assert [y.shape for y in outputs(done.model, toy.call)] == shapes
        for size in (1, 7):
            assert all(len(y) == size for y in outputs(done.model, batch_of(toy.call, size)))


@pytest.mark.parametrize("toy", WIDE, ids=lambda toy: toy.name)
def test_the_plan_replays_on_a_fresh_network(toy: Toy) -> None:
    found = groups_of(toy.build(), toy.call)
    done = remove(toy.build(), found, some(found, 1, 0.5), toy.call)
    plan = Plan.from_json(done.plan.to_json())
    again = plan.apply(toy.build())
    for mine, theirs in zip(outputs(again, toy.call), outputs(done.model, toy.call), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert applied(again).to_json() == done.plan.to_json()


@pytest.mark.parametrize("toy", [toy for toy in WIDE if toy.name != "frozen"], ids=lambda toy: toy.name)
def test_an_optimizer_made_before_goes_on(toy: Toy) -> None:
    model = toy.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step(model, optimizer, toy)
    done = remove(
        model, groups_of(model, toy.call), some(groups_of(model, toy.call), 0, 0.5), toy.call, optimizer=optimizer
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in done.model.parameters()}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    before = {name: p.detach().clone() for name, p in done.model.named_parameters()}
    step(done.model, optimizer, toy)
    moved = [name for name, p in done.model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved
    assert not any(torch.equal(before[name], p) for name, p in done.model.named_parameters() if name in moved)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, toy: Toy) -> None:
    """One training step towards small outputs."""
    optimizer.zero_grad()
    leaves = [leaf for leaf in _pytree.tree_leaves(model(*toy.call)) if isinstance(leaf, Tensor)]
    torch.stack([y.square().mean() for y in leaves]).sum().backward()
    optimizer.step()


def test_zeroing_by_hand_agrees() -> None:
    """The masked reference against a network whose consumers are zeroed by hand."""
    toy = next(toy for toy in TOYS if toy.name == "chain")
    model = toy.build()
    found = groups_of(model, toy.call)
    chosen = some(found, 3, 0.5)
    masked = copy.deepcopy(model)
    for name, layer in (("0", 3), ("3", 5)):
        masked[layer].weight.data[:, torch.from_numpy(chosen[name])] = 0
    done = remove(model, found, chosen, toy.call)
    assert torch.allclose(outputs(done.model, toy.call)[0], outputs(masked, toy.call)[0], atol=1e-6)


def test_ties_survive() -> None:
    toy = next(toy for toy in TOYS if toy.name == "tied_embedding")
    model = toy.build()
    found = groups_of(model, toy.call)
    done = remove(model, found, some(found, 0, 0.5), toy.call)
    assert done.model.e.weight is done.model.head.weight


def test_frozen_stays_frozen_and_no_grad_does_not_matter() -> None:
    toy = next(toy for toy in TOYS if toy.name == "frozen")
    with torch.no_grad():
        model = toy.build()
        found = groups_of(model, toy.call)
        done = remove(model, found, some(found, 0, 0.5), toy.call)
    assert not any(p.requires_grad for p in done.model.parameters())
    assert done.model[0].out_channels == done.model[0].weight.shape[0] < 6


def test_the_reasons_name_what_protects() -> None:
    toy = next(toy for toy in TOYS if toy.name == "chain")
    reasons = {(p.tensor, p.dim): p.reason for p in groups_of(toy.build(), toy.call).protected}
    assert reasons["5.weight", 0] == "it decides the shape of the output"
    assert reasons["0.weight", 1] == "it meets the model's input at conv2d in 0"


def test_the_input_is_named_also_when_it_is_prepared_first() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.rand(8))
            self.scale = nn.Parameter(torch.rand(8))
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = (x - self.mean).flatten(1)
            return self.c(self.a(x) + self.b(self.scale * x))

    found = groups_of(Prepared(), (torch.randn(4, 8),))
    reasons = {(p.tensor, p.dim): p.reason for p in found.protected}
    assert reasons["a.weight", 1] == "it meets the model's input at linear in a"
    assert reasons["scale", 0] == "it meets the model's input at mul"
    assert reasons["b.weight", 1] == "it meets something at linear in b that may not shrink"


def test_every_rule_is_for_an_operator_of_the_table() -> None:
    assert not set(RULES) - set(TABLE)
