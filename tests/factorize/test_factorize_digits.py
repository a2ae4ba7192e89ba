"""On a trained network: smaller files, close outputs, rounds of fine-tuning, training to low rank, exact resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.factorize.splitting import digits, numbers, run, seeded, skipped, trained
from torch import Tensor, nn

import espalier as es
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import freeze, slots
from espalier.core.recipe import Recipe
from espalier.encode import encode
from espalier.factorize import (
    CP,
    SVD,
    ActivationAwareSVD,
    Autoencoder,
    BasisFilters,
    Budget,
    ChannelSVD,
    Energy,
    Evbmf,
    Factorization,
    Fixed,
    LowRankTraining,
    Ratio,
    SpatialSVD,
    TensorTrain,
    Tucker,
)
from espalier.factorize.low_rank_training import shrunk, truncated
from espalier.runs.checkpoint import EpochFile
from espalier.testing import bits
from espalier.train import SGD, Constant, EarlyStopping, Finetune

METHODS = (
    SVD(), ChannelSVD(), SpatialSVD(), Tucker(), Tucker(rank=Evbmf()), CP(), CP(modes="all", rank=Energy(energy=0.6)),
    TensorTrain(cores=2), Autoencoder(), Autoencoder(of="weight"), Autoencoder(hidden="relu", passes=2, samples=512),
    ActivationAwareSVD(), ActivationAwareSVD(by="rms"), BasisFilters(divide=4), SVD(rank=Budget(keep=0.6)),
    ChannelSVD(rank=Fixed(rank=4)), LowRankTraining(epochs=1), LowRankTraining(epochs=1, form="truncated"),
)  # fmt: skip


def named(method: Factorization) -> str:
    fields = [str(getattr(method, name)) for name in ("of", "by", "form", "hidden", "modes") if hasattr(method, name)]
    return "-".join([method.id, method.rank.id, *fields])


def size(model: nn.Module) -> int:
    tensors, aliases = freeze(model)
    return len(encode(tensors, aliases=aliases))


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in digits().data("val")])


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_file_is_smaller_and_the_outputs_are_close(method: Factorization) -> None:
    model, task = trained(), digits()
    after, record = run(method, model, task)
    assert numbers(after) < numbers(model)
    assert size(after) < size(model)
    assert record.details["factors"]
    before, now = answers(model), answers(after)
    error = float((now - before).square().mean() / before.var())
    assert error < 0.9  # with nothing left it is above 1


@pytest.mark.parametrize("order", ["saving", "error"])
def test_some_layers_then_fine_tuning_then_the_next(order: str) -> None:
    method = ChannelSVD(per_round=1, epochs=1, lr=1e-3, order=order, rank=Ratio())  # type: ignore[arg-type]
    model, task = trained(), digits()
    after, record = run(method, model, task)
    rows = record.details["factors"]
    assert len(record.details["history"]) == len(rows) == 3  # an epoch after each
    if order == "saving":
        savings = [row["parameters"][0] - row["parameters"][1] for row in rows]
        assert savings == sorted(savings, reverse=True)
    else:
        _, at_once = run(ChannelSVD(order="error", rank=Ratio()), model, task)
        assert [row["name"] for row in rows] == [row["name"] for row in at_once.details["factors"]]
        errors = [row["error"] for row in at_once.details["factors"]]
        assert errors == sorted(errors)
    alone, _ = run(ChannelSVD(rank=Ratio()), model, task)
    assert task.measure(after, "val").value > task.measure(alone, "val").value
    assert numbers(after) == numbers(alone)


def test_what_a_method_does_not_split_can_go_by_svd_at_ranks_of_the_same_rule() -> None:
    model, task = trained(), digits()
    after, record = run(Tucker(rank=Ratio(keep=0.4), others="svd"), model, task)
    ranks = {row["name"]: len(row["ranks"]) for row in record.details["factors"]}
    assert ranks["2.weight"] == 2  # a convolution by Tucker
    assert ranks["9.weight"] == 1  # a matrix by SVD
    assert numbers(after) <= 0.45 * numbers(model)
    _, alone = run(Tucker(rank=Ratio(keep=0.4)), model, task)
    assert "9.weight" in skipped(alone)


def test_later_rounds_split_the_weights_as_they_are_then() -> None:
    model, task = trained(), digits()
    after, record = run(SVD(per_round=1, epochs=1, lr=3e-3, rank=Ratio()), model, task)
    first, second = record.details["factors"]
    _, whole = run(SVD(rank=Ratio()), model, task)
    assert first["error"] == whole.details["factors"][0]["error"]
    assert second["error"] != whole.details["factors"][1]["error"]
    assert second["ranks"] == whole.details["factors"][1]["ranks"]  # chosen once, for all rounds
    assert isinstance(after[9], nn.Sequential)  # type: ignore[index]


@dataclass
class Kept(Context):
    """Keeps epochs in a folder; stops after ``left[0]`` saves."""

    folder: Path = Path()
    left: list[int] = field(default_factory=lambda: [10**6])

    def epochs(self, name: str = "fit") -> Any:
        left = self.left

        class Store(EpochFile):
            def save(self, epoch: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
                super().save(epoch, tensors, data)
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt

        return Store(self.folder / name)


@pytest.mark.parametrize(("method", "stop"), [
    (ChannelSVD(per_round=1, epochs=2), 1), (ChannelSVD(per_round=1, epochs=2), 3), (LowRankTraining(epochs=3), 2),
    (LowRankTraining(epochs=2, form="truncated"), 1),
    (Autoencoder(hidden="relu", passes=2, samples=256, layers=("9", "11"), rank=Ratio()), 3),
], ids=["first round", "second round", "nuclear", "truncated", "coder"])  # fmt: skip
def test_a_stopped_run_goes_on_bit_for_bit(method: Factorization, stop: int, tmp_path: Path) -> None:
    model, task = trained(), digits()
    with pytest.raises(KeyboardInterrupt):
        method(model, Kept(task=task, folder=tmp_path, left=[stop]))
    resumed = method(model, Kept(task=task, folder=tmp_path))
    assert bits(resumed.state_dict()) == bits(method(model, Context(task=task)).state_dict())


def test_the_nuclear_norm_lowers_the_rank() -> None:
    task = digits()
    tails = []
    for strength in (0.0, 30.0):
        method = LowRankTraining(epochs=4, strength=strength, layers=("9",), rank=Fixed(rank=1), lr=3e-3, every=4)
        layers = method.prepare(model := trained(), Context(task=task, models={"original": model}))
        values = torch.linalg.svdvals(layers[0].slot.value())
        tails.append(float(values[8:].square().sum() / values.square().sum()))
    assert tails[1] < 0.5 * tails[0]


def test_truncated_training_leaves_alone_what_the_budget_does_not_ask_for() -> None:
    method = LowRankTraining(epochs=1, form="truncated", rank=Budget(keep=0.95))
    after, record = run(method, trained().to(memory_format=torch.channels_last), digits())
    assert len(record.details["factors"]) == 1
    assert type(after[2]) is nn.Conv2d  # type: ignore[index]


def test_truncated_training_ends_at_the_rank() -> None:
    method = LowRankTraining(epochs=1, form="truncated", rank=Fixed(rank=5), layers=("9", "2"))
    after, record = run(method, trained(), digits())
    assert [row["ranks"] for row in record.details["factors"]] == [[5], [5]]
    assert all(row["error"] < 1e-5 for row in record.details["factors"])  # nothing was left to lose
    assert not record.notes  # what the updates chose is no news
    assert isinstance(after[2], nn.Sequential)  # type: ignore[index]


def test_the_proximal_step_is_the_minimum() -> None:
    """argmin 1/2 ||X - W||^2 + t ||X||_*: no nearby matrix is better."""
    with seeded():
        weight = torch.randn(1, 6, 5, dtype=torch.float64)
        found = shrunk(weight, 0.8)

        def objective(x: Tensor) -> float:
            return float((x - weight).square().sum() / 2 + 0.8 * torch.linalg.svdvals(x).sum())

        for _ in range(50):
            assert objective(found) <= objective(found + 0.05 * torch.randn(1, 6, 5, dtype=torch.float64))
        assert int(torch.linalg.matrix_rank(truncated(weight, 2))) == 2


def test_the_step_of_the_penalty_is_rate_times_strength_times_steps() -> None:
    task, model = digits(), trained()
    batches = len(list(task.data("train")))
    method = LowRankTraining(epochs=1, lr=1e-6, strength=2000.0, every=batches, layers=("9",), optimizer=SGD(),
                             lr_schedule=Constant(), rank=Fixed(rank=1))  # fmt: skip
    before = slots(model)["9.weight"].value().clone()
    layers = method.prepare(model, Context(task=task))
    threshold = 1e-6 * 2000 * batches
    assert torch.allclose(layers[0].slot.value(), shrunk(before[None], threshold)[0], atol=1e-3)


def test_early_stopping_does_not_undo_the_training() -> None:
    """The best epoch for accuracy is an early one, before the rank has fallen."""
    kept = []
    for stopping in (None, EarlyStopping()):
        method = LowRankTraining(epochs=3, strength=2000.0, layers=("9",), stopping=stopping)
        layers = method.prepare(trained(), Context(task=digits()))
        kept.append(float(torch.linalg.svdvals(layers[0].slot.value()).sum()))
    assert kept[1] == pytest.approx(kept[0], rel=1e-6, abs=1e-6)


def test_training_comes_in_one_piece() -> None:
    with pytest.raises(UsageError, match="per_round"):
        LowRankTraining(per_round=1)
    with pytest.raises(UsageError, match="of='weight' has none"):
        Autoencoder(of="weight", hidden="relu")


def test_a_recipe_ends_in_a_file_that_holds_the_layers(tmp_path: Path) -> None:
    recipe = Recipe(steps=(Tucker(rank=Ratio(keep=0.7)), SVD(rank=Ratio(keep=0.5)), Finetune(epochs=2, lr=3e-3)))
    model = trained()
    result = es.compress(model, digits(), recipe, out=tmp_path / "run")
    loaded = es.load(tmp_path / "run" / "model.espalier")
    images = next(iter(digits().data("val")))[0]
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(images), result.model.eval()(images), atol=1e-4)
    assert loaded.eval()(images).argmax(1).eq(model(images).argmax(1)).float().mean() > 0.8


def test_chains_of_cores_are_traced_and_stored(tmp_path: Path) -> None:
    recipe = Recipe(steps=(TensorTrain(layers=("9", "2")),))
    result = es.compress(trained(), digits(), recipe, out=tmp_path / "run")
    loaded = es.load(tmp_path / "run" / "model.espalier")
    for count in (1, 5):
        images = next(iter(digits().data("val")))[0][:count]
        with torch.no_grad():
            assert torch.allclose(loaded.eval()(images), result.model.eval()(images), atol=1e-4)


def test_the_same_seed_gives_the_same_factors() -> None:
    one, two, other = (run(CP(sweeps=5), trained(), digits(), seed)[0] for seed in (0, 0, 1))
    assert bits(one.state_dict()) == bits(two.state_dict())
    assert bits(one.state_dict()) != bits(other.state_dict())
