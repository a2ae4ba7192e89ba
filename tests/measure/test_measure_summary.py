from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from espalier import measure as room
from espalier.core.errors import NeedError, UsageError
from espalier.core.task import Task, classification
from espalier.measure import Measurement, compare, measure, measure_all
from espalier.measure.summary import sized_call


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(10, 6, generator=generator), torch.arange(10) % 3) for _ in range(3)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


def test_everything_is_measured_and_plain(data, model) -> None:
    with torch.no_grad():
        model[0].weight[:4] = 0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = measure(model, classification(val=data), file_bytes=1234, macs=lambda m: 72, batch=32, seconds=0.05)
    assert (found.parameters, found.nonzero) == (83, 83 - 24)
    assert (found.file_bytes, found.macs) == (1234, 72)
    assert (found.latency.batch, found.throughput.batch, found.latency.threads) == (1, 32, 1)
    assert found.latency.p10_ms <= found.latency.median_ms <= found.latency.p90_ms
    # 32x6 input, 32x8 twice around the ReLU; dropout is the identity in eval mode
    assert found.peak_memory.to_json() == {
        "weights": 332,
        "activations": 4 * 32 * (6 + 8 + 8),
        "bytes": 332 + 2816,
        "batch": 32,
    }
    score = classification(val=data).measure(model, "val")
    assert (found.metric["value"], found.metric["stderr"], found.metric["count"]) == (score.value, score.stderr, 30)
    assert (found.metric["name"], found.metric["unit"], found.metric["split"]) == ("accuracy", "%", "val")
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_was_not_measured_is_absent() -> None:
    assert Measurement(parameters=3, nonzero=2).to_json() == {"parameters": 3, "nonzero": 2}


def test_models_side_by_side(data, model) -> None:
    other = nn.Linear(6, 3)
    found = measure_all(
        {"original": model, "compressed": other},
        classification(test=data), split="test", seconds=0.05, repeats=3, file_bytes={"compressed": 9},
        macs={"original": 72, "compressed": lambda m: m.in_features * m.out_features},
    )  # fmt: skip
    assert [found[name].macs for name in found] == [72, 18]
    assert found["original"].file_bytes is None
    assert found["compressed"].latency.runs == 3
    assert {row.key for row in compare(found["original"], found["compressed"])} >= {"file_bytes", "metric", "latency"}


def test_time_and_metric_can_be_left_out(data, model) -> None:
    found = measure(model, classification(val=data), split=None, seconds=0)
    assert (found.latency, found.throughput, found.metric) == (None, None, None)


def test_unlabelled_tasks_follow_the_original(data, model) -> None:
    task = Task(val=[x for x, _ in data])
    with pytest.raises(NeedError, match="agreement"):
        measure(model, task, seconds=0)
    found = measure(model, task, original=model, seconds=0)
    assert (found.metric["name"], found.metric["value"]) == ("agreement", 100)


class TwoInputs(nn.Module):
    def forward(self, a, b, *, table=None):
        return a.sum(1) + b["x"].sum(1) + (0 if table is None else table.sum())


def test_calls_are_resized_along_the_batch_only() -> None:
    batch = (torch.arange(10.0).reshape(5, 2), {"x": torch.zeros(5, 3)}, torch.zeros(7), None)
    task = Task(val=[batch], predict=lambda m, b: m(b[0], b[1], table=b[2]))
    for size in (1, 5, 12):
        (a, b), kwargs = sized_call(task, TwoInputs(), batch, size)
        assert (a.shape, b["x"].shape, kwargs["table"].shape) == ((size, 2), (size, 3), (7,))
        assert torch.equal(a, batch[0].repeat(3, 1)[:size])


def test_a_call_without_a_batch_is_refused() -> None:
    task = Task(val=[3], predict=lambda m, b: m(b))
    with pytest.raises(UsageError, match="first axis"):
        sized_call(task, nn.Identity(), 3, 4)


def test_every_public_name_resolves() -> None:
    assert all(getattr(room, name) is not None for name in room.__all__)
    assert not callable(getattr(room, "nothing", None))
    with pytest.raises(AttributeError, match="it offers"):
        _ = room.nothing
