"""The joint training: masks and grids in one, exact counts, what may come back, resume, and the student's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tests.train.conftest import StoredContext
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.method import Technique
from espalier.core.parametrize import slots
from espalier.core.plan import base
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.distill import Distill
from espalier.prune import Layer, Listed, Prune
from espalier.quantize import LSQ, TTQ, Inq, LrNet, Quantize
from espalier.recipes import PruneQuantize, PruneQuantizeDistill
from espalier.recipes.deep_compression import sparsity_at
from espalier.recipes.prune_quantize import mask_of
from espalier.testing import effective
from espalier.train import EarlyStopping, Finetune


@cache
def digits() -> Task:
    splits = standard("digits", batch_size=32)
    return classification(splits.train, splits.val)


def network(width: int = 32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10)
        )


@cache
def trained() -> nn.Module:
    return Finetune(epochs=6, lr=3e-3)(network(), Context(task=digits()))


def joint(**fields: Any) -> PruneQuantize:
    quantize = Quantize(weights=fields.pop("weights", LSQ()), bits=fields.pop("bits", 3), ends="same")
    given = {"epochs": 3, "lr": 2e-3, "sparsity": 0.8, **fields}
    return PruneQuantize(strength=None, quantize=quantize, **given)


def test_ends_exactly_as_sparse_and_in_as_few_values_as_asked() -> None:
    context = Context(task=digits())
    result = joint()(trained(), context)
    found = [slot for slot in slots(result).values() if len(slot.shape) == 2]
    total = sum(slot.latent.numel() for slot in found)
    assert sum(int((~mask_of(slot).mask).sum()) for slot in found) == int(0.8 * total + 1e-9)
    for slot in found:
        assert isinstance(slot.form, QuantizedWeight)
        assert slot.form.bits == 3
        assert not slot.value()[~mask_of(slot).mask].any()
        assert slot.value().unique().numel() <= 2**3
        assert not mask_of(slot).through
    assert digits().measure(result, "val").value > 65  # in three epochs of 34 steps


def test_in_each_layer_alone_with_another_scope() -> None:
    result = joint(scope=Layer(), sparsity=0.75)(trained(), Context(task=digits()))
    for name, weight in slots(result).items():
        if len(weight.shape) == 2:
            assert int((~mask_of(weight).mask).sum()) == int(0.75 * weight.latent.numel()), name


@pytest.mark.parametrize("splice", [False, True])
def test_pruned_weights_learn_only_where_they_are_spliced(splice: bool) -> None:
    step = joint(splice=splice, sparsity=0.5, schedule=Listed(values=(0.5,)), epochs=1, every=1000)
    result = step(trained(), Context(task=digits()))
    before = effective(trained())
    gone = ~mask_of(slots(result)["1.weight"]).mask
    moved = (slots(result)["1.weight"].latent - before["1.weight"])[gone].abs()
    decay = before["1.weight"][gone].abs().max() * 0.01  # AdamW moves weights without a gradient as well
    assert bool((moved > decay).any()) == splice


def test_the_mask_is_chosen_anew_but_never_beyond_an_earlier_one() -> None:
    pruned = Prune(sparsity=0.5)(trained(), Context(task=digits()))
    result = joint(sparsity=0.6)(pruned, Context(task=digits()))
    for name, slot in slots(pruned).items():
        if isinstance(slot.form, Mask):
            assert not mask_of(slots(result)[name]).mask[~slot.form.mask].any()


def test_the_quantizer_starts_anew_from_what_is_kept_while_the_mask_grows() -> None:
    step = joint(epochs=1, every=1, lr=1e-8)
    result = step(trained(), Context(task=digits()))
    slot = slots(result)["3.weight"]
    kept = slot.latent.detach()[mask_of(slot).mask]
    expected = 2 * kept.abs().mean() / 3**0.5
    assert isinstance(slot.form, QuantizedWeight)
    assert float(slot.form.state["scale"].detach()) == pytest.approx(float(expected), rel=1e-2)


def test_strength_sets_sparsity_and_bits() -> None:
    goals = [PruneQuantize(strength=strength).goal() for strength in (0.0, 0.5, 1.0)]
    assert [quantize.bits for _, quantize in goals] == [6, 4, 2]
    assert [sparsity for sparsity, _ in goals] == pytest.approx([sparsity_at(s) for s in (0.0, 0.5, 1.0)])
    ternary = PruneQuantize(strength=0.0, quantize=Quantize(weights=TTQ(), bits=2))
    assert ternary.goal()[1].bits == 2
    assert PruneQuantize(strength=None, sparsity=0.3).goal()[0] == 0.3
    assert PruneQuantize(schedule=Listed(values=(0.2, 0.4))).goal()[0] == 0.4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epochs": 0}, "epochs=0 trains nothing"),
        ({"quantize": Quantize(epochs=2)}, "quantize.epochs trains after the masks"),
        ({"quantize": Quantize(weights=Inq(), bits=4)}, "inq goes its own way"),
        ({"quantize": Quantize(weights=LrNet(), bits=2)}, "lr-net goes its own way"),
        ({"sparsity": 0.99}, "strength sets sparsity: leave it out, or set strength to null"),
        ({"quantize": Quantize(weights=LSQ(), bits=8)}, "strength sets quantize.bits"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PruneQuantize(**fields)


def test_the_best_epoch_is_one_that_has_the_final_masks() -> None:
    step = joint(epochs=5, stopping=EarlyStopping(patience=5))
    result = step(trained(), Context(task=digits()))
    masks = [mask_of(slot).mask for slot in slots(result).values() if len(slot.shape) == 2]
    total = sum(mask.numel() for mask in masks)
    assert sum(int((~mask).sum()) for mask in masks) == int(0.8 * total + 1e-9)


def test_a_killed_training_resumes_to_the_same_bits() -> None:
    whole = joint()(trained(), StoredContext(task=digits()))
    for epoch in (1, 2):
        context = StoredContext(task=digits())
        context.epochs("fit").die_after = epoch
        with pytest.raises(KeyboardInterrupt):
            joint()(trained(), context)
        again = joint()(trained(), StoredContext(task=digits(), stores=context.stores))
        for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


# --- with a teacher ------------------------------------------------------------------------------------------------


@dataclass
class Watching(Context):
    """Notes the steps as they run."""

    ran: list[tuple[str, Technique]] = field(default_factory=list)

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        self.ran.append((name or child.id, child))
        return super().run(child, model, name)


def short(**fields: Any) -> PruneQuantizeDistill:
    lesson = Distill(epochs=2, lr=2e-3)
    stages = {"distill": lesson, "compress": joint(bits=4, sparsity=0.6), "recover": lesson}
    return PruneQuantizeDistill(strength=None, **stages, **fields)  # type: ignore[arg-type]


def test_a_student_of_its_own_learns_first_and_ends_pruned_and_quantized() -> None:
    context = Watching(task=digits(), models={"small": network(16)})
    result = short(student="small")(trained(), context)
    assert [name for name, _ in context.ran[1:]] == ["01-distill", "02-prune-quantize", "03-distill"]
    lessons = [step for _, step in context.ran if isinstance(step, Distill)]
    assert [(step.teacher, step.student) for step in lessons] == [("original", "small"), ("original", None)]
    slot = slots(result)["1.weight"]
    assert slot.shape == (16, 64)
    assert isinstance(slot.form, QuantizedWeight)
    assert float((slot.value() == 0).float().mean()) > 0.4
    assert base(result) == "small"
    assert digits().measure(result, "val").value > 60


def test_the_compressed_model_may_teach() -> None:
    pruned = Prune(sparsity=0.5)(trained(), Context(task=digits()))
    context = Watching(task=digits(), models={"small": network(16)})
    short(student="small", teacher="compressed")(pruned, context)
    assert {step.teacher for _, step in context.ran if isinstance(step, Distill)} == {"compressed"}
    assert "compressed" not in context.models


def test_without_a_student_the_model_is_its_own() -> None:
    context = Watching(task=digits())
    result = short()(trained(), context)
    assert [name for name, _ in context.ran[1:]] == ["02-prune-quantize", "03-distill"]
    assert digits().measure(result, "val").value > 85


def test_the_models_it_names_are_needed() -> None:
    assert PruneQuantizeDistill(student="small").needs >= {"train", "model:small", "model:original"}
    assert "model:compressed" not in PruneQuantizeDistill(teacher="compressed").needs
    with pytest.raises(UsageError, match=r"compress: .*strength sets sparsity"):
        PruneQuantizeDistill(compress=joint(sparsity=0.6))
    with pytest.raises(UsageError, match="set by the recipe"):
        PruneQuantizeDistill(distill=Distill(student="small"))
