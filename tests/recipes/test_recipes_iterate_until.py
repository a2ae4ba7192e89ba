"""Iterate until: deeper every time, kept only while it helps, the gap in words, finished steps restored."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as es
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NoEffectWarning, UsageError
from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.core.record import Record
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.measure import fp32_safetensors_bytes
from espalier.measure.frozen import file_length
from espalier.prune import Channels, Global, Prune
from espalier.recipes import DeepCompression, IterateUntil
from espalier.recipes.iterate_until import deepened
from espalier.runs.context import RunContext
from espalier.runs.files import freeze_model, write_weights
from espalier.share import KMeans
from espalier.testing import effective
from espalier.train import Finetune


@cache
def digits() -> Task:
    splits = standard("digits", batch_size=64)
    return classification(splits.train, splits.val)


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    return Finetune(epochs=10, lr=1e-2)(net, Context(task=digits()))


@dataclass
class Noting(Context):
    """Keeps the records of its children."""

    records: list[Record] = field(default_factory=list)

    def child(self, name: str, method: Any) -> Context:
        made = super().child(name, method)
        self.records.append(made.record)
        return made


PRUNE = Prune(sparsity=0.4, scope=Global())
SHARE = KMeans(bits=4)


def run(method: IterateUntil) -> tuple[nn.Module, dict[str, Any], list[warnings.WarningMessage]]:
    context = Noting(task=digits())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = method(trained(), context)
    return result, context.records[0].details, caught


def test_each_time_goes_deeper() -> None:
    steps = [deepened(PRUNE, times, 4, trained()) for times in (1, 2, 3)]
    assert [step.sparsity for step in steps if isinstance(step, Prune)] == pytest.approx([0.4, 0.64, 0.784])
    assert deepened(SHARE, 2, 4, trained()) is SHARE
    units = Prune(pattern=Channels(), sparsity=0.2)  # a share of what is there now: deeper by itself
    assert deepened(units, 2, 4, trained()) is units
    strong = deepened(DeepCompression(strength=0.8), 2, 4, trained())
    assert isinstance(strong, DeepCompression)
    assert strong.strength == pytest.approx(0.4)
    both = deepened(Recipe(steps=(PRUNE, SHARE)), 2, 4, trained())
    assert isinstance(both, Recipe)
    assert both.steps == (deepened(PRUNE, 2, 4, trained()), SHARE)


def test_pruning_takes_its_share_of_what_is_left() -> None:
    pruned = Prune(sparsity=0.7, scope=Global())(trained(), Context(task=digits()))
    step = deepened(PRUNE, 2, 4, pruned)
    assert isinstance(step, Prune)
    assert step.sparsity == pytest.approx(1 - 0.3 * 0.36, abs=0.01)
    elsewhere = PRUNE.replace(layers=("later",))  # made by a step before it
    assert deepened(elsewhere, 1, 4, pruned) == elsewhere


@pytest.mark.parametrize(
    "step",
    [
        DeepCompression(strength=1.0, prune=PRUNE, share=SHARE, finetune=Finetune(epochs=1)),
        Recipe(steps=(PRUNE, SHARE)),
    ],
)
def test_a_recipe_gets_stronger_from_where_it_began(step: Technique) -> None:
    _, details, _ = run(IterateUntil(steps=(step,), size=None, max_drop=100.0, rounds=3))
    assert [row["kept"] for row in details["tries"]] == [True] * 3


def test_goes_on_until_the_file_is_small_enough_and_no_further() -> None:
    limit = file_length(trained(), Context(), ("adaptive",)) * 6 // 10
    result, details, caught = run(IterateUntil(steps=(PRUNE, SHARE), size=limit, max_drop=20.0))
    assert details["met"]
    assert file_length(result, Context(), ("adaptive",)) == details["bytes"] <= limit
    assert [row["name"] for row in details["tries"]] == ["01-prune-01", "01-prune-02"]
    assert not caught


def test_the_next_step_follows_where_one_drops_too_much() -> None:
    _, details, _ = run(IterateUntil(steps=(PRUNE, SHARE), size="1000x", max_drop=1.0, rounds=6))
    names = [row["name"] for row in details["tries"]]
    refused = [row for row in details["tries"] if not row["kept"]]
    assert "a drop of" in refused[0]["reason"]
    assert names[-1].startswith("02-kmeans")
    assert names.index(refused[0]["name"]) == max(n for n, name in enumerate(names) if "prune" in name)


def test_what_is_kept_satisfies_the_drop_and_the_gap_is_told() -> None:
    result, details, caught = run(IterateUntil(steps=(PRUNE, SHARE), size="1000x", max_drop=1.0))
    before, after = (digits().measure(model, "val") for model in (trained(), result))
    assert details["drop"] == pytest.approx(before.value - after.value)
    assert details["drop"] <= 1.0
    assert not details["met"]
    limit = int(fp32_safetensors_bytes(trained()) / 1000)
    (message,) = [str(item.message) for item in caught if issubclass(item.category, EspalierWarning)]
    assert f"{details['bytes']:,} bytes at a drop of {details['drop']:.2f}" in message
    assert f"{details['bytes'] - limit:,} more than the {limit:,} allowed" in message
    assert "Allow a larger max_drop" in message


def test_a_step_that_would_undo_another_is_passed_over() -> None:
    result, details, _ = run(IterateUntil(steps=(SHARE, PRUNE), size="1000x", max_drop=5.0))
    refused = [row for row in details["tries"] if row["name"].startswith("02-prune")]
    assert len(refused) == 1
    assert "codes or few numbers" in refused[0]["reason"]
    assert effective(result)["1.weight"].unique().numel() <= 16


def test_without_a_size_it_goes_on_as_long_as_it_helps() -> None:
    _, details, caught = run(IterateUntil(steps=(PRUNE,), size=None, max_drop=2.0, rounds=20))
    assert "met" not in details
    assert not details["tries"][-1]["kept"]
    assert not caught


def test_nothing_to_do_is_said() -> None:
    _, details, caught = run(IterateUntil(steps=(PRUNE,), size="1x"))
    assert details["met"] == (not details["tries"])
    assert any(issubclass(item.category, NoEffectWarning) for item in caught)
    _, _, caught = run(IterateUntil(steps=(Prune(sparsity=0.95),), size="10x", max_drop=0.0))
    assert any(issubclass(item.category, NoEffectWarning) and "out of reach" in str(item.message) for item in caught)


def test_the_original_is_what_counts() -> None:
    context = Noting(task=digits(), models={"original": trained()})
    worse = Prune(sparsity=0.9)(trained(), Context(task=digits()))
    with pytest.warns(NoEffectWarning, match="out of reach"):
        IterateUntil(steps=(SHARE,), size="100x", max_drop=0.5)(worse, context)
    drop = digits().scorer().drop(*(digits().measure(model, "val") for model in (trained(), worse)))
    assert context.records[0].details["drop"] == pytest.approx(drop)


def test_the_length_is_that_of_the_file(tmp_path: Path) -> None:
    result = KMeans(bits=3)(Prune(sparsity=0.5)(trained(), Context()), Context())
    path = tmp_path / "model.weights.espalier"
    write_weights(freeze_model(result, None), path, Recipe().file.__class__(coders=("adaptive",)), "fp32")
    assert file_length(result, Context(), ("adaptive",)) == path.stat().st_size


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"size": "12 parsec"}, "12 parsec"), ({"steps": ()}, "nothing to repeat"), ({"size": "0x"}, "positive")],
)
def test_what_cannot_be_a_target_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        IterateUntil(**fields)


def test_a_resumed_run_restores_the_finished_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = IterateUntil(steps=(PRUNE, SHARE), size="1000x", max_drop=4.0, rounds=2)

    def compress(name: str, **more: Any) -> es.api.Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EspalierWarning)
            return es.compress(trained(), digits(), method, out=tmp_path / name, timing_seconds=0, device="cpu", **more)

    whole = compress("whole").file.read_bytes()
    performed: list[str] = []
    plain = RunContext.perform_recorded

    def counting(self: RunContext, technique: Any, model: Any, *, again: bool) -> Any:
        if len(performed) == 3:
            performed.append("")
            raise KeyboardInterrupt
        performed.append(self.path)
        return plain(self, technique, model, again=again)

    monkeypatch.setattr(RunContext, "perform_recorded", counting)
    with pytest.raises(KeyboardInterrupt):
        compress("cut")
    finished, performed[:] = [path for path in performed if path.endswith(("01", "02"))], [""] * 9
    assert compress("cut", resume=True).file.read_bytes() == whole
    assert len(finished) == 2
    assert not set(finished) & set(performed)
