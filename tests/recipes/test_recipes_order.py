"""Harmful orders are told, sound ones are not, and every shipped recipe is in order."""

from __future__ import annotations

import pytest

from espalier import api
from espalier.core import registry
from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.distill import Distill
from espalier.factorize import SVD
from espalier.prune import Channels, Cubic, Prune
from espalier.quantize import BiasCorrection, Equalise, MixedBits, PTQInt8, Quantize, SmoothQuant
from espalier.recipes import MobileInt8, PruneQuantize, harmful
from espalier.recipes.order import MISSING, RULES, leaves, traits
from espalier.share import Circulant, KMeans
from espalier.train import BatchNorm, Finetune

api.fill_registry()
TUNE = Finetune(epochs=1)
CHANNELS = Prune(pattern=Channels(), sparsity=0.3)


def told(*steps: Technique) -> list[str]:
    return harmful(Recipe(steps=steps))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((KMeans(), Prune(sparsity=0.5)), r"step 2 \(prune.prune\) comes after step 1 \(share.kmeans\): .*Prune first"),
        ((Quantize(), Prune(sparsity=0.5)), "Prune first"),
        ((MixedBits(), Prune(sparsity=0.5)), "Prune first"),
        ((PruneQuantize(), Prune(sparsity=0.5)), "Prune first"),
        ((Quantize(), CHANNELS), "Remove channels first"),
        ((Quantize(), SVD()), "Factorize first, then quantize"),
        ((Prune(sparsity=0.5), SVD()), "Factorize first, then prune"),
        ((KMeans(), PTQInt8()), "Fold it before"),
        ((KMeans(), Equalise()), "Equalise first"),
        ((KMeans(), BatchNorm(mode="fold")), "Fold it before"),
        ((KMeans(), Circulant()), "Give it its structure first"),
        ((Prune(sparsity=0.5), Circulant()), "then prune"),
        ((Quantize(), SmoothQuant()), "Equalise first"),
        ((PTQInt8(), TUNE), "Train first"),
        ((Distill(), CHANNELS), "Distil afterwards"),
        ((Distill(), SVD()), "Distil afterwards"),
        ((Prune(sparsity=0.9),), r"nothing trains after step 1 \(prune.prune\)"),
        ((TUNE, Prune(sparsity={"*": 0.5, "0.weight": 0.95})), "nothing trains"),
    ],
)
def test_a_harmful_order_is_told(steps: tuple[Technique, ...], words: str) -> None:
    said = " ".join(told(*steps))
    assert said
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Prune(sparsity=0.9), TUNE),
        (Prune(sparsity=0.9, epochs=3, schedule=Cubic()),),
        (Prune(sparsity=0.5),),
        (Prune(sparsity=0.9), TUNE, KMeans(), TUNE),
        (SVD(), TUNE, PTQInt8()),
        (Equalise(), Quantize(), BiasCorrection()),
        (SmoothQuant(), Quantize()),
        (CHANNELS, Distill(), PTQInt8()),
        (Distill(), CHANNELS, TUNE),
        (Distill(), CHANNELS.replace(epochs=2)),
    ],
)
def test_a_sound_order_is_not(steps: tuple[Technique, ...]) -> None:
    assert not told(*steps)


@pytest.mark.parametrize("name", [cls.id for cls in registry.methods() if cls.verb == "recipes"])
def test_the_shipped_recipes_are_in_order(name: str) -> None:
    assert not harmful(api.named_recipe(name))


def test_whole_recipes_count_as_their_stages() -> None:
    nested = Recipe(steps=(KMeans(), Recipe(steps=(MobileInt8(),))))
    assert [step.id for step in leaves(nested)] == ["kmeans", "prune", "finetune", "ptq-int8"]
    said = harmful(nested)
    assert any("step 2 (prune.prune)" in line and "Remove channels" in line for line in said)
    assert any("step 4 (quantize.ptq-int8)" in line and "Fold" in line for line in said)


def test_every_rule_is_about_traits_that_steps_have() -> None:
    steps = [cls() for cls in registry.methods() if issubclass(cls, Technique)]
    known = {trait for step in steps for trait in traits(step)}
    known |= traits(CHANNELS) | traits(Prune(sparsity=0.9)) | {"swaps"}
    for rule in (*RULES, *MISSING):
        assert {rule.first, rule.then} <= known
        assert rule.unless in {"", *known}
