"""Tasks and metrics: any batch, any model, and what unusable data is told."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from espalier.core.errors import DataError, ModelError, NeedError, NumericError, UsageError
from espalier.core.metric import Accuracy, Agreement, Loss, Metric, Score, first_tensor
from espalier.core.task import Task, capture_call, classification, default_predict, default_target, to_device
from espalier.testing import EXAMPLES, fingerprint

BY_NAME = {example.name: example for example in EXAMPLES}
Pair = namedtuple("Pair", ["x", "y"])


class Returns(Metric):
    name = "odd"

    def __init__(self, value: Any) -> None:
        self.value = value

    def per_sample(self, output: Any, target: Any) -> Tensor:
        return self.value


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 6, generator=generator), torch.arange(n) % 3) for n in (8, 5)]


# --- metrics -----------------------------------------------------------------------------------------------------


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), cut=st.integers(0, 30))
@settings(deadline=None)
def test_mean_and_standard_error_over_batches(values: list[float], cut: int) -> None:
    metric = Returns(None)
    running = metric.fresh()
    for part in (values[:cut], values[cut:]):
        metric.value = torch.tensor(part, dtype=torch.float64)
        running.update(None, None)
    score = running.score()
    assert score.count == len(values)
    assert score.value == pytest.approx(np.mean(values), abs=1e-9)
    expected = np.std(values) / math.sqrt(max(1, len(values) - 1))  # = sample deviation / sqrt(n)
    assert score.stderr == pytest.approx(expected, abs=1e-4)


def test_accuracy_is_in_percent() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1]])
    target = torch.tensor([1, 1])
    assert Accuracy().per_sample(logits, target).tolist() == [100, 0]
    assert Accuracy(2).per_sample(logits, target).tolist() == [100, 100]
    assert Accuracy(9).per_sample(logits, target).tolist() == [100, 100]
    assert Accuracy(5).name == "top-5 accuracy"
    dense = torch.zeros(2, 3, 4, 4)
    dense[:, 1, :2] = 1
    assert Accuracy().per_sample(dense, torch.ones(2, 4, 4, dtype=torch.long)).tolist() == [50, 50]


def test_agreement() -> None:
    one, other = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    assert Agreement().per_sample(one, other).tolist() == [100, 0]
    assert Agreement().per_sample({"logits": one}, (other,)).tolist() == [100, 0]
    value = torch.tensor([[2.0], [3.0]])
    assert Agreement().per_sample(value, value).tolist() == [100, 100]
    assert Agreement().per_sample(value * 1.1, value).tolist() == pytest.approx([99, 99])
    assert Agreement().per_sample(-value, value).tolist() == [0, 0]
    assert Agreement().per_sample(value[:, 0], value[:, 0]).tolist() == [100, 100]


def test_loss_as_a_metric() -> None:
    metric = Loss(F.cross_entropy, "cross-entropy")
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert metric.per_sample(logits, target).tolist() == pytest.approx([F.cross_entropy(logits, target).item()] * 4)
    each = Loss(lambda o, t: F.cross_entropy(o, t, reduction="none"))
    assert each.per_sample(logits, target).shape == (4,)
    assert metric.drop(Score(1.0, 0, 1), Score(1.5, 0, 1)) == 0.5
    assert Accuracy().drop(Score(98, 0, 1), Score(97, 0, 1)) == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returned NoneType"),
        (0.9, "returned float"),
        (torch.tensor(0.9), r"tensor of shape \(\)"),
        (torch.ones(2, 2), r"\(2, 2\)"),
    ],
)
def test_a_metric_that_is_not_per_sample_is_told_so(value: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"metric 'odd'.*{words}.*one value per sample"):
        Returns(value).fresh().update(None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_no_score(bad: float) -> None:
    with pytest.raises(NumericError, match="metric 'odd' is NaN or infinite"):
        Returns(torch.tensor([1.0, bad])).fresh().update(None, None)


def test_first_tensor() -> None:
    x = torch.ones(1)
    for value in (x, (x,), [x, None], {"a": x}, {"a": {"b": [x]}}):
        assert first_tensor(value) is x
    with pytest.raises(UsageError, match="holds no tensor"):
        first_tensor({})
    with pytest.raises(UsageError, match="holds no tensor: NoneType"):
        first_tensor(None)


# --- tasks -------------------------------------------------------------------------------------------------------


def test_one_shot_data_is_refused() -> None:
    with pytest.raises(DataError, match="val is a one-shot generator"):
        Task(val=(batch for batch in batches()))
    with pytest.raises(DataError, match="train is a one-shot list_iterator"):
        Task(train=iter(batches()))
    with pytest.raises(DataError, match="test must be an iterable of batches; got int"):
        Task(test=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be an espalier Metric; got function"):
        Task(metric=F.cross_entropy)  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", [[], DataLoader(TensorDataset(torch.ones(0, 6), torch.ones(0)), batch_size=4)])
def test_an_empty_loader_is_told_so(empty: Any) -> None:
    task = Task(val=empty)
    with pytest.raises(DataError, match="no batch"):
        Task(val=empty, metric=Accuracy()).measure(nn.Linear(6, 3), "val")
    with pytest.raises(DataError, match="no batch"):
        task.example()
    assert not task.labelled


def test_what_is_missing_is_named() -> None:
    task = classification(val=batches())
    with pytest.raises(NeedError, match=r"needs train data.*train=loader"):
        task.data("train")
    assert [task.has(need) for need in ("train", "val", "test", "labels", "loss", "nonsense")] == [
        False, True, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_measure_any_model(example: Any) -> None:
    model, task = example.build(), example.task()
    before = fingerprint(model)
    score = task.measure(model, "val")
    assert score.count == 8
    assert 0 <= score.value <= 100
    assert fingerprint(model) == before
    assert task.measure(model, "val") == score
    assert "±" in str(score)


def test_without_labels_the_metric_is_agreement_with_the_original() -> None:
    mlp = BY_NAME["mlp"]
    model, other = mlp.build(), mlp.build()
    with torch.no_grad():
        other[3].weight.mul_(-1)
    task = Task(val=[x for x, _ in batches()])
    assert not task.labelled
    assert isinstance(task.scorer(), Agreement)
    assert task.measure(model, "val", model).value == 100
    assert task.measure(other, "val", model).value < 100
    with pytest.raises(NeedError, match="agreement with the original model"):
        task.measure(model, "val")
    output = model.eval()(batches()[0][0])
    assert task.training_loss(output, batches()[0][0], output).item() == 0
    with pytest.raises(NeedError, match="training without labels"):
        task.training_loss(output, batches()[0][0])


def test_training_loss() -> None:
    x, y = batches()[0]
    output = nn.Linear(6, 3)(x)
    assert Task().training_loss(output, (x, y)) == F.cross_entropy(output, y)
    assert Task(loss=lambda o, t: o.sum() + t.sum()).training_loss(output, (x, y)) == output.sum() + y.sum()


def test_batches_of_every_kind() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return a if b is None else a + b

    one, two, y = torch.ones(2), torch.full((2,), 2.0), torch.zeros(2)
    model = Sum()
    for batch, expected, target in (
        (one, one, None),
        ((one, y), one, y),
        ([one, two, y], one + two, y),
        ((one,), one, None),
        ({"a": one, "b": two, "labels": y}, one + two, y),
        ({"a": one, "target": y}, one, y),
        ({"a": one}, one, None),
        (Pair(one, y), one, y),
    ):
        assert torch.equal(default_predict(model, batch), expected)
        assert default_target(batch) is target


def test_to_device_keeps_the_containers() -> None:
    batch = {"x": [torch.ones(2), Pair(torch.ones(1), "name")], "n": 3}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == "meta"
    assert isinstance(moved["x"][1], Pair)
    assert moved["x"][1].y == "name"
    assert moved["n"] == 3


def test_capture_call_shows_how_the_model_is_called() -> None:
    named = BY_NAME["named"]
    model, task = named.build(), named.task()
    before = fingerprint(model)
    args, kwargs = capture_call(task, model, task.example())
    assert args == ()
    assert set(kwargs) == {"x", "scale"}
    assert fingerprint(model) == before
    with pytest.raises(UsageError, match="did not call the model"):
        capture_call(Task(predict=lambda m, b: b), model, task.example())


def test_measure_does_not_keep_the_model_in_eval_when_the_data_fails() -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield batches()[0]
            raise OSError("disk gone")

    model = BY_NAME["mlp"].build()
    before = fingerprint(model)
    with pytest.raises(OSError, match="disk gone"):
        classification(val=Failing()).measure(model, "val")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("output", "target", "error", "words"),
    [
        (torch.zeros(4, 5, 7), torch.zeros(4, 5), ModelError, r"\(4, 5, 7\) and labels \(4, 5\).*movedim\(-1, 1\)"),
        (torch.zeros(4, 5, 6, 7), torch.zeros(4, 5, 6), ModelError, r"movedim\(-1, 1\)"),
        (torch.zeros(4, 7), torch.zeros(4, 7), DataError, r"\(4, 7\) and labels \(4, 7\).*class indices"),
        (torch.zeros(4, 7), torch.zeros(4, 1), DataError, r"labels \(4, 1\)"),
        (torch.zeros(4, 7), torch.zeros(3), DataError, r"labels \(3,\)"),
        (torch.zeros(4), torch.zeros(4), ModelError, r"gave a tensor of shape \(4,\)"),
        ({"logits": torch.zeros(4, 7)}, torch.zeros(4), ModelError, "gave dict.*predict"),
        (torch.zeros(4, 7), [0, 1, 2, 3], DataError, "came as list"),
    ],
)
def test_accuracy_says_which_shapes_it_takes(output: Any, target: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        Accuracy().per_sample(output, target)
    text = str(caught.value)
    assert "(n, classes, ...)" in text
    assert "Task(metric=espalier.tasks.Loss(function))" in text


def test_a_language_model_is_told_where_its_classes_belong() -> None:
    tokens = torch.arange(20).reshape(4, 5) % 7
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7))
    with pytest.raises(ModelError, match="The classes stand last"):
        classification(val=[(tokens, tokens)]).measure(model, "val")
    with pytest.raises(ModelError, match=r"cross-entropy loss needs.*The classes stand last"):
        Task().training_loss(model(tokens), (tokens, tokens))
    moved = Task(val=[(tokens, tokens)], predict=lambda model, batch: model(*batch[:-1]).movedim(-1, 1))
    assert moved.measure(model, "val").count == 4
    assert moved.training_loss(moved.predict(model, (tokens, tokens)), (tokens, tokens)).ndim == 0


def test_class_probabilities_train() -> None:
    output, target = torch.randn(4, 3), torch.full((4, 3), 1 / 3)
    assert classification().training_loss(output, (output, target)) == F.cross_entropy(output, target)
