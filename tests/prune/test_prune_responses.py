"""What output units answer: where it is looked at, its gradients, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError, NumericError
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.prune import MeanWeight, Scale
from espalier.prune.responses import averages, stream, unit_rows
from espalier.testing import EXAMPLES, fingerprint
from espalier.train.looking import Against, samples

Told = dict[str, list[tuple[Tensor, Tensor | None]]]


def build(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return nn.Sequential(*layers).double()


def batch_of(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.arange(shape[0]) % 3


def told(model: nn.Module, batch: Any, against: Against | None = None, **options: Any) -> tuple[Told, Context]:
    context = Context(task=Task(train=[batch], val=[batch], **options))
    found: Told = {}

    def each(name: str, activation: Tensor, gradient: Tensor | None) -> None:
        found.setdefault(name, []).append((activation, gradient))

    stream(model, select(model, ("*",)), context, each, count=1, label="responses", against=against)
    return found, context


class Residual(nn.Module):
    """A batch norm that an addition in place overwrites, and one whose ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.norm(self.first(x)))
        z = self.other(self.second(y))
        z += y
        return self.head(self.relu(z).mean((2, 3)))


def test_looked_at_after_norm_and_activation_but_not_beyond_a_fork() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    for norm in (model.norm, model.other):
        nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    x, _ = batch = batch_of(5, 1, 6, 6)
    found, _ = told(model, batch, "loss")
    first = F.relu(model.norm(model.first(x)))
    assert torch.allclose(found["first.weight"][0][0], first)
    assert torch.allclose(found["second.weight"][0][0], model.other(model.second(first))), "before the addition"
    assert found["head.weight"][0][0].shape == (5, 3)
    plain, _ = told(model, batch)
    for name, values in found.items():
        assert torch.equal(values[0][0], plain[name][0][0]), "asking for gradients changes no activation"
        assert plain[name][0][1] is None


@pytest.mark.parametrize("against", ["loss", "output", "top"])
def test_gradients_are_those_of_the_scalar(against: Against) -> None:
    first, last = nn.Linear(6, 5), nn.Linear(5, 3)
    model = build(first, nn.Tanh(), last)
    x, y = batch_of(7, 6)
    found, _ = told(model.requires_grad_(requires_grad=False), (x, y), against)
    hidden = torch.tanh(first(x)).requires_grad_()
    logits = last(hidden)
    value = {
        "loss": F.cross_entropy(logits, y),
        "output": (logits**2).sum() / 14,
        "top": logits.amax(1).sum() / 7,
    }[against]
    (expected,) = torch.autograd.grad(value, hidden)
    activation, gradient = found["0.weight"][0]
    assert torch.allclose(activation, hidden)
    assert gradient is not None
    assert torch.allclose(gradient, expected, atol=1e-14)


def test_shapes_are_batch_units_positions() -> None:
    tokens = build(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    found, _ = told(tokens, (batch_of(2, 4, 6)[0],), "output")
    assert [tuple(t.shape) for t in found["0.weight"][0] if t is not None] == [(2, 5, 4)] * 2
    conv = build(nn.ConvTranspose2d(2, 6, 3, groups=2), nn.ReLU())
    found, context = told(conv, (batch_of(2, 2, 4, 4)[0],))
    assert found["0.weight"][0][0].shape == (2, 6, 6, 6)
    assert not context.record.skipped


def test_a_layer_that_runs_twice_answers_twice() -> None:
    example = next(e for e in EXAMPLES if e.name == "twice")
    found, _ = told(example.build(), example.task().train[0], "loss")  # type: ignore[index]
    assert [len(values) for values in found.values()] == [2, 1]


def test_what_cannot_be_seen_is_skipped_with_a_reason() -> None:
    for name, hidden in (("recurrent", 2), ("attention", 2), ("tied", 0), ("hooked", 0)):
        example = next(e for e in EXAMPLES if e.name == name)
        model, task = example.build(), example.task()
        context = Context(task=task)
        for _ in range(2):
            stream(model, select(model, ("*",)), context, lambda *_: None, count=1, label="", against="loss")
        assert len(context.record.skipped) == hidden
        assert all("not visible" in entry["reason"] for entry in context.record.skipped)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_the_model_is_as_it_was(example: Any) -> None:
    model, task = example.build(), example.task()
    before = fingerprint(model)
    averages(model, select(model, ("*",)), Context(task=task), lambda a, g: a * g, count=2, label="", against="loss")
    after = fingerprint(model)
    assert {key: str(value) for key, value in after.items()} == {key: str(value) for key, value in before.items()}


def test_averages_weigh_every_sample_once() -> None:
    model = build(nn.Linear(6, 4))
    x, y = batch_of(9, 6)
    context = Context(task=Task(train=[(x[:7], y[:7]), (x[7:], y[7:])]))
    found = averages(model, select(model, ("*",)), context, lambda a, _: a, count=5, label="", wide=True)
    assert torch.allclose(found["0.weight"], model(x).mean(0))


def test_rows_of_a_transposed_convolution_are_its_outputs() -> None:
    model = nn.ConvTranspose2d(4, 6, 2, groups=2)
    rows = unit_rows(next(iter(select(model, ("*",)))))
    assert rows.shape == (6, 8)
    assert torch.equal(rows[4], model.weight[2:, 1].reshape(-1)), "output 4 is the second of group 1"


def test_the_rows_of_an_embedding_are_no_units_to_the_mean_weight() -> None:
    words = torch.tensor([[0, 2], [3, 1]])
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    for side in ("in", "out", "both"):
        context = Context(task=Task(train=[(words,)]))
        found = [MeanWeight(side=side).scores(model, select(model, ("*",)), context) for _ in range(2)]
        assert all("0.weight" not in scores for scores in found)
        assert [e["name"] for e in context.record.skipped if "looked up" in e["reason"]] == ["0.weight"], "said once"


def test_the_scale_of_a_batch_norm_says_once_what_it_skips() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    model.append(nn.Linear(3, 2))
    context = Context(task=Task(train=[(torch.rand(6, 4),)]))
    for _ in range(3):
        assert list(Scale().scores(model, select(model, ("*",)), context)) == ["0.weight"]
    assert [entry["name"] for entry in context.record.skipped] == ["2.weight", "4.weight"]


def test_errors_say_what_to_do() -> None:
    model = build(nn.Linear(6, 3))
    with pytest.raises(DataError, match="holds no batch"):
        stream(model, select(model, ("*",)), Context(task=Task(train=[])), lambda *_: None, count=1, label="")
    with pytest.raises(ModelError, match="cuts the graph"):
        told(model, batch_of(4, 6), "loss", predict=lambda m, b: m(b[0]).detach())
    with pytest.raises(NumericError, match=r"0\.weight holds NaN"):
        told(model, batch_of(4, 6), "loss", loss=lambda output, _: output.sum() * float("nan"))
    with pytest.raises(DataError, match=r"got \[3, 4\]"):
        list(samples((torch.zeros(3, 2), torch.zeros(4))))
