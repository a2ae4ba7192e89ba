"""Pruning before training: SNIP, GraSP and SynFlow by hand, the terms of a loss, digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.sparse_training import accuracy, cnn, digits, mlp, trained, zeros
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NeedError, PhaseError, UsageError
from espalier.core.model import copy_model
from espalier.core.parametrize import slots
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.prune import CompositeLoss, Grasp, LossPrune, Prune, Snip, SynFlow, redundant_terms
from espalier.prune.connections import lowest_removed
from espalier.prune.loss_prune import initialise
from espalier.prune.loss_terms import explained, judge


def problem() -> tuple[nn.Sequential, Context, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        data = [(torch.randn(8, 5).double(), torch.arange(8) % 3) for _ in range(2)]
    return model, Context(task=Task(train=data, loss=F.cross_entropy)), data


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean()


def highest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` highest over all tensors."""
    bound = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[count - 1]
    return [score >= bound for score in scores]


def test_snip_by_hand() -> None:
    model, context, data = problem()
    weights = [model[0].weight, model[2].weight]
    grads = torch.autograd.grad(mean_loss(model, data), weights)
    expected = highest([(w * g).abs().detach() for w, g in zip(weights, grads, strict=True)], 16)
    found = Snip(batches=2).kept(model, select(model, ("*",)), 0.5, context)
    for mask, name in zip(expected, ("0.weight", "2.weight"), strict=True):
        assert torch.equal(found[name], mask)


def test_grasp_by_hand_with_the_whole_hessian() -> None:
    model, context, data = problem()
    weights = [model[0].weight.detach(), model[2].weight.detach()]
    flat = torch.cat([w.flatten() for w in weights])

    def loss(vector: Tensor) -> Tensor:
        first, second = vector[:20].view(4, 5), vector[20:].view(3, 4)
        outs = [((x @ first.T + model[0].bias).tanh() @ second.T + model[2].bias, y) for x, y in data]
        return torch.stack([F.cross_entropy(out, y) for out, y in outs]).mean()

    gradient = torch.autograd.functional.jacobian(loss, flat)
    product = torch.autograd.functional.hessian(loss, flat) @ gradient
    removed_last = (flat * product).detach()  # -S: the largest S = -w H g go
    found = Grasp(batches=2).products(model, select(model, ("*",)), context)
    assert torch.allclose(torch.cat([p.flatten() for p in found.values()]), product, atol=1e-12)
    kept = Grasp(batches=2).kept(model, select(model, ("*",)), 0.5, context)
    stays = highest([removed_last[:20], removed_last[20:]], 16)
    assert torch.equal(torch.cat([m.flatten() for m in kept.values()]), torch.cat(stays))


def test_synflow_by_matrix_products() -> None:
    """R = 1^T |W2| |W1| 1 without biases: the score of a weight is itself times what comes in times what goes out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False))
    a, b = (layer.weight.detach().double().abs().numpy() for layer in (model[0], model[2]))
    ma, mb = np.ones_like(a), np.ones_like(b)
    sparsity, rounds = 0.8, 10
    for k in range(1, rounds + 1):
        pa, pb = a * ma, b * mb
        sa, sb = pa * pb.sum(0)[:, None], pb * pa.sum(1)[None, :]
        scores = np.concatenate([np.where(ma > 0, sa, -1).ravel(), np.where(mb > 0, sb, -1).ravel()])
        gone = int((1 - (1 - sparsity) ** (k / rounds)) * 50 + 1e-9)
        keep = np.ones(50)
        keep[np.argsort(scores, kind="stable")[:gone]] = 0
        ma, mb = keep[:30].reshape(5, 6), keep[30:].reshape(4, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = Task(train=[(torch.randn(3, 6), torch.zeros(3).long())])
    found = SynFlow(rounds=rounds).kept(model, select(model, ("*",)), sparsity, Context(task=task))
    assert np.array_equal(found["0.weight"].numpy(), ma > 0)
    assert np.array_equal(found["2.weight"].numpy(), mb > 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(seed=st.integers(0, 50), low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_masks_nest_and_no_layer_goes_whole(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(4, 5, generator=generator), "b": 100 + torch.rand(3, 4, generator=generator)}
    less, more = (lowest_removed(scores, s) for s in sorted((low, high)))
    for name in scores:
        assert bool((less[name] | ~more[name]).all())
        assert bool(more[name].any())


@pytest.mark.parametrize("connections", [Snip(), Grasp(), SynFlow(rounds=3)])
def test_scoring_leaves_the_model_alone(connections) -> None:
    model = cnn()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    connections.kept(model, select(model, ("*",)), 0.5, Context(task=digits()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Normed(nn.Sequential):
    """Notes, in its forward, whether its batch norm is in training mode."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self[1].training, self[0].training))
        return super().forward(x)


@pytest.mark.parametrize("method", ["snip", "grasp", "terms"])
def test_scoring_normalises_by_the_batch_as_training_does(method: str) -> None:
    model = Normed().double().eval()
    _, context, data = problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = select(model, ("*",))
    if method == "terms":
        redundant_terms(model, COMPOSITE, context, selection=chosen, count=2)
    else:
        (Snip if method == "snip" else Grasp)(batches=2).kept(model, chosen, 0.5, context)
    assert set(model.seen) == {(True, False)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    if method == "snip":
        grads = torch.autograd.grad(mean_loss(model.train(), data), [model[0].weight, model[3].weight])
        scores = [(w * g).abs().detach() for w, g in zip((model[0].weight, model[3].weight), grads, strict=True)]
        found = Snip(batches=2).kept(model, chosen, 0.5, context)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), highest(scores, 16), strict=True))


