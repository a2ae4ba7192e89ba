"""Second derivatives: exact Hessians by brute force, per-sample gradients one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.data import standard
from espalier.prune import Magnitude, OptimalBrainDamage, Prune, Random
from espalier.prune.obd import damage
from espalier.testing import EXAMPLES
from espalier.train import Finetune


def problem(activation: nn.Module) -> tuple[nn.Sequential, Context, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3)).double()
        batch = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    return model, Context(task=Task(train=[batch], val=[batch])), batch


def exact_diagonal(model: nn.Sequential, batch: tuple[Tensor, Tensor], against: str) -> dict[str, Tensor]:
    """Diagonal of the full Hessian, weight by weight."""
    names = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    found = {}
    for name, parameter in names.items():

        def value(weight: Tensor, name: str = name) -> Tensor:
            out = torch.func.functional_call(model, {name: weight}, (batch[0],))
            return F.cross_entropy(out, batch[1]) if against == "loss" else out.square().sum() / 16

        size = parameter.numel()
        full = torch.autograd.functional.hessian(value, parameter.detach())
        found[name] = full.reshape(size, size).diagonal().reshape(parameter.shape)
    return found


@pytest.mark.parametrize("against", ["loss", "output"])
def test_hutchinson_is_the_diagonal_in_expectation(against: str) -> None:
    model, context, batch = problem(nn.Tanh())
    method = OptimalBrainDamage(against=against, probes=4000)
    found = method.diagonal(model, select(model, ("*",)), context)
    for name, exact in exact_diagonal(model, batch, against).items():
        assert (found[name] - exact).abs().max() < 0.06 * max(1.0, float(exact.abs().max())), "4,000 probes, 5 sigma"


@pytest.mark.parametrize("against", ["loss", "output"])
def test_gauss_newton_is_the_diagonal_of_j_h_j(against: str) -> None:
    model, context, (x, y) = problem(nn.Tanh())
    weight = model[0].weight.detach().clone()

    def run(w: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.weight": w}, (x,))

    jacobian = torch.autograd.functional.jacobian(run, weight).reshape(24, 12)
    out = run(weight).detach()
    curved = torch.autograd.functional.hessian(
        lambda o: F.cross_entropy(o, y) if against == "loss" else o.square().sum() / 16, out
    ).reshape(24, 24)
    exact = (jacobian.T @ curved @ jacobian).diagonal().reshape(4, 3)
    method = OptimalBrainDamage(curvature="gauss-newton", against=against, probes=4000)
    found = method.diagonal(model, select(model, ("0",)), context)["0.weight"]
    assert (found - exact).abs().max() < 0.06 * max(1.0, float(exact.max()))
    assert (exact >= 0).all()


def test_fisher_is_the_mean_squared_gradient_of_single_samples() -> None:
    model, context, (x, y) = problem(nn.ReLU())
    expected = torch.zeros_like(model[0].weight)
    for row in range(8):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        expected += torch.autograd.grad(loss, model[0].weight)[0] ** 2 / 8
    found = OptimalBrainDamage(curvature="fisher").diagonal(model, select(model, ("*",)), context)
    assert torch.allclose(found["0.weight"], expected)


def test_a_linear_model_is_exact_with_one_probe_per_row_of_its_hessian() -> None:
    """Half the squared output of one linear layer with orthogonal inputs: H is diagonal, one probe is exact."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    context = Context(task=Task(train=[(x,)]))
    method = OptimalBrainDamage(against="output", probes=1)
    found = method.scores(model, select(model, ("*",)), context)["weight"]
    assert torch.allclose(found, model.weight.detach() ** 2 / 2 * torch.tensor([1.0, 4.0, 9.0]).double() / 3)
    assert damage(torch.tensor([2.0]), torch.tensor([-3.0])).tolist() == [6]


@pytest.mark.parametrize("curvature", ["hutchinson", "gauss-newton", "fisher"])
@pytest.mark.parametrize("name", ["recurrent", "attention", "frozen", "named", "convolution"])
def test_every_kind_of_layer_has_a_second_derivative(curvature: str, name: str) -> None:
    example = next(e for e in EXAMPLES if e.name == name)
    model = example.build()
    chosen = select(model, ("*",))
    found = OptimalBrainDamage(curvature=curvature).scores(model, chosen, Context(task=example.task()))
    assert list(found) == list(chosen.names)
    assert all(bool(score.any()) and bool((score >= 0).all()) for score in found.values())


def test_the_probes_belong_to_the_seed() -> None:
    model, context, _ = problem(nn.Tanh())

    def scores(seed: int) -> Tensor:
        task = Context(task=context.task, seed=seed)
        return OptimalBrainDamage().scores(model, select(model, ("*",)), task)["0.weight"]

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))


def test_digits_keep_more_than_by_chance_and_as_much_as_by_magnitude() -> None:
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    model = Finetune(epochs=4, lr=0.1)(model, context)
    scores = {
        criterion.id: context.measure(Prune(criterion=criterion, sparsity=0.75)(model, context)).value
        for criterion in (OptimalBrainDamage(curvature="gauss-newton"), Magnitude(), Random())
    }
    assert scores["obd"] > scores["random"] + 20
    assert scores["obd"] > scores["magnitude"] - 5, scores
