"""What all sharing by structures has in common: projection, files, checkpoints, training, later steps, bad input."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NoEffectWarning, NumericError, PhaseError, UnknownNameError, UsageError
from espalier.core.model import copy_model
from espalier.core.parametrize import slots
from espalier.core.record import Record
from espalier.core.structures import Structure
from espalier.core.structures.form import StructuredWeight
from espalier.core.structures.stored import Structured
from espalier.core.task import classification
from espalier.data import standard
from espalier.prune import Prune
from espalier.quantize import Quantize
from espalier.runs.checkpoint import load_model, save_model
from espalier.share import Circulant, Hashed, Monarch, Sharing, Tied, Toeplitz
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

digits = standard("digits")
TASK = classification(digits.train, digits.val)
METHODS: tuple[Sharing, ...] = (
    Circulant(), Circulant(flips=True), Toeplitz(), Monarch(), Monarch(rank=2), Hashed(), Tied(), Tied(what="kernels"),
)  # fmt: skip
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.id}-{getattr(m, 'what', '')}")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24),
        nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip


def pictures() -> Any:
    """The digits as images of one channel."""

    def shaped(loader: Any) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the loader shuffles
            return [(x.reshape(-1, 1, 8, 8), y) for x, y in loader]

    return replace(TASK, train=shaped(digits.train), val=shaped(digits.val))


IMAGES = pictures()


@cache
def trained() -> nn.Module:
    return Finetune(epochs=4, lr=5e-3)(network(), Context(task=IMAGES)).eval()


def run(method: Sharing, model: nn.Module, **context: Any) -> tuple[nn.Module, Record]:
    own = Context(**context)
    kept: list[Record] = []

    class Watching(Context):
        def perform(self, technique: Any, model: nn.Module) -> nn.Module:
            kept.append(self.record)
            return super().perform(technique, model)

    return method(model, Watching(**{**vars(own), "record": own.record})), kept[-1]


def structures(model: nn.Module) -> dict[str, Structure]:
    return {name: s.form.structure for name, s in slots(model).items() if isinstance(s.form, StructuredWeight)}


@EACH
def test_it_is_smaller_and_says_how_far_off(method: Sharing) -> None:
    model = network()
    shared, record = run(method, model)
    made, before = structures(shared), dict(model.named_parameters())
    assert set(record.details["layers"]) == set(made)
    assert made
    for name, found in record.details["layers"].items():
        weight, now = before[name].detach(), slots(shared)[name].value()
        assert found["numbers"] == made[name].count < found["weights"] == weight.numel()
        assert found["relative_error"] == pytest.approx(float((now - weight).norm() / weight.norm()), rel=1e-4)
        assert 0 < found["relative_error"] < 1
    skipped = {row["name"] for row in record.skipped}
    assert skipped | set(made) == {name for name, weight in before.items() if weight.ndim > 1}


@EACH
def test_a_projection_is_its_own_projection(method: Sharing) -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Linear(24, 24), nn.Linear(48, 24))  # no block is cut off
    once = method.transform(copy_model(model), Context())
    twice = method.replace(densify=True).transform(copy_model(once), Context())
    for name in structures(once):
        before, after = slots(once)[name].value(), slots(twice)[name].value()
        assert (after - before).norm() < 1e-5 * before.norm()


def basis(structure: Structure, fixed: dict[str, Tensor], free: str) -> Tensor:
    """(weights, numbers): the weight of each number of the part ``free`` alone, the other parts as they are."""
    shape, columns = structure.part_shapes()[free], []
    size = int(np.prod(shape))
    for k in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[k] = 1
        columns.append(structure.dense({**fixed, free: unit.reshape(shape)}).reshape(-1))
    return torch.stack(columns, 1)


@EACH
def test_no_other_numbers_are_nearer(method: Sharing) -> None:
    """With all parts but one as they are found, least squares finds no better part."""
    close = 1e-9
    if isinstance(method, Toeplitz):
        method, close = method.replace(sweeps=40), 1e-3  # it stops where a sweep no longer gains much
    torch.manual_seed(1)
    for layer in (nn.Linear(8, 8), nn.Linear(16, 8), nn.Conv2d(4, 8, 3)):
        slot = slots(nn.Sequential(layer))["0.weight"]
        weight, context = slot.value().double(), Context()
        structure = method.structure(slot, context)
        if isinstance(structure, str):
            continue
        parts = method.project(structure, weight, context)
        found = float((structure.dense(parts) - weight).norm())
        for free in parts:
            matrix = basis(structure, {name: part for name, part in parts.items() if name != free}, free)
            answer = torch.linalg.lstsq(matrix, weight.reshape(-1, 1), driver="gelsd").solution
            best = float((matrix @ answer - weight.reshape(-1, 1)).norm())
            assert best <= found * (1 + 1e-9)
            assert found <= best * (1 + close)


@EACH
def test_fewer_numbers_are_further_off(method: Sharing) -> None:
    if getattr(method, "what", "") == "kernels":
        pytest.skip("keep says nothing to it")
    model = nn.Sequential(nn.Linear(48, 48))
    errors = []
    for keep in (0.6, 0.3, 0.1):
        _, record = run(method.replace(keep=keep), model)
        found = record.details["layers"]["0.weight"]
        assert found["numbers"] <= keep * 48 * 48
        errors.append(found["relative_error"])
    assert errors == sorted(errors)


@EACH
def test_training_restores_it_and_file_and_checkpoint_hold_it(method: Sharing, tmp_path: Path) -> None:
    model = trained()
    if isinstance(method, Tied) and method.what == "neurons":
        method = method.replace(layers=("5",))  # an output layer with equal rows cannot tell classes apart
    elif isinstance(method, Monarch):
        method = method.replace(layers=("2", "5"))  # a quarter of the other two is one block, which has rank 1
    before = IMAGES.measure(method(model, Context()), "val").value
    tuned, _ = run(method.replace(epochs=3, lr=5e-3), model, task=IMAGES)
    tuned.eval()
    assert IMAGES.measure(tuned, "val").value > before + 5
    other = frozen_copy(tuned, through_file=True)
    assert bits(outputs(other, IMAGES)) == bits(outputs(tuned, IMAGES))
    save_model(tuned, tmp_path / "kept")
    kept = load_model(network(), tmp_path / "kept").eval()
    assert structures(kept) == structures(tuned)
    assert bits(outputs(kept, IMAGES)) == bits(outputs(tuned, IMAGES))
    coarse = Quantize(bits=4, ends="same", epochs=0)(kept, Context(task=IMAGES)).eval()
    for name in structures(tuned):
        form = slots(coarse)[name].form
        assert form is not None
        stored = form.freeze(slots(coarse)[name].latent)
        assert isinstance(stored, Structured)
        values = np.concatenate([part.dense().reshape(-1) for part in stored.parts.values()])
        assert len(np.unique(values)) <= 16
    other = frozen_copy(coarse, through_file=True)
    assert bits(outputs(other, IMAGES)) == bits(outputs(coarse, IMAGES))


@EACH
def test_what_an_earlier_step_fixed_is_kept(method: Sharing) -> None:
    pruned = Prune(sparsity=0.5)(network(), Context())
    with pytest.raises(PhaseError, match=r"0\.weight"):
        method(pruned, Context())
    assert structures(method.replace(densify=True)(pruned, Context()))
    with pytest.raises(PhaseError, match="weight"):
        method(method(network(), Context()), Context())


@EACH
def test_bad_weights_and_names_are_refused(method: Sharing) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"2\.weight"):
        method(model, Context())
    with pytest.raises(UnknownNameError, match="fifth"):
        method.replace(layers=("fifth",))(model, Context())


@EACH
def test_a_layer_too_small_to_gain_is_left_alone(method: Sharing) -> None:
    small = nn.Sequential(nn.Linear(1, 1))
    with pytest.warns(NoEffectWarning, match="fewer|below the rank|no kernel"):
        _, record = run(method, small)
    assert [row["name"] for row in record.skipped] == ["0.weight"]


def test_zeros_have_a_projection() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    nn.init.zeros_(model[0].weight)
    for method in METHODS[:-1]:
        shared, record = run(method, model)
        assert not slots(shared)["0.weight"].value().any()
        assert record.details["layers"]["0.weight"]["relative_error"] == 0


def test_what_cannot_keep_so_few_says_so() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    for method in (Circulant(), Toeplitz(), Monarch()):
        _, record = run(method.replace(keep=0.01), model)
        assert any("more than the share of 0.01" in note for note in record.notes)
    with pytest.raises(UsageError, match="keep"):
        Circulant(keep=1.5)


@EACH
def test_padding_stays_zero(method: Sharing) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16, padding_idx=0), nn.Linear(16, 16))
    shared, record = run(method, model) if getattr(method, "what", "") != "kernels" else (model, Record("", ""))
    assert float(slots(shared)["0.weight"].value()[0].abs().max()) < 1e-12
    if isinstance(method, Monarch):
        assert list(structures(shared)) == ["0.weight", "1.weight"]
    elif record.skipped:
        assert "its row 0 is padding" in record.skipped[0]["reason"]
