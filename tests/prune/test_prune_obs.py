"""OBS: against brute-force least squares, the steps of the paper, and magnitude on a trained network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NeedError, NumericError, UsageError
from espalier.core.selection import select
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.prune import NM, OBS, Global, Prune, Weights
from espalier.prune.obs import as_matrix, damped, eliminate, exact, from_matrix, refit, solvable, sparsegpt
from espalier.testing import effective
from espalier.train import Finetune
from espalier.train.layers import columns

DIGITS = standard("digits")
FORMS = ("exact", "sparsegpt")


def problem(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs (samples, n) that are correlated, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64), x, 2 * x.T @ x


def error(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float((x @ (after - before).T).square().sum())


def test_refit_is_least_squares() -> None:
    w, x, hessian = problem(3, 6, 0)
    stays = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    found = refit(w, hessian, stays)
    for row, mask in enumerate(stays):
        best = torch.linalg.lstsq(x[:, mask], x @ w[row]).solution
        assert torch.allclose(found[row, mask], best, atol=1e-8)
        assert not found[row, ~mask].any()


def test_one_weight_goes_as_in_the_paper() -> None:
    """Hassibi 1993, equation 5: which goes, what the others become, and what it costs."""
    w, x, hessian = problem(1, 5, 1)
    inverse = torch.linalg.inv(hessian)
    saliency = w[0].square() / (2 * inverse.diagonal())
    q = int(saliency.argmin())
    expected = w[0] - w[0, q] / inverse[q, q] * inverse[:, q]
    found, stays = exact(w, hessian, torch.ones_like(w, dtype=torch.bool), 0.2, None, 0)
    assert (~stays).nonzero().tolist() == [[0, q]]
    assert torch.allclose(found[0], expected.index_fill(0, torch.tensor(q), 0), atol=1e-10)
    assert error(x, w, found) == pytest.approx(float(saliency[q]), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_single_and_near_the_best_pair(seed: int) -> None:
    """Brute force over all pairs of a tiny row: greedy elimination comes close, and is exact for one weight."""
    w, x, hessian = problem(1, 6, seed)
    every = torch.ones_like(w, dtype=torch.bool)

    def cost(gone: tuple[int, ...]) -> float:
        stays = every.clone()
        stays[0, list(gone)] = False
        return error(x, w, refit(w, hessian, stays))

    one, _ = exact(w, hessian, every, 1 / 6, None, 0)
    assert error(x, w, one) == pytest.approx(min(cost((i,)) for i in range(6)), rel=1e-6)
    two, _ = exact(w, hessian, every, 2 / 6, None, 0)
    costs = sorted(cost(pair) for pair in itertools.combinations(range(6), 2))
    assert costs[0] * (1 - 1e-9) <= error(x, w, two) <= costs[len(costs) // 3]


def test_steps_equal_solving_at_once() -> None:
    """Elimination's running weights, step by step, are the least-squares solution on what is left."""
    w, _, hessian = problem(1, 5, 3)
    order, saliency = eliminate(w, hessian, torch.ones_like(w, dtype=torch.bool), None, 0)
    assert sorted(order[0].tolist()) == list(range(5))
    total = 0.0
    for step in range(5):
        stays = torch.ones_like(w, dtype=torch.bool)
        stays[0, order[0, : step + 1]] = False
        total += float(saliency[0, step])
        left = refit(w, hessian, stays) - w
        assert 0.5 * float(left @ hessian @ left.T) == pytest.approx(total, rel=1e-6)


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 50), form=st.sampled_from(FORMS), block=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_counts_are_exact_and_what_is_gone_stays_gone(sparsity: float, seed: int, form: str, block: int) -> None:
    w, _, hessian = problem(4, 7, seed)
    kept = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    w = w * kept
    hessian = damped(hessian, 0.01)
    if form == "exact":
        found, stays = exact(w, hessian, kept, sparsity, None, 0)
    else:
        found, stays = sparsegpt(w, hessian, kept, sparsity, None, 0, block)
    assert not (stays & ~kept).any()
    assert not found[~stays].any()
    gone = int((~stays).sum())
    if form == "exact" or block >= 7:
        assert gone == max(int(sparsity * 28 + 1e-9), int((~kept).sum()))
    assert gone >= int(sparsity * 28 + 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_solving_costs_less_than_zeroing(form: str) -> None:
    for seed in range(5):
        w, x, hessian = problem(6, 12, seed)
        every = torch.ones_like(w, dtype=torch.bool)
        args = (w, hessian, every, 0.5, None, 0)
        found, _ = exact(*args) if form == "exact" else sparsegpt(*args, 4)
        zeroed = w.clone()
        zeroed.view(-1)[w.abs().flatten().argsort()[: w.numel() // 2]] = 0
        assert error(x, w, found) < error(x, w, zeroed)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2), bias=False),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(4, 6, 3, padding=2),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_a_layer_is_its_matrix_times_its_columns(module: nn.Module) -> None:
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 7, 5) if isinstance(module, nn.Linear) else torch.randn(2, 4, *[9] * (weight.ndim - 2))
    if isinstance(module, nn.Linear):
        expected = F.linear(x, weight).reshape(-1, 3)
    else:
        module.bias = None
        expected = module(x).flatten(2).transpose(1, 2).flatten(0, 1)
    parts = list(columns(module, x))
    found = torch.cat([p @ m.T for p, m in zip(parts, as_matrix(weight).chunk(len(parts)), strict=True)], dim=1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(from_matrix(as_matrix(weight), weight.shape), weight)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Finetune(epochs=8, lr=3e-3)(model, context())


def context() -> Context:
    return Context(task=classification(DIGITS.train, DIGITS.val))


def first_layer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model[1](model[0](batch[0])) for batch in DIGITS.val])  # type: ignore[index]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [Weights(), NM()], ids=lambda p: p.id)
def test_a_trained_layer_answers_closer_to_itself_than_by_magnitude(
    trained: nn.Module, form: str, pattern: Weights | NM
) -> None:
    solved = Prune(criterion=OBS(form=form), pattern=pattern)(trained, context())
    plain = Prune(pattern=pattern)(trained, context())
    before = first_layer(trained)
    by_obs, by_magnitude = (float((first_layer(model) - before).square().mean()) for model in (solved, plain))
    assert by_obs < 0.5 * by_magnitude
    for weight in effective(solved).values():
        if weight.ndim == 2:
            assert int((weight == 0).sum()) == weight.numel() // 2
            if isinstance(pattern, NM):
                assert ((weight.reshape(len(weight), -1, 4) != 0).sum(-1) == 2).all()
    measured = [float(context().measure(model).value) for model in (solved, plain)]
    assert measured[0] >= measured[1]


