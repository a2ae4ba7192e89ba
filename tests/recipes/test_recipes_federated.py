"""Federated averaging: the average by hand, messages and their bytes, error feedback, the clients' data, resume."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.conftest import StoredContext
from torch import nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import DataError, UsageError
from espalier.core.record import Record
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.encode import open_file
from espalier.prune import Prune
from espalier.recipes import Federated, updates
from espalier.recipes.clients import Part, Samples, divide
from espalier.recipes.federated import Federation
from espalier.recipes.updates import Sender, coded, largest, learned, packed, unpacked
from espalier.testing import EXAMPLES, effective
from espalier.train import SGD, EarlyStopping


@cache
def digits() -> Task:
    splits = standard("digits", batch_size=32)
    return classification(splits.train, splits.val)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@dataclass
class Noting(Context):
    """Keeps the records of its children."""

    records: list[Record] = field(default_factory=list)

    def child(self, name: str, method: Any) -> Context:
        made = super().child(name, method)
        self.records.append(made.record)
        return made


def rounds_of(method: Federated, task: Task | None = None, model: nn.Module | None = None) -> list[dict[str, Any]]:
    context = Noting(task=task or digits())
    method(model or network(), context)
    found: list[dict[str, Any]] = context.records[0].details["rounds"]
    return found


# --- messages ------------------------------------------------------------------------------------------------------


def some_update(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (20, 30)), ("b", (7,)))}


@given(sparsity=st.floats(0, 0.999), seed=st.integers(0, 20))
@settings(max_examples=30)
def test_as_many_are_sent_as_said_and_they_are_the_largest(sparsity: float, seed: int) -> None:
    update = some_update(seed)
    masks = largest(update, sparsity)
    flat = torch.cat([value.reshape(-1) for value in update.values()]).abs()
    kept = torch.cat([mask.reshape(-1) for mask in masks.values()])
    assert int(kept.sum()) == max(1, 607 - int(sparsity * 607 + 1e-9))
    assert not bool((~kept).any()) or float(flat[kept].min()) >= float(flat[~kept].max())


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    value = torch.tensor([0.5, -1.5, 0.1, 2.0])
    mask = torch.tensor([True, True, False, True])
    expected = np.array([4 / 3, -4 / 3, 0, 4 / 3], dtype=np.float32)
    np.testing.assert_allclose(coded(value, mask, 1).dense(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_more_bits_are_a_grid_with_half_a_step_of_error(bits: int) -> None:
    value = some_update()["a"]
    mask = largest({"a": value}, 0.5)["a"]
    found = torch.from_numpy(coded(value, mask, bits).dense())
    step = float(value.abs().max()) / (2 ** (bits - 1) - 1)
    assert not found[~mask].any()
    assert float((found - value)[mask].abs().max()) <= step / 2 * 1.001


def test_a_message_is_a_file_that_gives_back_what_was_coded() -> None:
    update = some_update()
    data = packed(update, 0.9, 4, whole=("b",))
    arrived = unpacked(data)
    assert torch.equal(arrived["b"], update["b"])
    assert int((arrived["a"] != 0).sum()) <= 60
    with open_file(data) as archive:
        archive.verify()
        assert {name: archive.representation(name).kind for name in archive} == {"a": "affine", "b": "dense"}
    whole = unpacked(packed(update, 0.0, None))
    assert all(torch.equal(whole[name], value) for name, value in update.items())


def test_what_a_message_leaves_out_is_sent_later() -> None:
    sender, sent = Sender(0.9, 1, feedback=True), {name: torch.zeros_like(v) for name, v in some_update().items()}
    asked = {name: torch.zeros_like(value) for name, value in sent.items()}
    for seed in range(5):
        update = some_update(seed)
        message, arrived = sender.send(update)
        for name, value in update.items():
            asked[name] += value
            sent[name] += arrived[name]
            assert torch.equal(arrived[name], unpacked(message)[name])
    for name, value in asked.items():
        torch.testing.assert_close(sent[name] + sender.residual[name], value)
    assert not Sender(0.9, 1).residual


# --- the clients' data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["iid", "shards", "dirichlet"])
def test_every_sample_is_one_clients(split: Any) -> None:
    labels = torch.arange(200) % 10
    parts = divide(labels, 200, 5, split, shards=2, alpha=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(200))
    kinds = [len(labels[rows].unique()) for rows in parts]
    if split == "shards":
        assert all(len(rows) == 40 for rows in parts)
        assert max(kinds) <= 4  # two runs of 20 samples, each of one class here
    if split == "iid":
        assert min(kinds) >= 8


def test_a_small_alpha_makes_clients_differ_more() -> None:
    labels = torch.arange(2000) % 10

    def spread(alpha: float) -> float:
        parts = divide(labels, 2000, 5, "dirichlet", shards=2, alpha=alpha, generator=torch.Generator().manual_seed(0))
        counts = torch.stack([torch.bincount(labels[rows], minlength=10) for rows in parts]).float()
        return float(counts.std())

    assert spread(0.1) > spread(1.0) > spread(100.0)


def test_samples_are_read_out_of_any_batches() -> None:
    example = next(example for example in EXAMPLES if example.name == "named")
    samples = Samples.of(example.task())
    assert len(samples) == 24
    assert samples.batch_size == 8
    part = Part(samples, torch.arange(10, 20))
    torch.manual_seed(0)
    batches = list(part)
    assert [len(batch["labels"]) for batch in batches] == [8, 2] == [8, 10 - 8 * (len(part) - 1)]
    seen = torch.cat([batch["x"] for batch in batches])
    rows = samples.batch(torch.arange(10, 20))["x"]
    assert torch.equal(seen.sum(1).sort().values, rows.sum(1).sort().values)


@pytest.mark.parametrize("batch", [[(torch.randn(4, 2), 3)], [(torch.randn(4, 2), torch.zeros(3).long())], []])
def test_data_that_cannot_be_divided_is_refused(batch: list[Any]) -> None:
    with pytest.raises(DataError, match="sample"):
        Samples.of(Task(train=batch))


def test_labels_that_are_no_classes_are_refused() -> None:
    task = Task(
        train=[(torch.randn(8, 64), torch.randn(8))], val=[(torch.randn(8, 64), torch.randn(8))], loss=F.l1_loss
    )
    with pytest.raises(DataError, match="split=iid"):
        Federated(clients=2, rounds=1)(nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)), Context(task=task))


# --- rounds --------------------------------------------------------------------------------------------------------


def test_a_dense_round_is_the_average_by_samples() -> None:
    method = Federated(clients=3, rounds=1, sparsity=0.0, bits=None, down=False, split="dirichlet", lr=0.1)
    linear, context = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Context(task=digits(), path="federated")
    with context.forked("samples"):
        samples = Samples.of(digits())
    parts = divide(samples.labels(digits()), len(samples), 3, "dirichlet", shards=2, alpha=0.5,
                   generator=context.generator("clients"))  # fmt: skip
    federation = Federation(method, copy.deepcopy(linear), [Part(samples, rows) for rows in parts], context)
    after = [learned(federation.trained(0, client)) for client in range(3)]
    result = method(linear, Context(task=digits()))
    for name, value in learned(result).items():
        expected = sum(len(rows) / len(samples) * one[name] for rows, one in zip(parts, after, strict=True))
        torch.testing.assert_close(value, expected, msg=name)


def test_the_bytes_of_a_round_are_the_lengths_of_its_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    plain = updates.packed

    def noting(*args: Any, **options: Any) -> bytes:
        message = plain(*args, **options)
        lengths.append(len(message))
        return message

    monkeypatch.setattr(updates, "packed", noting)
    rows = rounds_of(Federated(clients=4, rounds=2, share=0.5, sparsity=0.9))
    assert len(lengths) == 2 * (2 + 1)
    for number, row in enumerate(rows):
        up, down = lengths[3 * number : 3 * number + 2], lengths[3 * number + 2]
        assert row["clients"] == 2
        assert row["bytes_up"] == sum(up)
        assert row["bytes_down"] == 4 * down  # every client hears the server
        assert 0 <= row["metric"] <= 100
    assert [row["round"] for row in rows] == [1, 2]


def test_sparse_updates_take_far_fewer_bytes_and_still_learn() -> None:
    base, linear = Federated(clients=2, rounds=4, lr=0.3, epochs=3), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    dense = rounds_of(base.replace(rounds=2, sparsity=0.0, bits=None, down=False), model=linear)
    sparse = rounds_of(base.replace(sparsity=0.9, bits=1), model=linear)
    assert dense[-1]["bytes_up"] > 4 * sparse[-1]["bytes_up"]  # most of so small a message is the file's header
    assert dense[-1]["metric"] > 80
    assert sparse[-1]["metric"] > 60


def test_masks_hold_and_statistics_are_averaged() -> None:
    example = next(example for example in EXAMPLES if example.name == "convolution")
    masked = Prune(sparsity=0.5)(example.build(), Context(task=example.task()))
    result = Federated(clients=2, rounds=2)(masked, Context(task=example.task()))
    for name, weight in effective(masked).items():
        if weight.ndim >= 2:
            assert not effective(result)[name][weight == 0].any()
    before, after = (dict(model.named_buffers())["1.running_mean"] for model in (masked, result))
    assert not torch.equal(before, after)


def test_clients_without_samples_take_no_part() -> None:
    context = Noting(task=replace(digits(), val=None, train=[(torch.randn(4, 64), torch.tensor([0, 1, 2, 3]))]))
    Federated(clients=6, rounds=1, split="iid")(network(), context)
    record = context.records[0]
    assert record.details["rounds"][0]["clients"] == 4
    assert "metric" not in record.details["rounds"][0]
    assert any("2 of 6 clients have no samples" in note for note in record.notes)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.0), SGD(momentum=0.9)])
def test_a_killed_federation_resumes_to_the_same_bits(optimizer: SGD) -> None:
    method = Federated(clients=3, rounds=3, sparsity=0.9, optimizer=optimizer, share=0.7)
    whole = method(network(), StoredContext(task=digits()))
    context = StoredContext(task=digits())
    context.epochs("rounds").die_after = 2
    with pytest.raises(KeyboardInterrupt):
        method(network(), context)
    again = method(network(), StoredContext(task=digits(), stores=context.stores))
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clients": 1}, "no federation"),
        ({"epochs": 0}, "clients would not train"),
        ({"shards": 0}, "without data"),
        ({"stopping": EarlyStopping()}, "clients do not have"),
        ({"reestimate": True}, "nobody has"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Federated(**fields)
