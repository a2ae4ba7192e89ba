"""Structured weights: the rule is the same in NumPy and torch, travels in files and checkpoints, and takes codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from espalier import encode
from espalier.core.context import Context
from espalier.core.errors import Corrupt, ModelError, PhaseError, UsageError
from espalier.core.parametrize import attach, slots
from espalier.core.plan import base, rebase
from espalier.core.representation import Dense, from_state
from espalier.core.structures import STRUCTURES, LowRank, structure_of
from espalier.core.structures.form import StructuredWeight
from espalier.core.structures.stored import Structured
from espalier.core.task import classification
from espalier.data import standard
from espalier.prune import Prune
from espalier.quantize import Quantize
from espalier.runs.checkpoint import load_model, save_model
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

digits = standard("digits")
TASK = classification(digits.train, digits.val)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def thin(rank: int = 3) -> nn.Sequential:
    """The first layer as a product of two thin matrices."""
    model = network()
    slot = slots(model)["1.weight"]
    structure = LowRank(shape=tuple(slot.shape), rank=rank)
    attach(slot, StructuredWeight(structure, 0.2 * torch.randn(structure.count)))
    return model.eval()


def test_low_rank_is_the_product() -> None:
    structure = LowRank(shape=(6, 2, 5), rank=4)
    parts = structure.split(torch.randn(structure.count))
    wanted = (parts["left"].double() @ parts["right"].double()).reshape(6, 2, 5)
    assert torch.allclose(structure.dense(parts).double(), wanted, atol=1e-5)
    assert torch.allclose(structure.fast(parts), structure.dense(parts), atol=1e-5)
    assert structure.count == 4 * (6 + 10)


def test_numpy_and_torch_agree_bit_for_bit() -> None:
    structure = LowRank(shape=(31, 17), rank=7)
    flat = torch.randn(structure.count)
    exact = structure.dense(structure.split(flat)).numpy()
    assert np.array_equal(exact, structure.dense(structure.split(flat.numpy())))


def test_file_and_checkpoint_hold_it(tmp_path: Path) -> None:
    model = Finetune(epochs=1)(thin(), Context(task=TASK)).eval()
    for other in (frozen_copy(model), frozen_copy(model, through_file=True)):
        assert bits(outputs(other, TASK)) == bits(outputs(model, TASK))
    save_model(model, tmp_path / "kept")
    kept = load_model(network(), tmp_path / "kept").eval()
    assert isinstance(slots(kept)["1.weight"].form, StructuredWeight)
    assert bits(outputs(kept, TASK)) == bits(outputs(model, TASK))


def test_training_moves_the_numbers_and_stores_only_them() -> None:
    before = thin()
    after = Finetune(epochs=12, lr=1e-2)(before, Context(task=TASK))
    assert TASK.measure(after, "val").value > TASK.measure(before, "val").value + 10
    slot = slots(after)["1.weight"]
    assert torch.linalg.matrix_rank(slot.value()) == 3
    assert slot.form is not None
    stored = slot.form.freeze(slot.latent)
    assert isinstance(stored, Structured)
    assert stored.bits() == 32 * 3 * (24 + 64)


def test_its_numbers_can_be_quantized(tmp_path: Path) -> None:
    model = Finetune(epochs=2, lr=3e-3)(thin(8), Context(task=TASK))
    coarse = Quantize(bits=4, ends="same", epochs=0)(model, Context(task=TASK)).eval()
    stored = slots(coarse)["1.weight"].form.freeze(slots(coarse)["1.weight"].latent)  # type: ignore[union-attr]
    assert isinstance(stored, Structured)
    assert len(np.unique(stored.parts["left"].dense())) <= 16
    save_model(coarse, tmp_path / "kept")
    for other in (frozen_copy(coarse, through_file=True), load_model(network(), tmp_path / "kept").eval()):
        assert bits(outputs(other, TASK)) == bits(outputs(coarse, TASK))


def test_its_positions_are_fixed() -> None:
    with pytest.raises(PhaseError, match=r"1\.weight"):
        Prune(sparsity=0.5)(thin(), Context(task=TASK))
    slot = slots(thin())["1.weight"]
    with pytest.raises(ModelError, match="smaller"):
        slot.form.take(0, torch.arange(3))  # type: ignore[union-attr]


def test_cutting_what_is_stored_gives_the_values() -> None:
    slot = slots(thin())["1.weight"]
    assert slot.form is not None
    stored = slot.form.freeze(slot.latent)
    cut = stored.take(0, np.array([2, 5]))
    assert isinstance(cut, Dense)
    assert np.array_equal(cut.dense(), stored.dense()[[2, 5]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": "magic"}, "magic"),
        ({"structure": ["low-rank"]}, "structure"),
        ({"options": {}}, "rank"),
        ({"options": {"rank": 0}}, "rank of 1"),
        ({"options": {"rank": -1}}, "rank"),
        ({"options": {"rank": True}}, "rank"),
        ({"options": {"rank": 2**50}}, "rank"),
        ({"options": {"rank": [1]}}, "rank"),
        ({"options": {"rank": 4}}, "dense values"),
        ({"parts": {"left": {"kind": "dense"}}}, "right"),
        ({"parts": {"left": {"kind": "structured"}, "right": {"kind": "dense"}}}, "inside"),
    ],
)
def test_forged_data_is_refused(change: dict[str, Any], message: str) -> None:
    meta, parts = stored_of(thin()).state()
    with pytest.raises(Corrupt, match=message):
        from_state("structured", (24, 64), "float32", {**meta, **change}, parts)


def stored_of(model: nn.Module) -> Structured:
    slot = slots(model)["1.weight"]
    assert slot.form is not None
    stored = slot.form.freeze(slot.latent)
    assert isinstance(stored, Structured)
    return stored


def test_a_low_rank_of_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        LowRank(shape=(5,), rank=1)
    with pytest.raises(Corrupt, match="due"):
        structure_of("low-rank", (5,), {"rank": 1})
    assert set(STRUCTURES) >= {"low-rank"}


def test_parts_must_fit() -> None:
    stored = stored_of(thin())
    with pytest.raises(UsageError, match="needs"):
        Structured(shape=(24, 64), structure=stored.structure, parts={"left": stored.parts["left"]})


def test_fp16_narrows_the_numbers() -> None:
    wide = {"w": stored_of(thin())}
    file = encode.encode(wide, floats="fp16")
    with encode.open_file(file) as archive:
        found = archive.representation("w")
    assert isinstance(found, Structured)
    assert {part.state()[0].get("stored") for part in found.parts.values()} == {"float16"}
    assert np.allclose(found.dense(), wide["w"].dense(), atol=1e-2)
    assert len(file) < len(encode.encode(wide))


def test_a_checkpoint_names_the_model_it_is_based_on(tmp_path: Path) -> None:
    student = rebase(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "student")
    save_model(student, tmp_path / "kept")
    kept = load_model(network(), tmp_path / "kept", {"student": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))})
    assert base(kept) == "student"
    assert bits(kept.state_dict()) == bits(student.state_dict())
    assert base(network()) == "original"
