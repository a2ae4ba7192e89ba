"""Recipes as plain data and YAML, both ways, and what bad ones are told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import UnknownNameError, UsageError
from espalier.core.recipe import FileOptions, Recipe, fields_to_data, step_from_data, step_to_data
from espalier.prune import Cubic, Global, Layer, Listed, Magnitude, Prune, Random, Threshold
from espalier.recipes import DeepCompression
from espalier.share import KMeans
from espalier.train import L1, SGD, EarlyStopping, Finetune, LabelSmoothing, Shift

TEXT = """
steps:
  - prune.prune: {criterion: magnitude, scope: global, schedule: {cubic: {end: 0.5}}, sparsity: 0.92, epochs: 20}
  - share.kmeans: {bits: {"type:Conv2d": 8, "type:Linear": 5}, init: linear}
  - recipe:
      - train.finetune: {epochs: 5, lr: 1e-4, optimizer: sgd, penalties: [{l1: {strength: 1e-5}}, l2]}
  - train.batch-norm
file: {coders: [rans], floats: fp16}
"""


def test_yaml_as_people_write_it() -> None:
    recipe = Recipe.from_yaml(TEXT)
    prune, share, nested, _ = recipe.steps
    assert prune == Prune(scope=Global(), schedule=Cubic(end=0.5), sparsity=0.92, epochs=20)
    assert share == KMeans(bits={"type:Conv2d": 8, "type:Linear": 5})
    assert isinstance(nested, Recipe)
    tuned = nested.steps[0]
    assert isinstance(tuned, Finetune)
    assert tuned.lr == 1e-4
    assert tuned.optimizer == SGD()
    assert [p.id for p in tuned.penalties] == ["l1", "l2"]
    assert tuned.penalties[0] == L1(strength=1e-5)
    assert recipe.file == FileOptions(coders=("rans",), floats="fp16")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_short_forms() -> None:
    assert Recipe.from_yaml("- prune.prune\n- share.kmeans:").steps == (Prune(), KMeans())
    assert Recipe.from_data([]) == Recipe()
    assert Recipe.from_data({}) == Recipe()
    assert step_from_data("kmeans") == KMeans()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("steps: [", UsageError, "no YAML"),
        ("3", UsageError, "got int"),
        ("steps: prune", UsageError, "list 'steps'"),
        ("stages: []", UsageError, "no part 'stages'"),
        ("- prune.prun", UnknownNameError, "Did you mean 'prune.prune'"),
        ("- prune.prune: {sparsty: 0.5}", UsageError, "Did you mean 'sparsity'"),
        ("- prune.prune: {criterion: magnitud}", UnknownNameError, "Did you mean 'magnitude'"),
        ("- prune.prune: {criterion: {magnitude: {x: 1}}}", UsageError, "no field 'x'"),
        ("- prune.prune: {sparsity: many}", UsageError, "sparsity='many'"),
        ("- prune.prune: [1]", UsageError, "named fields"),
        ("- {prune.prune: {}, share.kmeans: {}}", UsageError, "a step is"),
        ("- prune.magnitude", UnknownNameError, "is a criterion, not a step"),
        ("- 7", UsageError, "a step is"),
        ("- train.finetune: {epochs: -1}", UsageError, "epochs=-1 is out of range"),
        ("- train.finetune: {epochs: 1.5}", UsageError, "epochs=1.5 is not of type int"),
        ("- train.finetune: {penalties: l1}", UsageError, "penalties='l1'"),
        ("file: {coderz: []}", UsageError, "Did you mean 'coders'"),
        ("file: {floats: fp8}", UsageError, "floats='fp8' not allowed"),
        ("file: {coders: rans}", UsageError, "coders"),
        ("file: [1]", UsageError, "file"),
        ("- recipe: {steps: [prune.prun]}", UnknownNameError, "prune.prune"),
        ("- train.finetune: {optimizer: {sgd: {}, adamw: {}}}", UsageError, "optimizer="),
        ("- prune.prune: {schedule: {listed: {values: [0.5, x]}}}", UsageError, "values="),
        ("- train.finetune: {optimizer: {adamw: {betas: [0.9]}}}", UsageError, "betas="),
        ("- train.finetune: {optimizer: {adamw: {betas: [0.9, 0.99, 0.999]}}}", UsageError, "betas="),
    ],
)
def test_bad_recipes_are_told_what_is_wrong(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Recipe.from_yaml(text)


schedules = st.one_of(
    st.builds(Cubic, start=st.floats(0, 0.4), end=st.floats(0.5, 1)),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4).map(lambda v: Listed(values=tuple(sorted(v)))),
)
steps = st.one_of(
    st.builds(
        Prune,
        criterion=st.sampled_from([Magnitude(), Random()]),
        scope=st.just(Layer()),
        schedule=schedules,
        layers=st.lists(st.text(max_size=5), max_size=2).map(tuple),
        epochs=st.integers(0, 9),
    ),
    st.builds(Prune, criterion=st.builds(Threshold, quality=st.floats(1e-9, 1e9))),
    st.builds(KMeans, bits=st.one_of(st.integers(1, 16), st.dictionaries(st.text(max_size=6), st.integers(1, 16)))),
    st.builds(
        Finetune,
        lr=st.floats(1e-12, 1e3),
        clip=st.none() | st.floats(1e-9, 10),
        smoothing=st.none() | st.builds(LabelSmoothing, amount=st.floats(0, 1)),
        stopping=st.none() | st.builds(EarlyStopping, patience=st.none() | st.integers(1, 5)),
        augment=st.lists(st.builds(Shift, pixels=st.integers(0, 5)), max_size=2).map(tuple),
    ),
    st.builds(DeepCompression, strength=st.none() | st.floats(0, 1)),
)
recipes = st.recursive(
    st.lists(steps, max_size=3).map(lambda s: Recipe(steps=tuple(s))),
    lambda inner: st.lists(inner, max_size=2).map(lambda s: Recipe(steps=tuple(s))),
    max_leaves=3,
)


@given(recipe=recipes)
@settings(max_examples=40, deadline=None)
def test_yaml_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_every_field_is_written_out() -> None:
    data = step_to_data(Prune())
    assert set(data["prune.prune"]) == set(fields_to_data(Prune()))
    assert data["prune.prune"]["schedule"] == "one-shot"
    assert data["prune.prune"]["lr_schedule"] == {"cosine": {"warmup": 0.0, "final": 0.0}}


def test_needs_of_a_recipe_are_those_of_its_steps() -> None:
    assert Recipe(steps=(Prune(), KMeans())).needs == frozenset()
    assert Recipe(steps=(Prune(), Recipe(steps=(Finetune(),)))).needs == {"train"}
    assert Finetune(stopping=EarlyStopping(), smoothing=LabelSmoothing()).needs == {"train", "val", "labels"}
    assert Finetune(epochs=0, stopping=EarlyStopping()).needs == frozenset()


def test_yaml_cannot_build_python_objects() -> None:
    with pytest.raises(UsageError, match="no YAML"):
        Recipe.from_yaml("steps: [!!python/object/apply:os.getcwd []]")