def test_starts_afresh_and_says_so() -> None:
    context = Context(task=digits())
    model = context.perform(LossPrune(epochs=0, sparsity=0.5), copy_model(trained("mlp")))
    assert "what the model had learned there is gone" in context.record.notes[0]
    assert accuracy(model) < 40
    again = Context(task=digits()).perform(LossPrune(epochs=0, sparsity=0.5), mlp(seed=7))
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), "what the weights were before plays no part"
    frozen = mlp()
    frozen[1].requires_grad_(requires_grad=False)
    before = frozen[1].weight.clone()
    done, left = initialise(frozen, Context())
    assert (done, left) == (["3", "5"], ["1"])
    assert torch.equal(frozen[1].weight, before)


@pytest.mark.parametrize("connections", [Snip(), Grasp(), SynFlow()])
def test_digits_beat_random_connections(connections) -> None:
    context = Context(task=digits())
    method = LossPrune(epochs=8, lr=3e-3, sparsity=0.9, connections=connections)
    result = method(mlp(), context)
    assert zeros(result) == pytest.approx(0.9, abs=2e-3)

    class _Random(Snip):
        def kept(self, model, selection, sparsity, context):
            generator = context.generator("random")
            scores = {slot.name: torch.rand(slot.shape, generator=generator) for slot in selection}
            return lowest_removed(scores, sparsity)

    other = method.replace(connections=_Random())(mlp(), Context(task=digits()))
    assert accuracy(result) > accuracy(other) + 5


# --- the terms of a loss -------------------------------------------------------------------------


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.softmax(1) - F.one_hot(target, output.shape[1])).square().sum(1).mean()


def small(output: Tensor, target: Tensor) -> Tensor:
    return output.square().mean()


COMPOSITE = CompositeLoss({"ce": (1.0, F.cross_entropy), "twin": (0.5, F.cross_entropy), "small": (0.1, small)})


def test_terms_by_hand() -> None:
    model, context, data = problem()
    found = redundant_terms(model, COMPOSITE, context, count=2)
    rows = []
    for factor, term in COMPOSITE.terms.values():
        parts = [torch.autograd.grad(factor * term(model(x), y), [model[0].weight, model[2].weight]) for x, y in data]
        rows.append(torch.cat([g.flatten() for pair in parts for g in pair]))
    g = torch.stack(rows)
    norms = g.norm(dim=1)
    assert torch.allclose(found.cosine, g @ g.T / norms[:, None] / norms)
    assert list(found.contribution.values()) == pytest.approx((norms / norms.sum()).tolist())
    assert found.explained["ce"] == pytest.approx(1)
    assert found.explained["small"] == pytest.approx(max(0.0, float(found.cosine[2, 0])))
    assert found.redundant == ("twin",), "the smaller of the twins goes, and only one of them"


@given(seed=st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_explained_is_the_best_of_many_combinations(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(4, 6, generator=generator).double()
    found = explained(g @ g.T, 0, [1, 2, 3])
    tried = torch.rand(4000, 3, generator=generator).double() ** 3 @ g[1:]
    cosines = tried @ g[0] / tried.norm(dim=1) / g[0].norm()
    assert found >= min(float(cosines.max()), 1) - 1e-9 or found == 0
    assert found <= float(cosines.max().clamp_min(0)) + 0.05


def test_combination_of_two_is_dropped() -> None:
    g = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.3, 0.3, 0], [0, 0, 0]]).double()
    verdict = judge(("a", "b", "both", "nothing"), g @ g.T, 0.99)
    assert set(verdict.redundant) == {"both", "nothing"}
    assert judge(("a",), torch.ones(1, 1).double(), 0.5).redundant == ()
    assert judge(("a", "minus"), torch.tensor([[1.0, -1], [-1, 1]]).double(), 0.9).redundant == ()


def test_loss_loses_its_redundant_terms() -> None:
    splits = digits()
    task = Task(train=splits.train, val=splits.val, loss=COMPOSITE, metric=splits.metric)
    context = Context(task=task)
    result = context.perform(LossPrune(epochs=1, lr=3e-3, sparsity=0.3, terms=0.95), mlp())
    assert context.record.details["loss terms"]["dropped"] == ["twin"]
    assert context.task is task
    alone = Task(train=splits.train, val=splits.val, loss=COMPOSITE.without(("twin",)), metric=splits.metric)
    same = Context(task=alone).perform(LossPrune(epochs=1, lr=3e-3, sparsity=0.3), mlp())
    for one, other in zip(result.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_refusals() -> None:
    with pytest.raises(NeedError, match="CompositeLoss"):
        LossPrune(epochs=1, terms=0.9)(mlp(), Context(task=digits()))
    with pytest.raises(UsageError, match="at least one term"):
        CompositeLoss({})
    pruned = Prune(sparsity=0.5)(mlp(), Context(task=digits()))
    with pytest.raises(PhaseError, match="densify"):
        LossPrune(epochs=1)(pruned, Context(task=digits()))
    fresh = LossPrune(epochs=0, sparsity=0.0, densify=True)(pruned, Context(task=digits()))
    assert all(slot.form is None for slot in slots(fresh).values())