def test_convolutions_and_what_cannot_be_solved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)
    )
    model.append(nn.Flatten()).append(nn.Linear(144, 10))
    x = torch.rand(20, 8, 8)
    task = classification([(x, torch.arange(20) % 10)], [(x, torch.arange(20) % 10)])
    pruned = Prune(criterion=OBS(largest=100, batches=1), sparsity=0.4)(model, Context(task=task))
    for name, weight in effective(pruned).items():
        if weight.ndim >= 2:
            assert int((weight == 0).sum()) in range(int(0.4 * weight.numel()) - 1, int(0.4 * weight.numel()) + 1), name
    again = Prune(criterion=OBS(form="sparsegpt"), pattern=NM(n=1, m=2), layers=("3",))(model, Context(task=task))
    weight = effective(again)["3.weight"]
    assert ((weight != 0).sum(1) == 1).all()


class Shuffled:
    """Batches in an order drawn from torch's global generator, as a shuffling loader draws it; notes every pass."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.passes = batches, list[list[int]]()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes.append(torch.randperm(len(self.batches)).tolist())
        return (self.batches[i] for i in self.passes[-1])


@pytest.mark.parametrize("form", FORMS)
def test_same_seed_same_weights_whatever_the_caller_has_drawn(trained: nn.Module, form: str) -> None:
    task, data = classification(DIGITS.train, DIGITS.val), list(DIGITS.train)
    found = []
    for seed in (0, 1):
        loader = Shuffled(data)
        shuffled = Context(task=Task(train=loader, val=DIGITS.val, loss=task.loss, metric=task.metric))
        chosen = select(trained, ("*",))
        method = OBS(form=form, batches=2)
        masks = [torch.ones(slot.shape, dtype=torch.bool) for slot in chosen]
        torch.manual_seed(seed)
        solved = [
            method.solve(trained, slot, mask, 0.5, None, shuffled) for slot, mask in zip(chosen, masks, strict=True)
        ]
        found.append([weight for weight, _ in solved])
        method.scores(trained, chosen, shuffled)
        assert len(loader.passes) == 4
        assert len({tuple(order) for order in loader.passes}) == 1, "every layer sees the same batches"
        state = torch.get_rng_state()
        assert torch.equal(state, torch.Generator().manual_seed(seed).get_state()), "the caller's state is put back"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_come_in_the_order_in_which_the_model_calls_them() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 3), nn.Linear(9, 9), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(input=x))

    model, data = Backwards(), [(torch.rand(20, 5), torch.arange(20) % 3)]
    context = Context(task=classification(data, data))
    chosen = select(model, ("*",))
    assert chosen.names == ("last.weight", "unused.weight", "first.weight")
    found = OBS().order(model, chosen, context)
    assert [slot.name for slot in found] == ["first.weight", "last.weight", "unused.weight"]
    assert set(OBS().scores(model, chosen, context)) == {"first.weight", "last.weight"}, "inputs by keyword count"


@pytest.mark.parametrize("form", FORMS)
def test_without_damping_dead_inputs_go_first_and_dependent_ones_are_refused(form: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(40, 6)
    x[:, 2] = 0
    target = torch.arange(40) % 3
    method = Prune(criterion=OBS(form=form, damping=0.0), sparsity=3 / 18 + 1e-6)
    found = effective(method(model, Context(task=classification([(x, target)], [(x, target)]))))["weight"]
    assert not found[:, 2].any()
    assert torch.allclose(found[:, [0, 1, 3, 4, 5]], model.weight[:, [0, 1, 3, 4, 5]], atol=1e-5)
    x[:, 2] = x[:, 0] + x[:, 1]
    with pytest.raises(NumericError, match=r"combinations of others.*damping=0 .*a larger damping"):
        method(model, Context(task=classification([(x, target)], [(x, target)])))
    assert not solvable(torch.ones(3, 3).double())
    assert solvable(damped(torch.ones(3, 3).double(), 0.01))


def test_conflicts_and_needs() -> None:
    with pytest.raises(UsageError, match="solves layer by layer"):
        Prune(criterion=OBS(), scope=Global())
    with pytest.raises(NeedError, match="training data"):
        Prune(criterion=OBS())(nn.Linear(3, 2))
